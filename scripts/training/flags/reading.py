"""Reading: the states at the constraint's tokens become those that the original has at the tokens of a name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .keeping import Interference
from .pictures import Batch, Pool, augmented
from .recipe import AnsweringStage, ReadingLoss, ReadingStage, RowStep
from .spelling import Spelling
from .stage import StageTraining, named_parameters, torch_generator
from .student import Block, PackedRows, Student, line_end_id
from .teacher import NameStates

_RowSettings = TypeVar("_RowSettings", ReadingStage, AnsweringStage)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A block of a row, with what it is about."""

    block: Block
    template: str
    """The sentence; empty for a text of the original."""
    country: int
    """The country that the sentence is about; for a text, its number."""
    is_alone: bool = True
    """Whether the picture shows one flag."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """What the states at some tokens are to be."""

    rows: Tensor
    tokens: Tensor
    states: Tensor
    """(place, depth, hidden)."""
    weights: Tensor


class ReadingError:
    """How far the states of packed rows are from those of the sentences by name."""

    def __init__(self, originals: NameStates, settings: ReadingLoss) -> None:
        self.originals, self.settings = originals, settings

    def of(
        self, passed: Mapping[int, Tensor], rows: Sequence[Sequence[Asked]], packed: PackedRows
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the sum of the errors, and numbers to show; `passed` are states by depth."""
        states = torch.stack([passed[depth] for depth in self.settings.depths], 2)  # row, token, depth, hidden
        wanted = self.wanted(rows, packed)
        errors = (states[wanted.rows, wanted.tokens] - wanted.states) / self.originals.deviation
        error = ((errors.pow(2).mean(-1) * wanted.weights[:, None]).sum(0) / wanted.weights.sum()).mean()
        told, nearest, hits = self._told(states, rows, packed)
        return error + told + nearest, {"error": error.item(), "told": told.item(), "nearest": hits}

    def wanted(self, rows: Sequence[Sequence[Asked]], packed: PackedRows) -> Wanted:
        """Return what the states are to be: those of the sentence by name, aligned at the constraint's last token.

        Blocks by name count where nothing follows their sentence: there the answer is what is kept.
        """
        where: list[tuple[int, int]] = []
        states: list[Tensor] = []
        weights: list[float] = []
        for number, (row, starts) in enumerate(zip(rows, packed.starts, strict=True)):
            for asked, start in zip(row, starts, strict=True):
                if asked.template in self.originals.means and (asked.block.has_picture or not asked.block.tail):
                    tokens, sources, own = self._aligned(asked)
                    where += [(number, start + token) for token in tokens]
                    states.append(self.originals.of(asked.template, asked.country)[sources])
                    weights += own
        places = torch.tensor(where)
        return Wanted(rows=places[:, 0], tokens=places[:, 1], states=torch.cat(states), weights=torch.tensor(weights))

    def _aligned(self, asked: Asked) -> tuple[list[int], list[int], list[float]]:
        """The tokens of a block, the tokens of the sentence by name that they become, and their weights.

        Of a picture of two flags, only the constraint's last token tells which country it is.
        """
        settings, own = self.settings, asked.block.sentence
        named = self.originals.sentences.by_name(asked.template, asked.country)
        if not asked.block.has_picture:
            whole = list(range(len(named.ids)))
            return whole, whole, [1.0] * len(whole)
        shared = min(named.stop - named.start, own.stop - own.start) if asked.is_alone else 1
        behind = len(named.ids) - named.stop
        before = min(own.start, named.start)
        tokens = [*range(own.stop - shared, own.stop + behind), *range(before)]
        sources = [*range(named.stop - shared, named.stop + behind), *range(before)]
        weights = [*[1.0] * (shared - 1), settings.last, *[1.0] * behind, *[settings.beginning] * before]
        return tokens, sources, weights

    def _told(
        self, states: Tensor, rows: Sequence[Sequence[Asked]], packed: PackedRows
    ) -> tuple[Tensor, Tensor, float]:
        """The error of what the constraint's last token says of the country, its cross-entropy, and the hits."""
        originals, settings = self.originals, self.settings
        mentions: dict[str, list[tuple[int, int, int]]] = {}
        for number, (row, starts) in enumerate(zip(rows, packed.starts, strict=True)):
            for asked, start in zip(row, starts, strict=True):
                if asked.template in originals.means and asked.block.has_picture:
                    place = (number, start + asked.block.sentence.stop - 1, asked.country)
                    mentions.setdefault(asked.template, []).append(place)
        errors, losses, hits = [], [], []
        for template, places in mentions.items():
            where, tokens, right = torch.tensor(places).T
            said = (states[where, tokens] - originals.means[template]) / originals.last_deviation
            errors.append((said - originals.countries[template][right]).pow(2).mean(-1))
            among = functional.normalize(originals.countries[template], dim=-1)
            likeness = torch.einsum("mdh,cdh->dmc", functional.normalize(said, dim=-1), among) / settings.temperature
            own = [functional.cross_entropy(likeness[depth], right, reduction="none") for depth in settings.contrasted]
            losses.append(torch.stack(own))
            hits.append(likeness[settings.contrasted[-1]].argmax(-1) == right)
        told = torch.cat(errors)[:, list(settings.standardised)].mean()
        return told, torch.cat(losses, 1).mean(), torch.cat(hits).float().mean().item()


