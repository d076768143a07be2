"""What traces say: effects in every metric and direction, blocks, onset and edit site."""

import statistics
from dataclasses import replace

import pytest
import torch
from multrace.tracing import CausalTrace, TraceError


def only(trace: CausalTrace, *kinds: str) -> CausalTrace:
    """The trace with these kinds alone."""
    return replace(trace, samples={kind: trace.samples[kind] for kind in kinds})


def weak(trace: CausalTrace) -> CausalTrace:
    """The trace with a clean score below the corrupted one."""
    return replace(trace, clean_scores=torch.tensor([0.05], dtype=torch.float64))


# What a map says.


def test_effects_are_differences_of_probabilities(traced):
    assert traced.total_effect == pytest.approx(0.8)
    assert torch.allclose(traced.indirect_effect("hidden")[3], torch.tensor([0, 0, 0.1, 0.3, 0.6, 0.8]).double())
    assert traced.best("mlp") == ("constraint_last", 0, pytest.approx(0.5))
    assert traced.best("hidden").layer == 5


def test_causal_blocks_are_runs_of_strong_layers_strongest_first(traced, shift_trace):
    found = [(block.row, block.positions, block.first, block.last) for block in traced.causal_blocks("mlp", 0.4)]
    expected = [("constraint_last", (3,), 0, 1), ("image", (0, 1), 0, 0), ("last", (5,), 0, 0), ("last", (5,), 4, 5)]
    assert found == expected
    assert [block.effect for block in traced.causal_blocks("mlp", 0.4)] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    assert len(traced.causal_blocks("mlp", 1.0)) == 1
    nothing = shift_trace(only(traced, "mlp"), -0.6)  # all below the corrupted score
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
    # without the constraint's information anywhere earlier, its larger MLP effect wins; where restoring its embedding
    # brings all back, cells that restore layer 0 do not count
    informed = traced.samples["hidden"].clone()
    informed[:, 2] += 0.3
    other = replace(traced, samples={**traced.samples, "hidden": informed}).edit_site()
    assert (other.token, other.layer, other.onset) == ("constraint_last", 1, 0)


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
        (
            "metric",
            lambda trace: trace.indirect_effect("mlp", "logit"),
            "it holds 'probability'; trace again with metrics",
        ),
        ("share of nothing", lambda trace: weak(trace).normalised_effect("mlp"), "total effect -0.050"),
        ("direct", lambda trace: replace(trace, effect="direct").edit_site(), "direct effects of restored states"),
        (
            "other way round",
            lambda trace: replace(trace, direction="corrupt").edit_site(),
            "total effects of corrupted states put into the clean run",
        ),
        ("severed", lambda trace: replace(trace, severed="mlp").edit_site(), "later MLP outputs severed"),
        ("fraction", lambda trace: trace.causal_blocks("mlp", 0), "fraction 0 is not a share"),
        ("no effect", lambda trace: weak(trace).edit_site(), "does not lower the answer's probability"),
        (
            "no token",
            lambda trace: replace(trace, row_tokens=(None,) * 4).edit_site(),
            "trace more rows, such as positions",
        ),
        (
            "no mlp",
            lambda trace: only(trace, "hidden").edit_site(),
            "no 'mlp' effects in this trace",
        ),
    ],
)
def test_questions_without_an_answer_are_refused(traced, name, ask, message):
    with pytest.raises(TraceError) as caught:
        ask(traced)
    assert message in str(caught.value), name


# Metrics, samples, directions and kinds with other columns.


def test_every_metric_has_its_own_effects(traced):
    def both(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values.log()])

    two = replace(
        traced,
        metrics=("probability", "log_probability"),
        clean_scores=both(traced.clean_scores),
        corrupted_scores=both(traced.corrupted_scores),
        samples={kind: both(values) for kind, values in traced.samples.items()},
    )
    assert two.total_effect == two.total_effect_of("probability") == traced.total_effect
    mean_log = statistics.mean(traced.corrupted.log().tolist())
    assert two.total_effect_of("log_probability") == pytest.approx(traced.clean_scores.log().item() - mean_log)
    expected = traced.scores["mlp"].log() - mean_log
    assert torch.allclose(two.indirect_effect("mlp", "log_probability"), expected)
    assert torch.equal(two.indirect_effect("mlp"), traced.indirect_effect("mlp"))
    assert not torch.allclose(two.indirect_effect("mlp"), expected)
    share = two.normalised_effect("mlp", "log_probability")
    assert torch.allclose(share, expected / two.total_effect_of("log_probability"))


def test_axes_name_what_the_samples_hold(traced):
    axes = traced.axes("mlp")
    assert list(axes) == ["metric", "row", "column", "sample"]
    assert tuple(map(len, axes.values())) == traced.samples["mlp"].shape
    assert axes["column"][5] == (5, 5) and axes["row"] == traced.rows


def test_effects_are_taken_sample_by_sample(traced):
    samples = traced.indirect_samples("mlp")
    assert torch.allclose(samples[0, 0], torch.tensor([0.45, 0.35]).double())  # corrupted .05 and .15
    assert torch.allclose(samples.mean(-1), traced.indirect_effect("mlp"))
    (block,) = traced.causal_blocks("mlp", 1.0)
    assert block.spread == pytest.approx(statistics.stdev([0.55, 0.45]))
    assert block.interval is None
    alone = replace(
        traced,
        corrupted_scores=traced.corrupted_scores[:, :1],
        samples={kind: values[..., :1] for kind, values in traced.samples.items()},
    )
    assert alone.causal_blocks("mlp", 1.0)[0].spread is None


def test_corrupted_states_put_in_count_what_is_lost(traced):
    other = replace(traced, direction="corrupt")
    assert torch.allclose(other.indirect_effect("mlp"), 0.9 - traced.scores["mlp"])
    assert other.total_effect == traced.total_effect
    assert not torch.allclose(other.indirect_effect("mlp"), traced.indirect_effect("mlp"))


def test_a_block_says_which_layers_its_windows_restore_and_what_an_editor_calls_the_row(traced):
    spans = torch.tensor([[max(0, layer - 1), min(5, layer + 1)] for layer in range(6)])
    wide = replace(traced, spans={**traced.spans, "mlp": spans}, window=3)
    block, *_, last = wide.causal_blocks("mlp", 0.4)
    assert (block.token, block.first, block.last, block.layers) == ("constraint_last", 0, 1, (0, 1, 2))
    assert (last.token, last.first, last.last, last.layers) == ("last", 4, 5, (3, 4, 5))
    assert traced.causal_blocks("mlp", 0.4)[0].layers == (0, 1)
    assert [block.token for block in wide.causal_blocks("mlp", 0.7)] == ["constraint_last", None]


def test_kinds_may_have_other_numbers_of_columns(traced):
    projector = torch.tensor([[[[0.8, 0.9]], [[0.1, 0.1]], [[0.1, 0.1]], [[0.1, 0.1]]]], dtype=torch.float64)
    more = replace(
        traced,
        samples={**traced.samples, "projector": projector},
        spans={**traced.spans, "projector": torch.tensor([[0, 0]])},
    )
    assert more.best("projector") == ("image", 0, pytest.approx(0.75))
    (block,) = more.causal_blocks("projector")
    assert (block.row, block.layers) == ("image", (0,))


def test_what_was_not_traced_is_never_the_best(traced):
    holes = traced.samples["mlp"].clone()
    holes[:, 2] = torch.nan
    assert replace(traced, samples={"mlp": holes}).best("mlp") == ("image", 0, pytest.approx(0.4))
    assert len(replace(traced, samples={"mlp": holes}).causal_blocks("mlp", 1.0)) == 1
