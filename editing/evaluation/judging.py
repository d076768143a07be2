"""A judge of free answers: the caller's function, asked once about each answer, whose errors cost only one verdict."""

import logging
import math
from collections.abc import Callable

from ..requests import EditError

logger = logging.getLogger("multrace")
Judge = Callable[[str, str, str], bool | float]
"""A function judge(question, expected, answer): whether the answer means what is expected, or how far, from 0 to 1."""


class Verdicts:
    """The verdicts of one judge. Equal answers to equal questions are judged once, and an empty answer is wrong.

    judge: the function that is asked; it is called in this process, and nothing of it is stored but its name.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.problems: list[str] = []
        """Why there is no verdict, for each question that lacks one."""
        self._known: dict[tuple[str, str, str], float] = {}

    @property
    def name(self) -> str:
        """The module and the name of the judge, such as "judges.same_person"; of an object, those of its class."""
        named = self.judge if hasattr(self.judge, "__qualname__") else type(self.judge)
        return f"{named.__module__}.{named.__qualname__}"

    def of(self, question: str, expected: str, answers: tuple[str, str]) -> tuple[float, float] | None:
        """Return the verdicts on the answers of the unedited and the edited model; None if one of them fails."""
        if not expected.strip():
            return None  # a model that said nothing had no answer that could be expected again
        try:
            before, after = (self._verdict(question, expected, answer) for answer in answers)
        except Exception as error:  # whatever a caller's function may raise
            self.problems.append(f"{question!r}: {type(error).__name__}: {error}")
            return None
        return before, after

    def warn(self) -> None:
        """Log how many questions have no verdict, and why the first one has none."""
        if self.problems:
            logger.warning(
                "the judge %s failed on %d questions, which have no verdict; the first: %s",
                *(self.name, len(self.problems), self.problems[0][:300]),
            )

    def _verdict(self, question: str, expected: str, answer: str) -> float:
        asked = (question, expected, answer)
        if not answer.strip():
            return 0.0
        if asked not in self._known:
            said = self.judge(*asked)
            if not isinstance(said, bool | int | float) or not 0 <= said <= 1 or math.isnan(said):
                raise EditError(f"the judge returned {said!r}; return True, False or a number from 0 to 1")
            self._known[asked] = float(said)
        return self._known[asked]
