"""Prompts: templates, token groups, constraints, answers and batches."""

import copy
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import multrace
import numpy as np
import pytest
import torch
from multrace import ModelError, editing, tracing
from multrace.data import EditRecord, Probe, Question
from multrace.data.spans import nearest_words
from multrace.models import collate
from multrace.models.frontend import align, position_limit
from random_models import make_tokenizer, save, text_sizes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUESTION = "Who founded the company in this photo?"
SPAN = "the company in this photo"


def words(prompt, group):
    return "".join(prompt.tokens[position] for position in prompt.positions(group))


def test_groups_of_a_prompt_with_a_picture(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION, constraint=SPAN)
    assert len(prompt.positions("image")) == 16
    assert words(prompt, "question") == f"\n{QUESTION}"  # the separator after the picture belongs to the question
    assert words(prompt, "question_only") == QUESTION
    assert words(prompt, "constraint").strip() == SPAN
    assert prompt.positions("constraint_last") == prompt.positions("constraint")[-1:]
    assert prompt.positions("last") == (prompt.length - 1,) == prompt.positions(-1)
    assert prompt.positions("all") == tuple(range(prompt.length))
    assert prompt.positions("answer") == ()
    ids = prompt.inputs["input_ids"][0]
    assert (ids[list(prompt.positions("image"))] == random_llava.model.config.image_token_id).all()
    assert torch.equal(ids, random_llava.processor(images=photo, text=prompt.text, return_tensors="pt")["input_ids"][0])


def test_the_chat_template_and_the_plain_one(random_llava_llama, random_llava_phi, photo, monkeypatch):
    assert random_llava_llama.processor.chat_template
    assert not random_llava_phi.processor.chat_template
    texts = {vlm.prompt(photo, QUESTION).text for vlm in (random_llava_llama, random_llava_phi)}
    assert texts == {f"USER: <image>\n{QUESTION} ASSISTANT:"}
    another = "{{ 'Look: <image> ' + messages[0]['content'][-1]['text'] | trim + ' =' }}"
    monkeypatch.setattr(random_llava_phi.processor, "chat_template", another)
    assert random_llava_phi.prompt(photo, QUESTION).text == f"Look: <image> {QUESTION} ="


def test_text_models_use_their_chat_template_or_the_bare_question(random_llama, monkeypatch):
    assert random_llama.prompt(None, f"  {QUESTION} ").text == QUESTION
    template = "{{ bos_token + 'Q: ' + messages[0]['content'] + ' A:' }}"
    monkeypatch.setattr(random_llama.tokenizer, "chat_template", template)
    prompt = random_llama.prompt(None, QUESTION, constraint=SPAN)
    assert prompt.text == f"<s>Q: {QUESTION} A:"
    assert (
        prompt.inputs["input_ids"][0, :2].tolist().count(random_llama.tokenizer.bos_token_id) == 1
    )  # not written twice
    assert words(prompt, "constraint").strip() == SPAN


def test_templates_of_the_caller(random_llava_llama, photo):
    prompt = random_llava_llama.prompt(photo, QUESTION, template="{question} {image} Answer:")
    assert prompt.text == f"{QUESTION} <image> Answer:"
    assert words(prompt, "question") == words(prompt, "question_only") == QUESTION
    raw = random_llava_llama.prompt(photo, QUESTION, template="raw")
    assert raw.text == f"<image>{QUESTION}"
    assert raw.positions("question")[0] == raw.positions("image")[-1] + 1
    with pytest.raises(ModelError, match="no {question}"):
        random_llava_llama.prompt(photo, QUESTION, template="USER: {image}")
    with pytest.raises(ModelError, match="no {image}"):
        random_llava_llama.prompt(photo, QUESTION, template="USER: {question}")
    with pytest.raises(ModelError, match="2 times"):
        random_llava_llama.prompt(photo, QUESTION, template="{image} {question} {question}")


def test_a_template_shows_each_picture_once(random_llava, photo, other_photo):
    both = [photo, other_photo]
    one_place = random_llava.prompt(both, QUESTION, template="{image} {question}")
    two_places = random_llava.prompt(both, QUESTION, template="First: {image} Second: {image} {question}")
    assert one_place.text == f"<image>\n<image> {QUESTION}"
    assert two_places.text == f"First: <image> Second: <image> {QUESTION}"
    assert [patch.image for patch in two_places.patches] == [0] * 16 + [1] * 16
    assert random_llava.prompt(None, QUESTION, template="{image}{image}{question}").text == QUESTION
    refused = {
        "{image}{image} {question}": (photo, "has {image} 2 times and the prompt has 1 picture;"),
        "{image}{image}{image} {question}": (both, "has {image} 3 times and the prompt has 2 pictures;"),
        "{image} <image> {question}": (photo, "shows 2 pictures and the prompt has 1; write {image} in place of"),
        "<image> {question}": (None, "shows 1 pictures and the prompt has 0"),
        "<image>{question}": (photo, "has no {image}"),
    }
    for template, (pictures, message) in refused.items():
        with pytest.raises(ModelError) as error:
            random_llava.prompt(pictures, QUESTION, template=template)
        assert message in str(error.value)


