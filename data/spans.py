"""Search for a phrase in a question regardless of spelling variants."""

import operator
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from .errors import DataError
from .facts import Words

_LOOKALIKES = str.maketrans(
    {
        mark: plain
        for plain, marks in (
            ("'", "\u2018\u2019\u201a\u201b\u2032\u02bc\u0060\u00b4"),
            ('"', "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"),
            ("-", "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"),
        )
        for mark in marks
    }
)
"""Quotation marks, apostrophes and dashes that are used interchangeably."""

_AUXILIARIES = frozenset("is are was were has have had does did can could will would may might must should".split())
_NO_NOUNS = _AUXILIARIES | frozenset(
    "a an the this that these those i you he she it we they who whom whose which what when where why how "
    "of in on at by for from to with without into onto over under up down off out about above below behind beside "
    "between near like as than and or but nor not no so if because while be been being do "
    "first last also most more best often still just now then here there usually always never ever only even both all "
    "born known made shown worn grown seen held taken eaten found used called come came get got go went won wrote took "
    "began left met led sang ran sold built lost look use eat live take make fall happen cost taste feel cause".split()
)
"""Words that follow a whole span: particles, pronouns, adverbs, and verbs that no ending tells."""
_ADJECTIVE = re.compile(r"\b(?:\w+-(?:\w*ed|known|old)|\w{3,}(?:ical|ious|eous|less|itional|ational)|bald)$")
"""The end of a span whose last word is an adjective by its ending."""
_INVERTED = re.compile(
    r"\b(is|are|was|were|do|does|did) (?:this|that|these|those|the|a|an|it|there|he|she|they|you|we)\b"
)
"""A verb with the subject of a question after it, in lower case: titles such as "This Is It" are written otherwise."""
_RELATIVE = re.compile(r"\b(?:who|whom|whose|which|that|where|when|what|how|why|if)\b", re.IGNORECASE)
"""Words that may open a clause inside a noun phrase, in which a verb is at home."""
_DEMONSTRATIVES = ("this", "these", "that", "those", "the")
_LONGEST_OPENING = 3
"""Largest number of words of a span that opens a question."""


def find_spans(question: str, span: Words) -> tuple[tuple[int, int], ...]:
    """Return (start, end) of each place in the question that the span names, in characters, the end exclusive.

    Whole words come before parts of words, and within each the same characters come first, then characters that look
    alike (composed and decomposed accents, kinds of blanks, quotation marks and dashes, invisible characters,
    compatibility forms such as ligatures), then the same letters in any case. Runs of blanks match each other. Only the
    best of these ways counts: "Apple" is found in "Is the apple by Apple?" once.

    Args:
        question: The text to search.
        span: The words; or (words, number) for one of several occurrences, counted from 0 or, if negative, from the
            last; or (words, "all") for all of them.

    Raises:
        DataError: The question does not contain the words (the message shows the nearest ones), or repeats them
            and the span does not choose.
    """
    words, choice = _chosen(span)
    matches = _occurrences(question, words)
    if not matches:
        raise DataError(_absent(question, words))
    if choice == "all":
        return matches
    if choice is None and len(matches) > 1:
        places = ", ".join(f"{start} to {end}" for start, end in matches)
        raise DataError(
            f"the question {question!r} says {words!r} {len(matches)} times (characters {places}); pass more of the "
            f"words around one of them, or constraint=({words!r}, number) with a number from 0 to {len(matches) - 1}, "
            f'or ({words!r}, "all")'
        )
    number = choice or 0
    if not -len(matches) <= number < len(matches):
        raise DataError(
            f"the question {question!r} says {words!r} {len(matches)} times, so there is no occurrence {number}; pass "
            f"a number from 0 to {len(matches) - 1}"
        )
    return (matches[number],)


def find_span(question: str, span: Words) -> tuple[int, int]:
    """Return (start, end) of the one place that the span names; with "all", from the first place to the last's end."""
    spans = find_spans(question, span)
    return spans[0][0], spans[-1][1]


def says_once(question: str, span: str) -> bool:
    """Return whether the question contains the words exactly once, so that no occurrence needs to be chosen."""
    return len(_occurrences(question, span)) == 1


