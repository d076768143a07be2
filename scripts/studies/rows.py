"""The requests of the study of editors, with their unedited answers, and the rows that are measured on them.

A row is an editor, a baseline or a control, with one edit at a time, all at once, in sequence, or at every layer and
token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, cast

import numpy as np

from ...artefacts.averages import paired_test
from ...data import (
    EditCase,
    EditRecord,
    EditRequest,
    Question,
    World,
    WorldRequests,
    another_picture,
    untouched_facts,
    world_records,
)
from ...data.facts import (
    BY_NAME,
    EDITED,
    EFFICACY,
    GENERALITY,
    LOCALITY,
    OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
    UNRELATED,
)
from ...editing import Editor, EditorByRequest
from ...editing.baselines import FineTune, InContext, Lora
from ...editing.evaluation import (
    BATCH,
    EXACT,
    SINGLE,
    UNCHANGED,
    Baseline,
    EditCurve,
    EditReport,
    EvaluationSettings,
    baseline,
    evaluate,
)
from ...editing.evaluation.modes import SEQUENCE
from ...editing.moments import Moments, second_moments
from ...editing.solve import EMMET, MEMIT, ROME, AlphaEdit, MultEdit
from ...models import VisionLanguageModel
from ...tracing import EditSite, SwapImage
from ...workflow.located_edit import locate

CONTEXTS = 3
"""Number of other pictures of the entity that an edit gets, none of which a probe shows."""
_MOMENT_FACTS = 400


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """The records of one half of a split, and what all rows share."""

    world: World
    cases: tuple[EditCase, ...]
    records: tuple[EditRecord, ...]
    """The records with other pictures as contexts, which the default row edits."""
    baseline: Baseline
    moments: Moments
    """Second moments of the keys of all MLPs over questions about taught facts that no request changes."""
    sites: tuple[EditSite, ...] = field(repr=False)
    """The site of each request by its own trace, under the picture of another entity."""
    named: Mapping[str, Question] = field(default_factory=dict, repr=False)
    """The question of each request by the name of the entity, without a picture, in a wording that no probe has."""
    notes: tuple[str, ...] = ()
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)

    def first(self, number: int) -> Self:
        """Return the same bench with the first requests alone."""
        names = tuple(
            repr(record.label) for record in self.records[:number]
        )  # notes begin with the name of their record
        return replace(
            self,
            cases=self.cases[:number],
            records=self.records[:number],
            sites=self.sites[:number],
            notes=tuple(note for note in self.notes if note.startswith(names)),
        )


def make_bench(vlm: VisionLanguageModel, split: str, part: str, number: int, probes: int) -> Bench:
    """Return the first requests of one half of a split, with what all rows share.

    Args:
        vlm: The unedited model.
        split: One of SPLITS.
        part: "choose" or "report".
        number: The number of requests.
        probes: The number of probes of each kind.
    """
    world = World()
    cases = _cases(world, split, part, number)
    records = world_records(world, cases, requests=WorldRequests(count=probes, contexts=CONTEXTS))
    settings = EvaluationSettings(forced=False)
    facts = untouched_facts(world, cases, _MOMENT_FACTS)
    found = locate(
        vlm,
        records,
        corruptions=[SwapImage(another_picture(world, case)) for case in cases],
        per_request=True,
        progress=True,
    )
    return Bench(
        world=world,
        cases=cases,
        records=records,
        baseline=baseline(vlm, records, settings=settings, batch_size=64, progress=True),
        moments=second_moments(vlm, [vlm.prompt_for(fact) for fact in facts], progress=True),
        sites=found.edit_sites,
        named={case.fact.id: _by_name(world, case) for case in cases},
        notes=found.notes,
        settings=settings,
    )


def site_by_request(bench: Bench) -> Mapping[str, EditSite]:
    """Return name of a request -> its site."""
    return {record.id: site for record, site in zip(bench.records, bench.sites, strict=True)}


def _cases(world: World, split: str, part: str, number: int) -> tuple[EditCase, ...]:
    """Return `number` cases; if the part has fewer, the last cases of the other part follow.

    Settings are chosen on the first cases of that part, so that the last ones count as unseen.
    """
    other = "choose" if part == "report" else "report"
    return (*world.edit_cases(split, part), *reversed(world.edit_cases(split, other)))[:number]


def _by_name(world: World, case: EditCase) -> Question:
    return world.question_by_name(case.fact)


SPLITS = ("outdated", "long_tail")
AT = (1, 10, 20, 30, 60, 100, 160)
COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "efficacy": (EFFICACY, EXACT, EDITED),
    "other pictures": (GENERALITY, EXACT, OTHER_PICTURE),
    "other wordings": (GENERALITY, EXACT, REPHRASE),
    "both": (GENERALITY, EXACT, REPHRASE_OTHER_PICTURE),
    "by name": (GENERALITY, EXACT, BY_NAME),
    "other entities": (LOCALITY, UNCHANGED, SAME_QUESTION_OTHER_PICTURE),
    "other relations": (LOCALITY, UNCHANGED, OTHER_QUESTION_SAME_PICTURE),
    "unrelated": (LOCALITY, UNCHANGED, UNRELATED),
}
"""Column -> the aspect, protocol and kind of probe of the score that it shows."""


@dataclass(frozen=True, kw_only=True)
class EditorRow:
    """A line of the tables."""

    name: str
    text: str
    """Its description in the table."""
    editor: Callable[[Bench], Editor]
    """Returns the editor for a bench."""
    shown: Callable[[Bench, EditRecord], EditRecord] = lambda _bench, record: record
    """Returns the request in the form that the editor gets."""
    batches: bool = True
    sequences: bool = False


def editor_rows() -> tuple[EditorRow, ...]:
    """Return every line, the default first."""
    return (
        EditorRow(
            name="multedit-trace",
            text="MultEdit, layer and token of each request by its trace (default settings)",
            editor=_traced,
            sequences=True,
        ),
        EditorRow(
            name="multedit-moments",
            text="the same, old keys weighed by their second moments (`moment_weight=10`, `ridge_fraction=0.002`, "
            "`stop_loss=0.02`)",
            editor=_with_moments,
            sequences=True,
        ),
        EditorRow(
            name="multedit-named",
            text="the same, told the question by name too (`rewrite_prompts`)",
            editor=_traced,
            shown=_named,
        ),
        EditorRow(
            name="multedit-bare", text="the same without other pictures (`contexts`)", editor=_traced, shown=_bare
        ),
        _row("multedit-5", "MultEdit at layer 5, last token", MultEdit(layer=5), sequences=True),
        _row("multedit-attention", "the same on the attention output", MultEdit(layer=5, projection="attention")),
        _row("multedit-early", "control: layer 0, last token, no kept keys", MultEdit(layer=0), batches=False),
        _row(
            "multedit-published-place",
            "control: layer 2, last constraint token, values converged",
            MultEdit(layer=2, token="constraint_last"),
            batches=False,
        ),
        _row("multedit-paper", "MultEdit.paper(), as published", MultEdit.paper(), batches=False),
        _row("rome", "ROME at layer 5", ROME(layer=5), batches=False),
        _row("memit", "MEMIT, layers 4 to 6", MEMIT(layer=6), sequences=True),
        _row("emmet", "EMMET at layer 5", EMMET(layer=5), sequences=True),
        _row("alphaedit", "AlphaEdit, layers 4 to 6", AlphaEdit(layer=6), sequences=True),
        _row("ft", "fine-tuning of layer 5's down projection", FineTune(layer=5, learning_rate=5e-3)),
        _row(
            "ft-l",
            "the same, no weight moved by more than 0.02",
            FineTune(layer=5, learning_rate=5e-3, entry_bound=2e-2),
        ),
        _row(
            "ft-bf",
            "fine-tuning of layer 5's down projection, in epochs over mini-batches (LocFT-BF)",
            FineTune.breadth_first(layer=5),
            sequences=True,
        ),
        _row("lora", "LoRA of rank 8 through PEFT, all layers", Lora()),
        _row("lora-bf", "LoRA of rank 8 in all layers, in epochs over mini-batches", Lora.breadth_first()),
        _row("in-context", "the fact told before the question", InContext()),
    )


def measure_editor(vlm: VisionLanguageModel, bench: Bench, row: EditorRow, *, together: bool) -> Mapping[str, Any]:
    """Return the scores of an editor, for each edit alone or for a batch: {column: [unedited, low, edited, high]}."""
    options = {"mode": BATCH if together else SINGLE, "moments": bench.moments, "baseline": bench.baseline}
    return _found(row, evaluate(vlm, _records(bench, row), row.editor(bench), batch_size=64, **options))


def measure_sequence(vlm: VisionLanguageModel, bench: Bench, row: EditorRow) -> Mapping[str, Any]:
    """Return the curve of an editor over a sequence, and its scores after the last edit."""
    options = {"mode": SEQUENCE, "moments": bench.moments, "baseline": bench.baseline, "batch_size": 64, "at": AT}
    report = evaluate(vlm, _records(bench, row), row.editor(bench), **options)
    return {
        **_found(row, report),
        "curve": json_ready(cast(EditCurve, report.curve).to_dataframe().to_dict(orient="records")),
    }


def json_ready(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of numbers as plain Python types."""
    return [{key: None if value is None else float(value) for key, value in row.items()} for row in rows]