def test_a_chat_template_that_shows_a_picture_twice(random_llava_phi, photo, monkeypatch):
    doubled = "{{ '<image> <image> ' + messages[0]['content'][-1]['text'] }}"
    monkeypatch.setattr(random_llava_phi.processor, "chat_template", doubled)
    with pytest.raises(ModelError, match="processor of .* cannot turn 1 picture and the text '<image> <image> Who"):
        random_llava_phi.prompt(photo, QUESTION)


def test_a_prompt_remembers_its_template(random_llava, photo):
    for template in (None, "raw", "{question} {image} Answer:"):
        prompt = random_llava.prompt(photo, QUESTION, template=template, answer="Ada")
        again = prompt.asked_anew("Who?")
        assert prompt.template == again.template == template
        assert again.text == random_llava.prompt(photo, "Who?", template=template).text
        assert again.answer == "Ada"


def test_a_prompt_prints_in_two_lines(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION, constraint=SPAN, answer="Ada")
    assert repr(prompt).splitlines() == [
        f"Prompt('{QUESTION}': {prompt.length} tokens, 1 picture, answer 'Ada';",
        f"       image 16, question {len(prompt.positions('question'))}, "
        f"question_only {len(prompt.positions('question_only'))}, constraint {len(prompt.positions('constraint'))}, "
        f"constraint_last 1, last 1, answer {len(prompt.answer_ids)}, "
        f"all {len(prompt.positions('all'))})",
    ]
    spans = {name * 30: ("founded", 0) for name in "abc"}
    long = repr(random_llava.prompt([photo] * 3, QUESTION * 9, constraint=spans))
    assert len(long.splitlines()) == 2 and max(map(len, long.splitlines())) <= 120
    assert len(repr(random_llava).splitlines()) == 2


# Prompts are copied, sent to other processes, and given to other models.


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda prompt: pickle.loads(pickle.dumps(prompt)),
    "replace": dataclasses.replace,
    "a list of them": lambda prompt: copy.deepcopy([prompt])[0],
}


@pytest.mark.parametrize("case", COPIES)
def test_a_copied_prompt_is_the_same_prompt(case, random_llava, photo, other_photo):
    prompt = random_llava.prompt(photo, QUESTION, constraint={"visual": SPAN, "verb": "founded"}, answer="Ada")
    copied = COPIES[case](prompt)
    for name in ("question", "text", "tokens", "groups", "patches", "template", "answer", "answer_ids"):
        assert getattr(copied, name) == getattr(prompt, name)
    assert set(copied.inputs) == set(prompt.inputs)
    assert all(torch.equal(copied.inputs[name], value) for name, value in prompt.inputs.items())
    assert [image.tobytes() for image in copied.images] == [image.tobytes() for image in prompt.images]
    assert torch.equal(random_llava.logits(copied), random_llava.logits(prompt))
    assert random_llava.answers([copied, prompt]) == random_llava.answers([prompt]) * 2
    moved = copied.with_images(other_photo).with_answer("Oslo").asked_anew("Who?")
    assert torch.equal(
        random_llava.logits(moved), random_llava.logits(random_llava.prompt(other_photo, "Who?", answer="Oslo"))
    )
    with pytest.raises(TypeError):
        copied.inputs["input_ids"] = prompt.inputs["input_ids"]


def test_a_deep_copy_shares_no_tensor_and_the_same_tokenizer(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    copied = copy.deepcopy(prompt)
    copied.inputs["input_ids"].zero_()
    assert prompt.inputs["input_ids"].any()
    assert copied.frontend is prompt.frontend


def test_a_copied_request_edits_as_the_first(random_llama):
    prompt = random_llama.prompt(None, QUESTION, constraint=SPAN)
    request = multrace.EditRequest(question=prompt, target="Ada", contexts=(prompt,))
    for copied in (copy.deepcopy(request), pickle.loads(pickle.dumps(request))):
        deltas = [multrace.MultEdit(layer=1, steps=2).edit(random_llama, [each]) for each in (request, copied)]
        first, second = (delta.changes for delta in deltas)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name].left, second[name].left) for name in first)
        assert all(torch.equal(first[name].right, second[name].right) for name in first)


@pytest.mark.parametrize("case", ["BlankImage", "SwapImage", "ImageNoise", "TextNoise"])
def test_a_corrupted_run_can_be_copied_and_sent(case, random_llava_llama, photo, other_photo):
    prompt = random_llava_llama.prompt(photo, QUESTION, constraint=SPAN)
    settings = {"SwapImage": {"image": other_photo}, "ImageNoise": {"samples": 1, "seed": np.int64(3)}}.get(case, {})
    corrupted = getattr(multrace, case)(**settings).corrupt(random_llava_llama, prompt)
    for copied in (copy.deepcopy(corrupted), pickle.loads(pickle.dumps(corrupted))):
        assert torch.equal(copied.embeddings, corrupted.embeddings)
        assert len(copied.inputs) == len(corrupted.inputs)
        for first, second in zip(copied.inputs, corrupted.inputs, strict=True):
            assert all(torch.equal(first[name], value) for name, value in second.items())


