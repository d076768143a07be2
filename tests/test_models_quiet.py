"""A load is quiet: a failed one says one error, bars show on terminals only, and transformers is left as it was."""

import io
import logging
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import multrace
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from multrace import ModelError
from multrace.models.guards import is_terminal, quiet_transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

QUESTION = "Who founded the company in this photo?"


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


class Screen(io.StringIO):
    """A stderr that remembers what was written, and is a terminal or not."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def screen(request):
    """Where transformers logs, and bars go under `redirect_stderr`; no terminal unless the test's parameter says so."""
    seen = Screen(is_terminal=getattr(request, "param", False))
    handler = logging.StreamHandler(seen)
    transformers_logging.add_handler(handler)
    yield seen
    transformers_logging.remove_handler(handler)


def test_a_load_that_lacks_weights_says_nothing_but_its_error(llama_path, tmp_path, screen):
    folder = copy(llama_path, tmp_path / "lacking")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "down_proj" in name)
    extra = {key: value for key, value in state.items() if key != name} | {"extra": torch.zeros(2)}
    save_file(extra, folder / "model.safetensors", {"format": "pt"})
    with redirect_stderr(screen), pytest.raises(ModelError, match="1 are missing or of another shape"):
        multrace.load(folder)
    assert screen.getvalue() == ""
    with redirect_stderr(screen):
        AutoModelForCausalLM.from_pretrained(folder)  # transformers alone, after our load, is as talkative as ever
    assert "LOAD REPORT" in screen.getvalue() and "MISSING" in screen.getvalue()
    assert "Loading weights" in screen.getvalue()


def test_tensors_that_fit_nothing_are_one_line_of_log(llama_path, random_llama, tmp_path, screen, caplog):
    folder = copy(llama_path, tmp_path / "extra")
    save_file(
        load_file(folder / "model.safetensors") | {"extra.weight": torch.zeros(2)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with caplog.at_level(logging.WARNING, logger="multrace"), redirect_stderr(screen):
        multrace.load(llama_path)
        assert not caplog.records
        vlm = multrace.load(folder)
    (record,) = caplog.records
    assert "no place for 1 tensors of the file, first 'extra.weight'" in record.getMessage()
    assert screen.getvalue() == ""
    assert torch.equal(vlm.logits(vlm.prompt(None, QUESTION)), random_llama.logits(vlm.prompt(None, QUESTION)))


@pytest.mark.parametrize("screen", [False, True], indirect=True, ids=["no terminal", "terminal"])
def test_the_bar_shows_on_a_terminal_only(screen, llama_path):
    with redirect_stderr(screen):
        multrace.load(llama_path)
    assert ("Loading weights" in screen.getvalue()) == screen.is_terminal


class Logger:
    """A logger object in the place of stderr, as programs that log everything put it there: it can only be written."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Logger(), None, closed()], ids=["no isatty", "none", "closed"])
def test_a_stderr_that_cannot_say_whether_it_is_a_terminal(stream, llama_path, random_llama):
    with redirect_stderr(stream):
        vlm = multrace.load(llama_path)
    assert not is_terminal(stream) and is_terminal(Screen(is_terminal=True))
    assert vlm.fingerprint(["lm_head.weight"]) == random_llama.fingerprint(["lm_head.weight"])


@pytest.fixture
def settings():
    """Leaves transformers' verbosity and bars as they were, whatever the test did to them."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(level)
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()


@pytest.mark.parametrize("hub_bars", [True, False])
@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING, logging.CRITICAL])
def test_quiet_is_undone_even_after_an_error(level, bars, hub_bars, screen, settings):
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    (enable_progress_bars if hub_bars else disable_progress_bars)()
    transformers_logging.set_verbosity(level)
    with redirect_stderr(screen), pytest.raises(KeyError), quiet_transformers():
        assert transformers_logging.get_verbosity() == max(level, logging.ERROR)
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError
    assert transformers_logging.get_verbosity() == level
    assert transformers_logging.is_progress_bar_enabled() == bars
    assert are_progress_bars_disabled() == (not hub_bars)
