"""Attention shares: how much of a token's attention goes to the picture and to each part of the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.curves import Curve, CurvePanel, draw_curves
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import mean_interval
from ...models import Prompt, VisionLanguageModel
from ...models.replay.observe import attending
from ..errors import TraceError
from ..groups import Positions, group_positions, named_positions

_LAYOUT, _AVERAGE_LAYOUT = "multrace attention share 1", "multrace average attention share 1"
_UNIT = "share of attention"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionShare:
    """The share of one prompt's attention that each part of it gets. Made by `attention_share`."""

    model: str
    """Name or path of the model."""
    revision: str | None
    question: str
    tokens: tuple[str, ...]
    """The tokens up to the last query, one readable string per position."""
    queries: tuple[int, ...]
    """Positions that attend; shares are means over them."""
    parts: Mapping[str, tuple[int, ...]]
    """Positions that are attended to, by name of the part; each position up to the last query is in one of them."""
    heads: Tensor
    """(layer, head, part) float64, 0 to 1: the parts of a head sum to one."""

    @property
    def shares(self) -> Tensor:
        """(layer, part) float64: mean over heads."""
        return self.heads.mean(1)

    def of(self, part: str) -> Tensor:
        """(layer,) float64: the share of one part, mean over heads. TraceError if there is no such part."""
        return self.shares[:, _index(tuple(self.parts), part)]

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AttentionShare":
        """The shares that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def plot(self, path: str | Path) -> Path:
        """The written picture: one line per part over the layers."""
        layers = torch.arange(len(self.heads))
        panel = CurvePanel(curves=[Curve(label=part, x=layers, y=self.of(part)) for part in self.parts])
        count = len(self.queries)
        asked = f"token {self.tokens[self.queries[0]]!r}" if count == 1 else f"{count} tokens"
        titles = self.question, f"where the attention of {asked} goes, mean over heads"
        return draw_curves(path, [panel], titles=titles, y_label=_UNIT)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per layer, head and part with its share."""
        layers, heads, _ = self.heads.shape
        axes = [("layer", range(layers)), ("head", range(heads)), ("part", tuple(self.parts))]
        return long_frame(axes, {"share": self.heads})


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageShare:
    """Mean attention shares of several prompts, and each prompt's own. Made by `average_shares`."""

    model: str
    """Name or path of the model."""
    revision: str | None
    parts: tuple[str, ...]
    prompt_shares: Tensor
    """(prompt, layer, part) float64, 0 to 1: mean over heads."""

    @property
    def count(self) -> int:
        """How many prompts were averaged."""
        return len(self.prompt_shares)

    @property
    def shares(self) -> Tensor:
        """(layer, part) float64: mean over prompts."""
        return self.prompt_shares.mean(0)

    def of(self, part: str) -> Tensor:
        """(layer,) float64: the mean share of one part. TraceError if there is no such part."""
        return self.shares[:, _index(self.parts, part)]

    def interval(self) -> tuple[Tensor, Tensor]:
        """(low, high), each (layer, part): 95 % interval of the mean over prompts, by Student's t.

        TraceError for an average of one prompt.
        """
        return mean_interval(self.prompt_shares)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _AVERAGE_LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AverageShare":
        """The average that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _AVERAGE_LAYOUT, cls, check=_average_problem)

    def plot(self, path: str | Path) -> Path:
        """The written picture: one line per part over the layers, with its 95 % interval as a band."""
        low, high = (side.unbind(1) for side in self.interval()) if self.count > 1 else ([None] * len(self.parts),) * 2
        layers = torch.arange(self.prompt_shares.shape[1])
        curves = [
            Curve(label=part, x=layers, y=self.of(part), low=low[index], high=high[index])
            for index, part in enumerate(self.parts)
        ]
        bands = "; bands: 95% interval of the mean over prompts" if self.count > 1 else ""
        titles = f"Where attention goes, mean over {self.count} prompts", f"mean over heads{bands}"
        return draw_curves(path, [CurvePanel(curves=curves)], titles=titles, y_label=_UNIT)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per layer and part: mean share, its 95 % interval (NaN where n is 1), and n, the prompts."""
        unknown = torch.full_like(self.shares, torch.nan)
        low, high = self.interval() if self.count > 1 else (unknown, unknown)
        axes = [("layer", range(self.prompt_shares.shape[1])), ("part", self.parts)]
        values = {"share": self.shares, "low": low, "high": high, "n": torch.tensor(self.count)}
        return long_frame(axes, values)


def average_shares(shares: Sequence[AttentionShare]) -> AverageShare:
    """Mean shares of prompts to one model with the same parts. TraceError for none, or where they differ."""
    if not shares:
        raise TraceError("no attention shares to average; pass at least one")
    first = shares[0]
    for name, found in {
        "model": [(each.model, each.revision) for each in shares],
        "number of layers": [len(each.heads) for each in shares],
        "parts": [tuple(each.parts) for each in shares],
    }.items():
        if len(set(found)) > 1:
            different = " and ".join(map(str, dict.fromkeys(found)))
            raise TraceError(f"these attention shares differ in their {name} ({different}); average equal ones only")
    return AverageShare(
        model=first.model,
        revision=first.revision,
        parts=tuple(first.parts),
        prompt_shares=torch.stack([each.shares for each in shares]),
    )


def _index(parts: Sequence[str], part: str) -> int:
    """Where a part stands among the parts."""
    if part not in parts:
        raise TraceError(f"no part {part!r} here; parts are {', '.join(map(repr, parts))}")
    return parts.index(part)


def _problem(found: AttentionShare) -> str | None:
    """What does not fit together in shares that were read from a file."""
    fits = found.heads.ndim == 3 and found.heads.shape[2] == len(found.parts)
    return None if fits else "its shares are of another shape than its parts"


def _average_problem(found: AverageShare) -> str | None:
    """What does not fit together in an average that was read from a file."""
    fits = found.prompt_shares.ndim == 3 and found.prompt_shares.shape[2] == len(found.parts)
    return None if fits else "its shares are of another shape than its parts"


def attention_share(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    queries: Positions = "last",
    parts: Mapping[str, str | int | Sequence[int]] | None = None,
) -> AttentionShare:
    """Return the share of the queries' attention that each part of the prompt receives, by decoder layer and head.

    Shares are means over the queries; in each head they sum to one.

    Args:
        vlm: The model.
        prompt: The prompt.
        queries: The tokens that attend: groups, positions or both (default: the last token).
        parts: Positions by name of the part; no position may belong to two parts, and the part "other" holds what they
            leave of the tokens up to the last query. None takes "image", "system" (everything before the first
            picture) and "question" (all other text).

    Returns:
        An `AttentionShare`.

    Raises:
        TraceError: For a prompt without a picture if no parts are given, and for parts that overlap or hold no token
            that a query can see.
        ModelError: For positions that the prompt does not have.

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

    A part may be empty. Raises `TraceError` for a prompt without a picture.
    """
    image = group_positions(prompt, "image")
    members = {"system": range(min(image)), "image": image, "question": set(range(min(image), end)) - set(image)}
    return {name: tuple(place for place in sorted(places) if place < end) for name, places in members.items()}


def _given_parts(
    prompt: Prompt, parts: Mapping[str, str | int | Sequence[int]], end: int
) -> dict[str, tuple[int, ...]]:
    """The requested parts cut to the first `end` positions, and what they leave of these."""
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
    """(head, part) float64 on the CPU: mean over queries of weights (head, query, key), summed over each part."""
    mean = weights.double().mean(1).cpu()
    return torch.stack([mean[:, list(positions)].sum(-1) for positions in members.values()], dim=-1)
