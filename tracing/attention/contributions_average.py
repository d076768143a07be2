"""Averages of attention contributions over prompts by layer, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import mean_interval
from ..errors import TraceError
from .contributions_plot import Chart, Line, draw_layers, draw_shares
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

_LAYOUT = "multrace average contributions 1"
_USUAL = ("constraint", "image", "last")


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageContributions:
    """What groups of tokens bring to the queries by layer, in several prompts. Made by `average_contributions`."""

    model: str
    """Name or path of the model."""
    revision: str | None
    queries: str | None
    """The group of tokens that attended; None for positions."""
    reduction: Reduction
    """How the tokens of a group became one number."""
    contributions: Mapping[str, Tensor]
    """Per group (prompt, layer), in units of the residual stream: length of contribution."""
    weights: Mapping[str, Tensor]
    """Per group (prompt, layer): attention weight, mean over heads."""
    share: float
    """The share of the picture's contributions that `image_tokens` hold."""
    image_tokens: Tensor | None
    """(prompt, layer): how many image tokens hold that share; None where pictures were not read."""
    image_count: int | None
    """How many image tokens a prompt has; None where pictures were not read or differ in size."""
    image_shares: Tensor | None
    """(prompt, layer, bin): share of the picture's contributions by index of the image token; None as above."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of sources."""
        return tuple(self.contributions)

    @property
    def count(self) -> int:
        """How many prompts were averaged."""
        return len(next(iter(self.contributions.values())))

    def by_layer(self, group: str, *, of: Quantity = "contribution") -> Tensor:
        """(layer,): mean over prompts of what the group brings. TraceError for a group that was not averaged."""
        return self._values(group, of).mean(0)

    def interval(self, group: str, *, of: Quantity = "contribution") -> tuple[Tensor, Tensor]:
        """(low, high), each (layer,): 95 % interval of `by_layer` over prompts, by Student's t.

        TraceError for an average of one prompt.
        """
        return mean_interval(self._values(group, of))

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AverageContributions":
        """What `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per quantity, group and layer: mean over prompts, its 95 % interval, and n.

        quantity: contribution, weight, or "image tokens" for the group image. low and high are NaN where n is 1.
        """
        found = [(of, group, self._values(group, of)) for of in UNITS for group in self.groups]
        if self.image_tokens is not None:
            found.append(("image tokens", "image", self.image_tokens))
        return pd.concat([_frame(of, group, values) for of, group, values in found], ignore_index=True)

    def plot(self, path: str | Path) -> Path:
        """The written picture (png, pdf, svg): contribution and weight by layer, and tokens of the picture's share."""
        charts = [
            Chart(unit=unit, lines=[_line(group, self._values(group, of)) for group in self.groups])
            for of, unit in UNITS.items()
        ]
        if self.image_tokens is not None:
            line = _line(f"tokens for {self.share:.0%}", self.image_tokens)
            charts.append(Chart(unit=f"image tokens that hold {self.share:.0%}", lines=[line]))
        band = "; bands: 95% intervals over prompts" if self.count > 1 else ""
        subtitle = f"Mean over {self.count} prompts, {REDUCED[self.reduction]} of each group of sources{band}"
        return draw_layers(path, charts, [], titles=(f"What attention brings to {name_of(self.queries)}", subtitle))

    def plot_histogram(self, path: str | Path, layers: Sequence[int]) -> Path:
        """The written picture: where by index of the image token contributions come from, in these layers.

        Bars are means over prompts with their 95 % intervals. TraceError where pictures were not read or differ in
        size, and for layers that are not there.
        """
        if self.image_shares is None or self.image_count is None:
            raise TraceError("there are no shares by index here; average prompts whose sources hold pictures of a size")
        count = self.image_shares.shape[1]
        if not layers or not all(-count <= layer < count for layer in layers):
            raise TraceError(f"no layers {tuple(layers)} here; pass some of 0 to {count - 1}")
        shares = self.image_shares[:, list(layers)]
        ends = mean_interval(shares) if self.count > 1 else None
        titles = (
            f"Where in the picture contributions to {name_of(self.queries)} come from",
            f"Share by index of the image token, mean over {self.count} prompts"
            + ("; lines: 95% intervals over prompts" if ends else ""),
        )
        captions = [f"layer {layer % count}" for layer in layers]
        return draw_shares(path, shares.nanmean(0), captions=captions, count=self.image_count, titles=titles, ends=ends)

    def _values(self, group: str, of: Quantity) -> Tensor:
        """(prompt, layer)"""
        values = {"contribution": self.contributions, "weight": self.weights}.get(of)
        if values is None or group not in values:
            raise TraceError(
                f"no {of} of {group!r} in this average; pass 'contribution' or 'weight' and one of the groups "
                f"{', '.join(self.groups)}"
            )
        return values[group]


