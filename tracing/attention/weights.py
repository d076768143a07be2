"""Attention weights by part of the prompt: the shares that each part receives, and the saliency of single edges.

A share states how much of a token's attention goes to the picture and to each part of the text. The saliency, attention
times gradient, is the first-order importance of an attention edge to the answer's loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean
from ...artefacts.drawing.styles import flow_styles, name_of_model
from ...artefacts.results import Result, long_frame
from ...models import Prompt, VisionLanguageModel
from ...models.replay.attending import attending
from ..engine.cells import TraceError
from ..engine.positions import Positions, group_positions, named_positions
from .image_tokens import ImageReading, predicting_logits, reading_fields, with_answer

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SHARE_UNIT = "share of attention"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttentionShare(Result):
    """The share of one prompt's attention that each part of it receives. `attention_share` returns it."""

    layout: ClassVar[str] = "multrace attention share 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    question: str
    tokens: tuple[str, ...]
    """The tokens up to the last query, one readable string per position."""
    queries: tuple[int, ...]
    """Positions that attend; shares are averaged over them."""
    parts: Mapping[str, tuple[int, ...]]
    """Positions that are attended to, by part; each position up to the last query belongs to one part."""
    heads: Tensor
    """(layer, head, part) float64, 0 to 1: the parts of a head sum to one."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts."""
        return tuple(self.parts)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.heads)

    @property
    def shares(self) -> Tensor:
        """(layer, part) float64: mean over heads."""
        return self.heads.mean(1)

    def of(self, part: str) -> Tensor:
        """Return the share (layer,) float64 of one part, mean over heads. Raises `TraceError` for an unknown part."""
        return self.shares[:, _index(self.names, part)]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with one line per part over the layers.

        The figure is also written to the path if one is given (png, pdf or svg by suffix).
        """
        layers = torch.arange(self.layers)
        panel = drawing.CurvePanel(curves=[drawing.Curve(label=part, x=layers, y=self.of(part)) for part in self.parts])
        titles = self.question, f"where the attention of {self._queries} goes, mean over heads"
        return drawing.finished(drawing.curves_figure([panel], titles=titles, y_label=_SHARE_UNIT), path)

    def _axes(self) -> Mapping[str, Sequence[Any]]:
        layers, heads, _ = self.heads.shape
        return {"layer": range(layers), "head": range(heads), "part": self.names}

    def _columns(self) -> Mapping[str, Tensor]:
        return {"share": self.heads}

    @property
    def _queries(self) -> str:
        count = len(self.queries)
        return f"token {self.tokens[self.queries[0]]!r}" if count == 1 else f"{count} tokens"

    def _lines(self) -> tuple[str, str]:
        return (
            f"AttentionShare of {name_of_model(self.model)}: {self.question!r}, attention of {self._queries}",
            f"mean over layers and heads: {_percentages(self.names, self.shares)}",
        )

    def _problem(self) -> str | None:
        fits = self.heads.ndim == 3 and self.heads.shape[2] == len(self.parts)
        if any(not 0 <= query < len(self.tokens) for query in self.queries):
            return f"its queries are not among its {len(self.tokens)} tokens"
        return None if fits else "its shares are of another shape than its parts"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageShare(Result):
    """Mean attention shares of several prompts. `average` returns it."""

    layout: ClassVar[str] = "multrace average attention share 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    names: tuple[str, ...]
    """The names of the parts."""
    count: int
    """Number of prompts."""
    share: Mean
    """(layer, part): mean over heads, 0 to 1, over prompts."""

    @property
    def shares(self) -> Tensor:
        """(layer, part) float64: mean over prompts."""
        return self.share.mean

    def of(self, part: str) -> Tensor:
        """Return the mean share (layer,) float64 of one part. Raises `TraceError` for an unknown part."""
        return self.shares[:, _index(self.names, part)]

    def interval(self) -> tuple[Tensor, Tensor]:
        """Return (low, high), each (layer, part): the 95 % interval of the mean over prompts, by Student's t.

        Raises `ArtefactError` for an average of one prompt.
        """
        return self.share.interval()

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with one line per part over the layers, with its 95 % interval as a band.

        The figure is also written to the path if one is given (png, pdf or svg by suffix).
        """
        low, high = self.share.band()
        layers = torch.arange(len(self.shares))
        curves = [
            drawing.Curve(label=part, x=layers, y=self.of(part), low=low[:, index], high=high[:, index])
            for index, part in enumerate(self.names)
        ]
        bands = "; bands: 95% interval of the mean over prompts" if self.count > 1 else ""
        titles = f"Where attention goes, mean over {self.count} prompts", f"mean over heads{bands}"
        figure = drawing.curves_figure([drawing.CurvePanel(curves=curves)], titles=titles, y_label=_SHARE_UNIT)
        return drawing.finished(figure, path)

    def _axes(self) -> Mapping[str, Sequence[Any]]:
        return {"layer": range(len(self.shares)), "part": self.names}

    def _columns(self) -> Mapping[str, Tensor]:
        low, high = self.share.band()
        return {"share": self.shares, "low": low, "high": high, "n": self.share.count}

    def _lines(self) -> tuple[str, str]:
        return (
            f"AverageShare of {name_of_model(self.model)} over {self.count} prompts",
            f"mean over layers and heads: {_percentages(self.names, self.shares)}",
        )

    def _problem(self) -> str | None:
        fits = self.shares.ndim == 2 and self.share.fits(len(self.shares), len(self.names))
        return None if fits else "its shares are of another shape than its parts"


