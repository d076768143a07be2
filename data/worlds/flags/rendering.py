"""Renderings of flags as a camera might see them: waving cloth in perspective, before photographs, partly hidden.

One pass over the pixels maps every pixel of the picture back to the cloth: a homography for the camera, then a
travelling wave for the wind, which also shades the cloth. What is missing from a real photograph is said in the page
on the flags world.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import map_coordinates

from ...facts import PixelBox
from .countries import FOLDER

SIZE = 128
"""Width and height of a rendering in pixels."""
SWING = 0.07
"""The largest swing of the wind, as a share of the cloth's length."""
REACH = 0.1
"""How far around the still cloth, as a share of its length, pixels can show the waving cloth."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A picture of one or two flags."""

    image: Image.Image
    boxes: tuple[PixelBox, ...]
    """The upright box around each flag, left flag first, in pixels of the picture."""


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Return the photographs that renderings are set before."""
    paths = sorted((FOLDER / "backgrounds").glob("*.jpg"), key=lambda path: path.name)
    return tuple(Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in paths)


def render(flag: Image.Image, rng: np.random.Generator, *, size: int = SIZE) -> Rendering:
    """Return a rendering of one flag anywhere in the picture.

    Args:
        flag: The flag; its alpha channel, where it has one, is the shape of the cloth.
        rng: The source of all that is random; the same state gives the same pixels.
        size: Width and height of the picture in pixels (default SIZE).
    """
    width = size * rng.uniform(0.5, 0.92)
    free = size - 0.8 * width
    centre = (size / 2 + free * rng.uniform(-0.5, 0.5), size / 2 + size * rng.uniform(-0.18, 0.18))
    return _photograph([(flag, centre, width)], rng, size)


def render_two(left: Image.Image, right: Image.Image, rng: np.random.Generator, *, size: int = SIZE) -> Rendering:
    """Return a rendering of two flags side by side.

    Args:
        left: The flag on the left.
        right: The flag on the right.
        rng: The source of all that is random.
        size: Width and height of the picture in pixels (default SIZE).
    """
    placed = []
    for flag, middle in ((left, 0.26), (right, 0.74)):
        centre = (size * (middle + rng.uniform(-0.02, 0.02)), size * rng.uniform(0.35, 0.65))
        placed.append((flag, centre, size * rng.uniform(0.4, 0.48)))
    return _photograph(placed, rng, size)


def _photograph(
    placed: Sequence[tuple[Image.Image, tuple[float, float], float]], rng: np.random.Generator, size: int
) -> Rendering:
    scene = _background(rng, size)
    _clutter(scene, rng, size, count=int(rng.integers(0, 5)))
    pixels = np.asarray(scene, np.float32)
    boxes = []
    for flag, centre, width in placed:
        cloth, box = _cloth(flag, centre, width, rng, size)
        pixels = pixels + cloth[..., 3:] * (cloth[..., :3] - pixels)
        boxes.append(box)
    scene = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        _occlude(scene, boxes, rng)
    return Rendering(image=_camera(scene, rng), boxes=tuple(boxes))


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """A crop of a photograph, or a surface with soft or rough patches of colour."""
    if rng.random() < 0.6:
        photographs_ = photographs()
        photograph = photographs_[int(rng.integers(len(photographs_)))]
        side = min(photograph.size) * rng.uniform(0.4, 1.0)
        left, top = (rng.uniform(0, length - side) for length in photograph.size)
        scene = photograph.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        if rng.random() < 0.5:
            scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return scene.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2.5)))
    cells = int(rng.integers(2, 12))
    patches = rng.uniform(0, 255, 3) + rng.uniform(10, 70) * rng.standard_normal((cells, cells, 3))
    kind = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.NEAREST
    return Image.fromarray(patches.clip(0, 255).astype(np.uint8)).resize((size, size), kind)


def _clutter(scene: Image.Image, rng: np.random.Generator, size: int, *, count: int) -> None:
    """Draw things of one colour anywhere."""
    draw = ImageDraw.Draw(scene)
    for _ in range(count):
        x, y = rng.uniform(0, size, 2)
        reach = size * rng.uniform(0.06, 0.25, 2)
        box = (x - reach[0], y - reach[1], x + reach[0], y + reach[1])
        _thing(draw, box, rng)


def _thing(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], rng: np.random.Generator) -> None:
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    left, top, right, bottom = box
    kind = int(rng.integers(4))
    if kind == 0:
        draw.ellipse(box, fill=colour)
    elif kind == 1:
        draw.rectangle(box, fill=colour)
    elif kind == 2:
        draw.polygon([(left, bottom), (right, bottom), (rng.uniform(left, right), top)], fill=colour)
    else:
        draw.line([(left, top), (right, bottom)], fill=colour, width=max(1, int((right - left) / 8)))


def _cloth(
    flag: Image.Image, centre: tuple[float, float], width: float, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, PixelBox]:
    """The cloth in the picture: (row, column, red green blue and coverage), colours 0 to 255, coverage 0 to 1."""
    texture = np.asarray(flag.convert("RGBA"), np.float32)
    rows, columns = texture.shape[:2]
    height = width * rows / columns * rng.uniform(0.85, 1.1)
    corners = _corners(centre, width, height, rng)
    inverse = np.linalg.inv(_homography(corners)).astype(np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) + np.float32(0.5)
    u, v, w = (row[0] * x + row[1] * y + row[2] for row in inverse)
    u, v = u / w, v / w
    near = (np.abs(u - 0.5) < 0.5 + REACH) & (np.abs(v - 0.5) < 0.5 + REACH)
    u, v = u[near], v[near]
    waves, phase, slant = rng.uniform(0.6, 2.2), rng.uniform(0, 2 * math.pi), rng.uniform(-0.5, 0.5)
    swing = rng.uniform(0.0, SWING) * (0.4 + 0.6 * u.clip(0, 1))  # the far end of the cloth swings most
    angle = 2 * math.pi * waves * (u + slant * v) + phase
    v, u = v + swing * np.sin(angle), u + 0.3 * swing * np.cos(angle)
    shade = 1 + rng.uniform(0, 4.5) * swing * np.cos(angle)
    at = np.stack([v * rows - 0.5, u * columns - 0.5])
    pixel = 1 / max(width, height)
    edges = [(0.5 + distance / pixel).clip(0, 1) for distance in (u, 1 - u, v, 1 - v)]
    cloth = np.zeros((size, size, 4), np.float32)
    bands = [map_coordinates(texture[..., band], at, order=1, mode="nearest") for band in range(4)]
    cloth[near] = np.stack([*(band * shade for band in bands[:3]), bands[3] / 255 * np.prod(edges, axis=0)], -1)
    covered = cloth[..., 3] > 0.5
    across, down = np.flatnonzero(covered.any(0)), np.flatnonzero(covered.any(1))
    box = (int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)
    return cloth, box


def _corners(
    centre: tuple[float, float], width: float, height: float, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Where the camera sees the corners of the cloth, clockwise from the top of the hoist."""
    turn = math.radians(rng.normal(0, 9))
    corners = []
    for right, low in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        x = right * width / 2 * (1 + rng.uniform(-0.13, 0.06))
        y = low * height / 2 * (1 + rng.uniform(-0.16, 0.08))
        corners.append(
            (centre[0] + x * math.cos(turn) - y * math.sin(turn), centre[1] + x * math.sin(turn) + y * math.cos(turn))
        )
    return corners


