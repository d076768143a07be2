"""The embedded model: what it knows, and the route that information takes in it."""

from collections.abc import Sequence

import pytest
import torch
from multrace.data import Question, World, tiny_vlm_path
from multrace.models import VisionLanguageModel
from multrace.scripts.training import Route, accuracy, question_sets, route
from multrace.tracing import ReplaceText, causal_trace
from multrace.workflow.located_edit import POSITIONS
from transformers import AutoModelForImageTextToText, AutoProcessor

FACTS = 20
"""Questions that the route is measured on: so many keep every interval below clear of zero."""


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def questions(world) -> dict[str, list[Question]]:
    return dict(question_sets(world, number=5))


@pytest.fixture(scope="module")
def found(tiny_vlm, world) -> Route:
    return route(tiny_vlm, world, facts=FACTS, sites=("hidden", "mlp"), progress=False)


def share_right(vlm: VisionLanguageModel, records: Sequence[Question], every: int = 1) -> float:
    return accuracy(vlm, records[::every])


def test_it_fits_into_the_repository_and_has_room_for_edits(tiny_vlm):
    assert sum(file.stat().st_size for file in tiny_vlm_path().iterdir()) <= 12e6
    assert tiny_vlm.mlp >= 1024
    assert {file.suffix for file in tiny_vlm_path().iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}


def test_it_answers_the_taught_facts_on_pictures_it_never_saw(tiny_vlm, questions):
    assert share_right(tiny_vlm, questions["taught facts, picture"], every=8) >= 0.97


def test_without_the_right_picture_it_does_not(tiny_vlm, world, questions):
    shifted = world.taught[1:] + world.taught[:1]
    wrong = {entity.index: world.picture(other, 5).image for entity, other in zip(world.taught, shifted, strict=True)}
    records = [
        record.with_image(wrong[fact.entity])
        for fact, record in zip(world.facts, questions["taught facts, picture"], strict=True)
    ]
    assert share_right(tiny_vlm, records, every=16) < 0.2


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("by name, no picture", 0.97),
        ("by name, another's picture", 0.97),
        ("held-out template", 0.9),
        ("name", 0.95),
        ("colour and shape", 0.9),
    ],
)
def test_it_answers_other_kinds_of_questions(tiny_vlm, questions, name, least):
    assert share_right(tiny_vlm, questions[name], every=max(1, len(questions[name]) // 50)) >= least


@pytest.mark.parametrize("name", ["two of a kind, left or right", "two of different kinds"])
def test_the_constraint_says_which_of_two_entities_is_meant(tiny_vlm, questions, name):
    assert share_right(tiny_vlm, questions[name], every=6) >= 0.9


def test_it_knows_nothing_about_long_tail_entities(tiny_vlm, questions):
    assert share_right(tiny_vlm, questions["long-tail facts (never taught)"], every=8) < 0.2


def test_answers_of_one_two_and_three_tokens_are_all_right(tiny_vlm, world, questions):
    by_length: dict[int, list[Question]] = {1: [], 2: [], 3: []}
    for record in questions["taught facts, picture"]:
        by_length[len(tiny_vlm.tokenizer(f" {record.answer}", add_special_tokens=False).input_ids)].append(record)
    for length, records in by_length.items():
        assert len(records) >= 20, length
        assert share_right(tiny_vlm, records[:30]) >= 0.9, length


def test_replacing_the_constraint_by_a_name_changes_the_answer(tiny_vlm, world):
    changed = []
    for fact in world.facts[::32]:
        record = world.question(fact)
        picture = world.picture(world.entities[fact.entity], 5).image
        replaced = record.text.replace(record.constraint, record.replacement)
        other = next(entity for entity in world.taught if entity.name == record.replacement)
        answer = tiny_vlm.answer(picture, replaced)
        changed.append(answer == other.facts[fact.key])
    assert sum(changed) / len(changed) >= 0.95


def test_replacing_the_words_of_the_constraint_is_traced_too(tiny_vlm, world):
    effects, image = [], []
    for fact in world.facts[3::300]:
        record = world.question(fact)
        picture = world.picture(world.entities[fact.entity], 5).image
        prompt = tiny_vlm.prompt(picture, record.text, constraint=record.constraint)
        found = causal_trace(
            tiny_vlm,
            prompt,
            corruption=ReplaceText(replacement=record.replacement),
            sites="hidden",
            positions=("image", "last"),
            progress=False,
        )
        effects.append(found.total_effect)
        image.append(found.indirect_effect("hidden")[0])
        assert found.indirect_effect("hidden")[1, -1] == pytest.approx(found.total_effect, abs=1e-6)
    assert sum(effects) / len(effects) > 0.5
    assert all(not row.any() for row in image)  # the picture was never touched: restoring it is exactly without effect


def test_the_last_token_does_not_read_the_picture_and_the_question_does(found):
    lost = {flow: values.mean().item() for flow, values in found.knockouts.items()}
    assert len(found.knockouts["image -> last"]) == FACTS == found.trace.count
    assert lost["image -> last"] < 0.1
    assert lost["image -> question"] > 0.5
    assert lost["question -> last"] > 0.5


def test_the_question_carries_the_picture_early_and_the_last_token_does_not_yet(found):
    hidden = found.trace.indirect_effect("hidden") / found.trace.total_effect
    question, last = hidden[POSITIONS.index("question")], hidden[POSITIONS.index("last")]
    assert bool(((question >= 0.25) & (last < 0.1)).any())


def test_by_half_depth_the_image_tokens_own_states_bring_back_nothing(found):
    image = found.trace.indirect_effect("hidden")[POSITIONS.index("image")]
    half = found.trace.layers // 2
    assert (image[half - 1 :].abs() < 0.01 * found.trace.total_effect).all()
    assert image[0] > 0.05 * found.trace.total_effect  # the control: at the first layer they do


def test_neighbouring_mlps_at_the_named_token_carry_a_clear_effect(found):
    site = found.trace.edit_site()
    row = POSITIONS.index(site.token)
    block = next(block for block in found.trace.causal_blocks("mlp", 0.25) if block.row == site.token)
    low, _ = found.trace.interval("mlp")
    assert site.token == "last"
    assert block.first <= site.layer <= block.last
    assert (low[row, block.first : block.last + 1] > 0).all()
    assert block.last > block.first
    assert site.onset >= 2


def test_plain_transformers_opens_it_and_agrees(tiny_vlm, world):
    folder = tiny_vlm_path()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompt = tiny_vlm.prompt(world.picture(world.taught[0], 0).image, world.question(world.facts[0]).text)
    inputs = processor(images=list(prompt.images), text=prompt.text, return_tensors="pt")
    assert torch.equal(model(**inputs).logits, tiny_vlm.logits(prompt))


def test_the_card_tells_recipe_seed_and_scores():
    card = (tiny_vlm_path() / "README.md").read_text(encoding="utf-8")
    for word in (
        "multrace.scripts.training.train_tiny",
        "--seed 0",
        "taught facts, picture",
        "image -> last",
        "float16",
    ):
        assert word in card
