"""Predicting whether an answer is right: AUROC against pair counting, nothing scored in sample, files and drawings."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_models import close
from multrace import ModelError, VisionLanguageModel
from multrace.artefacts import ArtefactError, auroc, bootstrap_counts, weighted_auroc
from multrace.data import World
from multrace.tracing import FailureFeatures, FailurePrediction, TraceError, failure_features, predict_failure
from multrace.tracing.attention import attention_contributions
from multrace.tracing.failure import Readings, best_window, held_out_scores, roc_curve
from result_checks import assert_same, assert_shown, svg
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.preprocessing import StandardScaler

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company"
LAYERS, HEADS, RECORDS = 6, 4, 80


def pairs(scores: Sequence[float], is_right: Sequence[bool]) -> float:
    """The share of pairs of a right and a wrong answer of which the right one scores higher, ties half; counted."""
    right = [score for score, label in zip(scores, is_right, strict=True) if label]
    wrong = [score for score, label in zip(scores, is_right, strict=True) if not label]
    won = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one in right for other in wrong)
    return won / (len(right) * len(wrong))


@pytest.mark.parametrize("distinct", [3, 1000])
def test_auroc_is_the_share_of_pairs(distinct):
    generator = np.random.default_rng(distinct)
    scores, labels = generator.integers(0, distinct, 57) / 7, generator.random(57) < 0.4
    assert auroc(scores, labels) == pytest.approx(pairs(scores, labels), abs=1e-12)
    assert auroc(-scores, labels) == pytest.approx(1 - pairs(scores, labels), abs=1e-12)
    counts = bootstrap_counts(labels, seed=1, draws=20)
    assert {(int(draw[labels].sum()), int(draw[~labels].sum())) for draw in counts} == {(labels.sum(), (~labels).sum())}
    found = weighted_auroc(scores, labels, counts)
    for draw, value in zip(counts, found, strict=True):
        assert value == pytest.approx(pairs(scores.repeat(draw), labels.repeat(draw)), abs=1e-12)
    assert len(set(found.tolist())) > 15
    assert np.array_equal(counts, bootstrap_counts(labels, seed=1, draws=20))
    assert not np.array_equal(counts, bootstrap_counts(labels, seed=2, draws=20))


def test_a_known_auroc():
    assert auroc(np.array([1.0, 2, 3, 4]), np.array([False, True, False, True])) == 0.75
    assert auroc(np.ones(4), np.array([False, True, False, True])) == 0.5


def test_the_area_under_the_drawn_curve_is_the_auroc():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 9, 40).astype(float), generator.random(40) < 0.5
    one, truth = torch.from_numpy(scores)[None], torch.from_numpy(labels)
    wrong, right = roc_curve(one, truth)
    assert float(torch.trapezoid(right, wrong)) == pytest.approx(auroc(scores, labels), abs=1e-6)
    wrong, right = roc_curve(torch.cat([one, -one, one]), truth)  # the mean of several
    assert float(torch.trapezoid(right, wrong)) == pytest.approx((1 + auroc(scores, labels)) / 3, abs=5e-3)


def features_of(
    labels: np.ndarray, *, signal: float, layer: int = 3, seed: int = 0, heads: int = HEADS
) -> list[FailureFeatures]:
    """Noise everywhere, and in one layer's contributions and one of its heads so much of the label."""
    generator = np.random.default_rng(seed)

    def one(label: bool) -> FailureFeatures:
        head, weight = (torch.from_numpy(generator.normal(size=(LAYERS, heads))) for _ in range(2))
        each = torch.from_numpy(generator.normal(size=LAYERS))
        each[layer] += signal * float(label)
        head[layer, 1] += signal * float(label)
        return FailureFeatures(
            model="some-model",
            question="Who?",
            contributions=each,
            head_contributions=head,
            weights=weight.mean(1),
            head_weights=weight,
            first_token="A",
            first_probability=float(generator.random()),
            answer=None,
            answer_probability=None,
        )

    return [one(bool(label)) for label in labels]


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.random.default_rng(5).permutation(np.arange(RECORDS) < 48)


@pytest.fixture(scope="module")
def prediction(labels: np.ndarray) -> FailurePrediction:
    return predict_failure(features_of(labels, signal=4.0), labels.tolist())