class RowTraining(StageTraining[_RowSettings]):
    """A stage on packed rows: one picture each, with sentences behind it."""

    def __init__(
        self,
        settings: _RowSettings,
        student: Student,
        pool: Pool,
        spelling: Spelling,
        originals: NameStates,
        interference: Interference,
    ) -> None:
        super().__init__(settings, student, pool)
        self.spelling, self.interference = spelling, interference
        self.sentences, self.reading = originals.sentences, ReadingError(originals, settings.loss)
        self._line_end = line_end_id(self.sentences.tokenizer)

    @property
    @abstractmethod
    def is_spelt(self) -> bool:
        """Whether image tokens spell the name, and there are no pictures."""

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return what spells names, or the tower and the projector, and the factors of the layers that run."""
        factors = dict(self.student.factors(self.depth))
        if self.is_spelt:
            return [named_parameters("spelling", self.spelling), factors]
        return [
            named_parameters("model.vision_tower", self.student.tower),
            named_parameters("model.multi_modal_projector", self.student.projector),
            factors,
        ]

    @property
    def depth(self) -> int:
        """The number of layers that run."""
        return max(self.settings.loss.depths)

    def states(
        self, batch: Batch, rows: Sequence[Sequence[Asked]], depths: Sequence[int], rng: np.random.Generator
    ) -> tuple[dict[int, Tensor], PackedRows]:
        """Return depth -> (row, token, hidden), and the rows, all or none of which are routed."""
        packed = self.packed(rows, is_routed=bool(rng.random() < self.settings.routed))
        if self.is_spelt:
            features = self.spelling(batch.countries, rng)
        else:
            features = self.student.features(augmented(batch.pixels, torch_generator(rng)))
        return self.student(features, packed, depths), packed

    def packed(self, rows: Sequence[Sequence[Asked]], *, is_routed: bool) -> PackedRows:
        """Return the rows as tensors, all or none of which are routed."""
        return PackedRows.of(
            [[asked.block for asked in row] for row in rows],
            [is_routed] * len(rows),
            line_end=self._line_end,
            image_tokens=self.student.image_tokens,
        )

    def read(self, step: RowStep, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the reading error of new rows, and numbers to show."""
        batch, rows = self.reading_rows(step, rng)
        passed, packed = self.states(batch, rows, self.settings.loss.depths, rng)
        return self.reading.of(passed, rows, packed)

    def reading_rows(self, step: RowStep, rng: np.random.Generator) -> tuple[Batch, list[list[Asked]]]:
        """Return pictures, and for each the sentences about it; some rows hold one by name too."""
        batch = self.pool.draw(rng, singles=step.singles, pairs=step.pairs)
        templates = self.some(self.sentences.templates.read, step.sentences, rng)
        rows = []
        for number, countries in enumerate(batch.countries):
            row = [self.pictured(template, countries, place, rng) for place, template in enumerate(templates)]
            if number % step.kept == 0:
                (template,) = self.some(self.sentences.templates.read, 1, rng)
                country = int(rng.integers(len(self.sentences.names)))
                block = Block(sentence=self.sentences.by_name(template, country), has_picture=False)
                row.append(Asked(block=block, template=template, country=country))
            rows.append(row)
        return batch, rows

    def pictured(
        self,
        template: str,
        countries: Sequence[int],
        place: int,
        rng: np.random.Generator,
        answer: Callable[[int], Sequence[int]] | None = None,
    ) -> Asked:
        """Return a sentence about a flag of a picture; of two flags, places take turns.

        Args:
            template: The sentence.
            countries: The countries in the picture, from left to right.
            place: The number of the sentence in its row.
            rng: The source of the words for the only flag in a picture.
            answer: Country -> tokens that follow the sentence; None for none.
        """
        side, words = place % len(countries), self.sentences.templates
        phrases = words.more_phrases if rng.random() < 0.5 else words.phrases
        phrase = phrases[int(rng.integers(len(phrases)))]
        sentence = self.sentences.by_picture(template, phrase if len(countries) == 1 else words.sides[side])
        country = countries[side]
        tail = () if answer is None else tuple(answer(country)[:-1])
        block = Block(sentence=sentence, tail=tail)
        return Asked(block=block, template=template, country=country, is_alone=len(countries) == 1)

    @staticmethod
    def some(templates: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
        """Return different templates, as many as there are up to a number."""
        places = rng.choice(len(templates), min(count, len(templates)), replace=False)
        return [templates[place] for place in places]


class ReadingTraining(RowTraining[ReadingStage]):
    """The first layers read names that image tokens spell."""

    name = "reading"
    is_spelt = True

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the reading error, and what the changes alter without a picture."""
        error, numbers = self.read(self.settings.rows, rng)
        altered = self.interference.mean()
        return error + self.settings.keeping * altered, {**numbers, "altered": altered.item()}
