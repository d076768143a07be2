"""The options that all benchmarks share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import CommandError
from ..outputs import check_files
from .choices import SHAPES
from .option import flag, option


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of every `multrace bench` command; each is a subclass."""

    QUICK: ClassVar[Mapping[str, Any]]
    """Values with --quick of options that were not given."""
    FULL: ClassVar[Mapping[str, Any]]
    """Values without it."""

    quick: bool = option(
        "use a small model and less of everything; other options override this", default=False, action="store_true"
    )
    shape: str | None = option(f"sizes of the model: {', '.join(SHAPES)} (default: base)", default=None, choices=SHAPES)
    layers: int | None = option("number of decoder layers, instead of the shape's", default=None, type=int, metavar="N")
    width: int | None = option(
        "hidden width, instead of the shape's; MLP and heads follow", default=None, type=int, metavar="N"
    )
    seed: int = option(
        "random seed of weights, prompt, noise and the choice of timed cells (default: 0)", default=0, type=int
    )
    baseline_cells: int | None = option(
        "number of cells that the other two ways compute (default: 3; 1 with --quick)",
        default=None,
        type=int,
        metavar="N",
    )
    dtype: str | None = option(
        "float32, bfloat16 or float16 (default: the shape's)", default=None, choices=("float32", "bfloat16", "float16")
    )
    device: str | None = option("device: cpu, cuda:0, ... (default: the CPU)", default=None)
    json: Path | None = option("also write the table to this file", default=None, type=Path, metavar="FILE")

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
            raise CommandError(f"{flag(name)} {given}: pass at least {least}")
