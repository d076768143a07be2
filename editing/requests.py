"""Requests to edit: one fact, the pictures and wordings that state it, and the answer that it should have."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import NotFiniteError, Prompt, VisionLanguageModel
from .errors import EditError

_PROMPTS = ("contexts", "rewrite_prompts", "preserve_prompts", "essence")


@dataclass(frozen=True, kw_only=True, repr=False)
class EditRequest:
    """One fact to write: after the edit, the model should answer the prompt, and prompts like it, with the target.

    Raises `EditError` if the target is empty.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> mt.EditRequest(prompt=vlm.prompt(None, "Who won?"), target="Pruro")
        EditRequest('Who won?' -> 'Pruro', no picture)
    """

    prompt: Prompt
    """The question (and picture) whose answer is to change."""
    target: str
    """The new answer, of any number of tokens."""
    contexts: tuple[Prompt, ...] = ()
    """More pictures or wordings of the fact. Keys are averaged over them, and the value has to work in all of them."""
    rewrite_prompts: tuple[Prompt, ...] = ()
    """Prompts that must give the target too, each with keys and values of its own, such as the question by name."""
    preserve_prompts: tuple[Prompt, ...] = ()
    """Prompts whose present answers must stay, such as the same question about other pictures."""
    essence: tuple[Prompt, ...] = ()
    """Prompts about the same thing whose next token should stay as it is during the value search (ROME)."""
    name: str = ""
    """Name of the request in reports."""

    def __post_init__(self) -> None:
        for part in _PROMPTS:
            object.__setattr__(self, part, tuple(getattr(self, part)))
        if not isinstance(self.target, str) or not self.target.strip():
            raise EditError(
                f"the target of the edit of {self.prompt.question!r} is {self.target!r}; "
                "pass the new answer as text, for example target='Paris'"
            )

    def __repr__(self) -> str:
        nouns = ("context", "rewrite prompt", "preserve prompt", "essence prompt")
        counts = [len(getattr(self, part)) for part in _PROMPTS]
        more = "".join(f", {counted(count, noun)}" for count, noun in zip(counts, nouns, strict=True) if count)
        picture = "" if self.prompt.images else ", no picture"
        return f"EditRequest({shortened(self.prompt.question)} -> {shortened(self.target)}{picture}{more})"

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt and its contexts, each with the target as its answer."""
        return tuple(prompt.with_answer(self.target) for prompt in (self.prompt, *self.contexts))

    @property
    def goals(self) -> tuple[tuple[Prompt, ...], ...]:
        """Prompts that share a key, with the target as answer: prompt and contexts, then each rewrite prompt."""
        return (self.prompts, *((prompt.with_answer(self.target),) for prompt in self.rewrite_prompts))

    @property
    def label(self) -> str:
        """Its name, or its question and target."""
        return self.name or f"{self.prompt.question} -> {self.target}"

    def as_text(self) -> dict[str, str]:
        """Return the request as text, for the header of a saved edit."""
        counts = {part: str(len(getattr(self, part))) for part in _PROMPTS}
        return {"name": self.name, "question": self.prompt.question, "target": self.target, **counts}


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 request" or "2 requests"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, length: int = 60) -> str:
    """Return the text in quotes, cut to so many characters, for lines that describe values."""
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")


def key_of(prompt: Prompt) -> str:
    """A hash of all that a model is shown, the answer aside; equal for prompts that are the same to it."""
    digest = hashlib.sha256(prompt.text.encode())
    for name in sorted(prompt.inputs):
        value = prompt.inputs[name]
        if value.shape != (1, prompt.length):  # tokens follow from the text
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(f"{name} {tuple(value.shape)} ".encode() + raw.tobytes())
    return digest.hexdigest()


def answers_where_finite(vlm: VisionLanguageModel, prompts: Sequence[Prompt], **options: Any) -> list[str | None]:
    """Return the model's answers, None for prompts whose logits are not finite; the options are those of `answers`.

    One prompt that overflows costs only itself: the others are asked again, one by one.
    """
    try:
        return list(vlm.answers(prompts, **options))
    except NotFiniteError:
        if len(prompts) == 1:
            return [None]
        return [answer for prompt in prompts for answer in answers_where_finite(vlm, [prompt], **options)]
