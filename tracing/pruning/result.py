"""The pruning of image tokens for one prompt as a value, and the figures of prunings and of their averages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import CYCLE, INK, LineStyle, name_of_model
from ...artefacts.results import long_frame
from ...models import Prompt
from ..attention.image_tokens import ImageReading, check_prompt, evenly_spread
from ..engine.cells import EngineReport, TraceError
from ..engine.scoring import same_answer

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _UPPER, _LOWER = 5.3, 2.7, 1.3  # width of both panels and height of each, in inches
_LEGEND_HEAD, _LETTER = 0.7, 0.066  # inches: a sample in the legend with its margins, a letter
_SIDE = 2.2  # size in inches of a picture with its margins
_FADED = 0.16  # share of the contrast that a dropped patch keeps
_PAPER = 0.93  # brightness towards which dropped patches fade
_LEVELS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("every image token (baseline)", {"linestyle": "-", "color": "#8a8a8a", "linewidth": 1.2}),
    "floor": ("no image token at all (floor)", {"linestyle": (0, (1, 1.5)), "color": "#8a8a8a", "linewidth": 1.4}),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningLine:
    """The curve of one number of kept tokens."""

    label: str
    values: Tensor
    """(layer,): accuracy or probability in 0 to 1; NaN leaves a gap."""
    low: Tensor | None = None
    """(layer,): lower end of the band; None for a line without a band."""
    high: Tensor | None = None
    """(layer,): upper end of the band."""
    saved: Tensor
    """(layer,): share of operations that are saved, in 0 to 1."""
    cliff: int | None = None
    """The layer to mark as the cliff."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Baseline and floor of the lines; NaN is not drawn."""

    baseline: float
    floor: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImagePruning(ImageReading):
    """The answers to one question without some image tokens from a layer on. `prune_image_tokens` returns it.

    `layers` are the first layers without the dropped tokens, which stay absent up to the last layer (arXiv 2406.06579).
    """

    layout: ClassVar[str] = "multrace image pruning 2"

    depth: int
    """Number of decoder layers."""
    keep: tuple[int | str, ...]
    """Numbers of image tokens that stay; "all" for all of them."""
    kept: Tensor
    """(keep, layer, image token) bool: the image tokens that stay."""
    scores: tuple[str, ...]
    """The scores: "first token" of the answer, and "answer" for all its tokens; the first score is the main one."""
    gold: str | None
    """The right answer, if it is known."""
    baseline: Tensor
    """(score,) float64: the answer's probability with every image token."""
    floor: Tensor
    """(score,) float64: the answer's probability with no image token in any layer, from the words alone."""
    probabilities: Tensor
    """(score, keep, layer) float64: the answer's probability without the other image tokens from that layer on."""
    baseline_answer: str
    """The model's free greedy answer with every image token."""
    floor_answer: str
    """The model's free greedy answer with no image token in any layer."""
    answers: tuple[tuple[str, ...], ...]
    """(keep, layer): the model's free greedy answers."""
    token_operations: tuple[int, ...]
    """(layer,): floating-point operations of each decoder layer's matrices for one token."""
    pair_operations: int
    """Floating-point operations of one layer's attention for one query and key, all heads together."""
    engine: EngineReport

    @property
    def length(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.input_ids)

    @property
    def is_right(self) -> Tensor | None:
        """(keep, layer) bool: whether the free answer is right (`same_answer`); None if no right answer is known."""
        if self.gold is None:
            return None
        return torch.tensor([[same_answer(each, self.gold) for each in row] for row in self.answers])

    @property
    def baseline_is_right(self) -> bool | None:
        """True if the model's answer with every image token is the right one; None if no right answer is known."""
        return None if self.gold is None else same_answer(self.baseline_answer, self.gold)

    @property
    def floor_is_right(self) -> bool | None:
        """True if the answer from the words alone is the right one; None if no right answer is known."""
        return None if self.gold is None else same_answer(self.floor_answer, self.gold)

    @property
    def dropped(self) -> Tensor:
        """(keep, layer) int64: number of dropped image tokens."""
        return (~self.kept).sum(-1)

    def tokens_kept(self) -> Tensor:
        """Return the share (keep, layer) float64 of the prompt's token-layers that are still computed.

        The share is (n l + (n - d) (L - l)) / (n L) for n tokens, d of them dropped from layer l on, and L layers.
        """
        return tokens_kept(self.dropped, self.layers, length=self.length, depth=self.depth)

    def operations_kept(self) -> Tensor:
        """Return the share (keep, layer) float64 of the decoder's operations on the prompt that remain.

        The share is the sum over layers of m c + a m (m + 1) / 2, with m = n tokens before layer l and m = n - d from
        layer l on, divided by the same sum with m = n in all layers. Here c is the layer's entry of `token_operations`
        and a is `pair_operations`, the operations for each query-key pair.
        """
        counts = {"token_operations": self.token_operations, "pair_operations": self.pair_operations}
        return operations_kept(self.dropped, self.layers, length=self.length, **counts)

    def settled_from(self, keep: int | str = 0) -> int | None:
        """Return the first layer from which dropping never changes the free answer; None if the last one does."""
        same = [same_answer(each, self.baseline_answer) for each in self.answers[self._keep(keep)]]
        return lasting_from(self.layers, same)

    def summary(self, score: str | None = None) -> str:
        """Return lines of text: the answers with and without the picture, and the layer from which the answer stays."""
        index = self._score(score)
        name = f"{self.answer.strip()!r}" + (", first token" if self.scores[index] == "first token" else "")
        lines = [self.question]
        ends = (
            ("with every image token", self.baseline, self.baseline_answer, self.baseline_is_right),
            ("with none in any layer", self.floor, self.floor_answer, self.floor_is_right),
        )
        for what, probability, text, is_right in ends:
            verdict = "" if is_right is None else ", right" if is_right else f", not {self.gold!r}"
            lines.append(f"  {what}: p({name}) = {float(probability[index]):.3g}; it says {text!r}{verdict}")
        return "\n".join([*lines, *(f"  {self._keep_line(keep)}" for keep in self.keep)])

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per score, keep and layer (the first layer without the dropped tokens).

        The columns are probability, baseline and floor; the free answer and its is_right (None if no right answer is
        known); dropped, the number of dropped tokens; and tokens_kept and operations_kept, shares of the work.
        """
        axes = {"score": self.scores, "keep": self.keep, "layer": self.layers}
        values = {"probability": self.probabilities}
        values |= {name: getattr(self, name)[:, None, None] for name in ("baseline", "floor")}
        work = {"tokens_kept": self.tokens_kept(), "operations_kept": self.operations_kept()}
        frame = long_frame(axes, values | {"dropped": self.dropped} | work)
        answers = [answer for row in self.answers for answer in row] * len(self.scores)
        is_right = [None if self.gold is None else same_answer(answer, self.gold) for answer in answers]
        columns: dict[str, Any] = {"answer": answers, "is_right": is_right}
        return frame.assign(**columns)

    def plot(self, path: str | Path | None = None, score: str | None = None) -> "Figure":
        """Return a figure with the probability by layer, one line per `keep`, and the saved operations below.

        Args:
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            score: The score to draw; the main one by default.

        Raises:
            TraceError: If the score was not computed.
            ArtefactError: If the file cannot be written.
        """
        index, saved = self._score(score), 1 - self.operations_kept()
        lines = [
            PruningLine(label=keep_label(keep), values=self.probabilities[index, row], saved=saved[row])
            for row, keep in enumerate(self.keep)
        ]
        levels = Levels(baseline=float(self.baseline[index]), floor=float(self.floor[index]))
        what = "first token's probability" if self.scores[index] == "first token" else "probability"
        subtitle = f"{what.capitalize()} of the answer {self.answer.strip()!r}\n{name_of_model(self.model)}"
        titles = self.question, subtitle
        return drawing.finished(pruning_figure(self.layers, lines, levels=levels, titles=titles, y_label=what), path)

    def overlay(
        self,
        prompt: Prompt,
        path: str | Path | None = None,
        keep: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> "Figure":
        """Return a figure with the image tokens that stay, in the picture as the model saw it; the others are faded.

        Args:
            prompt: The prompt that was pruned.
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            keep: The number of tokens that stay; by default the first number that keeps some tokens but not all.
            layers: The layers to draw, one panel each; by default at most four of them, evenly spread, as the caption
                states.

        Raises:
            TraceError: If the prompt is another one, or if the image tokens form no grid.
            ArtefactError: If the file cannot be written.
        """
        row = self._partial() if keep is None else self._keep(keep)
        check_prompt(self, prompt)
        rule = ""
        if layers is None:
            layers, rule = evenly_spread(self.layers, "layers")
        places = self._rows_of(layers)
        grid = self.over_picture(self.kept[row].double()) > 0
        captions = [f"from layer {self.layers[place]} on" for place in places]
        subtitle = f"Image tokens that stay: the best {self.keep[row]} of {len(self.image_positions)}"
        titles = self.question, f"{subtitle}\nshown: {rule}" if rule else subtitle
        return drawing.finished(kept_figure(prompt, grid[list(places)], captions, titles=titles), path)

    def _keep(self, keep: int | str) -> int:
        return index_of_keep(keep, self.keep)

    def _partial(self) -> int:
        counts = self.kept.sum(-1).amax(-1).tolist()
        rows = [row for row, count in enumerate(counts) if 0 < count < len(self.image_positions)]
        if not rows:
            raise TraceError(
                f"image tokens stay here all or none (keep={self.keep}), which shows nothing; prune with another "
                f"keep, from 1 to {len(self.image_positions) - 1}"
            )
        return rows[0]

    def _score(self, score: str | None) -> int:
        return 0 if score is None else index_of_score(score, self.scores)

    def _keep_line(self, keep: int | str) -> str:
        layer = self.settled_from(keep)
        if layer is None:
            return f"{keep_label(keep)}: dropping the others changes the answer even from layer {self.layers[-1]} on"
        saved = 1 - self.operations_kept()[self._keep(keep), self.layers.index(layer)]
        return (
            f"{keep_label(keep)}: the answer stays from layer {layer} on, which saves {float(saved):.0%} of operations"
        )

    def _lines(self) -> tuple[str, str]:
        return (
            f"ImagePruning of {name_of_model(self.model)}: {self.question!r} -> {self.answer!r}",
            f"p = {float(self.baseline[0]):.3g} with every image token, {float(self.floor[0]):.3g} with none; "
            f"{self._keep_line(self.keep[0])}",
        )

    def _problem(self) -> str | None:
        shape, scores = (len(self.keep), len(self.layers)), len(self.scores)
        fits = [self.kept.shape == (*shape, len(self.image_positions)), self.kept.dtype == torch.bool]
        fits += [self.baseline.shape == self.floor.shape == (scores,)]
        fits += [self.probabilities.shape == (scores, *shape)]
        fits += [[len(row) for row in self.answers] == [shape[1]] * shape[0], min(*shape, scores) > 0]
        fits += [len(self.token_operations) == self.depth, max(self.layers) < self.depth]
        return None if all(fits) else "its tensors are of other shapes than its keeps, layers and scores"


def lasting_from(layers: Sequence[int], claims: Sequence[bool]) -> int | None:
    """Return the first layer from which all claims (one per layer) are true; None if the last claim is false."""
    start = len(claims) - next((number for number, holds in enumerate(reversed(claims)) if not holds), len(claims))
    return layers[start] if start < len(layers) else None


def keep_label(keep: int | str) -> str:
    """Return a description of how many tokens stay."""
    if keep in (0, "all"):
        return "all image tokens dropped" if keep == 0 else "none dropped"
    return f"best {keep} image token{'' if keep == 1 else 's'} kept"


def index_of_keep(keep: int | str, known: Sequence[int | str]) -> int:
    """Return the index of a number of tokens among the known ones. Raises `TraceError`, which lists them."""
    return _index("keep", keep, known)


def index_of_score(score: str, known: Sequence[str]) -> int:
    """Return the index of a score among the computed ones. Raises `TraceError`, which lists them."""
    return _index("score", score, known)


def _index(kind: str, label: int | str, known: Sequence[int | str]) -> int:
    if label not in known:
        raise TraceError(
            f"no {kind} {label!r} in this pruning: it holds {', '.join(map(repr, known))}; pass one of these, or "
            "prune again with that one"
        )
    return known.index(label)


def tokens_kept(dropped: Tensor, layers: Sequence[int], *, length: int, depth: int) -> Tensor:
    """Return the share (..., layer) float64 of the prompt's token-layers that are still computed.

    For n tokens, d of them dropped from layer l on, and L layers, the share is (n l + (n - d) (L - l)) / (n L).

    Args:
        dropped: (..., layer) number of dropped tokens, d.
        layers: The first layers without the dropped tokens, l.
        length: Number of tokens of the prompt, n.
        depth: Number of decoder layers, L.
    """
    left = depth - torch.tensor(layers)
    return 1 - (dropped * left).double() / (length * depth)


def operations_kept(
    dropped: Tensor, layers: Sequence[int], *, length: int, token_operations: Sequence[int], pair_operations: int
) -> Tensor:
    """Return the share (..., layer) float64 of the decoder's floating-point operations on the prompt that remain.

    Layer i takes m c_i + a m (m + 1) / 2 operations for m tokens: c_i in the matrices for each token, and a for each
    query-key pair of causal attention. The number m is n before layer l and n - d from layer l on (`tokens_kept`).
    Norms, the output head, the vision tower and the answer's tokens are not counted.

    Args:
        dropped: (..., layer) number of dropped tokens, d.
        layers: The first layers without the dropped tokens, l.
        length: Number of tokens of the prompt, n.
        token_operations: Operations of each layer's matrices for one token, c_i.
        pair_operations: Operations of one layer's attention for one query and key, a.
    """
    per_layer = torch.tensor(token_operations, dtype=torch.float64)
    rest = length - dropped.double()
    pairs_saved = _pairs(torch.tensor(length, dtype=torch.float64)) - _pairs(rest)
    total = length * per_layer.sum() + len(per_layer) * pair_operations * _pairs(
        torch.tensor(length, dtype=torch.float64)
    )
    left = torch.tensor([len(per_layer) - layer for layer in layers])
    after = torch.stack([per_layer[layer:].sum() for layer in layers])
    return 1 - (dropped * after + left * pair_operations * pairs_saved) / total


def _pairs(tokens: Tensor) -> Tensor:
    """Return the number of query-key pairs if each token attends to itself and to all earlier tokens."""
    return tokens * (tokens + 1) / 2


def pruning_figure(
    layers: Sequence[int], lines: Sequence[PruningLine], *, levels: Levels, titles: tuple[str, str], y_label: str
) -> "Figure":
    """Return a figure with two panels over one axis of layers: the values, and below them the operations saved.

    Args:
        layers: The first pruned layers.
        lines: One curve per number of kept tokens.
        levels: Baseline and floor.
        titles: Title and subtitle of the figure.
        y_label: Label of the upper panel's y axis.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = [f"{line.label}, cliff at layer {line.cliff}" if line.cliff is not None else line.label for line in lines]
    styles = [CYCLE[number % len(CYCLE)] for number in range(len(lines))]
    samples = {name: drawing.sample_line(style) for name, style in zip(names, styles, strict=True)}
    drawn = [_LEVELS[name] for name in _LEVELS if not math.isnan(getattr(levels, name))]
    samples |= {label: Line2D([], [], **look) for label, look in drawn}
    legend = _LEGEND_HEAD + _LETTER * max(map(len, samples))
    figure, body = drawing.titled_figure(_WIDTH + legend, _UPPER + _LOWER, titles)
    upper, lower = body.subplots(2, 1, sharex=True, height_ratios=(_UPPER, _LOWER))
    for line, style in zip(lines, styles, strict=True):
        _draw_line((upper, lower), layers, line, style)
    cliffs = {style.colour: line.cliff for line, style in zip(lines, styles, strict=True)}
    _draw_cliffs((upper, lower), cliffs)
    for name, (_, look) in _LEVELS.items():
        upper.axhline(getattr(levels, name), zorder=1.5, **look)  # NaN draws nothing
    drawing.dress(upper, y_label=y_label)
    drawing.dress(lower, x_label="first layer without the dropped image tokens", y_label="operations\nsaved")
    lower.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
    most_saved = max([0.1, *(float(line.saved.max()) for line in lines)])
    for axes, top in ((upper, 1.0), (lower, most_saved)):
        axes.set_ylim(-0.03 * top, 1.06 * top)
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    drawing.add_legend(upper, samples)
    return figure


