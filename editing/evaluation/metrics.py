"""The numbers by which edits are judged, as pure functions of texts, token ids and logits; and their protocols' names.

A number says nothing without its protocol: the same edit scores 100 % with the answer's own tokens fed in and 0 % when
the model has to say it by itself. Definitions that others compute are named in the docstrings.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...artefacts.averages import grouped_bootstrap
from ..requests import EditError

EXACT = "free generation, exact match"
VQA = "free generation, VQA-normalised"
UNCHANGED = "free generation, unchanged"
UNCHANGED_RIGHT = "free generation, unchanged, of those answered rightly before"
SAYS_NEW = "free generation, says the new answer"
TOKENS = "teacher-forced, tokens"
SEQUENCE = "teacher-forced, sequence"
HIGHER = "P(new) > P(old), length-normalised"
MARGIN = "P(new) - P(old), length-normalised"
KEPT_HIGHER = "P(old) > P(new), length-normalised"
TOP1_ANSWER = "top-1 agreement, answer positions"
TOP1_WHOLE = "top-1 agreement, whole sequence"
TOP10_WHOLE = "ordered top-10 agreement, whole sequence"
KL = "KL(before || after), first answer position, nats"
FLUENCY = "free generation, bi- and trigram entropy, bits"
RANKS = 10
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # n-gram -> its entropy's weight, ROME's

_ARTICLES = ("a", "an", "the")
_DIGITS = zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True)
_NUMBERS: dict[str, str] = {**dict(_DIGITS), "none": "0"}
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


def exact_match(generated: str, answer: str) -> bool:
    """Return whether the generated text is the answer letter by letter, apart from blanks around it."""
    return generated.strip() == answer.strip()


def vqa_match(generated: str, answer: str) -> bool:
    """Return whether the generated text is the answer once both are normalised as in the VQA v2 evaluation."""
    return vqa_normalised(generated) == vqa_normalised(answer)


def vqa_normalised(text: str) -> str:
    """Return the answer as the VQA v2 evaluation compares it.

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


def vqa_accuracy(generated: str, answers: Sequence[str]) -> float:
    """Return the VQA v2 accuracy against several annotators' answers, 0 to 1.

    min(matches / 3, 1), averaged over all ways to leave one annotator out. Raises `EditError` for no answers.
    """
    if not answers:
        raise EditError("VQA accuracy got no annotators' answers; pass at least one")
    matches = [vqa_match(generated, answer) for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    return sum(min((sum(matches) - own) / 3, 1.0) for own in matches) / len(matches)


def token_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Return the share of answer positions with the wanted token on top, 0 to 1 (EasyEdit's "rewrite_acc").

    Every position sees the wanted tokens before it, which gives away the answer's beginning and its length.
    """
    _check_positions(predicted, wanted)
    return sum(one == other for one, other in zip(predicted, wanted, strict=True)) / len(wanted)


def sequence_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Return 1 if the most probable token is the wanted one at every answer position, else 0 (MMEdit's form)."""
    return float(token_accuracy(predicted, wanted) == 1)


def normalised_probability(log_probabilities: Sequence[float]) -> float:
    """Return the geometric mean of the token probabilities, 0 to 1 (the length-normalised P of ROME)."""
    if not log_probabilities:
        raise EditError("an answer without tokens has no probability; pass one of at least one token")
    return math.exp(sum(log_probabilities) / len(log_probabilities))


def agreement(before: Tensor, after: Tensor) -> float:
    """Return the share of equal entries of two (token, rank) tables of most probable ids, 0 to 1, aligned at the end.

    With one rank it is the top-1 agreement of MMEdit's text locality (whole sequence) and of VisEdit's (answer
    positions), with ten ranks the ordered top-10 agreement of MMEdit's picture locality. Raises `EditError` for other
    shapes.
    """
    if before.ndim != 2 or before.shape[1:] != after.shape[1:] or not min(len(before), len(after)):
        raise EditError(
            f"cannot compare ids of shapes {tuple(before.shape)} and {tuple(after.shape)}; "
            "pass two tables (token, rank) with as many ranks"
        )
    length = min(len(before), len(after))
    return (before[-length:] == after[-length:]).double().mean().item()


def kl_divergence(before: Tensor, after: Tensor) -> float:
    """Return KL(before || after) in nats, at least 0, of two (vocab,) logits; computed in float64."""
    log_before, log_after = before.double().log_softmax(-1), after.double().log_softmax(-1)
    terms = log_before.exp() * (log_before - log_after)
    return torch.where(log_before.exp() > 0, terms, 0.0).sum().clamp(min=0).item()


def ngram_entropy(tokens: Sequence[Hashable], size: int) -> float:
    """Return the entropy in bits of the n-grams of this size; 0 for a text too short to have any."""
    counts = Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))
    total = sum(counts.values())
    return sum(-count / total * math.log2(count / total) for count in counts.values())


