"""Finding a phrase in a question and the tokens that hold it, by character offsets."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from .errors import ModelError
from .texts import check_text


def find_span(question: str, span: str) -> tuple[int, int]:
    """Start and end (exclusive) of the first place where the question says the span.

    Whole words and the same case are preferred, in this order: same case and whole words, any case and whole words,
    same case inside a word, any case inside a word. Runs of blanks match each other. ModelError shows the question
    and the nearest words if the span is not there.
    """
    words = check_text(span, "constraint").split()
    if not words:
        raise ModelError("the constraint is empty; pass the words of the question that name its subject")
    pattern = r"\s+".join(re.escape(word) for word in words)
    for form in (rf"(?<!\w){pattern}(?!\w)", pattern):
        for flags in (0, re.IGNORECASE):
            if match := re.search(form, question, flags):
                return match.span()
    raise ModelError(
        f"{span!r} is not in the question {question!r}; the nearest words are {nearest_words(question, span)!r}"
    )


def nearest_words(question: str, span: str) -> str:
    """The run of the question's words that is most like the span (difflib ratio, case ignored)."""
    words = list(re.finditer(r"\S+", question))
    length = len(span.split())
    runs = [
        question[words[start].start() : words[end - 1].end()]
        for start in range(len(words))
        for end in range(start + 1, min(start + length + 2, len(words) + 1))
    ]
    return max(runs, key=lambda run: SequenceMatcher(None, run.lower(), span.lower()).ratio(), default="")


def covering(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, ...]:
    """Indices of the tokens that hold at least one character of [start, end).

    A token that only holds the blank before the span is not among them; one that holds the blank and the first word is.
    Special tokens that a tokenizer adds have empty offsets and are never among them.
    """
    return tuple(index for index, (first, last) in enumerate(offsets) if first < last and first < end and start < last)
