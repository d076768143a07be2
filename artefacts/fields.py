"""Dataclasses on disk: tensors are stored unchanged, all other fields as JSON in the header, checked by type hints."""

import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from torch import Tensor

from .errors import ArtefactError
from .files import LAYOUT, read_tensors, write_tensors

Record = TypeVar("Record")


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
    _check_layout(path, text.pop(LAYOUT, None), layout)
    try:
        content = {name: json.loads(value) for name, value in text.items()}
    except json.JSONDecodeError as error:
        raise ArtefactError(f"the header of {str(path)!r} is corrupt ({error}); make the file again") from error
    try:
        record = _dataclass(kind, content, "", tensors)
        problem = f"unexpected tensors {', '.join(tensors)}" if tensors else check(record)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ArtefactError(f"{str(path)!r} holds no whole {kind.__name__} ({problem}); make it again and save it")
    return record


def _check_layout(path: str | Path, found: str | None, expected: str) -> None:
    if found == expected:
        return
    is_other_version = found is not None and found.rstrip("0123456789") == expected.rstrip("0123456789")
    hint = "it is of another version of multrace, so make it again" if is_other_version else "load another file"
    raise ArtefactError(f"{str(path)!r} holds {found or 'something of another program'!r}, not {expected!r}; {hint}")


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
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or (hint is None and value is None) or (isinstance(hint, type) and type(value) is hint):
        return value
    raise TypeError(
        f"{name} is {value!r}, not of type {hint.__name__ if isinstance(hint, type) and not options else hint}"
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
    raise TypeError(f"{name} is {value!r}, not of type {' | '.join(map(str, options))}")


def _dataclass(kind: type, value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return an instance of a dataclass from the mapping of its fields."""
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {value!r}, not the fields of {kind.__name__}")
    hints, names = typing.get_type_hints(kind), [each.name for each in fields(kind)]
    prefix = f"{name}." if name else ""
    needed = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if missing := [each for each in needed if each not in value]:
        raise KeyError(f"{prefix}{missing[0]}")
    if unknown := [each for each in value if each not in names]:
        raise TypeError(f"unknown field {prefix}{unknown[0]}")
    return kind(**{key: _unpacked(hints[key], part, f"{prefix}{key}", tensors) for key, part in value.items()})
