"""multrace edit: gives questions new answers by closed-form weight changes, and shows that undoing them is exact."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..editing.closed_form import ClosedFormEditor
from ..editing.delta import Delta
from ..editing.editors import EDITORS
from ..editing.moments import Moments
from ..editing.requests import EditRequest
from ..editing.targets import key_positions
from ..models import ModelError, Projection, VisionLanguageModel
from ..tracing import AverageTrace, CausalTrace
from ..workflow.locate_then_edit import TraceShift, locate_then_edit
from .edit_asked import AskedEdit, RequestOptions
from .edit_options import EditorOptions
from .edit_preview import preview, sizes
from .edit_records import FORMAT
from .edit_report import EditOutcome
from .edit_where import TRACE, Place, load_traces, parse_place, place_of
from .errors import CommandError
from .options import ModelOptions, add_options, option, read
from .outputs import check_files, check_new_folder, new_files

HELP = "change what a model answers, at the place that a trace finds"
EXAMPLE = """examples:
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --target "Ada Example" \\
      --where trace --corrupt swap:other.jpg --out out/edit
          trace the answer under another picture, and edit at or after the layer where the picture arrives
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --where 4:last --keep-image other.jpg --keep-question "What colour is the sign?" --dry-run
          edit layer 4 at the last token, keep two answers, and only say what would happen
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --also-text "Who founded Example Works?" --editor memit --moments out/moments/moments.safetensors \\
      --where 3-5 --save-model out/edited_model
          spread the work over layers 3 to 5, weigh old keys, and write the edited model as well
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --trace out/trace/trace.safetensors
          edit where a trace that multrace trace made says
  multrace edit --data edits.jsonl --where trace --corrupt swap:next --out out/edits
          all edits of a file in one, at the place that the mean of their traces shows

writes OUT/edit.safetensors (multrace.editing.Delta.load, or multrace answer --edit FILE) and OUT/report.json

