"""Sweeps that are interrupted and go on, and sweeps that run out of memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from model_fixtures import draw_photo
from multrace import Prompt, VisionLanguageModel
from multrace.artefacts import ArtefactError
from multrace.models.replay import Replay
from multrace.tracing import (
    AttentionKnockout,
    CausalTrace,
    ImageNoise,
    TextNoise,
    TraceError,
    attention_knockout,
    causal_trace,
)
from multrace.tracing.engine import Engine, plain as plain_way
from torch import Tensor

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
SMALL = Engine(name="replay", memory=1, tokens_per_call=200, checks=0)
SAMPLES = 10
ROWS = ("image_rows", "question", "constraint", "last", 0)
WHOLE = {"answer": "Ada Example", "foil": "Oslo and Kyoto", "whole_answer": True, "metrics": "logit_difference"}


@pytest.fixture(scope="module")
def prompt(random_llava_llama: VisionLanguageModel) -> Prompt:
    return random_llava_llama.prompt(draw_photo(1), QUESTION, constraint=CONSTRAINT)


def trace(vlm: VisionLanguageModel, prompt: Prompt, engine: Engine, **settings: object) -> CausalTrace:
    settings = {"corruption": ImageNoise(samples=SAMPLES), "positions": ROWS, "even_if_weak": True} | settings
    return causal_trace(vlm, prompt, engine=engine, progress=False, **settings)


def alike(first: CausalTrace, second: CausalTrace) -> bool:
    """Bit for bit."""
    return all(torch.equal(first.samples[kind], second.samples[kind]) for kind in first.kinds)


def watched(run: Callable[..., Tensor], patcher: pytest.MonkeyPatch, stop: int | None = None) -> list[int]:
    """List the layers that sweeps call from then on; interrupt at a call of this number."""
    calls: list[int] = []

    def layer(self: Replay, number: int, *arguments: object) -> Tensor:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(number)
        return run(self, number, *arguments)

    patcher.setattr(Replay, "layer", layer)
    return calls


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    return partial(watched, Replay.layer, monkeypatch)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A trace that nothing interrupts, and how many calls of layers it takes."""

    settings: dict[str, object]
    trace: CausalTrace
    calls: int


@pytest.fixture(scope="module", params=[{}, WHOLE], ids=["one sequence", "answer and foil"])
def whole(request: pytest.FixtureRequest, random_llava_llama, prompt) -> Whole:
    with pytest.MonkeyPatch.context() as patcher:
        calls = watched(Replay.layer, patcher)
        result = trace(random_llava_llama, prompt, SMALL, **request.param)
    return Whole(settings=request.param, trace=result, calls=len(calls))


@pytest.fixture(scope="module")
def checkpoint(random_llava_llama, prompt, tmp_path_factory) -> bytes:
    """The file that a finished trace leaves."""
    path = tmp_path_factory.mktemp("finished") / "cells"
    trace(random_llava_llama, prompt, replace(SMALL, checkpoint=path))
    return path.read_bytes()


# Interrupted.


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_an_interrupted_trace_goes_on_to_the_same_scores(random_llava_llama, prompt, tmp_path, watch, share, whole):
    kept, expected = replace(SMALL, checkpoint=str(tmp_path / "new folder" / "cells")), whole.trace
    with pytest.raises(KeyboardInterrupt):
        watch(int(share * whole.calls))
        trace(random_llava_llama, prompt, kept, **whole.settings)
    assert kept.checkpoint.exists()
    rest = watch()
    found = trace(random_llava_llama, prompt, kept, **whole.settings)
    assert alike(found, expected)
    assert (found.clean, found.engine.cells) == (expected.clean, expected.engine.cells)
    assert len(rest) <= whole.calls * (1.2 - share)
    assert (found.engine.token_layers < expected.engine.token_layers) == (share > 0)
    nothing = watch()
    assert alike(trace(random_llava_llama, prompt, kept, **whole.settings), expected)
    assert nothing == []  # all cells were there


def test_the_plain_way_goes_on_too(random_llava_llama, prompt, tmp_path, monkeypatch):
    plain = Engine(name="plain")
    kept = replace(plain, checkpoint=tmp_path / "cells")
    whole = trace(random_llava_llama, prompt, plain)
    run, calls = plain_way.run_scores, []

    def stopping(*arguments: object) -> Tensor:
        calls.append(arguments)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(plain_way, "run_scores", stopping)
    with pytest.raises(KeyboardInterrupt):
        trace(random_llava_llama, prompt, kept)
    assert kept.checkpoint.exists()
    resumed = trace(random_llava_llama, prompt, kept)
    assert alike(resumed, whole)
    assert len(calls) == 7 + whole.engine.cells - 6  # the six that were finished are not computed again


FLOWS = ("image -> last", "question -> last", "image -> question", "last -> last", "constraint -> question")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_an_interrupted_knockout_goes_on_to_the_same_scores(random_llava_llama, prompt, tmp_path, watch, share):
    kept = replace(SMALL, checkpoint=tmp_path / "cells")

    def cut(engine: Engine) -> AttentionKnockout:
        return attention_knockout(random_llava_llama, prompt, flows=FLOWS, windows=2, engine=engine, progress=False)

    calls = watch()
    whole = cut(SMALL)
    with pytest.raises(KeyboardInterrupt):
        watch(int(share * len(calls)))
        cut(kept)
    assert kept.checkpoint.exists()
    rest = watch()
    found = cut(kept)
    assert torch.equal(found.probabilities, whole.probabilities)
    assert len(rest) <= len(calls) * (1.4 - share)
    assert (found.engine.token_layers < whole.engine.token_layers) == (share > 0)
    nothing = watch()
    assert torch.equal(cut(kept).probabilities, whole.probabilities)
    assert nothing == []  # all cells were there
    with pytest.raises(TraceError, match="holds cells of another trace"):
        trace(random_llava_llama, prompt, kept)


