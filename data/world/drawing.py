"""Pictures of the synthetic world: entities at random places on cluttered, noisy backgrounds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .glyphs import DRAW, Glyph, Pen

PLACES = ("left", "right", "top", "bottom", "centre")
SIZE = 64
_OVERSAMPLING = 2
_DIRECTION = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One entity to draw: its kind ("company", "country", "person") and its glyph."""

    kind: str
    glyph: Glyph


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn picture and what is where in it."""

    image: Image.Image
    """RGB, SIZE x SIZE pixels."""
    places: tuple[str, ...]
    """For each figure one of PLACES."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """For each figure (left, top, right, bottom) in shares of the picture's side, 0 to 1."""


def draw_one(figure: Figure, rng: random.Random) -> Scene:
    """A picture of one figure at a random place and scale (radius 0.22 to 0.34 of the side), colours jittered."""
    place = rng.choice(PLACES)
    radius = rng.uniform(0.22, 0.34)
    room = 0.5 - radius - 0.01
    centre = [
        0.5 + (towards * room * rng.uniform(0.75, 1) if towards else rng.uniform(-0.25, 0.25) * room)
        for towards in _DIRECTION[place]
    ]
    return _paint([figure], [(centre[0], centre[1], radius)], (place,), rng)


def draw_two(first: Figure, second: Figure, rng: random.Random) -> Scene:
    """A picture with the first figure on the left and the second on the right, of radius 0.18 to 0.22 of the side."""
    spots = []
    for middle in (0.25, 0.75):
        radius = rng.uniform(0.18, 0.22)
        spots.append((middle + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-1, 1) * (0.48 - radius), radius))
    return _paint([first, second], spots, ("left", "right"), rng)


def _paint(
    figures: Sequence[Figure], spots: Sequence[tuple[float, float, float]], places: tuple[str, ...], rng: random.Random
) -> Scene:
    side = SIZE * _OVERSAMPLING
    canvas = _background(side, rng)
    draw = ImageDraw.Draw(canvas)
    for figure, (x, y, radius) in zip(figures, spots, strict=True):
        DRAW[figure.kind](Pen(draw, (x * side, y * side), radius * side, rng), figure.glyph)
    small = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32) * rng.uniform(0.88, 1.1)
    grain = np.random.default_rng(rng.randrange(1 << 30)).standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    pixels = np.clip(small + grain * rng.uniform(2, 8), 0, 255).astype(np.uint8)
    boxes = tuple((x - radius, y - radius, x + radius, y + radius) for x, y, radius in spots)
    return Scene(image=Image.fromarray(pixels), places=places, boxes=boxes)


def _background(side: int, rng: random.Random) -> Image.Image:
    """A greyish colour gradient at a random angle with up to three blobs on it."""
    ends = [np.array([rng.uniform(95, 185) + rng.uniform(-18, 18) for _ in range(3)], np.float32) for _ in range(2)]
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.arange(side, dtype=np.float32) / side - 0.5
    share = np.clip(math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None] + 0.5, 0, 1)[..., None]
    canvas = Image.fromarray((ends[0] + share * (ends[1] - ends[0])).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randrange(4)):
        pen = Pen(draw, (rng.uniform(0, side), rng.uniform(0, side)), rng.uniform(0.03, 0.09) * side, rng)
        pen.disc(0, 0, 1, pen.colour((140, 140, 140), 45))
    return canvas
