"""Image tokens dropped from a layer on: equal to masking them, and to removing them by hand, in true float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from dropped_tokens import QUESTION, gone, masked_logits, pruned
from exact_models import FROZEN, LENGTH, make_runs
from multrace import TraceError, VisionLanguageModel
from multrace.data import World
from multrace.models import Prompt, ReplayError, Site, capture
from multrace.models.frame import DecoderInput
from multrace.tracing import Engine, ImagePruning, average
from multrace.tracing.engine import Runs, measure as measuring, plain_scores
from multrace.tracing.engine.measure import sweep
from multrace.tracing.pruning import Drop, image_ranks
from other_families import MODELS, make
from torch import Tensor

ANSWER = "Ada Example"


@pytest.fixture(params=["llava_llama", "llava_phi"])
def exact_seeing(request: pytest.FixtureRequest, load_double: Callable, exact: None) -> VisionLanguageModel:
    """Each family that sees, in true float64."""
    return load_double(request.getfixturevalue(f"{request.param}_path"))


def probabilities(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """Of the first token, and of all of them, from logits (token, vocab)."""
    chosen = logits.double().softmax(-1)[range(len(ids)), list(ids)]
    return [float(chosen[0]), float(chosen.prod())]


# ---- what is dropped ----


def test_keeping_all_is_the_plain_model_bit_for_bit(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    count = len(prompt.groups["image"])
    found = pruned(random_llava, prompt, keep=("all", count, count + 9, 0), answer=ANSWER)
    ids, last = list(found.answer_ids), found.length - 1
    entering = random_llava.extend(random_llava.embed(prompt), ids)
    with torch.no_grad():
        logits = random_llava.forward(entering, positions=range(last, last + len(ids)))[0].double()
    chosen = logits[range(len(ids)), ids] - logits.logsumexp(-1)
    plain = torch.stack([chosen[0].exp(), chosen.sum().exp()])
    own = random_llava.answers([prompt], max_new_tokens=5)[0]
    for row in range(3):
        assert torch.equal(found.probabilities[:, row], found.baseline[:, None].expand(-1, random_llava.layers))
        assert found.kept[row].all() and found.answers[row] == (own,) * random_llava.layers
    assert torch.equal(found.baseline, plain)
    assert found.baseline_answer == own
    assert not (found.probabilities[:, 3] == found.baseline[:, None]).any()
    assert found.answers[3] != found.answers[0]


def test_dropping_equals_a_masked_pass_per_cell(exact_seeing, photo):
    prompt = exact_seeing.prompt(photo, QUESTION)
    found = pruned(exact_seeing, prompt, keep=(0, 3), answer=ANSWER)
    entering = exact_seeing.extend(exact_seeing.embed(prompt), found.answer_ids)
    count = len(found.answer_ids)
    for (row, layer), dropped in gone(found).items():
        logits = masked_logits(exact_seeing, entering, dropped, layer, count)
        expected = torch.tensor(probabilities(logits, found.answer_ids), dtype=torch.float64)
        assert (found.probabilities[:, row, layer] - expected).abs().max() <= 1e-12
    assert torch.equal(found.floor, found.probabilities[:, 0, 0])
    assert (found.probabilities - found.baseline[:, None, None]).abs().amax((0, 2)).min() > 1e-6


def removed_logits(
    vlm: VisionLanguageModel, entering: DecoderInput, dropped: Sequence[int], first: int, count: int
) -> Tensor:
    """(token, vocab): the last logits where the tokens leave the sequence before a layer; the others keep their ids."""
    stays = torch.tensor([place for place in range(entering.length) if place not in set(dropped)])
    with torch.no_grad(), capture(vlm, [Site("hidden", layer) for layer in range(vlm.layers)], inputs=True) as read:
        vlm.forward(entering)
    states = read[Site("hidden", first)][:, stays]
    positions, decoder = stays[None], vlm.addresses.decoder
    with torch.no_grad():
        turned = decoder.rotary_emb(states, position_ids=positions)
        for layer in vlm.addresses.layers[first:]:
            states = layer(states, attention_mask=None, position_ids=positions, position_embeddings=turned)
        return vlm.model.get_output_embeddings()(vlm.final_norm(states))[0, -count:]


def test_dropping_equals_removing_the_tokens_by_hand(exact_seeing, photo):
    prompt = exact_seeing.prompt(photo, QUESTION)
    found = pruned(exact_seeing, prompt, keep=(0, 3), answer=ANSWER)
    entering = exact_seeing.extend(exact_seeing.embed(prompt), found.answer_ids)
    for (row, layer), dropped in gone(found).items():
        logits = removed_logits(exact_seeing, entering, dropped, layer, len(found.answer_ids))
        expected = torch.tensor(probabilities(logits, found.answer_ids), dtype=torch.float64)
        assert (found.probabilities[:, row, layer] - expected).abs().max() <= 1e-12
        other = removed_logits(exact_seeing, entering, dropped[1:], layer, len(found.answer_ids))
        assert (logits - other).abs().max() > 1e-6  # one token more or less is seen


@pytest.mark.parametrize("name", MODELS)
def test_dropping_is_exact_on_families_without_a_row(name, monkeypatch):
    vlm = make(name, monkeypatch)
    run = Runs.of_one(make_runs(vlm).source, scored=(LENGTH - 2, LENGTH - 1))
    drops = [Drop(tokens=frozenset(places), first=first) for places in (FROZEN, FROZEN[1:]) for first in (0, 1, 3)]
    cells = [drop.cell(LENGTH, vlm.layers) for drop in drops]

    def measure(logits: Tensor) -> Tensor:
        return logits.double().softmax(-1)[:, :, 7]

    fast = sweep(vlm, run, cells, measure)
    assert (fast.scores - plain_scores(vlm, run, cells, measure)).abs().max() <= 1e-12
    assert (fast.scores - fast.base).abs().max() > 1e-7


def test_the_plain_engine_gives_the_same(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    fast, plain = (pruned(random_llava, prompt, keep=(0, 4), engine=Engine(name=name)) for name in ("auto", "plain"))
    assert torch.allclose(fast.probabilities, plain.probabilities, rtol=1e-4, atol=1e-9)
    assert fast.answers == plain.answers
    assert (fast.engine.engine, plain.engine.engine) == ("replay", "plain")
    assert fast.engine.checked_cells == 2 and fast.engine.largest_difference < 1e-6


def test_a_model_that_cannot_be_replayed_is_warned_of_once(random_llava_llama, photo, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ReplayError("it is too odd")

    prompt = random_llava_llama.prompt(photo, QUESTION)
    expected = pruned(random_llava_llama, prompt, layers=(1, 2))
    monkeypatch.setattr(measuring, "sweep", refuse)
    with pytest.warns(UserWarning, match="slow: it is too odd") as seen:
        found = pruned(random_llava_llama, prompt, layers=(1, 2))
    assert len(seen) == 1
    assert (found.engine.engine, found.engine.reason) == ("plain", "it is too odd")
    assert torch.allclose(found.probabilities, expected.probabilities, rtol=1e-4, atol=1e-9)
    assert found.answers == expected.answers
    with pytest.raises(TraceError, match="cannot be replayed: it is too odd"):
        pruned(random_llava_llama, prompt, engine=Engine(name="replay"))


def test_the_engine_computes_the_truncated_part_only(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    found = pruned(random_llava, prompt, answer=ANSWER)
    length, layers, before = found.length, random_llava.layers, found.image_positions[0]
    left, scored = layers - torch.arange(layers), len(found.answer_ids)
    whole = found.tokens_kept()[0] * length * layers  # what a model has to compute of the prompt, per cell
    truncated_part = whole - length * torch.arange(layers)
    added = (scored - 1 - before) * left  # the answer's tokens come on top; those before the picture are not new
    unread = length - len(found.image_positions) - before - 1  # in the last layer, all but what is scored
    recording = (length + scored - 1) * layers
    assert found.engine.token_layers == recording + round(float((truncated_part + added - unread).sum()))


# ---- which tokens stay ----


def eager_attention(vlm: VisionLanguageModel, prompt: Prompt) -> Tensor:
    """(layer, image token): attention from the last token, mean over heads, as transformers' eager way tells it."""
    decoder = vlm.addresses.decoder
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    with torch.no_grad():
        attentions = vlm.model(**prompt.inputs, output_attentions=True, use_cache=False).attentions
    decoder.config._attn_implementation = before
    return torch.stack([each[0, :, -1].mean(0)[list(prompt.groups["image"])] for each in attentions])