def nearest_words(question: str, span: str) -> str:
    """Return the run of the question's words that is most similar to the span (difflib ratio, case ignored)."""
    words = list(re.finditer(r"\S+", question))
    length = len(span.split())
    runs = [
        question[words[start].start() : words[end - 1].end()]
        for start in range(len(words))
        for end in range(start + 1, min(start + length + 2, len(words) + 1))
    ]
    return max(runs, key=lambda run: SequenceMatcher(None, run.lower(), span.lower()).ratio(), default="")


def noun_after(question: str, end: int) -> str | None:
    """Return the words with which the question goes on if they seem to be the noun that a span lacks, else None.

    "This operating system is made by" goes on with "system" after the span "This operating". No language model is
    asked: the next word is no verb, particle or adverb as far as lists and endings tell, and it ends with "'s"; or an
    auxiliary verb, a comma or, if the span opens the question, another verb follows it or the word after it; or the
    span ends with an adjective that its ending tells.

    Args:
        question: The text.
        end: Where the span ends, in characters.

    Example:
        >>> from multrace.data.spans import noun_after
        >>> noun_after("The capital of this short-lived state was", 30), noun_after("This person died in", 11)
        ('state', None)
    """
    span, after = question[:end], question[end:].replace("\u2019", "'")
    words = re.match(r" +([\w-]+)('s)?(?: +([\w-]+))?(?: +([\w-]+))?", after)
    if words is None or not span or span.endswith(("'s", "\u2019s")) or not _may_be_noun(words[1]):
        return None
    noun, possessive, second, third = words.groups()
    opens = len(span.split()) <= _LONGEST_OPENING and span.split()[0].casefold() in _DEMONSTRATIVES
    if possessive or _ADJECTIVE.search(span.casefold()) or _ends_noun(after[words.end(1) :], second, opens):
        return noun
    if second is not None and _may_be_noun(second) and _ends_noun(after[words.end(3) :], third, False):
        return f"{noun} {second}"
    return None


def verb_within(span: str) -> str | None:
    """Return the verb of the question that a span holds although it belongs to no noun phrase, else None.

    "cat is this" from "What kind of cat is this?" holds "is": the subject of the question comes after it. A verb after
    a word that may open a relative clause is not counted.

    Args:
        span: The words.

    Example:
        >>> from multrace.data.spans import verb_within
        >>> verb_within("cat is this"), verb_within("the man whose hat is the largest"), verb_within("this cat")
        ('is', None, None)
    """
    match = _INVERTED.search(" ".join(span.split()))
    if match is None or _RELATIVE.search(span[: match.start()]):
        return None
    return match[1]


def _chosen(span: Words) -> tuple[str, int | Literal["all"] | None]:
    """Return the words of a span and the chosen occurrence; None for the only one."""
    words, choice = span if isinstance(span, tuple | list) and len(span) == 2 else (span, None)
    if not isinstance(words, str):
        raise DataError(f"the constraint is of type {type(words).__name__}, not a string; pass its words as a string")
    if not words.strip():
        raise DataError("the constraint is empty; pass the words of the question that name its subject")
    if choice is None or choice == "all":
        return words, choice
    try:
        return words, operator.index(choice)
    except (TypeError, RuntimeError) as error:  # torch raises RuntimeError for a tensor of several numbers
        raise DataError(
            f"the number of the occurrence is {choice!r}, of type {type(choice).__name__}; pass a whole number"
        ) from error


def _may_be_noun(word: str) -> bool:
    """Return whether a word may be a noun in the singular: lists and endings show no other kind of word."""
    word = word.casefold()
    may_be_verb = word.endswith("s") and not word.endswith(("ss", "us", "is", "series", "species"))
    return word[:1].isalpha() and word not in _NO_NOUNS and not may_be_verb and not word.endswith(("ing", "ed", "ly"))


def _ends_noun(after: str, following: str | None, opens: bool) -> bool:
    """Return whether what comes after a noun shows its end: a comma, an auxiliary verb or, in an opening, any verb."""
    verb = (following or "").casefold()
    return after.startswith(",") or verb in _AUXILIARIES or opens and verb.endswith(("s", "ed"))


