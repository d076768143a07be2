"""Run `multrace edit`: locate, edit, write the edit, and check that undoing it is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..artefacts import write_json
from ..data import EditRequest
from ..editing.changes import Delta
from ..editing.evaluation.preview import preview, sizes
from ..editing.moments import Moments
from ..editing.requests import room_for_targets
from ..editing.solve import ClosedFormEditor
from ..editing.values import key_positions
from ..models import ModelError, VisionLanguageModel
from ..tracing import AverageTrace, CausalTrace
from ..workflow.located_edit import TraceShift, locate_then_edit
from .edit_asked import AskedEdit, asked_edits
from .edit_report import EditOutcome
from .edit_where import Place, load_traces, parse_place, place_of
from .editors import make_editor
from .errors import CommandError
from .options.edit import TRACE, Edit
from .outputs import check_files, check_new_folder, new_files

EDIT, REPORT = FILES = ("edit.safetensors", "report.json")
_LAYOUT = "multrace edit outcome 1"
NOT_ALL = 1
"""Exit code if some of the edits do not make the model say their targets."""
_CANDIDATES = ("constraint_last", "last")
"""Names instead of positions: they mean the same token in other wordings, where the edit has to work too."""
_KINDS = ("hidden", "mlp")
"""The kinds of sites that the choice of a place needs."""
_QUIET = 16  # show a progress bar only above this many answers


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What can be known before the model is opened."""

    asked: tuple[AskedEdit, ...]
    place: Place | None = None
    """None: the place that traces find."""
    traces: tuple[CausalTrace, ...] | AverageTrace | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Made:
    """The change, and how its place was found."""

    delta: Delta
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()
    shifts: tuple[TraceShift | None, ...] = field(default=())


def run(settings: Edit) -> int:
    """Edit, write the edit (and the model), print the answers before, with the edit and after undo."""
    plan = _check(settings)
    vlm = settings.open_model()
    requests = [each.make(vlm) for each in plan.asked]
    moments = settings.open_moments(vlm)
    made = (
        _traced(vlm, requests, plan, settings, moments)
        if plan.place is None
        else (_placed(vlm, requests, plan.place, settings, moments))
    )
    outcome = _outcome(vlm, requests, made, settings)
    if settings.dry_run:
        print(*outcome.lines(), "", "nothing is written: this was a dry run", sep="\n")
        return 0
    with new_files(settings.out) as folder:
        made.delta.save(folder / EDIT)
        write_json(folder / REPORT, _LAYOUT, outcome.as_json())
    if settings.save_model is not None:  # after the edit is whole in its folder, in case there is no room for a model
        with made.delta.applied(vlm):
            vlm.save_pretrained(settings.save_model)
    print(*outcome.lines(), sep="\n")
    written = [*(settings.out / name for name in FILES), *([settings.save_model] if settings.save_model else [])]
    print("written:", ", ".join(map(str, written)))
    return NOT_ALL if outcome.missed else 0


def _check(settings: Edit) -> _Plan:
    """The plan. Every error that needs no model is raised here."""
    place = None if settings.where == TRACE else parse_place(settings.where)
    if place is not None and place.spread is not None and settings.spread not in (None, place.spread):
        raise CommandError(f"--where {settings.where} and --spread {settings.spread} disagree; leave one of them out")
    editor = make_editor(settings, layer=0, spread=1)
    if editor.needs_moments and settings.moments is None:
        raise CommandError(
            f"{settings.editor} weighs old keys by their second moments: pass --moments FILE (multrace moments makes "
            "it), or --moment-weight 0 where it needs them for no more than that"
        )
    if place is not None and (settings.trace is not None or settings.trace_after):
        raise CommandError(f"--trace and --trace-after belong to --where trace, not to --where {settings.where}")
    traces = None if settings.trace is None else load_traces(settings.trace)
    asked = asked_edits(settings, traced=place is None and (traces is None or settings.trace_after))
    _check_outputs(settings)
    return _Plan(asked=asked, place=place, traces=traces)


def _check_outputs(settings: Edit) -> None:
    if settings.dry_run:
        if settings.save_model is not None:
            raise CommandError("--dry-run writes nothing; leave out --save-model")
        return
    check_files(settings.out, FILES)
    if settings.save_model is not None:
        check_new_folder(settings.save_model)
        if settings.save_model.absolute() == settings.out.absolute():
            raise CommandError(f"--out and --save-model are both {str(settings.out)!r}; choose two folders")


def _placed(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    place: Place,
    settings: Edit,
    moments: Moments | None,
) -> _Made:
    """Edit all requests at the place of --where."""
    try:
        layer = vlm.layer_index(place.layer)
    except ModelError as error:
        raise CommandError(f"cannot edit at --where {settings.where}: {error}") from error
    for request in requests:
        asked = vlm.prompt_for(request.question).with_answer(request.target)
        key_positions(asked, place.token)  # says what is wrong with the token before any work
    editor = make_editor(settings, layer=layer, token=place.token, spread=place.spread)
    delta = editor.edit(vlm, requests, moments=moments, progress=True)
    spread = editor.spread if editor.spread > 1 else None
    found = Place(layer=layer, token=place.token, reason=place.reason, spread=spread)
    return _Made(delta=delta, places=(found,) * len(requests))


def _traced(
    vlm: VisionLanguageModel, requests: Sequence[EditRequest], plan: _Plan, settings: Edit, moments: Moments | None
) -> _Made:
    """Edit all requests at the places that traces find."""
    found = locate_then_edit(
        vlm,
        requests,
        corruptions=[each.corruption for each in plan.asked] if plan.traces is None or settings.trace_after else None,
        traces=plan.traces,
        editor=partial(_editor_at, settings),
        moments=moments,
        per_request=settings.each,
        positions=settings.rows(_CANDIDATES),
        sites=_KINDS,
        window=settings.window,
        trace_after=settings.trace_after,
        progress=True,
    )
    places = tuple(map(place_of, found.edit_sites))
    return _Made(delta=found.deltas[0], places=places, notes=found.notes, shifts=found.shifts)


def _editor_at(settings: Edit, *, layer: int, token: str | int) -> ClosedFormEditor:
    return make_editor(settings, layer=layer, token=token)


def _outcome(vlm: VisionLanguageModel, requests: Sequence[EditRequest], made: _Made, settings: Edit) -> EditOutcome:
    """The answers in each state of the model, which ends as it began, and what else is reported."""
    delta, prompts = made.delta, [vlm.prompt_for(request.question) for request in requests]
    words: dict[str, Any] = {
        "progress": len(prompts) > _QUIET,
        "max_new_tokens": max(16, room_for_targets(vlm, requests)),
    }
    before = vlm.answers(prompts, **words)
    with delta.applied(vlm):
        edited = vlm.answers(prompts, **words)
    after = vlm.answers(prompts, **words)
    found = None
    if settings.dry_run:
        tokens = [place.token for place in made.places]
        found = preview(vlm, requests, delta, tokens=tokens)
    return EditOutcome(
        delta=delta,
        places=made.places,
        notes=made.notes,
        shifts=made.shifts,
        answers=tuple(zip(before, edited, after, strict=True)),
        shares=delta.shares(delta.retained(vlm)),
        is_undone=vlm.fingerprint(delta.changes) == delta.fingerprints,
        sizes=sizes(vlm, delta),
        preview=found,
    )
