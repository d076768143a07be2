"""What `multrace flow` can compute about a question: a reading with its settings, its files and its average."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from ..models import Prompt, VisionLanguageModel
from ..tracing import Engine
from ..tracing.engine.scoring import same_answer
from ..tracing.knockout.average import FilteredQuestion
from .errors import CommandError
from .flow_questions import FlowQuestion

Files = Mapping[str, Callable[[Path], Any]]
"""File name -> function that writes the file to a path."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """One question to one model, as readings take it."""

    vlm: VisionLanguageModel
    question: FlowQuestion
    prompt: Prompt
    generated: str
    """The model's own answer."""
    engine: Engine
    progress: bool
    """Whether readings show their own progress bars."""

    @property
    def answered(self) -> "Answered":
        """The question with its answer."""
        return Answered(question=self.question, generated=self.generated)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    """A question and the model's own answer."""

    question: FlowQuestion
    generated: str

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is right; None if the right answer is not known."""
        return None if self.question.gold is None else same_answer(self.generated, self.question.gold)

    @property
    def verdict(self) -> str:
        """The answer, and whether it is right, as text."""
        known = {None: "", True: ", right", False: f", wrong: the right answer is {self.question.gold!r}"}
        return f"{self.generated!r}{known[self.is_right]}"


class Stored(Sequence[tuple[Answered, Any]]):
    """Answered questions with their results, each of which is read from its file when it is asked for."""

    def __init__(self, kind: type, files: Sequence[tuple[Answered, Path]]) -> None:
        self._kind, self._files = kind, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        answered, path = self._files[index]
        return answered, self._kind.load(path)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One kind of result; the fields of its subclasses are its settings."""

    name: ClassVar[str]
    """Name of its files."""
    analysis: ClassVar[str]
    """The option that chooses it, without dashes."""
    kind: ClassVar[type]
    """The class that `compute` returns, which can be saved and loaded."""
    drawings: ClassVar[tuple[str, ...]]
    """Names of the further files that `files` may return."""
    average_drawings: ClassVar[tuple[str, ...]] = ()
    """Names of the further files that `average_files` may return; none if there is no average."""
    counts_wrong: ClassVar[bool] = False
    """Whether questions that the model answers wrongly are included."""
    uses_engine: ClassVar[bool] = False

    def check_settings(self) -> None:
        """Raises `CommandError` or `TraceError` for settings that no model could follow."""

    def check(self, question: FlowQuestion) -> None:
        """Raises `CommandError` for a question that lacks what this reading needs."""

    def compute(self, asked: Asked) -> Any:
        """Return the result for one question. Raises `ModelError` or `TraceError` if there is none."""
        raise NotImplementedError

    def files(self, result: Any, prompt: Prompt) -> Files:
        """Return the further files for one question."""
        raise NotImplementedError

    def told(self, result: Any) -> list[str]:
        """Return the result as lines of text."""
        raise NotImplementedError

    def average(self, found: Sequence[tuple[Answered, Any]], filtered: Sequence[FilteredQuestion]) -> Any:
        """Return the average of results, which has save, plot and to_dataframe. Raises `TraceError` if there is none.

        filtered: questions that were left out for a wrong answer.
        """
        raise NotImplementedError

    def average_files(self, average: Any) -> Files:
        """Return the further files of the average."""
        return {f"{self.name}.png": average.plot, f"{self.name}.csv": lambda path: write_table(average, path)}

    def average_told(self, average: Any) -> list[str]:
        """Return the average as lines of text."""
        raise NotImplementedError

    @property
    def file(self) -> str:
        """The name of the file of a result or an average."""
        return f"{self.name}.safetensors"

    @property
    def has_average(self) -> bool:
        """Whether results of several questions are averaged."""
        return bool(self.average_drawings)

    def settings(self) -> dict[str, Any]:
        """Return name and settings, which identify a result that is kept."""
        return {"reading": self.name, **asdict(self)}


def write_table(result: Any, path: Path) -> None:
    """Write the result's data frame as CSV."""
    result.to_dataframe().to_csv(path, index=False)


def check_group(name: str, known: Sequence[str]) -> None:
    """Raises `CommandError` with the nearest name, unless this is a known token group or a named constraint."""
    if name in known or name.startswith("constraint:"):
        return
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}, and positions as numbers"
    raise CommandError(f"no token group {name!r}; {hint}")


def need_image(question: FlowQuestion, analysis: str) -> None:
    """Raises `CommandError` for a question without a picture."""
    if question.image is None:
        raise CommandError(f"--{analysis} needs a picture; pass --image, or 'image' in the record")


def need_constraint(question: FlowQuestion, analysis: str) -> None:
    """Raises `CommandError` for a question without a constraint."""
    if not question.spans:
        raise CommandError(
            f"--{analysis} needs the words of the question that name its subject; pass --constraint, or 'constraint' "
            "in the record"
        )