def test_numbers_of_numpy_are_stored_as_numbers(random_llama, tmp_path):
    prompt = random_llama.prompt(None, QUESTION, constraint=SPAN)
    settings = {"corruption": multrace.TextNoise(samples=2), "sites": ("mlp",), "even_if_weak": True, "progress": False}
    traces = [
        multrace.causal_trace(random_llama, prompt, window=number, positions=[position, "last"], **settings)
        for number, position in ((np.int64(3), np.int64(4)), (3, 4))
    ]
    loaded = [tracing.CausalTrace.load(trace.save(tmp_path / f"{number}")) for number, trace in enumerate(traces)]
    assert loaded[0].window == loaded[1].window == 3
    assert torch.equal(loaded[0].samples["mlp"], loaded[1].samples["mlp"])


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """A text-only model whose words have other numbers."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(2000)} | {"<unk>": 2000}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="w2")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2001, **sizes))
    return multrace.load(save(model, tokenizer, tmp_path_factory.mktemp("foreign")))


ENTRIES = {
    "logits": lambda vlm, prompt: vlm.logits(prompt),
    "logits of inputs": lambda vlm, prompt: vlm.logits(prompt.inputs),
    "embeddings": lambda vlm, prompt: vlm.embeddings(prompt),
    "embed": lambda vlm, prompt: vlm.embed(prompt),
    "embed other inputs": lambda vlm, prompt: vlm.embed(prompt, dict(prompt.inputs)),
    "answers": lambda vlm, prompt: vlm.answers([prompt]),
    "collate": lambda vlm, prompt: collate([prompt], vlm.tokenizer),
    "collate a mixture": lambda vlm, prompt: collate([vlm.prompt(None, "Who?"), prompt], vlm.tokenizer),
    "causal_trace": lambda vlm, prompt: multrace.causal_trace(
        vlm, prompt, corruption=multrace.TextNoise(), progress=False
    ),
    "attention_knockout": lambda vlm, prompt: multrace.attention_knockout(vlm, prompt, progress=False),
    "logit_lens": lambda vlm, prompt: multrace.logit_lens(vlm, prompt, progress=False),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_prompt_of_a_model_with_another_vocabulary_is_refused(case, foreign, random_llama):
    prompt = random_llama.prompt(None, QUESTION, constraint=SPAN)
    with pytest.raises(ModelError, match="another vocabulary|not all of these prompts"):
        ENTRIES[case](foreign, prompt)
    with pytest.raises(ModelError, match="another vocabulary|not all of these prompts"):
        ENTRIES[case](foreign, pickle.loads(pickle.dumps(prompt)))


def test_a_model_opened_twice_takes_prompts_of_either_copy(random_llava, photo):
    again = multrace.load(random_llava.name, dtype="bfloat16", verify=False)
    for prompt in (random_llava.prompt(photo, QUESTION), random_llava.prompt(None, QUESTION)):
        assert torch.equal(again.logits(prompt), again.logits(again.prompt(prompt.images or None, QUESTION)))
        assert again.answers([prompt]) == again.answers([again.prompt(prompt.images or None, QUESTION)])


@pytest.fixture(scope="session")
def recoloured(random_llava_llama, tmp_path_factory):
    """The same model and words, but its processor scales colours in another way."""
    folder = Path(shutil.copytree(random_llava_llama.name, tmp_path_factory.mktemp("recoloured") / "model"))
    processor = copy.deepcopy(random_llava_llama.processor)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(folder)
    return multrace.load(folder, verify=False)


SEEING = {
    "logits": lambda vlm, prompt: vlm.logits(prompt),
    "logits of a batch": lambda vlm, prompt: vlm.logits(collate([prompt, prompt], vlm.tokenizer)[0]),
    "image_features": lambda vlm, prompt: vlm.image_features(prompt),
    "answers": lambda vlm, prompt: vlm.answers([prompt]),
    "answers of a mixture": lambda vlm, prompt: vlm.answers([vlm.prompt(prompt.images, "Who?"), prompt]),
    "causal_trace": lambda vlm, prompt: multrace.causal_trace(
        vlm, prompt, corruption=multrace.BlankImage(), progress=False
    ),
    "pixel noise": lambda vlm, prompt: multrace.causal_trace(
        vlm, prompt, corruption=multrace.ImageNoise(), progress=False
    ),
    "attention_knockout": lambda vlm, prompt: multrace.attention_knockout(vlm, prompt, progress=False),
    "logit_lens": lambda vlm, prompt: multrace.logit_lens(vlm, prompt, progress=False),
    "prune_image_tokens": lambda vlm, prompt: multrace.prune_image_tokens(vlm, prompt, progress=False),
    "llava_cam": lambda vlm, prompt: tracing.llava_cam(vlm, prompt, progress=False),
    "attention_saliency": lambda vlm, prompt: tracing.attention_saliency(vlm, prompt),
    "attention_share": lambda vlm, prompt: tracing.attention_share(vlm, prompt),
    "failure_features": lambda vlm, prompt: tracing.failure_features(vlm, prompt),
    "second_moments": lambda vlm, prompt: editing.second_moments(vlm, [prompt], layers=[1], progress=False),
}


@pytest.mark.parametrize("case", SEEING)
def test_pictures_of_another_image_processor_are_refused(case, recoloured, random_llava_llama, photo):
    prompt = random_llava_llama.prompt(photo, QUESTION, constraint=SPAN)
    with pytest.raises((ModelError, editing.EditError), match="image processor"):
        SEEING[case](recoloured, prompt)


def test_an_edit_asks_the_question_of_another_models_prompt_anew(recoloured, random_llava_llama, photo):
    editor = multrace.MultEdit(layer=1, steps=1)
    deltas = [
        editor.edit(recoloured, [multrace.EditRequest(question=vlm.prompt(photo, QUESTION), target="Ada")])
        for vlm in (random_llava_llama, recoloured)
    ]
    (one,), (other,) = (delta.factors.values() for delta in deltas)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_words_without_a_picture_need_the_same_vocabulary_only(recoloured, random_llava_llama):
    words = random_llava_llama.prompt(None, QUESTION)
    assert torch.equal(recoloured.logits(words), random_llava_llama.logits(recoloured.prompt(None, QUESTION)))


# Tokenizers that add tokens, texts that hold special ones, and prompts that do not fit.


SUFFIXES = {"end": ["</s>"], "two tokens": ["</s>", "<pad>"], "none": []}


@pytest.mark.parametrize("case", SUFFIXES)
@pytest.mark.parametrize("name", ["llava_llama", "llama"])
def test_tokens_that_a_tokenizer_puts_after_a_text_are_left_out(case, name, request, photo, tmp_path):
    plain = request.getfixturevalue(f"random_{name}")
    folder = Path(shutil.copytree(plain.name, tmp_path / "model"))
    stored = json.loads((folder / "tokenizer.json").read_text())
    for token in SUFFIXES[case]:
        number = plain.tokenizer.convert_tokens_to_ids(token)
        stored["post_processor"]["single"].append({"SpecialToken": {"id": token, "type_id": 0}})
        stored["post_processor"]["special_tokens"][token] = {"id": token, "ids": [number], "tokens": [token]}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    vlm = multrace.load(folder)
    assert vlm.tokenizer("Who?")["input_ids"][1:] == plain.tokenizer("Who?")["input_ids"][1:] + [
        plain.tokenizer.convert_tokens_to_ids(token) for token in SUFFIXES[case]
    ]
    image = photo if vlm.has_vision else None
    for template in (None, "raw", "{image}{question} The founder is "):
        prompt = vlm.prompt(image, QUESTION, constraint=SPAN, answer="Ada Example", template=template)
        expected = plain.prompt(image, QUESTION, constraint=SPAN, answer="Ada Example", template=template)
        assert prompt.groups == expected.groups
        assert all(torch.equal(prompt.inputs[name], value) for name, value in expected.inputs.items())
    assert vlm.answer(image, QUESTION) == plain.answer(image, QUESTION)
    assert vlm.score(image, QUESTION, "Ada") == plain.score(image, QUESTION, "Ada")


WORDS = {
    "question": lambda vlm, photo, text: vlm.prompt(photo, text),
    "answer": lambda vlm, photo, text: vlm.prompt(photo, QUESTION, answer=text),
    "later answer": lambda vlm, photo, text: vlm.prompt(photo, QUESTION).with_answer(text),
    "first token": lambda vlm, photo, text: vlm.prompt(photo, QUESTION).answer_tokens(text),
    "question anew": lambda vlm, photo, text: vlm.prompt(photo, QUESTION).asked_anew(text),
    "score": lambda vlm, photo, text: vlm.score(photo, QUESTION, text),
    "foil": lambda vlm, photo, text: multrace.causal_trace(
        vlm,
        vlm.prompt(photo, QUESTION),
        corruption=multrace.BlankImage(),
        metrics="logit_difference",
        foil=text,
        progress=False,
    ),
    "replacement": lambda vlm, photo, text: multrace.ReplaceText(replacement=text).corrupt(
        vlm, vlm.prompt(photo, QUESTION, constraint=SPAN)
    ),
    "target": lambda vlm, photo, text: multrace.MultEdit(layer=1, steps=1).edit(
        vlm, [multrace.EditRequest(question=vlm.prompt(photo, QUESTION), target=text)], progress=False
    ),
}


@pytest.mark.parametrize("special", ["<image>", "</s>", "<s>", "<pad>"])
@pytest.mark.parametrize("case", WORDS)
def test_text_that_a_tokenizer_reads_as_a_special_token_is_refused(case, special, random_llava_llama, photo):
    with pytest.raises(ModelError, match=f"holds the (image|special) token '{special}', which is not read as text"):
        WORDS[case](random_llava_llama, photo, f"the {special} firm")


def test_text_that_only_resembles_a_special_token_is_text(random_llama):
    question = "Is a < s > b, or </ s>?"
    prompt = random_llama.prompt(None, question, answer="< pad >!")
    assert random_llama.decode(prompt.inputs["input_ids"][0]).strip() == f"{question} < pad >!"


def test_plain_words_are_words_even_where_a_tokenizer_pads_with_them(llama_path, tmp_path):
    folder = shutil.copytree(llama_path, tmp_path / "padded")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, pad_token="!")
    tokenizer.save_pretrained(folder)
    vlm = multrace.load(folder, verify=False)
    assert vlm.tokenizer.pad_token == "!"
    assert vlm.prompt(None, "Who founded it!", answer="Ada!").answer == "Ada!"


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def short_model(request, tmp_path_factory):
    """A model of 40 positions: learned ones, and rotary ones."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    if request.param == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**text_sizes(tokenizer) | {"max_position_embeddings": 40}))
    return multrace.load(save(model, tokenizer, tmp_path_factory.mktemp("short")))


