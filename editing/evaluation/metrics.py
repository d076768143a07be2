"""The numbers by which edits are judged, as pure functions of texts, token ids and logits, and the names of protocols.

A number means nothing without its protocol: the same edit can score 100 % if the tokens of the answer are fed in
(teacher forcing) and 0 % if the model has to generate the answer by itself. The docstrings name the published
definitions.
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
NOT_NEW = "free generation, does not contain the new answer"
BEGINS = "free generation, begins with the answer"
CONTAINS = "free generation, contains the answer"
JUDGED = "free generation, judged"
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
PERPLEXITY = "perplexity of a text"
RANKS = 10
"""Number of most probable tokens per position that rankings hold."""
_LARGEST = 100.0
"""Largest mean negative log-probability per token: a broken model has some perplexity that a mean can hold."""
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # length of an n-gram -> weight of its entropy in ROME

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
    """Yield the word with each of its apostrophes left out in turn."""
    return (word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'")


# Only words that the published table changes are here: it has no "im" and no "shes".
_CONTRACTIONS = {form: word for word in _CONTRACTED for form in _misspelt(word)}


def exact_match(generated: str, answer: str) -> bool:
    """Return whether the generated text equals the answer, apart from whitespace at both ends."""
    return generated.strip() == answer.strip()


def vqa_match(generated: str, answer: str) -> bool:
    """Return whether the generated text equals the answer after both are normalised by `vqa_normalised`."""
    return vqa_normalised(generated) == vqa_normalised(answer)


def begins_with_answer(generated: str, answer: str) -> bool:
    """Return whether the generated text begins with the whole words of the answer, both normalised for VQA."""
    words = vqa_normalised(answer)
    return bool(words) and f"{vqa_normalised(generated)} ".startswith(f"{words} ")


def contains_answer(generated: str, answer: str) -> bool:
    """Return whether the generated text holds the whole words of the answer anywhere, both normalised for VQA."""
    words = vqa_normalised(answer)
    return bool(words) and f" {words} " in f" {vqa_normalised(generated)} "


def vqa_normalised(text: str) -> str:
    """Return the answer in the form in which the VQA v2 evaluation compares answers.

    A punctuation mark is deleted throughout if it stands next to a blank anywhere in the text, and every mark is
    deleted if the text has a comma between two digits ("1,000"); otherwise the mark becomes a blank. A full stop is
    kept only before a digit. The text then becomes lower case, number words up to ten (and "none") become digits,
    articles are deleted, and contractions get their apostrophes back ("dont" becomes "don't").
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
    """Return the VQA v2 accuracy against the answers of several annotators, 0 to 1.

    It is min(matches / 3, 1), averaged over all ways to leave one annotator out. With a single annotator it is 1 for a
    match and 0 otherwise. Raises `EditError` if there are no answers.
    """
    if not answers:
        raise EditError("VQA accuracy got no annotators' answers; pass at least one")
    matches = [vqa_match(generated, answer) for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    return sum(min((sum(matches) - own) / 3, 1.0) for own in matches) / len(matches)


def token_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Return the share of answer positions at which the most probable token is the wanted one, 0 to 1.

    It is the "rewrite_acc" of EasyEdit. Every position sees the wanted tokens before it, which reveals the beginning of
    the answer and its length. Raises `EditError` if the two differ in length or have no tokens.
    """
    _check_positions(predicted, wanted)
    return sum(one == other for one, other in zip(predicted, wanted, strict=True)) / len(wanted)


def sequence_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Return 1 if the most probable token is the wanted one at every answer position, else 0 (the form of MMEdit).

    The wanted tokens are fed in, as for `token_accuracy`, and the same errors are raised.
    """
    return float(token_accuracy(predicted, wanted) == 1)


def normalised_probability(log_probabilities: Sequence[float]) -> float:
    """Return the geometric mean of the probabilities of an answer's tokens, 0 to 1 (length-normalised as in ROME).

    log_probabilities: natural logarithms, one per token. Raises `EditError` if there are none.
    """
    if not log_probabilities:
        raise EditError("an answer without tokens has no probability; pass one of at least one token")
    return math.exp(sum(log_probabilities) / len(log_probabilities))


def agreement(before: Tensor, after: Tensor) -> float:
    """Return the share of equal entries in two (token, rank) tables of most probable ids, 0 to 1.

    Tables of different lengths are aligned at the end, and the tokens that only the longer one has do not count. With
    one rank this is the top-1 agreement of MMEdit's text locality (over the whole sequence) and of VisEdit (over the
    answer positions); with ten ranks it is the ordered top-10 agreement of MMEdit's picture locality. Raises
    `EditError` if a table is empty or the two do not have the same number of ranks.
    """
    if before.ndim != 2 or before.shape[1:] != after.shape[1:] or not min(len(before), len(after)):
        raise EditError(
            f"cannot compare ids of shapes {tuple(before.shape)} and {tuple(after.shape)}; "
            "pass two tables (token, rank) with as many ranks"
        )
    length = min(len(before), len(after))
    return (before[-length:] == after[-length:]).double().mean().item()


def kl_divergence(before: Tensor, after: Tensor) -> float:
    """Return KL(before || after) in nats, at least 0, of the distributions that two (vocab,) logits give.

    It is computed in float64. Tokens that have probability 0 before contribute nothing.
    """
    log_before, log_after = before.double().log_softmax(-1), after.double().log_softmax(-1)
    terms = log_before.exp() * (log_before - log_after)
    return torch.where(log_before.exp() > 0, terms, 0.0).sum().clamp(min=0).item()


def perplexity(log_probabilities: Sequence[float]) -> float:
    """Return the perplexity of a text: exp of the mean negative log-probability of its tokens, at least 1.

    log_probabilities: natural logarithms, one for each token that is predicted. A text whose tokens have no finite
    probability, or one below e^-100 on average, gets e^100. Raises `EditError` if there are none.
    """
    if not log_probabilities:
        raise EditError("a text without predicted tokens has no perplexity; pass one of at least two tokens")
    mean = -sum(log_probabilities) / len(log_probabilities)
    return math.exp(mean if mean <= _LARGEST else _LARGEST)  # a nan is not below


def ngram_entropy(tokens: Sequence[Hashable], size: int) -> float:
    """Return the entropy in bits of the distribution of n-grams of this size; 0 for a text shorter than one n-gram."""
    counts = Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))
    total = sum(counts.values())
    return sum(-count / total * math.log2(count / total) for count in counts.values())


