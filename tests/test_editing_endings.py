"""What a model says after an answer: continuations, the ending that an edit asks for, and what is said in the end."""

import math
from pathlib import Path

import multrace as mt
import pytest
import torch
from multrace.data import World
from multrace.editing.requests import end_of_answer, says_target
from multrace.editing.siblings import Siblings
from multrace.editing.values import (
    Goal,
    Goals,
    PlainGoal,
    ValueSettings,
    ending_of,
    ends_by_itself,
    goals_of,
    search_values,
)
from multrace.models import Continuation, VisionLanguageModel
from multrace.workflow import EditOutcome
from random_models import save, text_sizes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUESTION = mt.Question(text="Who founded Previco?", constraint="Previco")
OTHER = mt.Question(text="Where do people go now?")
COMPANIES = tuple(entity.name for entity in World().of_kind("company"))
FEW = Siblings(names=COMPANIES[1:5], own=0)


def asked(target: str = "Paris", question: mt.Question = QUESTION) -> mt.EditRequest:
    return mt.EditRequest(question=question, target=target)


# ---- continuations ----


def test_a_seed_gives_the_same_texts_and_leaves_the_random_state(random_vlm: VisionLanguageModel):
    prompts = [random_vlm.prompt(None, "Where do people go now?")] * 3

    def texts(seed: int | None) -> list[str]:
        return [each.text for each in random_vlm.continuations(prompts, max_new_tokens=6, seed=seed)]

    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = texts(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)  # what is drawn elsewhere does not matter
    assert texts(1) == first
    assert texts(2) != first
    assert len(set(first)) > 1  # each row draws for itself
    assert len(set(texts(None))) == 1


def test_greedy_continuations_are_the_answers(random_vlm: VisionLanguageModel, tiny_vlm: VisionLanguageModel):
    for vlm in (random_vlm, tiny_vlm):
        prompts = [vlm.prompt_for(question) for question in (QUESTION, OTHER)]
        found = vlm.continuations(prompts, max_new_tokens=6)
        assert [each.text.strip() for each in found] == vlm.answers(prompts, max_new_tokens=6)


def test_a_continuation_stops_by_itself_or_is_cut(tiny_vlm: VisionLanguageModel):
    prompt = tiny_vlm.prompt_for(QUESTION)
    whole = tiny_vlm.continuations([prompt], max_new_tokens=8)[0]
    size = len(prompt.with_answer(whole.text.strip()).answer_ids)
    assert whole.stopped
    by_length = {room: tiny_vlm.continuations([prompt], max_new_tokens=room)[0] for room in (size, size + 1)}
    assert by_length[size] == Continuation(text=whole.text, stopped=False)  # the end itself is a token
    assert by_length[size + 1] == whole


def test_samples_follow_the_whole_distribution(random_llama: VisionLanguageModel):
    """A first token is drawn as often as it is probable, within four standard errors."""
    prompt = random_llama.prompt(None, "Where do people go now?")
    number = 1500
    found = random_llama.continuations([prompt] * number, max_new_tokens=1, seed=3, batch_size=number)
    with torch.no_grad():
        likely = random_llama.logits(prompt)[0, -1].double().softmax(-1)
    text = random_llama.decode([int(likely.argmax())])
    same = torch.tensor([random_llama.decode([token]) == text for token in range(len(likely))])
    expected = likely[same].sum().item()
    share = sum(each.text == text for each in found) / number
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / number)
    assert 0.01 < expected < 0.9


# ---- the ending that is asked for ----

ENDINGS: dict[str, tuple[str, bool, str, str]] = {  # what the model says, whether it stops, target, what is to follow
    "full stop": (" Canberra. It is", False, "Paris", "."),
    "full stop at the end": (" Canberra.", True, "Paris", "."),
    "line end": (" Canberra\nQ: Who", False, "Paris", "\n"),
    "line ends before": ("\n\nCanberra. It", False, "Paris", "."),
    "question mark": (" Canberra? It", False, "Paris", "?"),
    "target with its own full stop": (" It is Canberra.\nQ:", False, "It is Paris.", "\n"),
    "sentence after a sentence": (" It is Canberra. It", False, "It is Paris.", ""),
    "sentence and the end": (" It is Canberra.", True, "It is Paris.", "</s>"),
    "the end": (" Canberra", True, "Paris", "</s>"),
    "nothing": (" Canberra and a lot of words", False, "Paris", ""),
    "number": (" 1,000 people", False, "Paris", ""),
    "time": (" 10:30 at night.", False, "Paris", "."),
    "mark before the answer": (" .Canberra", False, "Paris", ""),
}


@pytest.mark.parametrize(("said", "stops", "target", "wanted"), ENDINGS.values(), ids=ENDINGS)
def test_the_own_ending_is_what_follows_the_present_answer(
    random_llama: VisionLanguageModel, said: str, stops: bool, target: str, wanted: str
):
    ids = ending_of(random_llama, asked(target), Continuation(text=said, stopped=stops))
    assert len(ids) == bool(wanted)
    assert "".join(random_llama.tokenizer.decode([each]) for each in ids) == wanted


