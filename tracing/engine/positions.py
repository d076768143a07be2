"""Token positions by group, by index or by the region of the picture that they show, and the grid of cells over them.

A grid has one row for each set of positions that are restored together, and one column for each layer.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...models import ModelError, Prompt, VisionLanguageModel
from ...models.errors import plain_number
from ...models.prompts import Patch
from ...models.replay.observe import layers_without_attention
from .cells import KINDS, StateCell, TraceError, in_words, skipped_in_words, warn_caller

Positions = str | int | Sequence[str | int]
"""A token group, a position (negative ones count from the end), or several of either."""


def group_positions(prompt: Prompt, group: str) -> tuple[int, ...]:
    """Return the positions of a token group.

    Raises `TraceError`, which lists the groups, if the group is empty or reaches into an answer.
    """
    positions = prompt.groups.get(group, ())
    if not positions:
        names = ", ".join(name for name, members in prompt.groups.items() if members)
        no_image = "; layers attend to its pictures, which stand at no position" if prompt.attends_to_pictures else ""
        hints = {"image": no_image or "; pass an image to the prompt", "constraint": "; pass constraint= to the prompt"}
        hint = hints.get(group, "; ask for one of these")
        raise TraceError(f"no tokens in group {group!r} of this prompt; groups with tokens are {names}{hint}")
    last = prompt.groups["last"][0]
    if max(positions) > last:
        raise TraceError(
            f"group {group!r} reaches beyond the prompt's last token (position {last}) into the answer; "
            "ask for a group of the prompt"
        )
    return positions


def check_pictures(prompt: Prompt) -> None:
    """Raise `TraceError` if the prompt has no picture."""
    if not prompt.images:
        group_positions(prompt, "image")


def named_positions(prompt: Prompt, positions: Positions) -> dict[int, str]:
    """Return each requested position once, in the requested order, with a role that has the same name in every prompt.

    A role is the name of the group ("last"), numbered from 1 if the group has several tokens ("question 2"), or
    "position -2" for a number. Raises `TraceError` for a group without tokens and if no position is given, and
    `ModelError` for an unknown group.
    """
    roles: dict[int, str] = {}
    positions = plain_number(positions)
    for item in map(plain_number, (positions,) if isinstance(positions, str | int) else positions):
        members = prompt.positions(item)
        if not members:
            names = ", ".join(name for name, own in prompt.groups.items() if own)
            raise TraceError(f"no tokens in group {item!r} of this prompt; groups with tokens are {names}")
        name = item if isinstance(item, str) else f"position {item}"
        for number, position in enumerate(members, start=1):
            roles.setdefault(position, f"{name} {number}" if len(members) > 1 else name)
    if not roles:
        raise TraceError("no positions to read; name a group such as 'last', a position or several")
    return roles


def prompt_positions(prompt: Prompt, positions: str | int | Sequence[int]) -> tuple[int, ...]:
    """Return the ascending positions of a group, of one index or of several indices within the prompt.

    Raises `TraceError` if there are none or if one of them belongs to an answer.
    """
    if isinstance(positions, str):
        return tuple(sorted(group_positions(prompt, positions)))
    members, last = tuple(sorted(set(prompt.positions(positions)))), prompt.groups["last"][0]
    if not members or members[-1] > last:
        raise TraceError(
            f"no positions {positions} within this prompt; pass at least one, and none beyond its last token ({last})"
        )
    return members


# ---- regions of the picture, located by processing a painted picture ----


@dataclass(frozen=True)
class Blocks:
    """Rows of size x size patches each; blocks at the right and lower edge may be smaller."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise TraceError(
                f"no blocks of {self.size} x {self.size} patches; pass Blocks(1) or more, such as Blocks(3)"
            )


@dataclass(frozen=True)
class Box:
    """A rectangle of the original picture in pixels; right and bottom are excluded."""

    left: int
    top: int
    right: int
    bottom: int
    image: int = 0
    """Index of the picture in the prompt."""

    @property
    def label(self) -> str:
        """The name of a row for this box."""
        return f"box {self.left}, {self.top} to {self.right}, {self.bottom}"