def _occurrences(question: str, words: str) -> tuple[tuple[int, int], ...]:
    """Return every place of the words, by the best kind of match that finds any."""
    for whole in (True, False):
        for fold in (_same, _lookalike, _caseless):
            wanted = _folded(words, fold).text.strip()
            if places := tuple(_matches(_folded(question, fold), wanted, whole)):
                return places
    return ()


@dataclass(frozen=True, kw_only=True)
class _Folded:
    """A text with equivalent spellings made equal, and the origins of its characters."""

    text: str
    places: tuple[tuple[int, int], ...]
    """For each character, (start, end) of the cluster in the original that it comes from."""

    def is_cut(self, at: int) -> bool:
        """Return whether the border before this character is inside a cluster, as between a letter and its accent."""
        return 0 < at < len(self.places) and self.places[at - 1] == self.places[at]

    def is_word(self, at: int) -> bool:
        """Return whether there is a character here that belongs to a word; a combining mark does."""
        if not 0 <= at < len(self.text):
            return False
        character = self.text[at]
        return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def _matches(text: _Folded, wanted: str, whole: bool) -> Iterator[tuple[int, int]]:
    """Yield the places, none overlapping, of the text that cut no cluster and, if whole, no word."""
    start = text.text.find(wanted) if wanted else -1
    while start >= 0:
        end = start + len(wanted)
        inside = text.is_cut(start) or text.is_cut(end) or whole and (text.is_word(start - 1) or text.is_word(end))
        if not inside:
            yield text.places[start][0], text.places[end - 1][1]
        start = text.text.find(wanted, start + 1 if inside else end)


def _folded(text: str, fold: Callable[[str], str]) -> _Folded:
    """Return the text with each cluster folded, and one blank for each run of blanks."""
    characters: list[str] = []
    places: list[tuple[int, int]] = []
    for start, end in _clusters(text):
        cluster = fold(text[start:end])
        if cluster.isspace():
            if characters and characters[-1] == " ":
                places[-1] = (places[-1][0], end)
                continue
            cluster = " "
        characters += cluster
        places += [(start, end)] * len(cluster)
    return _Folded(text="".join(characters), places=tuple(places))


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Yield each character with its combining marks: normal forms never move anything across these borders."""
    if text.isascii():  # where nothing combines
        yield from ((start, start + 1) for start in range(len(text)))
        return
    start = 0
    for at in range(1, len(text) + 1):
        if at == len(text) or not unicodedata.combining(unicodedata.normalize("NFD", text[at])[0]):
            yield start, at
            start = at


def _same(cluster: str) -> str:
    return cluster


def _lookalike(cluster: str) -> str:
    plain = unicodedata.normalize("NFKD", cluster.translate(_LOOKALIKES)).translate(_LOOKALIKES)
    return "".join(character for character in plain if not _is_invisible(character))


def _caseless(cluster: str) -> str:
    """Return letters without case; the Turkish dotted capital and dotless small i count as i, their counterpart."""
    folded = _lookalike(_lookalike(cluster).casefold())
    return folded.replace("i\u0307", "i").replace("\u0131", "i")


def _is_invisible(character: str) -> bool:
    """Return whether it is a zero-width character, soft hyphen, direction mark or variation selector."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _absent(question: str, words: str) -> str:
    """Return the message for words that the question does not contain; it names characters that only look alike."""
    nearest = nearest_words(question, words)
    message = f"{words!r} is not in the question {question!r}; the nearest words are {nearest!r}"
    composed = (unicodedata.normalize("NFC", text.strip().lower()) for text in (nearest, words))
    pairs = list(zip(*composed, strict=False))
    apart = [pair for pair in pairs if pair[0] != pair[1]]
    if not apart or 2 * len(apart) > len(pairs) or all(character.isascii() for character in apart[0]):
        return message
    own, other = (f"{character!r} ({unicodedata.name(character, 'unnamed')})" for character in apart[0])
    return f"{message}, with {own} where the constraint has {other}"
