"""Suppression of transformers' log lines and progress bars, since failures are reported by errors of this package."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers log errors only, and draw bars only if stderr is a terminal; restore both settings on exit."""
    level, hub_had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    hides_bars = logging.is_progress_bar_enabled() and not is_terminal(sys.stderr)
    try:
        logging.set_verbosity(max(level, logging.ERROR))
        if hides_bars:
            logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(level)
        if hides_bars:
            logging.enable_progress_bar()  # also enables the hub's progress bars
            if not hub_had_bars:
                disable_progress_bars()


def is_terminal(stream: Any) -> bool:
    """Return whether text written to the stream appears on a terminal; False if the stream is None or cannot tell."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):  # a logger in place of a stream has no isatty; a closed one raises
        return False
