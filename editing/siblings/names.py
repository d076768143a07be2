"""Names of other things of a kind, as the model itself gives them: no list and no knowledge of answers is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from ...data.facts import Question
from ...models import VisionLanguageModel

_LONGEST = 6
"""Maximum number of words of a name."""
_TOKENS = 7
"""Number of tokens that a branch is continued by: enough for most names and the word after them."""
_END = r"[.,;:!?\n()]"
_JOINS = ("and ", "or ", "such as ", "including ")


@torch.no_grad()
def other_subjects(vlm: VisionLanguageModel, question: Question, *, number: int = 24) -> tuple[str, ...]:
    """Return names of other subjects that the question could be asked about, the most probable first.

    Where words stand before the subject ("The capital of Australia is"), the model goes on after them once with each of
    the most probable next tokens, up to the words that follow the subject in the question. Otherwise it goes on after
    the subject with a comma, as in a list. Greedy, and so always the same.

    Args:
        vlm: The model.
        question: A question without a picture whose constraint names the subject.
        number: Number of branches, and the maximum number of names.

    Returns:
        Names with a capital letter that do not contain the subject and are not contained in it; fewer than `number` if
        branches end in no name, and none for a question whose constraint is no single span of words.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing.siblings import other_subjects
        >>> vlm = mt.load(tiny_vlm_path())
        >>> question = mt.Question(text="Who founded Draivo?", constraint="Draivo")
        >>> "Draivo" in other_subjects(vlm, question, number=4)
        False
    """
    subject = question.constraint
    if not isinstance(subject, str) or question.text.count(subject) != 1:
        return ()
    before, after = question.text.split(subject)
    if before.strip():
        following = " ".join(after.split()[:2])
        start, end = before.rstrip(), f"{_END}|{re.escape(following)}" if following else _END
    else:
        start, end = f"{subject},", _END
    names = dict.fromkeys(_names(vlm, question, start, end, number))
    return tuple(name for name in names if not _overlap(name, subject))[:number]


def _names(vlm: VisionLanguageModel, question: Question, start: str, end: str, number: int) -> Iterator[str]:
    """The beginning of each branch after a text, up to its end, where that is a name."""
    prompt = vlm.prompt(None, start, template=question.template)
    special = {*vlm.tokenizer.all_special_ids}  # no name begins with the end of a text, and no prompt may spell one
    ranked = vlm.logits(prompt)[0, -1].topk(min(number + len(special), vlm.vocab)).indices.tolist()
    first = [token for token in ranked if token not in special][:number]
    branches = [text for token in first if (text := start + vlm.tokenizer.decode([token])).strip() != start]
    prompts = [vlm.prompt(None, text, template=question.template) for text in branches]
    found = vlm.continuations(prompts, max_new_tokens=_TOKENS, batch_size=number) if prompts else []
    for text, continuation in zip(branches, found, strict=True):
        match = re.search(end, whole := (text + continuation.text)[len(start) :])
        if match is None and not continuation.stopped:
            continue
        name = whole[: match.start()].strip() if match else whole.strip()
        for join in _JOINS:
            name = name.removeprefix(join)
        words = name.removeprefix("the ").split()
        if words and len(words) <= _LONGEST and words[0][0].isupper() and words[-1][0].isupper():
            yield name


def _overlap(name: str, subject: str) -> bool:
    one, other = name.casefold().removeprefix("the "), subject.casefold().removeprefix("the ")
    return one in other or other in one
