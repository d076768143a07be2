"""Names of other things of a kind, as the model itself gives them: no list and no knowledge of answers is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch

from ...data.facts import Question
from ...models import Prompt, VisionLanguageModel
from ..requests import continuations_where_finite

_LONGEST = 6
"""Maximum number of words of a name."""
_TOKENS = 7
"""Number of tokens that a branch is continued by: enough for most names and the word after them."""
_BROKEN = "\ufffd"  # what half a letter is decoded to
_END = r"[.,;:!?\n()]"
_JOINS = ("and ", "or ", "such as ", "including ")


@torch.no_grad()
def other_subjects(vlm: VisionLanguageModel, question: Question, *, number: int = 24) -> tuple[str, ...]:
    """Return names of other subjects that the question could be asked about, the most probable first.

    The model goes on after the subject with a comma, as in a list, once with each of the most probable next tokens.
    Where words stand before the subject ("The capital of Australia is"), it also goes on after these, up to the words
    that follow the subject in the question, and the two give names in turn. Greedy, and so always the same.

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
    lists = [_names(vlm, question, f"{subject},", _END, number)]
    if before.strip():
        following = " ".join(after.split()[:2])
        end = rf"{_END}|(?<!\S){re.escape(following)}(?!\w)" if following else _END
        lists.append(_names(vlm, question, before.rstrip(), end, number))
    names = dict.fromkeys(name for turn in zip_longest(*lists) for name in turn if name is not None)
    return tuple(name for name in names if not overlap(name, subject))[:number]


def _names(vlm: VisionLanguageModel, question: Question, start: str, end: str, number: int) -> Iterator[str]:
    """The beginning of each branch after a text, up to its end, where that is a name."""
    prompt = vlm.prompt(None, start, template=question.template)
    special = {*vlm.tokenizer.all_special_ids}  # no name begins with the end of a text, and no prompt may spell one
    ranked = vlm.logits(prompt)[0, -1].topk(min(number + len(special), vlm.vocab)).indices.tolist()
    first = [token for token in ranked if token not in special][:number]
    branches = [start + text for text in beginnings(vlm, prompt, first) if text.strip()]
    asked = [Question(text=text, template=question.template) for text in branches]
    found = continuations_where_finite(vlm, asked, max_new_tokens=_TOKENS, batch_size=max(1, number))
    for text, continuation in zip(branches, found, strict=True):
        if continuation is None:
            continue
        match = re.search(end, whole := (text + continuation.text)[len(start) :])
        if match is None and not continuation.stopped:
            continue
        name = whole[: match.start()].strip() if match else whole.strip()
        for join in _JOINS:
            name = name.removeprefix(join)
        words = name.removeprefix("the ").split()
        is_short = 0 < len(words) <= _LONGEST and _BROKEN not in name
        if is_short and words[0][0].isupper() and words[-1][0].isupper():
            yield name


def beginnings(vlm: VisionLanguageModel, prompt: Prompt, tokens: Sequence[int]) -> list[str]:
    """Return the text of each of these tokens after a prompt, blanks included; none for special and other added ones.

    A token alone is not decoded: many tokenizers drop the blank before the first word of a text.
    """
    last = prompt.inputs["input_ids"][0, -1].item()
    before = vlm.tokenizer.decode([last])
    added = vlm.tokenizer.added_tokens_decoder
    return [vlm.tokenizer.decode([last, token])[len(before) :] for token in tokens if token not in added]


def overlap(name: str, subject: str) -> bool:
    """Return whether one of two names contains the other, whatever the case and a leading article."""
    one, other = name.casefold().removeprefix("the "), subject.casefold().removeprefix("the ")
    return one in other or other in one
