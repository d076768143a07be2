"""multrace trace: which states bring the answer back after the picture or the constraint was destroyed."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..tracing import CausalTrace, causal_trace
from ..tracing.causal import KINDS
from .options import CorruptionOptions, ModelOptions, add_options, option, read
from .outputs import check_files, new_files

HELP = "trace an answer to tokens and layers, and draw the map"
EXAMPLE = """examples:
  multrace trace --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --corrupt swap:other.jpg --out out/trace
  multrace trace --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --corrupt text-noise:3 --groups image constraint_last last --window 1

writes OUT/trace.safetensors (multrace.tracing.CausalTrace.load) and OUT/trace.png
"""
FILES = ("trace.safetensors", "trace.png")
_BLOCKS = 3


@dataclass(frozen=True, kw_only=True)
class Trace(ModelOptions, CorruptionOptions):
    """Options of `multrace trace`."""

    answer: str | None = option(
        "score the first token of this answer (default: of the model's own)", default=None, metavar="ANSWER"
    )
    whole_answer: bool = option(
        "score all tokens of the answer, not only its first", default=False, action="store_true"
    )
    sites: tuple[str, ...] = option(
        f"kinds of states to restore (default: {' '.join(KINDS)})",
        default=KINDS,
        nargs="+",
        choices=KINDS,
        metavar="KIND",
    )
    out: Path = option("folder for the results (default out/trace)", default=Path("out/trace"), type=Path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Trace`."""
    add_options(parser, Trace)


def run(options: argparse.Namespace) -> int:
    """Traces, writes the trace and its map, prints total effect and causal blocks."""
    settings = read(Trace, options)
    settings.check_question()
    corruption = settings.corruption()
    check_files(settings.out, FILES)
    vlm = settings.open_model()
    trace = causal_trace(
        vlm,
        settings.prompt(vlm),
        corruption=corruption,
        sites=settings.sites,
        window=settings.window,
        positions=settings.positions("tokens"),
        answer=settings.answer,
        whole_answer=settings.whole_answer,
    )
    with new_files(settings.out, FILES) as folder:
        trace.save(folder / FILES[0])
        trace.plot(folder / FILES[1])
    print(*summary(trace), sep="\n")
    print("written:", ", ".join(str(settings.out / name) for name in FILES))
    return 0


def summary(trace: CausalTrace) -> list[str]:
    """Total effect and, per kind of site, the strongest causal blocks, as lines of text."""
    rows = [("restored", "token", "layers", "indirect effect"), *_blocks(trace)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [
        f"question      {trace.question}",
        f"scored        {trace.answer!r}",
        f"corruption    {trace.corruption}",
        f"total effect  {trace.total_effect:.3f} (probability {trace.clean:.3f} clean, "
        f"{float(trace.corrupted.mean()):.3f} corrupted)",
        "",
        *table,
    ]


def _blocks(trace: CausalTrace) -> list[tuple[str, str, str, str]]:
    rows = []
    for kind in trace.kinds:
        blocks = trace.causal_blocks(kind)[:_BLOCKS]
        rows += [
            (kind, repr(block.row), _layers(block.first, block.last), f"{block.effect:.3f}") for block in blocks
        ] or [(kind, "none", "-", "nothing brings the answer back")]
    return rows


def _layers(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
