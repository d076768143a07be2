"""The logit lens: what is read equals the hooked states by hand in every family; what cannot be read is refused."""

import pytest
import torch
from multrace import VisionLanguageModel, load
from multrace.data import World
from multrace.models import ModelError, Prompt
from multrace.models.readout import AfterHead
from multrace.tracing import LogitLens, TraceError, logit_lens
from random_models import make_tokenizer, save, text_sizes
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

QUESTION = "Which sport does the person in the picture play?"
LOWER, CAPITALISED = "answer, lower case", "answer, capitalised"
EXACT = {"rtol": 1e-11, "atol": 1e-14}


def ask(vlm: VisionLanguageModel, image: object, **options: object) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, **options)


def states_by_hand(vlm: VisionLanguageModel, prompt: Prompt) -> list[Tensor]:
    """(token, hidden) before the first layer and after each, by plain hooks."""
    found: list[Tensor] = []

    def keep(_module: object, _arguments: object, output: Tensor | tuple) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    layers = list(vlm.addresses.layers)
    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        vlm.model(**prompt.inputs)
    for handle in handles:
        handle.remove()
    embedded = vlm.embeddings(prompt)[0]
    if hasattr(vlm.addresses.decoder, "wpe"):  # GPT-2 adds positions outside its embedding
        embedded = embedded + vlm.addresses.decoder.wpe.weight[: len(embedded)]
    return [embedded, *found]


def oracle(vlm: VisionLanguageModel, state: Tensor, norm: bool) -> Tensor:
    """(vocab,) float64: one state's distribution, with the head written out."""
    head = vlm.model.get_output_embeddings()
    state = vlm.final_norm(state) if norm else state
    logits = head.weight @ state + (0 if head.bias is None else head.bias)
    return logits.double().exp() / logits.double().exp().sum()


def read(vlm: VisionLanguageModel, prompt: Prompt, **options: object) -> LogitLens:
    return logit_lens(vlm, prompt, progress=False, **{"answer": "tennis", **options})


def test_every_number_is_the_hooked_states_by_hand(exact_vlm, photo):
    prompt = ask(exact_vlm, photo, answer="golf and chess")
    found = read(exact_vlm, prompt, positions=["question", "last", "answer", 0], foil="chess", words=["Rome", 7], top=5)
    states = states_by_hand(exact_vlm, prompt)
    assert found.probabilities.dtype == torch.float64 and found.layers == (-1, 0, 1, 2, 3)
    assert found.probabilities.shape == (2, len(found.positions), 5, len(found.followed.ids))
    for norm_index, norm in enumerate((True, False)):
        for place, position in enumerate(found.positions):
            for number, state in enumerate(states):
                wanted = oracle(exact_vlm, state[position], norm)
                values, order = wanted.sort(descending=True)
                cell = (norm_index, place, number)
                torch.testing.assert_close(found.probabilities[cell], wanted[list(found.followed.ids)], **EXACT)
                torch.testing.assert_close(found.top_probabilities[cell], values[:5], **EXACT)
                assert found.top_ids[cell].tolist() == order[:5].tolist()
                ranks = [order.tolist().index(token) + 1 for token in found.followed.ids]
                assert found.ranks[cell].tolist() == ranks


def test_the_last_state_is_the_models_own_distribution_only_with_the_norm(random_vlm, photo):
    prompt = ask(random_vlm, photo)
    size = random_vlm.model.config.get_text_config().vocab_size
    found = read(random_vlm, prompt, top=size)
    own = random_vlm.logits(prompt)[0, -1].double().softmax(-1)
    last = found.top_probabilities[:, 0, -1].new_empty(2, size).scatter(1, found.top_ids[:, 0, -1], 0)
    last = last.scatter(1, found.top_ids[:, 0, -1], found.top_probabilities[:, 0, -1])
    torch.testing.assert_close(last[0], own, rtol=1e-4, atol=1e-7)
    assert (last[1] - own).abs().max() > 1e-3
    assert (found.probabilities[0, :, :-1] != found.probabilities[0, :, -1:]).any()


