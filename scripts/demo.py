"""Run `multrace demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from PIL import Image
from tqdm import tqdm

from ..data import EditRequest, World, tiny_vlm_path
from ..data.world import EditCase
from ..editing import Delta, MultEdit
from ..models import VisionLanguageModel, load
from ..tracing import AverageTrace, CausalTrace, SwapImage, causal_trace
from ..workflow.located_edit import LocatedEdit, locate_then_edit
from .errors import CommandError
from .options.demo import Demo
from .outputs import check_files, new_files
from .report import Report, plot_scores, write_report
from .verification import PROBES, SUMMARIES, ProbeAnswers, probe_records, scores, summary, verify

_FILES = ("report.html", "scores.png", "trace.png", "tokens.png", "trace.safetensors")


def run(settings: Demo) -> int:
    """Run the demo and print its table."""
    page, table = demo(settings)
    print(table)
    print(f"\nreport: {page}")
    return 0


def demo(settings: Demo) -> tuple[Path, str]:
    """Return (path of the HTML report, the table as text); writes the report, PNGs, the trace and one file per edit.

    CommandError for a number of facts that there is not, or a folder that cannot be written (before any work).
    """
    vlm, world = load(tiny_vlm_path()), World()
    cases = world.edit_cases("outdated", "report", settings.seed)
    if not 1 <= settings.limit <= len(cases):
        raise CommandError(
            f"--limit {settings.limit}: there are {len(cases)} outdated facts to report on; pass 1 to {len(cases)}"
        )
    cases = cases[: settings.limit]  # the first ones, no picking
    names = [*_FILES, *(_edit_file(number) for number in range(len(cases)))]
    check_files(settings.out, names)
    requests = [_request(world, case) for case in cases]
    corruptions = [SwapImage(_other_picture(world, case)) for case in cases]
    located = locate_then_edit(vlm, requests, corruptions=corruptions, jointly=False, progress=True)
    tokens = causal_trace(vlm, vlm.prompt_for(requests[0].question), corruption=corruptions[0])
    untouched = vlm.fingerprint(name for name, _ in vlm.named_parameters())
    pairs = list(zip(cases, located.deltas, strict=True))
    probes = [verify(vlm, delta, probe_records(world, case)) for case, delta in tqdm(pairs, desc="verifying")]
    same = vlm.fingerprint(untouched) == untouched
    layers = _every_layer(vlm, world, cases, located) if settings.every_layer else ""
    with new_files(settings.out, stale=[_edit_file(None)]) as folder:
        report = _report(settings, folder, located, tokens, probes, same)
        write_report(report, folder / "report.html")
        cast(AverageTrace, located.average).save(folder / "trace.safetensors")
        for number, delta in enumerate(cast(tuple[Delta, ...], located.deltas)):
            delta.save(folder / _edit_file(number))
    return settings.out / "report.html", _table(report) + layers


def _edit_file(number: int | None) -> str:
    """Return the name of an edit's file, counted from 0; None gives a pattern of all of them."""
    return "edit_*.safetensors" if number is None else f"edit_{number + 1:02d}.safetensors"


def _request(world: World, case: EditCase) -> EditRequest:
    record = world.question(case.fact)
    picture = world.picture(world.entities[case.fact.entity], 0).image
    return EditRequest(question=record.with_image(picture), target=case.target)


def _other_picture(world: World, case: EditCase) -> Image.Image:
    """A picture of the next entity of the kind whose answer has another first token, which the trace scores."""
    entity = world.entities[case.fact.entity]
    peers = world.of_kind(entity.kind)
    start = peers.index(entity) + 1
    first = case.fact.answer.split()[0]
    other = next(peer for peer in (*peers[start:], *peers[:start]) if peer.facts[case.fact.key].split()[0] != first)
    return world.picture(other, 0).image


def _report(
    settings: Demo,
    folder: Path,
    located: LocatedEdit,
    tokens: CausalTrace,
    probes: Sequence[Sequence[ProbeAnswers]],
    same: bool,
) -> Report:
    table = scores([probe for rows in probes for probe in rows])
    chart = plot_scores(table, folder / "scores.png")
    cast(AverageTrace, located.average).plot(folder / "trace.png")
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
        subtitle=f"{len(probes)} outdated facts of the embedded model (seed {settings.seed}), "
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


def _line(probe: ProbeAnswers) -> str:
    """One edited question with its old answer, the target and its new answer."""
    verdict = "" if probe.is_right("edited") else "  FAILED"
    return (
        f"{probe.record.text}  it said {probe.unedited!r}, should say {probe.record.answer!r}, "
        f"now says {probe.edited!r}{verdict}"
    )


def _every_layer(vlm: VisionLanguageModel, world: World, cases: Sequence[EditCase], located: LocatedEdit) -> str:
    """A table of the results of editing the same facts at the same token in each layer."""
    width = 16
    lines = ["", "", f"{'edited layer':{width}s}" + "".join(f"{name:>{width}s}" for name in SUMMARIES)]
    for layer in tqdm(range(vlm.layers), desc="every layer"):
        editor = MultEdit(layer=layer, token=located.edit_site.token)
        probes = [
            probe
            for case in cases
            for probe in verify(vlm, editor.edit(vlm, [_request(world, case)]), probe_records(world, case))
        ]
        label = f"{layer} (the trace's)" if layer == located.edit_site.layer else str(layer)
        lines.append(f"{label:{width}s}" + "".join(f"{share:>{width}.1%}" for share in summary(probes).values()))
    return "\n".join([*lines, "other entities and relations: of the answers that were right before"])