--data: """
EXAMPLE += FORMAT
EDIT, REPORT = FILES = ("edit.safetensors", "report.json")
_CANDIDATES = ("constraint_last", "last")
"""Names and not positions: they mean the same token in other wordings, where the edit has to work too."""
_KINDS = ("hidden", "mlp")
"""All that the choice of a place needs."""
_QUIET = 16  # so many answers are there before a bar is


@dataclass(frozen=True, kw_only=True)
class Edit(EditorOptions, RequestOptions, ModelOptions):
    """Options of `multrace edit`."""

    editor: str = option(
        f"which editor (default multedit): {', '.join(EDITORS)}", default="multedit", choices=EDITORS, metavar="NAME"
    )
    where: str = option(
        "the place to edit: 'trace' (found by a trace under --corrupt, among constraint_last and last unless --groups "
        "says otherwise), LAYER (at the last token), LAYER:TOKEN (a group or a position) or FIRST-LAST:TOKEN (layers "
        "that share the work); default trace",
        default=TRACE,
    )
    trace: tuple[Path, ...] | None = option(
        "traces made before, one for each request or an average for all, instead of tracing",
        default=None,
        nargs="+",
        type=Path,
        metavar="FILE",
    )
    each: bool = option(
        "trace: a place for each request from its own trace (default: one for all, from the mean of their traces)",
        default=False,
        action="store_true",
    )
    trace_after: bool = option(
        "trace once more with the edit in place, and say what moved", default=False, action="store_true"
    )
    dry_run: bool = option(
        "write nothing; say how much the weights would change, and what becomes of the prompts to keep",
        default=False,
        action="store_true",
    )
    out: Path = option("folder for the result (default out/edit)", default=Path("out/edit"), type=Path)
    save_model: Path | None = option(
        "also write the edited model, whole, to this new folder", default=None, type=Path, metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What can be known before the model is opened."""

    asked: tuple[AskedEdit, ...]
    place: Place | None = None
    """None: where traces say."""
    traces: tuple[CausalTrace, ...] | AverageTrace | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Made:
    """The change, and how it came about."""

    delta: Delta
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()
    shifts: tuple[TraceShift | None, ...] = field(default=())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Edit`."""
    add_options(parser, Edit)


def run(options: argparse.Namespace) -> int:
    """Edits, writes the edit (and the model), prints the answers before, with the edit and after undo."""
    settings = read(Edit, options)
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
    with new_files(settings.out, FILES) as folder:
        made.delta.save(folder / EDIT)
        (folder / REPORT).write_text(json.dumps(outcome.as_json(), indent=2) + "\n", encoding="utf-8")
        if settings.save_model is not None:
            with made.delta.applied(vlm):
                vlm.save_pretrained(settings.save_model)
    print(*outcome.lines(), sep="\n")
    written = [*(settings.out / name for name in FILES), *([settings.save_model] if settings.save_model else [])]
    print("written:", ", ".join(map(str, written)))
    return 0


def _check(settings: Edit) -> _Plan:
    """What is to be done; every error that needs no model comes here."""
    place = None if settings.where == TRACE else parse_place(settings.where)
    if place is not None and place.spread is not None and settings.spread not in (None, place.spread):
        raise CommandError(f"--where {settings.where} and --spread {settings.spread} disagree; leave one of them out")
    editor = settings.make_editor(layer=0, spread=1)
    if editor.needs_moments and settings.moments is None:
        raise CommandError(
            f"{settings.editor} weighs old keys by their second moments: pass --moments FILE (multrace moments makes "
            "it), or --moment-weight 0 where it needs them for no more than that"
        )
    if place is not None and (settings.trace is not None or settings.trace_after):
        raise CommandError(f"--trace and --trace-after belong to --where trace, not to --where {settings.where}")
    traces = None if settings.trace is None else load_traces(settings.trace)
    asked = settings.asked(traced=place is None and (traces is None or settings.trace_after))
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
    """All requests edited at the place that was asked for."""
    try:
        layer = vlm.layer_index(place.layer)
    except ModelError as error:
        raise CommandError(f"cannot edit at --where {settings.where}: {error}") from error
    for request in requests:
        key_positions(request.prompts[0], place.token)  # says what is wrong with the token before any work
    editor = settings.make_editor(layer=layer, token=place.token, spread=place.spread)
    delta = editor.edit(vlm, requests, moments=moments, progress=True)
    spread = editor.spread if editor.spread > 1 else None
    found = Place(layer=layer, token=place.token, reason=place.reason, spread=spread)
    return _Made(delta=delta, places=(found,) * len(requests))


def _traced(
    vlm: VisionLanguageModel, requests: Sequence[EditRequest], plan: _Plan, settings: Edit, moments: Moments | None
) -> _Made:
    """All requests edited where traces say."""
    found = locate_then_edit(
        vlm,
        requests,
        corruptions=[each.corruption for each in plan.asked] if plan.traces is None or settings.trace_after else None,
        traces=plan.traces,
        editor=partial(_editor_at, settings),
        moments=moments,
        each=settings.each,
        groups=settings.positions(_CANDIDATES),
        kinds=_KINDS,
        window=settings.window,
        after=settings.trace_after,
        progress=True,
    )
    places = tuple(map(place_of, found.sites))
    return _Made(delta=found.deltas[0], places=places, notes=found.notes, shifts=found.shifts)


def _editor_at(settings: Edit, *, layer: int, token: str | int) -> ClosedFormEditor:
    return settings.make_editor(layer=layer, token=token)


def _outcome(vlm: VisionLanguageModel, requests: Sequence[EditRequest], made: _Made, settings: Edit) -> EditOutcome:
    """The answers in each state of the model, which ends as it began, and what else is to be told."""
    delta, prompts = made.delta, [request.prompt for request in requests]
    # room for a target and a little more, so that one that does not stop is seen
    longest = max(len(request.prompts[0].answer_ids) for request in requests) + 4
    words: dict[str, Any] = {"progress": len(prompts) > _QUIET, "max_new_tokens": max(16, longest)}
    before = vlm.answers(prompts, **words)
    with delta.applied(vlm):
        edited = vlm.answers(prompts, **words)
    after = vlm.answers(prompts, **words)
    found = None
    if settings.dry_run:
        tokens = [place.token for place in made.places]
        found = preview(vlm, delta, requests, tokens, _projections(vlm, delta), progress=True)
    return EditOutcome(
        delta=delta,
        places=made.places,
        notes=made.notes,
        shifts=made.shifts,
        answers=tuple(zip(before, edited, after, strict=True)),
        shares=delta.shares(delta.realised(vlm)),
        is_undone=vlm.fingerprint(delta.changes) == delta.fingerprints,
        sizes=sizes(vlm, delta),
        preview=found,
    )


def _projections(vlm: VisionLanguageModel, delta: Delta) -> list[Projection]:
    """The projections whose weights the edit changes."""
    found = [find(layer) for layer in range(vlm.layers) for find in (vlm.down_projection, vlm.attention_projection)]
    return [each for each in found if each.name in delta.changes]
