"""The facts of the study of editors on a real text model, their halves, and how its answers are scored.

A text model continues texts and has no habit of stopping. Its answer to a question is therefore its first words, up to
the first mark that ends them, and an answer is right if it begins with the wanted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...artefacts import read_json, write_json
from ...data import EditRecord, read_data, with_template
from ...data.facts import EDITED, GENERALITY, GIVEN_TEXT, LOCALITY
from ...data.worlds.flags import answer_of
from ...editing.evaluation import BEGINS, PERPLEXITY, ProbeRow, begins_with_answer, bootstrap_interval
from ...editing.moments import Moments, second_moments
from ...models import ModelError, Prompt, VisionLanguageModel
from ..options import CommandError
from .real_facts import TEMPLATE

BEGINNINGS = ("The", "In", "A", "It is", "When", "There", "This", "He was", "She", "Many", "If", "For", "One", "We")
"""First words after which the model samples the texts whose keys an editor takes for what the model knows."""
_SEED = 0
LAYOUT = "multrace own texts 1"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A file of edits, and how a text model is asked about them."""

    name: str
    title: str
    template: str
    """The template of every prompt."""
    max_new_tokens: int
    """Longest answer in tokens, which is longer than any target."""


COUNTERFACT = DataSet(name="counterfact", title="CounterFact", template=TEMPLATE, max_new_tokens=8)
ZSRE = DataSet(name="zsre", title="zsRE", template="\nQuestion: {question}\nAnswer:", max_new_tokens=14)
DATA_SETS = (COUNTERFACT, ZSRE)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The edits of a file in their halves."""

    choosing: tuple[EditRecord, ...]
    """Every second edit from the first on: settings are chosen on the first ones of them."""
    reporting: tuple[EditRecord, ...]
    """The others, which are reported."""

    @classmethod
    def read(cls, path: Path, data_set: DataSet) -> Facts:
        """Return the edits of a file that can be read. Raises `DataError` or `CommandError` if there are fewer than 2.

        They are named by their places in the file, since CounterFact files number them with gaps.
        """
        records = [
            replace(with_template(record, data_set.template), id=f"{data_set.name} {row}")
            for row, record in read_data(path)
            if isinstance(record, EditRecord)
        ]
        if len(records) < 2:
            raise CommandError(f"{str(path)!r} has {len(records)} edits; one half chooses and one reports, so pass two")
        return cls(choosing=tuple(records[::2]), reporting=tuple(records[1::2]))

    def reported(self, number: int) -> tuple[EditRecord, ...]:
        """Return so many edits to report, fewer if there are fewer.

        Where the reporting half is too small, the last edits of the other half follow: on these nothing was chosen as
        long as few are needed.
        """
        return (*self.reporting, *reversed(self.choosing))[:number]


# ---- scores ----


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share over questions, before and after the edits, with the 95 % interval (bootstrap over edits) after them."""

    before: float
    after: float
    low: float
    high: float
    number: int
    """Number of questions."""


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """What the edited model answers, and what the unedited one does; None for what was not asked."""

    rewrite: Share | None
    """Edited questions whose answers begin with the target: efficacy."""
    rephrase: Share | None
    """The same for other wordings: generality."""
    unchanged: Share | None
    """Questions of locality whose first words are those of the unedited model."""
    right: Share | None
    """Questions of locality whose answers begin with the right answer."""
    perplexity: float | None
    """Perplexity of the model's own texts after the edits, as a multiple of that before."""

    @property
    def kept_right(self) -> float | None:
        """The share of right answers of locality as a share of that of the unedited model."""
        return None if self.right is None or not self.right.before else self.right.after / self.right.before

    @property
    def worth(self) -> float:
        """The mean of rewrite, rephrase and unchanged, by which settings are chosen."""
        shares = [share.after for share in (self.rewrite, self.rephrase, self.unchanged) if share is not None]
        return sum(shares) / len(shares) if shares else 0.0


