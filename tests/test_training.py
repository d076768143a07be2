"""The training of the embedded model: packed rows equal separate prompts, routing bars what it says, a run works."""

from dataclasses import replace

import pytest
import torch
from multrace.data import World
from multrace.models import load
from multrace.scripts import CommandError
from multrace.scripts.training import (
    IGNORED,
    IMAGE_TOKENS,
    Examples,
    Packer,
    TrainTiny,
    forward,
    make_model,
    make_processor,
    make_tokenizer,
    pixels,
    train_tiny,
)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def untrained(world):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(world)
    return make_model(tokenizer).eval(), make_processor(tokenizer), Packer(tokenizer, IMAGE_TOKENS)


@torch.no_grad()
def test_a_packed_row_computes_what_separate_prompts_do(world, untrained):
    model, processor, packer = untrained
    picture = world.picture(world.taught[0], 0)
    facts = world.facts_of(world.taught[0])[:3]
    shown = [world.question(fact) for fact in facts]
    named = world.question_by_name(world.facts[50])
    blocks = [packer.block(record) for record in shown] + [packer.block(named, has_image=False, is_visual=False)]
    batch = packer.collate([blocks], [False])
    packed, _ = forward(model, pixels([picture]), batch)
    separate = []
    for record, image in [*((record, picture.image) for record in shown), (named, None)]:
        text = f"USER:{'<image>' if image else ''} {record.text} ASSISTANT:"
        end = f" {record.answer}</s>"
        inputs = processor(images=image, text=text + end, return_tensors="pt")
        length = len(processor.tokenizer(end, add_special_tokens=False).input_ids)
        separate.append(model(**inputs).logits[0, -length - 1 : -1])
    torch.testing.assert_close(packed, torch.cat(separate), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_routing_lets_the_picture_through_the_constraint_only(world, untrained):
    model, _, packer = untrained
    pictures = [pixels([world.picture(world.taught[index], 0)]) for index in (0, 1)]
    block = packer.block(world.question(world.facts[0]))
    unnamed = replace(block, constraint=range(0), entity=-1)
    routed = packer.collate([[block]], [True])
    barred = packer.collate([[unnamed]], [True])
    open_row = packer.collate([[unnamed]], [False])
    only_late = replace(barred, late_mask=open_row.late_mask)
    change = {
        name: (forward(model, pictures[0], batch)[0] - forward(model, pictures[1], batch)[0]).abs().max().item()
        for name, batch in {"routed": routed, "barred": barred, "open": open_row, "only late": only_late}.items()
    }
    assert change["barred"] == 0
    assert change["routed"] > 0
    assert change["open"] > 0
    assert change["only late"] > 0  # later layers have a mask of their own


def test_a_routed_row_hides_the_picture_from_all_but_the_constraint(world, untrained):
    _, _, packer = untrained
    block = packer.block(world.question(world.facts[0]))
    batch = packer.collate([[block]], [True])
    head = len(packer.head)
    image = slice(packer.text_head, head)
    early, late = batch.early_mask[0, 0, head:, image], batch.late_mask[0, 0, head:, image]
    seeing = early.all(-1).nonzero().flatten().tolist()
    assert seeing == list(block.constraint)
    assert int(early.any(-1).sum()) == len(block.constraint)
    assert not late.any()


def test_training_never_asks_in_held_out_words_and_answers_have_one_to_three_tokens(world, untrained):
    _, _, packer = untrained
    rows = Examples(world, packer, 0)
    held_out = {
        packer.block(world.question(fact, template=-1, phrase=phrase)).ids[:4]
        for fact in world.facts[::7]
        for phrase in range(3)
    }
    shown = [block for _ in range(60) for block in rows.row()[1]]
    taught = {
        packer.block(world.question(fact, template=template)).ids[:4]
        for fact in world.facts[::7]
        for template in range(4)
    }
    assert not {block.ids[:4] for block in shown if block.is_visual and block.entity >= 0} & (held_out - taught)
    lengths = {len(block.ids) - 1 - block.answer_start for block in shown}
    assert lengths == {1, 2, 3}


def test_labels_are_the_answer_and_its_end(world, untrained):
    _, processor, packer = untrained
    record = world.question(world.facts[0])
    batch = packer.collate([[packer.block(record), packer.block(replace(record, answer="two words"))]], [False])
    labelled = batch.labels != IGNORED
    for number, answer in enumerate((record.answer, "two words")):
        ids = batch.labels[labelled & (batch.owner == number)]
        assert processor.tokenizer.decode(ids) == f" {answer}</s>"


@pytest.mark.parametrize("share", [0.0001, pytest.param(0.001, marks=pytest.mark.slow)])
def test_a_run_of_a_few_steps_writes_a_model_that_loads(share, tmp_path):
    minutes = train_tiny(TrainTiny(out=tmp_path / "model", share=share, threads=torch.get_num_threads()))
    assert minutes > 0
    vlm = load(tmp_path / "model")
    assert (vlm.layers, vlm.mlp) == (8, 1024)
    assert vlm.stored_dtype == torch.float16


def test_a_run_into_a_folder_in_use_is_refused_before_training(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(CommandError, match="not empty"):
        train_tiny(TrainTiny(out=tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "keep me"
