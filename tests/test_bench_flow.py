"""The flow benchmark: its rows, the three ways on each of them, what is counted, a truncated prefill, the command."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace.scripts import CommandError
from multrace.scripts.benchmarks import (
    DROPPED,
    SHAPES,
    FlowCase,
    FlowRow,
    Recipe,
    Shape,
    Subject,
    chosen_cases,
    describe_flow,
    flow as flow_benchmark,
    flow_table,
    in_new_process,
    layer_cost,
    make_flow_cases,
    measure_flow,
    measure_flow_anew,
    open_subject,
    probabilities,
    published_scores,
    spread_cells,
    truncated_logits,
    write_model,
)
from multrace.scripts.main import app
from multrace.tracing.engine import Runs, plain_scores
from multrace.tracing.engine.measure import sweep

SHAPE = Shape(
    layers=4, width=32, mlp=48, heads=2, vision_layers=2, vision_width=16, vision_heads=2, vocabulary=120, image=56
)
WINDOWS = (1, 3)
CASES = {case.label: case for case in make_flow_cases(SHAPE, WINDOWS)}
LABELS = [  # as they stand in the JSON
    "image -> last",
    "question -> last",
    "image -> question",
    "last -> last",
    "image -> question and last",
    "image -> last, each head",
    "the three flows to the last token in one call",
    "the four flows of the paper in one call",
    "image tokens dropped from each layer on, K = 0",
]
IMAGE, QUESTION, LAST = frozenset(range(4, 20)), frozenset(range(20, 47)), frozenset([47])


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = write_model(SHAPE, tmp_path_factory.mktemp("shape"), seed=0, device=torch.device("cpu"))
    return open_subject(Recipe(folder=folder, shape=SHAPE, device=None, seed=0, samples={}))


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def edge_run(subject: Subject) -> Runs:
    return Runs.of_one(subject.vlm.embed(subject.prompt), scored=(subject.prompt.length - 1,))


@pytest.fixture(scope="module")
def row(subject: Subject) -> FlowRow:
    return measure_flow(subject, CASES["image -> last"], timed_cells=2)


@pytest.fixture(scope="module")
def dropping(subject: Subject) -> FlowRow:
    return measure_flow(subject, CASES[DROPPED], timed_cells=1)


# ---- the rows of the table ----


def test_the_table_has_its_rows():
    cases = make_flow_cases(SHAPES["base"], (1, 9))
    assert [case.label for case in cases] == LABELS
    assert [len(case.cells) for case in cases] == [32] * 5 + [8 * 32, 3 * 32, 4 * 32, 16]


@pytest.mark.parametrize(
    ("label", "sources", "targets"),
    [
        ("image -> last", IMAGE, LAST),
        ("question -> last", QUESTION, LAST),
        ("image -> question", IMAGE, QUESTION),
        ("last -> last", LAST, LAST),
        ("image -> question and last", IMAGE, QUESTION | LAST),
        (DROPPED, IMAGE, QUESTION | LAST),
    ],
)
def test_rows_cut_what_their_labels_say(label: str, sources: frozenset[int], targets: frozenset[int]):
    assert {(cell.cut.sources, cell.cut.targets, cell.cut.heads) for cell in CASES[label].cells} == {
        (sources, targets, ())
    }


def test_windows_are_those_of_the_study():
    cells = make_flow_cases(SHAPES["base"], (1, 9))[0].cells
    assert [(cell.first, cell.last) for cell in cells[:16]] == [(layer, layer) for layer in range(16)]
    assert [(cell.first, cell.last) for cell in cells[16:]][:6] == [(0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (1, 9)]
    assert (cells[-1].first, cells[-1].last) == (11, 15)


def test_windows_that_the_ends_make_equal_are_one_cell():
    (case, *_) = make_flow_cases(replace(SHAPE, layers=2), (1, 2))
    assert [(cell.first, cell.last) for cell in case.cells] == [(0, 0), (1, 1), (0, 1)]


def test_each_head_is_cut_on_its_own_and_the_paper_has_four_flows():
    assert [cell.cut.heads for cell in CASES["image -> last, each head"].cells] == [*[(0,)] * 8, *[(1,)] * 8]
    together = {cell.cut for cell in CASES[LABELS[7]].cells}
    assert together == {cell.cut for label in LABELS[:4] for cell in CASES[label].cells}


def test_tokens_are_dropped_from_every_layer_on():
    case = CASES[DROPPED]
    assert [(cell.first, cell.last, cell.is_dropped) for cell in case.cells] == [(layer, 3, True) for layer in range(4)]
    assert case.middle == 2
    assert not any(cell.is_dropped for label in LABELS[:-1] for cell in CASES[label].cells)


def test_rows_are_chosen_by_words_of_their_labels():
    cases = tuple(CASES.values())
    assert [case.label for case in chosen_cases(cases, ["-> last", "dropped"])] == [
        label for label in LABELS if "-> last" in label or label == DROPPED
    ]
    with pytest.raises(CommandError, match="no row of the table holds 'sound'; the rows are: image -> last; question"):
        chosen_cases(cases, ["sound"])


# ---- the three ways ----


@pytest.mark.parametrize("label", LABELS)
def test_all_three_ways_agree(label: str, subject: Subject, edge_run: Runs):
    cells, measure = CASES[label].cells, probabilities(subject)
    swept = sweep(subject.vlm, edge_run, cells, measure)
    plain = plain_scores(subject.vlm, edge_run, cells, measure)[..., 0]
    published = published_scores(subject.vlm, subject.prompt, cells, measure)
    torch.testing.assert_close(published, plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(swept.scores[..., 0], plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(published[:, 0], plain[:, 0], rtol=0, atol=5e-6)
    torch.testing.assert_close(swept.scores[:, 0, 0], plain[:, 0], rtol=0, atol=5e-6)
    assert float((plain - swept.base[:, 0])[:, 0].abs().max()) > 1e-3  # and cutting does something


def test_every_cell_of_the_published_way_starts_from_the_whole_model(subject: Subject):
    seen = []
    hook = subject.vlm.vision_tower.register_forward_hook(lambda *_: seen.append("tower"))
    cells = CASES["image -> question"].cells[:3]
    published_scores(subject.vlm, subject.prompt, cells, subject.measure)
    hook.remove()
    assert len(seen) == len(cells)


def test_no_hook_is_left_behind(subject: Subject, edge_run: Runs):
    vlm = subject.vlm
    before = vlm.forward(edge_run.base, positions=edge_run.scored)
    published_scores(vlm, subject.prompt, CASES["image -> question"].cells[:1], subject.measure)
    truncated_logits(vlm, edge_run, 1, [0, 47])
    assert torch.equal(vlm.forward(edge_run.base, positions=edge_run.scored), before)


# ---- a truncated prefill ----


def test_a_truncated_prefill_gives_what_the_cut_gives(subject: Subject, edge_run: Runs):
    text = sorted({*range(48)} - IMAGE)
    scores = sweep(subject.vlm, edge_run, CASES[DROPPED].cells, subject.measure).scores[..., 0]
    found = [subject.measure(truncated_logits(subject.vlm, edge_run, layer, text))[0] for layer in range(4)]
    torch.testing.assert_close(torch.stack(found), scores, rtol=0, atol=5e-6)
    assert float((scores[0] - scores[3]).abs()) > 1e-3  # from which layer on makes a difference


def test_a_truncated_prefill_of_all_tokens_is_a_prefill(subject: Subject, edge_run: Runs):
    whole = subject.vlm.forward(edge_run.base, positions=edge_run.scored)
    torch.testing.assert_close(truncated_logits(subject.vlm, edge_run, 2, range(48)), whole)


def test_a_truncated_prefill_computes_less(subject: Subject, edge_run: Runs):
    lengths = []
    hooks = [
        layer.register_forward_hook(lambda _module, _given, output: lengths.append(output.shape[1]))
        for layer in subject.vlm.addresses.layers
    ]
    truncated_logits(subject.vlm, edge_run, 3, sorted({*range(48)} - IMAGE))
    for hook in hooks:
        hook.remove()
    assert lengths == [48, 48, 48, 32]


def test_the_saving_is_measured_beside_its_row(dropping: FlowRow, row: FlowRow):
    saving = dropping.saving
    assert saving.layer == 2
    assert saving.ratio_token_layers == pytest.approx(48 * 4 / (48 * 2 + 32 * 2))
    assert saving.ratio_seconds == pytest.approx(saving.seconds_full / saving.seconds_truncated)
    assert saving.max_abs_diff < 5e-6
    assert row.saving is None


# ---- what is counted ----


def test_the_last_token_alone_is_counted(row: FlowRow):
    """A window runs from its first layer on; of those that begin alike, the shorter ones leave the longest."""
    spans = [(cell.first, cell.last) for cell in CASES["image -> last"].cells]
    longest = {first: max(last for start, last in spans if start == first) for first, _ in spans}
    expected = sum(SHAPE.layers - (first if last == longest[first] else last + 1) for first, last in spans)
    assert (row.computed_cells, row.free_cells) == (8, 0)
    assert row.token_layers == expected
    assert row.ratio_token_layers == pytest.approx(8 * SHAPE.layers * SHAPE.tokens / expected)
    assert row.recording_token_layers == SHAPE.layers * SHAPE.tokens
    assert row.ratio_token_layers_recorded == pytest.approx(
        8 * SHAPE.layers * SHAPE.tokens / (expected + SHAPE.layers * SHAPE.tokens)
    )


def test_work_in_operations_is_more_than_the_layers_weights(row: FlowRow, subject: Subject):
    cost = layer_cost(subject.vlm)
    assert row.flops > row.token_layers * cost.token
    assert row.flops < row.token_layers * (cost.token + SHAPE.tokens * cost.pair) + row.computed_cells * cost.read + 1


def test_free_cells_raise_no_ratio(subject: Subject):
    case = CASES["image -> question"]
    found = measure_flow(subject, case, timed_cells=1)
    assert (found.computed_cells, found.free_cells) == (7, 1)  # in the last layer, the question speaks to nobody
    cells = tuple(cell for cell in case.cells if cell.first < 3)
    without = measure_flow(subject, FlowCase(label="without", cells=cells), timed_cells=1)
    assert (without.computed_cells, without.free_cells) == (7, 0)
    assert without.ratio_token_layers == found.ratio_token_layers


def test_seconds_and_ratios_fit_together(row: FlowRow):
    assert sorted(row.seconds_runs)[1] == row.seconds > 0
    assert row.recording_seconds > 0
    assert row.seconds_per_cell * row.computed_cells == pytest.approx(row.seconds)
    for ratio, recorded, each in (
        (row.ratio_strong, row.ratio_strong_recorded, row.seconds_per_cell_strong),
        (row.ratio_published, row.ratio_published_recorded, row.seconds_per_cell_published),
    ):
        assert ratio == pytest.approx(each / row.seconds_per_cell)
        assert recorded == pytest.approx(ratio * row.seconds / (row.seconds + row.recording_seconds))
    assert row.share_of_rate * row.times_counted_work == pytest.approx(1)


def test_a_row_says_how_far_the_ways_are_apart(row: FlowRow, dropping: FlowRow):
    for each in (row, dropping):
        assert max(each.max_abs_diff, each.max_abs_diff_published, each.plain_noise) < 5e-6
        assert max(each.max_relative_diff, each.plain_relative_noise) < 1e-3
        assert each.max_relative_diff >= each.max_abs_diff  # a logarithm of numbers below one
        assert each.largest_effect > 1e-3
    assert (row.timed_cells, dropping.timed_cells) == (2, 1)


def test_timed_cells_are_spread_over_windows_and_not_free():
    cells, free = CASES["image -> question"].cells, torch.tensor([False] * 3 + [True] + [False] * 4)
    for seed in range(20):
        short, long = spread_cells(cells, free, 2, seed=seed)
        assert cells[short].first == cells[short].last
        assert cells[long].first < cells[long].last
        assert spread_cells(cells, free, 2, seed=seed) == [short, long]
    assert sorted(spread_cells(cells, free, 99, seed=0)) == [0, 1, 2, 4, 5, 6, 7]
    assert len({tuple(spread_cells(cells, free, 2, seed=seed)) for seed in range(20)}) > 1


def test_a_row_in_words(row: FlowRow, dropping: FlowRow):
    said = "\n".join(describe_flow(row))
    assert said.startswith("image -> last: 8 cells computed, 0 free")
    assert "  pruning " not in said
    assert "a prefill on text alone from layer 2 on takes" in "\n".join(describe_flow(dropping))
    head, first, second, note = flow_table([row, dropping])
    assert first.startswith("image -> last ")
    assert second.startswith(DROPPED)
    assert first.index(f"{row.ratio_token_layers:.1f}x") == head.index("token-layers")
    assert "the median of 3 sweeps" in note


# ---- the command ----

REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown row": (["--flows", "sound"], "no row of the table holds 'sound'; the rows are: image -> last; "),
    "one layer": (["--layers", "1"], "--layers 1: pass at least 2"),
    "no window": (["--windows", "0"], "--windows 0: the decoder has 16 layers; pass some of 1 to 16"),
    "too wide a window": (["--quick", "--windows", "1", "9"], "--windows 9: the decoder has 8 layers"),
    "no cell to time": (["--baseline-cells", "0"], "--baseline-cells 0: pass at least 1"),
    "crooked width": (["--width", "20"], "--width 20: pass a multiple of 16"),
    "no such device": (["--device", "cuda:99"], "'cuda:99' cannot be used here"),
    "no place": (["--json", "{file}/flow.json"], "is not a folder"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("mine")
    assert app(["bench", "flow", *(each.replace("{file}", str(tmp_path / "file")) for each in arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("multrace: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_help_says_what_is_compared(capsys: pytest.CaptureFixture):
    assert app(["bench", "flow", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "multrace bench flow --quick" in text
    assert "builds the masks from lists of pairs" in text


def test_the_command_prints_a_table_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flow_benchmark, "in_new_process", lambda work, *arguments: work(*arguments))
    path = tmp_path / "new" / "flow.json"
    sizes = ["--layers", "3", "--width", "48", "--windows", "1", "2", "1", "--flows", "question -> last", "dropped"]
    assert app(["bench", "flow", "--quick", *sizes, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["flow"] for row in found["rows"]] == [LABELS[1], DROPPED]
    for row in found["rows"]:
        assert row["ratio_token_layers"] > 20
        assert min(row["ratio_published"], row["ratio_strong"], row["peak_mb"]) > 0
        assert max(row["max_abs_diff"], row["max_abs_diff_published"]) < 2e-5
        assert row["largest_effect"] > 1e-4
        assert len(row["seconds_runs"]) == 3
    first, second = found["rows"]
    assert first["saving"] is None
    assert second["saving"]["ratio_token_layers"] > 1.5
    assert (found["shape"]["layers"], found["shape"]["width"], found["windows"]) == (3, 48, [1, 2])
    assert {"device", "torch", "threads", "seed"} <= set(found)
    printed = capsys.readouterr().out
    assert all(printed.count(row["flow"]) == 2 for row in found["rows"])  # in words and in the table
    assert [each.name for each in path.parent.iterdir()] == ["flow.json"]


def test_rows_are_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def measured(work: object, recipe: Recipe, case: FlowCase, timed_cells: int) -> FlowRow:
        asked.append((work.__name__, case.label, timed_cells))
        raise CommandError("far enough")

    monkeypatch.setattr(flow_benchmark, "in_new_process", measured)
    assert app(["bench", "flow", "--quick", "--layers", "2", "--width", "16", "--flows", "last -> last"]) == 2
    assert asked == [("measure_flow_anew", "last -> last", 1)]


@pytest.mark.slow
def test_a_row_survives_another_process(subject: Subject, tmp_path: Path):
    recipe = replace(subject.recipe, folder=write_model(SHAPE, tmp_path, seed=0, device=torch.device("cpu")))
    found = in_new_process(measure_flow_anew, recipe, CASES[DROPPED], 1)
    assert found.token_layers == measure_flow(subject, CASES[DROPPED], timed_cells=1).token_layers
    assert found.peak_mb > 50
