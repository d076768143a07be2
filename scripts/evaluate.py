"""Make edits, ask the model about the edited facts and about others, and compare with the unedited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

from cyclopts import App, Parameter

from .. import data, editing, tracing, workflow
from .edit import TRACE
from .edit_options import (
    NAMES,
    ComparedEditorOptions,
    check_place,
    editor as editor_of,
    parse_place,
    read_cloze,
    read_general,
    read_texts,
)
from .options import EDITORS, GRADIENT_EDITORS, SEQUENCE_LENGTHS, SPLITS, CommandError, RunOptions, print_report

EXAMPLE = """examples:
  multrace evaluate --model DIR --data records.jsonl --editor multedit ft --where 5:last --out out/eval
          each edit of the file on its own, by two editors
  multrace evaluate --data records.jsonl --where 5:last --shard 1/8 --out out/eval_array
          the first of eight parts, for a job array
  multrace evaluate --world outdated --limit 20 --where 5:last --general world:200 --out out/general
          outdated facts of the built-in world, and what becomes of 200 facts that no edit is about
  multrace evaluate --world outdated --limit 20 --where trace --out out/traced
          each edit at the layer and token that its own trace names
  multrace evaluate --world outdated --limit 100 --mode sequence --where 5:last --out out/sequence
          each edit on top of the earlier ones, measured after 1, 10, 20, 30 and 100
  multrace evaluate --data counterfact.json --mode sequence --per-step 100 --perplexity 32 --cloze facts.jsonl \\
                    --where 5:last --out out/steps
          a hundred edits per step, and what becomes of the model's own texts and of facts that no edit touches

