"""Results of attention knockout: percent changes by hand, averages, intervals, centres, files and figures."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import pytest
import torch
from multrace.artefacts import ArtefactError, Mean, mean_interval, read_tensors, write_tensors
from multrace.artefacts.drawing import CYCLE, FLOW_STYLES, Curve, CurvePanel, LineStyle, curves_figure, flow_styles
from multrace.tracing import (
    AttentionKnockout,
    AverageKnockout,
    EngineReport,
    FilteredQuestion,
    TraceError,
    average,
    same_answer,
)
from multrace.tracing.knockout import centre_of_loss
from pictures import labels, pixels
from safetensors.torch import save_file

WINDOWS, LAYERS = (1, 3), 4
EARLY, LATE = "image -> question", "question -> last"
CURVES = {EARLY: [-50.0, -10.0, 0.0, 0.0], LATE: [0.0, 0.0, -20.0, 5.0]}
"""Percent of the uncut probability."""


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flow_of(
    curves: dict[str, Sequence[float]] = CURVES, *, clean: Sequence[float] = (0.8,), **changes: object
) -> AttentionKnockout:
    """One question whose changes are these in the first window, and half of them in the second one."""
    wanted = torch.stack([double(list(curves.values())) * share for share in (1, 0.5)], 1)
    layer = torch.arange(LAYERS)
    spans = [torch.stack([(layer - reach).clamp(min=0), (layer + reach).clamp(max=LAYERS - 1)], 1) for reach in (0, 1)]
    count, scores = len(curves), ("first token", "answer")[: len(clean)]
    made = AttentionKnockout(
        model="some-org/some-vlm",
        revision=None,
        question="What $colour$ is it?",
        tokens=("<image>", "What", "?"),
        flows=tuple(curves),
        flow_sources=((0,),) * count,
        flow_targets=((1, 2),) * count,
        flow_heads=((),) * count,
        windows=WINDOWS,
        spans=torch.stack(spans),
        layers=LAYERS,
        scores=scores,
        answer="red",
        answer_ids=(7,),
        gold="red",
        generated=" Red. ",
        clean=double(clean),
        probabilities=double(clean)[:, None, None, None] * (1 + wanted / 100),
        free=wanted == 0,
        engine=EngineReport(engine="replay", cells=16, free_cells=4, largest_difference=1e-7 / 3, checked_cells=2),
    )
    return replace(made, **changes)


def scaled(share: float, **changes: object) -> AttentionKnockout:
    return flow_of({name: [share * value for value in values] for name, values in CURVES.items()}, **changes)


# One question


def test_changes_are_percent_of_the_uncut_probability():
    flow = flow_of(clean=(0.8, 0.25))
    flow.probabilities[0, 1, 0, 2], flow.probabilities[1, 1, 0, 2] = 0.6, 0.5
    assert flow.change().shape == (2, 2, 4) and flow.change().dtype == torch.float64
    assert float(flow.change()[1, 0, 2]) == pytest.approx((0.6 - 0.8) / 0.8 * 100)
    assert float(flow.change("answer")[1, 0, 2]) == pytest.approx(100.0)  # doubled
    assert flow.curve(EARLY).tolist() == pytest.approx(CURVES[EARLY])
    assert flow.curve(EARLY, window=3).tolist() == pytest.approx([-25, -5, 0, 0])
    assert flow.curve(LATE, score="answer")[2] == pytest.approx(100.0)


def test_nothing_is_said_of_an_answer_that_had_no_probability():
    flow = flow_of(clean=(0.8, 0.0))
    assert flow.change("answer").isnan().all() and not flow.change().isnan().any()


def test_the_strongest_change_is_the_largest_up_or_down():
    flow = flow_of()
    peak = flow.strongest(EARLY, window=3)
    assert (peak.layer, peak.first_layer, peak.last_layer, peak.window) == (0, 0, 1, 3)
    assert peak.change == pytest.approx(-25.0) and peak.interval is None and peak.is_clear
    assert flow.strongest(LATE).layer == 2
    assert flow_of({LATE: [0.0, -20.0, 0.0, 60.0]}).strongest(LATE).layer == 3
    assert not flow_of({LATE: [0.0] * 4}).strongest(LATE).is_clear


@pytest.mark.parametrize(
    ("a", "b", "is_same"),
    [
        ("red", "red", True),
        (" Red.\n", "red", True),
        ("red", "RED .", True),
        ("red", "blue", False),
        ("red", "red car", False),
        ("3.5", "35", False),
        ("a.b", "ab", False),
        ("red..", "red", False),
        ("", ".", True),
    ],
)
def test_answers_are_the_same_but_for_case_blanks_and_a_full_stop(a, b, is_same):
    assert same_answer(a, b) is is_same and same_answer(b, a) is is_same


def test_an_answer_is_right_wrong_or_unknown():
    assert flow_of().is_right is True
    assert flow_of(generated="blue").is_right is False
    assert flow_of(gold=None).is_right is None and flow_of(generated=None).is_right is None


def test_a_summary_says_the_strongest_change_of_every_flow_and_window():
    lines = flow_of(generated="blue").summary().splitlines()
    assert lines[0] == "What $colour$ is it?"
    assert lines[1] == "p(red) = 0.8 without a cut, the model says 'blue', the right answer is 'red'"
    assert lines[2:] == [
        "  image -> question  window 1: -50.0 % at layer 0",
        "  image -> question  window 3: -25.0 % at layer 0 (cut in 0 to 1)",
        "  question -> last   window 1: -20.0 % at layer 2",
        "  question -> last   window 3: -10.0 % at layer 2 (cut in 1 to 3)",
    ]
    assert "changes nothing at any layer" in flow_of({LATE: [0.0] * 4}).summary()
    assert "p(red) = 0.25 without a cut (answer)" in flow_of(clean=(0.8, 0.25)).summary("answer")


def test_a_table_has_a_line_per_value():
    frame = flow_of(clean=(0.8, 0.25)).to_dataframe()
    assert len(frame) == 2 * 2 * 2 * 4
    columns = ["score", "flow", "window", "layer", "probability", "change", "first_layer", "last_layer", "free"]
    assert list(frame.columns) == columns
    line = frame.query("score == 'answer' and flow == @LATE and window == 3 and layer == 2").squeeze()
    assert line.probability == pytest.approx(0.25 * 0.9) and line.change == pytest.approx(-10.0)
    assert (line.first_layer, line.last_layer, line.free) == (1, 3, False)
    assert set(frame.free[frame.change == 0]) == {True} and not frame.free[frame.change != 0].any()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda flow: flow.curve("image -> last"), "no flow 'image -> last' in this .* it holds 'image -"),
        (lambda flow: flow.curve(LATE, window=9), "no window 9 .* it holds 1, 3; pass one of these"),
        (lambda flow: flow.change("answer"), "no score 'answer' .* it holds 'first token'"),
        (lambda flow: flow.plot("x.png", window=9), "no window 9"),
        (lambda flow: flow.plot("x.png", flows=["nobody -> last"]), "no flow 'nobody -> last'"),
        (lambda flow: flow.plot("x.png", flows=[]), "no curves to draw; pass panels with at least one"),
        (lambda flow: flow.plot("x.bmp"), "no format '.bmp'"),
        (lambda flow: flow.summary("answer"), "no score 'answer'"),
    ],
)
def test_what_was_not_computed_is_refused(ask: Callable, message: str):
    for each in (flow_of(), average([flow_of()])):
        with pytest.raises((TraceError, ArtefactError), match=message):
            ask(each)


# Averages


def test_an_average_is_the_mean_of_the_changes_and_not_of_the_probabilities():
    mean = average([scaled(1, clean=(0.9,)), scaled(0.5, clean=(0.1,))])
    assert mean.count == 2 and mean.clean.mean.tolist() == pytest.approx([0.5])
    assert mean.curve(EARLY).tolist() == pytest.approx([0.75 * value for value in CURVES[EARLY]])
    assert mean.changes.shape == (1, 2, 2, 4)
    assert mean.changes.deviation[0, 0, 0].tolist() == pytest.approx([-value / 8**0.5 for value in CURVES[EARLY]])


def test_a_question_without_a_flow_is_left_out_of_its_mean():
    without = flow_of({LATE: [-40.0, 0.0, 0.0, 0.0]})
    other = flow_of({"object -> question": [-1.0, 0, 0, 0], EARLY: [-10.0, -10.0, 0.0, 0.0]})
    mean = average([without, flow_of(), other])
    assert mean.flows == (LATE, EARLY, "object -> question")  # in the order in which they came up
    assert mean.counts == {LATE: 2, EARLY: 2, "object -> question": 1}
    assert mean.curve(LATE).tolist() == pytest.approx([-20, 0, -10, 2.5])
    assert mean.curve(EARLY).tolist() == pytest.approx([-30, -10, 0, 0])
    assert mean.changes.count[0, :, 0, 0].tolist() == [2, 2, 1] and not mean.changes.mean.isnan().any()
    low, high = mean.interval()
    assert low[2].isnan().all() and high[2].isnan().all() and not low[:2].isnan().any()
    assert mean.peak("object -> question").interval is None
    assert mean.to_dataframe().query("flow == @EARLY").n.eq(2).all()


def test_intervals_are_those_of_the_questions_own_curves():
    flows = [scaled(share) for share in (1.0, 0.8, 0.9, 1.0)]
    mean = average(flows)
    own = torch.stack([flow.change() for flow in flows])
    for corrected, comparisons in ((False, 1), (True, LAYERS)):
        for found, expected in zip(
            mean.interval(corrected=corrected), mean_interval(own, comparisons=comparisons), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    peak = mean.peak(EARLY)
    low, high = mean_interval(own[:, 0, 0, 0], comparisons=LAYERS)
    assert peak.interval == pytest.approx((float(low), float(high))) and peak.layer == 0 and peak.count == 4
    assert peak.change == pytest.approx(-50 * 0.925) and peak.is_clear
    frame = mean.to_dataframe()
    line = frame.query("flow == @EARLY and window == 3 and layer == 1").squeeze()
    low, high = mean_interval(own[:, 0, 1, 1])
    assert (line.low, line.high) == pytest.approx((float(low), float(high)))
    assert (line.change, line.n, line.first_layer, line.last_layer) == (pytest.approx(-5 * 0.925), 4, 0, 2)
    with pytest.raises(ArtefactError, match="needs at least two"):
        average(flows[:1]).interval()
    assert average(flows[:1]).to_dataframe().low.isna().all()


def test_a_peak_that_could_be_chance_is_not_clear():
    mean = average([flow_of({LATE: [value, 0.0, 0.0, 0.0]}) for value in (-30.0, 20.0, -25.0)])
    assert mean.peak(LATE).layer == 0 and not mean.peak(LATE).is_clear
    assert "not clear of zero" in mean.summary() and "centre" not in mean.summary()


def test_wrong_answers_are_reported_and_not_averaged():
    wrong = scaled(-3.0, question="Who?", generated="blue")
    early = FilteredQuestion(question="Where?", gold="here", generated="there")
    flows = [flow_of(), wrong, scaled(0.5, gold=None)]
    mean = average(flows, filtered=[early])
    assert mean.filtered == (early, FilteredQuestion(question="Who?", gold="red", generated="blue"))
    assert mean.count == 2 and (mean.wrong, mean.ungraded) == (0, 1)
    assert torch.equal(mean.change(), average([flows[0], flows[2]]).change())
    text = mean.summary()
    assert "mean over 2 questions, 1 of them without a known right answer" in text
    assert "left out because the model's own answer is wrong: 2 questions" in text
    assert "  'Where?': 'there', not 'here'\n  'Who?': 'blue', not 'red'" in text
    every = average(flows, only_right=False)
    assert every.count == 3 and every.filtered == () and (every.wrong, every.ungraded) == (1, 1)
    assert not torch.allclose(every.change(), mean.change())
    assert "1 of them answered wrongly" in every.summary() and "is wrong: 0 questions" in every.summary()


def test_nothing_left_to_average_says_why():
    wrong = flow_of(generated="blue")
    with pytest.raises(TraceError, match=r"is wrong to all 2 \(to 'What .* it says 'blue', not 'red'\); ask what"):
        average([wrong, wrong])
    assert average([wrong], only_right=False).count == 1
    with pytest.raises(TraceError, match="wrong to all 2"):
        average([wrong], filtered=[FilteredQuestion(question="Q", gold="a", generated="b")])
    with pytest.raises(ArtefactError, match="no results to average; pass at least one"):
        average([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, r"differ in their model \(some-org/some-vlm and other\)"),
        ({"revision": "abc"}, "differ in their revision"),
        ({"layers": 5}, "differ in their layers"),
        ({"windows": (1, 5)}, "differ in their windows"),
        ({"scores": ("answer",)}, "differ in their scores"),
        ({"spans": torch.zeros(2, 4, 2, dtype=torch.int64)}, "differ in their spans"),
        ({"flow_heads": ((), (1, 2))}, r"cut 'question -> last' in heads all and \(1, 2\)"),
    ],
)
def test_flows_that_asked_other_things_are_not_averaged(changes, message):
    with pytest.raises((ArtefactError, TraceError), match=message):
        average([flow_of(), flow_of(**changes)])


# Centres


def test_the_centre_of_mass_of_known_curves():
    curves = double([[0, -3, 0, -1], [-2, 0, 0, 0], [5, 0, -1, 9], [1, 0, 0, 2]])
    centres = [float(centre_of_loss(curve)[0]) for curve in curves]
    assert centres[:3] == [1.5, 0.0, 2.0]  # gains carry no weight
    assert centres[3] != centres[3]  # not a number


def test_the_slope_of_a_centre_is_its_derivative():
    curve = double([-5.0, -30.0, 2.0, -20.0]).requires_grad_()
    centre, slope = centre_of_loss(curve)
    (expected,) = torch.autograd.grad(centre, curve)
    assert torch.allclose(slope, expected, rtol=0, atol=1e-15) and slope[2] == 0 and (slope != 0).sum() == 3


def test_early_flows_have_early_centres_with_intervals_over_questions():
    shapes = ([-50, -10, 0, 0], [-45, -15, 0, 0], [-55, 0, -5, 0])
    mean = average([flow_of({EARLY: shape, LATE: shape[::-1]}) for shape in shapes])
    early, late = mean.centre(EARLY), mean.centre(LATE, window=3)
    total = [sum(column) for column in zip(*shapes, strict=True)]
    assert early.layer == pytest.approx(sum(layer * loss for layer, loss in enumerate(total)) / sum(total))
    assert late.layer == pytest.approx(3 - early.layer) and (late.window, late.count) == (3, 3)
    assert early.interval[0] < early.layer < early.interval[1] < late.interval[0]
    assert "centre of the loss at layer 0.2 [" in mean.summary()


def test_a_centre_needs_losses_and_its_interval_two_questions():
    one = average([flow_of()])
    assert one.centre(EARLY).layer == pytest.approx(1 / 6) and one.centre(EARLY).interval is None
    assert average([flow_of({LATE: [0.0, 5.0, 0.0, 0.0]})] * 2).centre(LATE) is None
    far = average([flow_of({LATE: [-9.0, 0.0, 0.0, 0.0]}), flow_of({LATE: [0.0, 0.0, 0.0, -9.0]})])
    assert far.centre(LATE).interval == (0.0, LAYERS - 1)  # of two so different ones nothing is known


def jackknife(curves: torch.Tensor) -> tuple[float, float]:
    """Tukey's jackknife interval of the centre of the mean of curves (question, layer), the slow way."""
    count = len(curves)
    centre = float(centre_of_loss(curves.mean(0))[0])
    without = [float(centre_of_loss(curves[torch.arange(count) != index].mean(0))[0]) for index in range(count)]
    low, high = mean_interval(double([count * centre - (count - 1) * each for each in without]))
    half = float(high - low) / 2
    return centre - half, centre + half


