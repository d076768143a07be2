"""Answering: the distributions of the answers' tokens become those of the original that is told the name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .keeping import Interference
from .original import Sentence
from .pictures import Batch, Pool
from .reading import Asked, RowTraining
from .recipe import AnsweringStage
from .spelling import Spelling
from .student import Block, PackedRows, Student
from .teacher import Answers, Distributions, NameStates


class AnsweringTraining(RowTraining[AnsweringStage]):
    """The whole model answers, and goes on reading."""

    name = "answering"

    def __init__(
        self,
        settings: AnsweringStage,
        student: Student,
        pool: Pool,
        spelling: Spelling,
        originals: NameStates,
        interference: Interference,
        answers: Answers,
    ) -> None:
        super().__init__(settings, student, pool, spelling, originals, interference)
        self.answers = answers

    @property
    def is_spelt(self) -> bool:
        """Whether image tokens spell the name, and there are no pictures."""
        return self.settings.spelt

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
        for template in self.some(self.sentences.templates.answered, settings.named, rng):
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