OUT/EDITOR is the folder of a run: records/ID-.../evaluation.json is the report on one record, and summary/ holds
evaluation.json (to be read by multrace.editing.EditReport.load), generations.jsonl (every question with both raw
answers), table.txt and rows.parquet (one row per record); for sequences also curve.json and curve.png. The same command
again continues an interrupted run, and records that fail are kept with their errors. In the modes single and batch,
--shard and torchrun divide the records among processes. A batch keeps its one edit in shared/, and a sequence keeps
each edit with its record. With --where trace the traces are kept, too. docs/formats.md describes the file of --data,
and docs/runs.md the folder.
The exit code is 0 if every record is done, 1 if a record failed or could not be read, and 2 for bad input.
"""
app = App(name="evaluate", help=__doc__, help_epilogue=EXAMPLE)
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")
_WORLD = "world"
_NAMED = 3
"""Maximum number of pairs of rows that a note names."""
_OF_WORLD = ("part", "probes", "contexts", "by_name", "keep")
_OF_DATA = ("format", "images", "template")
_OF_SEQUENCE = ("at", "per_step", "growth", "stop")


@dataclass(frozen=True, kw_only=True)
class Evaluate(RunOptions, ComparedEditorOptions):
    """Options of `multrace evaluate`."""

    world: Annotated[
        str | None,
        Parameter(
            help="edits of the built-in world, needed unless there is --data: outdated facts, which the embedded model "
            "learned with another answer, or long_tail facts, which it never saw",
            choices=SPLITS,
        ),
    ] = None
    part: Annotated[
        str,
        Parameter(
            help="half of the edits of --world: choose (to choose settings on) or report (to report results on)",
            choices=("choose", "report"),
        ),
    ] = "choose"
    probes: Annotated[int, Parameter(help="number of probes of each kind for each edit of --world", metavar="N")] = 8
    contexts: Annotated[
        int, Parameter(help="number of other pictures of the entity that each edit of --world is given", metavar="N")
    ] = 0
    by_name: Annotated[
        bool, Parameter(help="each edit of --world also rewrites the question by name, without a picture")
    ] = False
    keep: Annotated[
        int, Parameter(help="number of other entities whose answers each edit of --world has to keep", metavar="N")
    ] = 0
    template: Annotated[
        str | None,
        Parameter(
            help="template of the prompts of --data that name none: raw for the question alone, or a text with "
            "{question}, such as '\\n{question}' for a model that continues texts (default: the model's own)",
            metavar="TEXT",
        ),
    ] = None
    # pyrefly: ignore[bad-override] -- this command takes several editors
    editor: Annotated[
        tuple[str, ...], Parameter(help="one or more editors to compare", choices=NAMES, metavar="NAME")
    ] = ("multedit",)
    where: Annotated[
        str,
        Parameter(
            help="place to edit: LAYER (at the last token), LAYER:TOKEN, FIRST-LAST:TOKEN (layers that share the "
            "change), or 'trace': where a trace of the question of each edit locates the answer; the trace puts the "
            "picture of another record in place of its own (of the nearest earlier one with the same question; with "
            "--world, of another entity of the same kind); a batch has one place, from the mean of the traces",
            metavar="PLACE",
        ),
    ]
    mode: Annotated[
        str,
        Parameter(
            help="single: each edit on its own; batch: all edits at once; sequence: each edit on top of the earlier "
            "ones",
            choices=MODES,
        ),
    ] = SINGLE
    at: Annotated[
        tuple[int, ...],
        Parameter(
            help="sequence: numbers of edits after which to measure; the end of the sequence is always measured",
            metavar="N",
        ),
    ] = SEQUENCE_LENGTHS
    per_step: Annotated[
        int, Parameter(help="sequence: number of edits that are made together in one step", metavar="N")
    ] = 1
    growth: Annotated[
        float,
        Parameter(help="sequence: warn once the norm of an edited weight has grown by this share", metavar="SHARE"),
    ] = 0.1
    stop: Annotated[
        bool, Parameter(help="sequence: end the sequence when the norm has grown by --growth, instead of warning only")
    ] = False
    general: Annotated[
        str | None,
        Parameter(
            help="held-out questions to ask with and without each edit: a file with image, question and answer per "
            "line; or, with --world, 'world' or 'world:N' for all or N facts that no edit is about (default: none)",
            metavar="FILE",
        ),
    ] = None
    perplexity: Annotated[
        int,
        Parameter(
            help="number of texts that the unedited model samples, whose perplexity is measured before and after; 0 "
            "for none",
            metavar="N",
        ),
    ] = 0
    texts: Annotated[
        Path | None,
        Parameter(help="file of texts whose perplexity is measured too, one per line (default: none)", metavar="FILE"),
    ] = None
    cloze: Annotated[
        Path | None,
        Parameter(
            help="facts that no edit touches, which are asked in every mode if the unedited model knows them: a file "
            "with question and answer per line, or of records that are not edited (default: none)",
            metavar="FILE",
        ),
    ] = None
    free_only: Annotated[
        bool, Parameter(help="measure free generation only, without teacher forcing, which about halves the time")
    ] = False
    max_new_tokens: Annotated[
        int, Parameter(help="maximum number of tokens of an answer, which ends where the model ends it", metavar="N")
    ] = 32
    fluency_tokens: Annotated[
        int, Parameter(help="length in tokens of the answers whose fluency is measured; 0 skips fluency", metavar="N")
    ] = 0
    batch_size: Annotated[int, Parameter(help="number of questions answered together", metavar="N")] = 32
    seed: Annotated[int, Parameter(help="random seed of the bootstrap and of sampled texts", metavar="N")] = 0
    out: Annotated[Path, Parameter(help="folder for the results", metavar="DIR")] = Path("out/eval")

    @property
    def measured(self) -> editing.EvaluationSettings:
        """The settings of the measurement. Raises `EditError` for numbers out of range."""
        return editing.EvaluationSettings(
            forced=not self.free_only,
            max_new_tokens=self.max_new_tokens,
            fluency_tokens=self.fluency_tokens,
            perplexity_texts=self.perplexity,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raises `CommandError` or `EditError` for options that do not fit together or numbers out of range."""
        if (self.data is None) == (self.world is None):
            raise CommandError("pass either --data FILE or --world outdated (or long_tail)")
        self.check_run()
        if self.mode == SEQUENCE and (given := self.given(("shard", "retry_failed"))):
            raise CommandError(
                f"{given[0]} belongs to the modes single and batch, because each edit of a sequence needs all earlier "
                "ones; leave it out"
            )
        for name, least in (("probes", 1), ("contexts", 0), ("keep", 0)):
            if getattr(self, name) < least:
                raise CommandError(f"--{name} is {getattr(self, name)}; pass at least {least}")
        if min(self.at) < 1:
            raise CommandError(f"--at is {min(self.at)}; pass numbers of edits, at least 1")
        if self.per_step < 1:
            raise CommandError(f"--per-step is {self.per_step}; pass at least 1")
        if self.mode == SEQUENCE and self.general is not None:
            raise CommandError("--general belongs to the modes single and batch; leave it out of a sequence")
        others = (
            (self.world is None, _OF_WORLD, "--world; with --data, write it into each record"),
            (self.data is None, _OF_DATA, "--data FILE"),
            (self.mode != SEQUENCE, _OF_SEQUENCE, f"--mode {SEQUENCE}"),
        )
        for is_other, names, meaning in others:
            if is_other and (given := self.given(names)):
                raise CommandError(f"{given[0]} belongs to {meaning}")
        self.measured  # noqa: B018  raises for numbers out of range


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """The records, and what else is known before the model is opened."""

    rows: tuple[tuple[int, Any], ...]
    """Row number and record, or the error of a row that cannot be read."""
    place: workflow.Place | None
    """The place of --where; None for the place that traces find."""
    corruptions: Mapping[str, tracing.Corruption]
    """Key of a question -> what a trace puts in place of its picture; empty if there is a place."""
    general: tuple[data.Question, ...] = ()
    texts: tuple[str, ...] = ()
    cloze: tuple[data.Question, ...] = ()


