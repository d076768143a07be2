"""Give questions new answers by closed-form weight changes, and check that undoing them is exact."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from .. import artefacts, data, editing, models, tracing, workflow
from ..editing import evaluation, values
from .edit_requests import AskedEdit, Place, RequestOptions, asked_edits, load_traces, parse_place, place_of
from .editors import EditorOptions, make_editor
from .errors import CommandError
from .options.asking import ModelOptions
from .options.choices import EDITORS
from .outputs import check_files, check_new_folder, new_files

FORMAT = """The file of --data has one JSON object per line or is in a public format; docs/formats.md describes both:
  {"id": "a1", "image": "a.jpg", "question": "Who founded the company in this photo?",
   "constraint": "the company in this photo", "target": "Ada Example", "contexts": [{"image": "a2.jpg"}],
   "rewrite_prompts": [{"image": null, "question": "Who founded Example Works?"}],
   "preserve_prompts": [{"image": "b.jpg"}],
   "probes": [{"kind": "other_picture", "image": "a3.jpg"},
              {"kind": "same_question_other_picture", "image": "c.jpg", "answer": "Bo Example"}]}
Entries of the lists inherit what they leave out from their record; "image": null means no picture. Paths are relative
to the file, or to --images.
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
      --also-text "Who founded Example Works?" --editor memit --moments out/moments/moments.safetensors \\
      --where 3-5 --save-model out/edited_model
          spread the change over layers 3 to 5, weigh old keys, and write the edited model as well
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --trace out/trace/trace.safetensors
          edit at the place that an earlier multrace trace found
  multrace edit --data edits.jsonl --where trace --corrupt swap:next --out out/edits
          write all edits of a file in one, at the place that the mean of their traces shows

The command writes OUT/edit.safetensors (multrace.Delta.load, or multrace answer --edit FILE) and OUT/report.json.
With --data it keeps the values that it has searched for in OUT/values until the edit is written: the same command goes
on from there after a crash.