def test_a_feature_that_carries_the_label_is_found(prediction):
    assert prediction.names == ("contribution", "weight", "answer probability", "combination", "all heads")
    assert all(prediction.auroc(name) > 0.9 for name in ("contribution", "combination", "all heads"))
    assert all(prediction.interval(name)[0] > 0.8 for name in ("contribution", "combination", "all heads"))
    assert 0.3 < prediction.auroc("answer probability") < 0.7 and 0.3 < prediction.auroc("weight") < 0.7
    fits = 5 * prediction.repeats
    assert int(prediction.layer_counts["contribution"][3]) == fits > int(prediction.layer_counts["weight"].max())
    assert all(int(counts.sum()) == 2 * fits for counts in prediction.layer_counts.values())
    value, low, high = prediction.difference("contribution", "answer probability")
    assert 0 < low < value < high
    assert min(prediction.feature_counts["combination"]) >= 1


def test_the_label_s_own_scores_are_counted(prediction, labels):
    for name in prediction.names:
        cuts = prediction.scores[name].tolist()
        assert len(cuts) == (1 if name == "answer probability" else prediction.repeats)
        assert prediction.auroc(name) == pytest.approx(np.mean([pairs(cut, labels) for cut in cuts]), abs=1e-12)
        low, high = prediction.interval(name)
        assert low < prediction.auroc(name) < high
        ordered = sorted(prediction.draws[prediction.names.index(name)].tolist())
        assert len(ordered) == 2000 and ordered[47] <= low <= ordered[51] and ordered[1947] <= high <= ordered[1952]


def test_shuffled_labels_are_not_predicted(labels):
    features, areas, holding = features_of(labels, signal=4.0), [], []
    for seed in range(3):
        found = predict_failure(features, np.random.default_rng(seed).permutation(labels).tolist())
        areas.append([found.auroc(name) for name in found.names])
        holding += [low <= 0.5 <= high for low, high in map(found.interval, found.names)]
    assert np.mean(areas, axis=0).tolist() == pytest.approx([0.5] * 5, abs=0.12)
    assert np.mean(holding) >= 0.8


def test_noise_is_not_predicted_though_it_could_be_learned_by_heart():
    """With more features than records a probe is perfect on what it was fitted to; out of fold it knows nothing."""
    areas, in_sample, best = [], [], []
    for seed in range(3):
        labels = np.random.default_rng(seed).permutation(np.arange(60) < 30)
        noise = features_of(labels, signal=0.0, seed=seed, heads=20)
        found = predict_failure(noise, labels.tolist(), seed=seed)
        areas.append([found.auroc(name) for name in ("contribution", "combination", "all heads")])
        heads = np.stack([each.head_contributions.flatten().numpy() for each in noise])
        model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=0.3, random_state=0).fit(heads, labels)
        in_sample.append(auroc(heads @ model.coef_[0], labels))
        layers = np.stack([each.contributions.numpy() for each in noise])
        best.append(max(auroc(layers[:, [first, first + 1]].mean(1), labels) for first in range(LAYERS - 1)))
    assert max(np.mean(areas, axis=0)) < 0.58
    assert np.mean(in_sample) > 0.95
    assert np.mean(best) > np.mean(areas, axis=0)[0] + 0.05  # the best layer, chosen by the labels that it is tested on


def test_every_score_is_made_without_its_record(labels):
    """Against folds, choices and fits in plain words."""
    generator = np.random.default_rng(1)
    layers, weights = (generator.normal(size=(RECORDS, LAYERS)) + 0.9 * labels[:, None] for _ in range(2))
    chance, heads = generator.random(RECORDS), generator.normal(size=(RECORDS, 9)) + 2 * labels[:, None]
    readings = Readings(by_layer={"contribution": layers, "weight": weights}, by_head=heads, probability=chance)
    found = held_out_scores(readings, labels, layers=None, folds=4, seed=3, progress=False)
    expected, windows = {name: np.zeros((10, RECORDS)) for name in found.scores}, []
    splits = RepeatedStratifiedKFold(n_splits=4, n_repeats=10, random_state=3).split(heads, labels)
    for number, (train, test) in enumerate(splits):
        cut, columns = number // 4, [chance]
        for name, values in (("contribution", layers), ("weight", weights)):
            ranked = [pairs(values[train, first : first + 2].mean(1), labels[train]) for first in range(LAYERS - 1)]
            first = int(np.argmax(ranked))
            columns.append(values[:, first : first + 2].mean(1))
            mean, deviation = columns[-1][train].mean(), columns[-1][train].std()
            expected[name][cut, test] = (columns[-1][test] - mean) / deviation
            windows += [(first, first + 1)] if name == "contribution" else []
        for name, each in (("combination", np.stack(columns, 1)), ("all heads", heads)):
            scaler = StandardScaler().fit(each[train])
            model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=0.05, max_iter=1000, random_state=3)
            model.fit(scaler.transform(each[train]), labels[train])
            expected[name][cut, test] = scaler.transform(each[test]) @ model.coef_[0]
    assert windows == found.windows["contribution"] and len(set(windows)) > 1
    for name, values in expected.items():
        assert np.allclose(found.scores[name], values, rtol=0, atol=1e-9), name
        assert len(set(values[0].tolist())) > RECORDS / 5, name  # not all zero
    assert best_window(layers[:, :1], labels) == (0,)