def box_patches(prompt: Prompt, box: Box) -> tuple[Patch, ...]:
    """Return the patches that the box touches in the picture that the model sees, which is resized, cropped and padded.

    The box is painted white on black and processed like the prompt's picture. A patch counts as touched if it is at
    least half as bright as the brightest one, so that the blur of resizing does not count. Patches of a picture's tiles
    come first, then those of the copy of the whole picture, which is judged by its own brightness, since a small box is
    dimmer there.

    Raises:
        TraceError: There is no such picture or grid, or the box is empty, leaves the picture, or lies where the
            processor cuts the picture off; the message has the valid range.
    """
    _check_box(prompt, box)
    grids = [grid for grid in prompt.grids if grid.image == box.image]
    if not grids:
        raise TraceError(_why_no_grid(prompt, str(box)))
    light = _light(prompt, box)
    cells = [grid.brightest(grid.canvas(light).amax(0)) for grid in grids]
    if all(float(values.max()) == 0 for values in cells):
        raise _unseen(prompt, box)
    touched = {
        position
        for grid, values in zip(grids, cells, strict=True)
        for position, value in zip(grid.positions, values.flatten().tolist(), strict=True)
        if value > 0 and value >= float(values.max()) / 2
    }
    return tuple(patch for patch in (*prompt.patches, *prompt.overview) if patch.position in touched)


def box_positions(vlm: VisionLanguageModel, prompt: Prompt, box: Box) -> tuple[int, ...]:
    """Return the image positions whose patches the box touches, in ascending order.

    A picture in tiles has such positions in its tiles and in the copy of the whole picture; tokens of padding, line
    ends or classes belong to no box. This runs the image processor twice, and three times more for tiles.

    Args:
        vlm: The model.
        prompt: A prompt of this model with pictures.
        box: The rectangle, in pixels of the original picture.

    Returns:
        Token positions, usable as `positions=` of a trace.

    Raises:
        TraceError: The box is empty, leaves the picture or cannot be seen, or the image tokens do not show parts of the
            picture.
        ModelError: The prompt belongs to another model.

    Example:
        >>> import multrace as mt
        >>> from PIL import Image
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(Image.new("RGB", (64, 64)), "Who founded the company in this photo?")
        >>> from multrace.tracing import box_positions
        >>> corner = box_positions(vlm, prompt, mt.Box(0, 0, 8, 8))
        >>> corner[0] == prompt.groups["image"][0]
        True
    """
    vlm.check_prompt(prompt)
    return tuple(sorted(patch.position for patch in box_patches(prompt, box)))


def _why_no_grid(prompt: Prompt, item: str) -> str:
    """Return the error message for rows of patches in a prompt whose image tokens have no places."""
    if prompt.attends_to_pictures:
        reason = "layers attend to its pictures, which stand at no position"
    elif not prompt.groups["image"]:
        reason = "it has no picture"
    elif not prompt.shows_places:
        reason = "its image tokens are answers of learned queries to the whole picture and show no part of it"
    else:
        reason = "its image tokens do not form a grid of patches"
    return f"no {item} in this prompt: {reason}; pass group names or positions, such as positions='tokens'"


