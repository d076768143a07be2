"""Edits that are made on top of earlier ones, one or several per step, and measured on the way."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from tqdm import tqdm

from ...data.facts import CLOZE, EFFICACY, GIVEN_TEXT, OWN_TEXT, EditRecord, EditRequest
from ...models import ModelError, VisionLanguageModel
from ..changes import Change, EditSession
from ..requests import FAILED, EditError, says_target
from .ability import AbilityTests
from .asking import Baseline, measured, measured_now, seen_statuses, statuses_of
from .checks import Check, asked_together, checks_of, names_of
from .costs import CostMeter, EditCost
from .curves import MEANS, EditCurve, SequencePoint
from .metrics import PERPLEXITY, UNCHANGED, Interval, bootstrap_interval
from .reports import EditReport, LeftOut, ProbeRow

logger = logging.getLogger("multrace")


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """How far the norm of an edited weight may grow in a sequence. A norm that keeps growing ruins earlier edits.

    Raises `EditError` if the growth is below 0.
    """

    growth: float = 0.1
    """Relative growth of a weight's Frobenius norm beyond which a warning is logged; 0.1 is ten percent."""
    stop: bool = False
    """Whether the sequence also ends after the edit that exceeds the bound."""

    def __post_init__(self) -> None:
        if self.growth < 0:
            raise EditError(f"the largest growth of a weight's norm is {self.growth}; pass at least 0, such as 0.1")


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceState:
    """A sequence, measured after some number of edits: one unit of a run that can be resumed."""

    point: SequencePoint
    """The means over the rows."""
    rows: tuple[ProbeRow, ...]
    """All questions of the edits so far, measured by free generation only, or with all protocols if `is_last`."""
    statuses: dict[str, str]
    """Record -> "edited", "not generated", "nothing to do", or "failed: " and the reason, for the edits so far."""
    left_out: tuple[LeftOut, ...]
    """Questions that were not asked, and why."""
    exceeded_at: int | None
    """Number of edits at which the growth first exceeded the bound; None if it has not."""
    is_last: bool
    """Whether this is the state after the last edit."""
    cost: EditCost | None = None
    """Time per edit and peak memory so far."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MadeEdit:
    """One change of a sequence, with the records whose edits it makes."""

    records: tuple[EditRecord, ...]
    """The records of a step, or one of them."""
    change: Change | None
    """The change; None for an edit that could not be made."""
    statuses: tuple[str, ...]
    """"edited", "not generated", "nothing to do", or "failed: " and the reason, for each record."""
    rows: Sequence[Mapping[str, Any]] = ()
    """What the table says of each record: its question, target, status and answers, whether the edit `worked`, and the
    `growth` of the norm after its step."""


def attempt(
    make: Callable[[Sequence[EditRequest]], Change], requests: Sequence[EditRequest]
) -> tuple[Change | None, tuple[str, ...]]:
    """The change for some requests and the status of each; the change is None if it could not be made."""
    try:
        change = make(requests)
    except (EditError, ModelError) as error:
        return None, (f"{FAILED}: {error}",) * len(requests)
    return change, statuses_of(change, len(requests))


class SequenceSteps:
    """Edits that are made one on top of the other and measured on the way.

    A `with` begins and ends the session: inside the block the model has all edits so far, and on any exit it is
    bit-equal to before.

    Args:
        vlm: The unedited model.
        session: The session that makes the edits; it must not have begun.
        reference: The responses of the unedited model to all questions.
        norm_bound: How far the norm of an edited weight may grow, and whether to stop there.
        ability: Texts and cloze questions that are asked whenever the sequence is measured; None for none.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        session: EditSession,
        reference: Baseline,
        *,
        norm_bound: NormBound,
        ability: AbilityTests | None = None,
    ) -> None:
        self.vlm, self.session, self.reference, self.norm_bound = vlm, session, reference, norm_bound
        self.ability = ability or AbilityTests(settings=reference.settings)
        self.meter = CostMeter(vlm.device)
        self.records: dict[str, EditRecord] = {}
        self.statuses: dict[str, str] = {}
        self.edited: set[str] = set()
        """Ids of the records whose edits are in the model."""
        self.worked: dict[str, bool] = {}
        """Record -> whether its question got the target right after its edit."""
        self.growth = 0.0
        """Largest relative growth of the norm of any edited weight after any edit so far."""
        self.exceeded_at: int | None = None
        self._before: dict[str, float] = {}

    def __enter__(self) -> Self:
        self.session.__enter__()
        self._before = _norms(self.vlm, _matrices(self.vlm))
        return self

    def __exit__(self, *error: Any) -> None:
        self.session.__exit__(*error)

    @property
    def count(self) -> int:
        """Number of edits so far, those that failed included."""
        return len(self.records)

    @property
    def is_stopped(self) -> bool:
        """Whether the sequence has to end because the norm of a weight has exceeded the bound."""
        return self.norm_bound.stop and self.exceeded_at is not None

    def make(self, records: Sequence[EditRecord], *, batch_size: int) -> tuple[MadeEdit, ...]:
        """Make the edits of one step together on top of the others, and return what was made.

        That is one change for all of them. If the step cannot be made as a whole, because of one of its records or
        because two of them contradict each other, its edits are made one after the other instead, so that a bad record
        costs only itself. The model keeps the edits. `restore` takes each of them in a later process. The records need
        ids. Raises `EditError` for an editor that works in the prompt.
        """
        with self.meter.edits(len(records)):
            made = self._made(records)
        if self.session.prompt_transform is not None:
            raise EditError("an edit that works in the prompt has no sequence; pass mode='single' or mode='batch'")
        for edit in made:
            self._note(edit)
            if edit.change is not None:
                self.growth = max(self.growth, _growth(self.vlm, edit.change, self._before))
        own = [next(checks_of(record.id, record)) for record in records]
        rows = measured_now(self.vlm, own, self.reference, settings=self.reference.settings, batch_size=batch_size)
        self.worked |= {row.record: says_target(row.after, row.new) for row in rows}
        self._watch()
        by_record = {row.record: self._said(row) for row in rows}
        return tuple(replace(edit, rows=[by_record[record.id] for record in edit.records]) for edit in made)

    def _made(self, records: Sequence[EditRecord]) -> list[MadeEdit]:
        """The change of a step, or those of its records one by one."""
        change, statuses = attempt(self.session.edit, records)
        if change is None and len(records) > 1:
            logger.warning("a step of %d edits is made one by one: %s", len(records), statuses[0])
            return [made for record in records for made in self._made([record])]
        return [MadeEdit(records=tuple(records), change=change, statuses=statuses)]

    def _said(self, row: ProbeRow) -> dict[str, Any]:
        """The row of an edit in the table."""
        said = {"question": row.question, "target": row.new, "status": self.statuses[row.record]}
        said |= {"before": row.before, "after": row.after}
        return said | {"worked": self.worked[row.record], "growth": self.growth}

    def _note(self, made: MadeEdit) -> None:
        for record, status in zip(made.records, made.statuses, strict=True):
            self.records[record.id], self.statuses[record.id] = record, status
            if made.change is not None and not status.startswith(FAILED):
                self.edited.add(record.id)

    def restore(self, made: MadeEdit) -> None:
        """Put an edit that `make` made in an earlier process into the model; edits are restored in their order.

        Its rows are those of the table. Call `resume` once the edits of a step are in the model.
        """
        if made.change is not None:
            self.session.adopt(made.records, made.change)
        self._note(made)
        for record, row in zip(made.records, made.rows, strict=True):
            self.worked[record.id], self.growth = row["worked"], row["growth"]

    def resume(self) -> None:
        """Look at the growth of the norm after restored edits, as was done after the step that made them."""
        if self.exceeded_at is None and self.growth > self.norm_bound.growth:
            self.exceeded_at = self.count

    def is_due(self, at: Sequence[int], step: int) -> bool:
        """Whether the last step, of so many edits, has reached a number of edits after which to measure."""
        return any(self.count - step < each <= self.count for each in at)

    def measure(self, *, batch_size: int) -> SequenceState:
        """Return the state after the edits so far, measured by free generation on all their questions."""
        checks, left_out = self._checks()
        settings = self.reference.settings
        rows = measured_now(self.vlm, checks, self.reference, settings=settings, batch_size=batch_size)
        return self._state(rows + self.ability.rows(self.vlm), left_out, is_last=False)

    def finish(self, stack: ExitStack, *, batch_size: int, progress: bool = False) -> SequenceState:
        """Return the last state with all protocols. It ends the session by closing `stack`, which entered this object.

        The unedited model can then be asked too; the edited weights are put back while the edited half is measured.
        """
        edited = self.session.state()
        stack.close()
        checks, left_out = self._checks()
        options = {"settings": self.reference.settings, "reference": self.reference, "batch_size": batch_size}
        rows = measured(self.vlm, checks, edited, progress=progress, **options)
        return self._state(rows + self.ability.rows_with(self.vlm, edited), left_out, is_last=True)

    def _checks(self) -> tuple[tuple[Check, ...], tuple[LeftOut, ...]]:
        """The questions of the edits so far to ask, and those that cannot be judged while all these edits are made."""
        every = (check for name, record in self.records.items() for check in checks_of(name, record))
        return asked_together(every, self.records, self.edited)

    def _state(self, rows: Sequence[ProbeRow], left_out: Sequence[LeftOut], *, is_last: bool) -> SequenceState:
        return SequenceState(
            point=self._point(rows),
            rows=tuple(rows),
            statuses=seen_statuses(self.statuses, rows),
            left_out=tuple(left_out),
            exceeded_at=self.exceeded_at,
            is_last=is_last,
            cost=self.meter.cost(),
        )

    def _point(self, rows: Sequence[ProbeRow]) -> SequencePoint:
        holds = {row.record: says_target(row.after, row.new) for row in rows if row.aspect == EFFICACY}
        worked = [name for name, has_worked in self.worked.items() if has_worked]
        first, seed = next(iter(self.worked)), self.reference.settings.seed
        means: dict[str, Any] = {name: _mean(rows, name, seed) for name in MEANS}
        return SequencePoint(
            edits=self.count,
            first_holds=holds[first] if self.worked[first] else None,
            retention=sum(holds[name] for name in worked) / len(worked) if worked else float("nan"),
            growth=self.growth,
            **means,
            **_ability_of(rows, seed),
        )

    def _watch(self) -> None:
        if self.exceeded_at is None and self.growth > self.norm_bound.growth:
            self.exceeded_at = self.count
            logger.warning(
                "after %d edits the norm of an edited weight has grown by %.1f %%, more than %.1f %%; "
                "expect earlier edits and other answers to suffer; fewer edits, a larger ridge or a clamp may help",
                *(self.count, 100 * self.growth, 100 * self.norm_bound.growth),
            )