@app.default
def run(options: Evaluate) -> int:
    """Evaluate the edits of each editor in a folder of its own, and print a table for each."""
    options.check()
    place = None if options.where == TRACE else parse_place(options.where)
    options.check_moments({name: _editor(options, name, place) for name in options.editor})
    plan = _plan(options, place)
    codes = []
    for name in options.editor:
        print(f"{name}, {options.mode}")
        analysis, out = _analysis(options, plan, name), options.out / name
        codes.append(print_report(workflow.run(options.model_to_load(), analysis, plan.rows, out, **options.share)))
        if (cost := workflow.read_cost(out)) is not None:
            print(f"measured here: {cost}")
    return max(codes)


def _analysis(options: Evaluate, plan: _Plan, name: str) -> workflow.Analysis:
    """Return the analysis of the records with the editor of this name."""
    given: dict[str, Any] = {
        "editor": _editor(options, name, plan.place),
        "moments": options.moments_file,
        "general": plan.general,
        "texts": plan.texts,
        "cloze": plan.cloze,
        "evaluation": options.measured,
        "batch_size": options.batch_size,
        "trace": workflow.PlaceTrace(corruptions=plan.corruptions) if plan.place is None else None,
    }
    if options.mode == SEQUENCE:
        way = {"at": options.at, "per_step": options.per_step, "growth": options.growth, "stop": options.stop}
        return workflow.EvaluateSequenceRun(**given, **way)
    return (workflow.EvaluateBatchRun if options.mode == BATCH else workflow.EvaluateRun)(**given)


def _editor(options: Evaluate, name: str, place: workflow.Place | None) -> Any:
    """Return the editor at a place; without one it gets a place that a trace will replace."""
    if place is None:
        check_place(name)
    at = {"layer": -1, "token": "last", "spread": options.spread if name in (*EDITORS, *GRADIENT_EDITORS) else None}
    if place is not None:
        spread = options.spread if place.spread is None else place.spread
        at = {"layer": place.layer, "token": place.token, "spread": spread}
    return editor_of(name, **at, preset=options.preset, **options.settings())


def _plan(options: Evaluate, place: workflow.Place | None) -> _Plan:
    """Return the records with what they need; every error that can be found without the model is raised here."""
    kind, _, count = (options.general or "").partition(":")
    if kind == _WORLD and (options.world is None or (count and not count.isdecimal())):
        raise CommandError(f"--general {options.general}: write world or world:100, together with --world")
    general = () if options.general is None or kind == _WORLD else read_general(Path(options.general))
    extra = {
        "texts": () if options.texts is None else read_texts(options.texts),
        "cloze": () if options.cloze is None else read_cloze(options.cloze),
    }
    if options.world is not None:
        facts = (int(count) if count else None) if kind == _WORLD else 0
        return replace(_of_world(options, place, general, facts), **extra)
    assert options.data is not None, "a check before says that there is a file"
    rows = tuple(data.read_data(options.data, format=options.format, images=options.images))
    if options.template is not None:
        template = options.template.replace("\\n", "\n")  # a line end is hard to type in a shell
        rows = tuple(
            (row, data.with_template(each, template) if isinstance(each, data.EditRecord) else each)
            for row, each in rows
        )
    if place is None:  # from all records of the file, so that a limit or a shard changes no trace
        edits = [record for _, record in rows if isinstance(record, data.EditRecord)]
        corruptions = workflow.other_pictures(edits)
    else:
        corruptions = {}
    few = rows[: options.limit]
    _note_contradictions(options, few)
    return _Plan(rows=few, place=place, corruptions=corruptions, general=general, **extra)


def _note_contradictions(options: Evaluate, rows: Sequence[tuple[int, Any]]) -> None:
    """Print which rows give the same question different targets; in a batch such records fail."""
    if options.mode == BATCH:
        return
    targets: dict[str, tuple[int, str]] = {}
    pairs = []
    for row, record in rows:
        if not isinstance(record, data.EditRecord):
            continue
        with suppress(data.DataError):  # a picture that cannot be read: the run says so
            first, target = targets.setdefault(record.question.key, (row, record.target))
            if target != record.target:
                pairs.append(f"rows {first} and {row}")
    if pairs:
        named = ", ".join(pairs[:_NAMED]) + (f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else "")
        how = "each edit is made on its own" if options.mode == SINGLE else "the later edit replaces the earlier one"
        print(f"note: {named} give one question different targets; {how}")


def _of_world(
    options: Evaluate, place: workflow.Place | None, general: tuple[data.Question, ...], facts: int | None
) -> _Plan:
    """Return edits of the built-in world; a trace puts a picture of another entity of the kind in place of theirs."""
    world = data.World()
    cases = world.edit_cases(cast(str, options.world), options.part)[: options.limit]
    settings = data.WorldRequests(
        count=options.probes, contexts=options.contexts, by_name=options.by_name, keep=options.keep
    )
    records = data.world_records(world, cases, requests=settings)
    corruptions: dict[str, tracing.Corruption] = {}
    if place is None:
        for record, case in zip(records, cases, strict=True):
            corruptions[record.question.key] = tracing.SwapImage(data.another_picture(world, case))
    general += data.untouched_facts(world, cases, facts)
    rows = tuple(enumerate(records, 1))
    return _Plan(rows=rows, place=place, corruptions=corruptions, general=general)
