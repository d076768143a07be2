"""The synthetic factual-VQA world that the embedded model was trained on."""

from .drawing import PLACES, SIZE, Figure, Scene, draw_one, draw_two
from .entities import Entity, FactKey
from .questions import KINDS, RELATIONS, Kind, Relation
from .world import EditCase, Fact, World

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
    "draw_one",
    "draw_two",
]
