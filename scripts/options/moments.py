"""multrace moments: collect second moments of the inputs of a model's projections over a corpus, for editors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import CommandError
from .asking import ModelOptions
from .choices import PROJECTIONS
from .option import option

HELP = "collect second moments of layer inputs over a corpus of pictures and texts"
EXAMPLE = """examples:
  multrace moments --world --limit 400 --layers 1-3 --out out/moments        the embedded model and its world
  multrace moments --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device-map cuda:0 \\
      --data records.jsonl --layers 5-9 --tolerance 0.05 --cache out/parts --out out/moments

A line of records.jsonl: {"image": "photo.jpg", "question": "Who founded the company in this photo?"}
("image" may be null or left out for a text; paths are relative to the folder of the file, or to --images).

The command writes OUT/moments.safetensors (multrace.editing.Moments.load).
"""


@dataclass(frozen=True, kw_only=True)
class MomentOptions(ModelOptions):
    """Options of `multrace moments`."""

    data: Path | None = option(
        "file with one JSON object per line, or the study's CSV files as in multrace flow",
        default=None,
        type=Path,
        metavar="FILE",
    )
    images: Path | None = option("folder of the pictures that the records name", default=None, type=Path, metavar="DIR")
    world: bool = option(
        "read questions about the embedded model's world instead of --data; --limit says how many",
        default=False,
        action="store_true",
    )
    limit: int | None = option(
        "maximum number of records or questions (default: all records)", default=None, type=int, metavar="N"
    )
    seed: int = option("random seed of the order of --world (default: 0)", default=0, type=int)
    layers: str | None = option("layers such as 5, 3-7 or 0,2,5-7 (default: all)", default=None)
    projection: str = option(
        "weights whose inputs are read: mlp (down projections, the default) or attention (output projections)",
        default="mlp",
        choices=PROJECTIONS,
    )
    batch_size: int = option("number of prompts that run together (default: 8)", default=8, type=int, metavar="N")
    memory: int | None = option(
        "MiB for the sums of one pass; with less than all layers need, layers are read in groups, one pass each "
        "(default: no limit)",
        default=None,
        type=int,
        metavar="MIB",
    )
    tolerance: float | None = option(
        "stop once the moments move by less than this share (default: read everything)", default=None, type=float
    )
    every: int | None = option(
        "number of prompts between two readings of convergence (default: a sixteenth of all, at most 256)",
        default=None,
        type=int,
        metavar="N",
    )
    cache: Path | None = option(
        "folder for intermediate sums: an interrupted call continues from them, and a finished result is reused",
        default=None,
        type=Path,
        metavar="DIR",
    )
    out: Path = option("folder for the result (default: out/moments)", default=Path("out/moments"), type=Path)

    def check(self) -> None:
        """Raises `CommandError` unless there is exactly one source, and for numbers out of range."""
        if (self.data is None) != self.world:
            raise CommandError("pass one of --data FILE and --world, so that there is something to read")
        if self.world and self.limit is None:
            raise CommandError("--world has no end; pass the number of questions as --limit N")
        if self.limit is not None and self.limit < 1:
            raise CommandError(f"--limit {self.limit}: read at least one question")

    def layer_numbers(self) -> tuple[int, ...] | None:
        """Return the layers of --layers; None for all. Raises `CommandError` for text that names none."""
        return None if self.layers is None else parse_layers(self.layers)


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers that a text such as "5", "3-7" or "0,2,5-7" names. Raises `CommandError` for other text."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise CommandError(f"no layers {text!r}; write --layers 5, --layers 3-7 or --layers 0,2,5-7")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


OPTIONS = MomentOptions
