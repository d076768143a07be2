"""Make edits, ask the model about and around them, and compare with the unedited model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from .. import data, editing, models, tracing, workflow
from .edit import TRACE
from .edit_requests import parse_place, read_edits, read_general, swapped
from .editors import NAMES, EditorOptions, editor as editor_of
from .options import SEQUENCE_LENGTHS, SPLITS, CommandError, RunOptions, check_files, new_files

EXAMPLE = """examples:
  multrace evaluate --model DIR --data records.jsonl --editor multedit ft --where 5:last --out out/eval
          each edit of the file on its own, by two editors
  multrace evaluate --data records.jsonl --where 5:last --shard 1/8 --out out/array
          the first of eight parts, for a job array
  multrace evaluate --world outdated --limit 20 --where 5:last --general world:200
          outdated facts of the built-in world, and how 200 facts fare that no edit is about
  multrace evaluate --world outdated --limit 20 --where trace
          each edit at the layer and token that its own trace names
  multrace evaluate --world outdated --limit 100 --mode sequence --where 5:last
          one edit on top of the other, measured after 1, 10, 20, 30 and 100

With --data, --mode single and a place in --where, OUT/EDITOR is the folder of a run: records/ID-.../evaluation.json is
the report on one record, and summary/ has evaluation.json (multrace.editing.EditReport.load), generations.jsonl (every
question with both raw answers), table.txt and rows.parquet (one row per record). The same command again continues an
interrupted run, --shard and torchrun share it, and records that fail are kept with their errors. In other cases the
command writes OUT/EDITOR/report.json, generations.jsonl and table.txt at the end; for sequences also curve.json and
curve.png. docs/formats.md describes the file of --data.
"""
app = App(name="evaluate", help=__doc__, help_epilogue=EXAMPLE)
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")
REPORT, GENERATIONS, TABLE = FILES = ("report.json", "generations.jsonl", "table.txt")
CURVE, DRAWING = CURVE_FILES = ("curve.json", "curve.png")
_WORLD = "world"


@dataclass(frozen=True, kw_only=True)
class Evaluate(RunOptions, EditorOptions):
    """Options of `multrace evaluate`."""

    world: Annotated[
        str | None,
        Parameter(help="use edits of the built-in world instead: outdated or long_tail facts", choices=SPLITS),
    ] = None
    part: Annotated[
        str,
        Parameter(
            help="half of the world's edits: choose (for choosing settings) or report (for results)",
            choices=("choose", "report"),
        ),
    ] = "choose"
    probes: Annotated[
        int, Parameter(help="number of probes of each kind for each of the world's edits", metavar="N")
    ] = 8
    contexts: Annotated[
        int, Parameter(help="number of other pictures that each of the world's edits is given", metavar="N")
    ] = 0
    by_name: Annotated[bool, Parameter(help="the world's edits also rewrite the question that asks by name")] = False
    keep: Annotated[
        int, Parameter(help="number of other entities that each of the world's edits has to keep", metavar="N")
    ] = 0
    # pyrefly: ignore[bad-override] -- several editors are compared
    editor: Annotated[
        tuple[str, ...], Parameter(help=f"one or more editors: {', '.join(NAMES)}", choices=NAMES, metavar="NAME")
    ] = ("multedit",)
    where: Annotated[
        str,
        Parameter(
            help="place to edit: LAYER (at the last token), LAYER:TOKEN, FIRST-LAST:TOKEN, or 'trace': where a trace "
            "of each edit's question under the picture of another edit leads (in the built-in world: of another thing "
            "of its kind); a batch has one place, from the mean of the traces"
        ),
    ]
    mode: Annotated[
        str,
        Parameter(
            help="single: each edit on its own; batch: all at once; sequence: one on top of the other", choices=MODES
        ),
    ] = SINGLE
    at: Annotated[
        tuple[int, ...],
        Parameter(
            help="sequence: numbers of edits after which to measure "
            f"(default: {' '.join(map(str, SEQUENCE_LENGTHS))} and all)",
            metavar="N",
        ),
    ] = SEQUENCE_LENGTHS
    growth: Annotated[float, Parameter(help="sequence: warn once a weight's norm has grown by this share")] = 0.1
    stop: Annotated[bool, Parameter(help="sequence: stop at that point instead")] = False
    general: Annotated[
        str | None,
        Parameter(
            help="held-out questions asked before and after: a file with image, question and answer per line, or, of "
            "the built-in world, world or world:N (facts that no edit is about)",
            metavar="FILE",
        ),
    ] = None
    free_only: Annotated[
        bool, Parameter(help="generate freely only and skip teacher forcing, which halves the time")
    ] = False
    max_new_tokens: Annotated[int, Parameter(help="maximum number of tokens of an answer", metavar="N")] = 16
    fluency_tokens: Annotated[
        int, Parameter(help="length in tokens of the answers whose fluency is measured", metavar="N")
    ] = 0
    batch_size: Annotated[int, Parameter(help="number of questions answered together", metavar="N")] = 32
    seed: Annotated[int, Parameter(help="random seed of the bootstrap")] = 0
    out: Annotated[Path, Parameter(help="folder for the results")] = Path("out/eval")

    @property
    def is_run(self) -> bool:
        """Whether every record is measured by itself, so that a run can be interrupted and shared."""
        return self.data is not None and self.mode == SINGLE and self.where != TRACE

    @property
    def measured(self) -> editing.EvaluationSettings:
        """What is measured. Raises `EditError` for numbers out of range."""
        return editing.EvaluationSettings(
            forced=not self.free_only,
            max_new_tokens=self.max_new_tokens,
            fluency_tokens=self.fluency_tokens,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raises `CommandError` or `EditError` for options that do not fit together or numbers out of range."""
        if (self.data is None) == (self.world is None):
            raise CommandError("pass either --data FILE or --world outdated (or long_tail)")
        self.check_run()
        if not self.is_run and (given := self.given(("shard", "retry_failed"))):
            raise CommandError(f"{given[0]} needs --data, --mode single and a place to edit, such as --where 5:last")
        if self.probes < 1 or min(self.contexts, self.keep) < 0:
            raise CommandError(f"--probes is {self.probes}; pass at least 1 (--contexts and --keep at least 0)")
        if min(self.at) < 1:
            raise CommandError(f"--at is {min(self.at)}; pass numbers of edits, at least 1")
        if self.mode == SEQUENCE and self.general is not None:
            raise CommandError("--general is asked in the modes single and batch; leave it out of a sequence")
        self.measured  # noqa: B018  raises for numbers out of range


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What can be known before the model is opened."""

    place: workflow.Place | None
    """None: the place that traces find."""
    entries: tuple[data.EditRecord, ...] = ()
    corruptions: tuple[tracing.Corruption | None, ...] = ()
    """The corruption of each entry, for traces."""
    general: tuple[data.Question, ...] = ()
    facts: int | None = 0
    """How many untouched facts of the world are asked; None for all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """All questions for this model, and its unedited answers."""

    records: tuple[data.EditRecord, ...]
    corruptions: tuple[tracing.Corruption | None, ...]
    """The corruption of each record's picture, for traces."""
    general: tuple[data.Question, ...]
    baseline: editing.Baseline