def test_transformers_hidden_states_are_the_same_but_for_the_normed_last_one(exact_llava, photo):
    prompt = ask(exact_llava, photo)
    given = exact_llava.model(**prompt.inputs, output_hidden_states=True).hidden_states
    found = read(exact_llava, prompt)
    token = found.followed.ids[0]
    for number, state in enumerate(given):
        is_last = number == len(given) - 1
        own = oracle(exact_llava, state[0, -1], norm=not is_last)[token]
        assert float(own) == pytest.approx(float(found.probability(token)[number]), rel=1e-10), number
    assert float(own) != pytest.approx(float(found.probability(token, norm=False)[-1]), rel=1e-3)


def test_it_takes_one_forward_pass(random_vlm, photo):
    prompt, calls = ask(random_vlm, photo), []
    modules = [random_vlm.addresses.layers[0], random_vlm.addresses.layers[-1]]
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in modules]
    read(random_vlm, prompt, positions="all", foil="chess", words=["Rome"])
    for handle in handles:
        handle.remove()
    assert len(calls) == 2


def test_many_positions_give_what_each_gives_alone(exact_llava, photo):
    prompt = exact_llava.prompt(photo, f"{QUESTION} {'tennis chess golf ' * 30}")
    together = read(exact_llava, prompt, positions="all")
    assert len(together.positions) > 64 and together.position_roles[2] == "all 3"
    for place in (0, 63, 64, -1):
        alone = read(exact_llava, prompt, positions=together.positions[place])
        torch.testing.assert_close(alone.probabilities[:, 0], together.probabilities[:, place], **EXACT)
        assert torch.equal(alone.ranks[:, 0], together.ranks[:, place])


def test_equal_logits_count_in_the_tokens_favour(exact_llava, photo):
    head = exact_llava.model.get_output_embeddings().weight
    saved = head.detach().clone()
    prompt = ask(exact_llava, photo)
    with torch.no_grad():
        head[20] = head[10]
        tied = read(exact_llava, prompt, words=[10, 20], top=len(head))
        head.copy_(saved)
    apart = read(exact_llava, prompt, words=[10, 20])
    assert torch.equal(tied.rank(10), tied.rank(20)) and not torch.equal(apart.rank(10), apart.rank(20))
    likelier = tied.top_probabilities[0, 0] > tied.probability(10)[:, None]
    assert torch.equal(tied.rank(10), likelier.sum(-1) + 1)  # the better one of the two places they share


def test_spellings_are_followed_by_their_first_tokens_and_merged(random_llava_llama, photo):
    vlm, prompt = random_llava_llama, ask(random_llava_llama, photo)
    found = read(vlm, prompt, answer="tennis", foil="Rome", words=["red", "tennis", "1999"])
    first = {word: prompt.with_answer(word).answer_ids[0] for word in ("tennis", "Tennis", "rome", "Rome", "red")}
    assert len(set(found.followed.ids)) == len(found.followed.ids)
    roles = {LOWER: "tennis", "false option, capitalised": "Rome", "word red": "red", "word tennis": "tennis"}
    for role, word in roles.items():
        index = found.followed.index(role)
        assert found.followed.ids[index] == first[word] and word in found.followed.words[index], role
        assert found.followed.index(first[word]) == index == found.followed.index(word)
        assert found.followed.texts[index] == vlm.tokenizer.decode([first[word]])
    assert found.followed.roles[0] == (LOWER, "word tennis")
    assert found.followed.roles[1] == ("false option, capitalised",)
    digits = read(vlm, prompt, answer="1999")
    assert digits.followed.roles == ((LOWER, CAPITALISED),) and digits.followed.words == (("1999",),)
    assert torch.equal(digits.probability(LOWER), digits.probability(CAPITALISED))
    assert read(vlm, prompt, words="red").followed.words[-1] == ("red",)  # one word, not three letters


