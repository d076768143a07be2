"""Rows of the benchmark in words, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .timing import TimingRow


def describe_machine(facts: Mapping[str, Any]) -> list[str]:
    """Lines that say what is measured on what."""
    shape = facts["shape"]
    return [
        f"machine   {facts['device']}, {facts['threads']} threads, torch {facts['torch']}",
        f"model     {shape['layers']} layers, width {shape['width']}, MLP {shape['mlp']}, {shape['heads']} heads, "
        f"random weights in {shape['dtype']}; {shape['before']} text tokens, a picture, {shape['after']} text tokens",
    ]


def describe_row(row: TimingRow) -> list[str]:
    """One row of the table, with everything that was measured."""
    lines = [
        f"{row.cells}: {row.computed_cells} cells computed, {row.free_cells} free, {row.samples} samples",
        f"  seconds       {row.seconds:.1f} ({1000 * row.seconds_per_cell:.1f} ms per cell; recording "
        f"{row.recording_seconds:.1f}); "
        f"strong {row.ratio_strong:.1f}x ({row.seconds_per_cell_strong:.2f} s per cell), "
        f"naive {row.ratio_naive:.1f}x ({row.seconds_per_cell_naive:.2f} s per cell)",
        f"  token-layers  {row.token_layers}; strong {row.ratio_token_layers:.1f}x, "
        f"naive {row.ratio_token_layers_naive:.1f}x; with the recording ({row.recording_token_layers}) strong "
        f"{row.ratio_token_layers_recorded:.1f}x",
        f"  work          {row.flops / 1e12:.3f} TFLOP counted, at {row.share_of_rate:.0%} of the matrix-product rate "
        f"({row.matrix_gflops:.0f} GFLOP/s): {row.times_counted_work:.2f}x what it costs at that rate",
        f"  differences   {row.max_abs_diff:.1e} to strong, {row.max_abs_diff_naive:.1e} to naive "
        f"({row.timed_cells} cells); strong to itself {row.plain_noise:.1e}; largest effect {row.largest_effect:.3f}",
    ]
    if row.peak_mb_strong is not None:
        lines.append(
            f"  peak memory   {row.peak_mb:.0f} MiB; strong {row.peak_mb_strong:.0f}, naive {row.peak_mb_naive:.0f}"
        )
    return lines


def table(rows: Sequence[TimingRow]) -> list[str]:
    """All rows, with the figures that count."""
    head = ("cells", "token-layers", "seconds, strong", "seconds, naive", "largest difference", "peak MiB")
    return aligned([head, *(_entries(row) for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of as many entries each, their columns below one another."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _entries(row: TimingRow) -> tuple[str, ...]:
    ratios = (row.ratio_token_layers, row.ratio_strong, row.ratio_naive)
    return (row.cells, *(f"{ratio:.1f}x" for ratio in ratios), f"{row.max_abs_diff:.1e}", f"{row.peak_mb:.0f}")