@app.default
def run(options: Evaluate) -> int:
    """Evaluate each editor and write its report; print the table of free generation for each."""
    plan = _check(options)
    if options.is_run and plan.place is not None:
        return _run(options, plan, plan.place)
    vlm = options.open_model()
    moments = options.open_moments(vlm)
    asked = _asked(options, plan, vlm)
    places = _places(options, plan, vlm, asked)
    for name in options.editor:
        report = _evaluated(options, vlm, asked, _by_place(options, name, places), moments)
        if len(report.failed) == len(report.statuses):
            raise CommandError(f"{name}: none of {len(report.failed)} edits could be made; {_first(report)}")
        _write(options.out / name, report)
        curve = [] if report.curve is None else [report.curve.summary()]
        print(f"{name}, {options.mode}", report.headlines(), *curve, "", sep="\n")
    print("written:", ", ".join(str(options.out / name) for name in options.editor))
    return 0


def _run(settings: Evaluate, plan: _Plan, place: workflow.Place) -> int:
    """Evaluate each record of the file by itself, by each editor in a folder of its own."""
    for name in settings.editor:
        analysis = workflow.EvaluateRun(
            editor=_editor(settings, name, place),
            moments=settings.moments,
            general=plan.general,
            evaluation=settings.measured,
            batch_size=settings.batch_size,
        )
        print(f"{name}, {settings.mode}")
        settings.run(analysis, settings.records(), settings.out / name)
    return 0


def _check(settings: Evaluate) -> _Plan:
    """The plan. Every error that needs no model is raised here."""
    settings.check()
    place = None if settings.where == TRACE else parse_place(settings.where)
    for name in settings.editor:
        _editor(settings, name, place or workflow.Place(layer=0, token="last", reason="to be traced", spread=1))
        if not settings.is_run:
            check_files(settings.out / name, _names(settings))
    where = {"format": settings.format, "images": settings.images}
    entries = () if settings.data is None or settings.is_run else read_edits(settings.data, **where)
    corruptions = [swapped(entries, index) if place is None else None for index in range(len(entries))]
    few = slice(settings.limit)
    given = {"place": place, "entries": entries[few], "corruptions": tuple(corruptions[few])}
    kind, _, count = (settings.general or "").partition(":")
    if settings.general is None or kind == _WORLD:
        if kind == _WORLD and (settings.world is None or (count and not count.isdecimal())):
            raise CommandError(f"--general {settings.general}: write world or world:100, together with --world")
        facts = (int(count) if count else None) if kind == _WORLD else 0
        return _Plan(**given, facts=facts)
    return _Plan(**given, general=read_general(Path(settings.general)))


