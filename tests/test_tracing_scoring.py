"""What a trace scores: answers and foils of any length, several metrics in one sweep, functions, weak corruptions."""

from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
from multrace import ModelError, Prompt, VisionLanguageModel, load
from multrace.data import World
from multrace.tracing import (
    ReplaceText,
    SwapImage,
    TextNoise,
    TraceError,
    attention_knockout,
    prune_image_tokens,
)
from multrace.tracing.engine import METRICS, Engine
from PIL import Image
from small_traces import ENGINES, QUESTION, ask, trace
from torch import Tensor, nn


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn."""
    return ENGINES[request.param]


# Against whole calls of the model: pixels in, one call for the answer and one for the foil, in true float64.


def slow_logits(
    vlm: VisionLanguageModel, prompt: Prompt, text: str, other: Image.Image, put: tuple[nn.Module, Sequence[int]] | None
) -> Tensor:
    """(clean and corrupted, token of the text, vocab): logits where the tokens of this text are predicted.

    The corrupted row gets the clean row's output of one module at some positions.
    """
    with_text = prompt.with_answer(text)
    inputs = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in with_text.inputs.items()}
    inputs["pixel_values"][1] = vlm.prompt(other, QUESTION).inputs["pixel_values"][0]

    def copy(_module: nn.Module, _arguments: tuple, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[1, list(put[1])] = output[0, list(put[1])]
        return changed

    handles = [put[0].register_forward_hook(copy)] if put else []
    with torch.no_grad():
        logits = vlm.model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    count = len(with_text.answer_ids)
    return logits[:, -count - 1 : -1]


def slow_scores(rows: Mapping[str, Tensor], ids: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """(clean and corrupted,) per metric."""
    chosen = {
        text: torch.stack([logits[:, index, token] for index, token in enumerate(ids[text])])
        for text, logits in rows.items()
    }
    sums = torch.stack([rows["answer"][:, index].logsumexp(-1) for index in range(len(ids["answer"]))])
    log_probability = (chosen["answer"] - sums).sum(0)
    difference = chosen["answer"].sum(0) - chosen["foil"].sum(0)
    return dict(zip(METRICS, (log_probability.exp(), log_probability, difference), strict=True))


PAIRS = [("Ada Example", "Lima"), ("Paris", "Oslo and Kyoto"), ("red", "blue"), ("the year 1999", "the year 1998")]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "first token"])
@pytest.mark.parametrize("pair", PAIRS, ids=" or ".join)
def test_answer_and_foil_of_any_length_against_whole_calls(exact_llava, photo, other_photo, pair, whole, engine):
    vlm, prompt = exact_llava, ask(exact_llava, photo)
    texts = dict(zip(("answer", "foil"), pair, strict=True))
    ids = {name: prompt.with_answer(text).answer_ids for name, text in texts.items()}
    ids = ids if whole else {name: tokens[:1] for name, tokens in ids.items()}
    settings = {**texts, "whole_answer": whole, "metrics": METRICS, "engine": engine}
    if ids["answer"] == ids["foil"]:
        with pytest.raises(TraceError, match="scored by the same tokens"):
            trace(vlm, prompt, SwapImage(other_photo), **settings)
        return
    found = trace(vlm, prompt, SwapImage(other_photo), **settings)
    assert (found.answer_ids, found.foil_ids) == (ids["answer"], ids["foil"])
    layers = vlm.model.model.language_model.layers
    for row, positions in enumerate(found.row_positions):
        for column in range(vlm.layers):
            put = (layers[column].mlp, positions)
            expected = slow_scores(
                {name: slow_logits(vlm, prompt, text, other_photo, put) for name, text in texts.items()}, ids
            )
            for index, metric in enumerate(METRICS):
                score = float(found.samples["mlp"][index, row, column, 0])
                assert score == pytest.approx(float(expected[metric][1]), rel=1e-10, abs=1e-16), metric
    untouched = slow_scores(
        {name: slow_logits(vlm, prompt, each, other_photo, None) for name, each in texts.items()}, ids
    )
    for index, metric in enumerate(METRICS):
        assert float(found.clean_scores[index]) == pytest.approx(float(untouched[metric][0]), rel=1e-10)
        assert float(found.corrupted_scores[index, 0]) == pytest.approx(float(untouched[metric][1]), rel=1e-10)
        assert found.indirect_effect("mlp", metric)[:, 0].all()  # otherwise agreeing would mean nothing


# Which answer and which foil.


def test_the_foil_is_the_corrupted_runs_answer_unless_given(random_vlm, photo):
    prompt, corruption = ask(random_vlm, photo), TextNoise(samples=3)
    found = trace(random_vlm, prompt, corruption, positions="last", metrics="logit_difference")
    probabilities = random_vlm.next_token_probabilities(corruption.corrupt(random_vlm, prompt).embeddings).mean(0)
    likeliest = probabilities.argsort(descending=True)[:2].tolist()
    likeliest.remove(found.answer_ids[0]) if found.answer_ids[0] in likeliest else likeliest.pop()
    assert found.foil_ids == tuple(likeliest)
    assert found.foil == random_vlm.tokenizer.decode(likeliest).strip()
    given = trace(random_vlm, prompt, corruption, positions="last", metrics="logit_difference", foil="tennis")
    assert given.foil_ids == prompt.with_answer("tennis").answer_ids[:1] != found.foil_ids
    assert given.clean != found.clean
    none = trace(random_vlm, prompt, corruption, positions="last")
    assert (none.foil, none.foil_ids) == (None, ())


def test_a_corrupted_run_with_the_same_answer_gets_its_second_choice_as_the_foil(random_llava, photo):
    prompt = ask(random_llava, photo)
    found = trace(random_llava, prompt, SwapImage(photo), metrics="logit_difference", positions="last")
    with torch.no_grad():
        first, second = random_llava.logits(prompt)[0, -1].topk(2).indices.tolist()
    assert (found.answer_ids, found.foil_ids) == ((first,), (second,))
    assert found.clean > 0


def test_whole_answers_are_the_ones_that_each_run_generates(tiny_vlm, world_case):
    prompt, other, answers = world_case
    found = trace(tiny_vlm, prompt, SwapImage(other), whole_answer=True, metrics=METRICS, even_if_weak=False)
    assert (found.answer, found.foil) == answers
    assert max(len(found.answer_ids), len(found.foil_ids)) > 1
    clean, corrupted = found.clean_scores, found.corrupted_scores[:, 0]
    assert clean[0] > 0.5 > corrupted[0]
    assert clean[2] > 0 > corrupted[2]
    assert float(clean[1].exp()) == pytest.approx(float(clean[0]), rel=1e-9)


@pytest.fixture
def world_case(tiny_vlm: VisionLanguageModel) -> tuple[Prompt, Image.Image, tuple[str, str]]:
    """A question of the embedded world, another picture, and what the model answers about either."""
    world = World()
    for fact in world.facts:
        record, entity = world.question(fact), world.entities[fact.entity]
        other = next(peer for peer in world.of_kind(entity.kind) if peer is not entity)
        answers = fact.answer, other.facts[fact.key]
        firsts = {answer.split()[0] for answer in answers}
        if len(firsts) == 2 and all(" " in answer for answer in answers):
            break
    pictures = [world.picture(each, 1).image for each in (entity, other)]
    prompts = [tiny_vlm.prompt(each, record.text, constraint=record.constraint) for each in pictures]
    assert tuple(tiny_vlm.answers(prompts)) == answers
    return prompts[0], pictures[1], answers


def test_an_empty_answer_of_the_model_is_not_scored_whole(llava_llama_path, photo):
    vlm = load(llava_llama_path, verify=False)
    prompt = ask(vlm, photo)
    with torch.no_grad():
        head, likeliest = vlm.model.get_output_embeddings().weight, int(vlm.logits(prompt)[0, -1].argmax())
        head[vlm.tokenizer.eos_token_id] = 2 * head[likeliest]
    assert vlm.answers([prompt]) == [""]
    with pytest.raises(TraceError, match="answer to .* is empty; pass answer= to score another"):
        trace(vlm, prompt, TextNoise(samples=1), whole_answer=True)
    first = trace(vlm, prompt, TextNoise(samples=1), positions="last")
    assert first.answer_ids == (vlm.tokenizer.eos_token_id,)


@pytest.mark.parametrize("whole", [True, False])
def test_a_foil_with_the_answers_own_tokens_is_refused(random_llava, photo, whole):
    texts = {"answer": "the year 1999", "foil": "the year 1999" if whole else "the year 1998"}
    texts |= {"metrics": ("probability", "logit_difference")}
    with pytest.raises(TraceError, match="and the answer are scored by the same tokens; pass another foil"):
        trace(random_llava, ask(random_llava, photo), TextNoise(samples=1), whole_answer=whole, **texts)


def test_a_foil_that_no_metric_asks_for_is_refused(random_llava, photo):
    with pytest.raises(TraceError, match="a foil plays no part without metrics='logit_difference'"):
        trace(random_llava, ask(random_llava, photo), TextNoise(samples=1), foil="Oslo")


# Several metrics, and functions.


def last_entropy(logits: Tensor) -> Tensor:
    """(row,): entropy of the last scored position's distribution."""
    return torch.distributions.Categorical(logits=logits[:, -1]).entropy()


