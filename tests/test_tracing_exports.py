"""Traces for other programs: long tables for pandas, and ROME's dictionary and files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from multrace.tracing import CausalTrace, TraceError, average

# Tables.


@pytest.fixture
def two(traced) -> CausalTrace:
    """Two metrics, windows, an estimate, and a kind with one column; the second metric has no total effect."""
    flags = torch.zeros(4, 6, dtype=torch.bool)
    flags[3, 4] = True
    spans = torch.tensor([[max(0, layer - 1), min(5, layer + 1)] for layer in range(6)])
    samples = {"mlp": traced.samples["mlp"], "projector": traced.samples["mlp"][:, :, :1]}
    return replace(
        traced,
        metrics=("probability", "nothing"),
        clean_scores=torch.tensor([0.9, 0.0], dtype=torch.float64),
        corrupted_scores=torch.cat([traced.corrupted_scores, torch.zeros(1, 2).double()]),
        samples={kind: torch.cat([values, values * 0]) for kind, values in samples.items()},
        spans={"mlp": spans, "projector": torch.tensor([[0, 0]])},
        estimated={"mlp": flags},
    )


def test_a_prediction_is_correct_where_the_model_itself_says_so(traced):
    assert replace(traced, is_predicted=False).to_rome("mlp")["correct_prediction"] is False
    assert traced.to_rome("mlp")["correct_prediction"] is True


def test_a_table_has_one_line_per_value(two):
    frame = two.to_dataframe()
    assert list(frame.columns) == [
        "kind",
        "row",
        "label",
        "positions",
        "column",
        "first_layer",
        "last_layer",
        "metric",
        "sample",
        "score",
        "indirect_effect",
        "normalised_effect",
        "estimated",
    ]
    assert len(frame) == 2 * 4 * 6 * 2 + 2 * 4 * 1 * 2
    for kind, metric, row, column, sample in (("mlp", 0, 3, 4, 1), ("mlp", 0, 0, 0, 0), ("projector", 0, 2, 0, 1)):
        (line,) = frame.query(
            f"kind == {kind!r} and metric == {two.metrics[metric]!r} and row == {row} and column == {column} "
            f"and sample == {sample}"
        ).itertuples()
        effect = float(two.indirect_samples(kind)[row, column, sample])
        assert line.score == float(two.samples[kind][metric, row, column, sample])
        assert line.indirect_effect == effect
        assert line.normalised_effect == pytest.approx(effect / 0.8)
        assert (line.label, line.positions) == (two.rows[row], two.row_positions[row])
        assert (line.first_layer, line.last_layer) == tuple(two.spans[kind][column].tolist())
    assert frame[frame.estimated].groupby(["kind", "row", "column"]).ngroups == 1
    assert frame[frame.metric == "nothing"].normalised_effect.isna().all()
    means = frame[(frame.kind == "mlp") & (frame.metric == "probability")].groupby(["row", "column"]).indirect_effect
    assert np.allclose(means.mean().to_numpy().reshape(4, 6), two.indirect_effect("mlp").numpy())


def test_a_table_of_one_row_keeps_its_positions_together(traced):
    names = ("rows", "row_tokens", "row_positions")
    one = replace(
        traced,
        samples={"mlp": traced.samples["mlp"][:, :1]},
        **{name: getattr(traced, name)[:1] for name in names},
    )
    frame = one.to_dataframe()
    assert len(frame) == 12 and set(frame.positions) == {(0, 1)}


def test_a_table_of_an_average_has_intervals(traced, shift_trace):
    mean = average([traced, shift_trace(traced, 0.1)])
    frame = mean.to_dataframe()
    assert list(frame.columns) == ["kind", "metric", "row", "layer", "effect", "low", "high", "n"]
    (line,) = frame[(frame.kind == "mlp") & (frame.row == "last") & (frame.layer == 4)].itertuples()
    low, high = (float(side[3, 4]) for side in mean.interval("mlp"))
    assert (line.effect, line.low, line.high, line.n) == (float(mean.indirect_effect("mlp")[3, 4]), low, high, 2)
    alone = average([traced]).to_dataframe()
    assert alone.low.isna().all() and not alone.effect.isna().any()


# ROME's layout.


def test_romes_dictionary_has_its_keys_and_shapes(traced):
    found = traced.to_rome("mlp")
    assert set(found) == {
        "scores",
        "low_score",
        "high_score",
        "input_ids",
        "input_tokens",
        "subject_range",
        "answer",
        "window",
        "correct_prediction",
        "kind",
    }
    assert found["scores"].shape == (6, 6)
    assert np.allclose(found["scores"][[3, 5]], traced.scores["mlp"][[2, 3]].numpy())
    assert np.isnan(found["scores"][[0, 1, 2, 4]]).all()  # in groups of several tokens only
    assert found["low_score"] == pytest.approx(0.1) and found["high_score"] == pytest.approx(0.9)
    assert found["input_ids"].tolist() == list(traced.input_ids)
    assert found["input_tokens"].tolist() == list(traced.tokens)
    assert found["subject_range"].tolist() == [3, 4]
    assert (found["answer"], found["window"], found["correct_prediction"], found["kind"]) == ("Ada", 1, True, "mlp")
    assert traced.to_rome("hidden")["kind"] is None
    attention = replace(traced, samples={"attention": traced.samples["mlp"]}).to_rome("attention")
    assert attention["kind"] == "attn"


def test_romes_file_opens_without_pickle_and_says_what_the_dictionary_says(traced, tmp_path):
    for kind, name in (("hidden", ""), ("mlp", "mlp")):
        path = traced.save_rome(tmp_path / f"{kind}.npz", kind)
        with np.load(path, allow_pickle=False) as file:
            assert set(file) == set(traced.to_rome(kind))
            assert file["kind"].item() == name
            for key, value in traced.to_rome(kind).items():
                if key != "kind":
                    assert np.array_equal(file[key], value, equal_nan=key == "scores"), key


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("direct", {"effect": "direct"}, "mlp", "not direct effects of restored states"),
        ("corrupt", {"direction": "corrupt"}, "mlp", "not total effects of corrupted states"),
        ("metric", {"metrics": ("log_probability",)}, "mlp", "no metric 'probability' in this trace"),
        ("kind", {}, "projector", "ROME's layout knows no 'projector'; ask for one of 'hidden', 'mlp', 'attention'"),
        ("not traced", {}, "attention", "no 'attention' effects in this trace"),
        ("groups", {"row_positions": ((0, 1),) * 4}, "mlp", 'trace with positions="tokens"'),
    ],
)
def test_what_rome_cannot_hold_is_refused(traced, name, change, kind, message):
    with pytest.raises(TraceError) as caught:
        replace(traced, **change).to_rome(kind)
    assert message in str(caught.value), name
