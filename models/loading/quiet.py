"""Transformers without its chatter: what a failed load has to say is one error of ours."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers logs errors only, and draws bars only where stderr is a terminal; on exit, both as before."""
    level, hub_had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    hides_bars = logging.is_progress_bar_enabled() and not on_terminal
    try:
        logging.set_verbosity(max(level, logging.ERROR))
        if hides_bars:
            logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(level)
        if hides_bars:
            logging.enable_progress_bar()  # switches the hub's on as well
            if not hub_had_bars:
                disable_progress_bars()