def test_fixed_layers_are_taken_as_they_are(labels):
    labels = labels[:40]
    features = features_of(labels, signal=2.0)
    half = predict_failure(features, labels.tolist(), layers="half")
    assert half.layers == (3, 4)
    raw = torch.stack([each.contributions[[3, 4]].mean() for each in features])
    assert torch.equal(half.scores["contribution"], raw[None])
    assert half.layer_counts["contribution"].tolist() == [0, 0, 0, 50, 50, 0]
    other = predict_failure(features, labels.tolist(), layers=[-1, 0])
    assert other.layers == (0, 5) and other.auroc("contribution") < half.auroc("contribution")


def test_the_same_seed_gives_the_same_numbers(labels):
    features, few = features_of(labels[:30], signal=1.0), labels[:30].tolist()
    one, two, three = (predict_failure(features, few, seed=seed, folds=2) for seed in (1, 1, 2))
    assert all(torch.equal(one.scores[name], two.scores[name]) for name in one.names)
    assert torch.equal(one.draws, two.draws) and not torch.equal(one.draws, three.draws)
    assert not torch.equal(one.scores["contribution"], three.scores["contribution"])


def test_what_cannot_be_predicted_is_refused(labels):
    features = features_of(labels, signal=1.0)
    few = [True] * 77 + [False] * 3
    cases = (
        ([True] * RECORDS, {}, "all 80 answers are right, so there is nothing to predict"),
        ([False] * RECORDS, {}, "all 80 answers are wrong"),
        ([True], {}, "80 features but 1 answers"),
        (few, {}, "3 wrong of 80 answers are too few for 5 folds"),
        ([not each for each in few], {}, "3 right of 80 answers are too few"),
        (labels.tolist(), {"folds": 1}, "too few for 1 folds"),
        (labels.tolist(), {"layers": [6]}, r"no layers \[6\] in these features; pass some of 0 to 5"),
        (labels.tolist(), {"layers": "late"}, "no layers 'late'"),
        (labels.tolist(), {"layers": []}, r"no layers \[\]"),
    )
    for is_right, options, text in cases:
        with pytest.raises(TraceError, match=text):
            predict_failure(features, is_right, **options)
    with pytest.raises(TraceError, match="there are no answers"):
        predict_failure([], [])
    mixed = [replace(features[0], model="another"), *features[1:]]
    with pytest.raises(TraceError, match="different models or sizes"):
        predict_failure(mixed, labels.tolist())
    predict_failure(features, few, folds=3)


def test_features_are_what_contributions_say(random_llava: VisionLanguageModel, photo):
    prompt = random_llava.prompt(photo, QUESTION, constraint=CONSTRAINT)
    answer = "Ada Example"
    plain, whole = (failure_features(random_llava, prompt, answer=each) for each in (None, answer))
    found = attention_contributions(random_llava, prompt, sources="constraint")
    for features in (plain, whole):  # tokens of an answer come later and change nothing
        assert close(features.contributions, found.by_layer("constraint").double(), 1e-4)
        assert close(features.head_contributions, found.by_head("constraint").double(), 1e-4)
        assert close(features.weights, found.by_layer("constraint", of="weight").double(), 1e-5)
        assert close(features.head_weights, found.by_head("constraint", of="weight").double(), 1e-5)
    with torch.no_grad():
        probabilities = random_llava.logits(prompt)[0, -1].double().softmax(-1)
    assert plain.first_probability == pytest.approx(float(probabilities.max()), rel=1e-4)
    assert plain.first_token == random_llava.decode([int(probabilities.argmax())])
    expected = random_llava.score(photo, QUESTION, answer).probability
    assert whole.answer_probability == pytest.approx(expected, rel=1e-3)
    assert plain.answer_probability is None and whole.answer == answer
    other = failure_features(random_llava, prompt, constraint="question_only")
    assert not close(other.contributions, plain.contributions, 1e-3)
    with pytest.raises(TraceError, match="pass constraint= to the prompt"):
        failure_features(random_llava, random_llava.prompt(photo, QUESTION))
    with pytest.raises(ModelError, match="the answer is empty"):
        failure_features(random_llava, prompt, answer="")


