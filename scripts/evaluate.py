"""multrace evaluate: makes edits and asks the model everything around them, before and after, with every protocol."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import World
from ..editing.curves import EditCurve
from ..editing.evaluate import Baseline, Edit, evaluate, evaluate_singly, unedited, with_history
from ..editing.measuring import EvaluationSettings
from ..editing.moments import Moments
from ..editing.probes import Record
from ..editing.questions import General
from ..editing.reports import EditReport
from ..editing.requests import EditRequest
from ..editing.sequences import AT, Governor, evaluate_sequentially
from ..models import VisionLanguageModel
from ..tracing import Corruption, SwapImage
from ..workflow.locate import locate
from .edit_asked import swapped
from .edit_options import NAMES, EditorOptions, editor
from .edit_records import EditEntry, Words, read_edit_records, read_general
from .edit_where import TRACE, Place, parse_place, place_of
from .errors import CommandError
from .options import ModelOptions, add_options, option, read
from .outputs import check_files, new_files
from .world_edits import WorldRequests, another_picture, untouched_facts, world_records

HELP = "measure what edits do: efficacy, generality, locality, portability, beside the unedited model"
EXAMPLE = """examples:
  multrace evaluate --model DIR --data records.jsonl --editor multedit ft --where 5:last --out out/eval
          each edit of the file on its own, by two editors
  multrace evaluate --world outdated --number 20 --where 5:last --general world:200
          outdated facts of the built-in world, and what becomes of 200 facts that no edit is about
  multrace evaluate --world outdated --number 20 --where trace
          each at the layer and token that its own trace names
  multrace evaluate --world outdated --number 100 --mode sequence --where 5:last
          one edit on top of the other, measured after 1, 10, 20, 30 and 100

writes, per editor, OUT/EDITOR/report.json (multrace.editing.reports.EditReport.load), generations.jsonl (every
question with both raw answers) and table.txt; for sequences also curve.json and curve.png
"""
REPORT, GENERATIONS, TABLE = FILES = ("report.json", "generations.jsonl", "table.txt")
CURVE, DRAWING = CURVE_FILES = ("curve.json", "curve.png")
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")
_WORLD = "world"


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelOptions, EditorOptions):
    """Options of `multrace evaluate`."""

    data: Path | None = option("edits with their probes, a JSON object per line", default=None, type=Path)
    world: str | None = option(
        "edits of the built-in world instead: outdated or long_tail facts",
        default=None,
        choices=("outdated", "long_tail"),
    )
    part: str = option(
        "of the world's edits: choose (for choosing settings, the default) or report (for results)",
        default="choose",
        choices=("choose", "report"),
    )
    probes: int = option("of each kind about each of the world's edits (default 8)", default=8, type=int, metavar="N")
    contexts: int = option("other pictures that each of the world's edits is given", default=0, type=int, metavar="N")
    by_name: bool = option("the world's edits are also told by name", default=False, action="store_true")
    keep: int = option("other entities that each of the world's edits is to keep", default=0, type=int, metavar="N")
    number: int | None = option("only the first N edits", default=None, type=int, metavar="N")
    editor: tuple[str, ...] = option(
        f"which editors (default multedit): {', '.join(NAMES)}",
        default=("multedit",),
        nargs="+",
        choices=NAMES,
        metavar="NAME",
    )
    where: str = option(
        "the place to edit: LAYER (at the last token), LAYER:TOKEN, FIRST-LAST:TOKEN, or 'trace': where a trace says "
        "of each edit's question under the picture of another edit (of the built-in world: of another thing of its "
        "kind); in a batch one place for all, from the mean of the traces"
    )
    mode: str = option(
        "single (each edit on its own, the default), batch (all at once) or sequence (one on top of the other)",
        default=SINGLE,
        choices=MODES,
    )
    at: tuple[int, ...] = option(
        f"sequence: after how many edits to measure (default {' '.join(map(str, AT))} and all)",
        default=AT,
        nargs="+",
        type=int,
        metavar="N",
    )
    growth: float = option(
        "sequence: warn once a weight's norm has grown by this share (default 0.1)", default=0.1, type=float
    )
    stop: bool = option("sequence: also stop there", default=False, action="store_true")
    general: str | None = option(
        "held-out questions asked before and after: a file with image, question and answer per line, or, of the "
        "built-in world, world or world:N (facts that no edit is about)",
        default=None,
        metavar="FILE",
    )
    free_only: bool = option(
        "free generation alone: no answers fed in, about half the time", default=False, action="store_true"
    )
    max_new_tokens: int = option("longest answer (default 16)", default=16, type=int)
    fluency_tokens: int = option(
        "answers of this length for the fluency (default 0: not measured)", default=0, type=int
    )
    batch_size: int = option("questions answered together (default 32)", default=32, type=int)
    seed: int = option("of the bootstrap (default 0)", default=0, type=int)
    out: Path = option("folder for the results (default out/eval)", default=Path("out/eval"), type=Path)

    @property
    def measures(self) -> EvaluationSettings:
        """What is measured. EditError for numbers out of range."""
        return EvaluationSettings(
            forced=not self.free_only,
            max_new_tokens=self.max_new_tokens,
            fluency_tokens=self.fluency_tokens,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What can be known before the model is opened."""

    place: Place | None
    """None: where traces say."""
    entries: tuple[EditEntry, ...] = ()
    corruptions: tuple[Corruption | None, ...] = ()
    """Of the entries, for traces."""
    general: tuple[tuple[Words, str], ...] = ()
    facts: int | None = 0
    """How many untouched facts of the world are asked; None: all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """All that is asked, as this model sees it, and what it says unedited."""

    records: tuple[Record, ...]
    corruptions: tuple[Corruption | None, ...]
    """What destroys the picture of each, for traces."""
    general: General
    baseline: Baseline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Evaluate`."""
    add_options(parser, Evaluate)


