"""The measured rows as Markdown: docs/results.md."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .results_editors import AT, COLUMNS, editor_rows
from .results_locating import by_onset, comparisons

_TITLES = {
    "outdated": "Outdated facts: the model gives last year's answer, the target is this year's",
    "long_tail": "Long-tail facts: of entities that training never showed",
}
_HEADER = """# Editing results

Made by `multrace results --limit {number} --probes {probes}` on the embedded model and its own world of facts.
Settings were chosen on one half of each edit split and are reported here on the other; where that has fewer than are
asked for (80 long-tail facts), those go on that come last in the first half, on which nothing was chosen. Answers are
**free generation**: *efficacy*, *other pictures*, *other wordings*, *both* and *by name* are shares of answers that
equal the target letter by letter; *other entities* (same question, pictures of other things), *other relations* (other
questions, same picture) and *unrelated* are shares of answers that are what the unedited model says. In brackets: 95 %
bootstrap intervals over requests. Every edit is shown one picture and three more of the same entity (`contexts`), none
of which is asked about. Where many edits are in the model at once, questions that should stay for one of them and that
another one edits are left out. The *locality* of sequences is the share over all questions that should stay, the
edited one asked without any picture among them.
"""


def document(rows: Mapping[str, Mapping[str, Any]], *, number: int, probes: int) -> str:
    """The whole page, of whatever is measured, with so many requests and probes of each kind."""
    parts = [_HEADER.format(number=number, probes=probes)]
    for split, found in rows.items():
        for way, title in (
            ("single", "one edit at a time"),
            ("batch", "all edits in one solve"),
            ("whole", "all edits in one solve"),
        ):
            lines = list(_editors(found, way))
            if len(lines) > 2:
                number = max(row["requests"] for name, row in found.items() if name.startswith(f"{way} "))
                parts += [f"## {_TITLES[split]}\n\n{number} requests, {title}.\n", "\n".join(lines) + "\n"]
        curves = list(_curves(found))
        if curves:
            parts += [
                f"## {_TITLES[split]}\n\nIn sequence, each edit on top of the earlier ones.\n",
                "\n".join(curves) + "\n",
            ]
        parts += _locating(found)
    return "\n".join(parts)


def _editors(found: Mapping[str, Any], way: str) -> Iterator[str]:
    columns = list(COLUMNS)
    yield "| editor | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    first = True
    for row in editor_rows():
        measured = found.get(f"{way} {row.name}")
        if measured is None:
            continue
        scores = measured["scores"]
        if first:
            before = [f"{100 * scores[column][0]:.0f}" if column in scores else "" for column in columns]
            yield "| *unedited* | " + " | ".join(before) + " |"
            first = False
        cells = [_cell(scores[column]) if column in scores else "" for column in columns]
        failed = sum(status.startswith("failed") for status in measured["statuses"].values())
        yield f"| {row.text}{f' ({failed} failed)' if failed else ''} | " + " | ".join(cells) + " |"


def _cell(score: Sequence[float]) -> str:
    _, low, mean, high = (100 * value for value in score)
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def _curves(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [(row, found[f"sequence {row.name}"]) for row in editor_rows() if f"sequence {row.name}" in found]
    if not rows:
        return
    yield "| editor | edits | efficacy | generality | locality | of earlier edits kept | first kept | norm growth |"
    yield "|---" * 8 + "|"
    for row, measured in rows:
        for point in measured["curve"]:
            if point["edits"] not in (*AT, measured["curve"][-1]["edits"]):
                continue
            shares = " | ".join(
                f"{100 * point[name]:.0f}" for name in ("efficacy", "generality", "locality", "retained")
            )
            first = {None: "-", 0.0: "no", 1.0: "yes"}[point["first_retained"]]
            yield f"| {row.text} | {point['edits']:.0f} | {shares} | {first} | {100 * point['growth']:.1f} % |"


def _locating(found: Mapping[str, Any]) -> list[str]:
    """Paired tests and the onset table, where the whole grid is measured."""
    grid = {}
    for name, cells in found.items():
        if name.startswith("grid "):
            _, layer, token = name.split(" ")
            grid[int(layer), token] = cells
    if len(grid) < 16 or "sites" not in found:
        return []
    sites = found["sites"]["sites"]
    lines = ["## Does locating help?\n"]
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
    """Means over all requests at each layer and token."""
    yield "| token | layer | efficacy | generality | other entities unchanged | locality |"
    yield "|---" * 6 + "|"
    for (layer, token), cells in sorted(grid.items(), key=lambda item: (item[0][1], item[0][0])):
        shares = " | ".join(f"{100 * sum(column) / len(cells):.0f}" for column in zip(*cells.values(), strict=True))
        yield f"| {token} | {layer} | {shares} |"
