"""The pictures of the training: rendered once, read whole into memory, and changed a little at every use.

They lie in a folder, one file for each round over all flags, so that a run that is cut goes on with the next round. The
seeds of `FlagWorld.picture`, which are held out, begin with other words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from tqdm import tqdm

from ....artefacts import replacing
from ....data.worlds.flags import Country, FlagWorld, generator_of
from ....data.worlds.flags.rendering import SIZE, render, render_two
from .recipe import Pictures

MEAN, DEVIATION = 0.5, 0.25
"""The processor subtracts the one from colours between 0 and 1, and divides by the other."""
_SHIFT = 6
_KEY = "train"


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Pictures, those of one flag first."""

    pixels: np.ndarray
    """(picture, row, column, colour) uint8."""
    countries: tuple[tuple[int, ...], ...]
    """The indices of the countries in each picture, from left to right."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """All pictures of the training."""

    singles: np.ndarray
    """(rendering, country, row, column, colour) uint8."""
    pairs: np.ndarray
    """(picture, row, column, colour) uint8."""
    paired: np.ndarray
    """(picture, 2): the countries on the left and on the right."""

    def draw(self, rng: np.random.Generator, *, singles: int, pairs: int) -> Batch:
        """Return pictures drawn at random."""
        renderings, countries = self.singles.shape[:2]
        shown = rng.integers(0, countries, singles)
        places = rng.integers(0, len(self.pairs), pairs)
        pixels = np.concatenate([self.singles[rng.integers(0, renderings, singles), shown], self.pairs[places]])
        alone = [(int(country),) for country in shown]
        return Batch(pixels=pixels, countries=(*alone, *(tuple(map(int, self.paired[place])) for place in places)))


def make_pool(folder: Path, world: FlagWorld, countries: Sequence[Country], settings: Pictures, *, seed: int) -> Pool:
    """Return the pictures, which are rendered unless they lie in the folder already.

    Args:
        folder: The folder of the pictures.
        world: The world that has the flags.
        countries: The countries that are learned, whose indices the pool names.
        settings: How many pictures there are.
        seed: The random seed of the renderings.
    """
    flags = [world.flag(country) for country in countries]
    pairs = _pairs(len(countries), settings.pairs, seed)

    def single(number: int) -> list[np.ndarray]:
        keys = [generator_of(_KEY, seed, number, country.code) for country in countries]
        return [np.asarray(render(flag, rng).image) for flag, rng in zip(flags, keys, strict=True)]

    def double(number: int) -> list[np.ndarray]:
        some = range(number * len(countries), min(len(pairs), (number + 1) * len(countries)))
        both = [(flags[left], flags[right]) for left, right in pairs[some.start : some.stop]]
        keys = [generator_of(_KEY, seed, "pair", place) for place in some]
        return [np.asarray(render_two(*pair, rng).image) for pair, rng in zip(both, keys, strict=True)]

    rounds = -(-len(pairs) // len(countries))
    return Pool(
        singles=np.stack(_rounds(folder, "one", settings.renderings, single)),
        pairs=np.concatenate(_rounds(folder, "two", rounds, double)),
        paired=pairs,
    )


def _pairs(countries: int, count: int, seed: int) -> np.ndarray:
    """(pair, 2): two different countries each."""
    rng = generator_of(_KEY, seed, "pairs")
    first = rng.integers(0, countries, count)
    return np.stack([first, (first + rng.integers(1, countries, count)) % countries], 1)


def _rounds(folder: Path, name: str, count: int, draw: Callable[[int], list[np.ndarray]]) -> list[np.ndarray]:
    """Return the pictures of each round; those that are missing in the folder are drawn and written."""
    rounds = []
    for number in tqdm(range(count), desc=f"pictures of {name}", mininterval=2):
        path = folder / f"{name}-{number:04d}.npy"
        if not path.is_file():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, np.stack(draw(number)))
        rounds.append(np.load(path))
    return rounds


def scaled(pixels: np.ndarray) -> Tensor:
    """Return (picture, colour, row, column) float32, as the processor gives them."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(MEAN).div(DEVIATION)


def augmented(pixels: np.ndarray, generator: torch.Generator) -> Tensor:
    """Return the pictures moved by up to six pixels, in other light and colours, with noise, as the processor does."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    wide = functional.pad(scaled(pixels), (_SHIFT,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * _SHIFT + 1, (2,), generator=generator).tolist()
    count = len(pixels)
    light = 1 + 0.06 * normal(count, 3, 1, 1) + 0.1 * normal(count, 1, 1, 1)
    noise = 0.12 * normal(count, 3, 1, 1) + 0.05 * normal(count, 1, SIZE, SIZE)
    return wide[:, :, top : top + SIZE, left : left + SIZE] * light + noise
