"""Averages of saliency flows: geometric means and intervals by hand, zeros, absent flows, files and figures."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace.artefacts import ArtefactError
from multrace.tracing import AttentionSaliency, AverageSaliency, TraceError, average
from result_checks import assert_same, assert_shown, colours, svg
from torch import Tensor

GROUPS = {"system": (0,), "image": (1,), "question": (2,), "last": (3,)}
TO_LAST, TO_QUESTION = "image -> last", "image -> question"
T3, T2, T1 = 3.182446305, 4.302652730, 12.706204736
"""Student's t, 97.5 %, with 3, 2 and 1 degrees of freedom."""


def saliency_of(to_last: list[float], *, groups: dict[str, tuple[int, ...]] = GROUPS) -> AttentionSaliency:
    """One prompt of four tokens, whose edge from the picture to the last token has this saliency by layer."""
    saliency = torch.zeros(len(to_last), 2, 4, dtype=torch.float64)
    saliency[:, 0, :2], saliency[:, 1, :3] = 2e-5, 1e-4
    saliency[:, 1, 1] = torch.tensor(to_last)
    return AttentionSaliency(
        model="some-org/some-vlm",
        revision="main",
        question="What $colour$ is it?",
        input_ids=(0, 1, 2, 3),
        answer="red",
        answer_ids=(7,),
        layers=tuple(range(len(to_last))),
        image_positions=(1,),
        patches=(),
        tokens=("<s>", "<image>", "What", ":"),
        loss=0.1,
        queries=(2, 3),
        groups=groups,
        saliency=saliency,
    )


TEXT_ONLY = {"system": (0, 1), "question": (2,), "last": (3,)}
FOUR = [
    saliency_of([1e-6, 1e-2, 0.0]),
    saliency_of([1e-5, 1e-3, 0.0]),
    saliency_of([1e-4, 1e-3, 0.0]),
    saliency_of([1e-1, 0.0, 0.0]),
]


def is_close(found: Tensor, expected: list[float]) -> bool:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return torch.allclose(found, wanted, rtol=1e-4, atol=0, equal_nan=True)


def test_means_are_geometric_and_intervals_those_of_the_logarithms():
    mean, nan = average(FOUR), math.nan
    assert (mean.count, set(mean.counts.values())) == (4, {4})
    assert is_close(mean.of(TO_LAST), [10**-4.0, 10 ** (-8 / 3), nan])  # of the logs -6 -5 -4 -1, and -2 -3 -3
    arithmetic = torch.stack([each.flow("image", "last") for each in FOUR]).mean(0)
    assert float(arithmetic[0] / mean.of(TO_LAST)[0]) > 200, "one prompt would be most of an arithmetic mean"
    half = T3 * math.sqrt(14 / 3) / 2, T2 * math.sqrt(1 / 3) / math.sqrt(3)
    low, high = mean.interval(TO_LAST)
    assert is_close(low, [10 ** (-4 - half[0]), 10 ** (-8 / 3 - half[1]), nan])
    assert is_close(high, [10 ** (-4 + half[0]), 10 ** (-8 / 3 + half[1]), nan])
    assert is_close(mean.of(TO_QUESTION), [2e-5] * 3) and is_close(mean.interval(TO_QUESTION)[1], [2e-5] * 3)


def test_zeros_are_counted_and_kept_apart_from_what_is_absent():
    mean = average(FOUR)
    assert mean.zeros(TO_LAST).tolist() == [0, 1, 4] and mean.zeros(TO_QUESTION).tolist() == [0, 0, 0]
    mixed = average([*FOUR[:2], saliency_of([1e-3] * 3, groups=TEXT_ONLY)])
    assert (mixed.counts[TO_LAST], mixed.counts["question -> last"]) == (2, 3)
    assert mixed.zeros(TO_LAST).tolist() == [0, 0, 2], "an absent flow is no zero"
    assert is_close(mixed.of(TO_LAST), [10**-5.5, 10**-2.5, math.nan])
    half = T1 * math.sqrt(0.5) / math.sqrt(2)
    assert is_close(mixed.interval(TO_LAST)[0], [10 ** (-5.5 - half), 10 ** (-2.5 - half), math.nan])