{FORMAT}"""
app = App(name="edit", help=__doc__, help_epilogue=EXAMPLE)
VALUES = "values"
TRACE = "trace"
"""What --where spells for the place that traces find."""


@dataclass(frozen=True, kw_only=True)
class Edit(EditorOptions, RequestOptions, ModelOptions):
    """Options of `multrace edit`."""

    editor: Annotated[str, Parameter(help=f"editor: {', '.join(EDITORS)}", choices=EDITORS, metavar="NAME")] = (
        "multedit"
    )
    where: Annotated[
        str,
        Parameter(
            help="place to edit: 'trace' (found by a trace under --corrupt, among constraint_last and last unless "
            "--positions names others), LAYER (at the last token), LAYER:TOKEN (a token group or a position) or "
            "FIRST-LAST:TOKEN (layers that share the change)"
        ),
    ] = TRACE
    trace: Annotated[
        tuple[Path, ...] | None,
        Parameter(
            help="traces made before, one for each request or an average for all, which replace the tracing",
            metavar="FILE",
        ),
    ] = None
    each: Annotated[
        bool,
        Parameter(
            help="edit each request at the place of its own trace (default: one place, from the mean of the traces)"
        ),
    ] = False
    trace_after: Annotated[bool, Parameter(help="trace again with the edit in place, and report what moved")] = False
    dry_run: Annotated[
        bool,
        Parameter(
            help="write nothing; report how much the weights would change, and how prompts to keep would be affected"
        ),
    ] = False
    out: Annotated[Path, Parameter(help="folder for the result")] = Path("out/edit")
    save_model: Annotated[
        Path | None, Parameter(help="also write the whole edited model to this new folder", metavar="DIR")
    ] = None

    @property
    def checkpoint(self) -> Path | None:
        """The folder that keeps searched values until the edit of a file is written; None where nothing is kept."""
        return None if self.data is None or self.dry_run else self.out / VALUES


_SHOWN = 20
"""Maximum number of requests, neighbours or shifts that are printed; the report has all."""
_MOSTLY = 0.9
_STATES = ("before", "with the edit", "after undo")


@dataclass(frozen=True, kw_only=True, eq=False)
class EditOutcome:
    """A finished edit and its results."""

    delta: editing.Delta
    places: tuple[Place, ...]
    """The place of each request."""
    notes: tuple[str, ...]
    shifts: tuple[workflow.TraceShift | None, ...]
    answers: tuple[tuple[str, ...], ...]
    """(before, with the edit, after undo) of each request."""
    shares: tuple[float | None, ...]
    """Of what each request asked for, over all its keys, after rounding to the model's dtype; None without keys."""
    is_undone: bool
    """Whether every touched weight is bit-identical to what it was."""
    sizes: tuple[Any, ...]
    preview: Any | None = None

    @property
    def edited(self) -> int:
        """Return how many requests were edited."""
        return sum(request["status"] == "edited" for request in self.delta.requests)

    @property
    def missed(self) -> int:
        """Return for how many requests the edited model does not say the target."""
        return sum(not self._says_target(index) for index in range(len(self.answers)))

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        requests = [
            {
                **request,
                "place": asdict(place),
                "answers": dict(zip(_STATES, answers, strict=True)),
                "says_target": self._says_target(index),
                "retained": share,
                "shift": None if shift is None else list(shift.lines()),
            }
            for index, (request, place, answers, share, shift) in enumerate(
                zip(self.delta.requests, self.places, self.answers, self.shares, self._all_shifts(), strict=True)
            )
        ]
        made = {"model": self.delta.model, "revision": self.delta.revision, "settings": dict(self.delta.settings)}
        sizes = [asdict(each) for each in self.sizes]
        found = {"requests": requests, "weights": sizes, "undone_bit_for_bit": self.is_undone}
        return made | found | {"notes": list(self.notes)}

    def lines(self) -> Iterator[str]:
        """Yield what was edited where, the answers in each state of the model, and notes."""
        yield from self._one() if len(self.answers) == 1 else self._many()
        yield from () if self.is_undone else ("after undo some weights differ!",)
        if any(share is not None and share < _MOSTLY for share in self.shares):
            yield "less than 90% is retained; a higher precision, a smaller ridge or export --peft gives the rest"
        if self.missed:
            yield f"{self.missed} of {len(self.answers)} do not say their target; try another --where or more --steps"
        for shift in self._all_shifts()[:_SHOWN]:
            yield from (f"{'traced again':<15}  {line}" for line in (shift.lines() if shift else ()))
        yield from (f"{'note':<15}  {note}" for note in self.notes)
        if self.preview is not None:
            yield ""
            yield from evaluation.preview_lines(self.preview, _SHOWN)

    def _one(self) -> Iterator[str]:
        (request,) = self.delta.requests
        yield f"question   {request['question']}"
        yield f"target     {request['target']}"
        yield f"edited at  {self.places[0]}"
        yield from () if request["status"] == "edited" else (f"status     {request['status']}",)
        yield ""
        yield from (f"{state:<15}  {answer}" for state, answer in zip(_STATES, self.answers[0], strict=True))
        yield f"{'retained':<15}  {_share(self.shares[0])} of the requested change"

    def _many(self) -> Iterator[str]:
        right = sum(self._says_target(index) for index in range(len(self.answers)))
        for place, count in _counted(self.places):
            yield f"edited at  {place}" + (f" ({count} requests)" if count < len(self.places) else "")
        yield f"edited     {self.edited} of {len(self.answers)} requests; {right} now say their target"
        yield ""
        rows = [("", "question", "target", *_STATES, "retained")]
        for index, request in enumerate(self.delta.requests[:_SHOWN]):
            said = (
                self.answers[index]
                if request["status"] in (editing.EDITED, editing.NOT_GENERATED)
                else (self.answers[index][0], request["status"])
            )
            row = (str(index), request["question"], request["target"], *said)
            rows.append((*row, *[""] * (6 - len(row)), _share(self.shares[index])))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        yield from (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        if len(self.answers) > _SHOWN:
            yield f"and {len(self.answers) - _SHOWN} more, in the report"

    def _says_target(self, index: int) -> bool:
        return self.answers[index][1] == str(self.delta.requests[index]["target"]).strip()

    def _all_shifts(self) -> tuple[workflow.TraceShift | None, ...]:
        return self.shifts or (None,) * len(self.answers)


def _counted(places: Sequence[Place]) -> list[tuple[str, int]]:
    """Places in words and how many requests have them; the reason where all have the same."""
    alike = len(set(places)) == 1
    words = [str(place) if alike else str(place).partition(":")[0] for place in places]
    return sorted(((each, words.count(each)) for each in set(words)), key=lambda pair: -pair[1])


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


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
    traces: tuple[tracing.CausalTrace, ...] | tracing.AverageTrace | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Made:
    """The change, and how its place was found."""

    delta: editing.Delta
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()
    shifts: tuple[workflow.TraceShift | None, ...] = field(default=())


@app.default
def run(options: Edit = Edit()) -> int:
    """Edit, write the edit (and the model), print the answers before, with the edit and after undo."""
    plan = _check(options)
    vlm = options.open_model()
    requests = [each.make(vlm) for each in plan.asked]
    moments = options.open_moments(vlm)
    made = (
        _traced(vlm, requests, plan, options, moments)
        if plan.place is None
        else (_placed(vlm, requests, plan.place, options, moments))
    )
    outcome = _outcome(vlm, requests, made, options)
    if options.dry_run:
        print(*outcome.lines(), "", "nothing is written: this was a dry run", sep="\n")
        return 0
    with new_files(options.out) as folder:
        made.delta.save(folder / EDIT)
        artefacts.write_json(folder / REPORT, _LAYOUT, outcome.as_json())
    if options.checkpoint is not None:
        shutil.rmtree(options.checkpoint, ignore_errors=True)
    if options.save_model is not None:  # after the edit is whole in its folder, in case there is no room for a model
        with made.delta.applied(vlm):
            vlm.save_pretrained(options.save_model)
    print(*outcome.lines(), sep="\n")
    written = [*(options.out / name for name in FILES), *([options.save_model] if options.save_model else [])]
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
    vlm: models.VisionLanguageModel,
    requests: Sequence[data.EditRequest],
    place: Place,
    settings: Edit,
    moments: editing.Moments | None,
) -> _Made:
    """Edit all requests at the place of --where."""
    try:
        layer = vlm.layer_index(place.layer)
    except models.ModelError as error:
        raise CommandError(f"cannot edit at --where {settings.where}: {error}") from error
    for request in requests:
        asked = vlm.prompt_for(request.question).with_answer(request.target)
        values.key_positions(asked, place.token)  # says what is wrong with the token before any work
    editor = make_editor(settings, layer=layer, token=place.token, spread=place.spread)
    delta = editor.edit(vlm, requests, moments=moments, checkpoint=settings.checkpoint, progress=True)
    spread = editor.spread if editor.spread > 1 else None
    found = Place(layer=layer, token=place.token, reason=place.reason, spread=spread)
    return _Made(delta=delta, places=(found,) * len(requests))