class ShareAverager(Averager[AttentionShare, AverageShare]):
    """Average shares over prompts of one model with the same parts."""

    alike = ("model", "revision", "layers", "names")

    def _take(self, result: AttentionShare) -> None:
        self._add("share", result.shares, {"layer": range(result.layers), "part": result.names})

    def _average(self) -> AverageShare:
        first = self.first
        return AverageShare(
            model=first.model,
            revision=first.revision,
            names=first.names,
            count=self.count,
            share=self._mean("share"),
        )


def _index(parts: Sequence[str], part: str) -> int:
    """Return the index of a part among the parts."""
    if part not in parts:
        raise TraceError(f"no part {part!r} here; parts are {', '.join(map(repr, parts))}")
    return parts.index(part)


def _percentages(names: Sequence[str], shares: Tensor) -> str:
    """Return a description of shares (layer, part)."""
    return ", ".join(f"{name} {float(share):.1%}" for name, share in zip(names, shares.mean(0), strict=True))


def attention_share(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    queries: Positions = "last",
    parts: Mapping[str, str | int | Sequence[int]] | None = None,
) -> AttentionShare:
    """Return the share of the queries' attention that each part of the prompt receives, by decoder layer and head.

    Shares are averaged over the queries and sum to one in each head.

    Args:
        vlm: The model.
        prompt: The prompt.
        queries: The tokens that attend: groups, positions or both (default: the last token).
        parts: Positions by name of the part; no position may belong to two parts, and the part "other" holds the
            remaining tokens up to the last query. None takes "image", "system" (everything before the first
            picture) and "question" (all other text).

    Returns:
        An `AttentionShare`.

    Raises:
        TraceError: If no parts are given and the prompt has no picture, or if parts overlap or hold no token that a
            query can see.
        ModelError: If the prompt does not have a position.

    Source: arXiv 2406.06579, section 3 (lambda_img, lambda_sys, lambda_usr of the last token; after layer 3 the share
    of the image is below 2 % in LLaVA-1.5).

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.tracing import attention_share
        >>> from PIL import Image
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(Image.new("RGB", (64, 64), "red"), "What colour is this?")
        >>> share = attention_share(vlm, prompt)
        >>> tuple(share.parts), share.of("image").shape  # one number per layer
        (('system', 'image', 'question'), torch.Size([8]))
    """
    rows = tuple(sorted(named_positions(prompt, queries)))
    end = max(rows) + 1
    members = text_parts(prompt, end) if parts is None else _given_parts(prompt, parts, end)
    with torch.no_grad():
        entering = vlm.decoder_input(prompt).cut(end)
        with attending(vlm, rows) as attention:
            vlm.forward(entering, positions=[end - 1])
    return AttentionShare(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens[:end],
        queries=rows,
        parts=members,
        heads=torch.stack([_shares(layer.weights[0], members) for layer in attention]),
    )


