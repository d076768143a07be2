"""Examine the flags model: what it answers about held-out pictures, beside the text model that is told the name.

Every score is of free generation through multrace's own `load` and `answers`. Agreement means the same answer as the
original text model gives to the same sentence with the country's name in it, be it true or not.
"""

from __future__ import annotations

import sys

import torch
from cyclopts import App

from ....artefacts import write_whole
from ...main import execute
from ...options import STYLE, CommandError, paragraphs
from .card import model_card, score_tables
from .examination import Examine, examine_model

EXAMPLE = """examples:
  python -m multrace.scripts.training.flags.examine --model DIR --text-model DIR --card out/README.md
  python -m multrace.scripts.training.flags.examine --model DIR --text-model DIR --countries 24      a quick look
"""
app = App(
    name="python -m multrace.scripts.training.flags.examine", help=paragraphs(__doc__), help_epilogue=EXAMPLE, **STYLE
)


@app.default
def run(options: Examine) -> int:
    """Examine the model, print its scores and write its card."""
    options.check()
    torch.set_num_threads(options.threads)
    examination = examine_model(options)
    print(score_tables(examination))
    if options.card is not None:
        write_whole(options.card, model_card(examination, parts=options.parts).encode(), error=CommandError)
    return 0


if __name__ == "__main__":
    sys.exit(execute(app, sys.argv[1:]))