def fluency(tokens: Sequence[Hashable]) -> float:
    """Return the fluency of a text as ROME defines it: (2/3 H2 + 4/3 H3) / 2 in bits; repetitive text has a low one.

    H2 and H3 are the entropies of bigrams and trigrams. An evaluation passes words separated by blanks, where ROME uses
    the words of a tokenizer, so that the values are not exactly comparable.
    """
    return sum(weight * ngram_entropy(tokens, size) for size, weight in _WEIGHTS.items()) / len(_WEIGHTS)


def split_of(*, moved: Sequence[bool], kept: Sequence[bool]) -> str:
    """Return the kind of success of an edit: "generalised", "too narrow", "too broad" or "both".

    An edit is too narrow if it misses a generality probe, and too broad if it changes the answer to a locality probe
    (ScopeEdit, arXiv 2607.01978). An edit without probes counts as generalised.

    moved: for each generality probe, whether its answer is the target. kept: for each locality probe, whether its
    answer is the same as before.
    """
    names = {(True, True): "generalised", (False, True): "too narrow", (True, False): "too broad"}
    return names.get((all(moved), all(kept)), "both")


SPLITS = ("generalised", "too narrow", "too broad", "both")
"""The values of `split_of`."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval from a bootstrap by record; NaN if there are no values."""

    mean: float
    """Mean of all values."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    number: int
    """Number of values."""
    records: int
    """Number of records that the values belong to."""


def bootstrap_interval(values: Sequence[float], records: Sequence[str], *, seed: int = 0) -> Interval:
    """Return the mean of the values with its 95 % percentile interval when whole records are drawn with replacement.

    records[i] is the id of the record that values[i] belongs to. The probes of one record are not independent, so they
    are drawn together. The same seed gives the same interval. Raises `EditError` if the two differ in length.
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
    """How a model predicts a given answer, with the earlier tokens of the answer fed in."""

    ids: tuple[int, ...]
    """Token ids of the answer."""
    predicted: tuple[int, ...]
    """The most probable token id at the position of each of the ids."""
    log_probabilities: tuple[float, ...]
    """Natural logarithm of the probability of each of the ids."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses:
    """The responses of a model in one state, unedited or edited; its mappings are filled in place."""

    generated: dict[str, str] = field(default_factory=dict)
    """Key of a question -> free answer."""
    scores: dict[tuple[str, str], AnswerScore] = field(default_factory=dict)
    """(key, answer) -> the score of this answer."""
    ranks: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(key, answer) -> (token, RANKS) int32 on the CPU: the ids of the most probable next tokens, best first, at every
    position of the prompt and its answer except the last."""
    first: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(key, answer) -> (vocab,) float32 logits on the CPU, at the position that predicts the first token of the answer.
    """
    fluencies: dict[str, str] = field(default_factory=dict)
    """Key of a question -> the longer free answer whose fluency is measured."""

    def add(self, other: "Responses") -> None:
        """Add the texts and scores of other responses to these in place; their tensors are left out."""
        self.generated.update(other.generated)
        self.scores.update(other.scores)
        self.fluencies.update(other.fluencies)


def _check_positions(predicted: Sequence[int], wanted: Sequence[int]) -> None:
    if not wanted or len(predicted) != len(wanted):
        raise EditError(f"got {len(predicted)} predictions of {len(wanted)} wanted tokens; pass one for each")
