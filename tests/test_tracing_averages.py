"""Averages over prompts: means, intervals, equal groups, and ROME's groups of single tokens."""

import statistics
from dataclasses import replace

import pytest
import torch
from multrace.artefacts import ArtefactError, mean_interval
from multrace.tracing import CausalTrace, SwapImage, TraceError, average, causal_trace
from scipy.stats import t as student

SHIFTS = (0.0, 0.1, 0.3)


@pytest.fixture
def three(traced, shift_trace):
    """Three prompts, the effects of the second and third larger than those of the first."""
    return [
        shift_trace(traced, shift, clean_scores=torch.tensor([0.9 - shift], dtype=torch.float64)) for shift in SHIFTS
    ]


def test_an_average_holds_means_and_95_percent_intervals(traced, three):
    mean = average(three)
    assert mean.count == 3
    assert mean.total_effect == pytest.approx(0.8 - sum(SHIFTS) / 3)
    half = 4.302653 * statistics.stdev(SHIFTS) / 3**0.5  # Student's t with 2 degrees of freedom
    for kind in traced.kinds:
        expected = traced.indirect_effect(kind) + sum(SHIFTS) / 3
        low, high = mean.interval(kind)
        assert torch.allclose(mean.indirect_effect(kind), expected, rtol=0, atol=1e-12)
        assert torch.allclose(low, expected - half, rtol=0, atol=1e-7)
        assert torch.allclose(high, expected + half, rtol=0, atol=1e-7)
    assert mean.total_interval() == pytest.approx((mean.total_effect - half, mean.total_effect + half))


def test_blocks_of_an_average_have_intervals_corrected_for_choosing_the_largest_cell(three):
    mean = average(three)
    (block,) = mean.causal_blocks("mlp", 1.0)
    half = student.ppf(1 - 0.025 / 24, 2) * statistics.stdev(SHIFTS) / 3**0.5  # 4 rows x 6 layers
    assert block.interval == pytest.approx((block.effect - half, block.effect + half))
    assert block.spread is None
    low, high = mean.interval("mlp")
    assert block.interval[0] < low[2, 0] and high[2, 0] < block.interval[1]
    assert average(three[:1]).causal_blocks("mlp", 1.0)[0].interval is None


def test_an_average_of_one_trace_says_what_the_trace_says(traced):
    mean = average([traced])
    assert all(torch.equal(mean.indirect_effect(kind), traced.indirect_effect(kind)) for kind in traced.kinds)
    assert mean.edit_site() == traced.edit_site()
    assert mean.onset("last") == traced.onset("last")
    assert [block.row for block in mean.causal_blocks()] == [block.row for block in traced.causal_blocks()]
    with pytest.raises(ArtefactError, match="needs at least two results"):
        mean.interval("mlp")


def test_every_metric_is_averaged(three):
    two = [
        replace(
            trace,
            metrics=("probability", "twice"),
            clean_scores=torch.cat([trace.clean_scores, 2 * trace.clean_scores]),
            corrupted_scores=torch.cat([trace.corrupted_scores, 2 * trace.corrupted_scores]),
            samples={kind: torch.cat([values, 2 * values]) for kind, values in trace.samples.items()},
        )
        for trace in three
    ]
    mean = average(two)
    assert torch.allclose(mean.indirect_effect("mlp", "twice"), 2 * mean.indirect_effect("mlp"))
    assert mean.total_effect_of("twice") == pytest.approx(2 * mean.total_effect)
    assert torch.allclose(mean.interval("mlp", "twice")[0], 2 * average(three).interval("mlp")[0])


def test_rows_of_different_tokens_name_no_token_in_an_average(traced):
    other = replace(traced, row_tokens=(None, None, None, "last"))
    assert average([traced, other]).row_tokens == (None, None, None, "last")


def test_an_average_with_estimates_says_where(traced):
    flags = torch.zeros(4, 6, dtype=torch.bool)
    flags[1, 2] = True
    mean = average([traced, replace(traced, estimated={"mlp": flags})])
    assert torch.equal(mean.estimated["mlp"], flags) and "hidden" not in mean.estimated
    assert average([traced, traced]).estimated == {}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rows", {"rows": ("image", "question", "constraint", "last")}, "differ in their rows"),
        ("window", {"window": 3}, "these results differ in their window (1 and 3)"),
        ("model", {"model": "another"}, "differ in their model (some-model and another)"),
        ("tokens", {"grouped": False}, "some of these traces hold groups only, others single tokens"),
        ("direct", {"effect": "direct"}, "differ in their effect (total and direct)"),
        ("direction", {"direction": "corrupt"}, "differ in their direction (restore and corrupt)"),
        ("severed", {"severed": "mlp"}, "differ in their severed (None and mlp)"),
        ("metrics", {"metrics": ("log_probability",)}, "differ in their metrics"),
        (
            "spans",
            {"spans": {kind: torch.zeros(6, 2, dtype=torch.long) for kind in ("hidden", "mlp")}},
            "differ in their spans",
        ),
    ],
)
def test_traces_that_differ_are_not_averaged(traced, name, change, message):
    with pytest.raises((ArtefactError, TraceError)) as caught:
        average([traced, replace(traced, **change)])
    assert message in str(caught.value), name