def test_the_other_case_is_followed_only_by_a_token_that_spells_as_much(random_llava_llama, photo):
    vlm, prompt = random_llava_llama, ask(random_llava_llama, photo)

    def spelled(word: str) -> str:
        return vlm.tokenizer.decode([prompt.answer_tokens(word)[0]]).strip()

    for given, other in (("tennis", "Tennis"), ("Rome", "rome"), ("an", "An")):  # a blank or a letter, for which
        assert len(spelled(other)) < len(spelled(given))  # nobody would take it
        roles = read(vlm, prompt, answer=given).followed.roles
        assert roles == ((CAPITALISED if given[0].isupper() else LOWER,),), given
    assert (spelled("An"), spelled("an")) == ("A", "an")
    assert read(vlm, prompt, answer="An").followed.roles == ((LOWER,), (CAPITALISED,))


def test_positions_are_groups_numbers_and_several(random_llava_llama, photo):
    prompt = ask(random_llava_llama, photo, constraint="the person", answer="golf")
    found = read(random_llava_llama, prompt, positions=["constraint", "last", -1, 2, "constraint_last"])
    end = prompt.groups["last"][0]
    constraint = prompt.groups["constraint"]
    assert found.positions == (*constraint, end, prompt.length - 1, 2)  # each once, by its first name
    roles = [f"constraint {number + 1}" for number in range(len(constraint))]
    assert found.position_roles == (*roles, "last", "position -1", "position 2")
    assert torch.equal(found.rank(LOWER, position="last"), found.rank(LOWER, position=len(constraint)))
    without = read(random_llava_llama, prompt.with_answer(None), positions="last")
    torch.testing.assert_close(without.probability(LOWER), found.probability(LOWER, position="last"))


def test_the_models_own_answer_is_followed_if_none_is_given(tiny_vlm):
    world = World()
    prompt = tiny_vlm.prompt(world.picture(world.taught[0], 5).image, world.question(world.facts[0]).text)
    own = logit_lens(tiny_vlm, prompt, progress=False)
    given = read(tiny_vlm, prompt, answer=tiny_vlm.answers([prompt])[0])
    assert own.is_own_answer and not given.is_own_answer
    assert own.answer == given.answer and torch.equal(own.probabilities, given.probabilities)


def test_the_answer_emerges_late_and_only_with_its_own_picture(tiny_vlm):
    world = World()
    facts = [fact for fact in world.facts if world.question(fact).answer[0].isupper()][::60]
    first, swapped = [], []
    for fact in facts:
        record, entity = world.question(fact), world.entities[fact.entity]
        other = next(
            each for each in world.taught if each.kind == entity.kind and each.facts[fact.key] != record.answer
        )
        for shown, layers in ((entity, first), (other, swapped)):
            prompt = tiny_vlm.prompt(world.picture(shown, 5).image, record.text)
            found = read(tiny_vlm, prompt, answer=record.answer)
            layers.append((found.first_layer(CAPITALISED), found.rank(CAPITALISED).tolist()))
    assert len(facts) >= 8
    assert sum(layer is not None for layer, _ in first) >= 0.9 * len(facts)
    assert sum(layer is not None for layer, _ in swapped) <= 0.2 * len(facts)
    for state in (0, 1):  # the embedding and the first layer do not know it yet
        assert sum(ranks[state] == 1 for _, ranks in first) <= 0.3 * len(facts), state


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionLanguageModel]:
    """A model that caps its logits, and the same one without."""
    tokenizer, models = make_tokenizer(), {}
    for name, cap in (("capped", 2.0), ("plain", None)):
        config = Gemma2Config(**text_sizes(tokenizer), head_dim=8, num_key_value_heads=2, final_logit_softcapping=cap)
        torch.manual_seed(0)
        folder = save(Gemma2ForCausalLM(config), tokenizer, tmp_path_factory.mktemp(name))
        models[name] = load(folder, verify=False)
    return models


