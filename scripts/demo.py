"""Trace outdated facts of the embedded model, edit them, verify the edits and undo them, and write a report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import App, Parameter
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from .. import data, editing, models, tracing, workflow
from ..data.facts import (
    EDITED,
    OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
)
from .options import CommandError, GeneralOptions, check_files, new_files

if TYPE_CHECKING:
    from ..data import EditCase, EditRecord, Question
    from ..editing.evaluation import VerifiedAnswer

EXAMPLE = """examples:
  multrace demo                                ten outdated facts, into out/demo
  multrace demo --seed 3 --out out/demo3       other facts
  multrace demo --limit 20 --every-layer       twenty facts, edited at the traced layer and at all others

The command writes OUT/report.html, the average trace as OUT/trace.safetensors, its pictures, and one file per edit.
"""
TWO_CONSTRAINTS = "two_constraints"
"""Other questions about the same picture that have a second constraint in the text."""
PROBES: Mapping[str, tuple[str, bool]] = {
    EDITED: ("the edited question and picture (efficacy)", True),
    OTHER_PICTURE: ("other pictures of the same entity (generality)", True),
    REPHRASE: ("other wordings (generality)", True),
    REPHRASE_OTHER_PICTURE: ("other wordings, other pictures (generality)", True),
    SAME_QUESTION_OTHER_PICTURE: ("other entities, same question (locality)", False),
    OTHER_QUESTION_SAME_PICTURE: ("other relations of the entity (locality)", False),
    TWO_CONSTRAINTS: ("two-constraint questions of the entity (locality)", False),
}
"""Kind of question -> (its name in the report, whether its answer should become the target)."""
SUMMARIES: Mapping[str, tuple[str, ...]] = {
    "efficacy": (EDITED,),
    "other pictures": (OTHER_PICTURE,),
    "other wordings": (REPHRASE, REPHRASE_OTHER_PICTURE),
    "other entities": (SAME_QUESTION_OTHER_PICTURE,),
    "other relations": (OTHER_QUESTION_SAME_PICTURE, TWO_CONSTRAINTS),
}
"""Column of the table of all layers -> the kinds of questions that it averages over."""
_FILES = ("report.html", "scores.png", "trace.png", "tokens.png", "trace.safetensors")
app = App(name="demo", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class Demo(GeneralOptions):
    """Options of `multrace demo`."""

    out: Annotated[Path, Parameter(help="folder for the report", metavar="DIR")] = Path("out/demo")
    seed: Annotated[int, Parameter(help="random seed of the choice and the order of the facts", metavar="N")] = 0
    limit: Annotated[int, Parameter(help="number of facts to edit, one at a time", metavar="N")] = 10
    every_layer: Annotated[
        bool,
        Parameter(
            help="also edit the same facts at every other layer, to show what locating is worth (takes minutes longer)"
        ),
    ] = False


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
    vlm, world = models.load(data.tiny_vlm_path()), data.World()
    cases = world.edit_cases("outdated", "report", options.seed)
    if not 1 <= options.limit <= len(cases):
        raise CommandError(
            f"--limit {options.limit}: there are {len(cases)} outdated facts to report on; pass 1 to {len(cases)}"
        )
    cases = cases[: options.limit]  # the first ones: none is picked by its result
    records = [edit_record(world, case) for case in cases]
    names = [*_FILES, *(_edit_file(number) for number in range(len(cases)))]
    check_files(options.out, names)
    corruptions = [tracing.SwapImage(_other_picture(world, case)) for case in cases]
    located = workflow.locate_then_edit(vlm, records, corruptions=corruptions, jointly=False, progress=True)
    tokens = tracing.causal_trace(vlm, vlm.prompt_for(records[0].question), corruption=corruptions[0])
    untouched = vlm.fingerprint(name for name, _ in vlm.named_parameters())
    pairs = list(zip(records, located.deltas, strict=True))
    probes = [verified(vlm, delta, record) for record, delta in tqdm(pairs, desc="verifying")]
    same = vlm.fingerprint(untouched) == untouched
    layers = _every_layer(vlm, records, located, probes) if options.every_layer else ""
    with new_files(options.out, stale=[_edit_file(None)]) as folder:
        report = _report(options, folder, located, tokens, probes, same)
        write_report(report, folder / "report.html")
        cast(tracing.AverageTrace, located.average).save(folder / "trace.safetensors")
        for number, delta in enumerate(cast(tuple[editing.Delta, ...], located.deltas)):
            delta.save(folder / _edit_file(number))
    return options.out / "report.html", _table(report) + layers


def _edit_file(number: int | None) -> str:
    """Return the name of the file of an edit, counted from 0; None returns the pattern of all of them."""
    return "edit_*.safetensors" if number is None else f"edit_{number + 1:02d}.safetensors"


def edit_record(world: data.World, case: EditCase, *, count: int = 8) -> EditRecord:
    """Return the record of a case, with at most `count` probes of each kind that the report shows."""
    (record,) = data.world_records(world, [case], requests=data.WorldRequests(count=count))
    return replace(record, probes=tuple(probe for probe in record.probes if probe.kind in PROBES))


@dataclass(frozen=True, kw_only=True)
class VerifiedQuestion:
    """A question of a record, and the answers to it in the three states of the model."""

    kind: str
    """Key of PROBES."""
    question: Question
    answers: VerifiedAnswer

    def is_right(self, state: str) -> bool:
        """Return whether the answer in this state ("unedited", "edited", "undone") is right after the edit."""
        return self.answers.is_right(state)


def verified(vlm: models.VisionLanguageModel, delta: editing.Delta, record: EditRecord) -> tuple[VerifiedQuestion, ...]:
    """Return the edited question and the probes of a record, answered before, with and after the edit."""
    questions = [record.question, *(probe.question for probe in record.probes)]
    return tuple(
        VerifiedQuestion(
            kind=TWO_CONSTRAINTS if answers.kind == OTHER_QUESTION_SAME_PICTURE and question.spans else answers.kind,
            question=question,
            answers=answers,
        )
        for question, answers in zip(questions, editing.verify(vlm, delta, [record]), strict=True)
    )


def answered_again(vlm: models.VisionLanguageModel, probes: Sequence[VerifiedQuestion]) -> tuple[VerifiedQuestion, ...]:
    """Return the same questions, with the present answers of the model (with another edit) as the edited answers."""
    answers = vlm.answers([vlm.prompt_for(probe.question) for probe in probes], batch_size=32)
    return tuple(
        replace(probe, answers=replace(probe.answers, edited=answer))
        for probe, answer in zip(probes, answers, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """Shares of right answers to one kind of question, 0 to 1, and the number of questions."""

    kind: str
    number: int
    unedited: float
    edited: float
    undone: float


def scores(probes: Sequence[VerifiedQuestion]) -> tuple[ProbeScore, ...]:
    """Return one score per kind of question, in the order of PROBES."""
    rows = []
    for kind in PROBES:
        chosen = [probe for probe in probes if probe.kind == kind]
        if chosen:
            shares = {
                state: sum(probe.is_right(state) for probe in chosen) / len(chosen)
                for state in ("unedited", "edited", "undone")
            }
            rows.append(ProbeScore(kind=kind, number=len(chosen), **shares))
    return tuple(rows)


def summary(probes: Sequence[VerifiedQuestion]) -> Mapping[str, float]:
    """Return name of SUMMARIES -> share of right answers with the edit, 0 to 1; NaN if there is no question.

    Questions whose answers should stay count only if the unedited model answered them correctly: an edit cannot keep
    what was not there.
    """
    shares = {}
    for name, kinds in SUMMARIES.items():
        moves = PROBES[kinds[0]][1]
        chosen = [probe for probe in probes if probe.kind in kinds and (moves or probe.is_right("unedited"))]
        right = sum(probe.is_right("edited") for probe in chosen)
        shares[name] = right / len(chosen) if chosen else float("nan")
    return shares


def _other_picture(world: data.World, case: EditCase) -> Image.Image:
    """Return a picture of the next entity of the kind whose answer has another first word, which the trace scores."""
    entity = world.entities[case.fact.entity]
    peers = world.of_kind(entity.kind)
    start = peers.index(entity) + 1
    first = case.fact.answer.split()[0]
    other = next(peer for peer in (*peers[start:], *peers[:start]) if peer.facts[case.fact.key].split()[0] != first)
    return world.picture(other, 0).image


def _report(
    options: Demo,
    folder: Path,
    located: workflow.LocatedEdit,
    tokens: tracing.CausalTrace,
    probes: Sequence[Sequence[VerifiedQuestion]],
    same: bool,
) -> Report:
    table = scores([probe for rows in probes for probe in rows])
    chart = plot_scores(table, folder / "scores.png")
    cast(tracing.AverageTrace, located.average).plot(folder / "trace.png")
    tokens.plot(folder / "tokens.png")
    plots = [
        (
            folder / "trace.png",
            f"Mean indirect effect over the {len(probes)} facts when the picture is swapped: hidden states one layer "
            "at a time, MLPs and attention three layers at a time.",
        ),
        (folder / "tokens.png", "The first fact, token by token; constraint tokens carry a star."),
    ]
    return Report(
        title="multrace: outdated facts, found and changed",
        subtitle=f"{len(probes)} outdated facts of the embedded model (seed {options.seed}), "
        "edited one at a time with MultEdit.",
        reason=f"Edited: the MLP of layer {located.edit_site.layer} at the token group {located.edit_site.token!r}, "
        f"because {located.edit_site.reason}.",
        undo="After undoing, every weight is bit for bit what it was."
        if same
        else "After undoing, some weights differ!",
        scores=table,
        chart=(chart, "Right answers of each kind of question, unedited, edited and undone."),
        plots=plots,
        facts=probes,
    )


def _table(report: Report) -> str:
    width = max(len(PROBES[score.kind][0]) for score in report.scores)
    lines = ["", *(_line(probes[0]) for probes in report.facts), f"\n{report.reason}\n"]
    lines += [f"{'right answers':{width}s}  questions  unedited  edited  undone"]
    lines += [
        f"{PROBES[score.kind][0]:{width}s}  {score.number:9d}  "
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
    vlm: models.VisionLanguageModel,
    records: Sequence[EditRecord],
    located: workflow.LocatedEdit,
    asked: Sequence[Sequence[VerifiedQuestion]],
) -> str:
    """Return a table of the results of editing the same facts at the same token in each layer.

    The questions are those of the verification, whose answers without the edit are known from there. So are the
    results at the layer that the trace chose.
    """
    width = 16
    lines = ["", "", f"{'edited layer':{width}s}" + "".join(f"{name:>{width}s}" for name in SUMMARIES)]
    for layer in tqdm(range(vlm.layers), desc="every layer"):
        label, probes = f"{layer} (the trace's)", [probe for rows in asked for probe in rows]
        if layer != located.edit_site.layer:
            label, editor = str(layer), editing.MultEdit(layer=layer, token=located.edit_site.token)
            probes = []
            for record, rows in zip(records, asked, strict=True):
                with editor.edit(vlm, [record]).applied(vlm):
                    probes += answered_again(vlm, rows)
        lines.append(f"{label:{width}s}" + "".join(f"{share:>{width}.1%}" for share in summary(probes).values()))
    return "\n".join([*lines, "other entities and relations: of the answers that were right before"])


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows, in plain texts, which are escaped when the page is made."""

    title: str
    subtitle: str
    reason: str
    """Why the trace chose the site."""
    undo: str
    """Whether undoing restored the weights."""
    scores: Sequence[ProbeScore]
    chart: tuple[Path, str]
    """The scores as a picture: (picture file, caption)."""
    plots: Sequence[tuple[Path, str]]
    """The traces as pictures: (picture file, caption)."""
    facts: Sequence[Sequence[VerifiedQuestion]]
    """The probes of every fact, the edited question first."""


