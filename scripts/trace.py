"""multrace trace: which states bring the answer back after the picture or the constraint was destroyed."""

import argparse

from .options import add_options, read
from .outputs import check_files
from .trace_files import FILES, summary, write_trace
from .trace_options import Trace
from .trace_records import trace_records

HELP = "trace an answer to tokens and layers, and draw the map"
EXAMPLE = """examples:
  multrace trace --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --corrupt swap:other.jpg --out out/trace
  multrace trace --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --corrupt text-noise:auto --groups image constraint_last last --window 1
  multrace trace --image photo.jpg --question "What is this?" --corrupt image-noise:3 \\
      --groups patches --effect direct --sites hidden
  multrace trace --records questions.jsonl --corrupt image-noise:3 --groups image constraint_last last --out out/all

writes OUT/trace.safetensors (multrace.tracing.CausalTrace.load), OUT/trace.png and, where parts of the picture were
restored, OUT/overlay.png; with --records, a folder of these for each line, OUT/report.json, and the average of all as
OUT/average.safetensors (multrace.tracing.AverageTrace.load) and OUT/average.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Trace`."""
    add_options(parser, Trace)


def run(options: argparse.Namespace) -> int:
    """Traces one question, or every record of a file; writes traces and maps, prints effects and causal blocks."""
    settings = read(Trace, options)
    settings.check()
    return trace_records(settings) if settings.question is None else _trace_one(settings)


def _trace_one(settings: Trace) -> int:
    settings.check_question()
    corruption = settings.corruption()
    check_files(settings.out, FILES)
    vlm = settings.open_model()
    prompt = settings.prompt(vlm)
    trace = settings.trace(vlm, prompt, corruption, folder=settings.out)
    written = write_trace(trace, prompt, settings.out)
    settings.forget_cells(settings.out)
    print(*summary(trace), sep="\n")
    print("written:", ", ".join(map(str, written)))
    return 0
