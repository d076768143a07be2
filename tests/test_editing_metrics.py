"""The metrics against values worked out by hand, each beside a case in which it must differ."""

import math

import pytest
import torch
from multrace.editing import EditError
from multrace.editing.evaluation import (
    SPLITS,
    agreement,
    bootstrap_interval,
    exact_match,
    fluency,
    kl_divergence,
    ngram_entropy,
    normalised_probability,
    sequence_accuracy,
    split_of,
    token_accuracy,
    vqa_accuracy,
    vqa_match,
    vqa_normalised,
)

NORMALISED = {
    "case": ("Red Fox", "red fox"),
    "articles": ("the end of a road, an inn", "end of road inn"),
    "no article inside a word": ("theatre", "theatre"),
    "number words": ("None of Ten, two left", "0 of 10 2 left"),
    "eleven is no number word of it": ("eleven", "eleven"),
    "comma between digits": ("1,000", "1000"),
    "it takes every mark with it": ("1,000-2,000", "10002000"),
    "mark between letters": ("red/blue", "red blue"),
    "mark at a blank": ("red, blue", "red blue"),
    "full stop": ("St. Ives.", "st ives"),
    "decimal point": ("2.5", "2.5"),
    "contraction": ("dont", "don't"),
    "contraction, either apostrophe lost": ("couldnt've couldn'tve", "couldn't've couldn't've"),
    "contraction as it should be": ("isn't", "isn't"),
    "no contraction": ("im", "im"),
    "lines and tabs": (" a\nred\tfox ", "red fox"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("text", "wanted"), NORMALISED.values(), ids=NORMALISED)
def test_vqa_normalisation(text: str, wanted: str):
    assert vqa_normalised(text) == wanted


def test_matches():
    assert exact_match(" Ada Example\n", "Ada Example")
    assert not exact_match("ada example", "Ada Example")
    assert vqa_match("The ada example.", "Ada Example")
    assert not vqa_match("Ada", "Ada Example")


def test_vqa_accuracy_leaves_one_annotator_out():
    ten = ["red"] * 3 + ["blue"] * 7
    # leaving out one of the three who agree leaves two: (3 * 2/3 + 7 * 1) / 10
    assert vqa_accuracy("Red", ten) == pytest.approx(0.9)
    assert vqa_accuracy("blue", ten) == 1
    assert vqa_accuracy("green", ten) == 0
    assert vqa_accuracy("red", ["red"]) == 1
    with pytest.raises(EditError, match="at least one"):
        vqa_accuracy("red", [])


def test_teacher_forced_accuracies():
    assert token_accuracy([1, 2, 9], [1, 2, 3]) == pytest.approx(2 / 3)
    assert sequence_accuracy([1, 2, 9], [1, 2, 3]) == 0
    assert sequence_accuracy([1, 2, 3], [1, 2, 3]) == 1
    for predicted, wanted in (([], []), ([1], [1, 2])):
        with pytest.raises(EditError, match="one for each"):
            token_accuracy(predicted, wanted)


def test_the_normalised_probability_does_not_punish_length():
    assert normalised_probability([math.log(0.25), math.log(1.0)]) == pytest.approx(0.5)
    assert normalised_probability([math.log(0.5)] * 7) == pytest.approx(normalised_probability([math.log(0.5)]))
    with pytest.raises(EditError, match="without tokens"):
        normalised_probability([])


def test_agreement_counts_places_and_minds_the_order():
    before = torch.tensor([[1, 2], [3, 4], [5, 6]])
    after = torch.tensor([[1, 2], [4, 3], [5, 7]])
    assert agreement(before, after) == pytest.approx(3 / 6)
    assert agreement(before[:, :1], after[:, :1]) == pytest.approx(2 / 3)
    assert agreement(before, before) == 1
    longer = torch.cat([torch.tensor([[8, 8]]), before])  # a longer prompt is lined up at its end
    assert agreement(before, longer) == 1
    for other in (before[0], before[:, :1], before[:0]):
        with pytest.raises(EditError, match="cannot compare"):
            agreement(before, other)


def test_kl_divergence_in_nats():
    before, after = (torch.tensor(shares).log() for shares in ([0.5, 0.5, 1e-30], [0.25, 0.75, 1e-30]))
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(before, after) == pytest.approx(wanted, rel=1e-6)
    assert kl_divergence(before + 3, after - 5) == pytest.approx(wanted, rel=1e-6)  # logits, so shifts do not count
    assert kl_divergence(after, before) != pytest.approx(wanted, rel=1e-3)
    assert kl_divergence(before, before) == 0
    assert kl_divergence(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0])) == pytest.approx(math.log(2))


def test_fluency_is_low_where_a_text_repeats_itself():
    assert ngram_entropy("abcd", 2) == pytest.approx(math.log2(3))
    assert ngram_entropy("aaaa", 2) == 0
    assert ngram_entropy("ab", 3) == 0
    assert fluency("abcd") == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * 1) / 2)
    assert fluency("a b a b a b".split()) < fluency("a b c d e f".split())


def test_the_four_ways_to_succeed():
    assert split_of(moved=[True, True], kept=[True]) == SPLITS[0] == "generalised"
    assert split_of(moved=[True, False], kept=[True]) == "too narrow"
    assert split_of(moved=[True], kept=[True, False]) == "too broad"
    assert split_of(moved=[False], kept=[False]) == "both"
    assert split_of(moved=[], kept=[]) == "generalised"


def test_an_interval_draws_whole_records():
    values, records = [1, 1, 1, 1, 0, 0, 0, 0], ["a"] * 4 + ["b"] * 4
    found = bootstrap_interval(values, records, seed=3)
    assert (found.mean, found.number, found.records) == (0.5, 8, 2)
    assert (found.low, found.high) == (0, 1)  # a quarter of the draws take "a" twice
    apart = bootstrap_interval(values, list("abcdefgh"), seed=3)
    assert 0 < apart.low < apart.high < 1
    assert bootstrap_interval(values, records, seed=3) == found
    assert bootstrap_interval(list(range(50)), list(map(str, range(50))), seed=1) != bootstrap_interval(
        list(range(50)), list(map(str, range(50))), seed=2
    )


def test_an_interval_agrees_with_one_drawn_record_by_record():
    values, records = [0.1, 0.9, 0.4, 0.4, 0.7], ["x", "x", "y", "z", "z"]
    groups = [[0.1, 0.9], [0.4], [0.4, 0.7]]
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(4000):
        drawn = [groups[index] for index in torch.randint(0, 3, (3,), generator=generator)]
        pooled = [value for group in drawn for value in group]
        means.append(sum(pooled) / len(pooled))
    low, high = torch.tensor(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    found = bootstrap_interval(values, records)
    assert found.mean == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_an_interval_of_nothing_and_of_one_record():
    empty = bootstrap_interval([], [])
    assert math.isnan(empty.mean) and empty.number == 0
    one = bootstrap_interval([0.0, 1.0], ["a", "a"])
    assert (one.mean, one.low, one.high) == (0.5, 0.5, 0.5)
    with pytest.raises(EditError, match="one record's name per value"):
        bootstrap_interval([1.0], [])
