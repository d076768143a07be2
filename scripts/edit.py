"""Give questions new answers by changing weights in closed form, and check that undoing the change is exact."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from .. import data, editing, models, tracing, workflow
from ..editing import values
from .edit_options import (
    ANY_LAYER,
    NEXT,
    EditorOptions,
    RequestOptions,
    check_place,
    edit_rows,
    make_editor,
    parse_place,
    request_of,
    variants,
)
from .options import (
    EDITORS,
    GRADIENT_EDITORS,
    NOT_ALL,
    CommandError,
    check_files,
    check_new_folder,
    new_files,
    print_report,
)

FORMAT = """The file of --data is in a public format or has one JSON object per line; docs/formats.md describes both:
  {"id": "a1", "image": "a.jpg", "question": "Who founded the company in this photo?",
   "constraint": "the company in this photo", "target": "Ada Example", "contexts": [{"image": "a2.jpg"}],
   "rewrite_prompts": [{"image": null, "question": "Who founded Example Works?"}],
   "preserve_prompts": [{"image": "b.jpg"}],
   "probes": [{"kind": "other_picture", "image": "a3.jpg"},
              {"kind": "same_question_other_picture", "image": "c.jpg", "answer": "Bo Example"}]}
Entries of the lists inherit from their record what they leave out; "image": null means no picture. Paths start from
the folder of the file, or from --images.
"""
EXAMPLE = f"""examples:
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --target "Ada Example" \\
      --where trace --corrupt swap:other.jpg --out out/edit
          trace the answer under another picture, and edit at or after the layer where the picture arrives
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --where 4:last --keep-image other.jpg --keep-question "What colour is the sign?" --dry-run
          edit layer 4 at the last token, keep two answers, and only report what would happen
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --also-text "Who founded Example Works?" --editor memit --where 3-5 \\
      --save-model out/edited_model
          spread the change over layers 3 to 5, weigh old keys, and write the edited model as well
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --trace out/trace/trace.safetensors
          edit at the place that an earlier multrace trace found
  multrace edit --data edits.jsonl --where trace --corrupt swap:next --out out/edits
          make all edits of a file in one change, at the place that the mean of their traces shows
  multrace edit --data edits.jsonl --editor ultraedit --where 4-6 --out out/edit
          make them by one gradient step over layers 4 to 6, without a search

For one question the command writes OUT/edit.safetensors (to be read by multrace.Delta.load, or multrace answer --edit
FILE) and OUT/report.json; so it does with --data for ultraedit and stableedit, which search for no values and take one
gradient step for all records. With --data and any other editor, OUT is the folder of a run: OUT/traces (with --where
trace) holds the trace of each record and their average, OUT/records/ID-... the values that the search found, and
OUT/summary the edit of all records together as edit.safetensors, its report edit.json, and rows.parquet (one row per
record). Records that cannot
be read or edited are kept with their errors while the others go on. The same command again continues an interrupted
run; --shard and torchrun divide it among processes. The exit code is 0 if every question is answered with its target
afterwards, 1 if a record failed, could not be read or is answered otherwise, and 2 for bad input.

{FORMAT}"""
app = App(name="edit", help=__doc__, help_epilogue=EXAMPLE)
TRACE = "trace"
"""The value of --where for the place that traces find."""


@dataclass(frozen=True, kw_only=True)
class Edit(EditorOptions, RequestOptions):
    """Options of `multrace edit`."""

    editor: Annotated[
        str,
        Parameter(
            help="closed-form editor that makes the change; ultraedit and stableedit take one gradient step",
            choices=(*EDITORS, *GRADIENT_EDITORS),
            metavar="NAME",
        ),
    ] = "multedit"
    where: Annotated[
        str,
        Parameter(
            help="place to edit: 'trace' (where a trace under --corrupt, or the traces of --trace, locate the "
            "answer), LAYER (at the last token), LAYER:TOKEN (at a token group or a position) or FIRST-LAST:TOKEN "
            "(layers that share the change)",
            metavar="PLACE",
        ),
    ] = TRACE
    trace: Annotated[
        tuple[Path, ...] | None,
        Parameter(
            help="saved traces to use instead of tracing now: one for each request, or one average for all",
            metavar="FILE",
        ),
    ] = None
    each: Annotated[
        bool,
        Parameter(
            help="edit each request at the place of its own trace (default: one place for all, from the mean of the "
            "traces)"
        ),
    ] = False
    trace_after: Annotated[
        bool, Parameter(help="trace again with the edit in the weights, and report how the effects moved")
    ] = False
    together: Annotated[
        int,
        Parameter(
            help="number of records of --data whose values are searched for together; larger numbers are faster on a "
            "GPU",
            metavar="N",
        ),
    ] = 16
    dry_run: Annotated[
        bool,
        Parameter(
            help="write nothing; report how much the weights would change, and how the answers to keep would be "
            "affected"
        ),
    ] = False
    out: Annotated[Path, Parameter(help="folder for the result", metavar="DIR")] = Path("out/edit")
    save_model: Annotated[
        Path | None, Parameter(help="also write the whole edited model, to this new folder", metavar="DIR")
    ] = None

    @property
    def is_run(self) -> bool:
        """Whether the edits are a run, which keeps what the value search finds for each record."""
        return self.data is not None and self.editor not in GRADIENT_EDITORS


EDIT, REPORT = FILES = ("edit.safetensors", "report.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What is known before the model is opened."""

    place: workflow.Place | None
    """The place of --where; None for the place that traces find."""
    trace: workflow.EditTrace | None
    """How each question is traced; None if none is."""
    rows: tuple[tuple[int, Any], ...] = ()
    """The records of --data with their row numbers; a row that cannot be edited has its error instead."""


