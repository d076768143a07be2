"""Rows of the flow benchmark in words, and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from .flow_timing import REPEATS, FlowRow
from .tables import aligned


def describe_flow(row: FlowRow) -> list[str]:
    """One row of the table, with everything that was measured."""
    lines = [
        f"{row.flow}: {row.computed_cells} cells computed, {row.free_cells} free",
        f"  seconds       {row.seconds:.3f} ({1000 * row.seconds_per_cell:.2f} ms per cell; recording "
        f"{row.recording_seconds:.2f}); "
        f"strong {row.ratio_strong:.1f}x ({row.seconds_per_cell_strong:.2f} s per cell), "
        f"published {row.ratio_published:.1f}x ({row.seconds_per_cell_published:.2f} s per cell); with the recording "
        f"{row.ratio_strong_recorded:.1f}x and {row.ratio_published_recorded:.1f}x",
        f"  token-layers  {row.token_layers}; {row.ratio_token_layers:.1f}x; with the recording "
        f"({row.recording_token_layers}) {row.ratio_token_layers_recorded:.1f}x",
        f"  work          {row.flops / 1e9:.2f} GFLOP counted, at {row.share_of_rate:.0%} of the matrix-product rate "
        f"({row.matrix_gflops:.0f} GFLOP/s): {row.times_counted_work:.2f}x what it costs at that rate",
        f"  differences   {row.max_abs_diff:.1e} to strong, {row.max_abs_diff_published:.1e} to published "
        f"({row.timed_cells} cells); strong to itself {row.plain_noise:.1e}; largest effect {row.largest_effect:.3f}; "
        f"in log-probability {row.max_relative_diff:.1e}, strong to itself {row.plain_relative_noise:.1e}",
        f"  peak memory   {row.peak_mb:.0f} MiB (ours)",
    ]
    if row.saving is not None:
        lines.append(
            f"  pruning       a prefill on text alone from layer {row.saving.layer} on takes "
            f"{row.saving.seconds_truncated:.3f} s, a whole one {row.saving.seconds_full:.3f}: "
            f"{row.saving.ratio_seconds:.2f}x ({row.saving.ratio_token_layers:.2f}x token-layers); its answer is "
            f"{row.saving.max_abs_diff:.1e} from that cell's"
        )
    return lines


def flow_table(rows: Sequence[FlowRow]) -> list[str]:
    """All rows, with the figures that count."""
    head = (
        "flow",
        "cells (free)",
        "token-layers",
        "with recording",
        "seconds, strong",
        "seconds, published",
        "ms per cell",
        "largest difference",
        "in log-probability",
    )
    return [
        *aligned([head, *(_entries(row) for row in rows)]),
        f"Ours: the median of {REPEATS} sweeps. Ratios are the other ways' cost over ours, the recording of the clean "
        "run left out, free cells in none.",
    ]


def _entries(row: FlowRow) -> tuple[str, ...]:
    ratios = (row.ratio_token_layers, row.ratio_token_layers_recorded, row.ratio_strong, row.ratio_published)
    return (
        row.flow,
        f"{row.computed_cells} ({row.free_cells})",
        *(f"{ratio:.1f}x" for ratio in ratios),
        f"{1000 * row.seconds_per_cell:.2f}",
        f"{max(row.max_abs_diff, row.max_abs_diff_published):.1e}",
        f"{row.max_relative_diff:.1e}",
    )