def test_a_flow_that_only_a_later_prompt_has_is_averaged():
    first = saliency_of([1e-3] * 3, groups=TEXT_ONLY)
    mean = average([first, FOUR[0]])
    assert mean.flows[: len(first.flows)] == tuple(first.flows) and TO_LAST not in first.flows
    assert is_close(mean.of(TO_LAST), [1e-6, 1e-2, math.nan])
    assert mean.interval(TO_LAST)[0].isnan().all(), "one prompt has no spread"
    with pytest.raises(TraceError, match="no flow 'image -> system'.*pass 'system -> question'"):
        mean.of("image -> system")


def test_a_single_prompt_is_its_own_mean_without_an_interval():
    single = average(FOUR[:1])
    assert is_close(single.of(TO_LAST), [1e-6, 1e-2, math.nan])
    with pytest.raises(ArtefactError, match="at least two results"):
        single.interval(TO_LAST)
    table = single.to_dataframe()
    assert table["low"].isna().all() and table["high"].isna().all() and set(table["n"]) == {0, 1}
    assert colours(single.plot()) > 30


def test_a_table_has_one_line_per_flow_and_layer():
    mean = average(FOUR)
    table = mean.to_dataframe()
    assert list(table.columns) == ["flow", "layer", "saliency", "low", "high", "n", "zeros"]
    assert len(table) == 3 * len(mean.flows)
    for layer, expected in ((1, [3, 1]), (2, [0, 4])):
        (line,) = table.query("flow == @TO_LAST and layer == @layer").itertuples()
        assert [line.n, line.zeros] == expected
        ends = (mean.of(TO_LAST), *mean.interval(TO_LAST))
        values = [float(each[layer]) for each in ends]
        assert [line.saliency, line.low, line.high] == pytest.approx(values, nan_ok=True)


def test_only_equal_saliencies_are_averaged():
    first = FOUR[0]
    blind = replace(first, queries=(0,), saliency=first.saliency[:, :1])
    for others, message in (
        ([], "pass at least one"),
        ([first, replace(first, model="another")], "differ in their model"),
        ([first, replace(first, revision=None)], "differ in their revision"),
        ([first, saliency_of([1.0, 1.0])], "differ in their layers"),
        ([blind, blind], "no flow between groups"),
    ):
        with pytest.raises((TraceError, ArtefactError), match=message):
            average(others)


def test_a_saved_average_comes_back_whole(tmp_path: Path):
    mean = average([*FOUR, saliency_of([1e-3] * 3, groups=TEXT_ONLY)])
    loaded = AverageSaliency.load(mean.save(tmp_path / "mean.safetensors"))
    assert_same(loaded, mean)
    assert_shown(mean)
    assert loaded.log.mean.isnan().any()
    for changes, message in (
        ({"flows": mean.flows[1:]}, "another shape"),
        ({"zero": replace(mean.zero, count=mean.zero.count - 1)}, "more of its flows are above zero than there are"),
    ):
        broken = replace(mean, **changes).save(tmp_path / "broken.safetensors")
        with pytest.raises(ArtefactError, match=message):
            AverageSaliency.load(broken)
    with pytest.raises(ArtefactError, match="load another file"):
        AverageSaliency.load(FOUR[0].save(tmp_path / "one.safetensors"))


def test_a_plot_has_bands_a_gap_for_zeros_and_says_what_is_missing(tmp_path: Path):
    mixed = average([*FOUR, saliency_of([1e-3] * 3, groups=TEXT_ONLY)])
    drawn = svg(mixed.plot())
    for words in ("95% intervals", "image -&gt; last (n = 4)", "where a flow is zero in some prompts"):
        assert words in drawn, words
    plain = svg(average([saliency_of([1e-3, 1e-2, 1e-1])] * 2).plot())
    assert "95% intervals" in plain and "(n = " not in plain and "is zero" not in plain
    with pytest.raises(ArtefactError, match="png"):
        mixed.plot(tmp_path / "mixed.txt")


def test_averages_are_not_averaged_again():
    with pytest.raises(ArtefactError, match="AverageSaliency has no average over prompts; pass results of one kind"):
        average([average(FOUR[:2])])
    with pytest.raises(ArtefactError, match="cannot average AttentionSaliency and AverageSaliency together"):
        average([FOUR[0], average(FOUR)])
