"""Answers as the VQA v2 evaluation reads them: lower case, no articles, digits for number words, no stray marks."""

import re
from collections.abc import Iterator

_ARTICLES = ("a", "an", "the")
_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
_NUMBERS |= {"none": "0"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = (
    "ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't "
    "must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're "
    "why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
).split()
_BETWEEN_DIGITS, _FULL_STOP = re.compile(r"\d,\d"), re.compile(r"\.(?!\d)")


def _misspelt(word: str) -> Iterator[str]:
    """The word with one of its apostrophes left out, in every way."""
    return (word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'")


# Only what the published table turns into something else: it leaves "im" and "shes" alone, and so does this.
_CONTRACTIONS = {form: word for word in _CONTRACTED for form in _misspelt(word)}


def vqa_normalised(text: str) -> str:
    """The answer as the VQA v2 evaluation compares it.

    Marks go where they touch a blank, and all go if a comma stands between digits ("1,000"); elsewhere they become
    blanks. A full stop stays only before a digit. Then lower case; number words up to ten (and "none") become digits,
    articles go, and contractions get back their apostrophes ("dont" is "don't").
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    closed = _BETWEEN_DIGITS.search(text) is not None
    without = text
    for mark in _MARKS:
        touches_blank = f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if touches_blank or closed else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", without).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