def drawn_curves(generator: torch.Generator, count: int) -> torch.Tensor:
    sizes = torch.rand(count, 1, generator=generator, dtype=torch.float64) + 0.5
    return double([-5, -30, -20, -5]) * sizes + torch.randn(count, LAYERS, generator=generator, dtype=torch.float64)


def test_intervals_of_centres_hold_the_truth_and_are_those_of_the_jackknife():
    generator, truth, held = torch.Generator().manual_seed(1), 1.4166666, 0
    for _ in range(100):
        curves = drawn_curves(generator, 12)
        mean = average([flow_of({EARLY: curve}) for curve in curves.tolist()])
        low, high = mean.centre(EARLY).interval
        assert (low, high) == pytest.approx(jackknife(curves), abs=0.15 * (high - low))
        held += low <= truth <= high
    assert 0.88 <= held / 100 <= 1.0


def test_covariances_are_those_of_the_questions_curves():
    curves = drawn_curves(torch.Generator().manual_seed(2), 9)
    mean = average([flow_of({EARLY: curve}) for curve in curves.tolist()])
    assert torch.allclose(mean.covariance[0, 0, 0], curves.T.cov(), rtol=1e-10, atol=0)


# Files


def assert_equal(again: object, before: object) -> None:
    assert type(again) is type(before)
    for name in before.__dataclass_fields__:
        new, old = getattr(again, name), getattr(before, name)
        if isinstance(old, torch.Tensor):
            assert new.dtype == old.dtype and torch.equal(new.nan_to_num(7), old.nan_to_num(7)), name
        elif isinstance(old, Mean):
            assert_equal(new, old)
        else:
            assert new == old and repr(new) == repr(old), name