def scores_of(rows: Iterable[ProbeRow]) -> TextScores:
    """Return the scores of these questions.

    Example:
        >>> from multrace.editing.evaluation import ProbeRow, UNCHANGED
        >>> from multrace.scripts.studies.text_facts import scores_of
        >>> said = {"before": "Paris. It is", "after": "Paris, the city", "old": "Paris", "new": "Rome"}
        >>> row = ProbeRow(record="1", kind="other_subject", hops=None, question="?", pictures=(), numbers={}, **said)
        >>> scores = scores_of([row])
        >>> scores.unchanged.after, scores.right.before
        (1.0, 1.0)
    """
    rows = list(rows)
    edited, others = ([row for row in rows if chosen(row)] for chosen in (_is_edited, _is_generality))
    local = [row for row in rows if row.aspect == LOCALITY]
    texts = [row.numbers[PERPLEXITY] for row in rows if row.kind == GIVEN_TEXT]
    return TextScores(
        rewrite=_share(edited, [row.numbers[BEGINS] for row in edited]),
        rephrase=_share(others, [row.numbers[BEGINS] for row in others]),
        unchanged=_share(local, [(1.0, float(answer_of(row.before) == answer_of(row.after))) for row in local]),
        right=_share(local, [(_is_right(row.before, row), _is_right(row.after, row)) for row in local]),
        perplexity=sum(after for _, after in texts) / sum(before for before, _ in texts) if texts else None,
    )


def _is_edited(row: ProbeRow) -> bool:
    return row.kind == EDITED


def _is_generality(row: ProbeRow) -> bool:
    return row.aspect == GENERALITY and BEGINS in row.numbers


def _is_right(said: str, row: ProbeRow) -> float:
    return float(begins_with_answer(said, row.old))


def _share(rows: Sequence[ProbeRow], pairs: Sequence[tuple[float, float]]) -> Share | None:
    if not rows:
        return None
    after = bootstrap_interval([pair[1] for pair in pairs], [row.record for row in rows])
    before = sum(pair[0] for pair in pairs) / len(pairs)
    return Share(before=before, after=after.mean, low=after.low, high=after.high, number=len(pairs))


# ---- what the model knows ----


def own_texts(vlm: VisionLanguageModel, path: Path, number: int, *, max_new_tokens: int = 64) -> tuple[str, ...]:
    """Return so many texts that the model samples by itself; the file keeps them, and is made if it has fewer.

    Raises `CommandError` if the file is of another model.
    """
    if path.is_file():
        known = read_json(path, LAYOUT)
        if known["weights"] != vlm.weights_digest():
            raise CommandError(f"{str(path)!r} holds texts of another model; choose another folder")
        if len(known["texts"]) >= number:
            return tuple(known["texts"][:number])
    starts = [BEGINNINGS[index % len(BEGINNINGS)] for index in range(number)]
    prompts = [vlm.prompt(None, start, template=TEMPLATE) for start in starts]
    found = vlm.continuations(prompts, max_new_tokens=max_new_tokens, seed=_SEED, progress=True)
    texts = [start + continuation.text for start, continuation in zip(starts, found, strict=True)]
    write_json(path, LAYOUT, {"weights": vlm.weights_digest(), "texts": texts})
    return tuple(texts)


def known_moments(vlm: VisionLanguageModel, path: Path, layers: Sequence[int], texts: Sequence[str]) -> Path:
    """Return the file of second moments of these layers over these texts, which is made if it is not there.

    Raises `EditError` if the file is of another model.
    """
    if path.is_file():
        moments = Moments.load(path)
        moments.check(vlm)
        if {*layers} <= {*moments.layers}:
            return path
    return second_moments(vlm, [*_prompts(vlm, texts)], layers=layers).save(path)


def _prompts(vlm: VisionLanguageModel, texts: Iterable[str]) -> Iterator[Prompt]:
    """The texts as the model reads them; one that spells a special token is left out."""
    for text in texts:
        with suppress(ModelError):
            yield vlm.prompt(None, text, template=TEMPLATE)
