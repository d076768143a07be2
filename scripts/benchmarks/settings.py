"""The model that a benchmark's options ask for, and the file that it writes."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...models.loading.devices import check_device_map
from ..options.benchmarks import BenchOptions
from ..outputs import new_files
from .shapes import SHAPES, Shape, write_model
from .subjects import Recipe


def check_settings(settings: BenchOptions) -> None:
    """Raises `CommandError` or `ModelError` for numbers that no model can have and devices that are not there."""
    settings.check()
    check_device_map(settings.device, "the random model")


def chosen_shape(settings: BenchOptions) -> Shape:
    """Return the preset with the sizes that were given; MLP and heads keep their relation to the width."""
    shape = SHAPES[settings.value("shape")]
    if settings.width is not None:
        size, mlp = shape.width // shape.heads, 16 * math.ceil(shape.mlp / shape.width * settings.width / 16)
        heads = 1 if settings.width % size else settings.width // size
        shape = replace(shape, width=settings.width, mlp=mlp, heads=heads)
    changes = {"layers": settings.layers, "dtype": settings.dtype}
    return replace(shape, **{name: value for name, value in changes.items() if value is not None})


@contextmanager
def random_model(settings: BenchOptions, shape: Shape, samples: Mapping[str, int]) -> Iterator[Recipe]:
    """Yields how to open the model, which lies in a temporary folder as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="multrace-bench-") as folder:
        device, seed = settings.device, settings.seed
        recipe = Recipe(folder=Path(folder), shape=shape, device=device, seed=seed, samples=samples)
        write_model(shape, recipe.folder, seed=seed, device=torch.device(device or "cpu"))
        yield recipe


def write_json(settings: BenchOptions, content: Mapping[str, Any]) -> None:
    """Write the JSON if --json is given."""
    if settings.json is not None:
        with new_files(settings.json.parent, [settings.json.name]) as work:
            (work / settings.json.name).write_text(json.dumps(content, indent=2) + "\n")
        print("written:", settings.json)