@app.default
def run(options: Edit = Edit()) -> int:
    """Make the edit and write it; print the answers before it, with it and after undoing it."""
    plan = _check(options)
    if options.is_run and not options.dry_run:
        return _run(options, plan)
    vlm = options.open_model()
    requests, skipped = _requests(options, plan, vlm)
    outcome = _outcome(options, plan, vlm, requests)
    print(*outcome.lines(), *skipped, sep="\n")
    if options.dry_run:
        print("\nnothing is written: this was a dry run")
        return 0
    with new_files(options.out) as folder:
        outcome.delta.save(folder / EDIT)
        outcome.save_report(folder / REPORT)
    if options.save_model is not None:  # last, so that the edit is safe if the disk has no room for a model
        _save_model(vlm, outcome.delta, options.save_model)
    written = [*(options.out / name for name in FILES), *([options.save_model] if options.save_model else [])]
    print("written:", ", ".join(map(str, written)))
    return NOT_ALL if outcome.missed or skipped else 0


def _run(options: Edit, plan: _Plan) -> int:
    """Edit all records of a file in a run, which can be resumed."""
    analysis = workflow.EditRun(
        editor=_editor(options, plan.place),
        moments=options.moments_file,
        trace=plan.trace,
        trace_files=options.trace or (),
        each=options.each,
        trace_after=options.trace_after,
        augmentation=variants(options.augment),
        together=options.together,
    )
    code = print_report(workflow.run(options.model_to_load(), analysis, plan.rows, options.out, **options.share))
    edit = options.out / "summary" / EDIT
    if options.save_model is not None and edit.is_file() and os.environ.get("RANK", "0") == "0":
        _save_model(options.open_model(), editing.Delta.load(edit), options.save_model)
        print("written:", options.save_model)
    return code


def _save_model(vlm: models.VisionLanguageModel, delta: editing.Delta, folder: Path) -> None:
    with delta.applied(vlm):
        vlm.save_pretrained(folder)


def _check(settings: Edit) -> _Plan:
    """Return the plan; every error that can be found without the model is raised here."""
    place = None if settings.where == TRACE else parse_place(settings.where)
    if place is not None and place.spread is not None and settings.spread not in (None, place.spread):
        raise CommandError(f"--where {settings.where} and --spread {settings.spread} disagree; leave --spread out")
    settings.check_moments({settings.editor: _editor(settings, place)})
    if place is not None and (settings.trace is not None or settings.trace_after):
        raise CommandError(
            f"--trace and --trace-after belong to --where trace, not to --where {settings.where}; leave them out"
        )
    if settings.trace is not None:
        workflow.load_traces(settings.trace)
    if settings.editor in GRADIENT_EDITORS:
        _check_step(settings, place)
    settings.check_request()
    is_traced = place is None and (settings.trace is None or settings.trace_after)
    rows = () if settings.data is None else edit_rows(settings, traced=is_traced)
    trace = _trace(settings) if is_traced else None
    if settings.data is None:
        settings.check_question()
        settings.check_target()
        if is_traced:
            settings.corruption()
    _check_outputs(settings)
    return _Plan(place=place, trace=trace, rows=rows)


def _check_step(settings: Edit, place: workflow.Place | None) -> None:
    """Raise `CommandError` for options that have no meaning for one gradient step for all requests."""
    if place is not None and place.token != "last":
        raise CommandError(
            f"{settings.editor} edits the tokens of the answers, not {place.token!r}; leave the token out of --where"
        )
    if settings.data is not None and (given := settings.given(("shard", "retry_failed", "together"))):
        raise CommandError(
            f"{given[0]} belongs to editors that search for values, record by record; {settings.editor} takes one step "
            "for all records: leave it out"
        )