def average_contributions(
    results: Sequence[AttentionContributions],
    *,
    groups: Sequence[str] | None = None,
    reduction: Reduction = "max",
    share: float = 0.8,
    bins: int = 16,
) -> AverageContributions:
    """What groups of sources bring to the queries by layer, over prompts of one model that were asked alike.

    groups: of sources; if not given, those of constraint, image and last token that all results hold. reduction: as in
    `AttentionContributions.by_layer`. share, bins: for the picture, where all results hold it: how many tokens hold
    this share, and the shares of so many bins by index. TraceError for no results, for results that differ in model,
    layers or queries, and for groups that one of them does not hold.
    """
    first = _check_alike(results)
    held = [group for group in _USUAL if all(group in each.source_groups for each in results)]
    names = tuple(groups) if groups is not None else tuple(held)
    if not names:
        raise TraceError("these results have no group of sources in common; pass groups=, or read the same sources")
    masses = [each.image_mass() for each in results] if "image" in held else []
    sizes = {mass.shape[-1] for mass in masses}
    return AverageContributions(
        model=first.model,
        revision=first.revision,
        queries=first.queries,
        reduction=reduction,
        contributions={name: _stack(results, name, "contribution", reduction) for name in names},
        weights={name: _stack(results, name, "weight", reduction) for name in names},
        share=share,
        image_tokens=torch.stack([tokens_for_share(mass, share) for mass in masses]).double() if masses else None,
        image_count=next(iter(sizes)) if len(sizes) == 1 else None,
        image_shares=torch.stack([index_shares(mass, min(bins, *sizes)) for mass in masses]) if masses else None,
    )


def _check_alike(results: Sequence[AttentionContributions]) -> AttentionContributions:
    if not results:
        raise TraceError("no contributions to average; pass at least one")
    for name in ("model", "revision", "layers", "queries"):
        found = {getattr(each, name): None for each in results}
        if len(found) > 1:
            raise TraceError(f"these differ in their {name} ({' and '.join(map(str, found))}); average equal ones only")
    return results[0]


def _stack(results: Sequence[AttentionContributions], group: str, of: Quantity, reduction: Reduction) -> Tensor:
    return torch.stack([each.by_layer(group, of=of, reduction=reduction).double() for each in results])


def _ends(values: Tensor) -> tuple[Tensor, Tensor] | None:
    return mean_interval(values) if len(values) > 1 else None


def _line(label: str, values: Tensor) -> Line:
    low, high = _ends(values) or (None, None)
    return Line(label=label, values=values.mean(0), low=low, high=high)


def _frame(quantity: str, group: str, values: Tensor) -> pd.DataFrame:
    unknown = torch.full_like(values[0], torch.nan)
    low, high = _ends(values) or (unknown, unknown)
    frame = long_frame([("layer", range(values.shape[1]))], {"mean": values.mean(0), "low": low, "high": high})
    frame.insert(0, "group", group)
    frame.insert(0, "quantity", quantity)
    return frame.assign(n=len(values))


def _problem(result: AverageContributions) -> str | None:
    """What does not fit together in an average that was read from a file."""
    shapes = {values.shape for values in (*result.contributions.values(), *result.weights.values())}
    fits = [len(shapes) == 1, tuple(result.weights) == result.groups]
    shape = next(iter(shapes), ())
    fits += [each is None or each.shape[:2] == shape for each in (result.image_tokens, result.image_shares)]
    return None if all(fits) else "its tensors are of other shapes than its prompts, layers and groups"
