"""The three stages of the training: the tower sees, the text model reads, the whole answers.

Seeing: the tower alone tells the flags apart, in whole pictures and in the halves of pictures of two. Without it, the
joint training would spend its time on learning to see.

Reading: in the first layers, the states at the constraint's tokens under a picture become those that the original has
at the tokens of the country's name in the same sentence, aligned at their last tokens. Above these layers the original
goes on by itself. A squared error alone is small before countries can be told apart, since a few dimensions carry most
of the variance, so every dimension is standardised over countries, and the right country must also be the nearest.

Answering: the distributions of the answer's tokens under a picture become those of the original that is told the name.
Answers by name, and texts that the original wrote itself, are taught beside them, so that they stay as they are. The
first layers go on reading meanwhile: in every step their error counts too, and in some steps nothing else does. What
the changes of attention alter without a picture counts in every step (`keeping`), and filters may hold the changes to
what pictures bring (`separation`). In routed steps the picture reaches the answer through the constraint alone, and its
tokens need not run above the first layers.

The random numbers of a step depend on the seed, the stage and the step alone, so a training that goes on from a
checkpoint takes the same steps as one that was never cut.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from tqdm import tqdm

from .keeping import Interference, recorded_moments
from .original import Sentence
from .pictures import Batch, Pool, augmented
from .recipe import AnsweringStage, ReadingLoss, ReadingStage, RowStep, Stage, TowerStage
from .separation import separations
from .student import Block, PackedRows, Student, line_end_id
from .teacher import Answers, Distributions, NameStates

_Settings = TypeVar("_Settings", bound=Stage)
_RowSettings = TypeVar("_RowSettings", ReadingStage, AnsweringStage)
_MOMENTUM = (0.95, 0.85)
"""AdamW's first coefficient at the lowest and at the highest learning rate."""


def one_cycle(step: int, steps: int, stage: Stage) -> tuple[float, float]:
    """Return the learning rate of a step, as a share of its peak, and AdamW's first coefficient (Smith, 1cycle).

    Both follow half a cosine up and half a cosine down again; the coefficient is lowest where the rate is highest.
    """
    top = max(1.0, stage.warm_up * steps - 1)
    if step < top:
        low, share = stage.start, step / top
    else:
        low, share = stage.start * 1e-4, 1 - (step - top) / max(1.0, steps - 1 - top)
    height = (1 - math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
    return low + (1 - low) * height, _MOMENTUM[0] + (_MOMENTUM[1] - _MOMENTUM[0]) * height


class StageTraining(ABC, Generic[_Settings]):
    """One stage: what it trains, and the loss of a step."""

    name: str

    def __init__(self, settings: _Settings, student: Student, pool: Pool) -> None:
        self.settings, self.student, self.pool = settings, student, pool

    @abstractmethod
    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the parameters that are trained by name, one group for each of the stage's peak learning rates."""

    @abstractmethod
    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a step, and numbers to show. All that is random comes from `rng`."""

    @property
    def is_filtered(self) -> bool:
        """Whether filters stand before the changes in this stage."""
        return False

    def filters(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return the filters before the changes in this stage by LAYER.MAP, as they follow from the student now."""
        return {}


def _torch_generator(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**63)))


