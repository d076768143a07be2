"""The three stages of the training: the tower sees, the text model reads, the whole answers.

Seeing: the tower alone tells the flags apart, in whole pictures and in the halves of pictures of two. Without it, the
joint training would spend its time on learning to see.

Reading: in the first layers, the states at the constraint's tokens under a picture become those that the original has
at the tokens of the country's name in the same sentence, aligned at their last tokens. Above these layers the original
goes on by itself. A squared error alone is small before countries can be told apart, since a few dimensions carry most
of the variance, so every dimension is standardised over countries, and the right country must also be the nearest.

Answering: the distributions of the answer's tokens under a picture become those of the original that is told the name.
Answers by name, and texts that the original wrote itself, are taught beside them, so that they stay as they are.

The random numbers of a step depend on the seed, the stage and the step alone, so a training that goes on from a
checkpoint takes the same steps as one that was never cut.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .original import Sentence
from .pictures import Batch, Pool, augmented
from .recipe import AnsweringStage, ReadingStage, Stage, TowerStage
from .student import Block, PackedRows, Student, line_end_id
from .teacher import Answers, Distributions, NameStates, Sentences

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


class StageTraining(ABC):
    """One stage: what it trains, and the loss of a step."""

    name: str

    def __init__(self, settings: Stage, student: Student, pool: Pool) -> None:
        self.settings, self.student, self.pool = settings, student, pool

    @abstractmethod
    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the parameters that are trained by name, one group for each of the stage's peak learning rates."""

    @abstractmethod
    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a step, and numbers to show. All that is random comes from `rng`."""


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


class SeeingTraining(StageTraining):
    """The tower alone."""

    name = "seeing"
    settings: TowerStage

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


def _words(sentences: Sentences, countries: Sequence[int], place: int, rng: np.random.Generator) -> tuple[str, int]:
    """The words that refer to a flag of a picture, and its country; of two flags, places take turns."""
    templates = sentences.templates
    if len(countries) == 1:
        return templates.phrases[int(rng.integers(len(templates.phrases)))], countries[0]
    side = place % len(countries)
    return templates.sides[side], countries[side]


def _routed(rng: np.random.Generator, rows: int, share: float) -> list[bool]:
    return [bool(value < share) for value in rng.random(rows)]


def _some(rng: np.random.Generator, templates: Sequence[str], count: int) -> list[str]:
    """Different templates, as many as there are up to a number."""
    places = rng.choice(len(templates), min(count, len(templates)), replace=False)
    return [templates[place] for place in places]


class RowTraining(StageTraining):
    """A stage on packed rows: one picture each, with sentences behind it."""

    settings: ReadingStage | AnsweringStage

    def __init__(
        self, settings: ReadingStage | AnsweringStage, student: Student, pool: Pool, sentences: Sentences
    ) -> None:
        super().__init__(settings, student, pool)
        self.sentences = sentences
        self._line_end = line_end_id(sentences.tokenizer)

    def states(
        self, batch: Batch, rows: Sequence[Sequence[Asked]], depths: Sequence[int], rng: np.random.Generator
    ) -> tuple[dict[int, Tensor], PackedRows]:
        """Return depth -> (row, token, hidden), and the rows; some of them are routed."""
        packed = PackedRows.of(
            [[asked.block for asked in row] for row in rows],
            _routed(rng, len(rows), self.settings.routed),
            line_end=self._line_end,
            image_tokens=self.student.image_tokens,
        )
        return self.student(augmented(batch.pixels, _torch_generator(rng)), packed, depths), packed


# ---- reading ----


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """What the states at some tokens are to be."""

    rows: Tensor
    tokens: Tensor
    states: Tensor
    """(place, depth, hidden)."""
    weights: Tensor


class ReadingTraining(RowTraining):
    """The first layers read the picture."""

    name = "reading"
    settings: ReadingStage

    def __init__(self, settings: ReadingStage, student: Student, pool: Pool, states: NameStates) -> None:
        super().__init__(settings, student, pool, states.sentences)
        self.originals = states

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the parameters of the tower, of the projector, and of the factors of the layers that run."""
        return [
            _named("model.vision_tower", self.student.tower),
            _named("model.multi_modal_projector", self.student.projector),
            dict(self.student.factors(max(self.settings.depths))),
        ]

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the squared errors of the states, and the cross-entropy of the right country among all."""
        settings = self.settings
        batch = self.pool.draw(rng, singles=settings.singles, pairs=settings.pairs)
        templates = _some(rng, self.sentences.templates.read, settings.sentences)
        rows = [self._row(countries, templates, rng) for countries in batch.countries]
        passed, packed = self.states(batch, rows, settings.depths, rng)
        states = torch.stack([passed[depth] for depth in settings.depths], 2)  # row, token, depth, hidden
        wanted = self.wanted(batch.countries, rows, packed)
        errors = (states[wanted.rows, wanted.tokens] - wanted.states) / self.originals.deviation
        error = ((errors.pow(2).mean(-1) * wanted.weights[:, None]).sum(0) / wanted.weights.sum()).mean()
        told, nearest, hits = self._told(states, rows, packed)
        return error + told + nearest, {"error": error.item(), "told": told.item(), "nearest": hits}

    def _row(self, countries: Sequence[int], templates: Sequence[str], rng: np.random.Generator) -> list[Asked]:
        """The sentences about a picture, then the first of them by name, which stays as it is."""
        row = []
        for place, template in enumerate(templates):
            words, country = _words(self.sentences, countries, place, rng)
            block = Block(sentence=self.sentences.by_picture(template, words))
            row.append(Asked(block=block, template=template, country=country))
        named = Block(sentence=self.sentences.by_name(templates[0], countries[0]), has_picture=False)
        return [*row, Asked(block=named, template=templates[0], country=countries[0])]

    def wanted(self, countries: Sequence[Sequence[int]], rows: Sequence[Sequence[Asked]], packed: PackedRows) -> Wanted:
        """Return what the states are to be: those of the sentence by name, aligned at the constraint's last token."""
        where: list[tuple[int, int]] = []
        states: list[Tensor] = []
        weights: list[float] = []
        for number, row in enumerate(rows):
            for asked, start in zip(row, packed.starts[number], strict=True):
                tokens, sources, own = self._aligned(asked, single=len(countries[number]) == 1)
                where += [(number, start + token) for token in tokens]
                states.append(self.originals.of(asked.template, asked.country)[list(sources)])
                weights += own
        places = torch.tensor(where)
        return Wanted(rows=places[:, 0], tokens=places[:, 1], states=torch.cat(states), weights=torch.tensor(weights))

    def _aligned(self, asked: Asked, *, single: bool) -> tuple[list[int], list[int], list[float]]:
        """The tokens of a block, the tokens of the sentence by name that they become, and their weights.

        Of a picture of two flags, only the constraint's last token tells which country it is.
        """
        settings, own = self.settings, asked.block.sentence
        named = self.sentences.by_name(asked.template, asked.country)
        if not asked.block.has_picture:
            whole = list(range(len(named.ids)))
            return whole, whole, [1.0] * len(whole)
        shared = min(named.stop - named.start, own.stop - own.start) if single else 1
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
        errors, losses, hits = [], [], []
        for place in range(len(rows[0]) - 1):  # the block of a sentence, in all rows
            template = rows[0][place].template
            tokens = [
                start[place] + row[place].block.sentence.stop - 1
                for row, start in zip(rows, packed.starts, strict=True)
            ]
            last = states[list(range(len(rows))), tokens]  # row, depth, hidden
            said = (last - originals.means[template]) / originals.last_deviation
            right = torch.tensor([row[place].country for row in rows])
            errors.append((said - originals.countries[template][right]).pow(2).mean())
            among = functional.normalize(originals.countries[template], dim=-1)
            likeness = torch.einsum("rdh,cdh->drc", functional.normalize(said, dim=-1), among) / settings.temperature
            losses += [functional.cross_entropy(likeness[depth], right) for depth in settings.contrasted]
            hits.append((likeness[settings.contrasted[-1]].argmax(-1) == right).float().mean().item())
        return torch.stack(errors).mean(), torch.stack(losses).mean(), sum(hits) / len(hits)