def sequence_states(
    vlm: VisionLanguageModel,
    records: Sequence[EditRecord],
    session: EditSession,
    reference: Baseline,
    *,
    at: Sequence[int],
    per_step: int = 1,
    norm_bound: NormBound,
    ability: AbilityTests | None = None,
    batch_size: int,
    progress: bool,
) -> Iterator[SequenceState]:
    """Yield the state of a sequence after each number of edits in `at`, and after the last edit.

    All questions of the edits so far are asked by free generation, and with all protocols after the last edit. The
    model has the edits so far whenever a state but the last is yielded, and ends bit-equal to how it began.

    Args:
        vlm: The unedited model.
        records: The edits in order, with the questions about them.
        session: The session that makes the edits, which begins and ends here.
        reference: The responses of the unedited model to all questions.
        at: Numbers of edits after which to measure.
        per_step: Number of edits that are made together in one step.
        norm_bound: How far the norm of an edited weight may grow, and whether to stop there.
        ability: Texts and cloze questions that are asked whenever the sequence is measured; None for none.
        batch_size: Number of questions that are answered together; it bounds memory.
        progress: Show progress bars.

    Raises:
        EditError: There are no records, two records have the same id, the reference lacks a question, or the editor
            works in the prompt.
    """
    names = names_of(records)
    named = [replace(record, id=name) for name, record in zip(names, records, strict=True)]
    steps = SequenceSteps(vlm, session, reference, norm_bound=norm_bound, ability=ability)
    with ExitStack() as stack:
        stack.enter_context(steps)
        bar = stack.enter_context(tqdm(total=len(named), desc="edits in sequence", unit="edit", disable=not progress))
        for start in range(0, len(named), per_step):
            step = named[start : start + per_step]
            steps.make(step, batch_size=batch_size)
            bar.update(len(step))
            if steps.count == len(named) or steps.is_stopped:
                break
            if steps.is_due(at, len(step)):
                yield steps.measure(batch_size=batch_size)
        yield steps.finish(stack, batch_size=batch_size, progress=progress)