def _found(row: EditorRow, report: EditReport) -> dict[str, Any]:
    kinds = {each.kind for each in report.rows}
    scores = {}
    for column, (aspect, protocol, kind) in COLUMNS.items():
        if kind in kinds:
            score = report.score(aspect, protocol, kind)
            scores[column] = [score.before.mean, score.after.low, score.after.mean, score.after.high]
    return {
        "text": row.text,
        "scores": scores,
        "splits": dict(report.split_shares()),
        "statuses": dict(report.statuses),
        "left_out": len(report.left_out),
        "requests": len(report.statuses),
    }


def _records(bench: Bench, row: EditorRow) -> list[EditRecord]:
    return [row.shown(bench, record) for record in bench.records]


def _row(name: str, text: str, editor: Editor, **options: Any) -> EditorRow:
    return EditorRow(name=name, text=text, editor=lambda _bench: editor, **options)


def _traced(bench: Bench) -> Editor:
    """Return MultEdit at the site of each request; several at once are edited at the site of most of their traces."""
    return EditorByRequest(choose=lambda requests: MultEdit(where=_site(bench, requests)))


def _with_moments(bench: Bench) -> Editor:
    """Return the same for many edits: the keys of other questions count too, and value searches stop earlier."""
    options = {"moment_weight": 10.0, "ridge_fraction": 0.002, "stop_loss": 0.02}
    return EditorByRequest(choose=lambda requests: MultEdit(where=_site(bench, requests), **options))