def run(options: argparse.Namespace) -> int:
    """Evaluates each editor and writes its report; prints free generation's table of each."""
    settings = read(Evaluate, options)
    plan = _check(settings)
    vlm = settings.open_model()
    moments = settings.open_moments(vlm)
    asked = _asked(settings, plan, vlm)
    places = _places(settings, plan, vlm, asked)
    for name in settings.editor:
        edit = _edit(settings, name, moments, places)
        report, curve = _evaluated(settings, vlm, asked, edit)
        if len(report.failed) == len(report.statuses):
            raise CommandError(f"{name}: none of {len(report.failed)} edits could be made; {_first(report)}")
        _write(settings.out / name, report, curve)
        print(f"{name}, {settings.mode}", report.headlines(), *([curve.table()] if curve else []), "", sep="\n")
    print("written:", ", ".join(str(settings.out / name) for name in settings.editor))
    return 0


def _check(settings: Evaluate) -> _Plan:
    """What is to be done; every error that needs no model comes here."""
    if (settings.data is None) == (settings.world is None):
        raise CommandError("pass either --data FILE or --world outdated (or long_tail)")
    if settings.number is not None and settings.number < 1:
        raise CommandError(f"--number is {settings.number}; pass at least 1")
    if settings.probes < 1 or min(settings.contexts, settings.keep) < 0:
        raise CommandError(f"--probes is {settings.probes}; pass at least 1 (--contexts and --keep at least 0)")
    if min(settings.at) < 1:
        raise CommandError(f"--at is {min(settings.at)}; pass numbers of edits, at least 1")
    settings.measures  # noqa: B018  raises for numbers out of range
    place = None if settings.where == TRACE else parse_place(settings.where)
    for name in settings.editor:
        _editor(settings, name, place or Place(layer=0, token="last", reason="to be traced", spread=1))
        check_files(settings.out / name, _names(settings))
    if settings.mode == SEQUENCE and settings.general is not None:
        raise CommandError("--general is asked in the modes single and batch; leave it out of a sequence")
    entries = () if settings.data is None else read_edit_records(settings.data)
    corruptions = [swapped(entries, index) if place is None else None for index in range(len(entries))]
    few = slice(settings.number)
    given = {"place": place, "entries": entries[few], "corruptions": tuple(corruptions[few])}
    kind, _, count = (settings.general or "").partition(":")
    if settings.general is None or kind == _WORLD:
        if kind == _WORLD and (settings.world is None or (count and not count.isdecimal())):
            raise CommandError(f"--general {settings.general}: write world or world:100, together with --world")
        facts = (int(count) if count else None) if kind == _WORLD else 0
        return _Plan(**given, facts=facts)
    return _Plan(**given, general=read_general(Path(settings.general)))


def _editor(settings: Evaluate, name: str, place: Place) -> Any:
    spread = settings.spread if place.spread is None else place.spread
    at = {"layer": place.layer, "token": place.token, "spread": spread, "preset": settings.preset}
    made = editor(name, **at, **settings.settings())
    if made.needs_moments and settings.moments is None:
        raise CommandError(
            f"{name} weighs old keys by their second moments: collect them with multrace moments and pass "
            "--moments FILE, or do without by --moment-weight 0"
        )
    return made