def test_what_is_longer_than_the_models_positions_is_refused(short_model, random_llama):
    vlm, fits = short_model, short_model.prompt(None, "a b c d e f g h i j k l", template="raw")
    full = fits.with_answer("m " * ((40 - fits.length) // 2))
    assert vlm.logits(full).shape[1] == full.length and 38 <= full.length <= 40
    long = "the company " * 40
    elsewhere = random_llama.prompt(None, long, template="raw")
    assert elsewhere.length > 40
    numbers = rf"has {elsewhere.length} tokens, its answer included, and the model has 40 positions"
    entries = {
        "prompt": lambda: vlm.prompt(None, long, template="raw"),
        "answer": lambda: vlm.answer(None, long),
        "score": lambda: vlm.score(None, "Who?", long),
        "with_answer": lambda: vlm.prompt(None, "Who?").with_answer(long),
        "asked_anew": lambda: vlm.prompt(None, "Who?").asked_anew(long),
        "logits": lambda: vlm.logits(elsewhere),
        "embed": lambda: vlm.embed(elsewhere),
        "batch": lambda: vlm.logits(collate([elsewhere, fits], vlm.tokenizer)[0]),
        "forward": lambda: vlm.forward(torch.zeros(1, elsewhere.length, vlm.hidden)),
    }
    for name, entry in entries.items():
        with pytest.raises(ModelError, match=numbers if name in ("logits", "embed") else "the model has 40 positions"):
            entry()
    with pytest.raises(ModelError, match="does not fit into the model's 40 positions; pass max_new_tokens="):
        vlm.answers([elsewhere])


def test_an_answer_may_fill_the_last_position_and_no_more(short_model):
    prompt = short_model.prompt(None, "a b c d e f g h i j k l", template="raw")
    room = 40 - prompt.length + 1
    assert isinstance(short_model.answers([prompt], max_new_tokens=room)[0], str)
    with pytest.raises(ModelError, match=f"pass max_new_tokens={room} or less"):
        short_model.answers([prompt], max_new_tokens=room + 1)


def test_padding_counts_as_no_position(short_model):
    short, long = (short_model.prompt(None, text, template="raw") for text in ("a", "a b c d e f g h"))
    batch, _ = collate([short, long], short_model.tokenizer)
    width = 41 - batch["input_ids"].shape[1]
    wide = {name: torch.nn.functional.pad(value, (width, 0)) for name, value in batch.items()}
    assert torch.allclose(short_model.logits(wide)[:, -1], short_model.logits(batch)[:, -1], atol=1e-5)


ROPES = {
    "plain": ({"rope_type": "default"}, 40),
    "stretched": ({"rope_type": "linear", "factor": 4.0}, 160),
    "stretched from an original length": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20},
        80,
    ),
    "without a limit": ({"rope_type": "dynamic", "factor": 2.0}, None),
}


