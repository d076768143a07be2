"""ROME's array layout of a trace (arXiv 2202.05262), which its plots and averages can read."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...artefacts.folders import write_whole
from ..errors import TraceError

_KINDS: Mapping[str, str | None] = {"hidden": None, "mlp": "mlp", "attention": "attn"}


def rome_kind(kind: str) -> str | None:
    """Return ROME's name of a kind of site. Raises `TraceError` if it has none."""
    if kind not in _KINDS:
        raise TraceError(f"ROME's layout knows no {kind!r}; ask for one of {', '.join(map(repr, _KINDS))}")
    return _KINDS[kind]


def over_tokens(scores: Tensor, row_positions: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """Return (token, column): the scores of the rows that are one token each, NaN for every other token."""
    single = [row for row, positions in enumerate(row_positions) if len(positions) == 1]
    if not single:
        raise TraceError('ROME\'s layout has one row per token, this trace only groups; trace with positions="tokens"')
    spread = torch.full((count, scores.shape[1]), torch.nan, dtype=scores.dtype)
    for row in single:
        spread[row_positions[row][0]] = scores[row]
    return spread


def write_rome(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write an npz file without pickled objects and return its path; None becomes the empty text, as in ROME."""
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray("" if value is None else value) for name, value in result.items()})
    return write_whole(path, content.getvalue())