def test_the_trained_model_s_failures_on_facts_it_was_never_taught_are_told(tiny_vlm):
    world, prompts, gold = World(), [], []
    taught = [world.entities[fact.entity].index for fact in world.facts[:: len(world.facts) // 12]][:12]
    for entity in (*(world.entities[index] for index in taught), *world.long_tail[:12]):
        record = world.question(world.facts_of(entity)[0]).with_image(world.picture(entity, 5).image)
        prompts.append(tiny_vlm.prompt(record.image, record.text, constraint=record.constraint))
        gold.append(record.answer)
    answers = tiny_vlm.answers(prompts, max_new_tokens=8)
    is_right = [answer == wanted for answer, wanted in zip(answers, gold, strict=True)]
    features = [failure_features(tiny_vlm, each, answer=answer) for each, answer in zip(prompts, answers, strict=True)]
    found = predict_failure(features, is_right, folds=3)
    assert found.auroc("whole-answer probability") > 0.8 and found.interval("whole-answer probability")[0] > 0.6


def test_files_hold_everything(prediction, labels, tmp_path):
    again = FailurePrediction.load(prediction.save(tmp_path / "found.safetensors"))
    assert_same(again, prediction)
    assert_shown(prediction)
    assert again.summary() == prediction.summary() and again.is_right.tolist() == labels.tolist()
    features = features_of(labels[:1], signal=1.0)[0]
    path = features.save(tmp_path / "one.safetensors")
    loaded = FailureFeatures.load(path)
    assert_same(loaded, features)
    assert_shown(features)
    assert loaded.answer is None and len(features.to_dataframe()) == features.head_weights.numel()
    assert "<!-- length of contribution -->" in svg(features.plot())
    for result, broken in (
        (FailurePrediction, replace(prediction, areas=prediction.areas[1:])),
        (FailureFeatures, replace(features, weights=features.weights[1:])),
    ):
        with pytest.raises(ArtefactError, match="tensors are of other shapes"):
            result.load(broken.save(tmp_path / "broken.safetensors"))


def test_tables_summaries_and_drawings(prediction, tmp_path):
    table, frame = prediction.auroc_dataframe(), prediction.to_dataframe()
    assert table["score"].tolist() == list(prediction.names) and len(frame) == (1 + 4 * 10) * RECORDS
    assert bool((table["low"] < table["auroc"]).all()) and bool((table["auroc"] < table["high"]).all())
    line = frame[frame["score"] == "combination"].iloc[2 * RECORDS + 7]
    assert line["value"] == prediction.scores["combination"][2, 7] and (line["cut"], line["record"]) == (2, 7)
    assert line["is_right"] == bool(prediction.is_right[7])
    text = prediction.summary()
    assert "80 answers, 48 right and 32 wrong; AUROC (right answers score higher)" in text
    assert re.search(rf"contribution of the constraint +{prediction.auroc('contribution'):.3f}  \[0\.\d+, ", text)
    assert "layers chosen in each training fold" in text
    empty = replace(prediction, feature_counts={"all heads": torch.tensor([0, 3, 0])}, layers=(3, 4))
    assert "all layers and heads (L1): no feature was kept in 2 of 3 fits" in empty.summary()
    assert "mean over layers 3 and 4" in empty.summary()
    drawn = svg(prediction.plot())
    for label in ("probability of the first token", "AUROC with its 95% interval", f"{prediction.auroc('weight'):.2f}"):
        assert f"<!-- {label} -->" in drawn, label
    with pytest.raises(ArtefactError, match="no format '.jpg'"):
        prediction.plot(tmp_path / "roc.jpg")
    with pytest.raises(TraceError, match="no score 'luck'; this prediction has contribution"):
        prediction.auroc("luck")
