"""What attention brought from some tokens to others in one prompt: by layer, head, group and image token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.overlay import Overlay, draw_overlays, strongest
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...models import Prompt
from ..errors import TraceError
from .contributions_plot import Chart, HeadMap, Line, bin_edges, draw_layers, draw_shares
from .image_reading import check_prompt, over_grid

_LAYOUT = "multrace attention contributions 1"

Quantity = Literal["contribution", "weight"]
"""The length of what a source's values bring, or the attention weight alone."""
Reduction = Literal["max", "sum", "mean"]
"""How the tokens of a group of sources become one number."""
REDUCED: Mapping[str, str] = {"max": "largest token", "sum": "sum over tokens", "mean": "mean over tokens"}
NAMES: Mapping[str, str] = {"last": "the last token", "constraint": "the constraint", "image": "the picture"}
"""Groups in words; others go by their own names."""
UNITS: Mapping[str, str] = {"contribution": "length of contribution", "weight": "attention weight"}


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionContributions:
    """One prompt's attention contributions. Made by `attention_contributions`."""

    model: str
    """Name or path of the model."""
    revision: str | None
    question: str
    tokens: tuple[str, ...]
    """The prompt's tokens, one readable string per position."""
    input_ids: tuple[int, ...]
    """The prompt's tokens as the model reads them."""
    groups: Mapping[str, tuple[int, ...]]
    """The prompt's token groups that hold something, by name."""
    patches: tuple[tuple[int, int, int, int], ...]
    """(position, row, column, image) of each image token; empty where they do not form a grid."""
    queries: str | None
    """The group that was asked for; None for positions."""
    sources: str | None
    """The group that was asked for; None for positions."""
    query_positions: tuple[int, ...]
    """Ascending."""
    source_positions: tuple[int, ...]
    """Ascending."""
    contributions: Tensor
    """(layer, query, source), float32 or wider, in units of the residual stream: length of the sum over heads."""
    head_contributions: Tensor | None
    """(layer, head, query, source): length of each head's own contribution; None if they were left out."""
    weights: Tensor
    """(layer, head, query, source): attention weights; over all sources they sum to one."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.contributions)

    @property
    def source_groups(self) -> tuple[str, ...]:
        """Names of the groups that lie among the sources as a whole, the asked one first, "all" left out."""
        held = set(self.source_positions)
        names = [name for name, places in self.groups.items() if name != "all" and set(places) <= held]
        return tuple(sorted(names, key=lambda name: name != self.sources))

    def by_layer(
        self,
        group: str | None = None,
        *,
        into: str | None = None,
        of: Quantity = "contribution",
        reduction: Reduction = "max",
    ) -> Tensor:
        """(layer,): what a group of sources brings, mean over the queries; a weight is the mean over heads.

        group: None for all sources. reduction: over the group's tokens, the largest one (as SAT-Probe counts a
        constraint of several tokens, arXiv 2309.15098), "sum" or "mean". into: only the queries of this group.
        TraceError for a group that is not among the sources or queries.
        """
        values = self.contributions if _checked(of) == "contribution" else self.weights.mean(1)
        return self._reduced(values, group, into, reduction)

    def by_head(
        self,
        group: str | None = None,
        *,
        into: str | None = None,
        of: Quantity = "contribution",
        reduction: Reduction = "max",
    ) -> Tensor:
        """(layer, head): as `by_layer`, each head by itself. TraceError if lengths per head were left out."""
        values = self.head_contributions if _checked(of) == "contribution" else self.weights
        if values is None:
            raise TraceError("lengths per head were left out; read the prompt again with by_head=True, or ask by_layer")
        return self._reduced(values, group, into, reduction)

    def image_mass(self, of: Quantity = "contribution") -> Tensor:
        """(layer, image token): what each image token brings, mean over queries. TraceError without all of them."""
        values = self.contributions if _checked(of) == "contribution" else self.weights.mean(1)
        return values[..., self._columns("image")].mean(1)

    def image_map(self, layer: int, of: Quantity = "contribution") -> Tensor:
        """(image, row, column): `image_mass` of a layer over the patches; TraceError where they form no grid."""
        return over_grid(self.image_mass(of)[self._layer(layer)], self.groups["image"], self.patches)

    def index_histogram(self, layer: int, bins: int = 16) -> Tensor:
        """(bin,), summing to one: the share of the picture's contributions by index of the image token.

        arXiv 2406.04236 found most of it at index 540 to 576 of 576, the last of 16 bins. NaN if nothing is brought.
        """
        return index_shares(self.image_mass()[self._layer(layer)], bins)

    def tokens_for(self, share: float = 0.8, *, layer: int) -> int:
        """How many image tokens, the largest first, hold this share of the picture's contributions in a layer."""
        return int(tokens_for_share(self.image_mass()[self._layer(layer)], share))

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AttentionContributions":
        """What `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def to_dataframe(self, *, by_head: bool = False) -> pd.DataFrame:
        """One line per layer (and head), query and source: contribution and weight.

        Without heads the weight is the mean over them. TraceError for heads that were left out.
        """
        if by_head and self.head_contributions is None:
            raise TraceError("lengths per head were left out; read the prompt again with by_head=True")
        axes = [("layer", range(self.layers)), ("query", self.query_positions), ("source", self.source_positions)]
        if not by_head:
            return self._with_tokens(
                long_frame(axes, {"contribution": self.contributions, "weight": self.weights.mean(1)})
            )
        axes.insert(1, ("head", range(self.weights.shape[1])))
        return self._with_tokens(long_frame(axes, {"contribution": self.head_contributions, "weight": self.weights}))

    def plot(self, path: str | Path, groups: Sequence[str] | None = None, *, reduction: Reduction = "max") -> Path:
        """The written picture (png, pdf, svg): contribution and weight by layer, and of the first group by head.

        groups: of sources, one line each; if not given, the asked one, or else constraint, image and last token.
        """
        names = self._drawn(groups)
        charts = [
            Chart(
                unit=UNITS[of],
                lines=[Line(label=name, values=self.by_layer(name, of=of, reduction=reduction)) for name in names],
            )
            for of in UNITS
        ]
        kinds = UNITS if self.head_contributions is not None else ["weight"]
        maps = [
            HeadMap(kind=of, unit=UNITS[of], values=self.by_head(names[0], of=of, reduction=reduction).T)
            for of in kinds
        ]
        words = f"{REDUCED[reduction]} of each group of sources; heads: from {name_of(names[0])}"
        subtitle = f"What attention brings to {self._query_name}; {words}"
        return draw_layers(path, charts, maps, titles=(self.question, subtitle))

    def plot_histogram(self, path: str | Path, layers: Sequence[int] | None = None, bins: int = 16) -> Path:
        """The written picture: `index_histogram` of some layers, by default of four from first to last."""
        numbers = self._some(layers)
        mass = self.image_mass()
        titles = [f"layer {number}: {self.tokens_for(layer=number)} tokens hold 80%" for number in numbers]
        subtitle = f"Share of the picture's contributions to {self._query_name} by index of the image token"
        shares = index_shares(mass[list(numbers)], bins)
        return draw_shares(path, shares, captions=titles, count=mass.shape[-1], titles=(self.question, subtitle))

    def overlay(
        self, path: str | Path, prompt: Prompt, layers: Sequence[int] | None = None, of: Quantity = "contribution"
    ) -> Path:
        """The written picture: what image tokens bring to the queries, over the picture as the model saw it.

        layers: one panel each; if not given, the strongest four. TraceError for another prompt than the one that was
        read, and where image tokens form no grid.
        """
        check_prompt(self, prompt)
        grid = over_grid(self.image_mass(of), self.groups["image"], self.patches)
        numbers = strongest(grid) if layers is None else self._some(layers)
        overlays = [Overlay(title=f"layer {number}", values=grid[number]) for number in numbers]
        titles = self.question, f"From the picture to {self._query_name}: {UNITS[of]}"
        return draw_overlays(
            path, prompt.seen_pictures(), overlays, kind="attention", titles=titles, scale=0.0, unit=of
        )

    @property
    def _query_name(self) -> str:
        """The queries in words."""
        count = len(self.query_positions)
        return name_of(self.queries) + (f" (mean over {count} tokens)" if count > 1 else "")

    def _reduced(self, values: Tensor, group: str | None, into: str | None, reduction: Reduction) -> Tensor:
        if reduction not in ("max", "sum", "mean"):
            raise TraceError(f"no reduction {reduction!r}; pass 'max', 'sum' or 'mean'")
        chosen = values if group is None else values[..., self._columns(group)]
        each = chosen.amax(-1) if reduction == "max" else getattr(chosen, reduction)(-1)
        if into is None:
            return each.mean(-1)
        rows = self._indices(into, self.query_positions, "queries")
        return each[..., rows].mean(-1)

    def _columns(self, group: str) -> list[int]:
        return self._indices(group, self.source_positions, "sources")

    def _indices(self, group: str, positions: tuple[int, ...], name: str) -> list[int]:
        """Where a group's tokens stand among the positions. TraceError unless all of them do."""
        index = {position: number for number, position in enumerate(positions)}
        places = self.groups.get(group, ())
        if not places or not set(places) <= set(index):
            held = ", ".join(each for each, members in self.groups.items() if set(members) <= set(index))
            raise TraceError(
                f"the {name} do not hold all of a group {group!r}; they hold {held or 'no whole group'}: "
                f"ask for one of these, or read the prompt again with other {name}"
            )
        return [index[position] for position in places]

    def _layer(self, layer: int) -> int:
        if not -self.layers <= layer < self.layers:
            raise TraceError(f"no layer {layer}; these contributions have layers 0 to {self.layers - 1}")
        return layer % self.layers

    def _some(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """Layers counted from the start; if none are given, four from first to last."""
        if layers is None:
            return tuple(dict.fromkeys(round(step * (self.layers - 1) / 3) for step in range(4)))
        if not layers:
            raise TraceError(f"no layers to draw; pass some of 0 to {self.layers - 1}")
        return tuple(self._layer(layer) for layer in layers)

    def _drawn(self, groups: Sequence[str] | None) -> tuple[str, ...]:
        if groups is not None:
            return tuple(groups)
        found = self.source_groups
        usual = [name for name in ("constraint", "image", "last") if name in found]
        names = (self.sources,) if self.sources in found else tuple(usual)
        if not names:
            raise TraceError("the sources hold no whole group of tokens to draw; pass groups= or read other sources")
        return names

    def _with_tokens(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame with the tokens' texts beside their positions."""
        tokens = pd.Series(self.tokens)
        for name in ("source", "query"):
            frame.insert(
                frame.columns.get_loc(name) + 1, f"{name}_token", tokens.take(frame[name].to_numpy()).to_numpy()
            )
        return frame


def index_shares(mass: Tensor, bins: int) -> Tensor:
    """(..., bin), summing to one: the share of the mass (..., image token) in equally many tokens each, by index.

    Of 576 tokens, 16 bins hold 36 each. Where tokens do not divide evenly, bins differ by one token. NaN where there
    is no mass at all. TraceError for more bins than tokens or none.
    """
    count = mass.shape[-1]
    if not 1 <= bins <= count:
        raise TraceError(f"cannot put {count} image tokens into {bins} bins; pass a number from 1 to {count}")
    parts = [mass[..., start:stop].sum(-1) for start, stop in bin_edges(count, bins)]
    return torch.stack(parts, -1) / mass.sum(-1, keepdim=True)


def tokens_for_share(mass: Tensor, share: float) -> Tensor:
    """(...,) int64: the fewest image tokens that hold this share of the mass (..., image token); 0 without any mass.

    TraceError for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise TraceError(f"no share {share} of the picture's mass; pass one above 0 and at most 1, such as 0.8")
    ordered = mass.double().sort(-1, descending=True).values
    wanted = share * ordered.sum(-1, keepdim=True)
    reached = ordered.cumsum(-1) >= wanted * (1 - 1e-12)  # all of it is reached in spite of rounding
    first = torch.where(reached, torch.arange(1, mass.shape[-1] + 1), mass.shape[-1]).min(-1).values
    return torch.where(wanted[..., 0] > 0, first, 0)


def name_of(group: str | None) -> str:
    """A group in words."""
    return NAMES.get(group, group) if group is not None else "some tokens"


def _checked(quantity: str) -> str:
    if quantity not in UNITS:
        raise TraceError(f"no quantity {quantity!r}; pass 'contribution' or 'weight'")
    return quantity


def _problem(result: AttentionContributions) -> str | None:
    """What does not fit together in contributions that were read from a file."""
    heads = result.weights.shape[1]
    sizes = len(result.query_positions), len(result.source_positions)
    whole = (result.layers, heads, *sizes)
    fits = [result.contributions.shape == (result.layers, *sizes), result.weights.shape == whole]
    fits += [result.head_contributions is None or result.head_contributions.shape == whole]
    fits += [len(result.tokens) == len(result.input_ids), min(sizes) > 0]
    return None if all(fits) else "its tensors are of other shapes than its layers, heads, queries and sources"