def text_parts(prompt: Prompt, end: int) -> dict[str, tuple[int, ...]]:
    """Return the first `end` positions as "system" (before the first picture), "image" and "question" (other text).

    A part may be empty. Raises `TraceError` if the prompt has no picture.
    """
    image = group_positions(prompt, "image")
    members = {"system": range(min(image)), "image": image, "question": set(range(min(image), end)) - set(image)}
    return {name: tuple(place for place in sorted(places) if place < end) for name, places in members.items()}


def _given_parts(
    prompt: Prompt, parts: Mapping[str, str | int | Sequence[int]], end: int
) -> dict[str, tuple[int, ...]]:
    """Return the requested parts within the first `end` positions, and the remaining positions as "other"."""
    members: dict[str, tuple[int, ...]] = {}
    free = set(range(end))
    for name, requested in parts.items():
        places = sorted({position for position in prompt.positions(requested) if position < end})
        if not places:
            raise TraceError(f"part {name!r} ({requested!r}) holds no token that a query can see; leave it out")
        if not free.issuperset(places):
            twice = sorted(set(places) - free)
            raise TraceError(
                f"part {name!r} shares the positions {twice} with another part; give each position to one part, "
                "such as list(set(prompt.groups[...]) - set(...))"
            )
        free -= set(places)
        members[name] = tuple(places)
    if free and "other" in members:
        raise TraceError(f"a part is called 'other', which is what parts leave ({sorted(free)}); give it another name")
    return members | ({"other": tuple(sorted(free))} if free else {})


def _shares(weights: Tensor, members: Mapping[str, Sequence[int]]) -> Tensor:
    """Return shares (head, part) float64 on the CPU: weights (head, query, key) summed by part, mean over queries."""
    mean = weights.double().mean(1).cpu()
    return torch.stack([mean[:, list(positions)].sum(-1) for positions in members.values()], dim=-1)


