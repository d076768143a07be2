"""The base of every result, which is saved, loaded and checked by its fields, printed in two lines, and plotted."""

import base64
import html
import io
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from .fields import load_fields, save_fields
from .frames import long_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_WIDTH = 140
"""Number of characters in a printed line."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result(ABC):
    """The result of an experiment or an average.

    A subclass is a frozen dataclass with `repr=False`. Its fields are tensors, plain values (text, numbers, booleans,
    None), other dataclasses, and tuples or mappings (with text as keys) of these; the type hints of the fields define
    the valid content of a file. A subclass sets `layout`, and defines `_lines`, `_axes` and `_columns`, `plot` and
    `_problem`.
    """

    layout: ClassVar[str]
    """Name and version of the file layout, such as "multrace causal trace 2"."""

    def save(self, path: str | Path) -> Path:
        """Write the result as a safetensors file and return the path; equal results give equal bytes.

        Raises `ArtefactError` if the file cannot be written.
        """
        return save_fields(path, self.layout, self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the result that `save` wrote.

        Raises `ArtefactError` if the file is missing, damaged, or of another kind or version, or if its fields have
        wrong types or are inconsistent.
        """
        return load_fields(path, cls.layout, cls, check=lambda result: result._problem())

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a long table with one row per entry of the result's named axes, and one column per quantity."""
        return long_frame(self._axes(), self._columns())

    @abstractmethod
    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure of the result, which is also written to the path if one is given (png, pdf or svg)."""

    @abstractmethod
    def _lines(self) -> tuple[str, str]:
        """Return two lines: the experiment with its model and question, and the most important numbers."""

    def _axes(self) -> Mapping[str, Sequence[Any]]:
        """Return the name and labels of each axis of `_columns`, in order."""
        raise NotImplementedError

    def _columns(self) -> Mapping[str, Tensor]:
        """Return the quantities over `_axes`; a tensor may be smaller if it broadcasts."""
        raise NotImplementedError

    def _problem(self) -> str | None:
        """Return a description of an inconsistency in a result that was read from a file, or None."""
        return None

    def __repr__(self) -> str:
        first, second = (textwrap.shorten(" ".join(line.split()), _WIDTH, placeholder=" ...") for line in self._lines())
        return f"{first}\n{second}"

    def _repr_html_(self) -> str:
        """Return the two lines and the figure as HTML for notebooks."""
        content = io.BytesIO()
        self.plot().savefig(content, format="png", dpi=100)
        picture = base64.b64encode(content.getvalue()).decode()
        first, second = (html.escape(line) for line in repr(self).split("\n"))
        image = f'<img alt="{first}" style="max-width:100%" src="data:image/png;base64,{picture}"/>'
        return f"<div><b>{first}</b><br/>{second}<br/>{image}</div>"
