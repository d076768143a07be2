"""Prompts that a model makes by itself: texts that it samples, and its own answers to questions about pictures."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...data.facts import EditRequest, PictureSource, Question
from ...models import ModelError, Prompt, VisionLanguageModel
from ..requests import EditError

QUESTIONS = (
    "What does this picture show?",
    "Describe the picture.",
    "What is in the middle of the picture?",
    "Which colours are in this photo?",
    "Where was this photo taken?",
    "Who or what is this?",
)
"""What is asked about pictures: no edit is about it."""
PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
QUIET_SECONDS = 2
"""Work that is done sooner shows no progress bar."""
_TEXTS, _ANSWERS = 32, 8
"""Numbers of texts and of answers that are sampled together."""
_MOST_PICTURES = 16
"""Number of pictures that are taken from requests: the first ones, so that requests that are added change nothing."""
_STREAMS = 1_000_003
"""Distance of the seeds of two samples, so that those of neighbouring seeds do not meet."""
Row = tuple[Question, str | None]
"""A question and the model's own answer to it; a text that the model sampled is a question without an answer."""


def own_prompts(
    vlm: VisionLanguageModel,
    *,
    pictures: str | Path | Sequence[PictureSource] = (),
    questions: Sequence[str] = (),
    number: int = 200,
    tokens: int = 48,
    seed: int = 0,
    progress: bool = True,
) -> Sequence[Prompt]:
    """Return prompts that the model makes by itself, for second moments of keys without any corpus.

    They are texts that it samples from nothing (`vlm.opening`), each token from its whole distribution. With pictures,
    every second prompt is a question about one of them with a sampled answer. Where the model ends its texts at once,
    questions without pictures and their sampled answers take their place. The first prompts of a larger number are
    those of a smaller one.

    Args:
        vlm: The unedited model.
        pictures: Pictures to ask about, or a folder of them; none for a text-only model.
        questions: What to ask about the pictures; by default a few general questions, which no edit is about.
        number: The number of prompts.
        tokens: Maximum length in tokens of a text or an answer.
        seed: Random seed of the samples.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        A sequence that makes each prompt when it is read, since those with pictures would not fit into memory together.

    Raises:
        EditError: A number is below 1, or a folder holds no picture.
        ModelError: A picture cannot be read, or a prompt does not fit into the model's positions.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompts = mt.editing.own_prompts(vlm, number=3)
        >>> len(prompts), prompts[0].tokens[0], prompts[0].answer
        (3, '<s>', None)
    """
    if number < 1:
        raise EditError(f"own prompts with number={number}; pass at least 1")
    shown, asked, options = (
        pictures_to_ask_about(pictures),
        tuple(questions) or QUESTIONS,
        {"tokens": tokens, "seed": seed},
    )
    answers = answer_rows(vlm, shown, asked, **options) if shown else None
    rows = mixed(text_rows(vlm, asked, **options), answers)
    bar = tqdm(islice(rows, number), desc="sampling texts", total=number, unit="text", delay=QUIET_SECONDS,
               disable=not progress, leave=False)  # fmt: skip
    return OwnPrompts(vlm, tuple(bar))


class OwnPrompts(Sequence[Prompt]):
    """Prompts that are made of questions and answers when they are read."""

    def __init__(self, vlm: VisionLanguageModel, rows: Sequence[Row]) -> None:
        self.rows, self._vlm = rows, vlm

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return OwnPrompts(self._vlm, self.rows[index])
        return prompt_of(self._vlm, self.rows[index])

    def __repr__(self) -> str:
        pictures = sum(bool(question.images) for question, _ in self.rows)
        return f"OwnPrompts({len(self.rows)} prompts, {pictures} with pictures)"


def prompt_of(vlm: VisionLanguageModel, row: Row) -> Prompt:
    """Return the prompt of a question with its answer."""
    question, answer = row
    return vlm.prompt_for(question, answer=answer)