def _editor(settings: Evaluate, name: str, place: workflow.Place) -> Any:
    spread = settings.spread if place.spread is None else place.spread
    at = {"layer": place.layer, "token": place.token, "spread": spread, "preset": settings.preset}
    made = editor_of(name, **at, **settings.settings())
    if isinstance(made, editing.ClosedFormEditor) and made.needs_moments and settings.moments is None:
        raise CommandError(
            f"{name} weighs old keys by their second moments: collect them with multrace moments and pass "
            "--moments FILE, or do without by --moment-weight 0"
        )
    return made


def _places(
    settings: Evaluate, plan: _Plan, vlm: models.VisionLanguageModel, asked: _Asked
) -> dict[str, workflow.Place]:
    """Request name -> its place."""
    requests = asked.records
    if plan.place is not None:
        return {request.id: plan.place for request in requests}
    found = workflow.locate(
        vlm, requests, corruptions=asked.corruptions, per_request=settings.mode != BATCH, progress=True
    )
    counted = Counter((site.layer, site.token) for site in found.edit_sites)
    for (layer, token), number in counted.most_common():
        print(f"the traces say layer {layer}, token {token!r}: {number} of {len(requests)}")
    sites = found.edit_sites
    if settings.mode == BATCH:  # requests without a picture, say, have traces of their own; one solve has one place
        most = counted.most_common(1)[0][0]
        sites = [next(site for site in sites if (site.layer, site.token) == most)] * len(requests)
    return {request.id: workflow.Place.of_site(site) for request, site in zip(requests, sites, strict=True)}


def _by_place(settings: Evaluate, name: str, places: dict[str, workflow.Place]) -> editing.Editor:
    """Return the editor of this name at each request's place; requests that are edited together share one place."""

    def choose(requests: Sequence[data.EditRequest]) -> Any:
        return _editor(settings, name, places[requests[0].id])

    first = _editor(settings, name, next(iter(places.values())))
    if len({(place.layer, place.token) for place in places.values()}) == 1:
        return first
    return editing.EditorByRequest(choose=choose, closed_form=isinstance(first, editing.ClosedFormEditor))


def _asked(settings: Evaluate, plan: _Plan, vlm: models.VisionLanguageModel) -> _Asked:
    general = plan.general
    if settings.world is None:
        records = plan.entries
        corruptions = tuple(plan.corruptions)
    else:
        world = data.World()
        cases = world.edit_cases(settings.world, settings.part)[: settings.limit]
        given = data.WorldRequests(
            count=settings.probes, contexts=settings.contexts, by_name=settings.by_name, keep=settings.keep
        )
        records = data.world_records(world, cases, requests=given)
        corruptions = tuple(tracing.SwapImage(data.another_picture(world, case)) for case in cases)
        general += data.untouched_facts(world, cases, plan.facts)
    options = {"batch_size": settings.batch_size, "settings": settings.measured, "progress": True}
    reference = editing.baseline(vlm, records, general=general, **options)
    return _Asked(records=records, corruptions=corruptions, general=general, baseline=reference)


def _evaluated(
    settings: Evaluate,
    vlm: models.VisionLanguageModel,
    asked: _Asked,
    editor: editing.Editor,
    moments: editing.Moments | None,
) -> editing.EditReport:
    options = {"moments": moments, "mode": settings.mode, "baseline": asked.baseline, "batch_size": settings.batch_size}
    if settings.mode == SEQUENCE:
        options |= {"at": settings.at, "norm_bound": editing.NormBound(growth=settings.growth, stop=settings.stop)}
    return editing.evaluate(vlm, asked.records, editor, general=asked.general, **options)


def _write(folder: Path, report: editing.EditReport) -> None:
    with new_files(folder, stale=CURVE_FILES) as work:
        report.save(work / REPORT)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in report.generations())
        (work / GENERATIONS).write_text("".join(lines), encoding="utf-8")
        (work / TABLE).write_text(report.summary() + "\n", encoding="utf-8")
        if report.curve is not None:
            report.curve.save(work / CURVE)
            report.curve.plot(work / DRAWING)


def _names(settings: Evaluate) -> Sequence[str]:
    return (*FILES, *CURVE_FILES) if settings.mode == SEQUENCE else FILES


def _first(report: editing.EditReport) -> str:
    """The first failure: the record and the reason."""
    return next(f"{name}: {status}" for name, status in report.failed.items())