_SALIENCY_UNIT = "log10 of saliency per edge"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttentionSaliency(ImageReading):
    """The importance of each attention edge to the answer's loss. `attention_saliency` returns it."""

    layout: ClassVar[str] = "multrace attention saliency 2"

    tokens: tuple[str, ...]
    """The tokens up to the last query, one readable string per position."""
    loss: float
    """The loss that was differentiated: minus the log probability of the answer's first token, or of all its tokens."""
    queries: tuple[int, ...]
    """Positions that attend, in the order of the rows."""
    groups: Mapping[str, tuple[int, ...]]
    """Positions by disjoint group: "system" (before the picture), "image", "last", "question" (all else)."""
    saliency: Tensor
    """(layer, query, source) float64, at least 0: |sum over heads of weight times gradient|; 0 after the query."""

    def flow(self, source: str | Sequence[int], target: str | Sequence[int]) -> Tensor:
        """Return the mean saliency (layer,) float64 of the edges from source to target tokens.

        These are S_wp and S_pq of arXiv 2305.14160, section 2.1. An edge leads from a token to a later token, never to
        itself. The flow is NaN if there is no edge.

        Args:
            source: A group or positions.
            target: A group or positions; only positions among the queries count.

        Raises:
            TraceError: If a group or position is unknown.
        """
        rows = [index for index, query in enumerate(self.queries) if query in set(self._positions(target))]
        columns = list(self._positions(source))
        queries = torch.tensor([self.queries[row] for row in rows], dtype=torch.long)
        are_edges = torch.tensor(columns, dtype=torch.long)[None, :] < queries[:, None]
        return self.saliency[:, rows][..., columns][:, are_edges].mean(-1)

    @property
    def flows(self) -> dict[str, Tensor]:
        """`flow` (layer,) float64 by "source -> target", for all pairs of groups that have edges."""
        pairs = ((source, target) for target in self.groups for source in self.groups)
        flows = {f"{source} -> {target}": self.flow(source, target) for source, target in pairs}
        return {name: flow for name, flow in flows.items() if not flow.isnan().all()}

    def image_map(self, target: str | Sequence[int] | None = None) -> Tensor:
        """Return the mean saliency (layer, image token) float64 over the queries, or over those of a target.

        Raises `TraceError` if the target contains no queries.
        """
        members = self.queries if target is None else self._positions(target)
        rows = [index for index, query in enumerate(self.queries) if query in set(members)]
        if not rows:
            raise TraceError(f"none of the queries {self.queries} is in {target!r}; read again with these queries")
        return self.saliency[:, rows][..., list(self.image_positions)].mean(1)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with all flows over the layers, on a logarithmic scale.

        A line has a gap where its flow is exactly zero, and the subtitle says which flows end and why. The figure is
        also written to the path if one is given (png, pdf or svg by suffix).
        """
        curves = _curves(self.layers, {name: (flow,) for name, flow in self.flows.items()})
        title, subtitle = self._titles("mean over edges")
        titles = title, subtitle + _ends(self.flows, self.layers)
        panels = [drawing.CurvePanel(curves=curves)]
        return drawing.finished(
            drawing.curves_figure(panels, titles=titles, y_label=_SALIENCY_UNIT, reference=None), path
        )

    def overlay(
        self,
        prompt: Prompt,
        path: str | Path | None = None,
        layers: Sequence[int] | None = None,
        target: str | Sequence[int] | None = None,
    ) -> "Figure":
        """Return a figure with the saliency of image tokens over the picture as the model saw it.

        Args:
            prompt: The prompt that was read.
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            layers: The layers to draw, one panel each; by default those with at least a tenth of the largest saliency,
                at most four. The caption states how they were chosen.
            target: The queries that count, as in `image_map`.

        Raises:
            TraceError: If the prompt is another one, if a layer does not exist, or if the image tokens form no grid.
            ArtefactError: If the file cannot be written.
        """
        grid = self.over_picture(self.image_map(target))
        rows = drawing.strongest(grid) if layers is None else self._rows_of(layers)
        overlays = [drawing.Overlay(title=f"layer {self.layers[row]}", values=grid[row]) for row in rows]
        name = "all queries" if target is None else target if isinstance(target, str) else "some queries"
        rule = "" if layers is not None else f"\nshown: {drawing.choice_in_words(grid, rows, quantity='saliency')}"
        titles = self._titles(f"to {name}{rule}")
        return self._overlay(prompt, path, overlays, kind="attention", titles=titles, unit="saliency")

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per layer, query and source (token positions): their groups and the saliency."""
        sources = range(self.saliency.shape[2])
        axes = {"layer": self.layers, "query": self.queries, "source": sources}
        frame = long_frame(axes, {"saliency": self.saliency})
        names = {position: name for name, positions in self.groups.items() for position in positions}
        frame.insert(2, "query_group", frame["query"].map(names))
        frame.insert(4, "source_group", frame["source"].map(names))
        return frame

    def _positions(self, members: str | Sequence[int]) -> tuple[int, ...]:
        """Return the positions of a group, or the given positions."""
        if isinstance(members, str) and members not in self.groups:
            raise TraceError(f"no group {members!r} here; pass {', '.join(map(repr, self.groups))}, or positions")
        positions = self.groups[members] if isinstance(members, str) else tuple(members)
        unknown = [position for position in positions if not 0 <= position < self.saliency.shape[2]]
        if unknown:
            raise TraceError(f"no position {unknown[0]} here; pass some of 0 to {self.saliency.shape[2] - 1}")
        return positions

    def _titles(self, what: str) -> tuple[str, str]:
        """Return the title and subtitle of figures."""
        return self.question, f"attention x gradient of the loss of {self.answer!r} ({self.loss:.3g}); {what}"

    def _lines(self) -> tuple[str, str]:
        return (
            f"AttentionSaliency of {name_of_model(self.model)}: {self.question!r} -> {self.answer!r}",
            f"loss {self.loss:.3g}; {_strongest(self.flows, self.layers)}",
        )

    def _problem(self) -> str | None:
        fits = self.saliency.shape == (len(self.layers), len(self.queries), len(self.tokens))
        return None if fits else "its saliency is of another shape than its layers, queries and tokens"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageSaliency(Result):
    """Mean saliency of flows between groups of tokens, over prompts. `average` returns it.

    Flows of different prompts differ by orders of magnitude, so a few large flows would dominate an arithmetic mean.
    Means are therefore geometric, and their intervals are those of the mean of the logarithms. A flow that is exactly
    zero has no logarithm: it is excluded from mean and interval, and `zeros` counts it. If the flow is zero only in
    some prompts, the mean describes the others.
    """

    layout: ClassVar[str] = "multrace average attention saliency 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    layers: tuple[int, ...]
    """The decoder layers that were read, in order."""
    count: int
    """Number of prompts."""
    flows: tuple[str, ...]
    """The flows between two groups that at least one prompt has, named "source -> target"."""
    log: Mean
    """(flow, layer): log10 of the mean saliency per edge, over the prompts in which it is above zero."""
    zero: Mean
    """(flow, layer): 1 where the flow is exactly zero, else 0, over the prompts that have it."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of prompts that have each flow, zero or not."""
        return dict(zip(self.flows, self.zero.count.amax(1).tolist(), strict=True))

    def of(self, flow: str) -> Tensor:
        """Return the geometric mean (layer,) float64 over the prompts in which the flow is above zero.

        It is NaN where the flow is zero in all prompts. Raises `TraceError` if no prompt has the flow.
        """
        return 10 ** self.log.mean[self._index(flow)]

    def interval(self, flow: str) -> tuple[Tensor, Tensor]:
        """Return (low, high), each (layer,): the 95 % interval of `of` over prompts, by Student's t on the logarithms.

        Both ends are NaN where the flow is above zero in fewer than two prompts. Raises `ArtefactError` for an average
        of one prompt, and `TraceError` if no prompt has the flow.
        """
        index = self._index(flow)
        low, high = self.log.band() if self.count > 1 else self.log.interval()
        return 10 ** low[index], 10 ** high[index]

    def zeros(self, flow: str) -> Tensor:
        """Return the number (layer,) int64 of prompts in which the flow is exactly zero.

        Raises `TraceError` if no prompt has the flow.
        """
        return self._zeros[self._index(flow)]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with all flows over the layers, on a logarithmic scale, with 95 % bands.

        A line has a gap where its flow is zero in every prompt. The legend shows the number of prompts that have a flow
        if it differs between flows. The figure is also written to the path if one is given (png, pdf or svg by suffix).
        """
        low, high = self.log.band()
        counts, means = self.counts, 10**self.log.mean
        names = {flow: flow if counts[flow] == self.count else f"{flow} (n = {counts[flow]})" for flow in self.flows}
        parts = zip(self.flows, means, 10**low, 10**high, strict=True)
        curves = _curves(self.layers, {flow: ends for flow, *ends in parts}, names)
        title, subtitle = self._titles
        flows = dict(zip(self.flows, means.nan_to_num(0.0), strict=True))
        titles, panels = (title, subtitle + _ends(flows, self.layers)), [drawing.CurvePanel(curves=curves)]
        return drawing.finished(
            drawing.curves_figure(panels, titles=titles, y_label=_SALIENCY_UNIT, reference=None), path
        )

    def _axes(self) -> Mapping[str, Sequence[Any]]:
        return {"flow": self.flows, "layer": self.layers}

    def _columns(self) -> Mapping[str, Tensor]:
        """Return the geometric mean, its interval, n (prompts in the mean), and zeros (prompts with a flow of zero)."""
        low, high = self.log.band()
        ends = {"saliency": 10**self.log.mean, "low": 10**low, "high": 10**high}
        return ends | {"n": self.log.count, "zeros": self._zeros}

    @property
    def _zeros(self) -> Tensor:
        """(flow, layer) int64: the number of prompts in which the flow is exactly zero."""
        return (self.zero.mean.nan_to_num(0.0) * self.zero.count).round().long()

    def _index(self, flow: str) -> int:
        if flow not in self.flows:
            raise TraceError(f"no flow {flow!r} in this average; pass {', '.join(map(repr, self.flows))}")
        return self.flows.index(flow)

    @property
    def _titles(self) -> tuple[str, str]:
        """Title and subtitle of the figure."""
        over = f"geometric mean over {self.count} prompts" if self.count > 1 else "one prompt"
        bands = "; bands: 95% intervals of the mean" if self.count > 1 else ""
        is_partly_zero = ((self._zeros > 0) & (self.log.count > 0)).any()
        zeros = "\nwhere a flow is zero in some prompts, it is the mean of the others" if is_partly_zero else ""
        return "What the answer rests on", f"attention x gradient of its loss, {over}{bands}{zeros}"

    def _lines(self) -> tuple[str, str]:
        flows = {flow: self.of(flow) for flow in self.flows}
        return (
            f"AverageSaliency of {name_of_model(self.model)} over {self.count} prompts",
            f"geometric means; {_strongest(flows, self.layers)}",
        )

    def _problem(self) -> str | None:
        shape = (len(self.flows), len(self.layers))
        if not (self.log.fits(*shape) and self.zero.fits(*shape)) or 0 in shape:
            return "its flows are of another shape than its names and layers"
        return "more of its flows are above zero than there are" if (self.log.count > self.zero.count).any() else None


class SaliencyAverager(Averager[AttentionSaliency, AverageSaliency]):
    """Average flows over prompts of one model; a prompt without a flow does not count towards that flow."""

    alike = ("model", "revision", "layers")

    def _take(self, result: AttentionSaliency) -> None:
        flows = result.flows
        if not flows:
            return
        values, axes = torch.stack([*flows.values()]), {"flow": tuple(flows), "layer": result.layers}
        self._add("log", values.masked_fill(values == 0, torch.nan).log10(), axes)
        self._add("zero", (values == 0).double().masked_fill(values.isnan(), torch.nan), axes)

    def _average(self) -> AverageSaliency:
        if not self._means:
            raise TraceError("these saliencies have no flow between groups; read them again with later queries")
        return AverageSaliency(
            **{name: getattr(self.first, name) for name in self.alike},
            count=self.count,
            flows=self._labels("zero", "flow"),
            log=self._mean("log"),
            zero=self._mean("zero"),
        )


def _curves(
    layers: Sequence[int], flows: Mapping[str, Sequence[Tensor]], names: Mapping[str, str] | None = None
) -> "list[drawing.Curve]":
    """Return one curve per flow: log10 of its values (layer,), with a band if there is one; zeros leave gaps."""
    x, curves = torch.tensor(layers), []
    for (name, parts), style in zip(flows.items(), flow_styles(tuple(flows)), strict=True):
        y, *band = (part.masked_fill(part == 0, torch.nan).log10() for part in parts)
        ends = dict(zip(("low", "high"), band, strict=True)) if band else {}
        curves.append(drawing.Curve(label=names[name] if names else name, x=x, y=y, style=style, **ends))
    return curves


def _ends(flows: Mapping[str, Tensor], layers: Sequence[int]) -> str:
    """Return a subtitle line about flows (layer,) that are exactly zero in the last layers."""
    last = {name: int(flow.nonzero().max()) for name, flow in flows.items() if flow.any()}
    early = {name: layers[index] for name, index in last.items() if index < len(layers) - 1}
    if not early or len(set(early.values())) > 1:
        return "\na line has a gap where its flow is exactly zero" if early else ""
    targets = {name.split(" -> ")[1] for name in early}
    reason = "" if "last" in targets else ": what these tokens read there no longer reaches the answer"
    into = " and ".join(sorted(targets))
    return f"\nflows into the {into} are exactly zero after layer {next(iter(early.values()))}{reason}"


def _strongest(flows: Mapping[str, Tensor], layers: Sequence[int]) -> str:
    """Return a description of the strongest flow (layer,)."""
    peaks = {name: flow.nan_to_num(nan=0.0).max(0) for name, flow in flows.items()}
    name, peak = max(peaks.items(), key=lambda item: float(item[1].values))
    return f"strongest flow per edge {name}, {float(peak.values):.3g} in layer {layers[int(peak.indices)]}"


def attention_saliency(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    queries: Positions = ("question", "last"),
    answer: str | None = None,
    whole_answer: bool = False,
) -> AttentionSaliency:
    """Return |sum over heads of A dL/dA| for every edge into the queries, in every decoder layer.

    A is the attention weight after the softmax, and L is minus the log probability of the answer's first token, or of
    all its tokens (teacher forcing). The computation takes one forward and one backward pass.

    Args:
        vlm: The model.
        prompt: The prompt, with a picture.
        queries: The tokens whose attention is explained, none of them in an answer (default: question and last token).
        answer: The answer whose loss is explained; None takes the model's own greedy answer.
        whole_answer: Whether to explain the loss of all tokens of the answer instead of its first token.

    Returns:
        An `AttentionSaliency`.

    Raises:
        TraceError: If the prompt has no picture or a group of queries has no tokens.
        ModelError: If a group is unknown.

    Source: "Label words are anchors", arXiv 2305.14160, equation 1.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.tracing import attention_saliency
        >>> from PIL import Image
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(Image.new("RGB", (64, 64), "red"), "What colour is this?")
        >>> saliency = attention_saliency(vlm, prompt, answer="red")
        >>> saliency.flow("image", "last").shape  # one number per layer
        torch.Size([8])
    """
    group_positions(prompt, "image")
    answered = with_answer(vlm, prompt, answer)
    last = answered.groups["last"][0]
    groups = text_parts(answered, last) | {"last": (last,)}
    rows = tuple(sorted(named_positions(prompt.with_answer(None), queries)))
    ids = answered.answer_ids if whole_answer else answered.answer_ids[:1]
    with attending(vlm, rows) as attention, vlm.gradients():
        with torch.no_grad():
            entering = vlm.decoder_input(answered).cut(last + len(ids))
        watched = entering.with_embeddings(entering.embeddings.requires_grad_())
        logits = predicting_logits(vlm, answered, watched, len(ids))[0].double()
        loss = -logits.log_softmax(-1)[range(len(ids)), list(ids)].sum()
        weights = [layer.weights for layer in attention]
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    pairs = zip(weights, gradients, strict=True)
    return AttentionSaliency(
        answer=vlm.decode(list(ids)).strip(),
        answer_ids=ids,
        layers=tuple(range(vlm.layers)),
        tokens=answered.tokens[: last + 1],
        loss=loss.item(),
        queries=rows,
        groups=groups,
        saliency=torch.stack([_saliency(*pair)[:, : last + 1] for pair in pairs]),
        **reading_fields(vlm, answered),
    )


def _saliency(weights: Tensor, gradients: Tensor) -> Tensor:
    """Return saliency (query, source) float64 on the CPU, from weights and gradients (1, head, query, source)."""
    return (weights.detach().double() * gradients.double())[0].sum(0).abs().cpu()
