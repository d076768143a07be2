"""Attention shares: how much of a token's attention goes to the picture and to each part of the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean
from ...artefacts.drawing.styles import name_of_model
from ...artefacts.results import Result
from ...models import Prompt, VisionLanguageModel
from ...models.replay.observe import attending
from ..engine.positions import Positions, group_positions, named_positions
from ..errors import TraceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNIT = "share of attention"


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
        return drawing.finished(drawing.curves_figure([panel], titles=titles, y_label=_UNIT), path)

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
        figure = drawing.curves_figure([drawing.CurvePanel(curves=curves)], titles=titles, y_label=_UNIT)
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
        embeddings = vlm.embeddings(prompt)[:, :end]
        with attending(vlm, rows) as attention:
            vlm.forward(inputs_embeds=embeddings, positions=[end - 1])
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