def test_one_question_comes_back_from_its_file(tmp_path):
    full = flow_of(clean=(0.8, 0.1), revision="abc", flow_heads=((), (0, 3)), question='"蓝"\n?', answer_ids=(3, 5))
    for number, flow in enumerate((full, flow_of(gold=None, generated=None))):
        again = AttentionKnockout.load(flow.save(tmp_path / "new" / f"{number}.safetensors"))
        assert_equal(again, flow)
        assert again.summary() == flow.summary()
    with pytest.raises(AssertionError):
        assert_equal(again, full)


def test_an_average_comes_back_from_its_file(tmp_path):
    lacking = flow_of({LATE: [-40.0, 0.0, 0.0, 0.0]})
    mixed = average([flow_of(), lacking, flow_of(gold=None), flow_of(generated="blue")])
    for number, mean in enumerate((mixed, average([flow_of()]))):
        again = AverageKnockout.load(mean.save(tmp_path / f"{number}.safetensors"))
        assert_equal(again, mean)
        assert again.summary() == mean.summary()
    assert mixed.filtered and mixed.counts == {EARLY: 2, LATE: 3}


def test_other_and_broken_files_are_refused(tmp_path):
    flow, mean = flow_of(), average([flow_of(), flow_of(generated="blue")])
    path, mean_path = flow.save(tmp_path / "flow"), mean.save(tmp_path / "mean")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-9])
    save_file({"weight": torch.zeros(2)}, tmp_path / "stranger")
    for name, changes in {
        "layers": {"layers": 9},
        "fewer": {"flows": (LATE,)},
        "whole": {"free": flow.free.double()},
        "pairs": {"spans": flow.spans[..., :1]},
        "scores": {"scores": ("first token", "answer")},
        "sources": {"flow_sources": ()},
    }.items():
        replace(flow, **changes).save(tmp_path / name)
        with pytest.raises(ArtefactError, match="of other shapes than its flows") as caught:
            AttentionKnockout.load(tmp_path / name)
        assert name in str(caught.value)
    for name, changes in {"counted": {"count": 0}, "clean": {"clean": mean.clean[:0]}}.items():
        replace(mean, **changes).save(tmp_path / name)
        with pytest.raises(ArtefactError, match="of other shapes than its flows"):
            AverageKnockout.load(tmp_path / name)
    for name, message in {"cut": "not a readable", "stranger": "another program", "mean": "holds 'multrace av"}.items():
        with pytest.raises(ArtefactError, match=message):
            AttentionKnockout.load(tmp_path / name)
    with pytest.raises(ArtefactError, match="not 'multrace average attention knockout 2'"):
        AverageKnockout.load(path)
    tensors, header = read_tensors(mean_path)
    assert header["filtered"].count("generated") == 1
    write_tensors(
        tmp_path / "entry", tensors, header | {"filtered": header["filtered"].replace("generated", "generatde")}
    )
    with pytest.raises(ArtefactError, match="KeyError: 'filtered.0.generated'"):
        AverageKnockout.load(tmp_path / "entry")
    assert AverageKnockout.load(mean_path).filtered[0].generated == "blue"