def fluency(tokens: Sequence[Hashable]) -> float:
    """Return the mean of bigram and trigram entropy in bits, weighted 2/3 and 4/3 (ROME); low for repetitive text."""
    return sum(weight * ngram_entropy(tokens, size) for size, weight in _WEIGHTS.items()) / len(_WEIGHTS)


def split_of(*, moved: Sequence[bool], kept: Sequence[bool]) -> str:
    """Return what kind of success an edit is: "generalised", "too narrow", "too broad" or "both".

    moved: whether each generality probe gives the target. kept: whether each locality probe's answer is what it was.
    Too narrow is an edit that misses any of the former, too broad one that changes any of the latter (ScopeEdit).
    """
    names = {(True, True): "generalised", (False, True): "too narrow", (True, False): "too broad"}
    return names.get((all(moved), all(kept)), "both")


SPLITS = ("generalised", "too narrow", "too broad", "both")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with the interval that a bootstrap by record gives; NaN where there was nothing to average."""

    mean: float
    low: float
    high: float
    number: int
    """How many values."""
    records: int
    """From how many records."""


def bootstrap_interval(values: Sequence[float], records: Sequence[str], *, seed: int = 0) -> Interval:
    """Return the mean of the values with the 95 % interval when whole records are drawn with replacement.

    records[i] names the record that values[i] belongs to: its probes rise and fall together, so they are drawn
    together. The same seed gives the same interval. Raises `EditError` if the two differ in length.
    """
    if len(values) != len(records):
        raise EditError(f"got {len(values)} values of {len(records)} records; pass one record's name per value")
    if not len(values):
        return Interval(mean=math.nan, low=math.nan, high=math.nan, number=0, records=0)
    low, high = grouped_bootstrap(values, records, seed=seed)
    mean = float(np.mean(np.asarray(values, dtype=np.float64)))
    return Interval(mean=mean, low=low, high=high, number=len(values), records=len(set(records)))


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """How a model predicts a given answer, each token from the ones before it."""

    ids: tuple[int, ...]
    predicted: tuple[int, ...]
    """The most probable token at the position of each of the ids."""
    log_probabilities: tuple[float, ...]
    """Natural logarithm of the probability of each of the ids."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses:
    """The responses of one state of a model."""

    generated: dict[str, str] = field(default_factory=dict)
    """Key of a question -> free answer."""
    scores: dict[tuple[str, str], AnswerScore] = field(default_factory=dict)
    """(key, answer) -> its score."""
    ranks: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(key, answer) -> (token, RANKS) int32, the most probable next tokens at every position, the answer's included."""
    first: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(key, answer) -> (vocab,) float32 logits where the answer's first token is predicted."""
    fluencies: dict[str, str] = field(default_factory=dict)
    """Key -> the longer free answer whose fluency is measured."""

    def add(self, other: "Responses") -> None:
        """Add other responses, without their tensors."""
        self.generated.update(other.generated)
        self.scores.update(other.scores)
        self.fluencies.update(other.fluencies)


def _check_positions(predicted: Sequence[int], wanted: Sequence[int]) -> None:
    if not wanted or len(predicted) != len(wanted):
        raise EditError(f"got {len(predicted)} predictions of {len(wanted)} wanted tokens; pass one for each")
