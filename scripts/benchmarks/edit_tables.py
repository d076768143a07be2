"""Rows of the editing benchmark in words, as a table, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .edit_rows import EditRow
from .tables import aligned, describe_machine

_HEAD = ("row", "seconds", "usual way", "ratio", "work", "usual way", "ratio", "difference")
_NOTE = (
    "Ratios are the usual way's cost over ours for the same result; the difference is that of the results, as a share "
    "of their size."
)


def describe_edit(row: EditRow) -> list[str]:
    """One row of the table, with everything that was measured."""
    lines = [
        row.label,
        f"  seconds       {_seconds(row.seconds)}; usual {_seconds(row.seconds_usual)}: {row.ratio_seconds:.1f}x",
        f"  {row.unit:<12}  {_work(row.work)}; usual {_work(row.work_usual)}: {row.ratio_work:.1f}x",
        f"  difference    {row.difference:.1e} of the result ({row.tolerance:.0e} would be refused)",
    ]
    return [*lines, *(f"  {name:<24} {_figure(value)}" for name, value in row.details.items())]


def edit_table(rows: Sequence[EditRow]) -> list[str]:
    """All rows, with the figures that count."""
    return [*aligned([_HEAD, *(_entries(row) for row in rows)]), _NOTE]


def edit_markdown(rows: Sequence[EditRow], facts: Mapping[str, Any]) -> str:
    """The table as a Markdown text, with what it was measured on and the figures of each row below it."""
    lines = ["# Editing, side by side with the usual way", "", *(f"    {line}" for line in describe_machine(facts)), ""]
    lines += [_markdown_row(_HEAD), _markdown_row(["---"] * len(_HEAD))]
    lines += [_markdown_row(_entries(row)) for row in rows]
    lines += ["", _NOTE, ""]
    for row in rows:
        figures = ", ".join(f"{name.replace('_', ' ')} {_figure(value)}" for name, value in row.details.items())
        lines.append(f"- {row.label}: {figures}")
    return "\n".join(lines) + "\n"


def _markdown_row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _entries(row: EditRow) -> tuple[str, ...]:
    return (
        row.label,
        _seconds(row.seconds),
        _seconds(row.seconds_usual),
        f"{row.ratio_seconds:.1f}x",
        f"{_work(row.work)} {row.unit}",
        _work(row.work_usual),
        f"{row.ratio_work:.1f}x",
        f"{row.difference:.1e}",
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _work(work: float) -> str:
    return f"{work:.0f}" if work >= 100 else f"{work:.3g}"


def _figure(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