def _draw_line(panels: "tuple[Axes, Axes]", layers: Sequence[int], line: PruningLine, style: LineStyle) -> None:
    """Draw the values with their band in the upper panel, and the saving in the lower panel."""
    upper, lower = panels
    if line.low is not None and line.high is not None:
        band = {"color": style.colour, "alpha": 0.16, "linewidth": 0, "zorder": 2}
        upper.fill_between(list(layers), line.low.numpy(), line.high.numpy(), **band)
    for axes, values in ((upper, line.values), (lower, line.saved)):
        sample = drawing.sample_line(style, markevery=max(1, -(-len(layers) // 16)), zorder=3)
        sample.set_data(list(layers), values.numpy())
        axes.add_line(sample)
        axes.update_datalim(list(zip(layers, values.nan_to_num(0.0).tolist(), strict=True)))
        axes.autoscale_view()


def _draw_cliffs(panels: "tuple[Axes, Axes]", cliffs: Mapping[str, int | None]) -> None:
    """Draw cliffs as vertical lines by colour; the dashes of cliffs at the same layer alternate."""
    for colour, layer in cliffs.items():
        sharing = [name for name, other in cliffs.items() if other == layer]
        dashes = 2 * sharing.index(colour), (2, 2 * max(1, len(sharing) - 1))
        if layer is None:
            continue
        for axes in panels:
            axes.axvline(layer, color=colour, linestyle=dashes, linewidth=1.2, zorder=1)


def kept_figure(prompt: Prompt, kept: Tensor, captions: Sequence[str], *, titles: tuple[str, str]) -> "Figure":
    """Return a figure with the kept patches in the picture as the model saw it; all others are faded.

    Args:
        prompt: The prompt with the pictures; each picture has one line of panels.
        kept: (panel, image, row, column) booleans.
        captions: The caption above each panel.
        titles: Title and subtitle of the figure.
    """
    pictures = prompt.seen_pictures()
    width, height = max(4.5, _SIDE * len(kept) + 0.2), _SIDE * len(pictures) + 0.25
    figure, body = drawing.titled_figure(width, height, titles)
    grid = body.subplots(len(pictures), len(kept), squeeze=False)
    for line, picture in enumerate(pictures):
        for axes, panel, caption in zip(grid[line], kept, captions, strict=True):
            rows, columns = panel[line].shape
            veil = picture.new_full((rows, columns, 4), _PAPER)
            veil[..., 3] = (1 - _FADED) * (~panel[line]).double()
            drawing.add_picture(axes, picture.numpy(), (rows, columns), [veil.numpy()])
            if line == 0:
                axes.set_title(caption, fontsize=9.5, color=INK, loc="left")
    return figure