def _traced(
    vlm: models.VisionLanguageModel,
    requests: Sequence[data.EditRequest],
    plan: _Plan,
    settings: Edit,
    moments: editing.Moments | None,
) -> _Made:
    """Edit all requests at the places that traces find."""
    found = workflow.locate_then_edit(
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
        checkpoint=settings.checkpoint,
        progress=True,
    )
    places = tuple(map(place_of, found.edit_sites))
    return _Made(delta=found.deltas[0], places=places, notes=found.notes, shifts=found.shifts)


def _editor_at(settings: Edit, *, layer: int, token: str | int) -> editing.ClosedFormEditor:
    return make_editor(settings, layer=layer, token=token)


def _outcome(
    vlm: models.VisionLanguageModel, requests: Sequence[data.EditRequest], made: _Made, settings: Edit
) -> EditOutcome:
    """The answers in each state of the model, which ends as it began, and what else is reported."""
    delta, prompts = made.delta, [vlm.prompt_for(request.question) for request in requests]
    words: dict[str, Any] = {
        "progress": len(prompts) > _QUIET,
        "max_new_tokens": max(16, editing.room_for_targets(vlm, requests)),
    }
    before = vlm.answers(prompts, **words)
    with delta.applied(vlm):
        edited = vlm.answers(prompts, **words)
    after = vlm.answers(prompts, **words)
    found = None
    if settings.dry_run:
        tokens = [place.token for place in made.places]
        found = editing.preview(vlm, requests, delta, tokens=tokens)
    return EditOutcome(
        delta=delta,
        places=made.places,
        notes=made.notes,
        shifts=made.shifts,
        answers=tuple(zip(before, edited, after, strict=True)),
        shares=delta.shares(delta.retained(vlm)),
        is_undone=vlm.fingerprint(delta.changes) == delta.fingerprints,
        sizes=evaluation.sizes(vlm, delta),
        preview=found,
    )
