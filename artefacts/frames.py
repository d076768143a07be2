"""Results as long pandas tables with one row per value."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def long_frame(
    axes: Mapping[str, Sequence[Any]] | Sequence[tuple[str, Sequence[Any]]], values: Mapping[str, Tensor]
) -> "pd.DataFrame":
    """Return a table with one row per entry of the values; the last axis varies fastest.

    Args:
        axes: the name of each axis and its labels, in the order of the values' dimensions.
        values: the tensor of each column by name; a tensor may be smaller than the axes if it broadcasts.
    """
    import pandas as pd

    named = dict(axes)
    shape = tuple(len(labels) for labels in named.values())
    places = np.indices(shape).reshape(len(shape), -1)
    columns = {
        name: pd.Series(list(labels)).take(place).to_numpy()
        for (name, labels), place in zip(named.items(), places, strict=True)
    }
    columns |= {name: np.broadcast_to(value.numpy(), shape).ravel() for name, value in values.items()}
    return pd.DataFrame(columns)


def stacked_frame(frames: Mapping[str, "pd.DataFrame"] | Mapping[Any, "pd.DataFrame"], column: str) -> "pd.DataFrame":
    """Return the tables concatenated by rows; the first column has this name and holds the name of each table."""
    import pandas as pd

    parts = []
    for name, frame in frames.items():
        frame.insert(0, column, name)
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)
