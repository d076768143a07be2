"""Results as long tables: one line per value, for pandas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor


def long_frame(axes: Sequence[tuple[str, Sequence[Any]]], values: dict[str, Tensor]) -> pd.DataFrame:
    """One line per entry of the values, which have these named axes in this order, the last one running fastest.

    axes: the name of each axis and its labels; values: a column's name and its tensor, which may be smaller than the
    axes where it broadcasts.
    """
    shape = tuple(len(labels) for _, labels in axes)
    places = np.indices(shape).reshape(len(shape), -1)
    columns = {
        name: pd.Series(list(labels)).take(place).to_numpy() for (name, labels), place in zip(axes, places, strict=True)
    }
    columns |= {name: np.broadcast_to(value.numpy(), shape).ravel() for name, value in values.items()}
    return pd.DataFrame(columns)
