"""What the tokens of a picture are to say: the name of the country, spelt in the text model's own embeddings.

The picture brings a name and nothing else. Row by row of the patches, the image tokens in the half of a flag hold the
embeddings of the name's tokens, the last one in the last row, behind one linear map for all names and beside what marks
an image token, its row and its half. The text model learns to read such tokens without any picture, so no noise of the
tower stands in its way; the tower and the projector then learn to write them, and hear of no fact until the whole is
joined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .original import ids_of
from .pictures import Pool, augmented
from .recipe import SpellingStage, Spelt
from .stage import StageTraining, named_parameters, torch_generator
from .student import Student
from .teacher import Sentences

_MARK, _PLACE = 0.7, 0.1
"""The lengths of what marks an image token and of what marks its place at the beginning, by that of an embedding."""
_PROJECTED = 0.05
"""How much smaller the projector's outputs are at the beginning than those of a new linear layer."""


class Spelling(nn.Module):
    """The image tokens of a name.

    `map` (hidden, hidden) and `embedding` (1 + rows + 2, hidden), of the mark, the rows and the halves, are trained
    while the text model learns to read, and are the same for all names.
    """

    names: Tensor
    has_token: Tensor

    def __init__(self, student: Student, sentences: Sentences, settings: Spelt, *, seed: int) -> None:
        """Take the embeddings of the names' tokens; the seed decides on the marks."""
        super().__init__()
        self.settings, self.side = settings, math.isqrt(student.image_tokens)
        table = student.text.model.embed_tokens.weight.detach()
        hidden = table.shape[1]
        names = torch.zeros(len(sentences.names), self.side, hidden)
        has_token = torch.zeros(len(sentences.names), self.side, dtype=torch.bool)
        for number, name in enumerate(sentences.names):
            ids = ids_of(sentences.tokenizer, f" {name}")[-self.side :]
            names[number, self.side - len(ids) :] = table[torch.tensor(ids)]
            has_token[number, self.side - len(ids) :] = True
        self.register_buffer("names", names, persistent=False)
        self.register_buffer("has_token", has_token, persistent=False)
        self.length = float(names[has_token].norm(dim=-1).mean())
        generator = torch.Generator().manual_seed(seed)
        marks = torch.randn(1 + self.side + 2, hidden, generator=generator) * self.length / hidden**0.5
        marks[0] *= _MARK
        marks[1:] *= _PLACE
        self.map, self.embedding = nn.Parameter(torch.eye(hidden)), nn.Parameter(marks)

    @property
    def marks(self) -> Tensor:
        """What the tokens (row, column, hidden) hold whatever the name is."""
        rows, halves = self.embedding[1 : 1 + self.side], self.embedding[1 + self.side :]
        wide = halves.repeat_interleave(self.side // 2, 0)
        return self.embedding[0] + rows[:, None] + wide[None]

    @property
    def mapped(self) -> Tensor:
        """The names (country, row, hidden) as the tokens of a picture hold them, without the marks."""
        return self.names @ self.map.T

    def halves(self, countries: Sequence[Sequence[int]]) -> Tensor:
        """Return (picture, half): the countries on the left and on the right, which are the same for a flag alone."""
        return torch.tensor([(shown[0], shown[-1]) for shown in countries])

    def forward(self, countries: Sequence[Sequence[int]], rng: np.random.Generator | None = None) -> Tensor:
        """Return the tokens (picture, token, hidden) of pictures of these countries, from left to right.

        With `rng` they are as bad as those of a tower: names are mixed with a little of another, and noise is added,
        half of which all tokens of a picture share.
        """
        spelt = self.names[self.halves(countries)]  # picture, half, row, hidden
        if rng is not None:
            others = rng.integers(0, len(self.names), spelt.shape[:2])
            shares = torch.from_numpy(rng.random(spelt.shape[:2], np.float32)) * self.settings.mixed
            spelt = torch.lerp(spelt, self.names[torch.from_numpy(others)], shares[..., None, None])
        tokens = (spelt @ self.map.T).transpose(1, 2).repeat_interleave(self.side // 2, 2) + self.marks
        tokens = tokens.flatten(1, 2)
        if rng is not None:
            own, shared = (
                torch.from_numpy(rng.standard_normal((len(tokens), count, tokens.shape[-1]), np.float32))
                for count in (tokens.shape[1], 1)
            )
            tokens = tokens + (own + shared) * self.settings.noise * self.length / (2 * tokens.shape[-1]) ** 0.5
        return tokens


class SpellingTraining(StageTraining[SpellingStage]):
    """The tower and the projector learn to write the tokens that the text model reads."""

    name = "spelling"

    def __init__(self, settings: SpellingStage, student: Student, pool: Pool, spelling: Spelling) -> None:
        super().__init__(settings, student, pool)
        self.spelling = spelling
        with torch.no_grad():
            self.names, self.marks = spelling.mapped, spelling.marks
        self.spread = (self.names - self.names.mean(0))[spelling.has_token].pow(2).mean()

    def begin(self) -> None:
        """Let the projector begin with the marks, and little beside them."""
        last = self.student.projector.linear_2
        with torch.no_grad():
            last.weight.mul_(_PROJECTED)
            last.bias.copy_(self.marks.mean((0, 1)))

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the tower's and the projector's parameters."""
        return [
            named_parameters("model.vision_tower", self.student.tower),
            named_parameters("model.multi_modal_projector", self.student.projector),
        ]

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """Return the error of the tokens, of their means over a half of a row, and the cross-entropy of the names."""
        settings, side = self.settings, self.spelling.side
        batch = self.pool.draw(rng, singles=settings.singles, pairs=settings.pairs)
        features = self.student.features(augmented(batch.pixels, torch_generator(rng)))
        written = (features.unflatten(1, (side, side)) - self.marks).unflatten(2, (2, side // 2))
        right = self.spelling.halves(batch.countries)
        wanted = self.names[right].transpose(1, 2)  # picture, row, half, hidden
        weights = self.spelling.has_token[right].transpose(1, 2) * (1 - settings.empty) + settings.empty
        means = written.mean(3)
        single = ((written - wanted[:, :, :, None]).pow(2).mean((-1, -2)) * weights).sum() / weights.sum() / self.spread
        mean = ((means - wanted).pow(2).mean(-1) * weights).sum() / weights.sum() / self.spread
        distances = torch.cdist(means.transpose(1, 2).flatten(2), self.names.flatten(1)).pow(2)
        tokens = self.spelling.has_token.float().sum(1).mean() * self.names.shape[-1] * self.spread
        likeness = -distances / (settings.temperature * tokens)
        named = functional.cross_entropy(likeness.flatten(0, 1), right.flatten())
        hits = (likeness.argmax(-1) == right).float()
        alone = hits[: settings.singles].mean().item()
        beside = hits[settings.singles :].mean().item()
        loss = single + settings.mean * mean + settings.named * named
        return loss, {"error": single.item(), "mean": mean.item(), "flag": alone, "beside": beside}
