"""Trace facts that a model states wrongly, edit them, verify the edits and undo them, and write a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from cyclopts import App, Parameter
from tqdm import tqdm

from .. import tracing, workflow
from ..editing import solve
from . import demos
from .fetch_smollm2 import CacheOptions
from .options import CommandError, check_files, new_files

if TYPE_CHECKING:
    from .demos import Report, ReportedFact, VerifiedQuestion, WrongFacts

EXAMPLE = """examples:
  multrace demo                                ten outdated facts of the embedded model, into out/demo
  multrace demo --world flags                  ten real errors of a model that reads flags, into out/demo-real
  multrace demo --seed 3 --out out/demo3       other facts
  multrace demo --limit 20 --every-layer       twenty facts, edited at the traced layer and at all others

The model that reads flags is made in the cache if it is not there, as by multrace build-flags.

The command writes OUT/report.html, the average trace as OUT/trace.safetensors, pictures of the traces, and one file per
edit.
"""
EMBEDDED, FLAGS = "embedded", "flags"
FOLDERS = {EMBEDDED: Path("out/demo"), FLAGS: Path("out/demo-real")}
"""The world -> the default folder of its report."""
_FILES = ("report.html", "scores.png", "trace.png", "tokens.png", "trace.safetensors")
_EDIT, _TRACE = "edit_{}.safetensors", "trace_{}.png"
"""The names of the files of one fact, without its number."""
app = App(name="demo", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class Demo(CacheOptions):
    """Options of `multrace demo`."""

    world: Annotated[
        str,
        Parameter(
            help="whose facts to edit: those of the embedded model, or of a model that reads flags, over a language "
            "model that nobody here trained",
            choices=tuple(FOLDERS),
        ),
    ] = EMBEDDED
    model: Annotated[
        Path | None,
        Parameter(
            help="folder of another model that reads flags, which is asked for its errors (with --world flags)",
            metavar="DIR",
        ),
    ] = None
    out: Annotated[
        Path | None,
        Parameter(help="folder for the report (default: out/demo, or out/demo-real for flags)", metavar="DIR"),
    ] = None
    seed: Annotated[int, Parameter(help="random seed of the choice and the order of the facts", metavar="N")] = 0
    limit: Annotated[int, Parameter(help="number of facts to edit, one at a time", metavar="N")] = 10
    every_layer: Annotated[
        bool,
        Parameter(
            help="also edit the same facts at every other layer, to show what locating is worth (takes minutes longer)"
        ),
    ] = False

    @property
    def folder(self) -> Path:
        """The folder for the report."""
        return self.out or FOLDERS[self.world]

    def check(self) -> None:
        """Raise `CommandError` for options of the other world, and if the folder cannot be written."""
        for name in ("model", "cache", "wheel"):
            if self.world != FLAGS and getattr(self, name) is not None:
                raise CommandError(f"--{name} is for the model that reads flags; pass --world flags, too")
        names = [name for number in range(self.limit) for name in (_name(_EDIT, number), _name(_TRACE, number))]
        check_files(self.folder, [*_FILES, *names])


@app.default
def run(options: Demo = Demo()) -> int:
    """Run the demo and print its table."""
    page, table = demo(options)
    print(table)
    print(f"\nreport: {page}")
    return 0


def demo(options: Demo) -> tuple[Path, str]:
    """Return the path of the HTML report and the table as text; write the report, PNGs, the trace and all edits.

    Raises `CommandError`, before any work, if there are not that many facts or the folder cannot be written.
    """
    options.check()
    facts = _wrong_facts(options)
    vlm, corruptions = facts.vlm, facts.corruptions
    located = workflow.locate_then_edit(
        vlm, facts.records, corruptions=corruptions, editor=facts.editor, jointly=False, progress=True
    )
    shown = next(number for number, trace in enumerate(located.traces) if trace is not None)
    tokens = tracing.causal_trace(vlm, vlm.prompt_for(facts.records[shown].question), corruption=corruptions[shown])
    untouched = vlm.fingerprint(name for name, _ in vlm.named_parameters())
    edits = {number: delta for number, delta in enumerate(located.deltas) if delta is not None}
    probes = {
        number: demos.verified(vlm, delta, facts.records[number], facts.marking)
        for number, delta in tqdm(edits.items(), desc="verifying")
    }
    same = vlm.fingerprint(untouched) == untouched
    layers = _every_layer(facts, located, probes) if options.every_layer else ""
    stale = [_EDIT.format("*"), _TRACE.format("*")]
    with new_files(options.folder, stale=stale) as folder:
        report = _report(facts, folder, located, tokens, probes, same)
        demos.write_report(report, folder / "report.html")
        cast(tracing.AverageTrace, located.average).save(folder / "trace.safetensors")
        for number, delta in edits.items():
            delta.save(folder / _name(_EDIT, number))
    return options.folder / "report.html", _table(report) + layers


def _name(pattern: str, number: int) -> str:
    """Return the name of a file of a fact, which is counted from 0 here and from 1 in names."""
    return pattern.format(f"{number + 1:02d}")


def _wrong_facts(options: Demo) -> WrongFacts:
    if options.world == FLAGS:
        places = {"model": options.model, "cache": options.cache, "wheel": options.wheel}
        return demos.flag_facts(limit=options.limit, seed=options.seed, **places)
    return demos.embedded_facts(limit=options.limit, seed=options.seed)


def _report(
    facts: WrongFacts,
    folder: Path,
    located: workflow.LocatedEdit,
    tokens: tracing.CausalTrace,
    probes: dict[int, Sequence[VerifiedQuestion]],
    same: bool,
) -> Report:
    table = demos.scores([probe for rows in probes.values() for probe in rows])
    chart = demos.plot_scores(table, folder / "scores.png")
    cast(tracing.AverageTrace, located.average).plot(folder / "trace.png")
    tokens.plot(folder / "tokens.png")
    plots = [
        (
            folder / "trace.png",
            f"Mean indirect effect over the {len(probes)} facts when the picture is swapped: hidden states one layer "
            "at a time, MLPs and attention three layers at a time.",
        ),
        (folder / "tokens.png", "One fact, token by token; constraint tokens carry a star."),
    ]
    return demos.Report(
        title=facts.title,
        subtitle=f"{len(probes)} {facts.description}, edited one at a time with MultEdit.",
        reason=f"Edited: the MLP of layer {located.edit_site.layer} at the token group {located.edit_site.token!r}, "
        f"because {located.edit_site.reason}.",
        undo="After undoing, every weight is bit for bit what it was."
        if same
        else "After undoing, some weights differ!",
        rule=facts.marking.rule,
        notes=located.notes,
        scores=table,
        chart=(chart, "Right answers of each kind of question, unedited, edited and undone."),
        plots=plots,
        facts=[_reported(folder, number, located, rows) for number, rows in probes.items()],
    )


def _reported(
    folder: Path, number: int, located: workflow.LocatedEdit, probes: Sequence[VerifiedQuestion]
) -> ReportedFact:
    """Return an edited fact with the picture of its trace, if it has one."""
    trace, delta = located.traces[number], located.deltas[number]
    leak = "" if delta is None else solve.leak_in_words(delta.requests[0])
    if trace is None:
        return demos.ReportedFact(probes=probes, leak=leak)
    path = folder / _name(_TRACE, number)
    trace.plot(path)
    caption = (
        f"Where {trace.answer!r} comes from: its probability is {trace.clean:.3f} with this picture and "
        f"{float(trace.corrupted.mean()):.3f} with another one, and rises again where states are restored."
    )
    return demos.ReportedFact(probes=probes, leak=leak, trace=(path, caption))


def _table(report: Report) -> str:
    labels = {score.kind: demos.PROBES[score.kind][0] for score in report.scores}
    width = max(map(len, labels.values()))
    lines = ["", *(_line(fact.probes[0]) for fact in report.facts), f"\n{report.reason}\n", *report.notes]
    lines += [f"{'right answers':{width}s}  questions  unedited  edited  undone"]
    lines += [
        f"{labels[score.kind]:{width}s}  {score.number:9d}  "
        f"{score.unedited:8.0%}  {score.edited:6.0%}  {score.undone:6.0%}"
        for score in report.scores
    ]
    return "\n".join([*lines, report.undo])


def _line(probe: VerifiedQuestion) -> str:
    """Return one edited question with its old answer, the target and its new answer."""
    verdict, answers = "" if probe.is_right("edited") else "  FAILED", probe.answers
    return (
        f"{answers.question}  it said {answers.unedited!r}, should say {answers.wanted!r}, "
        f"now says {answers.edited!r}{verdict}"
    )


def _every_layer(
    facts: WrongFacts, located: workflow.LocatedEdit, verified: dict[int, Sequence[VerifiedQuestion]]
) -> str:
    """Return a table of the results of editing the same facts at the same token in each layer.

    The questions are those of the verification, whose answers without the edit are known from there. So are the
    results at the layer that the trace chose.
    """
    width, vlm = 16, facts.vlm
    columns = demos.summary([probe for rows in verified.values() for probe in rows])
    lines = ["", "", f"{'edited layer':{width}s}" + "".join(f"{name:>{width}s}" for name in columns)]
    for layer in tqdm(range(vlm.layers), desc="every layer"):
        label, probes = f"{layer} (the trace's)", [probe for rows in verified.values() for probe in rows]
        if layer != located.edit_site.layer:
            label, editor = str(layer), facts.editor(layer=layer, token=located.edit_site.token)
            probes = []
            for number, rows in verified.items():
                with editor.edit(vlm, [facts.records[number]]).applied(vlm):
                    probes += demos.answered_again(vlm, rows)
        lines.append(f"{label:{width}s}" + "".join(f"{share:>{width}.1%}" for share in demos.summary(probes).values()))
    return "\n".join([*lines, "other entities and relations: of the answers that were right before"])