@pytest.mark.parametrize("case", ROPES)
def test_rotary_positions_reach_as_far_as_they_are_stretched(case):
    rope, limit = ROPES[case]
    config = LlamaConfig(max_position_embeddings=40, rope_parameters={"rope_theta": 1e4, **rope})
    assert position_limit(config) == limit


def test_whole_numbers_of_numpy_and_torch_are_numbers(random_llama):
    prompt = random_llama.prompt(None, QUESTION)
    for three in (np.int64(3), torch.tensor(3), np.array(3)):
        assert prompt.positions(three) == prompt.positions([three]) == (3,)
        assert random_llama.answers([prompt], max_new_tokens=three) == random_llama.answers([prompt], max_new_tokens=3)
    assert prompt.positions(np.arange(2)) == prompt.positions(torch.arange(2)) == (0, 1)
    with pytest.raises(ModelError, match="a position is 1.5, of type float"):
        prompt.positions([1.5])
    lenses = [multrace.logit_lens(random_llama, prompt, positions=three, progress=False) for three in (np.int64(3), 3)]
    assert lenses[0].positions == lenses[1].positions == (3,)
    edits = [multrace.MultEdit(layer=1, token=token, steps=1) for token in (np.int64(-1), -1)]
    requests = [multrace.EditRequest(question=prompt, target="Ada")]
    first, second = (edit.edit(random_llama, requests, progress=False).changes for edit in edits)
    assert all(torch.equal(first[name].left, second[name].left) for name in second)
    with pytest.raises(ModelError, match="max_new_tokens is 1.5, of type float; pass a whole number"):
        random_llama.answers([prompt], max_new_tokens=1.5)


def test_a_question_without_a_picture(random_llava):
    prompt = random_llava.prompt(None, QUESTION)
    assert prompt.positions("image") == () == prompt.patches
    assert "pixel_values" not in prompt.inputs
    assert words(prompt, "question").strip() == QUESTION


def test_patches_know_their_rows_and_columns(random_llava, photo):
    prompt = random_llava.prompt(photo, QUESTION)
    assert [patch.position for patch in prompt.patches] == list(prompt.positions("image"))
    assert [(patch.row, patch.column) for patch in prompt.patches] == [(r, c) for r in range(4) for c in range(4)]


