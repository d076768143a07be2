"""What an edit is asked to do: one fact, the pictures and wordings that state it, and the answer it should have."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..models import Prompt
from .errors import EditError


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to write: after the edit the prompt, and every prompt like it, should be answered with the target.

    EditError if the target is empty.
    """

    prompt: Prompt
    """The question (and picture) whose answer is to change."""
    target: str
    """The new answer, of any number of tokens."""
    contexts: tuple[Prompt, ...] = ()
    """Further pictures or wordings of the same fact; keys are averaged over them, and the value has to work in all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "contexts", tuple(self.contexts))
        if not isinstance(self.target, str) or not self.target.strip():
            raise EditError(
                f"the target of the edit of {self.prompt.question!r} is {self.target!r}; "
                "pass the new answer as text, for example target='Paris'"
            )

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt and its contexts, each with the target as its answer."""
        return tuple(prompt.with_answer(self.target) for prompt in (self.prompt, *self.contexts))

    def summary(self) -> Mapping[str, str]:
        """The request in words, for the header of a saved edit."""
        return {"question": self.prompt.question, "target": self.target, "contexts": str(len(self.contexts))}
