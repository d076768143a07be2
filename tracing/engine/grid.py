"""The cells of a map: for each kind of site, row and column what is put in where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError
from .cells import KINDS, Cell
from .rows import Row

EFFECTS, BEFORE_DECODER = ("total", "direct"), ("vision", "projector")
SITES = (*KINDS, "heads", *BEFORE_DECODER)
"""What can be restored; "heads" stands for one map per attention head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The maps of one trace, a cell for each (kind, row, column), in this order."""

    rows: tuple[Row, ...]
    spans: Mapping[str, Tensor]
    """Per kind (column, 2): first and last layer, both included, that a cell restores."""
    cells: tuple[Cell, ...]

    def maps(self, values: Tensor) -> dict[str, Tensor]:
        """Per kind (..., row, column, sample) from values (cell, ..., sample)."""
        found, start = {}, 0
        for kind, spans in self.spans.items():
            stop = start + len(self.rows) * len(spans)
            part = values[start:stop].unflatten(0, (len(self.rows), len(spans)))
            found[kind] = part.movedim((0, 1), (-3, -2)).contiguous()
            start = stop
        return found


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
    """The cells that a trace of these rows asks for. TraceError for settings that do not exist or fit together."""
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
    cells = tuple(
        Cell(**_site(kind), first=first, last=last, positions=row.positions, **variant)
        for kind, each in spans.items()
        for row in rows
        for first, last in each.tolist()
    )
    return Grid(rows=rows, spans=spans, cells=cells)


def window_layers(center: int, window: int, layers: int) -> range:
    """The layers restored together around a centre, cut off at both ends of the decoder."""
    return range(max(0, center - window // 2), min(layers, center - (-window // 2)))


def _kinds(vlm: VisionLanguageModel, prompt: Prompt, sites: str | Sequence[str]) -> tuple[str, ...]:
    """The kinds of maps, each head on its own."""
    asked = tuple(dict.fromkeys((sites,) if isinstance(sites, str) else sites))
    heads = tuple(f"head {number}" for number in range(vlm.heads))
    unknown = [kind for kind in asked if kind not in SITES and kind not in heads]
    if unknown or not asked:
        raise TraceError(
            f"no kind of site {unknown[0] if unknown else '(none given)'!r}; pass some of {', '.join(SITES)}, "
            f"or single heads ('head 0' to 'head {vlm.heads - 1}')"
        )
    if not prompt.groups["image"] and set(asked) & set(BEFORE_DECODER):
        raise TraceError("'vision' and 'projector' need a picture, which this prompt does not have; leave them out")
    return tuple(dict.fromkeys(kind for each in asked for kind in (heads if each == "heads" else (each,))))


def _site(kind: str) -> dict[str, str | int]:
    name, _, number = kind.partition(" ")
    return {"kind": name, "head": int(number)} if number else {"kind": name}


def _spans(vlm: VisionLanguageModel, kind: str, window: int) -> Tensor:
    """(column, 2): first and last layer, both included, that each cell of this kind restores."""
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