def test_no_traces_have_no_average():
    with pytest.raises(ArtefactError, match="no results to average"):
        average([])


def test_real_traces_average(random_llava, make_photo, traced):
    prompt = random_llava.prompt(make_photo(1), "Who founded the company in this photo?", constraint="the company")
    traces = [
        causal_trace(
            random_llava,
            prompt,
            corruption=SwapImage(make_photo(seed)),
            positions=positions,
            progress=False,
            even_if_weak=True,
        )
        for positions in (traced.rows, "tokens")
        for seed in (2, 3, 4)
    ]
    mean = average(traces[:3])
    slow = torch.stack([trace.indirect_effect("mlp") for trace in traces[:3]])
    assert torch.allclose(mean.indirect_effect("mlp"), slow.mean(0), rtol=0, atol=1e-14)
    assert torch.allclose(mean.interval("mlp")[0], mean_interval(slow)[0], rtol=0, atol=1e-12)
    low, high = mean.interval("hidden")
    assert (low <= mean.indirect_effect("hidden")).all() and (low < high).any()
    by_place = average(traces[3:])
    assert by_place.rows[0] == "image" and by_place.rows[-1] == "last token"
    assert torch.allclose(by_place.indirect_effect("mlp")[-1], mean.indirect_effect("mlp")[-1], rtol=0, atol=1e-6)


# Single tokens: ROME's groups. The effect of a token is its position in tenths, that of the image is 0.05.


def over_tokens(traced: CausalTrace, *, before: int, constraint: int, after: int, image: bool = True) -> CausalTrace:
    """A trace with one row per token: a picture of two tokens, then words, `constraint` of them starred."""
    start, words = 2 * image, before + constraint + after
    tokens = ("<image>",) * start + tuple(f"w{index}" for index in range(words))
    positions = (((0, 1),) if image else ()) + tuple((start + index,) for index in range(words))
    effects = [0.05] * image + [0.1 * index for index in range(words)]
    scores = 0.1 + torch.tensor(effects, dtype=torch.float64).view(1, -1, 1, 1).expand(1, -1, 6, 2)
    return replace(
        traced,
        rows=(("image",) if image else ()) + tokens[start:],
        row_tokens=(None,) * (words + image),
        row_positions=positions,
        tokens=tokens,
        input_ids=tuple(range(len(tokens))),
        grouped=False,
        starred=tuple(range(start + before, start + before + constraint)),
        patches=((0, 0, 0, 0), (1, 0, 1, 0)) if image else (),
        samples={"mlp": scores},
    )


def effects_by_row(mean):
    """The mean effect of each row in the first layer."""
    return dict(zip(mean.rows, mean.indirect_effect("mlp")[:, 0].tolist(), strict=True))


def test_single_tokens_are_put_into_groups_by_their_place(traced):
    mean = average([over_tokens(traced, before=1, constraint=4, after=4)])
    assert effects_by_row(mean) == pytest.approx(
        {
            "image": 0.05,
            "first constraint token": 0.1,
            "middle constraint tokens": 0.25,
            "last constraint token": 0.4,
            "first subsequent token": 0.5,
            "further tokens": 0.65,
            "last token": 0.8,
        }
    )
    assert dict(zip(mean.rows, mean.row_tokens, strict=True))["last constraint token"] == "constraint_last"
    assert mean.row_tokens[-1] == "last" and mean.row_tokens[0] is None


def test_a_prompt_without_a_group_is_left_out_of_its_row(traced):
    long = over_tokens(traced, before=0, constraint=3, after=3)
    short = over_tokens(traced, before=2, constraint=1, after=1, image=False)
    mean = average([long, short])
    assert effects_by_row(mean) == pytest.approx(
        {
            "image": 0.05,
            "first constraint token": (0.0 + 0.2) / 2,
            "middle constraint tokens": 0.1,
            "last constraint token": (0.2 + 0.2) / 2,  # a constraint of one token is its first and its last
            "first subsequent token": (0.3 + 0.3) / 2,
            "further tokens": 0.4,
            "last token": (0.5 + 0.3) / 2,
        }
    )
    low, high = mean.interval("mlp")
    has_interval = dict(zip(mean.rows, (~low.isnan())[:, 0].tolist(), strict=True))
    assert has_interval["last token"] and not has_interval["image"]
    assert effects_by_row(average([short, short])).keys().isdisjoint({"image", "middle constraint tokens"})
    (block,) = [block for block in mean.causal_blocks("mlp", 1.0) if block.row == "further tokens"]
    assert block.interval is None  # one prompt alone has that row
    frame = mean.to_dataframe()
    assert set(frame[frame.row == "image"].n) == {1} and set(frame[frame.row == "last token"].n) == {2}
    assert frame[frame.row == "image"].low.isna().all()


def test_single_tokens_without_a_constraint_have_no_common_rows(traced):
    with pytest.raises(TraceError, match="has none; build prompts with constraint="):
        average([replace(over_tokens(traced, before=1, constraint=1, after=1), starred=())])