def write_report(report: Report, path: Path) -> Path:
    """Write the page and return its path."""
    environment = Environment(
        loader=PackageLoader("multrace.scripts", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=report.title,
        subtitle=report.subtitle,
        reason=report.reason,
        undo=report.undo,
        scores=_score_rows(report.scores),
        chart=_figure(*report.chart),
        plots=[_figure(file, caption) for file, caption in report.plots],
        facts=[_fact(probes) for probes in report.facts],
    )
    path.write_text(page, encoding="utf-8")
    return path


def plot_scores(scores: Sequence[ProbeScore], path: Path) -> Path:
    """Draw the shares of right answers, unedited, edited and undone, for each kind of probe; return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.62 * len(scores) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = {"unedited": "#b8c0cc", "edited": "#2f6f4f", "undone": "#7c8797"}
    for offset, (state, colour) in enumerate(colours.items()):
        places = [row + (offset - 1) * 0.27 for row in range(len(scores))]
        shares = [getattr(score, state) for score in scores]
        bars = axes.barh(places, shares, height=0.25, color=colour, label=state)
        axes.bar_label(bars, labels=[f"{share:.0%}" for share in shares], padding=3, fontsize=8)
    axes.set_yticks(range(len(scores)), [PROBES[score.kind][0] for score in scores])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of answers that are right after the edit")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=150)
    return path


def _figure(file: Path, caption: str) -> Mapping[str, str]:
    return {"caption": caption, "source": _file_source(file)}


def _score_rows(scores: Sequence[ProbeScore]) -> list[Mapping[str, Any]]:
    locality = [score.kind for score in scores if not PROBES[score.kind][1]]
    return [
        {
            "label": PROBES[score.kind][0],
            "number": score.number,
            "starts_locality": locality[:1] == [score.kind],
            **{state: f"{getattr(score, state):.0%}" for state in ("unedited", "edited", "undone")},
        }
        for score in scores
    ]


def _fact(probes: Sequence[VerifiedQuestion]) -> Mapping[str, Any]:
    first, text, constraint = probes[0].answers, probes[0].question.text, str(probes[0].question.constraint)
    start = text.index(constraint)
    end = start + len(constraint)
    return {
        "picture": _image_source(probes[0].question),
        "before": text[:start],
        "constraint": text[start:end],
        "after": text[end:],
        "target": first.wanted,
        "unedited": first.unedited,
        "edited": first.edited,
        "is_right": first.is_right("edited"),
        "failures": sum(not probe.is_right("edited") for probe in probes[1:]),
        "probes": [_probe(probe) for probe in probes[1:]],
    }


def _probe(probe: VerifiedQuestion) -> Mapping[str, Any]:
    return {
        "picture": _image_source(probe.question),
        "question": probe.question.text,
        "kind": PROBES[probe.kind][0],
        "answer": probe.answers.wanted,
        "unedited": probe.answers.unedited,
        "edited": probe.answers.edited,
        "is_right": probe.is_right("edited"),
    }


def _image_source(question: Question) -> str:
    buffer = io.BytesIO()
    cast(Image.Image, question.images[0]).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _file_source(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