def sequence_report(
    vlm: VisionLanguageModel,
    states: Iterable[SequenceState],
    reference: Baseline,
    *,
    number: int,
    bound: float,
    per_step: int = 1,
) -> EditReport:
    """Return the report on the last state, with a curve of the points of all states.

    Args:
        vlm: The model; only its name and revision are read.
        states: At least one state, in order. They are read one by one, and only the last one is kept whole.
        reference: The responses of the unedited model, whose settings the report gets.
        number: Number of records of the sequence; with fewer edits in the last state, the curve says it was stopped.
        bound: Relative growth of a weight's norm beyond which a warning is logged.
        per_step: Number of edits that were made together in one step.
    """
    points: list[SequencePoint] = []
    for last in states:
        points.append(last.point)
    edits = last.point.edits
    curve = EditCurve(
        model=vlm.name,
        revision=vlm.revision,
        points=tuple(points),
        statuses=last.statuses,
        bound=bound,
        exceeded_at=last.exceeded_at,
        stopped_at=edits if edits < number else None,
    )
    parts = {"statuses": last.statuses, "left_out": last.left_out, "curve": curve}
    parts |= {"step": per_step, "cost": last.cost}
    return EditReport.of(vlm, "sequence", reference.settings, last.rows, **parts)


def _matrices(vlm: VisionLanguageModel) -> list[str]:
    return [name for name, weight in vlm.named_parameters() if weight.ndim > 1 and weight.is_floating_point()]