def test_the_last_layer_of_a_model_that_caps_its_logits_says_what_the_model_says(gemma):
    for vlm in gemma.values():
        found, logits = read(vlm, prompt := ask(vlm, None)), vlm.logits(prompt)[0, -1].double()
        assert found.layers[-1] == 3
        own = logits.softmax(-1)[list(found.followed.ids)]
        torch.testing.assert_close(found.probabilities[0, 0, -1], own, rtol=1e-6, atol=0)
    bare = gemma["capped"].output_head(gemma["capped"].final_norm(torch.full((1, 32), 5.0)))
    assert (
        bare.abs().max() > 2 > gemma["capped"].readout(gemma["capped"].final_norm(torch.full((1, 32), 5.0))).abs().max()
    )


def test_logits_that_norm_and_readout_do_not_give_are_refused(gemma):
    def shift(_module, _inputs, output):
        output.logits = output.logits + 1
        return output

    vlm = gemma["plain"]
    assert vlm.after_head == AfterHead()
    with (
        vlm.model.register_forward_hook(shift),
        pytest.raises(TraceError, match=r"do not give its own logits \(off by"),
    ):
        read(vlm, ask(vlm, None))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_check_allows_for_rounding_in_every_dtype(dtype, llava_llama_path, photo):
    vlm = load(llava_llama_path, dtype=dtype, verify=False)
    found = read(vlm, ask(vlm, photo), positions="all")
    assert found.probabilities.dtype == torch.float64
    assert found.top_probabilities.sum(-1).max() <= 1


def test_states_that_overflow_the_dtype_are_refused(llava_llama_path, photo):
    models = [load(llava_llama_path, dtype=dtype, verify=False) for dtype in ("float16", "bfloat16")]
    for vlm in models:
        with torch.no_grad():
            words = vlm.model.get_input_embeddings().weight
            words.mul_(50_000 / words.abs().max())
            vlm.model.get_output_embeddings().weight.mul_(10)
    with pytest.raises(TraceError, match="overflow torch.float16 .* load it with dtype='float32' or 'bfloat16'"):
        read(models[0], ask(models[0], photo), positions="question")
    assert read(models[1], ask(models[1], photo), positions="question").probabilities.isfinite().all()


REFUSED = [  # name, options, error, message
    ("no answer in the prompt", {"positions": "answer"}, TraceError, "no tokens in group 'answer'.*question"),
    ("no positions", {"positions": []}, TraceError, "no positions to read; name a group"),
    ("unknown group", {"positions": "subject"}, ModelError, "no token group 'subject'"),
    ("position beyond the end", {"positions": 4000}, ModelError, "no position 4000"),
    ("foil like the answer", {"foil": "Tennis"}, TraceError, "begins with the same tokens as the answer 'tennis'"),
    ("empty answer", {"answer": " "}, ModelError, "the answer is empty"),
    ("token beyond the vocabulary", {"words": [10_000]}, TraceError, "no token 10000 .* vocabulary has"),
    ("boolean as a token", {"words": [True]}, TraceError, "no token True"),
    ("nothing kept", {"top": 0}, TraceError, "cannot keep the 0 likeliest"),
    ("more than there are", {"top": 10_000}, TraceError, "pass top from 1 to"),
]


@pytest.mark.parametrize(("options", "error", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_does_not_fit_is_refused(random_llama, options, error, message):
    with pytest.raises(error, match=message):
        read(random_llama, ask(random_llama, None), **options)


def test_nothing_stays_on_the_model(random_vlm, photo):
    prompt = ask(random_vlm, photo)
    before, hooks = random_vlm.logits(prompt), placed(random_vlm)
    read(random_vlm, prompt, positions="all")
    assert torch.equal(random_vlm.logits(prompt), before)
    assert placed(random_vlm) == hooks


def placed(vlm) -> list[tuple[int, int]]:
    """How many hooks each layer has; transformers places some of its own and leaves them there."""
    return [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in vlm.addresses.layers]
