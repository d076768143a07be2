"""What traces say: effects, blocks, onset and edit site, and averages with intervals."""

import statistics
from dataclasses import replace

import pytest
import torch
from multrace.tracing import SwapImage, TraceError, average, causal_trace

# What a map says.


def test_effects_are_differences_of_probabilities(traced):
    assert traced.total_effect == pytest.approx(0.8)
    assert torch.allclose(traced.indirect_effect("hidden")[3], torch.tensor([0, 0, 0.1, 0.3, 0.6, 0.8]).double())
    assert traced.best("mlp") == ("constraint_last", 0, pytest.approx(0.5))
    assert traced.best("hidden").layer == 5


def test_causal_blocks_are_runs_of_strong_layers_strongest_first(traced):
    found = [(block.row, block.positions, block.first, block.last) for block in traced.causal_blocks("mlp", 0.4)]
    expected = [("constraint_last", (3,), 0, 1), ("image", (0, 1), 0, 0), ("last", (5,), 0, 0), ("last", (5,), 4, 5)]
    assert found == expected
    assert [block.effect for block in traced.causal_blocks("mlp", 0.4)] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    assert len(traced.causal_blocks("mlp", 1.0)) == 1
    nothing = replace(traced, scores={"mlp": torch.full((4, 6), 0.05, dtype=torch.float64)})  # below the corrupted 0.1
    assert nothing.causal_blocks("mlp") == ()


def test_the_onset_is_where_a_row_first_carries_the_information(traced):
    assert [traced.onset(row) for row in traced.rows] == [0, 0, None, 3]
    assert [traced.onset("last", share) for share in (0.1, 0.5, 1.0)] == [2, 4, 5]
    assert traced.onset(-1) == 3


def test_an_edit_belongs_at_the_mlp_peak_at_or_after_the_onset(traced):
    site = traced.edit_site()
    assert (site.token, site.layer, site.onset) == ("last", 4, 3)  # not layer 0, where the key knows the wording only
    assert site.effect == pytest.approx(0.2)
    assert "'last'" in site.reason and "layer 3" in site.reason and "layer 4" in site.reason
    # without the constraint's information anywhere earlier, its larger MLP effect wins
    informed = traced.scores["hidden"].clone()
    informed[2] += 0.3
    other = replace(traced, scores={**traced.scores, "hidden": informed}).edit_site()
    assert (other.token, other.layer, other.onset) == ("constraint_last", 0, 0)


@pytest.mark.parametrize(
    ("name", "ask", "message"),
    [
        (
            "kind not traced",
            lambda trace: trace.indirect_effect("attention"),
            "holds 'hidden', 'mlp'; trace again with",
        ),
        ("row not there", lambda trace: trace.onset("subject"), "no single row 'subject' in this trace: the rows are"),
        ("row index", lambda trace: trace.onset(4), "pass an index from 0 to 3"),
        (
            "same label twice",
            lambda trace: replace(trace, rows=("a", "a", "b", "c")).onset("a"),
            "several rows have that",
        ),
        ("fraction", lambda trace: trace.causal_blocks("mlp", 0), "fraction 0 is not a share"),
        ("no effect", lambda trace: replace(trace, clean=0.05).edit_site(), "does not lower the answer's probability"),
        (
            "no token",
            lambda trace: replace(trace, row_tokens=(None,) * 4).edit_site(),
            "trace more rows, such as positions",
        ),
        (
            "no mlp",
            lambda trace: replace(trace, scores={"hidden": trace.scores["hidden"]}).edit_site(),
            "no 'mlp' effects in this trace",
        ),
    ],
)
def test_questions_without_an_answer_are_refused(traced, name, ask, message):
    with pytest.raises(TraceError) as caught:
        ask(traced)
    assert message in str(caught.value), name


# Averages.


def test_an_average_holds_means_and_95_percent_intervals(traced):
    shifts = (0.0, 0.1, 0.3)
    traces = [
        replace(traced, scores={kind: scores + shift for kind, scores in traced.scores.items()}, clean=0.9 - shift)
        for shift in shifts
    ]
    mean = average(traces)
    assert mean.count == 3
    assert mean.total_effect == pytest.approx(0.8 - sum(shifts) / 3)
    half = 1.96 * statistics.stdev(shifts) / 3**0.5
    for kind in traced.kinds:
        expected = traced.indirect_effect(kind) + sum(shifts) / 3
        low, high = mean.interval(kind)
        assert torch.allclose(mean.indirect_effect(kind), expected, rtol=0, atol=1e-12)
        assert torch.allclose(low, expected - half, rtol=0, atol=1e-12)
        assert torch.allclose(high, expected + half, rtol=0, atol=1e-12)
    assert mean.total_interval() == pytest.approx((mean.total_effect - half, mean.total_effect + half))


def test_an_average_of_one_trace_says_what_the_trace_says(traced):
    mean = average([traced])
    assert all(torch.equal(mean.indirect_effect(kind), traced.indirect_effect(kind)) for kind in traced.kinds)
    assert mean.edit_site() == traced.edit_site()
    assert mean.onset("last") == traced.onset("last")
    assert [block.row for block in mean.causal_blocks()] == [block.row for block in traced.causal_blocks()]
    with pytest.raises(TraceError, match="needs at least two traces"):
        mean.interval("mlp")


def test_rows_of_different_tokens_name_no_token_in_an_average(traced):
    other = replace(traced, row_tokens=(None, None, None, "last"))
    assert average([traced, other]).row_tokens == (None, None, None, "last")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rows", {"rows": ("image", "question", "constraint", "last")}, "differ in their rows"),
        ("window", {"window": 3}, "these traces differ in their window (1 and 3)"),
        ("model", {"model": "another"}, "differ in their model (some-model and another)"),
        ("tokens", {"grouped": False}, "single tokens cannot be averaged"),
    ],
)
def test_traces_that_differ_are_not_averaged(traced, name, change, message):
    with pytest.raises(TraceError) as caught:
        average([traced, replace(traced, **change)])
    assert message in str(caught.value), name


def test_no_traces_have_no_average():
    with pytest.raises(TraceError, match="no traces to average"):
        average([])


def test_real_traces_average(random_llava, make_photo, traced):
    prompt = random_llava.prompt(make_photo(1), "Who founded the company in this photo?", constraint="the company")
    traces = [
        causal_trace(
            random_llava, prompt, corruption=SwapImage(make_photo(seed)), positions=traced.rows, progress=False
        )
        for seed in (2, 3, 4)
    ]
    mean = average(traces)
    assert torch.equal(mean.effects["mlp"][1], traces[1].indirect_effect("mlp"))
    low, high = mean.interval("hidden")
    assert (low <= mean.indirect_effect("hidden")).all() and (low < high).any()