def test_several_metrics_in_one_sweep_equal_one_at_a_time(exact_llava, photo, other_photo, engine):
    prompt, settings = ask(exact_llava, photo), {"answer": "Ada Example", "foil": "Oslo", "whole_answer": True}
    wanted = (*METRICS, last_entropy)
    for direction in ("restore", "corrupt"):
        settings |= {"engine": engine, "sites": ("hidden", "attention"), "direction": direction}
        together = trace(exact_llava, prompt, SwapImage(other_photo), metrics=wanted, **settings)
        assert together.metrics == (*METRICS, "last_entropy")
        for index, metric in enumerate(wanted):
            foil = "Oslo" if metric == "logit_difference" else None
            alone = trace(exact_llava, prompt, SwapImage(other_photo), metrics=metric, **settings | {"foil": foil})
            assert alone.metrics == together.metrics[index : index + 1]
            assert torch.allclose(alone.clean_scores[0], together.clean_scores[index], rtol=1e-12, atol=0)
            for kind in alone.kinds:
                assert torch.equal(alone.samples[kind][0], together.samples[kind][index])
    assert len({float(score) for score in together.clean_scores}) == 4


def test_a_function_of_the_logits_can_be_the_metric(exact_llava, photo, other_photo, engine):
    shapes = set()

    def log_probability_again(logits: Tensor) -> Tensor:
        shapes.add(logits.shape[1:])
        assert logits.dtype == torch.float64
        return logits.log_softmax(-1)[:, range(len(ids)), list(ids)].sum(-1)

    prompt = ask(exact_llava, photo)
    ids = prompt.with_answer("Ada Example").answer_ids
    settings = {"answer": "Ada Example", "whole_answer": True, "engine": engine}
    wanted = (log_probability_again, "log_probability")
    found = trace(exact_llava, prompt, SwapImage(other_photo), metrics=wanted, **settings)
    assert found.metrics == ("log_probability_again", "log_probability")
    assert torch.allclose(found.samples["mlp"][0], found.samples["mlp"][1], rtol=1e-12)
    assert shapes == {(len(ids), len(exact_llava.tokenizer))}


