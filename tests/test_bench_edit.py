"""The editing benchmark: both ways of each row give the same, what is counted, memory, refusals, and the command."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import reference
import torch
from multrace.editing.values import search_values
from multrace.models import ModelError, VisionLanguageModel
from multrace.scripts import CommandError
from multrace.scripts.bench import BenchEdit
from multrace.scripts.benchmarks import (
    SHAPES,
    WIDTH,
    EditRow,
    MomentCase,
    Recipe,
    ReuseCase,
    Shape,
    SolveCase,
    Subject,
    ValueCase,
    apart,
    as_change,
    chosen_cases,
    counted_token_layers,
    describe_edit,
    edit as edit_benchmark,
    edit_markdown,
    edit_table,
    explicit,
    explicit_flops,
    extra_mb,
    hidden_of,
    machine_facts,
    make_edit_cases,
    make_goals,
    make_problem,
    make_prompts,
    measure_edit_anew,
    open_subject,
    search_settings,
    thin,
    thin_flops,
    usual_moment,
    usual_search,
    write_model,
    write_with_undo,
)
from multrace.scripts.main import app

CPU = torch.device("cpu")
SHAPE = Shape(
    layers=4, width=32, mlp=48, heads=2, vision_layers=2, vision_width=16, vision_heads=2, vocabulary=120, image=56
)
IMAGE, TEXT, TARGET = 16, 4 + 28, 2
TOKENS = IMAGE + TEXT
LABELS = [  # as they stand in the JSON
    "value search, lower third, constraint_last",
    "value search, lower third, last",
    "value search, middle, constraint_last",
    "value search, middle, last",
    "second moments of all layers",
    "solve, 1 edit, float32",
    "solve, 100 edits, float32",
    "solve, 1 edit, float64",
    "solve at the price of C, 4 batches of 100",
]
VALUES = ValueCase(label="values", layer=1, token="constraint_last", facts=3, timed_facts=2, steps=4)
MOMENTS = MomentCase(label="moments", prompts=3, batch_size=2)
SOLVE = SolveCase(label="solve", edits=3, width=96, hidden=40, dtype="float64", seed=0)
REUSE = ReuseCase(label="reuse", batches=2, edits=3, width=96, hidden=40, seed=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = write_model(SHAPE, tmp_path_factory.mktemp("shape"), seed=0, device=CPU)
    return Recipe(folder=folder, shape=SHAPE, device=None, seed=0, samples={})


@pytest.fixture(scope="module")
def subject(recipe: Recipe) -> Subject:
    return open_subject(recipe)


@pytest.fixture(scope="module")
def values_row(subject: Subject) -> EditRow:
    return VALUES.measure(subject)


@pytest.fixture(scope="module")
def solve_row() -> EditRow:
    return SOLVE.measure(CPU)


@pytest.fixture
def exact_subject(recipe: Recipe, exact: None) -> Subject:
    """The same in true float64."""
    return open_subject(replace(recipe, shape=replace(SHAPE, dtype="float64")))


def weights(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


# ---- the rows of the table ----


def test_the_table_has_its_rows():
    cases = make_edit_cases(SHAPES["base"], facts=8, timed_facts=2, steps=20, prompts=16, width=WIDTH, seed=0)
    assert [case.label for case in cases] == LABELS
    assert [case.layer for case in cases[:4]] == [4, 4, 8, 8]  # of 16: the fifth is the last of the lower third
    assert [(case.edits, case.width, case.hidden) for case in cases[5:8]] == [
        (1, 11008, 4096),
        (100, 11008, 4096),
        (1, 11008, 4096),
    ]
    assert (cases[8].width, cases[8].hidden) == (4096, hidden_of(4096)) == (4096, 1525)


def test_rows_are_chosen_by_words_of_their_labels():
    cases = make_edit_cases(SHAPE, facts=1, timed_facts=2, steps=1, prompts=1, width=64, seed=0)
    quick = chosen_cases(cases, BenchEdit.QUICK["rows"])
    assert [case.label for case in quick] == [LABELS[index] for index in (0, 1, 4, 5, 8)]
    assert cases[0].timed_facts == 1  # no more than there are


def test_facts_are_as_long_as_the_shape_says_and_differ(subject: Subject):
    goals = make_goals(subject, 3)
    prompts = [goal.prompts[0] for goal in goals]
    assert {prompt.length for prompt in prompts} == {TOKENS + TARGET}
    assert {len(prompt.answer_ids) for prompt in prompts} == {TARGET}
    assert len({prompt.question for prompt in prompts}) == len({prompt.answer for prompt in prompts}) == 3
    assert len({prompt.images[0].tobytes() for prompt in prompts}) == 3
    assert {prompt.length for prompt in make_prompts(subject, 2)} == {TOKENS}


# ---- value search ----


@pytest.mark.parametrize("token", ["constraint_last", "last"])
def test_both_searches_end_with_the_same_change(token: str, exact_subject: Subject):
    vlm, settings, goals = exact_subject.vlm, search_settings(6), make_goals(exact_subject, 2)
    projection = vlm.down_projection(1)
    place = {"projection": projection, "place": projection, "layer": 1, "token": token}
    ours = search_values(vlm, goals, settings=settings, **place)
    for goal, found in zip(goals, ours, strict=True):
        change, losses = usual_search(vlm, goal.prompts[0], layer=1, token=token, how=settings)
        assert change.shape == (3 if token == "last" else 1, 32)  # two target tokens and the end
        torch.testing.assert_close(found.change.double(), change, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(losses))
        assert len(losses) == 7
        assert losses[0] - min(losses) > 1e-3  # and there was something to search for


def test_searches_that_differ_are_refused(subject: Subject):
    vlm, (goal,), settings = subject.vlm, make_goals(subject, 1), search_settings(3)
    where = {"layer": 1, "token": "last"}
    change, _ = usual_search(vlm, goal.prompts[0], how=settings, **where)
    again, _ = usual_search(vlm, goal.prompts[0], how=settings, **where)
    assert apart(again, change, tolerance=1e-2, label="values") < 1e-6
    for other in (replace(settings, learning_rate=0.07), replace(settings, ending="none", weight_decay=5e4)):
        wrong, _ = usual_search(vlm, goal.prompts[0], how=other, **where)
        with pytest.raises(CommandError, match="values: ours and the usual way differ by .* there is no ratio"):
            apart(wrong, change, tolerance=1e-2, label="values")


def test_the_value_row_counts_token_layers_as_by_hand(values_row: EditRow):
    """The edit is in layer 1 of 4, at the last of the 8 constraint tokens behind the image: 21 tokens are left."""
    length, steps, start = TOKENS + TARGET, VALUES.steps, 4 + IMAGE + 7
    left = length - start
    assert left == 23
    facts = VALUES.facts
    # The prefix and then the rest, once through all layers; the check and each loss, through the upper three. At the
    # end one prompt once more, whole.
    assert values_row.details["forward"] == facts * (length * 4 + (1 + steps + 1) * left * 3) + length * 4
    assert values_row.details["backward"] == facts * steps * left * 3
    assert values_row.details["forward_usual"] == facts * (steps + 1) * length * 4
    assert values_row.details["backward_usual"] == facts * steps * length * 3
    assert values_row.work == values_row.details["forward"] + values_row.details["backward"]
    assert values_row.work_usual == values_row.details["forward_usual"] + values_row.details["backward_usual"]


def test_the_value_row_says_how_far_the_ways_are_apart(values_row: EditRow):
    assert values_row.difference < 1e-3 < values_row.tolerance
    assert values_row.details["timed_facts"] == 2
    assert values_row.details["loss_after"] < values_row.details["loss_before"]
    assert values_row.seconds_usual == pytest.approx(3 * values_row.details["seconds_per_fact_usual"])
    assert values_row.ratio_seconds == pytest.approx(values_row.seconds_usual / values_row.seconds)


def test_searching_leaves_the_model_and_no_hook(subject: Subject):
    before = weights(subject.vlm)
    logits = subject.vlm.logits(subject.prompt)
    VALUES.measure(subject)
    assert weights(subject.vlm) == before
    assert torch.equal(subject.vlm.logits(subject.prompt), logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.vlm.addresses.layers)


# ---- second moments ----


def test_both_moments_are_the_mean_over_all_tokens(subject: Subject):
    vlm, prompts, layer = subject.vlm, make_prompts(subject, 3), 2
    keys = []
    module = vlm.down_projection(layer).module
    hook = module.register_forward_pre_hook(lambda _module, given: keys.append(given[0][0].double()))
    for prompt in prompts:
        vlm.logits(prompt)
    hook.remove()
    stacked = torch.cat(keys)
    assert len(stacked) == 3 * TOKENS
    found = usual_moment(vlm, prompts, layer=layer, batch_size=2)
    torch.testing.assert_close(found, stacked.T @ stacked / len(stacked), rtol=1e-4, atol=1e-7)
    other = usual_moment(vlm, prompts, layer=layer - 1, batch_size=2)
    with pytest.raises(CommandError, match="moments: ours and the usual way differ"):
        apart(other, found, tolerance=1e-5, label="moments")


def test_the_moment_row_counts_passes(subject: Subject):
    row = MOMENTS.measure(subject)
    assert row.work == 3 * TOKENS * 4
    assert row.work_usual == 3 * TOKENS * (1 + 2 + 3 + 4)
    assert row.details["tokens"] == 3 * TOKENS
    assert row.difference < 1e-6


def test_token_layers_are_those_of_all_calls(subject: Subject):
    vlm = subject.vlm
    with counted_token_layers(vlm) as count:
        vlm.logits(subject.prompt)
        embeddings = torch.zeros(3, 5, 32, requires_grad=True)
        vlm.forward(embeddings).sum().backward()
    vlm.logits(subject.prompt)  # outside
    assert (count.forward, count.backward) == (4 * TOKENS + 4 * 15, 4 * 15)
    assert count.total == count.forward + count.backward


# ---- solves ----


@pytest.mark.parametrize("edits", [1, 7])
def test_the_thin_form_and_the_explicit_inverse_are_the_published_formula(edits: int):
    problem = make_problem(edits, 96, 40, torch.float64, CPU, seed=3)
    expected = reference.multedit_many(problem.weight, problem.keys.T, problem.wanted.T, problem.ridge)
    solution = thin(problem)
    assert expected.norm() > 1e-3 * problem.weight.norm()
    torch.testing.assert_close(solution.left @ solution.right, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(explicit(problem) - problem.weight, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(CommandError, match="solve: ours and the usual way differ"):
        stronger = thin(replace(problem, ridge=1.01 * problem.ridge))
        apart(stronger.left @ stronger.right, expected, tolerance=1e-8, label="solve")


def test_the_solve_row(solve_row: EditRow):
    assert solve_row.difference < 1e-10
    assert 0 < solve_row.details["difference_written"] < 1e-6  # stored as float32
    assert solve_row.details["matrix_mb"] == 96 * 40 * 8 / 2**20
    assert solve_row.work == pytest.approx(thin_flops(3, 96, 40) / 1e9)
    assert solve_row.work_usual == pytest.approx(explicit_flops(3, 96, 40) / 1e9)


def test_operations_are_those_of_the_products():
    assert thin_flops(1, 1000, 400) == pytest.approx(2 * 1000 * 400, rel=0.01)  # one product with the weight
    assert explicit_flops(1, 1000, 400) == pytest.approx(2 * 1000**3 + 2 * 400 * 1000**2, rel=0.01)


def test_batches_that_share_a_factorisation_are_memit():
    row = REUSE.measure(CPU)
    assert row.difference < 1e-10
    assert row.details["seconds_factorise"] < row.seconds
    assert row.work_usual > row.work


def test_one_factorisation_is_counted_once():
    one, four = (replace(REUSE, width=256, hidden=64, batches=count).measure(CPU) for count in (1, 4))
    factorisation = 256**3 / 3e9
    assert four.work - factorisation == pytest.approx(4 * (one.work - factorisation))
    assert four.work_usual == pytest.approx(4 * one.work_usual)


def test_undoing_puts_the_weight_back():
    problem = make_problem(2, 96, 40, torch.float32, CPU, seed=0)
    solution = thin(problem)
    weight = problem.weight.clone()
    write_with_undo(as_change(problem, solution), weight)
    assert torch.equal(weight, problem.weight)


# ---- memory ----
# What is measured is above 32 MiB, so that glibc maps it anew and gives it back at once. Smaller arrays may come out of
# memory that earlier tests in the same process have freed, and then do not raise the peak.


def test_extra_memory_is_what_work_holds_at_most():
    held = torch.ones(90 * 2**18)
    assert extra_mb(lambda: torch.ones(70 * 2**18), CPU) == pytest.approx(70, abs=8)
    assert extra_mb(lambda: torch.ones(35 * 2**18) + torch.ones(35 * 2**18), CPU) == pytest.approx(105, abs=8)
    assert extra_mb(held.sum, CPU) == pytest.approx(0, abs=8)  # what was held before does not count, nor an old peak


def test_the_thin_form_needs_less_than_the_weight_and_the_inverse_more():
    width = 2112  # a matrix of 34 MiB
    problem = make_problem(4, width, hidden_of(width), torch.float64, CPU, seed=0)
    thin(problem)
    assert extra_mb(lambda: thin(problem), CPU) < width * hidden_of(width) * 8 / 2**20 / 2
    assert extra_mb(lambda: explicit(problem), CPU) > 2 * 34


def test_writing_with_a_way_back_needs_less_than_twice_the_weight_in_float64():
    width = 5120  # a weight of 37 MiB
    problem = make_problem(4, width, hidden_of(width), torch.float32, CPU, seed=0)
    change = as_change(problem, thin(problem))
    weight_mb = problem.weight.numel() * 8 / 2**20
    assert weight_mb / 2 - 8 < extra_mb(lambda: write_with_undo(change, problem.weight), CPU) < 2 * weight_mb


# ---- the tables and the command ----

REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown row": (["--rows", "sound"], "no row of the table holds 'sound'; the rows are: value search, lower third"),
    "no facts": (["--facts", "0"], "--facts 0: pass at least 1"),
    "no steps": (["--steps", "0"], "--steps 0: pass at least 1"),
    "no prompts": (["--prompts", "0"], "--prompts 0: pass at least 1"),
    "no fact to time": (["--baseline-cells", "0"], "--baseline-cells 0: pass at least 1"),
    "too narrow": (["--solve-width", "2"], "--solve-width 2: pass at least 16"),
    "one layer": (["--layers", "1"], "--layers 1: pass at least 2"),
    "no such device": (["--device", "cuda:99"], "'cuda:99' cannot be used here"),
    "no place": (["--markdown", "{file}/edit.md"], "is not a folder"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("mine")
    assert app(["bench", "edit", *(each.replace("{file}", str(tmp_path / "file")) for each in arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("multrace: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_rows_in_words(values_row: EditRow, solve_row: EditRow):
    said = "\n".join(describe_edit(values_row))
    assert said.startswith("values\n  seconds ")
    assert f"{values_row.ratio_work:.1f}x" in said
    assert "token-layers" in said
    head, first, second, note = edit_table([values_row, solve_row])
    assert first.startswith("values ")
    assert first.index(f"{values_row.ratio_seconds:.1f}x") == head.index("ratio")
    assert "GFLOP" in second
    assert "for the same result" in note
    text = edit_markdown([values_row, solve_row], machine_facts("cpu") | {"shape": asdict(SHAPE)})
    assert text.count("\n| ") == 4
    assert "\n- solve: edits 3, width 96, hidden 40, " in text


def test_the_command_prints_a_table_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(edit_benchmark, "in_new_process", lambda work, *arguments: work(*arguments))
    path, other = tmp_path / "new" / "edit.json", tmp_path / "new" / "edit.md"
    sizes = ["--layers", "3", "--width", "48", "--facts", "2", "--steps", "2", "--prompts", "1", "--solve-width", "64"]
    words = ["--rows", "lower third, last", "second", "1 edit", "price of C"]
    files = ["--json", str(path), "--markdown", str(other)]
    assert app(["bench", "edit", "--quick", *sizes, *words, *files]) == 0
    found = json.loads(path.read_text())
    assert [row["label"] for row in found["rows"]] == [LABELS[index] for index in (1, 4, 5, 7, 8)]
    for row in found["rows"]:
        assert row["difference"] < row["tolerance"]
        assert row["ratio_seconds"] == pytest.approx(row["seconds_usual"] / row["seconds"])
        assert row["ratio_work"] == pytest.approx(row["work_usual"] / row["work"])
    values, moments, *_ = found["rows"]
    assert values["ratio_work"] > 3  # two steps of 608 tokens against three tokens
    assert moments["ratio_work"] == (1 + 2 + 3) / 3
    assert (found["shape"]["layers"], found["shape"]["width"]) == (3, 48)
    printed = capsys.readouterr().out
    assert all(printed.count(row["label"]) == 2 for row in found["rows"])  # in words and in the table
    assert all(row["label"] in other.read_text() for row in found["rows"])
    assert sorted(each.name for each in path.parent.iterdir()) == ["edit.json", "edit.md"]


def test_rows_are_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def measured(work: object, recipe: Recipe, case: SolveCase) -> EditRow:
        asked.append((work, case.label, case.width))
        raise CommandError("far enough")

    monkeypatch.setattr(edit_benchmark, "in_new_process", measured)
    words = ["--rows", "1 edit", "--layers", "2", "--width", "16", "--solve-width", "64"]
    assert app(["bench", "edit", "--quick", *words]) == 2
    assert asked == [(measure_edit_anew, LABELS[5], 64)]


def test_a_row_needs_a_model_or_a_device(recipe: Recipe):
    assert measure_edit_anew(recipe, MOMENTS).work == 3 * TOKENS * 4
    assert measure_edit_anew(replace(recipe, folder=Path("nowhere")), SOLVE).details["width"] == 96
    with pytest.raises(ModelError):
        measure_edit_anew(replace(recipe, folder=Path("nowhere")), MOMENTS)