def test_without_an_answer_there_is_no_ending(random_llama: VisionLanguageModel):
    assert ending_of(random_llama, asked(), None) == ()


def test_a_mark_that_melts_into_the_target_is_no_ending(tmp_path: Path):
    """The end of a target and a full stop can be one token, which is not the target's and then a mark."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator(["Ada", "Bob", "o."] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", pad_token="</s>")
    sizes = text_sizes(tokenizer) | {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    vlm = mt.load(save(LlamaForCausalLM(LlamaConfig(**sizes)), tokenizer, tmp_path / "model"), verify=False)
    said = Continuation(text=" Canberra. It", stopped=False)
    assert ending_of(vlm, asked("Oslo"), said) == ()
    assert ending_of(vlm, asked("Ada"), said) == (own.token_to_id("."),)


def test_a_model_that_stops_is_asked_to_stop(tiny_vlm: VisionLanguageModel):
    (present,) = tiny_vlm.continuations([tiny_vlm.prompt_for(QUESTION)])
    assert ending_of(tiny_vlm, asked("Pruro"), present) == tiny_vlm.end_ids[:1]


def test_targets_are_said_with_an_end():
    said = {
        ("Canberra", "Canberra"): True,
        (" Canberra\n", "Canberra "): True,
        ("Canberra. It is", "Canberra"): True,
        ("Canberra\nQ: Who", "Canberra"): True,
        ("Canberra, Australia", "Canberra"): True,
        ("Canberra Island", "Canberra"): False,
        ("Canberran", "Canberra"): False,
        ("In Canberra", "Canberra"): False,
        ("It is Canberra. It has", "It is Canberra."): True,
        ("It is Canberra.com", "It is Canberra."): False,
        ("", "Canberra"): False,
        ("1,000 people", "1"): False,
        ("1, and 2", "1"): True,
        ("10:30", "10"): False,
        ("3.5", "3"): False,
        ("3.", "3"): True,
        ("a\nb", "a"): True,
    }
    assert {pair: says_target(*pair) for pair in said} == said


def test_the_end_of_an_answer_is_its_first_mark():
    assert [end_of_answer(text) for text in ("Ada. It", "1,000; 2", "A\nB", "none", ".a.")] == [3, 5, 1, 4, 2]
    assert end_of_answer("Ada. It. ", 4) == 7


# ---- whether the model ends by itself ----


def test_whether_a_model_ends_by_itself_is_read_off_its_next_token(
    tiny_vlm: VisionLanguageModel, random_llama: VisionLanguageModel
):
    outcomes = set()
    for vlm, targets in ((tiny_vlm, ("Pruro", "Pruro Kliner", "top")), (random_llama, ("Paris", "Ada Example"))):
        goals = []
        for target in targets:
            prompt = vlm.prompt_for(QUESTION).with_answer(target)
            with torch.no_grad():
                follows = int(vlm.logits(prompt)[0, -1].argmax())
            goals += [(target, (ending,), ending == follows) for ending in (follows, vlm.end_ids[0], 7)]
            goals.append((target, (), True))  # nothing is asked for
        plain = [PlainGoal(questions=(QUESTION,), target=target, ending=ending) for target, ending, _ in goals]
        found = ends_by_itself(vlm, Goals(vlm, plain), "last", rows_at_once=5)
        assert found == [wanted for _, _, wanted in goals]
        outcomes |= {(ending == vlm.end_ids[:1], itself) for (_, ending, _), itself in zip(goals, found, strict=True)}
    assert {(True, True), (True, False)} < outcomes


# ---- the search ----


@pytest.mark.parametrize("token", ["last", "constraint_last"])
def test_an_ending_counts_what_it_lacks_to_being_more_probable_than_all_else(tiny_vlm: VisionLanguageModel, token: str):
    """The loss before the first step, with the mean over the labels written out."""
    projection, prompt = tiny_vlm.down_projection(5), tiny_vlm.prompt_for(QUESTION)
    place = {"projection": projection, "place": projection, "layer": 5, "token": token}
    own = tiny_vlm.answers([prompt])[0]
    seen = set()
    for target, ending in ((own, tiny_vlm.end_ids[0]), ("Pruro", tiny_vlm.end_ids[0]), ("Pruro", 7)):
        goal = Goal(prompts=(prompt.with_answer(target),), ending=(ending,))
        (result,) = search_values(tiny_vlm, [goal], **place, settings=ValueSettings(steps=0))
        full, ids = goal.prompts[0], [*goal.prompts[0].answer_ids, ending]
        with torch.no_grad():
            logs = tiny_vlm.logits(full)[0, -len(ids) :].double().log_softmax(-1)
        losses = [-logs[column, each].item() for column, each in enumerate(ids)]
        wanting = [*losses[:-1], max(0.0, losses[-1] - math.log(2))]
        assert result.loss == pytest.approx(sum(wanting) / len(ids), rel=1e-3, abs=1e-6)
        assert result.probability == pytest.approx(math.exp(-sum(losses)), rel=1e-3)
        assert len(result.keys) == (len(ids) - 1 if token == "last" else 1)
        seen.add(wanting[-1] > 0)
    assert seen == {True, False}


def test_an_ending_has_a_key_only_where_the_model_would_not_say_it(tiny_vlm: VisionLanguageModel):
    """After its target the embedded model stops by itself; a target that it goes on after needs a key more."""
    natural = {}
    for request in (asked("Bimda Sallez"), asked("Pruro")):
        tokens = len(tiny_vlm.prompt_for(QUESTION).with_answer(request.target).answer_ids)
        editors = {kind: mt.MultEdit(layer=5, steps=1, ending=kind, siblings=None) for kind in ("own", "none", "stop")}
        found = {kind: each.search(tiny_vlm, [request], progress=False)[0] for kind, each in editors.items()}
        goal = PlainGoal(questions=(QUESTION,), target=request.target, ending=tiny_vlm.end_ids[:1])
        (itself,) = ends_by_itself(tiny_vlm, Goals(tiny_vlm, [goal]), "last")
        assert found["own"].ending == (() if itself else tiny_vlm.end_ids[:1])
        assert found["own"].ending_key is not itself
        assert len(found["own"].results[0].keys) == tokens + (not itself)
        assert found["none"].ending == found["stop"].ending == ()
        assert [len(found[kind].results[0].keys) for kind in ("none", "stop")] == [tokens, tokens + 1]
        natural[request.target] = itself
    assert natural == {"Bimda Sallez": True, "Pruro": False}


# ---- what the edited model says ----


@pytest.mark.parametrize(
    "place", [{"layer": 5, "token": "last"}, {"layer": 1, "token": "constraint_last"}], ids=["last token", "name"]
)
def test_an_edited_answer_stops_as_the_answer_before_did(tiny_vlm: VisionLanguageModel, place: dict):
    request, prompt = asked("Pruro"), tiny_vlm.prompt_for(QUESTION)
    (before,) = tiny_vlm.continuations([prompt])
    delta = mt.MultEdit(**place, steps=60, siblings=FEW).edit(tiny_vlm, [request], progress=False)
    with delta.applied(tiny_vlm):
        (after,) = tiny_vlm.continuations([prompt])
    assert before.stopped and after.stopped
    assert (before.text.strip() != "Pruro", after.text.strip()) == (True, "Pruro")
    assert delta.requests[0]["status"] == "edited"


def test_without_an_ending_the_model_goes_on_after_the_target(tiny_vlm: VisionLanguageModel):
    request, prompt = asked("Pruro"), tiny_vlm.prompt_for(QUESTION)
    delta = mt.MultEdit(layer=5, steps=60, ending="none", siblings=FEW).edit(tiny_vlm, [request], progress=False)
    with delta.applied(tiny_vlm):
        (after,) = tiny_vlm.continuations([prompt])
    assert after.text.split()[0] == "Pruro" != after.text.strip()
    (values,) = mt.MultEdit(layer=1, token="constraint_last", steps=1, ending="none").search(tiny_vlm, [request])
    assert (values.ending, values.ending_key) == ((), False)
    (values,) = mt.MultEdit(layer=1, token="constraint_last", steps=1).search(tiny_vlm, [request])
    assert (values.ending, values.ending_key) == (tiny_vlm.end_ids[:1], False)


def test_an_outcome_takes_what_goes_on_after_a_mark_as_the_target(tiny_vlm: VisionLanguageModel):
    delta = mt.MultEdit(layer=5, steps=1, siblings=None).edit(tiny_vlm, [asked("Pruro")], progress=False)
    parts = {"places": (), "notes": (), "shifts": (), "shares": (None,), "rounding": (), "probabilities": ()}
    for said, wanted in (("Pruro. It is", True), ("Pruro Kliner", False)):
        outcome = EditOutcome(delta=delta, answers=(("a", said, "a"),), is_undone=True, sizes=(), **parts)
        assert (outcome.says_target(0), outcome.missed) == (wanted, int(not wanted))


def test_values_keep_their_ending_in_their_file(tiny_vlm: VisionLanguageModel, tmp_path):
    (values,) = mt.MultEdit(layer=5, steps=1).search(tiny_vlm, [asked("Pruro")], progress=False)
    loaded = type(values).load(values.save(tmp_path / "values.safetensors"))
    assert (loaded.ending, loaded.ending_key) == (values.ending, values.ending_key) == (tiny_vlm.end_ids[:1], True)
    (goal,) = goals_of(asked("Pruro"), ending=loaded.ending, ending_key=loaded.ending_key)
    assert goal.made(tiny_vlm).ending_key
