"""What tests of results share: equality of all fields, and what a figure shows."""

import io
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image


def assert_same(new: Any, old: Any, name: str = "result") -> None:
    """Equal types and values in all fields, NaN equal to NaN, mappings in the same order."""
    if isinstance(old, torch.Tensor):
        assert new.dtype == old.dtype and torch.equal(new.isnan(), old.isnan()), name
        assert torch.equal(new.nan_to_num(7.0), old.nan_to_num(7.0)), name
    elif is_dataclass(old):
        assert type(new) is type(old), name
        for field in fields(old):
            assert_same(getattr(new, field.name), getattr(old, field.name), f"{name}.{field.name}")
    elif isinstance(old, Mapping):
        assert list(new) == list(old), name
        for key in old:
            assert_same(new[key], old[key], f"{name}[{key!r}]")
    else:
        assert new == old and repr(new) == repr(old), name


def svg(figure: Figure) -> str:
    """A figure as SVG, which keeps its text in comments beside the outlines."""
    content = io.StringIO()
    figure.savefig(content, format="svg")
    return content.getvalue()


def colours(figure: Figure) -> int:
    """How many colours a figure has."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160)
    with Image.open(content) as image:
        assert min(image.size) > 250
        return len(image.convert("RGB").getcolors(1_000_000))


def assert_shown(result: Any) -> None:
    """A result prints two lines that fit a screen, without tensors, and shows itself with a picture in a notebook."""
    lines = repr(result).split("\n")
    assert len(lines) == 2 and all(0 < len(line) <= 140 for line in lines) and "tensor(" not in repr(result)
    assert lines[0].startswith(type(result).__name__)
    assert "data:image/png;base64," in result._repr_html_()