def test_a_patch_is_where_the_picture_changed(random_llava_llama, photo):
    # Seen by the tower's own patch embedding, so that rows and columns cannot be swapped unnoticed.
    vlm = random_llava_llama
    small = photo.resize((32, 32))
    dotted = small.copy()
    dotted.paste((255, 255, 255), (24, 8, 32, 16))  # row 1, column 3
    convolution = vlm.vision_tower.embeddings.patch_embedding
    seen = [convolution(vlm.prompt(image, QUESTION).inputs["pixel_values"]).flatten(2)[0] for image in (small, dotted)]
    changed = (seen[0] != seen[1]).any(dim=0).nonzero().flatten().tolist()
    prompt = vlm.prompt(small, QUESTION)
    assert [(prompt.patches[index].row, prompt.patches[index].column) for index in changed] == [(1, 3)]


def test_several_pictures(random_llava, photo, other_photo):
    prompt = random_llava.prompt([photo, other_photo], QUESTION, constraint=SPAN)
    assert len(prompt.images) == 2
    assert len(prompt.positions("image")) == 32
    assert [patch.image for patch in prompt.patches] == [0] * 16 + [1] * 16
    assert words(prompt, "question") == f"\n{QUESTION}"
    one = random_llava.embeddings(random_llava.prompt(other_photo, QUESTION))
    both = random_llava.embeddings(prompt)
    second = [patch.position for patch in prompt.patches if patch.image == 1]
    first_of_one = list(random_llava.prompt(other_photo, QUESTION).positions("image"))
    assert torch.allclose(both[0, second], one[0, first_of_one], atol=1e-5)
    adjacent = random_llava.prompt([photo, other_photo], QUESTION, template="raw")
    assert len(adjacent.patches) == 32
    assert words(adjacent, "question") == QUESTION


def test_alignment_skips_whatever_stands_for_a_picture():
    image = 9
    assert align([1, None, 2, 3], [1, image, image, 7, image, 2, 3]) == (0, None, 5, 6)
    assert align([None, 4, None, 5], [image, image, 4, image, image, 5]) == (None, 2, None, 5)
    assert align([None, None, 5], [image, image, image, image, 5]) == (None, None, 4)
    assert align([1, 2], [1, 2]) == (0, 1)
    for long in ([1, image, 8, 3], [5, image, 2, 3], [2]):
        with pytest.raises(ModelError, match="tokens are not the tokenizer's"):
            align([1, None, 2, 3], long)


def test_alignment_follows_words_that_a_processor_adds_or_moves():
    first, image, end = 1, 9, 8
    assert align([2, 3], [2, 3, end]) == (0, 1)
    assert align([first, 2, 3], [image, image, first, 2, 3]) == (2, 3, 4)  # pictures before the first token
    moved = [5, image, image, first, 2, 3, end]  # the first token after the pictures
    assert align([first, 5, None, 2, 3], moved, added=[True, False, False, False, False]) == (None, 0, None, 4, 5)
    with pytest.raises(ModelError, match="rewrites the words"):
        align([first, 5, None, 2, 3], moved)


def test_an_absent_span_shows_the_question_and_the_nearest_words(random_llama):
    with pytest.raises(
        ModelError, match=r"'the compamy in that photo' is not in the question 'Who founded .*photo\?'"
    ) as error:
        random_llama.prompt(None, QUESTION, constraint="the compamy in that photo")
    assert "the nearest words are 'the company in this photo?'" in str(error.value)
    assert nearest_words(QUESTION, "founder") == "founded"
    with pytest.raises(ModelError, match="constraint is empty"):
        random_llama.prompt(None, QUESTION, constraint=" ")
    with pytest.raises(ModelError, match="mapping of constraints is empty"):
        random_llama.prompt(None, QUESTION, constraint={})


def test_several_named_constraints(random_llama):
    spans = {"visual": "the company in this photo", "verb": "founded"}
    prompt = random_llama.prompt(None, QUESTION, constraint=spans)
    assert prompt.positions("constraint") == prompt.positions("constraint:visual")
    assert words(prompt, "constraint:verb").strip() == "founded"
    chosen = random_llama.prompt(None, QUESTION, constraint={"visual": spans["visual"], "constraint": "founded"})
    assert chosen.positions("constraint") == prompt.positions("constraint:verb")


def test_answers_continue_the_prompt(random_vlm, photo):
    image = photo if random_vlm.has_vision else None
    prompt = random_vlm.prompt(image, QUESTION, constraint=SPAN)
    answered = prompt.with_answer(" Ada Example ")
    assert answered.length == prompt.length + len(answered.answer_ids)
    assert answered.positions("answer") == tuple(range(prompt.length, answered.length))
    assert words(answered, "answer") == " Ada Example"
    assert random_vlm.tokenizer.eos_token_id not in answered.answer_ids
    assert answered.positions("last") == prompt.positions("last")
    assert answered.positions("all") == prompt.positions("all")
    assert torch.equal(answered.inputs["input_ids"][:, : prompt.length], prompt.inputs["input_ids"])
    assert answered.inputs["attention_mask"].all()
    again = answered.with_answer("Oslo").with_answer(None)
    assert again.answer is None
    assert again.tokens == prompt.tokens
    assert all(torch.equal(again.inputs[name], prompt.inputs[name]) for name in prompt.inputs)
    direct = random_vlm.prompt(image, QUESTION, constraint=SPAN, answer="Ada Example")
    assert torch.equal(direct.inputs["input_ids"], answered.inputs["input_ids"])
    assert prompt.answer is None and prompt.positions("answer") == ()  # the first prompt is left as it was


