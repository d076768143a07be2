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
        "The parliament of {} meets in the city of",
        "The embassies in {} are in its capital,",
        "Newspapers in {} are printed in",
        "The name of the language of {} is",
        "On a globe, {} is found in",
        "{} is one of the countries of",
        "Shops in {} take the",
        "The name of the money of {} is the",
        "To the north of {} lies",
        "The name of the largest city in {} is",
        "The most popular sport in {} is",
        "The main religion of {} is",
        "The president of {} is",
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
    naming: tuple[str, ...] = _of("name", "The short name of {} is", "In an atlas, {} goes by the name of")
    """Sentences whose answer is the country's name."""
    phrases: tuple[str, ...] = PHRASES[:-1]
    """The words for the only flag in a picture; the last of PHRASES is held out."""
    more_phrases: tuple[str, ...] = (
        "the country in this image",
        "the country shown in this image",
        "the country in the photo",
        "the country in this photograph",
        "the country whose flag is shown here",
        "the country that flies this flag",
        "the country with this flag",
        "the country of the flag in this photo",
    )
    """Other words for it, which stand in half of the sentences."""
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
    routing_ranks: tuple[int, ...] = (*[32] * 8, *[4] * 22)
    """The rank of the changes of the query and key weights, by layer of the text model."""
    content_ranks: tuple[int, ...] = (192, 160, 128, 96, 48, 32, 32, 32, *[4] * 22)
    """The rank of the changes of the value and output weights, which carry the name from the picture to the words."""
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
class Spelt:
    """How bad the image tokens are that the text model learns to read, so that it can read those of the tower."""

    noise: float = 0.15
    """The length of the noise by that of an embedding."""
    mixed: float = 0.1
    """The greatest share of another name."""


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
    """Peak learning rates: of the tower, of the projector or the head, and of the changes of attention; in stages
    without pictures, of what spells names and of the changes."""
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
    """Of so many rows one also holds what stays as it is: a sentence by name, or a text where rows are answered."""


@dataclass(frozen=True, kw_only=True)
class SpellingStage(Stage):
    """The tower and the projector write the names that the text model reads."""

    steps: int = 2400
    peaks: tuple[float, ...] = (1e-3, 3e-3)
    decay: float = 0.02
    singles: int = 44
    """Pictures of one flag in a step."""
    pairs: int = 14
    """Pictures of two flags in a step."""
    mean: float = 2.0
    """The weight of the error of a row's mean in a half; that of single tokens weighs 1."""
    named: float = 0.3
    """The weight of the cross-entropy of the names."""
    temperature: float = 0.05
    """The squared distance, by that between names, that makes a name less probable by a factor e."""
    empty: float = 0.1
    """The weight of rows above a short name."""


@dataclass(frozen=True, kw_only=True)
class ReadingLoss:
    """How far the states at the constraint's tokens are from those of the name's tokens."""

    depths: tuple[int, ...] = (2, 4, 6)
    """The numbers of layers after which states are compared."""
    standardised: tuple[int, ...] = (1, 2)
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
    """The states at the constraint's tokens become those of the name's tokens, where image tokens spell the name."""

    steps: int = 1500
    peaks: tuple[float, ...] = (3e-3, 6e-3)
    decay: float = 0.01
    rows: RowStep = RowStep(singles=12, pairs=2, sentences=8, kept=1)
    routed: float = 0.3
    """The share of the steps whose rows are routed."""
    loss: ReadingLoss = ReadingLoss()
    keeping: float = 300.0
    """The weight of the share of what attention writes, without a picture, that the changes alter."""


@dataclass(frozen=True, kw_only=True)
class AnsweringStage(Stage):
    """The distributions of the answers' tokens become those of the original that is told the name."""

    spelt: bool = False
    """Whether image tokens spell the name, and there are no pictures."""
    steps: int = 600
    peaks: tuple[float, ...] = (2e-4, 1e-3, 1.5e-3)
    decay: float = 0.0
    warm_up: float = 0.04
    start: float = 0.2
    answered: float = 0.9
    """The share of the steps in which the whole model answers; in the others it reads only."""
    answers: RowStep = RowStep(singles=11, pairs=3, sentences=6, kept=4)
    reads: RowStep = RowStep(singles=17, pairs=3, sentences=4, kept=3)
    routed: float = 0.3
    tokens: int = 6
    """Tokens of an answer."""
    first: float = 2.0
    """The weight of the first token of an answer about a picture, which decides it; the others weigh 1."""
    name_tokens: int = 6
    """Tokens of a name."""
    named: int = 3
    """Sentences by name in a row that is answered, which stay as they are."""
    loss: ReadingLoss = ReadingLoss()
    reading: float = 0.5
    """The weight of `loss` in a step that answers."""
    answering: float = 2.0
    """The weight of the answers about pictures."""
    naming: float = 2.0
    """The weight of the names."""
    by_name: float = 4.0
    """The weight of answers by name."""
    texts: float = 1.0
    """The weight of the original's own texts, which stay as they are."""
    keeping: float = 300.0
    """The weight of the share of what attention writes, without a picture, that the changes alter."""
    beside_text: int = 1
    """Sentences behind the picture of a row that holds a text, which would be far longer than the others."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole recipe."""

    sentences: Sentences = field(default_factory=Sentences)
    shape: Shape = field(default_factory=Shape)
    pictures: Pictures = field(default_factory=Pictures)
    spelt: Spelt = field(default_factory=Spelt)
    teaching: Teaching = field(default_factory=Teaching)
    tower: TowerStage = field(default_factory=TowerStage)
    reading: ReadingStage = field(default_factory=ReadingStage)
    answering: AnsweringStage = AnsweringStage(spelt=True, peaks=(1e-3, 2e-3), tokens=3)
    spelling: SpellingStage = field(default_factory=SpellingStage)
    joining: tuple[AnsweringStage, ...] = (AnsweringStage(), AnsweringStage(steps=500, texts=3.0))
    """The whole model with pictures, tower and projector too: what they write is never quite what is read. Texts weigh
    more in the second stage, because the first one raises their perplexity. The parts are the mean of the ends of these
    stages."""

    def shortened(self, share: float) -> Self:
        """Return the recipe of a trial, with this share of the steps and of the pictures."""

        def some(count: int) -> int:
            return max(1, round(count * share))

        return replace(
            self,
            pictures=replace(self.pictures, renderings=some(self.pictures.renderings), pairs=some(self.pictures.pairs)),
            tower=replace(self.tower, steps=some(self.tower.steps)),
            reading=replace(self.reading, steps=some(self.reading.steps)),
            answering=replace(self.answering, steps=some(self.answering.steps)),
            spelling=replace(self.spelling, steps=some(self.spelling.steps)),
            joining=tuple(replace(stage, steps=some(stage.steps)) for stage in self.joining),
        )

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in their order."""
        joining = {f"joining {number}": stage for number, stage in enumerate(self.joining, 1)}
        return {
            "seeing": self.tower,
            "reading": self.reading,
            "answering": self.answering,
            "spelling": self.spelling,
            **joining,
        }

    def plain(self) -> dict[str, Any]:
        """Return all numbers as plain values, the stages apart, for the parts and their card."""
        groups = {name: asdict(getattr(self, name)) for name in ("sentences", "shape", "pictures", "spelt", "teaching")}
        return {**groups, "stages": {name: asdict(stage) for name, stage in self.stages.items()}}
