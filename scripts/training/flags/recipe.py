"""The recipe of the flags model: every number of its training, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
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
    text_rounds: int = 24
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

    steps: int = 1100
    peaks: tuple[float, ...] = (2.5e-3, 2.5e-3)
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
class RowStep:
    """The rows of a step: one picture each, with sentences behind it."""

    singles: int
    """Rows with a picture of one flag."""
    pairs: int
    """Rows with a picture of two flags."""
    sentences: int
    """Sentences behind a picture."""
    kept: int
    """Of so many rows one also holds a sentence by name, which stays as it is."""


@dataclass(frozen=True, kw_only=True)
class ReadingLoss:
    """How far the states at the constraint's tokens are from those of the name's tokens."""

    depths: tuple[int, ...] = (2, 4, 6)
    """The numbers of layers after which states are compared."""
    standardised: tuple[int, ...] = (0, 1, 2)
    """The places in `depths` where the error counts in which every dimension is standardised over countries."""
    contrasted: tuple[int, ...] = (1, 2)
    """The places in `depths` where the right country must also be the nearest."""
    temperature: float = 0.1
    last: float = 2.0
    """The weight of the constraint's last token; its other tokens and those behind it weigh 1."""
    beginning: float = 0.3
    """The weight of the tokens before the constraint, which stay as they are."""


@dataclass(frozen=True, kw_only=True)
class ReadingStage(Stage):
    """The states at the constraint's tokens become those of the name's tokens."""

    steps: int = 400
    peaks: tuple[float, ...] = (4e-4, 3e-3, 6e-3)
    decay: float = 0.01
    rows: RowStep = RowStep(singles=12, pairs=2, sentences=8, kept=1)
    routed: float = 0.5
    """The share of the steps whose rows are routed."""
    loss: ReadingLoss = ReadingLoss()


@dataclass(frozen=True, kw_only=True)
class AnsweringStage(Stage):
    """The distributions of the answers' tokens become those of the original that is told the name."""

    steps: int = 1000
    peaks: tuple[float, ...] = (3e-4, 2e-3, 3e-3)
    decay: float = 0.0
    warm_up: float = 0.04
    start: float = 0.2
    answered: float = 0.9
    """The share of the steps in which the whole model answers; in the others it reads only."""
    answers: RowStep = RowStep(singles=13, pairs=1, sentences=4, kept=4)
    reads: RowStep = RowStep(singles=17, pairs=3, sentences=4, kept=3)
    routed: float = 1.0
    tokens: int = 3
    """Tokens of an answer."""
    first: float = 2.0
    """The weight of the first token of an answer about a picture, which decides it; the others weigh 1."""
    name_tokens: int = 6
    """Tokens of a name."""
    loss: ReadingLoss = ReadingLoss(standardised=(1, 2))
    reading: float = 0.25
    """The weight of `loss` in a step that answers."""
    answering: float = 2.0
    """The weight of the answers about pictures."""
    naming: float = 2.0
    """The weight of the names."""
    by_name: float = 1.0
    """The weight of answers by name, which stay as they are."""
    texts: float = 1.0
    """The weight of the original's own texts, which stay as they are; they are as many as the answers by name."""
    keeping: float = 30.0
    """The weight of the share of what attention writes, without a picture, that the changes alter."""
    separation: float = 0.0
    """How much texts count in the filters that keep the changes to what pictures bring; 0 for no filters."""
    separation_steps: int = 16
    """The number of steps whose rows say what pictures bring."""
    beside_text: int = 1
    """Sentences behind the picture of a row that holds a text, which would be far longer than the others."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole recipe."""

    sentences: Sentences = field(default_factory=Sentences)
    shape: Shape = field(default_factory=Shape)
    pictures: Pictures = field(default_factory=Pictures)
    teaching: Teaching = field(default_factory=Teaching)
    tower: TowerStage = field(default_factory=TowerStage)
    reading: ReadingStage = field(default_factory=ReadingStage)
    answering: tuple[AnsweringStage, ...] = (
        AnsweringStage(),
        AnsweringStage(
            steps=400,
            peaks=(2e-4, 1.5e-3, 2e-3),
            routed=0.2,
            keeping=60.0,
            by_name=2.0,
            texts=2.0,
            answers=RowStep(singles=12, pairs=2, sentences=4, kept=3),
        ),
        AnsweringStage(
            steps=900,
            peaks=(2e-4, 2e-3, 3e-3),
            routed=0.2,
            separation=20.0,
            keeping=300.0,
            by_name=2.0,
            texts=1.0,
            answers=RowStep(singles=12, pairs=2, sentences=6, kept=5),
        ),
    )
    """One after the other: routed rows, which cost less and teach the way; then above all rows in which every token
    sees the picture; and these once more with the changes kept to what pictures bring."""

    def shortened(self, share: float) -> Self:
        """Return the recipe of a trial, with this share of the steps and of the pictures."""

        def some(count: int) -> int:
            return max(1, round(count * share))

        return replace(
            self,
            pictures=replace(self.pictures, renderings=some(self.pictures.renderings), pairs=some(self.pictures.pairs)),
            tower=replace(self.tower, steps=some(self.tower.steps)),
            reading=replace(self.reading, steps=some(self.reading.steps)),
            answering=tuple(replace(stage, steps=some(stage.steps)) for stage in self.answering),
        )

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in their order."""
        later = {f"answering {number}": stage for number, stage in enumerate(self.answering, 1)}
        return {"seeing": self.tower, "reading": self.reading, **later}

    def plain(self) -> dict[str, Any]:
        """Return all numbers as plain values, the stages apart, for the parts and their card."""
        groups = {name: asdict(getattr(self, name)) for name in ("sentences", "shape", "pictures", "teaching")}
        return {**groups, "stages": {name: asdict(stage) for name, stage in self.stages.items()}}