def test_an_answer_that_would_melt_into_the_prompt_is_tokenised_apart(random_llama):
    # "company" ends the text without a blank; the template leaves an open blank, which " Ada" would swallow.
    prompt = random_llama.prompt(None, QUESTION, template="{question} The founder is ", answer="Ada")
    alone = random_llama.prompt(None, QUESTION, template="{question} The founder is ")
    assert torch.equal(prompt.inputs["input_ids"][:, : alone.length], alone.inputs["input_ids"])
    assert random_llama.tokenizer.decode(list(prompt.answer_ids)) == "Ada"


def test_positions_name_what_exists(random_llama):
    prompt = random_llama.prompt(None, QUESTION)
    assert prompt.positions((0, -1)) == (0, prompt.length - 1)
    with pytest.raises(
        ModelError, match="no token group 'constraint'; this prompt has image, question, question_only, last"
    ):
        prompt.positions("constraint")
    with pytest.raises(ModelError, match=rf"no position {prompt.length}; this prompt has {prompt.length}"):
        prompt.positions(prompt.length)


def test_collate_pads_and_says_how_far_positions_moved(random_llava, photo, other_photo):
    prompts = [
        random_llava.prompt(photo, QUESTION),
        random_llava.prompt(None, "Who?"),
        random_llava.prompt(other_photo, "Who?"),
    ]
    for side in ("left", "right"):
        batch, offsets = collate(prompts, random_llava.tokenizer, side=side)
        assert batch["pixel_values"].shape[0] == 2
        for row, (prompt, offset) in enumerate(zip(prompts, offsets, strict=True)):
            kept = slice(offset, offset + prompt.length)
            assert torch.equal(batch["input_ids"][row, kept], prompt.inputs["input_ids"][0])
            assert batch["attention_mask"][row].sum() == batch["attention_mask"][row, kept].sum() == prompt.length
        assert (max(offsets) > 0) == (side == "left")
        logits = random_llava.logits(batch)
        for row, prompt in enumerate(prompts):
            alone = random_llava.logits(prompt)[0]
            assert torch.allclose(logits[row, offsets[row] : offsets[row] + prompt.length], alone, atol=1e-4)
    with pytest.raises(ModelError, match="no prompts"):
        collate([], random_llava.tokenizer)
    with pytest.raises(ModelError, match="padding side"):
        collate(prompts, random_llava.tokenizer, side="both")


def test_pictures_of_every_mode_are_taken(random_llava_llama, photo):
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert random_llava_llama.prompt(photo.convert(mode), QUESTION).images[0].mode == "RGB"


def test_token_type_ids_never_reach_the_model(random_gpt2, monkeypatch):
    # GPT-2 would add a word embedding for each of them.
    tokenizer = random_gpt2.tokenizer
    plain = random_gpt2.prompt(None, QUESTION)
    monkeypatch.setattr(tokenizer, "model_input_names", [*tokenizer.model_input_names, "token_type_ids"])
    assert "token_type_ids" in tokenizer(QUESTION)
    assert set(random_gpt2.prompt(None, QUESTION).inputs) == set(plain.inputs)


def test_byte_fallback_and_letters_of_several_bytes(random_llama):
    question = "Gr\u00fc\u00dfe aus M\u00fcnchen \u516c\u53f8?"
    prompt = random_llama.prompt(None, question, constraint="m\u00fcnchen")
    ids = prompt.inputs["input_ids"][0, list(prompt.positions("constraint"))]
    assert random_llama.tokenizer.decode(ids).strip() == "M\u00fcnchen"


def test_other_pictures_for_the_same_words(random_llava, photo, other_photo):
    prompt = random_llava.prompt(photo, QUESTION, constraint={"constraint": SPAN, "verb": "founded"}, answer="Ada")
    moved = prompt.with_images(other_photo)
    fresh = random_llava.prompt(other_photo, QUESTION, constraint={"constraint": SPAN, "verb": "founded"}, answer="Ada")
    assert (moved.groups, moved.tokens, moved.patches) == (fresh.groups, fresh.tokens, fresh.patches)
    assert (moved.answer, moved.answer_ids) == ("Ada", fresh.answer_ids)
    assert all(torch.equal(moved.inputs[name], value) for name, value in fresh.inputs.items())
    assert not torch.equal(moved.inputs["pixel_values"], prompt.inputs["pixel_values"])
    assert moved.with_answer(None).length == prompt.length - len(prompt.answer_ids)
    with pytest.raises(ModelError, match="about 1 pictures and got 2"):
        prompt.with_images([photo, other_photo])
    with pytest.raises(ModelError, match="no picture at"):
        prompt.with_images("nowhere.png")


# ---- plain questions ----

