"""Attention contributions averaged over prompts, by layer, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean
from ...artefacts.drawing.styles import name_of_model
from ...artefacts.results import Result, long_frame, stacked_frame
from ..errors import TraceError
from .contributions_plot import Chart, Line, layers_figure, shares_figure
from .contributions_result import (
    REDUCED,
    UNITS,
    AttentionContributions,
    Quantity,
    Reduction,
    index_shares,
    name_of,
    tokens_for_share,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_USUAL = ("constraint", "image", "last")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageContributions(Result):
    """The contributions of token groups to the queries by layer, over several prompts. `average` returns it."""

    layout: ClassVar[str] = "multrace average contributions 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    queries: str | None
    """The token group that attended; None if positions were given."""
    reduction: Reduction
    """The reduction of the tokens of a group to one number."""
    groups: tuple[str, ...]
    """The source groups."""
    count: int
    """Number of prompts."""
    contributions: Mean
    """(group, layer), in units of the residual stream: length of the contribution."""
    weights: Mean
    """(group, layer): attention weight, mean over heads."""
    share: float
    """The share of the picture's contributions that `image_tokens` hold."""
    image_tokens: Mean | None
    """(layer,): number of image tokens that hold that share; None if pictures were not read."""
    image_count: int | None
    """Number of image tokens of a prompt; None if pictures were not read or differ in size."""
    image_shares: Mean | None
    """(layer, bin): share of the picture's contributions by index of the image token; None if `image_count` is None."""

    def by_layer(self, group: str, *, of: Quantity = "contribution") -> Tensor:
        """Return the mean contribution (layer,) of a group. Raises `TraceError` for a group that was not averaged."""
        return self._of(of).mean[self._index(group, of)]

    def interval(self, group: str, *, of: Quantity = "contribution") -> tuple[Tensor, Tensor]:
        """Return (low, high), each (layer,): the 95 % interval of `by_layer` over prompts, by Student's t.

        Raises `ArtefactError` for an average of one prompt.
        """
        index = self._index(group, of)
        low, high = self._of(of).interval()
        return low[index], high[index]

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per quantity, group and layer: mean over prompts, its 95 % interval, and n.

        quantity is contribution, weight, or "image tokens" for the group image. low and high are NaN where n is 1.
        """
        frames = {of: _frame(self.groups, self._of(of)) for of in UNITS}
        if self.image_tokens is not None:
            frames["image tokens"] = _frame(("image",), self.image_tokens[None])
        return stacked_frame(frames, "quantity")

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with contribution and weight by layer, and the number of tokens that hold `share`.

        The figure is also written to the path if one is given (png, pdf or svg by suffix).
        """
        charts = [
            Chart(unit=unit, lines=[_line(group, self._of(of)[index]) for index, group in enumerate(self.groups)])
            for of, unit in UNITS.items()
        ]
        if self.image_tokens is not None:
            line = _line(f"tokens for {self.share:.0%}", self.image_tokens)
            charts.append(Chart(unit=f"image tokens that hold {self.share:.0%}", lines=[line]))
        bands = "; bands: 95% intervals over prompts" if self.count > 1 else ""
        subtitle = f"Mean over {self.count} prompts, {REDUCED[self.reduction]} of each group of sources{bands}"
        titles = f"What attention contributes to {name_of(self.queries)}", subtitle
        return drawing.finished(layers_figure(charts, [], titles=titles), path)

    def plot_histogram(self, path: str | Path | None = None, *, layers: Sequence[int]) -> "Figure":
        """Return a figure with the share of contributions by index of the image token, in some layers.

        Bars are means over prompts with their 95 % intervals.

        Args:
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            layers: The layers to draw, one panel each.

        Raises:
            TraceError: If pictures were not read or differ in size, or if layers are missing or unknown.
            ArtefactError: If the file cannot be written.
        """
        if self.image_shares is None or self.image_count is None:
            raise TraceError("there are no shares by index here; average prompts whose sources hold pictures of a size")
        count = self.image_shares.shape[0]
        if not layers or not all(-count <= layer < count for layer in layers):
            raise TraceError(f"no layers {tuple(layers)} here; pass some of 0 to {count - 1}")
        shares = self.image_shares[list(layers)]
        ends = shares.band() if self.count > 1 else None
        titles = (
            f"Where in the picture contributions to {name_of(self.queries)} come from",
            f"Share by index of the image token, mean over {self.count} prompts"
            + ("; lines: 95% intervals over prompts" if ends else ""),
        )
        captions = [f"layer {layer % count}" for layer in layers]
        figure = shares_figure(shares.mean, captions=captions, count=self.image_count, titles=titles, ends=ends)
        return drawing.finished(figure, path)

    def _of(self, quantity: str) -> Mean:
        """Return the mean (group, layer) of a quantity."""
        return self.weights if quantity == "weight" else self.contributions

    def _index(self, group: str, of: str) -> int:
        if of not in UNITS or group not in self.groups:
            raise TraceError(
                f"no {of} of {group!r} in this average; pass 'contribution' or 'weight' and one of the groups "
                f"{', '.join(self.groups)}"
            )
        return self.groups.index(group)

    def _lines(self) -> tuple[str, str]:
        place = int(self.contributions.mean.argmax())
        group, layer = divmod(place, self.contributions.shape[1])
        return (
            f"AverageContributions of {name_of_model(self.model)} over {self.count} prompts, to "
            f"{name_of(self.queries)} from {', '.join(self.groups)}",
            f"longest mean contribution {float(self.contributions.mean.max()):.3g}, of {name_of(self.groups[group])} "
            f"in layer {layer}",
        )

    def _problem(self) -> str | None:
        layers = self.contributions.shape[-1]
        fits = [part.fits(len(self.groups), layers) for part in (self.contributions, self.weights)]
        fits += [self.image_tokens is None or self.image_tokens.fits(layers)]
        fits += [self.image_shares is None or self.image_shares.shape[0] == layers]
        return None if all(fits) else "its tensors are of other shapes than its layers and groups"


