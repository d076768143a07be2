"""A row of the editing benchmark: two ways to the same result, the cost of each, and how far the results are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CommandError
from .machine import aligned, describe_machine


@dataclass(frozen=True, kw_only=True)
class EditRow:
    """One row of the table; both ways' figures are for the same amount of work."""

    label: str
    seconds: float
    """Ours."""
    seconds_usual: float
    """The usual way's, multiplied where it was timed on a part."""
    unit: str
    """What work is counted in: "token-layers" or "GFLOP"."""
    work: float
    work_usual: float
    difference: float
    """|ours - usual| / |usual| of the results, the worst where there are several."""
    tolerance: float
    """The difference at which the row would have been refused."""
    details: Mapping[str, float | int | str]
    """Figures of this kind of row by name: what was asked, and what else was measured."""

    @property
    def ratio_seconds(self) -> float:
        """The usual way's seconds over ours."""
        return self.seconds_usual / self.seconds

    @property
    def ratio_work(self) -> float:
        """The usual way's work over ours."""
        return self.work_usual / self.work

    def record(self) -> dict[str, Any]:
        """The row with its ratios, as it stands in the JSON."""
        return {**asdict(self), "ratio_seconds": self.ratio_seconds, "ratio_work": self.ratio_work}


def apart(found: Tensor, wanted: Tensor, *, tolerance: float, label: str, scale: Tensor | None = None) -> float:
    """|found - wanted| / |scale| (Frobenius; scale: wanted, if it is not given).

    CommandError if it is above the tolerance or not finite: a ratio of the costs of different results says nothing.
    """
    wanted = wanted.to(found.device, torch.float64)
    size = (wanted if scale is None else scale.double()).norm()
    difference = ((found.double() - wanted).norm() / size).item()
    if not difference <= tolerance:
        raise CommandError(
            f"{label}: ours and the usual way differ by {difference:.1e} of the result, {tolerance:.0e} is allowed; "
            "they did not compute the same, so there is no ratio; try another --seed, or --dtype float32"
        )
    return difference


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