@torch.no_grad()
def _norms(vlm: VisionLanguageModel, names: Iterable[str]) -> dict[str, float]:
    """The Frobenius norms of the weights by name, summed in float64."""
    return {name: torch.linalg.vector_norm(vlm.weight(name), dtype=torch.float64).item() for name in names}


def _growth(vlm: VisionLanguageModel, change: Change, norms: dict[str, float]) -> float:
    """The largest relative growth since the start among the weights that the change may have touched."""
    touched = getattr(change, "fingerprints", norms)  # all weights if the change does not name its own
    names = [name for name in touched if name in norms]
    return max((norm / norms[name] - 1 for name, norm in _norms(vlm, names).items() if norms[name] > 0), default=0.0)


def _ability_of(rows: Sequence[ProbeRow], seed: int) -> dict[str, Any]:
    """The perplexity and the cloze score of a point, as far as there are rows of them."""
    found: dict[str, Any] = {}
    own, given = ([row for row in rows if row.kind == kind] for kind in (OWN_TEXT, GIVEN_TEXT))
    if texts := own or given:
        before, after = zip(*(row.numbers[PERPLEXITY] for row in texts), strict=True)
        found["perplexity"] = bootstrap_interval(after, [row.record for row in texts], seed=seed)
        found["perplexity_before"] = sum(before) / len(before)
    if cloze := [row for row in rows if row.kind == CLOZE]:
        kept = [row.numbers[UNCHANGED][1] for row in cloze]
        found["cloze"] = bootstrap_interval(kept, [row.record for row in cloze], seed=seed)
    return found


def _mean(rows: Sequence[ProbeRow], aspect: str, seed: int) -> Interval:
    chosen = [row for row in rows if row.aspect == aspect and MEANS[aspect] in row.numbers]
    return bootstrap_interval(
        [row.numbers[MEANS[aspect]][1] for row in chosen], [row.record for row in chosen], seed=seed
    )
