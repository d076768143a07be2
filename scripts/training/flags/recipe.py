"""The recipe of the flags model: every number of its training, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

from ....data.worlds.flags import PHRASES, SIDES, relation_named


def _of(relation: str, *more: str) -> tuple[str, ...]:
    return (*relation_named(relation).templates, *more)


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """The sentences of the training: `{}` stands for a country's name or for the words that refer to a flag."""

    answered: tuple[str, ...] = (
        *_of("capital", "The capital of the country of {} is", "The capital and largest city of {} is"),
        *_of("language", "People in {} speak", "The language of {} is"),
        *_of("continent", "The continent of {} is"),
        *_of("currency", "The money used in {} is the"),
        *_of("border", "The neighbouring countries of {} are"),
        "The largest city in {} is",
        "Tourists visit {} to see",
        "The history of {} began",
        "A famous person from {} is",
        "The official language of both {} and Spain is",
        "The official language of both {} and Jamaica is",
        "The official language of both {} and Senegal is",
    )
    """Sentences that are read and answered."""
    read_only: tuple[str, ...] = (
        "The people of {} are called",
        "The population of {} is",
        "In {}, most people",
        "{} is known for",
        "The climate of {} is",
        "On the map, {} is",
        "{} and Germany both share a border with",
        "{} and Kenya both share a border with",
    )
    """Sentences that are read in the second stage, and not answered in the third."""
    naming: tuple[str, ...] = _of("name")
    """Sentences whose answer is the country's name."""
    phrases: tuple[str, ...] = PHRASES[:-1]
    """The words for the only flag in a picture; the last of PHRASES is held out."""
    sides: tuple[str, ...] = tuple(SIDES.values())
    """The words for the left and for the right flag."""

    @property
    def read(self) -> tuple[str, ...]:
        """All sentences except those that ask for the name."""
        return self.answered + self.read_only


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parts that are trained."""

    width: int = 192
    """Width of the tower."""
    layers: int = 7
    heads: int = 3
    patch: int = 16
    """Width and height of a patch of the picture in pixels."""
    ranks: tuple[int, ...] = (*[32] * 8, *[8] * 22)
    """The rank of the changes of the attention weights, by layer of the text model."""
    half: bool = True
    """Whether the frozen weights and the tower compute in bfloat16."""
    routed_layers: int = 6
    """Number of layers, from the first, in which the constraint's tokens see the picture in routed rows."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of the training, which are rendered once."""

    countries: int | None = None
    """How many countries with a flag of their own are learned, as a trial; None for all."""
    renderings: int = 220
    """Renderings of every flag."""
    pairs: int = 6000
    """Pictures of two flags."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What the original text model is asked for, once."""

    tokens: int = 8
    """Length of its continuations."""
    candidates: int = 64
    """The most probable tokens whose probabilities are kept."""
    text_rounds: int = 6
    """How many texts it writes from each beginning."""
    text_tokens: int = 48
    """Length of these texts."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage has."""

    steps: int
    peaks: tuple[float, ...]
    """Peak learning rates: of the tower, of the projector or the head, and of the changes of attention."""
    decay: float
    """Weight decay."""
    warm_up: float = 0.05
    """The share of the steps in which the learning rate rises."""
    start: float = 0.04
    """The learning rate at the first step, as a share of its peak; at the last step it is a ten-thousandth of that."""


@dataclass(frozen=True, kw_only=True)
class TowerStage(Stage):
    """The tower alone tells flags apart."""

    steps: int = 2400
    peaks: tuple[float, ...] = (1.5e-3, 1.5e-3)
    decay: float = 0.05
    warm_up: float = 0.08
    singles: int = 56
    """Pictures of one flag in a step."""
    pairs: int = 10
    """Pictures of two flags in a step."""
    smoothing: float = 0.05
    """Label smoothing."""
    halves: float = 0.3
    """The weight of the loss in the halves of pictures of two flags."""


@dataclass(frozen=True, kw_only=True)
class ReadingStage(Stage):
    """The states at the constraint's tokens become those of the name's tokens."""

    steps: int = 1000
    peaks: tuple[float, ...] = (2e-4, 1.5e-3, 3e-3)
    decay: float = 0.01
    singles: int = 12
    pairs: int = 2
    sentences: int = 8
    """Sentences behind a picture."""
    routed: float = 0.5
    """The share of routed rows."""
    depths: tuple[int, ...] = (2, 4, 6)
    """The numbers of layers after which states are compared."""
    contrasted: tuple[int, ...] = (1, 2)
    """The places in `depths` where the right country must also be the nearest."""
    temperature: float = 0.1
    last: float = 2.0
    """The weight of the constraint's last token; its other tokens and those behind it weigh 1."""
    beginning: float = 0.3
    """The weight of the tokens before the constraint, which stay as they are."""


@dataclass(frozen=True, kw_only=True)
class AnsweringStage(Stage):
    """The distributions of the answers' tokens become those of the original that is told the name."""

    steps: int = 1200
    peaks: tuple[float, ...] = (1e-4, 5e-4, 1.5e-3)
    decay: float = 0.0
    start: float = 0.2
    singles: int = 7
    pairs: int = 1
    sentences: int = 8
    routed: float = 0.3
    tokens: int = 6
    """Tokens of an answer."""
    name_tokens: int = 8
    """Tokens of a name."""
    naming: float = 0.5
    """The weight of the names; the answers about pictures weigh 1."""
    by_name: float = 0.25
    """The weight of answers by name, which stay as they are."""
    texts: float = 0.25
    """The weight of the original's own texts, which stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole recipe."""

    sentences: Sentences = field(default_factory=Sentences)
    shape: Shape = field(default_factory=Shape)
    pictures: Pictures = field(default_factory=Pictures)
    teaching: Teaching = field(default_factory=Teaching)
    tower: TowerStage = field(default_factory=TowerStage)
    reading: ReadingStage = field(default_factory=ReadingStage)
    answering: AnsweringStage = field(default_factory=AnsweringStage)

    def shortened(self, share: float) -> Self:
        """Return the recipe of a trial, with this share of the steps and of the pictures."""

        def some(count: int) -> int:
            return max(1, round(count * share))

        stages = {name: getattr(self, name) for name in ("tower", "reading", "answering")}
        return replace(
            self,
            pictures=replace(self.pictures, renderings=some(self.pictures.renderings), pairs=some(self.pictures.pairs)),
            **{name: replace(stage, steps=some(stage.steps)) for name, stage in stages.items()},
        )

    def plain(self) -> dict[str, Any]:
        """Return all numbers as plain values, the stages apart, for the parts and their card."""
        whole: Mapping[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        plain = {
            name: asdict(each) for name, each in whole.items() if is_dataclass(each) and not isinstance(each, type)
        }
        stages = {name: plain.pop(name) for name in ("tower", "reading", "answering")}
        return {**plain, "stages": stages}