@pytest.mark.parametrize(
    ("name", "function", "found"),
    [
        ("keeps positions", lambda logits: logits[..., 0], r"returned \(\d+, 1\)"),
        ("one number", lambda logits: logits.sum(), r"returned \(\)"),
        ("no tensor", lambda logits: 0.5, "returned float"),
    ],
)
def test_a_function_of_the_wrong_shape_is_told_the_right_one(random_llava, photo, name, function, found, engine):
    with pytest.raises(TraceError, match=rf"must turn logits .* into one score per row, \(\d+,\); it {found}"):
        trace(random_llava, ask(random_llava, photo), TextNoise(samples=2), metrics=function, engine=engine)


@pytest.mark.parametrize("metrics", ["accuracy", ("probability", "accuracy"), (), ("probability", 3)])
def test_unknown_metrics_are_refused_before_any_work(random_llava, photo, metrics):
    with pytest.raises(TraceError, match="pass some of probability, log_probability, logit_difference, or a function"):
        trace(random_llava, ask(random_llava, photo), TextNoise(samples=1), metrics=metrics)


def test_two_functions_of_one_name_are_refused_and_a_function_without_one_gets_its_types(random_llava, photo):
    prompt, corruption = ask(random_llava, photo), TextNoise(samples=1)
    with pytest.raises(TraceError, match="several metrics of one name among <lambda>, <lambda>; give each function"):
        trace(
            random_llava, prompt, corruption, metrics=(lambda logits: logits[:, 0, 0], lambda logits: logits[:, 0, 1])
        )
    found = trace(random_llava, prompt, corruption, metrics=(partial(torch.amax, dim=(1, 2)), last_entropy))
    assert found.metrics == ("partial", "last_entropy")