class ContributionsAverager(Averager[AttentionContributions, AverageContributions]):
    """Average the contributions of source groups by layer, over prompts of one model with the same queries.

    Args:
        groups: Source groups, which all results must hold; by default those among constraint, image and last
            token that all results hold.
        reduction: How the tokens of a group are reduced to one number, as in `AttentionContributions.by_layer`.
        share: Share of the picture's contributions whose image tokens are counted, if all results hold the picture.
        bins: Number of bins for the shares by index of the image token.
    """

    alike = ("model", "revision", "layers", "queries")

    def __init__(
        self,
        *,
        groups: Sequence[str] | None = None,
        reduction: Reduction = "max",
        share: float = 0.8,
        bins: int = 16,
    ) -> None:
        super().__init__()
        self._groups, self._reduction, self._share, self._bins = groups, reduction, share, bins
        self._image_counts: list[int] = []

    def _take(self, result: AttentionContributions) -> None:
        names = [name for name in _USUAL if name in result.source_groups] if self._groups is None else self._groups
        axes = {"group": names, "layer": range(result.layers)}
        for of in UNITS if names else ():
            values = [result.by_layer(name, of=of, reduction=self._reduction) for name in names]
            self._add(of, torch.stack(values), axes)
        if "image" in result.source_groups:
            mass, layers = result.image_mass(), {"layer": range(result.layers)}
            self._image_counts.append(mass.shape[-1])
            self._add("image tokens", tokens_for_share(mass, self._share), layers)
            if len(set(self._image_counts)) == 1:
                bins = min(self._bins, mass.shape[-1])
                self._add("image shares", index_shares(mass, bins), layers | {"bin": range(bins)})

    def _average(self) -> AverageContributions:
        means = {of: self._mean(of) for of in UNITS if of in self._means}
        names = self._labels("contribution", "group") if means else ()
        held = [index for index in range(len(names)) if int(means["contribution"].count[index].max()) == self.count]
        if not held:
            raise TraceError("these results have no group of sources in common; pass groups=, or read the same sources")
        has_images = len(self._image_counts) == self.count
        is_one_size = has_images and len(set(self._image_counts)) == 1
        return AverageContributions(
            model=self.first.model,
            revision=self.first.revision,
            queries=self.first.queries,
            reduction=self._reduction,
            groups=tuple(names[index] for index in held),
            count=self.count,
            contributions=means["contribution"][held],
            weights=means["weight"][held],
            share=self._share,
            image_tokens=self._mean("image tokens") if has_images else None,
            image_count=self._image_counts[0] if is_one_size else None,
            image_shares=self._mean("image shares") if is_one_size else None,
        )


def _line(label: str, mean: Mean) -> Line:
    low, high = mean.band()
    return Line(label=label, values=mean.mean, low=low, high=high)


def _frame(groups: Sequence[str], mean: Mean) -> "pd.DataFrame":
    """Return a table of a mean (group, layer)."""
    low, high = mean.band()
    axes = {"group": groups, "layer": range(mean.shape[-1])}
    return long_frame(axes, {"mean": mean.mean, "low": low, "high": high, "n": mean.count})