def test_tokens_stay_by_the_last_tokens_attention_one_layer_before(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    attended = eager_attention(random_llava, prompt)
    best = attended.topk(5).indices
    found = pruned(random_llava, prompt, keep=5, layers=(0, 1, 3))
    for column, ranking in enumerate((0, 0, 2)):
        assert set(found.kept[0, column].nonzero().flatten().tolist()) == set(best[ranking].tolist())
    assert set(best[3].tolist()) != set(best[2].tolist())  # the layer's own attention would keep others
    ranks = image_ranks(random_llava, random_llava.embed(prompt), prompt.groups["image"])
    assert torch.equal(ranks[1:].argsort(), attended[:-1].argsort(descending=True))
    assert torch.equal(ranks[0], ranks[1])


def test_attention_that_cannot_be_read_is_an_error(monkeypatch):
    vlm = make("Gemma3, sliding and full layers", monkeypatch)
    entering = make_runs(vlm).source
    assert image_ranks(vlm, entering, FROZEN).shape == (vlm.layers, len(FROZEN))

    def refuse(*_arguments: object) -> None:
        raise ReplayError("its attention function cannot be replaced")

    monkeypatch.setattr("multrace.models.replay.observe._methods", refuse)
    with pytest.raises(TraceError, match=r"cannot be ranked by attention.*keep=\(0,\)"):
        image_ranks(vlm, entering, FROZEN)


# ---- the trained model ----


@pytest.fixture(scope="module")
def asked(tiny_vlm: VisionLanguageModel) -> list[ImagePruning]:
    """Twelve questions about pictures, of all kinds of facts."""
    world, found = World(), []
    for fact in world.facts[3::66][:12]:
        record = world.question(fact)
        prompt = tiny_vlm.prompt(world.picture(world.entities[fact.entity], 5).image, record.text)
        found.append(pruned(tiny_vlm, prompt, gold=record.answer))
    return found


def test_the_trained_model_needs_the_picture_in_early_layers_only(tiny_vlm, asked):
    mean = average(asked)
    assert mean.count == 12
    assert mean.baseline_accuracy >= 0.9
    assert mean.floor_accuracy <= 0.3  # the words alone do not say which entity is meant
    assert float(mean.accuracy()[0, 0]) == mean.floor_accuracy
    cliff = mean.cliff_layer()
    assert cliff is not None and 1 <= cliff <= tiny_vlm.layers // 2
    assert float(mean.accuracy()[0, -1]) >= mean.baseline_accuracy - 0.01
    assert 1 - float(mean.operations_kept()[0, cliff]) > 0.4
    assert f"accuracy holds from layer {cliff} on" in mean.summary()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": -1}, "cannot keep -1 image tokens"),
        ({"keep": (0, "some")}, "cannot keep 'some'"),
        ({"keep": ()}, "cannot keep 'no number of'"),
        ({"layers": (0, 4)}, "from layer 4 on.*0 to 3"),
        ({"layers": (-1,)}, "from layer -1 on.*0 to 3"),
        ({"layers": ()}, "from no layer on.*0 to 3"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"answer": " "}, "the given answer is empty"),
    ],
)
def test_what_does_not_fit_is_refused(random_llava_llama, photo, settings, message):
    with pytest.raises(TraceError, match=message):
        pruned(random_llava_llama, random_llava_llama.prompt(photo, QUESTION), **settings)


def test_a_prompt_without_a_picture_is_refused(random_llava_llama):
    with pytest.raises(TraceError, match="no tokens in group 'image'.*pass an image"):
        pruned(random_llava_llama, random_llava_llama.prompt(None, QUESTION))


def test_an_empty_answer_of_the_models_own_is_refused(random_llava_llama, photo, monkeypatch):
    prompt = random_llava_llama.prompt(photo, QUESTION)
    first = int(random_llava_llama.logits(prompt)[0, -1].argmax())
    monkeypatch.setattr(random_llava_llama.model.generation_config, "eos_token_id", [first, 2])
    with pytest.raises(TraceError, match="own answer to 'Who founded .*is empty; pass answer="):
        pruned(random_llava_llama, prompt)
    assert pruned(random_llava_llama, prompt, answer=ANSWER).baseline_answer != ANSWER