def test_a_plain_knockout_goes_on_too(random_llava_llama, prompt, tmp_path, monkeypatch):
    kept = Engine(name="plain", checkpoint=tmp_path / "cells")
    run, calls = plain_way.run_scores, []

    def cut() -> AttentionKnockout:
        return attention_knockout(random_llava_llama, prompt, flows=FLOWS, windows=2, engine=kept, progress=False)

    def stopping(*arguments: object) -> Tensor:
        calls.append(arguments)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(plain_way, "run_scores", stopping)
    with pytest.raises(KeyboardInterrupt):
        cut()
    found = cut()
    assert len(calls) == 7 + found.engine.cells - 6  # the six that were finished are not computed again
    kept.checkpoint.unlink()
    assert torch.equal(cut().probabilities, found.probabilities)


def test_without_a_checkpoint_nothing_is_kept(random_llava_llama, prompt, watch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = watch()
    trace(random_llava_llama, prompt, SMALL)
    with pytest.raises(KeyboardInterrupt):
        watch(len(calls) - 1)
        trace(random_llava_llama, prompt, SMALL)
    again = watch()
    trace(random_llava_llama, prompt, SMALL)
    assert again == calls
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other",
    [
        {"sites": "mlp"},
        {"positions": "last"},
        {"corruption": ImageNoise(samples=SAMPLES, seed=2)},
        {"answer": "tennis"},
        {"direction": "corrupt"},
    ],
    ids=str,
)
def test_the_checkpoint_of_another_trace_is_refused(random_llava_llama, prompt, checkpoint, tmp_path, other):
    path = tmp_path / "cells"
    path.write_bytes(checkpoint)
    with pytest.raises(TraceError, match="holds cells of another trace .* or name another file"):
        trace(random_llava_llama, prompt, replace(SMALL, checkpoint=path), **other)
    assert path.read_bytes() == checkpoint


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def made_empty(path: Path) -> None:
    path.write_bytes(b"")


def made_text(path: Path) -> None:
    path.write_text("not a checkpoint at all, but long enough to have a header")


@pytest.mark.parametrize("damage", [cut_short, made_empty, made_text])
def test_a_damaged_checkpoint_is_refused_and_left_alone(random_llava_llama, prompt, checkpoint, tmp_path, damage):
    path = tmp_path / "cells"
    path.write_bytes(checkpoint)
    damage(path)
    content = path.read_bytes()
    with pytest.raises(ArtefactError, match=r"cells.*is not a readable safetensors file"):
        trace(random_llava_llama, prompt, replace(SMALL, checkpoint=path))
    assert path.read_bytes() == content


def test_a_saved_trace_is_no_checkpoint(random_llava_llama, prompt, tmp_path):
    path = trace(random_llava_llama, prompt, SMALL).save(tmp_path / "trace.safetensors")
    with pytest.raises(ArtefactError, match="holds 'multrace causal trace"):
        trace(random_llava_llama, prompt, replace(SMALL, checkpoint=path))


# Out of memory.


def real_error() -> RuntimeError:
    """What torch raises here where the machine has no such memory."""
    try:
        torch.empty(2**57, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has more memory than there is")


ERRORS = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9999 bytes."),
    "Python": MemoryError(),
    "here": real_error(),
}


def limited(run: Callable[..., Tensor], most: int, error: BaseException) -> Callable[..., Tensor]:
    """The method, failing where more rows come."""

    def call(self: Replay, *arguments: object) -> Tensor:
        (states,) = (each for each in arguments if isinstance(each, Tensor))
        if len(states) > most:
            raise error
        return run(self, *arguments)

    return call


@pytest.fixture
def only_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """A machine on which at most so many rows go through a layer together."""

    def limit(most: int, error: BaseException) -> None:
        for name in ("layer", "last_layer"):
            monkeypatch.setattr(Replay, name, limited(getattr(Replay, name), most, error))

    return limit


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_batch_that_does_not_fit_is_halved(exact_llava, photo, only_rows, error):
    prompt, engine = exact_llava.prompt(photo, QUESTION, constraint=CONSTRAINT), Engine(name="replay", checks=0)
    whole = trace(exact_llava, prompt, engine, positions=("constraint", "last"))
    only_rows(40, error)
    found = trace(exact_llava, prompt, engine, positions=("constraint", "last"))
    assert whole.engine.halvings == 0 < found.engine.halvings
    assert f"batch halved {found.engine.halvings} times" in found.engine.summary()
    for kind in whole.kinds:
        assert torch.allclose(found.samples[kind], whole.samples[kind], rtol=0, atol=1e-12)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_memory_that_does_not_suffice_for_one_cell_is_an_error_that_says_so(
    random_llava_llama, prompt, only_rows, error
):
    only_rows(2, error)
    found = trace(random_llava_llama, prompt, SMALL, corruption=TextNoise(samples=2))  # that much fits
    assert found.engine.halvings > 0
    with pytest.raises(TraceError, match=r"for a single cell \(\d+ tokens, 3 samples\); trace with fewer samples"):
        trace(random_llava_llama, prompt, SMALL, corruption=TextNoise(samples=3))


def test_other_errors_are_no_lack_of_memory(random_llava_llama, prompt, only_rows):
    only_rows(40, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trace(random_llava_llama, prompt, Engine(name="replay", checks=0))