def _named(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{path}.{name}": value for name, value in module.named_parameters()}


# ---- seeing ----


class TowerHead(nn.Module):
    """A classifier of flags over the patches of a picture, which it weighs; dropped after the first stage."""

    def __init__(self, width: int, countries: int) -> None:
        super().__init__()
        self.norm, self.weigh, self.classify = nn.LayerNorm(width), nn.Linear(width, 1), nn.Linear(width, countries)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (picture, country) logits of the whole picture, of its left and of its right half."""
        states = self.norm(states)
        side = math.isqrt(states.shape[1])
        grid = states.unflatten(1, (side, side))
        weights = self.weigh(grid)[..., 0]
        parts = (slice(None), slice(None, side // 2), slice(side // 2, None))
        whole, left, right = (self._pooled(grid[:, :, part], weights[:, :, part]) for part in parts)
        return whole, left, right

    def _pooled(self, states: Tensor, weights: Tensor) -> Tensor:
        shares = weights.flatten(1).softmax(-1)[..., None]
        return self.classify((shares * states.flatten(1, 2)).sum(1))


class SeeingTraining(StageTraining[TowerStage]):
    """The tower alone."""

    name = "seeing"

    def __init__(self, settings: TowerStage, student: Student, pool: Pool, *, seed: int) -> None:
        super().__init__(settings, student, pool)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = TowerHead(student.shape.width, pool.singles.shape[1])

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the tower's and the head's parameters."""
        return [_named("model.vision_tower", self.student.tower), _named("head", self.head)]

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the cross-entropy of the flag, and of the flags in the halves of pictures of two."""
        settings = self.settings
        batch = self.pool.draw(rng, singles=settings.singles, pairs=settings.pairs)
        states = self.student.see(augmented(batch.pixels, _torch_generator(rng)))
        whole, _, _ = self.head(states[: settings.singles])
        _, left, right = self.head(states[settings.singles :])
        alone = torch.tensor([countries[0] for countries in batch.countries[: settings.singles]])
        sides = torch.tensor(batch.countries[settings.singles :])
        halves = functional.cross_entropy(left, sides[:, 0]) + functional.cross_entropy(right, sides[:, 1])
        loss = functional.cross_entropy(whole, alone, label_smoothing=settings.smoothing)
        hits = (whole.argmax(-1) == alone).float().mean()
        beside = (left.argmax(-1) == sides[:, 0]).float().mean()
        return loss + settings.halves * halves / 2, {"flag": hits.item(), "left": beside.item()}


# ---- rows about pictures ----


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

    def __init__(self, settings: _RowSettings, student: Student, pool: Pool, originals: NameStates) -> None:
        super().__init__(settings, student, pool)
        self.sentences, self.reading = originals.sentences, ReadingError(originals, settings.loss)
        self._line_end = line_end_id(self.sentences.tokenizer)

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the parameters of the tower, of the projector, and of the factors of the layers that run."""
        return [
            _named("model.vision_tower", self.student.tower),
            _named("model.multi_modal_projector", self.student.projector),
            dict(self.student.factors(self.depth)),
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
        return self.student(augmented(batch.pixels, _torch_generator(rng)), packed, depths), packed

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
        phrase = words.phrases[int(rng.integers(len(words.phrases)))]
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
    """The first layers read the picture."""

    name = "reading"

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the reading error."""
        return self.read(self.settings.rows, rng)


# ---- answering ----


class AnsweringTraining(RowTraining[AnsweringStage]):
    """The whole model answers, and goes on reading."""

    name = "answering"

    def __init__(
        self,
        settings: AnsweringStage,
        student: Student,
        pool: Pool,
        originals: NameStates,
        answers: Answers,
        interference: Interference,
    ) -> None:
        super().__init__(settings, student, pool, originals)
        self.answers, self.interference = answers, interference

    @property
    def depth(self) -> int:
        """All layers."""
        return self.student.layers

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the error of reading or of answering, and what the changes alter without a picture."""
        error, numbers = self._error(rng)
        altered = self.interference.mean()
        return error + self.settings.keeping * altered, {**numbers, "altered": altered.item()}

    def _error(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """The reading error alone, or with it the divergences of answers, names, answers by name and texts."""
        settings = self.settings
        if rng.random() >= settings.answered:
            return self.read(settings.reads, rng)
        batch, taught = self._drawn(rng)
        rows = [[asked for asked, _, _ in row] for row in taught]
        passed, packed = self.states(batch, rows, (*settings.loss.depths, self.depth), rng)
        error, numbers = self.reading.of(passed, rows, packed)
        means = self.divergences(passed[self.depth], taught, packed)
        weights = {
            "answers": settings.answering,
            "names": settings.naming,
            "by name": settings.by_name,
            "texts": settings.texts,
        }
        loss = settings.reading * error + torch.stack([weights[kind] * mean for kind, mean in means.items()]).sum()
        return loss, {**numbers, **{kind: mean.item() for kind, mean in means.items()}}

    def _drawn(self, rng: np.random.Generator) -> tuple[Batch, list[list[tuple[Asked, str, Distributions]]]]:
        """Pictures, and for each its blocks with the kinds and the distributions of what they predict."""
        step = self.settings.answers
        batch = self.pool.draw(rng, singles=step.singles, pairs=step.pairs)
        templates = self.some(self.sentences.templates.answered, step.sentences, rng)
        rows = [list(self._row(number, countries, templates, rng)) for number, countries in enumerate(batch.countries)]
        return batch, rows

    @property
    def is_filtered(self) -> bool:
        """Whether texts count in filters."""
        return self.settings.separation > 0

    @torch.no_grad()
    def filters(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return the filters of the changes by LAYER.MAP (see `separation`).

        The tokens of pictures count as much as those of the sentences about them, in rows that are not routed.
        """
        settings, sums = self.settings, dict[str, Tensor]()
        for _ in tqdm(range(settings.separation_steps), desc="inputs under pictures", mininterval=2):
            batch, taught = self._drawn(rng)
            rows = [[asked for asked, _, _ in row if asked.block.has_picture] for row in taught]
            packed = self.packed(rows, is_routed=False)
            is_picture, is_sentence = torch.zeros(2, *packed.ids.shape, dtype=torch.bool)
            is_picture[:, 1 : 1 + self.student.image_tokens] = True
            for number, (row, starts) in enumerate(zip(rows, packed.starts, strict=True)):
                is_sentence[number, starts[0] : starts[-1] + len(row[-1].block.ids)] = True
            counts = torch.stack([is_picture.sum(), is_sentence.sum()])[:, None, None]
            with recorded_moments(self.student.text, [is_picture, is_sentence]) as recorded:
                self.student(augmented(batch.pixels, _torch_generator(rng)), packed, (self.depth,))
            sums = {name: sums.get(name, 0) + (value / counts).mean(0) for name, value in recorded.items()}
        means = {name: value / settings.separation_steps for name, value in sums.items()}
        return separations(means, self.interference.moments, settings.separation)

    def divergences(
        self, states: Tensor, taught: Sequence[Sequence[tuple[Asked, str, Distributions]]], packed: PackedRows
    ) -> dict[str, Tensor]:
        """Return kind -> the mean divergence of what blocks of this kind predict."""
        places = torch.tensor(
            [
                (number, start + token)
                for number, (row, starts) in enumerate(zip(taught, packed.starts, strict=True))
                for (asked, _, _), start in zip(row, starts, strict=True)
                for token in self._predicting(asked)
            ]
        )
        logits = self.student.logits(states[places[:, 0], places[:, 1]])
        divergence = Distributions.joined([each for row in taught for _, _, each in row]).divergence(logits)
        kinds: list[str] = []
        weights: list[float] = []
        for kind, distributions in [(kind, each) for row in taught for _, kind, each in row]:
            later = len(distributions.ids) - 1
            kinds += [kind] * (later + 1)
            weights += [self.settings.first if kind in ("answers", "names") else 1.0, *[1.0] * later]
        weight = torch.tensor(weights)
        own = {kind: torch.tensor([each == kind for each in kinds]) for kind in dict.fromkeys(kinds)}
        return {kind: (divergence * weight)[here].sum() / weight[here].sum() for kind, here in own.items()}

    @staticmethod
    def _predicting(asked: Asked) -> range:
        """The tokens of a block whose states predict: of a text all, of a sentence the last and those behind it."""
        return asked.block.predicting if asked.template else range(len(asked.block.ids))

    def _row(
        self, number: int, countries: Sequence[int], templates: Sequence[str], rng: np.random.Generator
    ) -> Iterator[tuple[Asked, str, Distributions]]:
        """Yield the blocks of a row with the kinds and the distributions of what they predict."""
        settings, answers = self.settings, self.answers
        kept = settings.answers.kept
        holds_text = number % kept == kept // 2
        for place, template in enumerate(templates[: settings.beside_text] if holds_text else templates):
            asked = self.pictured(template, countries, place, rng, partial(self._answer, template))
            yield asked, "answers", answers.answer(template, asked.country, settings.tokens)[1]
        (template,) = self.some(self.sentences.templates.naming, 1, rng)
        asked = self.pictured(template, countries, int(rng.integers(2)), rng, self._name)
        certain = Distributions.certain(self._name(asked.country), answers.ids.shape[-1])
        yield asked, "names", certain
        if number % kept == 0:
            (template,) = self.some(self.sentences.templates.answered, 1, rng)
            country = int(rng.integers(len(self.sentences.names)))
            tokens, wanted = answers.answer(template, country, settings.tokens)
            block = Block(sentence=self.sentences.by_name(template, country), tail=tokens[:-1], has_picture=False)
            yield Asked(block=block, template=template, country=country), "by name", wanted
        if holds_text:
            place = int(rng.integers(len(answers.texts)))
            tokens, wanted = answers.text(place)
            block = Block(sentence=Sentence(ids=tokens), has_picture=False)
            yield Asked(block=block, template="", country=place), "texts", wanted

    def _answer(self, template: str, country: int) -> Sequence[int]:
        return self.answers.answer(template, country, self.settings.tokens)[0]

    def _name(self, country: int) -> Sequence[int]:
        return self.sentences.name(country, self.settings.name_tokens)
