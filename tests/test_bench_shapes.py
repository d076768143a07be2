"""The benchmark's models beside LLaVA: Qwen-VL's positions on three axes and DeepStack, the same numbers in every way.

The code of the usual ways calls layers and hooks by hand, so it is the first to lose what a run has beside embeddings.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from multrace.models.frame import DecoderInput
from multrace.models.replay.replay import Replay
from multrace.scripts.benchmarks import (
    SHAPES,
    MomentCase,
    Recipe,
    Subject,
    ValueCase,
    frozen_states,
    make_cases,
    make_flow_cases,
    measure_flow,
    model_config,
    open_subject,
    resized,
    run_naive,
    run_strong,
    run_sweep,
    write_model,
)
from multrace.scripts.main import app
from multrace.tracing.engine import Engine, Runs
from multrace.tracing.engine.measure import sweep
from torch.overrides import TorchFunctionMode

TINY = ("qwen2.5-vl-tiny", "qwen3-vl-tiny")


@pytest.fixture(scope="module", params=TINY)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    shape = SHAPES[request.param]
    folder = write_model(shape, tmp_path_factory.mktemp("shape"), seed=0, device=torch.device("cpu"))
    return open_subject(Recipe(folder=folder, shape=shape, device=None, seed=0, samples={"text": 3, "image": 2}))


def probability(subject: Subject, entering: DecoderInput) -> float:
    with torch.no_grad():
        return float(subject.measure(subject.vlm.forward(entering)[:, -1:])[0, 0])


def test_the_prompt_has_the_tokens_of_its_shape(subject: Subject):
    prompt, shape = subject.prompt, subject.recipe.shape
    assert prompt.length == shape.tokens == 4 + 16 + 28
    assert prompt.groups["image"] == tuple(shape.image_positions)
    assert prompt.groups["question"] == tuple(range(20, 48))
    assert prompt.groups["constraint"] == tuple(range(21, 29))
    assert (prompt.tokens[3], prompt.tokens[20]) == ("<|vision_start|>", "<|vision_end|>")
    assert len({(patch.row, patch.column) for patch in prompt.patches}) == 16


def test_the_answer_needs_positions_on_three_axes(subject: Subject):
    clean = subject.vlm.embed(subject.prompt)
    assert clean.frame.keywords["position_ids"].shape[0] >= 3
    assert probability(subject, clean) == pytest.approx(0.5, abs=1e-4)
    assert abs(probability(subject, DecoderInput(embeddings=clean.embeddings)) - 0.5) > 1e-3


def test_all_three_ways_of_tracing_agree(subject: Subject):
    for case in make_cases(subject.recipe.shape)[3::2]:  # windows, every kind of site, groups, direct effects
        runs = subject.runs(case.corruption)
        cells = case.cells[1 :: max(1, len(case.cells) // 3) | 1]  # an odd step, since layers take turns
        with torch.no_grad():
            plain = run_strong(subject, runs, cells)
            naive = run_naive(subject, runs, cells, frozen_states(subject, runs, cells))
            swept = run_sweep(subject, runs, cells)
        assert swept.report.engine == "replay"
        torch.testing.assert_close(naive, plain, rtol=0, atol=2e-5, msg=case.label)
        torch.testing.assert_close(swept.scores, plain, rtol=0, atol=2e-5, msg=case.label)
        assert float((plain - swept.base).abs().max()) > 1e-4, case.label  # and restoring does something


def test_all_three_ways_of_knockout_agree(subject: Subject):
    cases = make_flow_cases(subject.recipe.shape, (2,))
    for case in (cases[2], cases[-1]):
        with torch.no_grad():
            row = measure_flow(subject, case, timed_cells=2)
        assert max(row.max_abs_diff, row.max_abs_diff_published) < 2e-5
        assert row.largest_effect > 1e-2
    assert row.saving is not None
    assert row.saving.max_abs_diff < 2e-5


class Reads(TorchFunctionMode):
    """Counts what makes the CPU wait for a tensor's device, as it would if the model were on a card."""

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "__bool__", "__float__", "__int__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        by_list = any(isinstance(each, list) for each in (index if isinstance(index, tuple) else (index,)))
        self.count += name in self.NAMES or by_list or name == "tensor" and kwargs.get("device") is not None
        return function(*args, **kwargs)


