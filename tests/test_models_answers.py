"""Answers and scores: batches against one by one, and against plain transformers."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import multrace
import pytest
import torch
from multrace import ModelError, capture
from multrace.models import Site, collate
from transformers import WatermarkingConfig

QUESTIONS = (
    "Who?",
    "Who founded the company in this photo?",
    "What is the capital of the country whose flag is shown in the picture of the person?",
    "Which sport?",
    "What colour is the emblem of the company shown here, and who won the medal in the year 1999?",
)


def prompts_for(vlm, make_photo):
    seeds = (0, 1, 2, None, 4)  # one question without a picture
    images = [make_photo(seed) if vlm.has_vision and seed is not None else None for seed in seeds]
    return [vlm.prompt(image, question) for image, question in zip(images, QUESTIONS, strict=True)]


def test_a_batch_gives_exactly_what_its_prompts_give_one_by_one(random_vlm, make_photo):
    prompts = prompts_for(random_vlm, make_photo)
    alone = [random_vlm.answers([prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert len(set(alone)) > 1
    for batch_size in (1, 2, 5):
        assert random_vlm.answers(prompts, max_new_tokens=8, batch_size=batch_size) == alone


def test_a_left_padded_batch_generates_the_same_ids_row_by_row(random_vlm, make_photo):
    prompts = prompts_for(random_vlm, make_photo)
    batch, _ = collate(prompts, random_vlm.tokenizer)
    options = {
        "do_sample": False,
        "max_new_tokens": 8,
        "eos_token_id": None,
    }  # no early end, so that rows compare whole
    together = random_vlm.model.generate(**batch, **options)[:, -8:]
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(random_vlm.model.generate(**prompt.inputs, **options)[0, -8:], row)


def test_an_answer_is_what_plain_transformers_generates(random_vlm, make_photo):
    for prompt in prompts_for(random_vlm, make_photo):
        inputs = dict(prompt.inputs)
        ids = random_vlm.model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, prompt.length :]
        expected = random_vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert random_vlm.answers([prompt], max_new_tokens=6) == [expected]
        assert random_vlm.answer(prompt.images or None, prompt.question, max_new_tokens=6) == expected


def test_greedy_means_the_largest_logit_each_time(random_vlm, make_photo):
    prompt = prompts_for(random_vlm, make_photo)[1]
    ids = prompt.inputs["input_ids"]
    for _ in range(5):
        step = random_vlm.logits({**prompt.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
        ids = torch.cat([ids, step[:, -1:].argmax(dim=-1)], dim=1)
        if ids[0, -1] == random_vlm.tokenizer.eos_token_id:
            break
    expected = random_vlm.decode(ids[0, prompt.length :]).strip()
    assert random_vlm.answers([prompt], max_new_tokens=5) == [expected]


SETTINGS = {  # settings that a folder may bring along, each of which changes what `generate` returns
    "sampling and penalties": {"do_sample": True, "temperature": 5.0, "top_k": 7, "repetition_penalty": 3.0},
    "a maximum length": {"max_length": 3},
    "a minimum length": {"min_new_tokens": 16},
    "a minimum total length": {"min_length": 400},
    "a time limit": {"max_time": 1e-9},
    "stop strings": {"stop_strings": ["a", "e", "i", "o", "u", " "]},
    "beams": {"num_beams": 4, "length_penalty": -9.0, "num_return_sequences": 4},
    "no repeated tokens": {"no_repeat_ngram_size": 1},
    "a forced end": {"forced_eos_token_id": 200},
    "a forced beginning": {"forced_bos_token_id": 200},
    "a decaying length": {"exponential_decay_length_penalty": (0, 99.0)},
    "classifier-free guidance": {"guidance_scale": 40.0},
    "a watermark": {"watermarking_config": WatermarkingConfig(bias=99.0)},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "contrastive search": {"penalty_alpha": 0.9, "top_k": 9},
    "contrasted layers": {"dola_layers": "low"},
    "a cache of fixed size": {"cache_implementation": "static", "max_cache_len": 2},
    "results in a dictionary": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("case", [*SETTINGS, "suppressed tokens", "suppressed first tokens", "bad words", "a bias"])
def test_generation_settings_of_a_model_do_not_reach_its_answers(case, random_llama, monkeypatch):
    prompt = random_llama.prompt(None, QUESTIONS[1])
    expected = random_llama.answers([prompt])
    first = int(random_llama.logits(prompt)[0, -1].argmax())
    changes = SETTINGS | {
        "suppressed tokens": {"suppress_tokens": [first]},
        "suppressed first tokens": {"begin_suppress_tokens": [first]},
        "bad words": {"bad_words_ids": [[first]]},
        "a bias": {"sequence_bias": [[[first], -99.0]]},
    }
    settings = copy.deepcopy(random_llama.model.generation_config)
    settings.update(**changes[case])
    before = settings.to_dict()
    monkeypatch.setattr(random_llama.model, "generation_config", settings)
    assert random_llama.answers([prompt]) == expected
    assert random_llama.model.generation_config is settings and settings.to_dict() == before  # left as they were


@pytest.mark.parametrize("case", ["suppressed tokens", "a minimum length"])
def test_generation_settings_do_reach_what_transformers_generates(case, random_llama, monkeypatch):
    prompt = random_llama.prompt(None, QUESTIONS[1])
    first = int(random_llama.logits(prompt)[0, -1].argmax())
    expected = random_llama.model.generate(**prompt.inputs, max_new_tokens=16)
    changes = {"suppressed tokens": {"suppress_tokens": [first]}, "a minimum length": {"min_new_tokens": 16}}
    settings = copy.deepcopy(random_llama.model.generation_config)
    settings.update(eos_token_id=first, **changes[case])
    monkeypatch.setattr(random_llama.model, "generation_config", settings)
    assert not torch.equal(random_llama.model.generate(**prompt.inputs, max_new_tokens=16), expected)


def test_a_folder_that_asks_for_a_length_answers_the_same(llama_path, random_llama, tmp_path):
    folder = Path(shutil.copytree(llama_path, tmp_path / "longer"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"min_new_tokens": 30}))
    prompts = [random_llama.prompt(None, question) for question in QUESTIONS]
    assert multrace.load(folder, verify=False).answers(prompts, max_new_tokens=30) == random_llama.answers(
        prompts, max_new_tokens=30
    )


def test_answers_leave_out_given_answers_and_padding_matters(random_vlm, make_photo):
    prompts = prompts_for(random_vlm, make_photo)
    expected = random_vlm.answers(prompts)
    assert random_vlm.answers([prompt.with_answer("Oslo") for prompt in prompts]) == expected
    batch, offsets = collate(prompts, random_vlm.tokenizer)
    unmasked = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    row = offsets.index(max(offsets))
    with torch.no_grad():
        assert not torch.allclose(random_vlm.logits(unmasked)[row, -1], random_vlm.logits(batch)[row, -1], atol=1e-3)


def test_no_prompts_no_answers(random_llama):
    assert random_llama.answers([]) == []
    for options in ({"batch_size": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ModelError, match="at least 1"):
            random_llama.answers([random_llama.prompt(None, "Who?")], **options)


def test_a_score_is_the_softmax_of_each_step(random_vlm, photo):
    image = photo if random_vlm.has_vision else None
    score = random_vlm.score(image, QUESTIONS[1], "Ada Example")
    prompt = random_vlm.prompt(image, QUESTIONS[1])
    steps = []
    for token in prompt.with_answer("Ada Example").answer_ids:
        logits = random_vlm.logits(prompt.inputs)[0, -1].double()
        exponentials = [math.exp(value) for value in logits.tolist()]
        steps.append(math.log(exponentials[token] / sum(exponentials)))
        ids = torch.cat([prompt.inputs["input_ids"], torch.tensor([[token]])], dim=1)
        prompt = dataclasses.replace(
            prompt, inputs={**prompt.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        )
    assert score.token_log_probabilities == pytest.approx(steps, abs=1e-4)
    assert score.log_probability == pytest.approx(sum(steps), abs=1e-4)
    assert score.probability == pytest.approx(math.prod(map(math.exp, steps)), rel=1e-3)
    assert "".join(score.tokens) == " Ada Example"
    assert score.log_probability == pytest.approx(sum(score.token_log_probabilities), abs=1e-12)


def test_probabilities_of_all_first_tokens_add_up_to_one(random_llama):
    logits = random_llama.logits(random_llama.prompt(None, QUESTIONS[1]))
    score = random_llama.score(None, QUESTIONS[1], "Oslo")
    probabilities = logits[0, -1].double().softmax(-1)
    first = random_llama.prompt(None, QUESTIONS[1], answer="Oslo").answer_ids[0]
    assert probabilities[first].log().item() == pytest.approx(score.token_log_probabilities[0], abs=1e-5)
    assert probabilities.sum().item() == pytest.approx(1)


def test_forward_on_embeddings_is_the_model(random_vlm, make_photo):
    for prompt in prompts_for(random_vlm, make_photo):
        embeddings = random_vlm.embeddings(prompt)
        clean = random_vlm.logits(prompt)
        assert clean.dtype == torch.float32
        assert torch.equal(random_vlm.forward(embeddings), clean)
        mask = prompt.inputs["attention_mask"]
        assert torch.equal(random_vlm.forward(embeddings, attention_mask=mask), clean)
    batch, offsets = collate(prompts_for(random_vlm, make_photo), random_vlm.tokenizer)
    rows = random_vlm.forward(random_vlm.embeddings(batch), attention_mask=batch["attention_mask"])
    assert torch.allclose(rows[:, -1], random_vlm.logits(batch)[:, -1], atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_boolean_mask_of_four_dimensions(attention, request, make_photo):
    for name in ("llava_phi", "gpt2"):
        vlm = multrace.load(request.getfixturevalue(f"{name}_path"), attention=attention)
        prompt = prompts_for(vlm, make_photo)[1]
        clean, embeddings = vlm.logits(prompt), vlm.embeddings(prompt)
        causal = torch.ones(prompt.length, prompt.length, dtype=torch.bool).tril()[None, None]
        assert torch.allclose(vlm.forward(embeddings, attention_mask=causal), clean, atol=1e-4)
        cut = causal.clone()
        cut[..., -1, 1:-1] = False  # the last position may look at the first and itself only
        site = Site("hidden", 0)
        with capture(vlm, [site]) as seen:
            vlm.forward(embeddings, attention_mask=cut)
        first = torch.cat([embeddings[:, :1], embeddings[:, -1:]], dim=1)
        with capture(vlm, [site]) as alone:  # without a mask, a jump in positions means packed sequences
            vlm.forward(
                first,
                attention_mask=causal[..., :2, :2],
                position_ids=torch.tensor([[0, prompt.length - 1]]),
            )
        assert torch.allclose(seen[site][:, -1], alone[site][:, -1], atol=1e-4)
        assert not torch.allclose(vlm.forward(embeddings, attention_mask=cut)[:, -1], clean[:, -1], atol=1e-3)


@pytest.mark.parametrize(("dtype", "advice"), [("float16", "dtype='float32'"), ("float32", "undo the last change")])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_logits_that_are_not_finite_are_no_answer(value, dtype, advice, llama_path):
    vlm = multrace.load(llama_path, dtype=dtype, verify=False)
    prompts = [vlm.prompt(None, question) for question in QUESTIONS[:2]]
    answers, score = vlm.answers(prompts), vlm.score(None, QUESTIONS[0], "Ada")
    token = prompts[0].inputs["input_ids"][0, -1]
    row = vlm.weight("model.embed_tokens.weight")[token]
    own = row.clone()
    row[0] = value
    for ask in (lambda: vlm.answers(prompts), lambda: vlm.score(None, QUESTIONS[0], "Ada")):
        with pytest.raises(
            ModelError, match=f"logits that are not finite in torch.{dtype}, so it has no answer.*{advice}"
        ):
            ask()
    row.copy_(own)
    assert (vlm.answers(prompts), vlm.score(None, QUESTIONS[0], "Ada")) == (answers, score)


def test_an_impossible_token_is_no_overflow(llama_path):
    vlm = multrace.load(llama_path, verify=False)
    prompt = vlm.prompt(None, QUESTIONS[0])
    (expected,) = vlm.answers([prompt])

    def bar(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([0]), -math.inf)

    with vlm.output_head.register_forward_hook(bar):
        assert vlm.answers([prompt]) == [expected]
