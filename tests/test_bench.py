"""The benchmark: models of a shape, the field's way against the plain one, what is counted, peaks, and the command."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace.models import Site
from multrace.scripts import CommandError
from multrace.scripts.benchmarks import (
    SHAPES,
    Case,
    Recipe,
    Shape,
    Subject,
    TimingRow,
    chosen_cases,
    confident,
    describe_machine,
    describe_row,
    frozen_states,
    in_new_process,
    layer_cost,
    machine_facts,
    make_cases,
    matrix_rate,
    measure_row,
    naive_peak,
    open_subject,
    peak_mb,
    run_naive,
    run_strong,
    run_sweep,
    table,
    write_model,
)
from multrace.scripts.main import app
from multrace.tracing.engine import StateCell

CPU = torch.device("cpu")
SHAPE = Shape(
    layers=4, width=32, mlp=48, heads=2, vision_layers=2, vision_width=16, vision_heads=2, vocabulary=120, image=56
)
CASES = {case.label: case for case in make_cases(SHAPE)}
TEXT = "text tokens, hidden, window 1"
TEXT_CELL = replace(CASES[TEXT], cells=CASES[TEXT].cells[-2:])
LABELS = [  # as they stand in the JSON
    *(f"text tokens, {kind}, window 1" for kind in ("hidden", "mlp", "attention")),
    *(f"text tokens, {kind}, window 10" for kind in ("mlp", "attention")),
    "question tokens under image corruption, hidden and mlp, window 1",
    "last token under image corruption, every kind, windows 1 and 10",
    "all image tokens as one group, hidden, window 1",
    "the question as one group, hidden and mlp, window 1",
    "image blocks of 64 tokens, hidden, window 1",
    "single patches, mlp, window 10",
    "every single patch, direct effect, hidden, window 1",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = write_model(SHAPE, tmp_path_factory.mktemp("shape"), seed=0, device=CPU)
    return Recipe(folder=folder, shape=SHAPE, device=None, seed=0, samples={"text": 3, "image": 2})


@pytest.fixture(scope="module")
def subject(recipe: Recipe) -> Subject:
    return open_subject(recipe)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def scores(subject: Subject, embeddings: torch.Tensor) -> torch.Tensor:
    return subject.measure(subject.vlm.forward(embeddings)[:, -1:])[:, 0]


# ---- the model and its prompt ----


def test_the_prompt_has_the_tokens_of_its_shape(subject: Subject):
    groups = subject.prompt.groups
    assert subject.prompt.length == SHAPE.tokens == 4 + 16 + 28
    assert groups["image"] == tuple(SHAPE.image_positions)
    assert groups["question"] == tuple(range(20, 48))
    assert groups["constraint"] == tuple(range(20, 28))
    assert groups["last"] == (47,)
    assert len(set(subject.prompt.inputs["input_ids"][0, 20:].tolist())) == 28


def test_the_model_has_the_sizes_of_its_shape(subject: Subject):
    vlm = subject.vlm
    assert (vlm.layers, vlm.hidden, vlm.mlp, vlm.heads, vlm.dtype) == (4, 32, 48, 2, torch.float32)


def test_the_base_shape_is_the_one_that_figures_are_known_for():
    shape = SHAPES["base"]
    assert (shape.layers, shape.width, shape.mlp, shape.heads, shape.tokens) == (16, 512, 1376, 8, 608)
    assert (shape.vision_layers, shape.vision_width, shape.constraint, shape.after) == (4, 256, 8, 28)
    shape = SHAPES["llava-7b"]
    assert (shape.layers, shape.width, shape.mlp, shape.heads, shape.tokens) == (32, 4096, 11008, 32, 608)


def test_the_clean_answer_is_as_likely_as_not_and_noise_is_felt(subject: Subject):
    for corruption, samples in subject.recipe.samples.items():
        runs = subject.runs(corruption)
        assert float(scores(subject, runs.source)) == pytest.approx(0.5, abs=1e-4)
        damaged = scores(subject, runs.base)
        assert len(damaged) == samples
        assert float((damaged - 0.5).abs().max()) > 0.01


def test_confidence_is_a_matter_of_scale():
    logits = torch.tensor([1.0, 0.9, 0.2, -3.0], dtype=torch.float64)
    factor = confident(logits)
    assert float((factor * logits).softmax(-1).max()) == pytest.approx(0.5, abs=1e-9)
    assert float(logits.softmax(-1).max()) < 0.45


def test_noise_falls_on_the_constraint_or_on_the_picture(subject: Subject):
    for corruption, group in (("text", "constraint"), ("image", "image")):
        runs = subject.runs(corruption)
        changed = (runs.base.embeddings != runs.source.embeddings).any(-1).any(0).nonzero().flatten()
        assert tuple(changed.tolist()) == subject.prompt.groups[group]


def test_a_subject_opened_again_is_the_same(subject: Subject, recipe: Recipe):
    again = open_subject(recipe)
    assert again.runs("text").base.equals(subject.runs("text").base)
    assert torch.equal(scores(again, again.runs("text").base), scores(subject, subject.runs("text").base))
    other = open_subject(replace(recipe, seed=1))  # the same weights, another prompt and other noise
    assert not other.runs("text").base.equals(subject.runs("text").base)


# ---- the three ways ----


def test_all_three_ways_agree_on_every_sort_of_cell(subject: Subject):
    for label, case in CASES.items():
        runs = subject.runs(case.corruption)
        cells = case.cells[:: max(1, len(case.cells) // 7)]
        plain = run_strong(subject, runs, cells)
        naive = run_naive(subject, runs, cells, frozen_states(subject, runs, cells))
        swept = run_sweep(subject, runs, cells)
        torch.testing.assert_close(naive, plain, rtol=0, atol=2e-5, msg=label)
        torch.testing.assert_close(swept.scores, plain, rtol=0, atol=2e-5, msg=label)
        assert float((plain - swept.base).abs().max()) > 1e-4, label  # and restoring does something


def test_the_naive_way_changes_nothing_where_it_restores_nothing(subject: Subject):
    runs = subject.runs("text")
    cell = StateCell(kind="hidden", first=1, last=1, positions=())
    found = run_naive(subject, runs, [cell], {})
    torch.testing.assert_close(found[0, 0], scores(subject, runs.base), rtol=0, atol=1e-5)
    everything = replace(cell, positions=tuple(range(SHAPE.tokens)))
    torch.testing.assert_close(
        run_naive(subject, runs, [everything], {})[0, 0], torch.full((3,), 0.5).double(), rtol=0, atol=1e-4
    )


def test_direct_effects_of_the_naive_way_are_not_total_ones(subject: Subject):
    runs, case = subject.runs("image"), CASES[LABELS[-1]]
    direct = [cell for cell in case.cells if cell.first == 1][:6]
    total = [replace(cell, is_direct=False) for cell in direct]
    states = frozen_states(subject, runs, direct)
    assert len(states) == SHAPE.layers
    assert not torch.allclose(
        run_naive(subject, runs, direct, states), run_naive(subject, runs, total, {}), rtol=0, atol=1e-6
    )
    assert frozen_states(subject, runs, total) == {}


def test_no_hook_is_left_behind(subject: Subject):
    runs = subject.runs("text")
    before = scores(subject, runs.base)
    run_naive(subject, runs, CASES[TEXT].cells[-3:], {})
    assert torch.equal(scores(subject, runs.base), before)


# ---- the rows of the table ----


def test_the_table_has_its_rows():
    assert [case.label for case in make_cases(SHAPES["base"])] == LABELS


def test_cells_are_what_their_labels_say():
    shape = SHAPES["base"]
    cases = {case.label: case for case in make_cases(shape)}
    assert {label: len(case.cells) for label, case in cases.items()} == dict(
        zip(LABELS, [*[32 * 16] * 5, 2 * 28 * 16, 5 * 16, 16, 2 * 16, 9 * 4, 12 * 4, 576 * 4], strict=True)
    )
    wide = [cell for cell in cases[LABELS[3]].cells if cell.positions == (0,)]
    assert [(cell.first, cell.last) for cell in wide][:7] == [(0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 9), (1, 10)]
    assert (wide[-1].first, wide[-1].last) == (10, 15)
    assert cases[LABELS[7]].cells[3].positions == tuple(range(4, 580))
    assert cases[LABELS[8]].cells[0].positions == tuple(range(580, 608))
    assert [cell.positions for cell in cases[LABELS[6]].cells] == [(607,)] * 80
    assert {len(cell.positions) for cell in cases[LABELS[9]].cells} == {64}
    assert {cell.is_direct for cell in cases[LABELS[11]].cells} == {True}
    assert not any(cell.is_direct for label in LABELS[:11] for cell in cases[label].cells)
    assert [case.corruption for case in cases.values()] == ["text"] * 5 + ["image"] * 7


def test_rows_are_chosen_by_words_of_their_labels():
    cases = make_cases(SHAPES["base"])
    assert [case.label for case in chosen_cases(cases, ["text tokens", "direct"])] == [*LABELS[:5], LABELS[-1]]
    assert chosen_cases(cases, ()) == cases
    with pytest.raises(CommandError, match="no row of the table holds 'sound'; the rows are: text tokens, hidden"):
        chosen_cases(cases, ["sound"])


# ---- what is counted ----


@pytest.fixture(scope="module")
def row(subject: Subject) -> TimingRow:
    return measure_row(subject, CASES[TEXT], timed_cells=2)


def test_a_row_counts_cells_and_work(row: TimingRow, subject: Subject):
    # Nothing is corrupted before the picture, and a restored state of the last layer needs no layer to act.
    assert (row.computed_cells, row.free_cells) == (28 * 3, 4 * 4 + 28)
    whole = row.computed_cells * 3 * SHAPE.tokens * SHAPE.layers
    assert row.ratio_token_layers == pytest.approx(whole / row.token_layers)
    assert row.ratio_token_layers_naive == pytest.approx(row.ratio_token_layers * 4 / 3)
    assert row.ratio_token_layers_recorded == pytest.approx(whole / (row.token_layers + row.recording_token_layers))
    assert row.recording_token_layers >= SHAPE.tokens * SHAPE.layers
    # Nothing but the suffix is computed, from the layer after the cell on, with only the last token in the last layer.
    suffixes = sum(range(1, 29)) * sum(SHAPE.layers - 2 - layer for layer in range(SHAPE.layers - 1))
    assert 0 < row.token_layers <= 3 * (suffixes + row.computed_cells)
    assert row.ratio_token_layers > 4 * SHAPE.tokens * SHAPE.layers / (29 * (SHAPE.layers - 1))
    assert row.flops >= row.token_layers * layer_cost(subject.vlm).token


def test_seconds_and_ratios_fit_together(row: TimingRow):
    assert row.seconds > 0
    assert row.recording_seconds > 0
    assert row.seconds_per_cell * row.computed_cells == pytest.approx(row.seconds)
    assert row.ratio_strong == pytest.approx(row.seconds_per_cell_strong / row.seconds_per_cell)
    assert row.ratio_naive == pytest.approx(row.seconds_per_cell_naive / row.seconds_per_cell)
    assert row.share_of_rate * row.times_counted_work == pytest.approx(1)
    assert row.share_of_rate == pytest.approx(row.flops / row.seconds / (row.matrix_gflops * 1e9))


def test_a_row_says_how_far_the_ways_are_apart(row: TimingRow):
    assert row.timed_cells == 2
    assert row.max_abs_diff < 2e-5
    assert row.max_abs_diff_naive < 2e-5
    assert row.plain_noise < 2e-5
    assert row.largest_effect > 0.01


def test_free_cells_raise_no_ratio(subject: Subject, row: TimingRow):
    image = set(subject.prompt.groups["image"])
    cells = [cell for cell in CASES[TEXT].cells if min(cell.positions) > max(image)]
    fewer = measure_row(subject, Case(label="without", corruption="text", cells=tuple(cells)), timed_cells=1)
    assert (fewer.computed_cells, fewer.free_cells) == (row.computed_cells, row.free_cells - 16)
    assert fewer.ratio_token_layers == row.ratio_token_layers


def test_a_layer_costs_two_operations_per_weight(subject: Subject):
    cost = layer_cost(subject.vlm)
    assert cost.token == 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert cost.key_values == 2 * 2 * 32 * 32
    assert cost.pair == 4 * 32
    assert cost.read == 2 * 32 * 120
    layer = subject.vlm.module(Site("hidden", 0))
    assert sum(weight.numel() for weight in layer.parameters()) - cost.token / 2 == 2 * 32  # the norms


def test_the_rate_is_that_of_the_machine(subject: Subject):
    assert math.isfinite(rate := matrix_rate(subject.vlm.down_projection(0)))
    assert rate > 1e6


def test_a_row_in_words(row: TimingRow):
    facts = machine_facts("cpu") | {"shape": {"layers": 4, "width": 32, "mlp": 48, "heads": 2} | vars(SHAPE)}
    assert f"{torch.get_num_threads()} threads" in describe_machine(facts)[0]
    said = "\n".join(describe_row(row))
    assert said.startswith(f"{TEXT}: 84 cells computed, 44 free, 3 samples")
    assert "peak memory" not in said
    assert "peak memory   7 MiB; strong 8, naive 9" in "\n".join(
        describe_row(replace(row, peak_mb=7, peak_mb_strong=8, peak_mb_naive=9))
    )
    head, line = table([row])
    assert line.startswith(TEXT)
    assert line.index(f"{row.ratio_token_layers:.1f}x") == head.index("token-layers")


# ---- peaks ----


def test_a_peak_does_not_count_what_the_parent_holds():
    held = torch.ones(600, 2**18)
    assert peak_mb(CPU) > 600
    assert 50 < in_new_process(peak_mb, CPU) < peak_mb(CPU) - 300
    del held


@pytest.mark.slow
def test_a_peak_grows_with_what_is_held(recipe: Recipe):
    few, many = (
        in_new_process(naive_peak, replace(recipe, samples={"text": count, "image": 1}), TEXT_CELL)
        for count in (1, 3000)
    )
    pixels = 3000 * 3 * SHAPE.image**2 * 4 / 2**20
    assert many > few + pixels


def test_a_killed_process_is_one_error():
    with pytest.raises(CommandError, match="was killed, likely for want of memory"):
        in_new_process(os._exit, 9)


# ---- the command ----

REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown row": (["--cells", "sound"], "no row of the table holds 'sound'"),
    "one layer": (["--layers", "1"], "--layers 1: pass at least 2"),
    "no samples": (["--samples", "0"], "--samples 0"),
    "no image samples": (["--image-samples", "0"], "--image-samples 0"),
    "no cell to time": (["--baseline-cells", "0"], "--baseline-cells 0"),
    "crooked width": (["--width", "20"], "--width 20: pass a multiple of 16"),
    "no such device": (["--device", "cuda:99"], "'cuda:99' cannot be used here"),
    "no place": (["--json", "{file}/bench.json"], "is not a folder"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("mine")
    assert app(["bench", "trace", *(each.replace("{file}", str(tmp_path / "file")) for each in arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("multrace: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_a_bench_needs_to_know_what_to_measure(capsys: pytest.CaptureFixture):
    assert app(["bench"]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_help_says_what_is_compared(capsys: pytest.CaptureFixture):
    assert app(["bench", "trace", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "multrace bench trace --quick" in text
    assert "The naive way makes one hooked call of the whole model for each cell" in text


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "new" / "bench.json"
    sizes = ["--layers", "3", "--width", "48", "--samples", "2", "--cells", "text tokens, hidden", "last token"]
    assert app(["bench", "trace", "--quick", *sizes, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["cells"] for row in found["rows"]] == [LABELS[0], LABELS[6]]
    for row in found["rows"]:
        assert row["ratio_token_layers"] > 50
        assert min(row["ratio_naive"], row["ratio_strong"]) > 0
        assert row["max_abs_diff"] < 2e-5
        assert min(row["peak_mb"], row["peak_mb_strong"], row["peak_mb_naive"]) > 50
    assert (found["shape"]["layers"], found["shape"]["width"], found["samples"]["text"]) == (3, 48, 2)
    assert {"device", "torch", "threads", "seed"} <= set(found)
    printed = capsys.readouterr().out
    assert all(printed.count(row["cells"]) == 2 for row in found["rows"])  # in words and in the table
    assert [each.name for each in path.parent.iterdir()] == ["bench.json"]