def _homography(corners: Sequence[tuple[float, float]]) -> np.ndarray:
    """The 3 x 3 matrix that takes the unit square (clockwise from (0, 0)) to these corners."""
    rows, right = [], []
    for (u, v), (x, y) in zip(((0, 0), (1, 0), (1, 1), (0, 1)), corners, strict=True):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        right += [x, y]
    return np.append(np.linalg.solve(np.array(rows), np.array(right)), 1).reshape(3, 3)


def _occlude(scene: Image.Image, boxes: Sequence[PixelBox], rng: np.random.Generator) -> None:
    """Draw a thing over the edge of each flag, so that most of it stays in sight."""
    draw = ImageDraw.Draw(scene)
    for left, top, right, bottom in boxes:
        width, height = right - left, bottom - top
        x = left + width * rng.choice([rng.uniform(-0.1, 0.08), rng.uniform(0.92, 1.1)])
        y = top + height * rng.uniform(0, 1)
        reach = rng.uniform(0.05, 0.14) * width, rng.uniform(0.05, 0.22) * height
        _thing(draw, (x - reach[0], y - reach[1], x + reach[0], y + reach[1]), rng)


def _camera(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Light, focus, noise and compression of a camera."""
    if rng.random() < 0.4:
        scene = scene.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
    pixels = np.asarray(scene, np.float32)
    light = rng.uniform(0.75, 1.15) * (1 + rng.uniform(-0.06, 0.06, 3))
    ramp = 1 + rng.uniform(-0.15, 0.15) * np.linspace(-1, 1, scene.width)[None, :, None]
    noise = rng.uniform(0, 10) * rng.standard_normal((scene.height, scene.width, 1))
    pixels = pixels * light * ramp + rng.uniform(-15, 15) + noise
    scene = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.7:
        buffer = io.BytesIO()
        scene.save(buffer, "JPEG", quality=int(rng.integers(40, 95)))
        scene = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    return scene