# Figures


def test_flows_are_overlaid_with_their_names(tmp_path):
    text = labels(flow_of(generated="blue").plot())
    for label in (
        "What $colour$ is it?",
        "image ↛ question",
        "question ↛ last",
        "change in answer probability (%)",
        "cut in a single layer",
        "cut in windows of 3 layers",
        "layer (centre of the window)",
        "some-org/some-vlm",
    ):
        assert f"<!-- {label} -->" in text, label
    assert "the model says 'blue', the right answer is 'red'" in text
    only = labels(flow_of().plot(window=3, flows=[LATE]))
    assert "question ↛ last" in only and "image ↛ question" not in only and "in a single layer" not in only
    assert FLOW_STYLES[LATE].colour.lower() in only.lower() and FLOW_STYLES[EARLY].colour.lower() not in only.lower()


def test_an_average_says_what_was_left_out_and_how_many_have_a_flow(tmp_path):
    mean = average([flow_of(), scaled(0.7), flow_of({LATE: CURVES[LATE]}), flow_of(generated="blue")])
    text = labels(mean.plot())
    for label in ("Attention knockout over 3 questions", "image ↛ question (n = 2)", "question ↛ last"):
        assert f"<!-- {label} -->" in text, label
    assert "some-org/some-vlm; 1 left out for a wrong answer" in text and "bands: 95% intervals" in text
    assert text.count("FillBetweenPolyCollection") == 4
    lone = labels(average([flow_of()]).plot(window=1))
    assert "bands" not in lone and "over 1 question" in lone and "none left out" in lone
    wrong = average([flow_of(), flow_of(generated="blue")], only_right=False)
    assert "1 of them answered wrongly" in labels(wrong.plot())