def _check_box(prompt: Prompt, box: Box) -> None:
    if not 0 <= box.image < len(prompt.images):
        raise TraceError(f"no image {box.image} for {box}: this prompt has {len(prompt.images)}, counted from 0")
    width, height = prompt.images[box.image].size
    if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
        raise TraceError(
            f"{box} is empty or leaves the picture of {width} x {height} pixels; "
            f"pass 0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        )


def _unseen(prompt: Prompt, box: Box) -> TraceError:
    left, top, right, bottom = _visible(prompt, box.image)
    return TraceError(
        f"{box} touches no patch: it is too small for the model's resolution, or the processor cuts it off; "
        f"the model sees the picture from left {left} to right {right} and from top {top} to bottom {bottom}"
    )


def _painted(prompt: Prompt, box: Box | None = None) -> list[Image.Image]:
    """Return the prompt's pictures in black, with the box in white."""
    pictures = [Image.new("RGB", image.size) for image in prompt.images]
    if box is not None:
        corners = (box.left, box.top, box.right - 1, box.bottom - 1)
        ImageDraw.Draw(pictures[box.image]).rectangle(corners, fill="white")
    return pictures


def _light(prompt: Prompt, box: Box) -> Tensor:
    """Return how brightly the processed pictures show the box, in the shape of the processor's pixels."""
    return (prompt.processed(_painted(prompt, box)) - prompt.processed(_painted(prompt))).abs()


def _visible(prompt: Prompt, image: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the part of the picture that the model sees."""
    width, height = prompt.images[image].size

    def dark(length: int, strip: Callable[[int], Box]) -> int:
        """Return the width of the broadest strip along one edge that the model does not see."""
        return bisect_left(range(1, length), True, key=lambda size: float(_light(prompt, strip(size)).max()) > 0)

    left = dark(width, lambda size: Box(0, 0, size, height, image))
    top = dark(height, lambda size: Box(0, 0, width, size, image))
    right = width - dark(width, lambda size: Box(width - size, 0, width, height, image))
    bottom = height - dark(height, lambda size: Box(0, height - size, width, height, image))
    return left, top, right, bottom


EFFECTS, BEFORE_DECODER = ("total", "direct"), ("vision", "projector")
SITES = (*KINDS, "heads", *BEFORE_DECODER)
"""Kinds of sites that can be restored; "heads" stands for one map per attention head."""

_REGIONS = ("image_rows", "image_columns", "image_quadrants", "patches")
_CHOICES = f"{', '.join(map(repr, _REGIONS))}, Blocks(3), Box(left, top, right, bottom) or a position"

Item = str | int | Blocks | Box
"""One or several rows: "tokens", the name of a group or of image regions, a position, blocks of patches, or a box."""


def parse_position(text: str) -> Item:
    """Return the row that a text spells: a position, blocks of patches, a box, or a group's or region's name.

    Raises `TraceError` for blocks or a box with other numbers than one or four.

    Example:
        >>> from multrace.tracing import parse_position
        >>> [parse_position(text) for text in ("last", "-1", "blocks:3")]
        ['last', -1, Blocks(size=3)]
    """
    if text.removeprefix("-").isdecimal():
        return int(text)
    kind, _, sizes = text.partition(":")
    counts = {"blocks": 1, "box": 4}
    if kind not in counts:
        return text
    numbers = [int(size) for size in sizes.split(",") if size.strip().isdecimal()]
    if len(numbers) != counts[kind] or len(sizes.split(",")) != counts[kind]:
        raise TraceError(f"no row {text!r}; write blocks:3 or box:0,0,50,50")
    return Blocks(*numbers) if kind == "blocks" else Box(*numbers)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Positions restored together."""

    label: str
    positions: tuple[int, ...]
    token: str | int | None
    """Group name or position by which an edit names the row's token; None for rows of several tokens or patches."""
    is_group: bool
    """True if the label has the same meaning in other prompts: a named group or a region, not one text token."""


def resolve_rows(prompt: Prompt, positions: Item | Sequence[Item] = "tokens") -> tuple[Row, ...]:
    """Return the rows of a map in the order of `positions`, which may be one item or a sequence of them.

    "tokens" gives one row for each text token and one for the whole image; the name of a token group or a position
    gives one row, and a group is restored as a whole. "image_rows", "image_columns", "image_quadrants" and "patches"
    give one row for each row, column, quarter or single token of each picture's patch grid, `Blocks(k)` one for each
    k x k patches, and `Box(left, top, right, bottom)` one for the patches that it touches. Raises `TraceError` or
    `ModelError`, with the valid items, for anything else, for positions of the answer, and for regions of image tokens
    that do not form a grid.
    """
    positions = plain_number(positions)
    items = (positions,) if isinstance(positions, Item) else positions
    if not isinstance(items, Sequence):
        raise _unknown(prompt, positions)
    rows = tuple(row for item in items for row in _rows(prompt, plain_number(item)))
    if not rows:
        raise TraceError('no positions to restore; pass positions="tokens", group names or positions')
    return rows


def _rows(prompt: Prompt, item: Item) -> Iterator[Row]:
    """Yield the rows of one item."""
    if item == "tokens":
        yield from _token_rows(prompt)
    elif item == "image_quadrants":
        yield from _quadrants(prompt)
    elif isinstance(item, Box):
        yield _region(prompt, item.label, box_patches(prompt, item), item.image)
    elif isinstance(item, Blocks) or item in _REGIONS:
        yield from _picture_tiles(prompt, item)
    elif isinstance(item, str | int):
        yield _row(prompt, item)
    else:
        raise _unknown(prompt, item)


def _token_rows(prompt: Prompt) -> Iterator[Row]:
    """Yield one row per text token and one for all image tokens, in the order of the prompt."""
    image = prompt.groups["image"]
    for position in range(_scored_position(prompt) + 1):
        if position not in set(image):
            yield _row(prompt, position)
        elif position == image[0]:
            yield _row(prompt, "image")


def _row(prompt: Prompt, item: str | int) -> Row:
    """Return one row for a group name or a position."""
    members = prompt.positions((item,)) if isinstance(item, int) else _group(prompt, item)
    if max(members) > _scored_position(prompt):
        raise TraceError(
            f"{item!r} reaches beyond the prompt's last token (position {_scored_position(prompt)}) into the answer, "
            "which is never restored; ask for positions of the prompt"
        )
    label = item if isinstance(item, str) else prompt.tokens[members[0]]
    return Row(label=label, positions=members, token=_edit_token(prompt, item, members), is_group=isinstance(item, str))


def _group(prompt: Prompt, name: str) -> tuple[int, ...]:
    """Return the positions of a named group, without those of a given answer."""
    try:
        prompt.positions(name)
    except ModelError as error:  # the message lists the groups; a trace accepts more items
        raise ModelError(f'{error}; besides these, pass "tokens", {_CHOICES}') from error
    if name == "answer":
        raise TraceError("positions of the answer are never restored; leave out the group 'answer'")
    return group_positions(prompt, name)


def _edit_token(prompt: Prompt, item: str | int, members: tuple[int, ...]) -> str | int | None:
    """Return the name of the row's token in an edit, valid in other prompts if possible; None for several tokens."""
    if len(members) > 1 or members[0] in prompt.groups["image"]:
        return None
    names = [name for name in ("last", "constraint_last") if prompt.groups.get(name) == members]
    return names[0] if names else members[0] if isinstance(item, int) else item


def _picture_tiles(prompt: Prompt, item: str | Blocks) -> Iterator[Row]:
    """Yield the rows of the picture's parts: rows, columns, blocks or single patches."""
    for image, patches in _grids(prompt, item):
        height, width = patches[-1].row + 1, patches[-1].column + 1
        size = item.size if isinstance(item, Blocks) else 1
        name = item if isinstance(item, str) else ""
        tall, wide = {"image_rows": (1, width), "image_columns": (height, 1)}.get(name, (size, size))
        for top in range(0, height, tall):
            for left in range(0, width, wide):
                bottom, right = min(top + tall, height) - 1, min(left + wide, width) - 1
                inside = [p for p in patches if top <= p.row <= bottom and left <= p.column <= right]
                names = {"image_rows": f"image row {top}", "image_columns": f"image column {left}"}
                label = names.get(name, f"patch {_range(top, bottom)}, {_range(left, right)}")
                yield _region(prompt, label, inside, image)


def _quadrants(prompt: Prompt) -> Iterator[Row]:
    """Yield the four quarters of each picture; the lower and the right ones get the odd row and column."""
    for image, patches in _grids(prompt, "image_quadrants"):
        middle_row, middle_column = (patches[-1].row + 1) // 2, (patches[-1].column + 1) // 2
        for vertical, is_low in (("top", False), ("bottom", True)):
            for horizontal, is_right in (("left", False), ("right", True)):
                inside = [
                    patch
                    for patch in patches
                    if (patch.row >= middle_row) == is_low and (patch.column >= middle_column) == is_right
                ]
                if inside:
                    yield _region(prompt, f"image {vertical} {horizontal}", inside, image)


def _grids(prompt: Prompt, item: Item) -> list[tuple[int, list[Patch]]]:
    """Return each picture's number and its patches, row by row. Raises `TraceError` if there is no grid."""
    if not prompt.patches:
        raise TraceError(_why_no_grid(prompt, repr(item)))
    return [(image, list(patches)) for image, patches in groupby(prompt.patches, key=lambda patch: patch.image)]


def _region(prompt: Prompt, label: str, patches: Sequence[Patch], image: int) -> Row:
    """Return a row for some patches of one picture, which the label names if there are several pictures."""
    suffix = f" of image {image}" if len(prompt.images) > 1 else ""
    positions = tuple(patch.position for patch in patches)
    return Row(label=label + suffix, positions=positions, token=None, is_group=True)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _scored_position(prompt: Prompt) -> int:
    """Return the position that predicts the answer's first token."""
    return prompt.groups["last"][0]


def _unknown(prompt: Prompt, item: object) -> TraceError:
    return TraceError(
        f"no rows {item!r}; this prompt has the groups {', '.join(prompt.groups)}; "
        f'pass "tokens", some of these, {_CHOICES}'
    )


# ---- columns ----


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The maps of one trace, with one cell for each (kind, row, column), in this order."""

    rows: tuple[Row, ...]
    spans: Mapping[str, Tensor]
    """Per kind (column, 2): first and last layer, both included, that a cell restores."""
    columns: Mapping[str, tuple[int, ...]]
    """Per kind, the columns that have cells: layers without such a site have none."""
    cells: tuple[StateCell, ...]

    def maps(self, values: Tensor, *, empty: float = math.nan) -> dict[str, Tensor]:
        """Return values (..., row, column, sample) by kind, from values (cell, ..., sample).

        `empty` stands in the columns without cells.
        """
        maps, start = {}, 0
        for kind, spans in self.spans.items():
            columns = list(self.columns[kind])
            stop = start + len(self.rows) * len(columns)
            part = values[start:stop].unflatten(0, (len(self.rows), len(columns)))
            whole = part.new_full((len(self.rows), len(spans), *part.shape[2:]), empty)
            whole[:, columns] = part
            maps[kind] = whole.movedim((0, 1), (-3, -2)).contiguous()
            start = stop
        return maps


def make_grid(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    rows: tuple[Row, ...],
    *,
    sites: str | Sequence[str],
    window: int,
    effect: str,
    severed: str | None,
) -> Grid:
    """Return the cells of a trace of these rows. Raises `TraceError` for unknown or incompatible settings.

    A layer that does not run for this prompt, or has no attention heads where these are traced, has no cells, and is
    left out of the windows around others.
    """
    kinds = _kinds(vlm, prompt, sites)
    if not 1 <= window <= vlm.layers:
        raise TraceError(
            f"no window of {window} layers: the decoder has {vlm.layers}; pass window=1 to {vlm.layers}, such as 3"
        )
    _check(effect, severed, prompt)
    variant = {"severed": severed, "is_direct": effect == "direct"}
    if any(kind in BEFORE_DECODER for kind in kinds):
        _check_before_decoder(prompt, rows, variant)
    spans = {kind: _spans(vlm, kind, window) for kind in kinds}
    lacking = _lacking(vlm, prompt, kinds)
    columns = {kind: tuple(each for each in range(len(spans[kind])) if each not in lacking[kind]) for kind in kinds}
    cells = tuple(
        StateCell(**_site(kind), first=own[0], last=own[-1], positions=row.positions, **variant)
        for kind in kinds
        for row in rows
        for first, last in spans[kind][list(columns[kind])].tolist()
        if (own := [layer for layer in range(first, last + 1) if layer not in lacking[kind]])
    )
    return Grid(rows=rows, spans=spans, columns=columns, cells=cells)


def window_layers(center: int, window: int, layers: int) -> range:
    """Return the layers of a window around a centre, cut off at both ends of the decoder (ROME's convention)."""
    return range(max(0, center - window // 2), min(layers, center - (-window // 2)))


def _kinds(vlm: VisionLanguageModel, prompt: Prompt, sites: str | Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of maps, with one kind for each head."""
    requested = tuple(dict.fromkeys((sites,) if isinstance(sites, str) else sites))
    heads = tuple(f"head {number}" for number in range(vlm.heads))
    unknown = [kind for kind in requested if kind not in SITES and kind not in heads]
    if unknown or not requested:
        raise TraceError(
            f"no kind of site {unknown[0] if unknown else '(none given)'!r}; pass some of {', '.join(SITES)}, "
            f"or single heads ('head 0' to 'head {vlm.heads - 1}')"
        )
    if {"heads", *heads} & set(requested) and len(layers_without_attention(vlm)) == vlm.layers:
        raise TraceError(
            f"every decoder layer of {vlm.name!r} keeps a running state and has no attention heads to restore; pass "
            "sites='attention', which is restored in every layer"
        )
    if not prompt.groups["image"] and set(requested) & set(BEFORE_DECODER):
        raise TraceError("'vision' and 'projector' need a picture, which this prompt does not have; leave them out")
    return tuple(dict.fromkeys(kind for each in requested for kind in (heads if each == "heads" else (each,))))


def _lacking(vlm: VisionLanguageModel, prompt: Prompt, kinds: Sequence[str]) -> dict[str, frozenset[int]]:
    """Return the layers without cells of each kind, and warn of them in one line."""
    skipped, without, reasons = vlm.skipped_layers(prompt), (), []
    if any(_site(kind)["kind"] == "head" for kind in kinds):
        without = layers_without_attention(vlm)
    if skipped:
        reasons.append(skipped_in_words(vlm, skipped))
    if without:
        reasons.append(f"a running state takes the place of attention heads in {in_words(without)} of {vlm.name!r}")
    if reasons:
        warn_caller(f"{'; '.join(reasons)}; the cells there are nan")
    ends = {"hidden": skipped, "mlp": skipped, "attention": skipped, "head": (*skipped, *without)}
    return {kind: frozenset(ends.get(_site(kind)["kind"], ())) for kind in kinds}


def _site(kind: str) -> dict[str, Any]:
    name, _, number = kind.partition(" ")
    return {"kind": name, "head": int(number)} if number else {"kind": name}


def _spans(vlm: VisionLanguageModel, kind: str, window: int) -> Tensor:
    """Return (column, 2): first and last layer, both included, that each cell of this kind restores."""
    if kind in BEFORE_DECODER:
        layers, window = (len(vlm.vision_layers), window) if kind == "vision" else (1, 1)
    else:
        layers, window = vlm.layers, 1 if kind == "hidden" else window
    spans = [window_layers(layer, window, layers) for layer in range(layers)]
    return torch.tensor([[span[0], span[-1]] for span in spans])


def _check(effect: str, severed: str | None, prompt: Prompt) -> None:
    if effect not in EFFECTS:
        raise TraceError(f"no effect {effect!r}; pass effect='total' or 'direct'")
    if severed not in (None, "mlp", "attention"):
        raise TraceError(f"cannot sever {severed!r}; pass severed='mlp', 'attention' or None")
    if effect == "direct" and not prompt.groups["image"]:
        raise TraceError("direct effects freeze image tokens, and this prompt has none; pass effect='total'")


def _check_before_decoder(prompt: Prompt, rows: Sequence[Row], variant: Mapping[str, object]) -> None:
    if variant["severed"] or variant["is_direct"]:
        raise TraceError("'vision' and 'projector' have total effects only; trace them on their own")
    image = set(prompt.groups["image"])
    for row in rows:
        if not set(row.positions) <= image:
            raise TraceError(
                f"row {row.label!r} holds words, which the vision tower does not see; trace 'vision' and 'projector' "
                "with positions such as 'image', 'patches' or 'image_rows'"
            )