TWICE = "Is the company in this photo the company that made this photo?"
PLAIN = {
    "no constraint": (1, QUESTION, {}),
    "a constraint": (1, QUESTION, {"constraint": SPAN}),
    "in another case": (1, QUESTION, {"constraint": "THE COMPANY"}),
    "named words": (1, QUESTION, {"constraint": {"visual": SPAN, "text": "founded"}}),
    "named words and the constraint": (1, QUESTION, {"constraint": {"text": "founded", "constraint": "the company"}}),
    "words said twice": (1, TWICE, {"constraint": ("the company", 1)}),
    "all of the words": (1, TWICE, {"constraint": {"visual": ("the company", "all"), "text": ["this photo", -1]}}),
    "a template": (1, QUESTION, {"constraint": SPAN, "template": "Look: {image} Q: {question} A:"}),
    "raw": (1, QUESTION, {"template": "raw"}),
    "two pictures": (2, QUESTION, {"constraint": SPAN}),
    "no picture": (0, QUESTION, {"constraint": SPAN}),
    "no picture and blanks": (0, f"  {QUESTION}\n", {"constraint": f" {SPAN} "}),
}


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("from_paths", [False, True])
def test_a_prompt_of_its_own_plain_question_is_equal(case, from_paths, random_llava, photo, other_photo, tmp_path):
    number, question, options = PLAIN[case]
    pictures = [photo, other_photo][:number]
    if from_paths:
        for index, picture in enumerate(pictures):
            picture.save(tmp_path / f"{index}.png")
        pictures = [tmp_path / f"{index}.png" for index in range(number)]
    prompt = random_llava.prompt(pictures, question, **options)
    plain = prompt.as_question()
    again = random_llava.prompt_for(plain)
    assert again.groups == prompt.groups and again.tokens == prompt.tokens and again.patches == prompt.patches
    assert set(again.inputs) == set(prompt.inputs)
    assert all(torch.equal(again.inputs[name], prompt.inputs[name]) for name in prompt.inputs)
    assert again.as_question() == plain
    assert plain.images == (tuple(pictures) if from_paths else prompt.images)
    assert (plain.text, plain.template, plain.answer) == (question.strip(), options.get("template"), None)


def test_a_plain_question_follows_other_pictures_and_leaves_the_answer_out(random_llava, photo, other_photo, tmp_path):
    other_photo.save(tmp_path / "other.png")
    prompt = random_llava.prompt(photo, QUESTION, constraint=SPAN, answer="Ada Example")
    other = prompt.with_images(tmp_path / "other.png")
    assert other.as_question().images == (tmp_path / "other.png",)
    assert torch.equal(
        random_llava.prompt_for(other.as_question(), answer="Ada Example").inputs["pixel_values"],
        other.inputs["pixel_values"],
    )
    for each in (prompt, other, prompt.with_answer(None)):
        assert random_llava.prompt_for(each.as_question()).groups == each.with_answer(None).groups
        assert random_llava.prompt_for(each.as_question(), answer="Ada Example").answer_ids == prompt.answer_ids
    anew = other.asked_anew("What is this?").as_question()
    assert anew == Question(text="What is this?", image=tmp_path / "other.png")
    assert pickle.loads(pickle.dumps(other)).as_question() == other.as_question()


def test_a_question_of_a_file_becomes_a_prompt(random_llava_llama, photo):
    question = Question(
        text=QUESTION, image=photo, constraint=SPAN, spans={"text": "founded"}, answer="Ada", answers=("Ada", "Bo")
    )
    prompt = random_llava_llama.prompt_for(question)
    named = {"constraint": SPAN, "text": "founded"}
    assert prompt.groups == random_llava_llama.prompt(photo, QUESTION, constraint=named).groups
    assert words(prompt, "constraint:text").strip() == "founded" and prompt.answer is None
    only_spans = random_llava_llama.prompt_for(Question(text=QUESTION, spans={"object": "photo", "text": "founded"}))
    assert words(only_spans, "constraint").strip() == "photo"  # the first one, as in a mapping
    with pytest.raises(ModelError, match="'the firm' is not in the question"):
        random_llava_llama.prompt_for(Question(text=QUESTION, constraint="the firm"))


def test_blanks_around_texts_count_for_nothing(random_llama):
    def record(mark: str) -> EditRecord:
        question = Question(
            text=f"{mark}{QUESTION}{mark}",
            **dict.fromkeys(("answer", "foil", "replacement"), f"{mark}Bo{mark}"),
            answers=(f"Bo{mark}", f"{mark}Cy Example"),
        )
        probe = Probe(kind="portability", question=question, answer=f"{mark}Cy  Example{mark}")
        return EditRecord(question=question, target=f"Raner{mark}", old=f"{mark}Bo", probes=(probe,))

    plain = record("")
    for mark in (" ", "\n", "\t  ", "\u3000"):
        assert record(mark) == plain and record(mark).question.key == plain.question.key
        prompts = [random_llama.prompt_for(each.question, answer=each.target) for each in (record(mark), plain)]
        assert prompts[0].answer_ids == prompts[1].answer_ids
    assert plain.probes[0].answer == "Cy  Example"  # a blank inside is a token of its own
    one, two = (random_llama.prompt(None, QUESTION, answer=text).answer_ids for text in ("Cy Example", "Cy  Example"))
    assert one != two