# ---- answering ----


class AnsweringTraining(RowTraining):
    """The whole model answers."""

    name = "answering"
    settings: AnsweringStage

    def __init__(
        self, settings: AnsweringStage, student: Student, pool: Pool, sentences: Sentences, answers: Answers
    ) -> None:
        super().__init__(settings, student, pool, sentences)
        self.answers = answers

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return everything that is trained."""
        return [
            _named("model.vision_tower", self.student.tower),
            _named("model.multi_modal_projector", self.student.projector),
            dict(self.student.factors()),
        ]

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the weighted mean divergences of the answers, the names, the answers by name and the texts."""
        settings = self.settings
        batch = self.pool.draw(rng, singles=settings.singles, pairs=settings.pairs)
        templates = _some(rng, self.sentences.templates.answered, settings.sentences)
        taught = [list(self._row(countries, templates, rng)) for countries in batch.countries]
        rows = [[asked for asked, _, _ in row] for row in taught]
        passed, packed = self.states(batch, rows, [self.student.layers], rng)
        places = torch.tensor(
            [
                (number, start + token)
                for number, (row, starts) in enumerate(zip(rows, packed.starts, strict=True))
                for asked, start in zip(row, starts, strict=True)
                for token in self._predicting(asked)
            ]
        )
        logits = self.student.logits(passed[self.student.layers][places[:, 0], places[:, 1]])
        divergence = Distributions.joined([each for row in taught for _, _, each in row]).divergence(logits)
        kinds = [kind for row in taught for _, kind, each in row for _ in range(len(each.ids))]
        weights = {"answers": 1.0, "names": settings.naming, "by_name": settings.by_name, "texts": settings.texts}
        means = {
            kind: divergence[torch.tensor([own == kind for own in kinds])].mean() for kind in weights if kind in kinds
        }
        loss = torch.stack([weights[kind] * mean for kind, mean in means.items()]).sum()
        return loss, {kind: mean.item() for kind, mean in means.items()}

    @staticmethod
    def _predicting(asked: Asked) -> range:
        """The tokens of a block whose states predict: of a text all, of a sentence the last and those behind it."""
        return asked.block.predicting if asked.template else range(len(asked.block.ids))

    def _row(
        self, countries: Sequence[int], templates: Sequence[str], rng: np.random.Generator
    ) -> Iterator[tuple[Asked, str, Distributions]]:
        """Yield the blocks of a row with the kinds and the distributions of what they predict."""
        settings, sentences = self.settings, self.sentences
        for place, template in enumerate(templates):
            words, country = _words(sentences, countries, place, rng)
            tokens, wanted = self.answers.answer(template, country, settings.tokens)
            block = Block(sentence=sentences.by_picture(template, words), tail=tokens[:-1])
            yield Asked(block=block, template=template, country=country), "answers", wanted
        (template,) = _some(rng, sentences.templates.naming, 1)
        words, country = _words(sentences, countries, int(rng.integers(2)), rng)
        tokens = sentences.name(country, settings.name_tokens)
        block = Block(sentence=sentences.by_picture(template, words), tail=tokens[:-1])
        certain = Distributions.certain(tokens, self.answers.ids.shape[-1])
        yield Asked(block=block, template=template, country=country), "names", certain
        (template,) = _some(rng, sentences.templates.answered, 1)
        country = int(rng.integers(len(sentences.names)))
        tokens, wanted = self.answers.answer(template, country, settings.tokens)
        block = Block(sentence=sentences.by_name(template, country), tail=tokens[:-1], has_picture=False)
        yield Asked(block=block, template=template, country=country), "by_name", wanted
        number = int(rng.integers(len(self.answers.texts)))
        tokens, wanted = self.answers.text(number)
        block = Block(sentence=Sentence(ids=tokens), has_picture=False)
        yield Asked(block=block, template="", country=number), "texts", wanted
