"""Pictures of the synthetic world: emblems, flags and portraits at random places on cluttered, noisy backgrounds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..facts import PixelBox

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (205, 40, 45),
    "blue": (45, 75, 200),
    "green": (40, 150, 65),
    "yellow": (235, 205, 50),
    "purple": (135, 55, 165),
    "orange": (240, 130, 35),
    "white": (240, 240, 240),
    "black": (28, 28, 32),
}
SKINS = ((245, 215, 185), (225, 175, 135), (165, 110, 75), (105, 70, 50))
OUTLINES = ("circle", "square", "triangle", "diamond", "hexagon", "star", "shield", "cross")
MARKS = ("dot", "ring", "bar", "pillar", "chevron", "saltire")
PATTERNS = ("stripes", "bands", "cross", "saltire", "canton", "disc", "triangle", "border")
HATS = ("cap", "tophat", "bald", "curls", "bun", "bob")
FACES = ("glasses", "beard", "moustache", "plain")

Colour = tuple[int, int, int]
Glyph = tuple[str, ...]


class Pen:
    """Draws the shapes of one entity: points and lengths count from its centre in units of its radius (in pixels)."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, rng: random.Random
    ) -> None:
        self.draw, self.radius, self.rng = draw, radius, rng
        self.x, self.y = centre

    def colour(self, base: Colour, spread: float = 16) -> Colour:
        """Return the colour with each channel moved by at most `spread` (of 255)."""
        red, green, blue = (int(max(0, min(255, value + self.rng.uniform(-spread, spread)))) for value in base)
        return red, green, blue

    def _at(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(self.x + self.radius * x, self.y + self.radius * y) for x, y in points]

    def polygon(self, points: list[tuple[float, float]], fill: Colour) -> None:
        """Fill the polygon with these corners."""
        self.draw.polygon(self._at(points), fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """Fill an upright rectangle."""
        self.draw.rectangle(self._at([(left, top), (right, bottom)]), fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        """Fill a circle."""
        self.draw.ellipse(self._at([(x - radius, y - radius), (x + radius, y + radius)]), fill=fill)

    def ring(self, x: float, y: float, radius: float, colour: Colour, width: float) -> None:
        """Draw the outline of a circle."""
        corners = self._at([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.ellipse(corners, outline=colour, width=max(2, int(width * self.radius)))

    def slice(self, left: float, top: float, right: float, bottom: float, start: int, end: int, fill: Colour) -> None:
        """Fill the slice of the ellipse in a box between two angles (degrees, clockwise from the right)."""
        self.draw.pieslice(self._at([(left, top), (right, bottom)]), start, end, fill=fill)

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        """Draw a line through the points."""
        self.draw.line(self._at(points), fill=colour, width=max(2, int(width * self.radius)))


def regular(corners: int, radius: float, turn: float, waist: float | None = None) -> list[tuple[float, float]]:
    """Return the corners (x, y) of a regular polygon or star around (0, 0), in the unit of the radius.

    Args:
        corners: The number of corners, or of points of a star.
        radius: The distance of the corners from the centre.
        turn: The angle of the first corner in radians, clockwise from the right.
        waist: The distance of the inner corners of a star, as a share of the radius; None (default) for a polygon.

    Returns:
        The corners in order: `corners` of a polygon, twice as many of a star.

    Example:
        >>> from multrace.data.world.drawing import regular
        >>> [(round(x), round(y)) for x, y in regular(4, 1.0, 0.0)]
        [(1, 0), (0, 1), (-1, 0), (0, -1)]
    """
    count = corners * 2 if waist else corners
    reach = [radius * (waist if waist and index % 2 else 1.0) for index in range(count)]
    angles = [turn + 2 * math.pi * index / count for index in range(count)]
    return [(far * math.cos(angle), far * math.sin(angle)) for far, angle in zip(reach, angles, strict=True)]


def _outline(pen: Pen, name: str, fill: Colour) -> None:
    turn = -math.pi / 2 + pen.rng.uniform(-0.12, 0.12)
    corners: dict[str, list[tuple[float, float]]] = {
        "square": regular(4, 1.2, turn + math.pi / 4),
        "diamond": regular(4, 1.15, turn),
        "triangle": [(x, y + 0.15) for x, y in regular(3, 1.2, turn)],
        "hexagon": regular(6, 1.05, turn),
        "star": regular(5, 1.2, turn, 0.5),
        "shield": [(-1, -1), (1, -1), (1, 0.2), (0, 1.1), (-1, 0.2)],
    }
    if name == "circle":
        pen.disc(0, 0, 1, fill)
    elif name == "cross":
        pen.box(-0.42, -1, 0.42, 1, fill)
        pen.box(-1, -0.42, 1, 0.42, fill)
    else:
        pen.polygon(corners[name], fill)


def _mark(pen: Pen, name: str, fill: Colour) -> None:
    size, width = 0.42, 0.21
    marks: Mapping[str, Callable[[], None]] = {
        "dot": lambda: pen.disc(0, 0, size, fill),
        "ring": lambda: pen.ring(0, 0, size, fill, width),
        "bar": lambda: pen.box(-0.5, -width / 2, 0.5, width / 2, fill),
        "pillar": lambda: pen.box(-width / 2, -0.5, width / 2, 0.5, fill),
        "chevron": lambda: pen.line([(-size, 0.25), (0, -0.25), (size, 0.25)], fill, width),
        "saltire": lambda: (
            pen.line([(-size, -size), (size, size)], fill, width),
            pen.line([(-size, size), (size, -size)], fill, width),
        )[-1],
    }
    marks[name]()


def draw_emblem(pen: Pen, glyph: Glyph) -> None:
    """Draw the emblem of a company; the glyph is (outline, mark, colour of the outline, colour of the mark)."""
    outline, mark, ground, figure = glyph
    _outline(pen, outline, pen.colour(COLOURS[ground]))
    _mark(pen, mark, pen.colour(COLOURS[figure]))


def draw_flag(pen: Pen, glyph: Glyph) -> None:
    """Draw the flag of a country; the glyph is (pattern, main colour, second colour, third colour)."""
    main, second, third = (pen.colour(COLOURS[name]) for name in glyph[1:])
    wide, high = 1.15, 0.8
    pen.box(-wide, -high, wide, high, main)
    patterns: Mapping[str, Callable[[], object]] = {
        "stripes": lambda: (pen.box(-wide, -0.26, wide, 0.26, second), pen.box(-wide, 0.26, wide, high, third)),
        "bands": lambda: (pen.box(-0.38, -high, 0.38, high, second), pen.box(0.38, -high, wide, high, third)),
        "cross": lambda: (
            pen.box(-0.52, -high, -0.12, high, second),
            pen.box(-wide, -0.16, wide, 0.16, second),
            pen.box(-wide, -high, -0.52, -0.16, third),
        ),
        "saltire": lambda: (
            pen.line([(-wide, -high), (wide, high)], second, 0.25),
            pen.line([(-wide, high), (wide, -high)], third, 0.25),
        ),
        "canton": lambda: (pen.box(-wide, -high, 0, 0, second), pen.box(0, 0, wide, high, third)),
        "disc": lambda: (pen.disc(0, 0, 0.48, second), pen.box(-wide, 0.56, wide, high, third)),
        "triangle": lambda: (
            pen.polygon([(-wide, -high), (0, 0), (-wide, high)], second),
            pen.box(0.58, -high, wide, high, third),
        ),
        "border": lambda: (pen.box(-0.86, -0.56, 0.86, 0.56, second), pen.box(-0.29, -0.24, 0.29, 0.24, third)),
    }
    patterns[glyph[0]]()


def _hair(pen: Pen, hat: str, hair: Colour, behind: bool) -> None:
    """Draw the part of the hair or hat that lies behind the head, or in front of it, in units of the head."""
    back: Mapping[str, Callable[[], object]] = {
        "bob": lambda: pen.box(-1.3, -0.7, 1.3, 1.1, hair),
        "curls": lambda: [
            pen.disc(1.05 * math.cos(angle), 1.05 * math.sin(angle), 0.4, hair)
            for angle in (math.pi + step * math.pi / 7 for step in range(8))
        ],
        "bun": lambda: (pen.disc(0, -1.3, 0.45, hair), pen.slice(-1.1, -1.15, 1.1, 1, 180, 360, hair)),
    }
    front: Mapping[str, Callable[[], object]] = {
        "cap": lambda: (pen.slice(-1.1, -1.2, 1.1, 0.8, 180, 360, hair), pen.box(0, -0.4, 1.6, -0.15, hair)),
        "tophat": lambda: (pen.box(-0.75, -1.7, 0.75, -0.6, hair), pen.box(-1.2, -0.75, 1.2, -0.5, hair)),
        "bald": lambda: (pen.box(-1.05, -0.1, -0.8, 0.4, hair), pen.box(0.8, -0.1, 1.05, 0.4, hair)),
        "bob": lambda: pen.box(-1, -1.05, 1, -0.55, hair),
    }
    parts = back if behind else front
    if hat in parts:
        parts[hat]()


def draw_portrait(pen: Pen, glyph: Glyph) -> None:
    """Draw the portrait of a person; the glyph is (hat or hair, face, shirt colour, hair colour, index in SKINS)."""
    hat, face, shirt, hair_name, skin = glyph
    cloth, hair, tone = pen.colour(COLOURS[shirt]), pen.colour(COLOURS[hair_name]), pen.colour(SKINS[int(skin)], 10)
    pen.polygon([(-0.95, 1), (-0.6, 0.42), (0.6, 0.42), (0.95, 1)], cloth)
    head = Pen(pen.draw, (pen.x, pen.y - 0.15 * pen.radius), 0.55 * pen.radius, pen.rng)
    _hair(head, hat, hair, behind=True)
    head.disc(0, 0, 1, tone)
    _hair(head, hat, hair, behind=False)
    dark = (20, 20, 20)
    for side in (-1, 1):
        head.disc(0.4 * side, -0.1, 0.16, dark)
        if face == "glasses":
            head.ring(0.45 * side, -0.1, 0.38, dark, 0.14)
    if face == "beard":
        head.slice(-1, -1, 1, 1.25, 20, 160, hair)
    if face == "moustache":
        head.box(-0.5, 0.3, 0.5, 0.52, dark)


DRAW: Mapping[str, Callable[[Pen, Glyph], None]] = {
    "company": draw_emblem,
    "country": draw_flag,
    "person": draw_portrait,
}


# ---- scenes ----

PLACES = ("left", "right", "top", "bottom", "centre")
SIZE = 64
_OVERSAMPLING = 2
_DIRECTION = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An entity to draw: its kind ("company", "country" or "person") and its glyph, which describes its look."""

    kind: str
    glyph: Glyph


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn picture, and where its figures are."""

    image: Image.Image
    """The picture, in RGB, SIZE x SIZE pixels."""
    places: tuple[str, ...]
    """The place of each figure, one of PLACES."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """The box of each figure: (left, top, right, bottom) as shares of the side of the picture, 0 to 1."""

    @property
    def pixel_boxes(self) -> tuple[PixelBox, ...]:
        """The box of each figure in whole pixels, cut to the picture."""
        side = self.image.width
        corners = [[min(side, max(0, round(side * edge))) for edge in box] for box in self.boxes]
        return tuple((left, top, right, bottom) for left, top, right, bottom in corners)


def draw_one(figure: Figure, rng: random.Random) -> Scene:
    """Return a picture of one figure at a random place, with a radius of 0.22 to 0.34 of the side."""
    place = rng.choice(PLACES)
    radius = rng.uniform(0.22, 0.34)
    room = 0.5 - radius - 0.01
    centre = [
        0.5 + (towards * room * rng.uniform(0.75, 1) if towards else rng.uniform(-0.25, 0.25) * room)
        for towards in _DIRECTION[place]
    ]
    return _paint([figure], [(centre[0], centre[1], radius)], (place,), rng)


def draw_two(first: Figure, second: Figure, rng: random.Random) -> Scene:
    """Return a picture of the first figure on the left and the second on the right, with radii of 0.18 to 0.22."""
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
    """Return a greyish colour gradient at a random angle, with up to three blobs on it."""
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
