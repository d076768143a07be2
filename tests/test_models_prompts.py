"""Prompts: templates, token groups, constraints, answers and batches."""

import pytest
import torch
from multrace import ModelError
from multrace.models import collate
from multrace.models.frontend import align
from multrace.models.spans import nearest_words

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
    assert align([1, image, 2, 3], [1, image, image, 7, image, 2, 3], image) == (0, None, 5, 6)
    assert align([image, 4, image, 5], [image, image, 4, image, image, 5], image) == (None, 2, None, 5)
    assert align([image, image, 5], [image, image, image, image, 5], image) == (None, None, 4)
    assert align([1, 2], [1, 2], image) == (0, 1)
    for long in ([1, image, 8, 3], [5, image, 2, 3], [2]):
        with pytest.raises(ModelError, match="tokens are not the tokenizer's"):
            align([1, image, 2, 3], long, image)
    with pytest.raises(ModelError, match="adds tokens"):
        align([1, 2], [1, 2, 3], image)


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
