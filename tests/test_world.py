"""The synthetic world: the same from the same seed, large enough, its questions and splits what they say they are."""

from collections import Counter

import numpy as np
import pytest
from multrace.data import (
    DataError,
    World,
    WorldRequests,
    another_picture,
    find_spans,
    untouched_facts,
    world_questions,
    world_records,
)
from multrace.data.world import KINDS, RELATIONS


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_same_seed_same_world_and_another_seed_another_one(world):
    assert World().entities == world.entities
    assert World(seed=1).entities != world.entities


def test_it_is_as_large_as_promised(world):
    assert len(world.taught) >= 120
    assert len(world.facts) >= 800
    assert {entity.kind for entity in world.taught} == set(KINDS)


def test_no_two_entities_look_or_are_called_alike(world):
    assert len({entity.name for entity in world.entities}) == len(world.entities)
    for kind in KINDS:
        looks = [entity.glyph for entity in world.entities if entity.kind == kind]
        differences = [
            sum(a != b for a, b in zip(one, other, strict=True))
            for index, one in enumerate(looks)
            for other in looks[:index]
        ]
        assert min(differences) >= 2


def test_renderings_repeat_exactly_and_differ_between_numbers(world):
    entity = world.taught[0]
    first, again, second = (np.asarray(world.picture(entity, number).image) for number in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_boxes_lie_in_the_picture_and_hold_the_figure(world):
    for entity in world.taught[::10]:
        (left, top, right, bottom) = world.picture(entity, 2).boxes[0]
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_every_wording_says_its_constraints(world, relation):
    fact = next(fact for fact in world.facts if fact.key[0] == relation.name)
    for template in range(len(relation.templates)):
        shown, named = world.question(fact, template=template), world.question_by_name(fact, template=template)
        assert shown.constraint in shown.text
        assert named.constraint in named.text
        other = next(entity for entity in world.taught if entity.name == shown.replacement)
        assert other.facts[fact.key] != fact.answer
        assert shown.text[0].isupper()
        if relation.text_constraints:
            assert find_spans(shown.text, shown.spans["text"])
        else:
            assert not shown.spans


def test_every_question_carries_a_constraint_and_a_phrase_to_replace_it(world):
    for entity in world.taught[::10]:
        picture = world.picture(entity, 0)
        asked = [world.attribute_question(entity, name, picture) for name in ("colour", "shape", "place")]
        for record in [*asked, world.name_question(entity), *map(world.question, world.facts_of(entity))]:
            assert record.constraint in record.text
            assert record.replacement not in (None, record.constraint, entity.name)


def test_a_question_of_two_of_a_kind_says_which_one(world):
    fact = world.facts[0]
    left, right = world.question(fact, side="left"), world.question(fact, side="right")
    assert left.constraint.endswith("left")
    assert right.constraint.endswith("right")


@pytest.mark.parametrize(("split", "least"), [("outdated", 300), ("long_tail", 100)])
def test_splits_are_large_enough_and_their_parts_share_nothing(world, split, least):
    choose, report = (world.edit_cases(split, part) for part in ("choose", "report"))
    assert len(choose) + len(report) >= least
    assert not {case.fact.id for case in choose} & {case.fact.id for case in report}
    if split == "long_tail":
        assert not {case.fact.entity for case in choose} & {case.fact.entity for case in report}


def test_an_outdated_fact_wants_another_answer_of_its_relation(world):
    for case in world.edit_cases("outdated", "report"):
        assert case.target != case.fact.answer
        assert case.target in {fact.answer for fact in world.facts if fact.key[0] == case.fact.key[0]}


def test_seeds_reorder_cases_and_nothing_else(world):
    one, other = (world.edit_cases("outdated", "report", seed) for seed in (0, 1))
    assert one != other
    assert {case.fact.id for case in one} == {case.fact.id for case in other}


def test_long_tail_facts_are_not_among_the_taught(world):
    taught = {fact.entity for fact in world.facts}
    assert all(case.fact.entity not in taught for case in world.edit_cases("long_tail", "report"))


def test_an_unknown_split_names_the_known_ones(world):
    with pytest.raises(DataError, match="pass 'outdated' or 'long_tail' as the split"):
        world.edit_cases("stale", "report")


def test_neighbours_move_or_stay_as_they_should(world):
    case = next(case for case in world.edit_cases("outdated", "report") if case.fact.key[1] is None)
    neighbours = world.neighbours(case)
    for kind in ("renderings", "paraphrases", "paraphrased_renderings"):
        assert neighbours[kind]
        assert {record.answer for record in neighbours[kind]} == {case.target}
    edited = world.question(case.fact).text
    assert all(record.text != edited for record in neighbours["paraphrases"])
    assert {record.text for record in neighbours["other_entities"]} == {edited}
    assert all(record.id.split("-")[0] != str(case.fact.entity) for record in neighbours["other_entities"])
    assert all(record.id != case.fact.id for record in neighbours["other_relations"])
    assert all(record.spans for record in neighbours["two_constraint"])
    assert all(record.image is not None for records in neighbours.values() for record in records)


def test_the_worlds_records_show_held_out_pictures_with_their_boxes(world):
    case = world.edit_cases("outdated", "report")[0]
    settings = WorldRequests(count=3, contexts=2, by_name=True, keep=2)
    (record,) = world_records(world, [case], requests=settings)
    assert (record.id, record.target, record.question.answer) == (case.fact.id, case.target, case.fact.answer)
    assert Counter(probe.kind for probe in record.probes) >= Counter(
        {
            "other_picture": 3,
            "rephrase": 3,
            "same_question_other_picture": 3,
            "unrelated": 3,
            "by_name": 2,
            "no_picture": 1,
        }
    )
    assert all((probe.answer is None) == (probe.kind in ("by_name", "no_picture")) for probe in record.probes)
    own = (record.question, *record.contexts, *record.preserve_prompts)
    told = {question.key for question in (*own, *record.rewrite_prompts)}
    assert len(told) == 6 and not told & {probe.question.key for probe in record.probes}
    for question in (*own, *untouched_facts(world, [case], 3), *world_questions(3)):
        ((left, top, right, bottom),) = question.boxes
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
        assert question.answer and find_spans(question.text, question.constraint)
    assert another_picture(world, case).tobytes() not in {question.image.tobytes() for question in own}


def test_facts_that_a_case_changes_are_not_among_the_untouched(world):
    cases = world.edit_cases("outdated", "report")
    untouched = untouched_facts(world, cases)
    assert len(untouched) == len(world.facts) - len(cases)
    assert not {question.id for question in untouched} & {case.fact.id for case in cases}


def test_world_questions_ask_each_fact_once_before_any_twice():
    questions = world_questions(900)
    facts = [question.id.rsplit("-", 1)[0] for question in questions]
    assert len({question.id for question in questions}) == 900
    assert len(set(facts)) == len(set(facts[:440])) == 440
    assert [each.id for each in world_questions(5, seed=1)] != [each.id for each in world_questions(5)]
    with pytest.raises(DataError, match="ask at least one"):
        world_questions(0)