def test_every_format_is_written_and_shows_the_data(tmp_path):
    for make in (lambda share: scaled(share), lambda share: average([scaled(share), scaled(share / 2)])):
        for suffix in ("png", "pdf"):
            make(1.0).plot(tmp_path / f"flow.{suffix}")
            assert (tmp_path / f"flow.{suffix}").stat().st_size > 3000
        first, other, again = (pixels(make(share).plot()) for share in (1.0, 0.3, 1.0))
        assert first.tobytes() == again.tobytes() != other.tobytes()
        assert first.width > 1000


def test_every_flow_of_the_paper_looks_different_and_keeps_its_look():
    names = [*FLOW_STYLES, "a -> b", "c -> d"]
    styles = dict(zip(names, flow_styles(names), strict=True))
    assert len({style.colour for style in styles.values()}) == len(names)
    assert len({(style.dashes, style.marker) for style in styles.values()}) == len(names)
    assert flow_styles(["c -> d", LATE, EARLY])[1:] == (styles[LATE], styles[EARLY])
    assert flow_styles(["a -> b", "c -> d"]) == (styles["a -> b"], styles["c -> d"])
    assert len(set(flow_styles([f"{number} -> last" for number in range(30)]))) == 30


def test_curves_of_other_results_are_drawn(tmp_path):
    x, y = torch.arange(40), torch.linspace(0, 1, 40)
    gap = y.clone()
    gap[3:9] = torch.nan
    curves = [Curve(label=f"line {number}", x=x, y=y * number) for number in range(9)]
    own = LineStyle(colour="#123456")
    curves += [Curve(label="one of its own", x=x, y=gap, low=gap - 0.1, high=gap + 0.1, style=own)]
    panels = [CurvePanel(curves=curves, title="$a$", x_label="step"), CurvePanel(curves=[curves[2]])]
    text = labels(curves_figure(panels, titles=("T", "S"), y_label="share", reference=None))
    for label in ("$a$", "step", "layer", "share", "line 8", "one of its own"):
        assert f"<!-- {label} -->" in text, label
    assert text.count("<!-- line 2 -->") == 1 and text.lower().count("#123456") > 2
    assert all(style.colour.lower() in text.lower() for style in CYCLE)
    with pytest.raises(ArtefactError, match="no curves to draw"):
        curves_figure([], titles=("", ""), y_label="")


def test_very_wide_bands_do_not_squash_the_lines(tmp_path):
    def highest_tick(reach: float) -> float:
        x, y = torch.arange(3), double([0, -10, 0])
        panel = CurvePanel(curves=[Curve(label="", x=x, y=y, low=y - reach, high=y + reach)])
        text = labels(curves_figure([panel], titles=("", ""), y_label=""))
        found = [line.split("<!-- ")[1].split(" -->")[0] for line in text.splitlines() if "<!-- " in line]
        return max(abs(float(each.replace("−", "-"))) for each in found if each.lstrip("−").replace(".", "").isdigit())

    assert highest_tick(3.0) <= 14 and highest_tick(1000.0) <= 20


def test_filtered_questions_are_plain_values():
    each = FilteredQuestion(question="Q", gold="a", generated="b")
    assert asdict(each) == {"question": "Q", "gold": "a", "generated": "b"} and each == FilteredQuestion(**asdict(each))