def text_rows(vlm: VisionLanguageModel, questions: Sequence[str], *, tokens: int, seed: int) -> Iterator[Row]:
    """Yield texts that the model samples, and, where it ends them at once, questions with its own answers.

    There is no end to them. Raises `EditError` or `ModelError` as `own_prompts`.
    """
    if tokens < 1:
        raise EditError(f"own prompts of tokens={tokens}; pass at least 1")
    yield from _texts(vlm, tokens, seed)
    yield from answer_rows(vlm, (), questions, tokens=tokens, seed=seed)


def mixed(texts: Iterable[Row], answers: Iterable[Row] | None) -> Iterator[Row]:
    """Yield a text and an answer in turn, or the texts alone where there are no pictures to ask about."""
    if answers is None:
        yield from texts
    else:
        yield from chain.from_iterable(zip(texts, answers, strict=False))


def pictures_to_ask_about(pictures: str | Path | Sequence[PictureSource]) -> tuple[PictureSource, ...]:
    """Return the pictures, or those that a folder holds, by name. Raises `EditError` for a folder without any."""
    if not isinstance(pictures, str | Path):
        return tuple(Path(picture) if isinstance(picture, str) else picture for picture in pictures)
    folder = Path(pictures).expanduser()
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise EditError(
            f"no picture in the folder {str(pictures)!r}; pass a folder with files such as photo.jpg, or pictures=()"
        )
    return tuple(found)


def pictures_of_requests(requests: Sequence[EditRequest]) -> tuple[PictureSource, ...]:
    """Return the pictures that requests are about, each once: the first 16, in order."""
    found: dict[object, PictureSource] = {}
    for request in requests:
        for question in (request.question, *request.contexts, *request.rewrite_prompts, *request.preserve_prompts):
            for picture in question.images:
                found.setdefault(picture if isinstance(picture, Path) else id(picture), picture)
        if len(found) >= _MOST_PICTURES:
            break
    return tuple(found.values())[:_MOST_PICTURES]


def _texts(vlm: VisionLanguageModel, tokens: int, seed: int) -> Iterator[Row]:
    """Yield texts that the model samples from nothing, until it ends all that it samples together at once."""
    opening = vlm.opening()
    room = tokens if vlm.positions is None else min(tokens, vlm.positions - opening.length)
    for number in count():
        stream = _STREAMS * seed + 2 * number
        options = {"max_new_tokens": room, "seed": stream, "batch_size": _TEXTS}
        texts = [each.text for each in vlm.continuations([opening] * _TEXTS, **options)]
        rows = [row for text in texts if (row := _row(vlm, opening.text + text)) is not None]
        if not rows:
            return
        yield from rows


def _row(vlm: VisionLanguageModel, text: str) -> Row | None:
    """A text with the blanks before it as its template, so that it gets the tokens it was sampled with, or nearly."""
    body = text.strip()
    if not body:
        return None
    question = Question(text=body, template=text[: len(text) - len(text.lstrip())] + "{question}")
    try:
        vlm.prompt_for(question)
    except ModelError:  # the model has spelt a special token, or more than it has positions for
        return None
    return question, None


def answer_rows(
    vlm: VisionLanguageModel, pictures: Sequence[PictureSource], questions: Sequence[str], *, tokens: int, seed: int
) -> Iterator[Row]:
    """Yield questions about one picture after the other, or about none, with answers that the model samples."""
    for number in count():
        places = range(number * _ANSWERS, (number + 1) * _ANSWERS)
        asked = [
            Question(
                text=questions[(place + place // max(1, len(pictures))) % len(questions)],
                image=pictures[place % len(pictures)] if pictures else None,
            )
            for place in places
        ]
        options = {"max_new_tokens": tokens, "seed": _STREAMS * seed + 2 * number + 1, "batch_size": _ANSWERS}
        answers = vlm.continuations([vlm.prompt_for(question) for question in asked], **options)
        for question, answer in zip(asked, answers, strict=True):
            yield _answered(vlm, question, answer.text)


def _answered(vlm: VisionLanguageModel, question: Question, answer: str) -> Row:
    """A question with its answer, or without one that is empty or holds a special token."""
    if answer.strip():
        try:
            vlm.prompt_for(question, answer=answer)
        except ModelError:
            return question, None
        return question, answer
    return question, None