def _site(bench: Bench, requests: Sequence[EditRequest]) -> EditSite:
    sites = site_by_request(bench)
    votes = [sites[request.id] for request in requests]
    return max(votes, key=lambda each: sum((each.layer, each.token) == (one.layer, one.token) for one in votes))


def _named(bench: Bench, request: EditRecord) -> EditRecord:
    """Return the request with the question by name as well, in a wording that no probe has."""
    return replace(request, rewrite_prompts=(bench.named[request.id],))


def _bare(_bench: Bench, request: EditRecord) -> EditRecord:
    return replace(request, contexts=())


CONVERGED = 200
"""Number of steps of the value search, which is enough for every value that can be found at all."""
_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A comparison of the traced choice with another one over the same requests."""

    traced: float
    """The mean score of the traced choice, 0 to 1."""
    other: float
    low: float
    """The lower end of the 95 % bootstrap interval of the mean difference (traced minus other) over requests."""
    high: float
    p: float
    """The two-sided p of a permutation test that flips the signs of the differences at random."""
    number: int


def sites_of(_vlm: VisionLanguageModel, bench: Bench) -> Mapping[str, Any]:
    """Return {"sites": {request: [layer, token, onset]}, "notes": [...]} by the traces of the requests."""
    names = [record.id for record in bench.records]
    sites = {name: [site.layer, site.token, site.onset] for name, site in zip(names, bench.sites, strict=True)}
    return {"sites": sites, "notes": list(bench.notes)}


def measure_grid(vlm: VisionLanguageModel, bench: Bench, layer: int, token: str) -> Mapping[str, Any]:
    """Return {request: [efficacy, generality, locality to other entities, locality]}, each 0 to 1.

    Each request is edited alone, with converged values.

    Args:
        vlm: The unedited model.
        bench: The requests.
        layer: The layer to edit.
        token: The token group to edit.
    """
    editor = MultEdit(layer=layer, token=token, steps=CONVERGED)
    report = evaluate(vlm, bench.records, editor, baseline=bench.baseline, batch_size=64)
    found: dict[str, Any] = {}
    for record in bench.records:
        rows = [row for row in report.rows if row.record == record.id]
        moved = [row.numbers[EXACT][1] for row in rows if row.aspect == EFFICACY]
        spread = [row.numbers[EXACT][1] for row in rows if row.aspect == GENERALITY and row.kind != BY_NAME]
        stayed = [(row.kind, row.numbers[UNCHANGED][1]) for row in rows if row.aspect == LOCALITY]
        entities = [value for kind, value in stayed if kind == SAME_QUESTION_OTHER_PICTURE]
        found[record.id] = [*moved, *map(_mean, (spread, entities, [value for _, value in stayed]))]
    return found


def score(cell: Sequence[float]) -> float:
    """Return one number for one edit: the mean of efficacy, generality and locality."""
    return (cell[0] + cell[1] + cell[3]) / 3


def paired(traced: Sequence[float], other: Sequence[float]) -> Paired:
    """Return the comparison of two choices over the same requests."""
    differences = np.asarray(traced) - np.asarray(other)
    low, high, p = paired_test(differences, draws=_DRAWS)
    means = {"traced": float(np.mean(traced)), "other": float(np.mean(other))}
    return Paired(**means, low=low, high=high, p=p, number=len(differences))


def comparisons(sites: Mapping[str, Sequence[Any]], grid: Mapping[tuple[int, str], Any]) -> list[dict[str, Any]]:
    """Compare the traced token with all at the traced layer, and the traced layer with all at the traced token."""
    found = []
    chosen = [score(grid[layer, token][name]) for name, (layer, token, _) in sites.items()]
    tokens, layers = sorted({token for _, token in grid}), sorted({layer for layer, _ in grid})
    for token in tokens:
        other = [score(grid[layer, token][name]) for name, (layer, _, _) in sites.items()]
        found.append({"choice": f"token {token}, traced layer", **asdict(paired(chosen, other))})
    for layer in layers:
        other = [score(grid[layer, token][name]) for name, (_, token, _) in sites.items()]
        found.append({"choice": f"layer {layer}, traced token", **asdict(paired(chosen, other))})
    return found


def by_onset(sites: Mapping[str, Sequence[Any]], grid: Mapping[tuple[int, str], Any]) -> list[dict[str, Any]]:
    """Return the scores of edits at the traced token, by the distance of their layer from the onset of the trace."""
    groups: dict[int, list[Sequence[float]]] = {}
    for name, (_, token, onset) in sites.items():
        for layer in sorted({layer for layer, _ in grid}):
            groups.setdefault(layer - onset, []).append(grid[layer, token][name])
    return [
        {
            "offset": offset,
            "edits": len(cells),
            "efficacy": _mean([cell[0] for cell in cells]),
            "generality": _mean([cell[1] for cell in cells]),
            "entities": _mean([cell[2] for cell in cells]),
            "locality": _mean([cell[3] for cell in cells]),
        }
        for offset, cells in sorted(groups.items())
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
