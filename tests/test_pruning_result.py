"""Results of pruning: work by the formulae, accuracies, cliffs on made-up answers, files and figures."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd
import pytest
import torch
from multrace.artefacts import ArtefactError, wilson_interval
from multrace.tracing import AveragePruning, EngineReport, ImagePruning, TraceError, average
from multrace.tracing.pruning import operations_kept, tokens_kept
from PIL import Image
from result_checks import assert_same, assert_shown, colours, svg

LAYERS = 6
RIGHT, WRONG = "red", "blue"


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pruning_of(right: Sequence[Sequence[bool]] = ((0, 0, 1, 1, 1, 1),), **changes: object) -> ImagePruning:
    """One question about a picture of four tokens, answered rightly where that is asked; probability 0.9, else 0.1."""
    count, layers = len(right), len(right[0])
    kept = torch.zeros(count, layers, 4, dtype=torch.bool)
    for row in range(1, count):
        kept[row, :, :row] = True
    truth = double(right)
    made = ImagePruning(
        model="some-org/some-vlm",
        revision=None,
        question="What $colour$ is it?",
        input_ids=(1, 9, 9, 9, 9, 5, 6, 7),
        answer=RIGHT,
        answer_ids=(30, 31),
        layers=tuple(range(layers)),
        image_positions=(1, 2, 3, 4),
        patches=((1, 0, 0, 0), (2, 0, 1, 0), (3, 1, 0, 0), (4, 1, 1, 0)),
        depth=layers,
        keep=tuple(range(count)),
        kept=kept,
        scores=("first token", "answer"),
        gold="Red.",
        baseline=double([0.9, 0.8]),
        floor=double([0.1, 0.05]),
        probabilities=torch.stack([0.1 + 0.8 * truth, 0.05 + 0.75 * truth]),
        baseline_answer=RIGHT,
        floor_answer=WRONG,
        answers=tuple(tuple(RIGHT if each else WRONG for each in row) for row in right),
        token_operations=(1000,) * layers,
        pair_operations=64,
        engine=EngineReport(engine="replay", cells=6, checked_cells=2, largest_difference=1e-7 / 3),
    )
    return replace(made, **changes)


# One question


def test_right_answers_are_those_of_the_gold_answer():
    found = pruning_of()
    assert found.is_right.tolist() == [[False, False, True, True, True, True]]
    assert (found.baseline_is_right, found.floor_is_right) == (True, False)
    unknown = pruning_of(gold=None)
    assert (unknown.is_right, unknown.baseline_is_right, unknown.floor_is_right) == (None, None, None)
    assert pruning_of(gold=WRONG).is_right.tolist() == [[True, True, False, False, False, False]]


@pytest.mark.parametrize(
    ("right", "layer"),
    [((0, 0, 1, 1, 1, 1), 2), ((1, 0, 1, 0, 1, 1), 4), ((1, 1, 1, 1, 1, 1), 0), ((1, 1, 1, 1, 1, 0), None)],
)
def test_the_answer_settles_where_it_changes_no_more(right, layer):
    found = pruning_of((right,))
    assert found.settled_from() == layer
    words = "changes the answer even from layer 5" if layer is None else f"the answer stays from layer {layer} on"
    assert words in found.summary()


def test_work_is_what_counting_token_by_token_gives():
    found = pruning_of(((0,) * 6, (1,) * 6), token_operations=(1000, 2000, 3000, 4000, 5000, 6000))
    for row, dropped in enumerate((4, 3)):
        for layer in range(LAYERS):
            left = [8 if each < layer else 8 - dropped for each in range(LAYERS)]
            cost = sum(
                own * found.token_operations[number] + 64 * sum(range(own + 1)) for number, own in enumerate(left)
            )
            whole = sum(8 * each + 64 * sum(range(9)) for each in found.token_operations)
            assert float(found.tokens_kept()[row, layer]) == pytest.approx(sum(left) / 48)
            assert float(found.operations_kept()[row, layer]) == pytest.approx(cost / whole)
    nothing = torch.zeros(1, dtype=torch.int64)
    work = {"length": 8, "token_operations": (7, 7), "pair_operations": 3}
    assert float(tokens_kept(nothing, (0,), length=8, depth=2)) == float(operations_kept(nothing, (0,), **work)) == 1


def test_a_pruning_says_what_it_found():
    text = pruning_of().summary()
    assert "with every image token: p('red', first token) = 0.9; it says 'red', right" in text
    assert "with none in any layer: p('red', first token) = 0.1; it says 'blue', not 'Red.'" in text
    assert "all image tokens dropped: the answer stays from layer 2 on, which saves 3" in text
    assert "p('red') = 0.8" in pruning_of().summary("answer")
    with pytest.raises(TraceError, match="no score 'last' in this pruning: it holds 'first token', 'answer'"):
        pruning_of().summary("last")
    with pytest.raises(TraceError, match="no keep 7 in this pruning: it holds 0"):
        pruning_of().settled_from(7)


def test_a_pruning_comes_back_from_its_file(tmp_path):
    found = pruning_of(((0, 0, 1, 1, 1, 1), (1,) * 6), keep=(0, "all"))
    back = ImagePruning.load(found.save(tmp_path / "pruning.safetensors"))
    assert_same(back, found)
    assert_shown(found)
    assert back.summary() == found.summary()
    pd.testing.assert_frame_equal(back.to_dataframe(), found.to_dataframe())
    broken = replace(found, probabilities=found.probabilities[..., 1:]).save(tmp_path / "broken.safetensors")
    with pytest.raises(ArtefactError, match="of other shapes than its keeps, layers and scores"):
        ImagePruning.load(broken)
    with pytest.raises(ArtefactError, match="not 'multrace average image pruning 2'"):
        AveragePruning.load(tmp_path / "pruning.safetensors")


def test_the_table_has_a_line_per_score_keep_and_layer():
    frame = pruning_of(((0, 0, 1, 1, 1, 1), (1,) * 6)).to_dataframe()
    assert len(frame) == 2 * 2 * LAYERS
    line = frame[(frame.score == "answer") & (frame.keep == 0) & (frame.layer == 2)].iloc[0]
    assert (line.answer, line.is_right, line.dropped) == (RIGHT, True, 4)
    assert (line.probability, line.baseline, line.floor) == pytest.approx((0.8, 0.8, 0.05))
    assert line.tokens_kept == pytest.approx((8 * 2 + 4 * 4) / 48)
    assert pruning_of(gold=None).to_dataframe().is_right.isna().all()


def test_pictures_show_curves_levels_and_savings(tmp_path):
    found = pruning_of(((0, 0, 1, 1, 1, 1), (1,) * 6))
    text = svg(found.plot())
    shown = ["all image tokens dropped", "best 1 image token kept", "What $colour$ is it?", "first token's probability"]
    for words in [*shown, "every image token (baseline)", "no image token at all (floor)", "saved"]:
        assert f"<!-- {words} -->" in text, words
    assert colours(found.plot(score="answer")) > 30
    with pytest.raises(ArtefactError, match="no format '.gif'"):
        found.plot(tmp_path / "one.gif")


def asked_about(prompt: object, kept: Callable[[torch.Tensor], torch.Tensor], **changes: object) -> ImagePruning:
    """A pruning of a real prompt in which these image tokens stay."""
    image = prompt.groups["image"]
    patches = tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches)
    stays = kept(torch.arange(len(image))).expand(1, LAYERS, -1)
    place = {"image_positions": image, "patches": patches, "input_ids": tuple(prompt.inputs["input_ids"][0].tolist())}
    return pruning_of(kept=stays, keep=(int(stays[0, 0].sum()),), **place, **changes)


def test_the_overlay_fades_what_is_dropped(tmp_path, random_llava_llama, photo, other_photo):
    prompt = random_llava_llama.prompt(photo, "What is it?")
    pictures = []
    for number in (4, 8):
        found = asked_about(prompt, lambda places, number=number: places < number)
        found.overlay(prompt, tmp_path / f"{number}.png", layers=(0, 3))
        with Image.open(tmp_path / f"{number}.png") as image:
            pictures.append(image.convert("RGB").tobytes())
    assert pictures[0] != pictures[1]
    text = svg(found.overlay(prompt))
    assert "<!-- from layer 0 on -->" in text and "Image tokens that stay: the best 8 of 16" in text
    with pytest.raises(TraceError, match=r"no layers \(9,\) here"):
        found.overlay(prompt, layers=(9,))
    with pytest.raises(TraceError, match="of another prompt"):
        found.overlay(random_llava_llama.prompt(other_photo, "Who?"))
    with pytest.raises(TraceError, match="stay here all or none"):
        asked_about(prompt, lambda places: places < 0).overlay(prompt)


# Averages


def average_of(curves: Sequence[Sequence[bool]], **changes: object) -> AveragePruning:
    return average([pruning_of((curve,), **changes) for curve in curves])


def test_accuracies_are_shares_of_right_answers_with_wilsons_interval():
    mean = average_of([(0, 0, 1, 1, 1, 1), (0, 1, 1, 0, 1, 1), (0, 0, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1)])
    assert mean.accuracy()[0].tolist() == pytest.approx([0.25, 0.5, 0.75, 0.75, 1.0, 1.0], abs=1e-12)
    assert (mean.baseline_accuracy, mean.floor_accuracy, mean.graded) == (1.0, 0.0, 4)
    low, high = mean.accuracy_interval()
    assert (float(low[0, 1]), float(high[0, 1])) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert float(mean.probability()[0, 1]) == pytest.approx(0.5)
    assert float(mean.probability("answer")[0, 5]) == pytest.approx(0.8)
    assert mean.changed(0, 3) == (1, 0) and mean.changed(0, 5) == (0, 0)


def test_wilsons_interval_is_the_textbooks():
    low, high = wilson_interval(double([1.0, 0.5, 0.0, 0.2, torch.nan]), torch.tensor([10, 10, 10, 50, 0]))
    assert low.tolist()[:4] == pytest.approx([0.7225, 0.2366, 0.0, 0.1124], abs=1e-4)
    assert high.tolist()[:4] == pytest.approx([1.0, 0.7634, 0.2775, 0.3304], abs=1e-4)
    assert low[4].isnan() and high[4].isnan()


@pytest.mark.parametrize(
    ("lost", "tolerance", "cliff"),
    [
        ((9, 5, 0, 0, 0, 0), 0.01, 2),
        ((9, 5, 1, 0, 0, 0), 0.01, 3),
        ((9, 5, 1, 0, 0, 0), 0.1, 2),  # as much as may be lost, in spite of rounding
        ((0, 0, 0, 0, 1, 0), 0.01, 5),  # before it falls again does not count
        ((0, 0, 0, 0, 0, 0), 0.0, 0),
        ((0, 0, 0, 0, 0, 1), 0.01, None),
    ],
)
def test_the_cliff_is_where_dropping_hurts_no_more(lost, tolerance, cliff):
    mean = average_of([[number >= each for each in lost] for number in range(10)])
    assert mean.accuracy()[0].tolist() == pytest.approx([1 - each / 10 for each in lost])
    assert mean.cliff_layer(tolerance=tolerance) == cliff
    assert mean.cliff_layer(tolerance=0.8 * tolerance + 1e-12, by="probability") == cliff
    assert mean.cliff_layer(tolerance=1.0) == 0
    words = "is hurt even from layer 5" if cliff is None else f"accuracy holds from layer {cliff} on"
    assert words in mean.summary(tolerance)


def test_the_cliff_is_measured_from_the_baseline_not_from_one():
    curves = [(0, 0, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0)]
    asked = [pruning_of((curve,), baseline_answer=RIGHT if curve[-1] else WRONG) for curve in curves]
    assert average(asked).cliff_layer() == 2
    asked[1] = replace(asked[1], baseline_answer=RIGHT)
    assert average(asked).cliff_layer() is None


def test_questions_without_a_right_answer_count_for_probabilities_only():
    known, unknown = pruning_of(), pruning_of(((1, 1, 1, 1, 1, 1),), gold=None)
    mixed, none = average([known, unknown]), average([unknown, unknown])
    assert (mixed.count, mixed.graded, none.graded) == (2, 1, 0)
    assert mixed.accuracy()[0].tolist() == [0, 0, 1, 1, 1, 1]
    assert mixed.probability()[0, 0] == pytest.approx(0.5)
    assert "(of 1 with a right answer)" in mixed.summary()
    assert none.cliff_layer(by="probability") == 0 and "accuracy" not in none.summary()
    with pytest.raises(TraceError, match="no right answers are known here.*pass gold="):
        none.cliff_layer()


def test_unlike_prunings_are_not_averaged():
    with pytest.raises(ArtefactError, match="no results to average"):
        average([])
    with pytest.raises(ArtefactError, match=r"differ in their keep \(\(0,\) and \(3,\)\)"):
        average([pruning_of(), pruning_of(keep=(3,))])
    mean = average_of([(0, 0, 1, 1, 1, 1)])
    with pytest.raises(TraceError, match="tolerance=-1 is negative"):
        mean.cliff_layer(tolerance=-1)
    with pytest.raises(TraceError, match="no measure 'size'"):
        mean.cliff_layer(by="size")
    with pytest.raises(TraceError, match="no layer 9 in this average"):
        mean.changed(0, 9)


def test_an_average_comes_back_from_its_file_and_as_a_table(tmp_path):
    mean = average_of([(0, 0, 1, 1, 1, 1), (0, 1, 1, 1, 1, 1)])
    back = AveragePruning.load(mean.save(tmp_path / "mean.safetensors"))
    assert back.summary() == mean.summary()
    assert_shown(mean)
    frame = back.to_dataframe()
    pd.testing.assert_frame_equal(frame, mean.to_dataframe())
    line = frame[(frame.score == "answer") & (frame.layer == 1)].iloc[0]
    assert (line.accuracy, line.baseline_accuracy, line.floor_accuracy, line.n) == (0.5, 1.0, 0.0, 2)
    assert 0 < line.low < 0.5 < line.high < 1 and line.baseline == pytest.approx(0.8)
    broken = replace(mean, floor=mean.floor[:1]).save(tmp_path / "broken.safetensors")
    with pytest.raises(ArtefactError, match="of other shapes than its keeps"):
        AveragePruning.load(broken)


def test_the_picture_of_an_average_marks_the_cliff():
    asked = [pruning_of(((0, 0, 1, 1, 1, 1), (0, 1, 1, 1, 1, 1))), pruning_of(((0, 1, 1, 1, 1, 1), (1,) * 6))]
    mean = average(asked)
    text = svg(mean.plot())
    shown = ["all image tokens dropped, cliff at layer 2", "best 1 image token kept, cliff at layer 1", "accuracy"]
    for words in [*shown, "Image tokens dropped, 2 questions", "Accuracy; bands: 95% intervals"]:
        assert f"<!-- {words} -->" in text, words
    text = svg(mean.plot(by="probability", score="answer"))
    assert "<!-- mean probability of the whole answer -->" in text
    hurt = average_of([(1, 1, 1, 1, 1, 0)])
    assert "cliff" not in svg(hurt.plot())
    assert colours(hurt.plot(by="probability")) > 30  # one question has no band