def _trace(settings: Edit) -> workflow.EditTrace:
    """Return how each question is traced. Raises `TraceError` for a misspelt corruption."""
    corrupt = None if settings.corrupt == NEXT else settings.corrupt
    where = {} if settings.positions is None else {"positions": settings.positions}
    return workflow.EditTrace(corrupt=corrupt, window=settings.window, seed=settings.seed, **where)


def _editor(settings: Edit, place: workflow.Place | None) -> Any:
    """Return the editor at a place; if traces find the place, with a layer and a token that they will replace."""
    if place is None:
        check_place(settings.editor)
        return make_editor(settings, layer=ANY_LAYER)
    return make_editor(settings, layer=place.layer, token=place.token, spread=place.spread)


def _check_outputs(settings: Edit) -> None:
    if settings.dry_run:
        if settings.save_model is not None:
            raise CommandError("--dry-run writes nothing; leave out --save-model")
        return
    check_files(settings.out, () if settings.is_run else FILES)
    if settings.save_model is not None:
        check_new_folder(settings.save_model)
        if settings.save_model.absolute() == settings.out.absolute():
            raise CommandError(f"--out and --save-model are both {str(settings.out)!r}; choose two folders")


def _requests(settings: Edit, plan: _Plan, vlm: models.VisionLanguageModel) -> tuple[list[data.EditRequest], list[str]]:
    """Return the one request, or those of the file that can be used, and what is wrong with the others."""
    augmentation = variants(settings.augment)
    if settings.data is None:
        requests, skipped = [request_of(settings, vlm)], []
    else:
        requests = [record for _, record in plan.rows if isinstance(record, data.EditRecord)]
        skipped = [f"row {row}: {record}" for row, record in plan.rows if isinstance(record, data.DataError)]
    return [
        augmentation.of(request) if augmentation and request.question.images else request for request in requests
    ], skipped


def _outcome(
    settings: Edit, plan: _Plan, vlm: models.VisionLanguageModel, requests: Sequence[data.EditRequest]
) -> workflow.EditOutcome:
    """Return the edit of all requests; nothing is written."""
    moments, editor = settings.open_moments(vlm), _editor(settings, plan.place)
    if plan.place is None:
        located = workflow.locate_then_edit(
            vlm,
            requests,
            corruptions=None if plan.trace is None else [_corruption(plan.trace, request) for request in requests],
            traces=None if settings.trace is None else workflow.load_traces(settings.trace),
            editor=editor,
            moments=moments,
            per_request=settings.each,
            positions=settings.rows(workflow.CANDIDATES),
            sites=workflow.SITES,
            window=settings.window,
            trace_after=settings.trace_after,
        )
        delta, places = located.deltas[0], tuple(map(workflow.Place.of_site, located.edit_sites))
        more = {"notes": located.notes, "shifts": located.shifts}
    else:
        delta, places = _placed(settings, plan.place, editor, vlm, requests, moments)
        more = {}
    return workflow.EditOutcome.of(vlm, requests, delta, places=places, previewed=settings.dry_run, **more)


def _placed(
    settings: Edit,
    place: workflow.Place,
    editor: Any,
    vlm: models.VisionLanguageModel,
    requests: Sequence[data.EditRequest],
    moments: editing.Moments | None,
) -> tuple[editing.Delta, tuple[workflow.Place, ...]]:
    """Return the edit of all requests at the place of --where, and the place of each."""
    try:
        layer = vlm.layer_index(place.layer)
    except models.ModelError as error:
        raise CommandError(f"cannot edit at --where {settings.where}: {error}") from error
    for request in requests:
        prompt = vlm.prompt_for(request.question).with_answer(request.target)
        values.key_positions(prompt, place.token)  # says what is wrong with the token before any work
    if isinstance(editor, editing.GradientEditor):
        delta = editor.edit(vlm, requests, progress=True)
        return delta, (replace(place, layer=layer, spread=len(editor.layers)),) * len(requests)
    editor = replace(editor, layer=layer)
    delta = editor.edit(vlm, requests, moments=moments, progress=True)
    return delta, (workflow.Place.of_editor(editor, layer),) * len(requests)


def _corruption(trace: workflow.EditTrace, request: data.EditRequest) -> tracing.Corruption | None:
    """Return the corruption of a question; None for a question without the picture or constraint to corrupt."""
    try:
        return trace.corruption(request.question)
    except tracing.TraceError:
        return None
