"""Run `multrace evaluate`: make edits and ask the model about and around them, before and after."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import (
    EditRecord,
    EditRequest,
    Question,
    World,
    WorldRequests,
    another_picture,
    untouched_facts,
    world_records,
)
from ..editing import ClosedFormEditor, Editor, EditorByRequest
from ..editing.evaluation import (
    Baseline,
    EditReport,
    NormBound,
    baseline,
    evaluate,
)
from ..editing.moments import Moments
from ..models import VisionLanguageModel
from ..tracing import Corruption, SwapImage
from ..workflow import EvaluateRun
from ..workflow.sites import locate
from .edit import TRACE
from .edit_requests import Place, parse_place, place_of, read_edits, read_general, swapped
from .editors import editor as editor_of
from .errors import CommandError
from .options.evaluate import BATCH, SEQUENCE, Evaluate
from .outputs import check_files, new_files

REPORT, GENERATIONS, TABLE = FILES = ("report.json", "generations.jsonl", "table.txt")
CURVE, DRAWING = CURVE_FILES = ("curve.json", "curve.png")
_WORLD = "world"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What can be known before the model is opened."""

    place: Place | None
    """None: the place that traces find."""
    entries: tuple[EditRecord, ...] = ()
    corruptions: tuple[Corruption | None, ...] = ()
    """The corruption of each entry, for traces."""
    general: tuple[Question, ...] = ()
    facts: int | None = 0
    """How many untouched facts of the world are asked; None for all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """All questions for this model, and its unedited answers."""

    records: tuple[EditRecord, ...]
    corruptions: tuple[Corruption | None, ...]
    """The corruption of each record's picture, for traces."""
    general: tuple[Question, ...]
    baseline: Baseline


def run(settings: Evaluate) -> int:
    """Evaluate each editor and write its report; print the table of free generation for each."""
    plan = _check(settings)
    if settings.is_run and plan.place is not None:
        return _run(settings, plan, plan.place)
    vlm = settings.open_model()
    moments = settings.open_moments(vlm)
    asked = _asked(settings, plan, vlm)
    places = _places(settings, plan, vlm, asked)
    for name in settings.editor:
        report = _evaluated(settings, vlm, asked, _by_place(settings, name, places), moments)
        if len(report.failed) == len(report.statuses):
            raise CommandError(f"{name}: none of {len(report.failed)} edits could be made; {_first(report)}")
        _write(settings.out / name, report)
        curve = [] if report.curve is None else [report.curve.summary()]
        print(f"{name}, {settings.mode}", report.headlines(), *curve, "", sep="\n")
    print("written:", ", ".join(str(settings.out / name) for name in settings.editor))
    return 0


def _run(settings: Evaluate, plan: _Plan, place: Place) -> int:
    """Evaluate each record of the file by itself, by each editor in a folder of its own."""
    for name in settings.editor:
        analysis = EvaluateRun(
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
        _editor(settings, name, place or Place(layer=0, token="last", reason="to be traced", spread=1))
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


def _editor(settings: Evaluate, name: str, place: Place) -> Any:
    spread = settings.spread if place.spread is None else place.spread
    at = {"layer": place.layer, "token": place.token, "spread": spread, "preset": settings.preset}
    made = editor_of(name, **at, **settings.settings())
    if isinstance(made, ClosedFormEditor) and made.needs_moments and settings.moments is None:
        raise CommandError(
            f"{name} weighs old keys by their second moments: collect them with multrace moments and pass "
            "--moments FILE, or do without by --moment-weight 0"
        )
    return made


def _places(settings: Evaluate, plan: _Plan, vlm: VisionLanguageModel, asked: _Asked) -> dict[str, Place]:
    """Request name -> its place."""
    requests = asked.records
    if plan.place is not None:
        return {request.id: plan.place for request in requests}
    found = locate(vlm, requests, corruptions=asked.corruptions, per_request=settings.mode != BATCH, progress=True)
    counted = Counter((site.layer, site.token) for site in found.edit_sites)
    for (layer, token), number in counted.most_common():
        print(f"the traces say layer {layer}, token {token!r}: {number} of {len(requests)}")
    sites = found.edit_sites
    if settings.mode == BATCH:  # requests without a picture, say, have traces of their own; one solve has one place
        most = counted.most_common(1)[0][0]
        sites = [next(site for site in sites if (site.layer, site.token) == most)] * len(requests)
    return {request.id: place_of(site) for request, site in zip(requests, sites, strict=True)}


def _by_place(settings: Evaluate, name: str, places: dict[str, Place]) -> Editor:
    """Return the editor of this name at each request's place; requests that are edited together share one place."""

    def choose(requests: Sequence[EditRequest]) -> Any:
        return _editor(settings, name, places[requests[0].id])

    first = _editor(settings, name, next(iter(places.values())))
    if len({(place.layer, place.token) for place in places.values()}) == 1:
        return first
    return EditorByRequest(choose=choose, closed_form=isinstance(first, ClosedFormEditor))


def _asked(settings: Evaluate, plan: _Plan, vlm: VisionLanguageModel) -> _Asked:
    general = plan.general
    if settings.world is None:
        records = plan.entries
        corruptions = tuple(plan.corruptions)
    else:
        world = World()
        cases = world.edit_cases(settings.world, settings.part)[: settings.limit]
        given = WorldRequests(
            count=settings.probes, contexts=settings.contexts, by_name=settings.by_name, keep=settings.keep
        )
        records = world_records(world, cases, requests=given)
        corruptions = tuple(SwapImage(another_picture(world, case)) for case in cases)
        general += untouched_facts(world, cases, plan.facts)
    options = {"batch_size": settings.batch_size, "settings": settings.measured, "progress": True}
    reference = baseline(vlm, records, general=general, **options)
    return _Asked(records=records, corruptions=corruptions, general=general, baseline=reference)


def _evaluated(
    settings: Evaluate, vlm: VisionLanguageModel, asked: _Asked, editor: Editor, moments: Moments | None
) -> EditReport:
    options = {"moments": moments, "mode": settings.mode, "baseline": asked.baseline, "batch_size": settings.batch_size}
    if settings.mode == SEQUENCE:
        options |= {"at": settings.at, "norm_bound": NormBound(growth=settings.growth, stop=settings.stop)}
    return evaluate(vlm, asked.records, editor, general=asked.general, **options)


def _write(folder: Path, report: EditReport) -> None:
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


def _first(report: EditReport) -> str:
    """The first failure: the record and the reason."""
    return next(f"{name}: {status}" for name, status in report.failed.items())
