"""The options that all benchmarks share, the model they ask for, and the file they write."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...models.loading.devices import check_device_map
from ..errors import CommandError
from ..options import option
from ..outputs import check_files, new_files
from .shapes import SHAPES, Shape, write_model
from .subjects import Recipe


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of every `multrace bench` command; each is a subclass."""

    QUICK: ClassVar[Mapping[str, Any]]
    """Values with --quick of options that were not given."""
    FULL: ClassVar[Mapping[str, Any]]
    """Values without it."""

    quick: bool = option(
        "a small model, and less of everything (other options still hold)", default=False, action="store_true"
    )
    shape: str | None = option(
        f"sizes of the model: {', '.join(SHAPES)} (default base)", default=None, choices=tuple(SHAPES)
    )
    layers: int | None = option("decoder layers instead of the shape's", default=None, type=int)
    width: int | None = option("hidden width instead of the shape's; MLP and heads follow", default=None, type=int)
    seed: int = option("of weights, prompt, noise and the choice of timed cells (default 0)", default=0, type=int)
    baseline_cells: int | None = option(
        "cells that the other two ways answer (default 3; with --quick 1)", default=None, type=int, metavar="N"
    )
    dtype: str | None = option(
        "float32, bfloat16 or float16 (default: the shape's)", default=None, choices=("float32", "bfloat16", "float16")
    )
    device: str | None = option("cpu or cuda:0, ... (default: the CPU)", default=None)
    json: Path | None = option("also write the table to this file", default=None, type=Path, metavar="FILE")

    def value(self, name: str) -> Any:
        """An option that --quick has another default for."""
        given = getattr(self, name)
        return (self.QUICK if self.quick else self.FULL)[name] if given is None else given

    @property
    def runs_on_cuda(self) -> bool:
        """All rows are then measured in one process."""
        return torch.device(self.device or "cpu").type == "cuda"

    def check(self) -> None:
        """CommandError or ModelError for numbers that no model can have and devices that are not there."""
        self.check_least("layers", 2)
        self.check_least("baseline_cells", 1)
        if self.width is not None and (self.width < 16 or self.width % 16):
            raise CommandError(f"--width {self.width}: pass a multiple of 16, such as 512")
        check_device_map(self.device, "the random model")
        if self.json is not None:
            check_files(self.json.parent, [self.json.name])

    def check_least(self, name: str, least: int) -> None:
        """CommandError for a number below the least one."""
        given = getattr(self, name)
        if given is not None and given < least:
            raise CommandError(f"--{name.replace('_', '-')} {given}: pass at least {least}")

    def chosen_shape(self) -> Shape:
        """The preset with the sizes that were asked for; MLP and heads keep their relation to the width."""
        shape = SHAPES[self.value("shape")]
        if self.width is not None:
            size, mlp = shape.width // shape.heads, 16 * math.ceil(shape.mlp / shape.width * self.width / 16)
            heads = 1 if self.width % size else self.width // size
            shape = replace(shape, width=self.width, mlp=mlp, heads=heads)
        changes = {"layers": self.layers, "dtype": self.dtype}
        return replace(shape, **{name: value for name, value in changes.items() if value is not None})

    @contextmanager
    def model(self, shape: Shape, samples: Mapping[str, int]) -> Iterator[Recipe]:
        """How to open the model, which lies in a temporary folder as long as the block lasts."""
        with tempfile.TemporaryDirectory(prefix="multrace-bench-") as folder:
            recipe = Recipe(folder=Path(folder), shape=shape, device=self.device, seed=self.seed, samples=samples)
            write_model(shape, recipe.folder, seed=self.seed, device=torch.device(self.device or "cpu"))
            yield recipe

    def write(self, content: Mapping[str, Any]) -> None:
        """Writes the JSON, if it was asked for, and says so."""
        if self.json is not None:
            with new_files(self.json.parent, [self.json.name]) as work:
                (work / self.json.name).write_text(json.dumps(content, indent=2) + "\n")
            print("written:", self.json)
