"""The options of the benchmarks: what they share, and what belongs to one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from cyclopts import Parameter

from ..errors import CommandError
from ..options.asking import GeneralOptions
from ..options.choices import SHAPES, SOLVE_WIDTH
from ..outputs import check_files


@dataclass(frozen=True, kw_only=True)
class BenchOptions(GeneralOptions):
    """Options of every `multrace bench` command; each is a subclass."""

    QUICK: ClassVar[Mapping[str, Any]]
    """Values with --quick of options that were not given."""
    FULL: ClassVar[Mapping[str, Any]]
    """Values without it."""

    quick: Annotated[bool, Parameter(help="use a small model and less of everything; other options override this")] = (
        False
    )
    shape: Annotated[
        str | None, Parameter(help=f"sizes of the model: {', '.join(SHAPES)} (default: base)", choices=SHAPES)
    ] = None
    layers: Annotated[int | None, Parameter(help="number of decoder layers, instead of the shape's", metavar="N")] = (
        None
    )
    width: Annotated[
        int | None, Parameter(help="hidden width, instead of the shape's; MLP and heads follow", metavar="N")
    ] = None
    seed: Annotated[int, Parameter(help="random seed of weights, prompt, noise and the choice of timed cells")] = 0
    baseline_cells: Annotated[
        int | None,
        Parameter(help="number of cells that the other two ways compute (default: 3; 1 with --quick)", metavar="N"),
    ] = None
    dtype: Annotated[
        str | None,
        Parameter(
            help="float32, bfloat16 or float16 (default: the shape's)", choices=("float32", "bfloat16", "float16")
        ),
    ] = None
    device: Annotated[str | None, Parameter(help="device: cpu, cuda:0, ... (default: the CPU)")] = None
    json: Annotated[Path | None, Parameter(help="also write the table to this file", metavar="FILE")] = None

    def value(self, name: str) -> Any:
        """Return the value of an option that has another default with --quick."""
        given = getattr(self, name)
        return (self.QUICK if self.quick else self.FULL)[name] if given is None else given

    @property
    def runs_on_cuda(self) -> bool:
        """Whether all rows are measured in one process, because the device is a CUDA device."""
        return (self.device or "cpu").split(":")[0] == "cuda"

    def check(self) -> None:
        """Raises `CommandError` for numbers that no model can have and files that cannot be written."""
        self.check_least("layers", 2)
        self.check_least("baseline_cells", 1)
        if self.width is not None and (self.width < 16 or self.width % 16):
            raise CommandError(f"--width {self.width}: pass a multiple of 16, such as 512")
        if self.json is not None:
            check_files(self.json.parent, [self.json.name])

    def check_least(self, name: str, least: int) -> None:
        """Raises `CommandError` for a number below the least one."""
        given = getattr(self, name)
        if given is not None and given < least:
            raise CommandError(f"--{name.replace('_', '-')} {given}: pass at least {least}")


_FULL_TRACE = {"shape": "base", "samples": 10, "image_samples": 5, "baseline_cells": 3, "cells": ()}


@dataclass(frozen=True, kw_only=True)
class BenchTrace(BenchOptions):
    """Options of `multrace bench trace`."""

    QUICK = {
        "shape": "small",
        "samples": 3,
        "image_samples": 2,
        "baseline_cells": 1,
        "cells": ("text tokens, hidden", "text tokens, mlp, window 10"),
    }
    FULL = _FULL_TRACE

    samples: Annotated[
        int | None,
        Parameter(
            help=f"number of noise samples of the text corruption (default: {_FULL_TRACE['samples']}; 3 with --quick)",
            metavar="N",
        ),
    ] = None
    image_samples: Annotated[
        int | None,
        Parameter(
            help="number of noise samples of the image corruption "
            f"(default: {_FULL_TRACE['image_samples']}; 2 with --quick)",
            metavar="N",
        ),
    ] = None
    cells: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help="measure only the rows of the table whose label contains one of these words "
            "(default: all; two with --quick)",
            metavar="WORDS",
        ),
    ] = None

    def check(self) -> None:
        """Raises `CommandError` also for a corruption without samples."""
        for name in ("samples", "image_samples"):
            self.check_least(name, 1)
        super().check()


_WIDE = 9
"""The window that the study's figures use."""


