"""Measure every editor and baseline on facts of the embedded model, and whether locating helps.

The settings were chosen on the "choose" halves of the edit splits of the world; this program measures on the "report"
halves. Each measured row is kept in OUT, so that an interrupted run continues.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from tqdm import tqdm

from ... import __version__, data
from ...artefacts import read_json, write_json, write_whole
from ...data import tiny_vlm_path
from ...editing.requests import FAILED, EditError
from ...models import VisionLanguageModel, load
from ...workflow.run_folder import differences
from ..main import execute
from ..options import SPLITS, STYLE, CommandError, GeneralOptions, check_files, paragraphs
from .rows import (
    AT,
    COLUMNS,
    Bench,
    EditorRow,
    by_onset,
    comparisons,
    editor_rows,
    make_bench,
    measure_editor,
    measure_grid,
    measure_sequence,
    sites_of,
)

EXAMPLE = """examples:
  python -m multrace.scripts.studies.results --out out/results                        everything (hours on one core)
  python -m multrace.scripts.studies.results --out out/results --limit 10             a quick look
  python -m multrace.scripts.studies.results --out out/results --parts editors --splits outdated

The program writes OUT/rows/*.json (one per measured row, which the next run uses again) and OUT/results.md.
"""
app = App(name="python -m multrace.scripts.studies.results", help=paragraphs(__doc__), help_epilogue=EXAMPLE, **STYLE)
LAYOUT = "multrace results row 1"
PARTS = ("editors", "batch", "sequence", "locating")


@dataclass(frozen=True, kw_only=True)
class Results(GeneralOptions):
    """Options of the study of editors."""

    out: Annotated[Path, Parameter(help="folder for the rows and the tables", metavar="DIR")]
    limit: Annotated[int, Parameter(help="number of requests of each split", metavar="N")] = 100
    together: Annotated[int, Parameter(help="number of edits of a sequence and of the largest batch", metavar="N")] = (
        160
    )
    probes: Annotated[int, Parameter(help="number of probes of each kind for each request", metavar="N")] = 4
    parts: Annotated[tuple[str, ...], Parameter(help=f"parts to measure: {', '.join(PARTS)}", metavar="PART")] = PARTS
    splits: Annotated[tuple[str, ...], Parameter(help=f"splits to measure: {', '.join(SPLITS)}", metavar="SPLIT")] = (
        SPLITS
    )

    def check(self) -> None:
        """Raises `CommandError` for unknown parts or splits, or numbers below 1."""
        for kind, names, known in (("parts", self.parts, PARTS), ("splits", self.splits, SPLITS)):
            if unknown := [name for name in names if name not in known]:
                raise CommandError(f"cannot measure --{kind} {unknown[0]}; pass some of {', '.join(known)}")
        for name in ("limit", "together", "probes"):
            if getattr(self, name) < 1:
                raise CommandError(f"--{name} is {getattr(self, name)}; pass at least 1")
        check_files(self.out, ("results.md",))

    def most(self, split: str) -> int:
        """Return the number of requests of the largest row of a split; those above `limit` must be in its half."""
        if not {"batch", "sequence"} & {*self.parts}:
            return self.limit
        return max(self.limit, min(self.together, len(data.World().edit_cases(split, "report"))))


@app.default
def run(options: Results) -> int:
    """Measure the rows that are missing, and write the tables of all rows."""
    options.check()
    vlm = load(tiny_vlm_path())
    identity = _identity(options, vlm)
    _refuse_other_rows(options, identity)
    for split in options.splits:
        bench: Bench | None = None
        todo = [(name, make) for name, make in _work(options, split) if not _file(options, split, name).is_file()]
        for name, measure in tqdm(todo, desc=f"{split}: rows", unit="row"):
            bench = bench or make_bench(vlm, split, "report", options.most(split), options.probes)
            try:
                found = measure(vlm, bench)
            except EditError as error:  # a row that cannot be measured, such as a batch that contradicts itself
                tqdm.write(f"{split} {name}: left out, {error}")
                continue
            write_json(_file(options, split, name), LAYOUT, {"run": identity, "row": found})
    rows = {split: _measured(options, split) for split in SPLITS}
    text = document(rows, **identity)
    target = write_whole(options.out / "results.md", text.encode())
    print(f"written: {target}")
    return 0


Measure = Callable[[VisionLanguageModel, Bench], Mapping[str, Any]]


def _work(settings: Results, split: str) -> Iterator[tuple[str, Measure]]:
    """Yield the name and the measurement of each chosen row."""
    few, parts = settings.limit, settings.parts
    if "editors" in parts or "batch" in parts:
        yield "sites", lambda vlm, bench: sites_of(vlm, bench.first(few))
    for row in editor_rows():
        if "editors" in parts:
            yield f"single {row.name}", _editor(row, few, together=False)
        if "batch" in parts and row.batches:
            yield f"batch {row.name}", _editor(row, few, together=True)
        if "batch" in parts and row.sequences and settings.most(split) > few:
            yield f"whole {row.name}", _editor(row, settings.most(split), together=True)
        if "sequence" in parts and row.sequences:
            yield f"sequence {row.name}", lambda vlm, bench, row=row: measure_sequence(vlm, bench, row)
    if "locating" in parts and split == "outdated":
        for token in ("last", "constraint_last"):
            for layer in range(8):
                yield (
                    f"grid {layer} {token}",
                    lambda vlm, bench, at=(layer, token): measure_grid(vlm, bench.first(few), *at),
                )


def _editor(row: EditorRow, number: int, *, together: bool) -> Measure:
    return lambda vlm, bench: measure_editor(vlm, bench.first(number), row, together=together)


def _file(settings: Results, split: str, name: str) -> Path:
    return settings.out / "rows" / f"{split} {name}.json"


def _identity(settings: Results, vlm: VisionLanguageModel) -> dict[str, Any]:
    """Return what all rows in a folder share: the weights, the version, and the numbers in the header of the page."""
    return {
        "weights": vlm.weights_digest(),
        "version": __version__,
        "limit": settings.limit,
        "together": settings.together,
        "probes": settings.probes,
    }


def _refuse_other_rows(settings: Results, identity: Mapping[str, Any]) -> None:
    """Raises `CommandError` if a row in the folder was measured with other numbers, another model or version."""
    for file in sorted((settings.out / "rows").glob("*.json")):
        if different := differences(read_json(file, LAYOUT)["run"], identity):
            raise CommandError(
                f"{str(file)!r} is a row of another run: {'; '.join(different)}; pass another folder as --out, or "
                "remove this file"
            )


def _measured(settings: Results, split: str) -> dict[str, Any]:
    """Return name -> measured row, for one split."""
    files = sorted((settings.out / "rows").glob(f"{split} *.json"))
    return {file.stem.removeprefix(f"{split} "): read_json(file, LAYOUT)["row"] for file in files}


_TITLES = {"outdated": "Outdated facts", "long_tail": "Long-tail facts"}
_ABOUT = {
    "outdated": "The model gives last year's answer; the target is this year's.",
    "long_tail": "Facts about entities that training never showed.",
}
LABELS = {
    "multedit-trace": "MultEdit, traced",
    "multedit-moments": "… with moments",
    "multedit-named": "… told by name",
    "multedit-bare": "… one picture",
    "multedit-5": "MultEdit, 5",
    "multedit-attention": "… attention",
    "multedit-early": "control: layer 0",
    "multedit-published-place": "control: layer 2",
    "multedit-paper": "MultEdit.paper()",
    "rome": "ROME, 5",
    "memit": "MEMIT, 4-6",
    "emmet": "EMMET, 5",
    "alphaedit": "AlphaEdit, 4-6",
    "ft": "FineTune",
    "ft-l": "… bounded",
    "ft-bf": "FineTune, breadth first",
    "lora": "LoRA",
    "lora-bf": "LoRA, breadth first",
    "in-context": "InContext",
}
"""Row -> its short name; the page explains each row."""
_CHANGES = ("efficacy", "other pictures", "other wordings", "both", "by name")
_CURVES = {
    "efficacy": "Efficacy after so many edits",
    "generality": "Generality after so many edits",
    "locality": "Locality after so many edits",
    "retention": "Share of earlier edits that are retained (*: the first edit is lost)",
    "growth": "Growth of the weight's norm, in percent",
}
_HEADER = """# Editing results

Made by `make results` (`--limit {limit} --together {together} --probes {probes}`) on the embedded model (weights
{weights:.12}, multrace {version}) and its own world of facts.
[CounterFact and zsRE in a real text model](results_real.md) are on a page of their own.
Settings were chosen on one half of each edit split and are reported on the other. Where that half has fewer facts
than needed (80 long-tail facts), the last ones of the first half follow, on which nothing was chosen.

## How to read the tables

All answers are **generated freely**, and all numbers are percentages, with 95 % bootstrap intervals over requests in
brackets.

- *efficacy*, *other pictures*, *other wordings*, *both* and *by name*: answers that equal the target letter by
  letter, to the edited question, with other pictures of the entity, in other words, with both changed, and without a
  picture but with the entity's name.
- *other entities* (same question, pictures of other things), *other relations* (other questions, same picture) and
  *unrelated*: answers that equal those of the unedited model. *Locality* of sequences is the share over all of these,
  and over the edited question asked without any picture.
- Each edit is given one picture and three more of the same entity (`contexts`); none of them is asked about.
- Where many edits are in the model at once, questions that should stay for one edit and that another one changes are
  left out.

| row | editor |
|---|---|
{legend}
"""


def document(rows: Mapping[str, Mapping[str, Any]], **identity: Any) -> str:
    """Return the page with all measured rows; identity: the weights, the version and the numbers of its header."""
    legend = "\n".join(f"| {LABELS[row.name]} | {row.text} |" for row in editor_rows())
    parts = [_HEADER.format(**identity, legend=legend)]
    for split, results in rows.items():
        parts += _split(split, results)
    return "\n".join(parts)


def _split(split: str, results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of the page about one split, with each heading once."""
    yield f"## {_TITLES[split]}\n\n{_ABOUT[split]}\n"
    for way, title in (
        ("single", "one edit at a time"),
        ("batch", "all edits in one solve"),
        ("whole", "all edits in one solve"),
    ):
        tables = list(_editors(results, way))
        if tables:
            number = max(row["requests"] for name, row in results.items() if name.startswith(f"{way} "))
            yield f"### {_TITLES[split]}: {number} requests, {title}\n"
            yield from tables
    curves = list(_curves(results))
    if curves:
        yield f"### {_TITLES[split]}: in sequence, each edit on top of the earlier ones\n"
        yield from curves
    yield from _locating(results, _TITLES[split])


def _editors(results: Mapping[str, Any], way: str) -> Iterator[str]:
    """Yield two tables: of answers that should change, and of answers that should stay."""
    measured = [(row, results[f"{way} {row.name}"]) for row in editor_rows() if f"{way} {row.name}" in results]
    if not measured:
        return
    shown = [column for column in COLUMNS if any(column in result["scores"] for _, result in measured)]
    for columns in ([each for each in shown if each in _CHANGES], [each for each in shown if each not in _CHANGES]):
        lines = ["| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        before = measured[0][1]["scores"]
        lines.append("| *unedited* | " + " | ".join(f"{100 * before[column][0]:.0f}" for column in columns) + " |")
        for row, result in measured:
            cells = [_cell(result["scores"][column]) if column in result["scores"] else "" for column in columns]
            failed = sum(status.startswith(FAILED) for status in result["statuses"].values())
            lines.append(f"| {LABELS[row.name]}{f' ({failed} failed)' if failed else ''} | " + " | ".join(cells) + " |")
        yield "\n".join(lines) + "\n"


def _cell(score: Sequence[float]) -> str:
    _, low, mean, high = (100 * value for value in score)
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def _curves(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of editors by number of edits for each measure."""
    rows = [(row, results[f"sequence {row.name}"]) for row in editor_rows() if f"sequence {row.name}" in results]
    if not rows:
        return
    last = {result["curve"][-1]["edits"] for _, result in rows}
    counts = sorted({point["edits"] for _, result in rows for point in result["curve"]} & {*AT, *last})
    for measure, title in _CURVES.items():
        lines = [
            f"{title}:\n",
            "| row | " + " | ".join(f"{count:.0f}" for count in counts) + " |",
            "|---" * (len(counts) + 1) + "|",
        ]
        for row, result in rows:
            points = {point["edits"]: point for point in result["curve"]}
            cells = [_point(points[count], measure) if count in points else "" for count in counts]
            lines.append(f"| {LABELS[row.name]} | " + " | ".join(cells) + " |")
        yield "\n".join(lines) + "\n"


def _point(point: Mapping[str, Any], measure: str) -> str:
    if measure == "growth":
        return f"{100 * point[measure]:.1f}"
    is_lost = measure == "retention" and point["first_holds"] == 0
    return f"{100 * point[measure]:.0f}{'*' if is_lost else ''}"


def _locating(found: Mapping[str, Any], title: str) -> list[str]:
    """Return the paired tests and the table of onsets if the whole grid is measured."""
    grid = {}
    for name, cells in found.items():
        if name.startswith("grid "):
            _, layer, token = name.split(" ")
            grid[int(layer), token] = cells
    if len(grid) < 16 or "sites" not in found:
        return []
    sites = found["sites"]["sites"]
    lines = [f"### {title}: does locating help?\n"]
    lines.append(
        "Each request edited at each layer and token with converged values, and scored by the mean of efficacy, "
        "generality (pictures and wordings) and locality. The trace is of the request's own question under the picture "
        f"of another entity. Paired over {len(sites)} requests; p is of a sign-flip permutation test.\n"
    )
    lines += ["| instead of the traced place | traced | instead | difference, 95 % | p |", "|---|---|---|---|---|"]
    for each in comparisons(sites, grid):
        traced, other, low, high = (100 * each[name] for name in ("traced", "other", "low", "high"))
        interval = f"[{low:+.1f}, {high:+.1f}]"
        lines.append(f"| {each['choice']} | {traced:.1f} | {other:.1f} | {interval} | {each['p']:.2g} |")
    lines += ["", "Edits at the traced token, by their layer's distance from the onset of the request's own trace:\n"]
    lines += ["| layers after the onset | edits | efficacy | generality | other entities unchanged | locality |"]
    lines += ["|---|---|---|---|---|---|"]
    for each in by_onset(sites, grid):
        shares = " | ".join(f"{100 * each[name]:.0f}" for name in ("efficacy", "generality", "entities", "locality"))
        lines.append(f"| {each['offset']:+d} | {each['edits']} | {shares} |")
    lines += ["", "The same edits by their place, whatever the traces say:\n", *_grid(grid)]
    return ["\n".join(lines) + "\n"]


def _grid(grid: Mapping[tuple[int, str], Any]) -> Iterator[str]:
    """Yield the table of means over all requests at each layer and token."""
    yield "| token | layer | efficacy | generality | other entities unchanged | locality |"
    yield "|---" * 6 + "|"
    for (layer, token), cells in sorted(grid.items(), key=lambda item: (item[0][1], item[0][0])):
        shares = " | ".join(f"{100 * sum(column) / len(cells):.0f}" for column in zip(*cells.values(), strict=True))
        yield f"| {token} | {layer} | {shares} |"


if __name__ == "__main__":
    sys.exit(execute(app, sys.argv[1:]))