def _places(settings: Evaluate, plan: _Plan, vlm: VisionLanguageModel, asked: _Asked) -> dict[str, Place]:
    """Request -> where it is edited."""
    requests = [record.request for record in asked.records]
    if plan.place is not None:
        return {request.name: plan.place for request in requests}
    found = locate(vlm, requests, corruptions=asked.corruptions, each=settings.mode != BATCH, progress=True)
    counted = Counter((site.layer, site.token) for site in found.sites)
    for (layer, token), number in counted.most_common():
        print(f"the traces say layer {layer}, token {token!r}: {number} of {len(requests)}")
    sites = found.sites
    if settings.mode == BATCH:  # requests without a picture, say, have traces of their own; one solve has one place
        most = counted.most_common(1)[0][0]
        sites = [next(site for site in sites if (site.layer, site.token) == most)] * len(requests)
    return {request.name: place_of(site) for request, site in zip(requests, sites, strict=True)}


def _edit(settings: Evaluate, name: str, moments: Moments | None, places: dict[str, Place]) -> Edit:
    """The editor of this name at each request's place; several requests at once share theirs."""
    made: dict[Any, Edit] = {}

    def edit(vlm: VisionLanguageModel, requests: Sequence[EditRequest], earlier: Sequence[Any]) -> Any:
        place = places[requests[0].name]
        key = (place.layer, place.token)
        if key not in made:
            chosen = _editor(settings, name, place)
            # factorised once for all edits, where the metrics do not depend on an edit's own keys
            metrics = chosen.metrics(vlm, moments) if chosen.has_fixed_cost else None
            made[key] = with_history(chosen, moments=moments, metrics=metrics)
        return made[key](vlm, requests, earlier)

    return edit


def _asked(settings: Evaluate, plan: _Plan, vlm: VisionLanguageModel) -> _Asked:
    general: General = tuple((words.prompt(vlm), answer) for words, answer in plan.general)
    if settings.world is None:
        records = tuple(entry.record(vlm) for entry in plan.entries)
        corruptions = tuple(plan.corruptions)
    else:
        world = World()
        cases = world.edit_cases(settings.world, settings.part)[: settings.number]
        given = WorldRequests(
            count=settings.probes, contexts=settings.contexts, by_name=settings.by_name, keep=settings.keep
        )
        records = world_records(vlm, world, cases, requests=given)
        corruptions = tuple(SwapImage(another_picture(world, case)) for case in cases)
        general += untouched_facts(vlm, world, cases, plan.facts)
    options = {"batch_size": settings.batch_size, "measures": settings.measures, "progress": True}
    baseline = unedited(vlm, records, general=general, **options)
    return _Asked(records=records, corruptions=corruptions, general=general, baseline=baseline)


def _evaluated(
    settings: Evaluate, vlm: VisionLanguageModel, asked: _Asked, edit: Edit
) -> tuple[EditReport, EditCurve | None]:
    options = {"baseline": asked.baseline, "batch_size": settings.batch_size, "progress": True}
    if settings.mode == SEQUENCE:
        governor = Governor(bound=settings.growth, stops=settings.stop)
        curve, report = evaluate_sequentially(vlm, asked.records, edit, at=settings.at, governor=governor, **options)
        return report, curve
    if settings.mode == BATCH:
        change = edit(vlm, [record.request for record in asked.records], ())
        return evaluate(vlm, asked.records, change, general=asked.general, **options), None
    return evaluate_singly(vlm, asked.records, edit, general=asked.general, **options), None


def _write(folder: Path, report: EditReport, curve: EditCurve | None) -> None:
    names = FILES if curve is None else (*FILES, *CURVE_FILES)
    with new_files(folder, names) as work:
        report.save(work / REPORT)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in report.generations())
        (work / GENERATIONS).write_text("".join(lines), encoding="utf-8")
        (work / TABLE).write_text(report.table() + "\n", encoding="utf-8")
        if curve is not None:
            curve.save(work / CURVE)
            curve.plot(work / DRAWING)


def _names(settings: Evaluate) -> Sequence[str]:
    return (*FILES, *CURVE_FILES) if settings.mode == SEQUENCE else FILES


def _first(report: EditReport) -> str:
    """The first failure: whose, and why."""
    return next(f"{name}: {status}" for name, status in report.failed.items())