@dataclass(frozen=True, kw_only=True)
class BenchFlow(BenchOptions):
    """Options of `multrace bench flow`."""

    QUICK = {"shape": "small", "baseline_cells": 1, "flows": ("image -> last", "question and", "dropped")}
    FULL = {"shape": "base", "baseline_cells": 3, "flows": ()}

    windows: Annotated[
        tuple[int, ...] | None,
        Parameter(
            help=f"numbers of layers that are cut together (default: 1 and {_WIDE}, at most all)", metavar="LAYERS"
        ),
    ] = None
    flows: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help="measure only the rows of the table whose label contains one of these words "
            "(default: all; four with --quick)",
            metavar="WORDS",
        ),
    ] = None

    def chosen_windows(self, layers: int) -> tuple[int, ...]:
        """Return the windows without repetitions. Raises `CommandError` for one above the number of layers."""
        windows = (1, min(_WIDE, layers)) if self.windows is None else self.windows
        wrong = [window for window in windows if not 1 <= window <= layers]
        if wrong:
            raise CommandError(f"--windows {wrong[0]}: the decoder has {layers} layers; pass some of 1 to {layers}")
        return tuple(dict.fromkeys(windows))


_FULL_EDIT = {
    "shape": "base",
    "baseline_cells": 2,
    "facts": 8,
    "steps": 20,
    "prompts": 16,
    "solve_width": SOLVE_WIDTH,
    "rows": (),
}


@dataclass(frozen=True, kw_only=True)
class BenchEdit(BenchOptions):
    """Options of `multrace bench edit`."""

    QUICK = {
        "shape": "small",
        "baseline_cells": 1,
        "facts": 4,
        "steps": 10,
        "prompts": 4,
        "solve_width": 1376,
        "rows": ("lower third", "second moments", "1 edit, float32", "price of C"),
    }
    FULL = _FULL_EDIT

    baseline_cells: Annotated[
        int | None,
        Parameter(help="number of facts that the usual way searches for (default: 2; 1 with --quick)", metavar="N"),
    ] = None
    facts: Annotated[
        int | None,
        Parameter(
            help=f"number of facts that multrace searches for (default: {_FULL_EDIT['facts']}; 4 with --quick)",
            metavar="N",
        ),
    ] = None
    steps: Annotated[
        int | None,
        Parameter(
            help=f"number of steps of each search (default: {_FULL_EDIT['steps']}; 10 with --quick)", metavar="N"
        ),
    ] = None
    prompts: Annotated[
        int | None,
        Parameter(
            help="number of prompts that second moments are taken over "
            f"(default: {_FULL_EDIT['prompts']}; 4 with --quick)",
            metavar="N",
        ),
    ] = None
    solve_width: Annotated[
        int | None,
        Parameter(
            help=f"input width of the solved weight (default: {SOLVE_WIDTH}, which takes minutes; 1376 with --quick)",
            metavar="N",
        ),
    ] = None
    rows: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help="measure only the rows of the table whose label contains one of these words "
            "(default: all; five with --quick)",
            metavar="WORDS",
        ),
    ] = None
    markdown: Annotated[Path | None, Parameter(help="also write the table as Markdown", metavar="FILE")] = None

    def check(self) -> None:
        """Raises `CommandError` also for searches, moments and solves of nothing."""
        least = {"facts": 1, "steps": 1, "prompts": 1, "solve_width": 16}
        for name, number in least.items():
            self.check_least(name, number)
        super().check()
        if self.markdown is not None:
            check_files(self.markdown.parent, [self.markdown.name])
