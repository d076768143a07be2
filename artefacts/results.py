"""The base of every result: a dataclass that is saved, loaded, checked by its fields, printed, tabled and plotted."""

import base64
import html
import io
import json
import textwrap
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

import numpy as np
from torch import Tensor

from ..data import DataError, parse_json
from .files import LAYOUT, check_layout, read_tensors, write_tensors
from .folders import ArtefactError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Record = TypeVar("Record")
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


def save_fields(path: str | Path, layout: str, record: Any) -> Path:
    """Write a dataclass as a safetensors file and return the path; equal fields give equal bytes.

    Args:
        path: the file to write.
        layout: name and version of the layout, such as "multrace causal trace 2".
        record: an instance of a dataclass. Its fields are tensors, plain values (text, numbers, booleans, None), other
            dataclasses, and tuples or mappings (with text as keys) of these.

    Raises:
        ArtefactError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = {
        each.name: json.dumps(_packed(getattr(record, each.name), each.name, tensors), default=index)
        for each in fields(record)
    }
    return write_tensors(path, tensors, {LAYOUT: layout, **text})


def load_fields(
    path: str | Path,
    layout: str,
    kind: type[Record],
    *,
    check: Callable[[Record], str | None] = lambda record: None,
) -> Record:
    """Return the dataclass that `save_fields` wrote.

    Args:
        path: the file to read.
        layout: the layout that the file must have.
        kind: the dataclass, whose type hints define the valid fields.
        check: returns a description of an inconsistency in the instance, or None.

    Returns:
        The instance, with its tensors on the CPU.

    Raises:
        ArtefactError: if the file is missing, damaged, has another layout, or does not have the fields of the class.

    Example:
        >>> from dataclasses import dataclass
        >>> from multrace.artefacts import load_fields, save_fields
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Run:
        ...     name: str
        >>> path = save_fields("run.safetensors", "my run 1", Run(name="first"))
        >>> load_fields(path, "my run 1", Run)
        Run(name='first')
    """
    tensors, text = read_tensors(path)
    check_layout(path, text.pop(LAYOUT, None), layout)
    try:
        content = {name: parse_json(value, nan=True) for name, value in text.items()}
    except DataError as error:
        raise ArtefactError(f"the header of {str(path)!r} is corrupt ({error}); make the file again") from error
    try:
        record = _dataclass(kind, content, "", tensors)
        problem = f"unexpected tensors {', '.join(tensors)[:_WIDTH]}" if tensors else check(record)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ArtefactError(f"{str(path)!r} holds no whole {kind.__name__} ({problem}); make it again and save it")
    return record


def from_plain(kind: type[Record], content: Any) -> Record:
    """Return the dataclass whose fields are these plain values, as JSON has them; it has no tensors.

    Raises TypeError if a value does not have the type of its field, and KeyError if one is missing.

    Example:
        >>> from dataclasses import dataclass
        >>> from multrace.artefacts import from_plain
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Point:
        ...     names: tuple[str, ...]
        >>> from_plain(Point, {"names": ["a", "b"]})
        Point(names=('a', 'b'))
    """
    return _dataclass(kind, content, "", {})


def plain_fields(kind: type, content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return some of the fields of a dataclass from plain values. Raises TypeError and KeyError like `from_plain`."""
    hints = typing.get_type_hints(kind)
    return {name: _unpacked(hints[name], content[name], name, {}) for name in names}


def _shown(value: Any) -> str:
    """Return a text of at most a line for a value from a file, which may be of any size."""
    text = repr(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return the value in a form that JSON accepts. Tensors are collected by dotted name and replaced by null."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return None
    if is_dataclass(value):
        return {each.name: _packed(getattr(value, each.name), f"{name}.{each.name}", tensors) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _packed(each, f"{name}.{key}", tensors) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_packed(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]
    return value


def _unpacked(hint: Any, value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a packed value after a check of its type hint. Raises TypeError for a wrong type, KeyError if missing."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(options, value, name, tensors)
    if hint is Tensor:
        return tensors.pop(name)
    if is_dataclass(hint):
        return _dataclass(hint, value, name, tensors)
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, list):
        inner = [options[0]] * len(value) if options[1:] == (...,) else list(options)
        pairs = zip(inner, value, strict=True)
        return tuple(_unpacked(each, part, f"{name}.{index}", tensors) for index, (each, part) in enumerate(pairs))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _unpacked(options[1], part, f"{name}.{key}", tensors) for key, part in value.items()}
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise TypeError(f"{name} is {_shown(value)}, beyond 64 bits")
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or (hint is None and value is None) or (isinstance(hint, type) and type(value) is hint):
        return value
    raise TypeError(
        f"{name} is {_shown(value)}, not of type {hint.__name__ if isinstance(hint, type) and not options else hint}"
    )


def _one_of(options: Sequence[Any], value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value of one of several types; null stands for the tensor of this name, if any, otherwise for None."""
    if Tensor in options and name in tensors:
        return tensors.pop(name)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option not in (Tensor, type(None)):
            try:
                return _unpacked(option, value, name, tensors)
            except (TypeError, ValueError):
                continue
    raise TypeError(f"{name} is {_shown(value)}, not of type {' | '.join(map(str, options))}")


def _dataclass(kind: type, value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return an instance of a dataclass from the mapping of its fields."""
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {_shown(value)}, not the fields of {kind.__name__}")
    hints, names = typing.get_type_hints(kind), [each.name for each in fields(kind)]
    prefix = f"{name}." if name else ""
    needed = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if missing := [each for each in needed if each not in value]:
        raise KeyError(f"{prefix}{missing[0]}")
    if unknown := [each for each in value if each not in names]:
        raise TypeError(f"unknown field {prefix}{unknown[0]}")
    return kind(**{key: _unpacked(hints[key], part, f"{prefix}{key}", tensors) for key, part in value.items()})