def test_reads_are_counted():
    with Reads() as reads:
        values = torch.tensor([1.0, 2.0])
        assert reads.count == 0
        _ = bool(values.sum()), values[[0]], torch.tensor([1], device="cpu"), values[:1], values.sum() + 1
    assert reads.count == 3


def test_no_layer_call_waits_for_the_device(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    """Only the first call of a span may, where what its positions see is decided, on the CPU in any case."""
    known, later = [], []

    def counting(call: Callable) -> Callable:
        def counted(replay: Replay, *arguments: Any) -> torch.Tensor:
            span = next(getattr(each, "span", each) for each in arguments if hasattr(each, "sources"))
            with Reads() as reads:
                result = call(replay, *arguments)
            key = span, call.__name__
            if any(key[0] is each[0] and key[1] == each[1] for each in known):
                later.append(reads.count)
            known.append(key)
            return result

        return counted

    for name in ("layer", "last_layer"):
        monkeypatch.setattr(Replay, name, counting(getattr(Replay, name)))
    for case in (make_cases(subject.recipe.shape)[0], make_cases(subject.recipe.shape)[6]):
        run_sweep(subject, subject.runs(case.corruption), case.cells)
    assert len(later) > 20
    assert set(later) == {0}
    later.clear()
    entering = subject.vlm.embed(subject.prompt)
    for case in make_flow_cases(subject.recipe.shape, (2,)):
        run = Runs.of_one(entering, scored=(subject.prompt.length - 1,))
        sweep(subject.vlm, run, case.cells, subject.measure, settings=Engine(checks=0))
    assert later.count(0) > 0.8 * len(later)  # a later layer may be the first in which some cut has a part to itself


@pytest.mark.parametrize(
    "case",
    [
        ValueCase(label="values", layer=1, token="constraint_last", facts=2, timed_facts=2, steps=3),
        MomentCase(label="moments", prompts=2, batch_size=2),
    ],
    ids=["values", "moments"],
)
def test_both_ways_of_editing_agree(subject: Subject, case: ValueCase | MomentCase):
    row = case.measure(subject)
    assert row.difference < 2e-5
    assert row.work < row.work_usual


@pytest.mark.parametrize(
    ("name", "sizes", "image"),
    [
        ("qwen2.5-vl-7b", (28, 3584, 18944, 28, 4, 152064, 32, 1280, 3420, [16, 24, 24]), 672),
        ("qwen3-vl-8b", (36, 4096, 12288, 32, 8, 151936, 27, 1152, 4304, [16, 24, 24]), 768),
    ],
)
def test_the_large_shapes_have_the_sizes_of_their_models(name: str, sizes: tuple, image: int):
    shape = SHAPES[name]
    settings = model_config(shape).to_dict()
    text, vision = settings["text_config"], settings["vision_config"]
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    found = tuple(text[each] for each in (*names, "vocab_size"))
    found += tuple(vision[each] for each in ("depth", "hidden_size", "intermediate_size"))
    assert (*found, text["rope_parameters"]["mrope_section"]) == sizes
    assert (shape.image, shape.dtype, len(shape.image_positions)) == (image, "bfloat16", 576)


def test_a_smaller_width_keeps_the_size_of_heads():
    small = resized(SHAPES["qwen2.5-vl-7b"], layers=2, width=512)
    assert (small.heads, small.heads_per_key, small.axes) == (4, 1, (16, 24, 24))
    assert resized(SHAPES["qwen2.5-vl-7b"], width=1792).heads_per_key == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("trace", ("--cells", "blocks")),
        ("flow", ("--flows", "question and")),
        ("edit", ("--rows", "lower third, last")),
    ],
)
def test_the_commands_run_in_processes_of_their_own(command: str, rows: tuple[str, str], tmp_path: Path):
    path = tmp_path / "bench.json"
    assert app(["bench", command, "--quick", "--shape", TINY[0], *rows, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert (written["shape"]["architecture"], len(written["rows"])) == ("qwen2_5_vl", 1)
