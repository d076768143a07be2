"""The synthetic world of factual visual questions that the embedded model was trained on."""

from .drawing import PLACES, SIZE, Figure, Scene, draw_one, draw_two
from .entities import KINDS, RELATIONS, Entity, FactKey, Kind, Relation, relation
from .world import (
    EditCase,
    Fact,
    World,
    WorldRequests,
    another_picture,
    tiny_vlm_path,
    untouched_facts,
    world_questions,
    world_records,
)

__all__ = [
    "KINDS",
    "PLACES",
    "RELATIONS",
    "SIZE",
    "EditCase",
    "Entity",
    "Fact",
    "FactKey",
    "Figure",
    "Kind",
    "Scene",
    "Relation",
    "World",
    "WorldRequests",
    "another_picture",
    "draw_one",
    "draw_two",
    "relation",
    "tiny_vlm_path",
    "untouched_facts",
    "world_questions",
    "world_records",
]
