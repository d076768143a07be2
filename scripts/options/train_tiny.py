"""multrace train-tiny: train the embedded model from scratch, test it, and write it as a Hugging Face directory."""

from dataclasses import dataclass
from pathlib import Path

from .option import option

HELP = "train the embedded model from scratch (about an hour on two cores)"
EXAMPLE = """examples:
  multrace train-tiny --out out/tiny_vlm                 the full recipe
  multrace train-tiny --out out/trial --share 0.01       one hundredth of the steps, to see it run
"""


@dataclass(frozen=True, kw_only=True)
class TrainTiny:
    """Options of `multrace train-tiny`."""

    out: Path = option("folder to write; must be new or empty", type=Path)
    seed: int = option("random seed of weights, pictures and questions (default: 0)", default=0, type=int)
    threads: int = option("number of CPU threads (default: 2)", default=2, type=int, metavar="N")
    share: float = option("share of the recipe's steps to take (default: 1.0)", default=1.0, type=float)


OPTIONS = TrainTiny