def test_a_metric_named_twice_is_measured_once(random_llava, photo):
    found = trace(random_llava, ask(random_llava, photo), TextNoise(samples=1), metrics=("probability",) * 2)
    assert found.metrics == ("probability",)


def test_words_that_are_replaced_are_scored_like_any_other_corruption(random_vlm, photo, engine):
    settings = {"metrics": METRICS, "engine": engine, "foil": "tennis"}
    found = trace(
        random_vlm, ask(random_vlm, photo), ReplaceText(replacement="Paris city"), positions="last", **settings
    )
    assert found.corrupted_scores.shape == (3, 1)
    assert found.total_effect_of("logit_difference") != found.total_effect_of("probability") != 0


# What ends a foil, and what cannot be scored.


def test_a_foil_ends_where_the_tokenizer_says_if_the_generation_settings_do_not(tiny_vlm, world_case, monkeypatch):
    prompt, other, (_, foil) = world_case
    settings = {"whole_answer": True, "metrics": "logit_difference", "positions": "last"}
    before = trace(tiny_vlm, prompt, SwapImage(other), **settings)
    monkeypatch.setattr(tiny_vlm.model.generation_config, "eos_token_id", None)
    found = trace(tiny_vlm, prompt, SwapImage(other), **settings)
    assert found.foil == before.foil == foil
    assert found.foil_ids == before.foil_ids
    monkeypatch.setattr(type(tiny_vlm), "end_ids", ())  # without any rule it runs on
    assert len(trace(tiny_vlm, prompt, SwapImage(other), **settings).foil_ids) > len(before.foil_ids)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_and_no_map(
    random_llava, photo, other_photo, engine, damage, monkeypatch
):
    prompt = ask(random_llava, photo)
    assert trace(random_llava, prompt, SwapImage(other_photo), engine=engine).samples["mlp"].isfinite().all()
    weight = random_llava.output_head.weight
    damaged = weight.detach().clone()
    damaged[3, 0], damaged[4, 0] = damage, -damage  # rows of tokens that are not the answer's; one logit is not -inf
    monkeypatch.setattr(weight, "data", damaged)
    for metrics in ("probability", "logit_difference"):
        with pytest.raises(TraceError, match="logits that are not finite, so nothing can be scored"):
            trace(random_llava, prompt, SwapImage(other_photo), metrics=metrics, engine=engine)
    with pytest.raises(TraceError, match="logits that are not finite"):
        attention_knockout(random_llava, prompt, flows="image -> last", engine=engine, progress=False)
    with pytest.raises(ModelError, match="logits that are not finite"):
        prune_image_tokens(random_llava, prompt, answer="Ada Example", engine=engine, progress=False)
