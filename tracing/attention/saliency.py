"""Attention x gradient saliency: the attention edges on which the answer's loss rests, to first order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.curves import Curve, CurvePanel, draw_curves
from ...artefacts.drawing.overlay import Overlay, strongest
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import mean_interval
from ...models import Prompt, VisionLanguageModel
from ...models.replay.observe import attending
from ..errors import TraceError
from ..groups import Positions, group_positions, named_positions
from ..knockout.styles import flow_styles
from .image_reading import ImageReading, predicting_logits, reading_fields, with_answer
from .shares import text_parts

_LAYOUT, _AVERAGE_LAYOUT = "multrace attention saliency 1", "multrace average attention saliency 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionSaliency(ImageReading):
    """How much the answer's loss rests on each edge of attention. Made by `attention_saliency`."""

    tokens: tuple[str, ...]
    """The tokens up to the last query, one readable string per position."""
    loss: float
    """What the gradients are of: minus the log probability of the answer's first token, or of all of them."""
    queries: tuple[int, ...]
    """Positions that attend, in the order of the rows."""
    groups: Mapping[str, tuple[int, ...]]
    """Positions by name, each in one of them: "system" (before the picture), "image", "last", "question" (all else)."""
    saliency: Tensor
    """(layer, query, source) float64, at least 0: |sum over heads of weight times gradient|; 0 after the query."""

    def flow(self, source: str | Sequence[int], target: str | Sequence[int]) -> Tensor:
        """(layer,) float64: mean saliency of the edges from source to target tokens, as S_wp and S_pq in the paper.

        source, target: groups or positions; of a target only those count that are among the queries. An edge leads
        from a token to a later one, never to itself. NaN where there is none (arXiv 2305.14160, section 2.1).
        """
        rows = [index for index, query in enumerate(self.queries) if query in set(self._positions(target))]
        columns = list(self._positions(source))
        queries = torch.tensor([self.queries[row] for row in rows], dtype=torch.long)
        are_edges = torch.tensor(columns, dtype=torch.long)[None, :] < queries[:, None]
        return self.saliency[:, rows][..., columns][:, are_edges].mean(-1)

    @property
    def flows(self) -> dict[str, Tensor]:
        """Per "source -> target" of two groups that have edges (layer,) float64: `flow`."""
        pairs = ((source, target) for target in self.groups for source in self.groups)
        found = {f"{source} -> {target}": self.flow(source, target) for source, target in pairs}
        return {name: flow for name, flow in found.items() if not flow.isnan().all()}

    def image_map(self, target: str | Sequence[int] | None = None) -> Tensor:
        """(layer, image token) float64: mean saliency over the queries, or over those of a target.

        TraceError for a target without queries.
        """
        asked = self.queries if target is None else self._positions(target)
        rows = [index for index, query in enumerate(self.queries) if query in set(asked)]
        if not rows:
            raise TraceError(f"none of the queries {self.queries} is in {target!r}; read again with these queries")
        return self.saliency[:, rows][..., list(self.image_positions)].mean(1)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AttentionSaliency":
        """The saliency that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_saliency_problem)

    def plot(self, path: str | Path) -> Path:
        """The written picture: all flows over the layers, by powers of ten; where a flow is zero its line has a gap."""
        flows, layers = self.flows, torch.tensor(self.layers)
        curves = [
            Curve(label=name, x=layers, y=flow.masked_fill(flow == 0, torch.nan).log10(), style=style)
            for (name, flow), style in zip(flows.items(), flow_styles(tuple(flows)), strict=True)
        ]
        label, titles = "log10 of saliency per edge", self._titles("mean over edges")
        return draw_curves(path, [CurvePanel(curves=curves)], titles=titles, y_label=label, reference=None)

    def overlay(
        self,
        path: str | Path,
        prompt: Prompt,
        layers: Sequence[int] | None = None,
        target: str | Sequence[int] | None = None,
    ) -> Path:
        """The written picture: saliency of image tokens over the prompt's picture as the model saw it.

        layers: one panel each; if None, the strongest four. target: as `image_map`. TraceError for another prompt, for
        layers that the model does not have, and where image tokens form no grid.
        """
        grid = self.over_picture(self.image_map(target))
        rows = strongest(grid) if layers is None else self._rows_of(layers, ())
        overlays = [Overlay(title=f"layer {self.layers[row]}", values=grid[row]) for row in rows]
        asked = "all queries" if target is None else target if isinstance(target, str) else "some queries"
        return self._draw_over(
            path, prompt, overlays, kind="attention", titles=self._titles(f"to {asked}"), unit="saliency"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One line per layer, query and source (positions of tokens) with the group of each and the saliency."""
        sources = range(self.saliency.shape[2])
        axes = [("layer", self.layers), ("query", self.queries), ("source", sources)]
        frame = long_frame(axes, {"saliency": self.saliency})
        named = {position: name for name, positions in self.groups.items() for position in positions}
        frame.insert(2, "query_group", frame["query"].map(named))
        frame.insert(4, "source_group", frame["source"].map(named))
        return frame

    def _positions(self, asked: str | Sequence[int]) -> tuple[int, ...]:
        """Positions of a group, or the given ones."""
        if isinstance(asked, str) and asked not in self.groups:
            raise TraceError(f"no group {asked!r} here; pass {', '.join(map(repr, self.groups))}, or positions")
        found = self.groups[asked] if isinstance(asked, str) else tuple(asked)
        unknown = [position for position in found if not 0 <= position < self.saliency.shape[2]]
        if unknown:
            raise TraceError(f"no position {unknown[0]} here; pass some of 0 to {self.saliency.shape[2] - 1}")
        return found

    def _titles(self, what: str) -> tuple[str, str]:
        """Title and subtitle of pictures."""
        return self.question, f"attention x gradient of the loss of {self.answer!r} ({self.loss:.3g}); {what}"


def _saliency_problem(found: AttentionSaliency) -> str | None:
    """What does not fit together in a saliency that was read from a file."""
    fits = found.saliency.shape == (len(found.layers), len(found.queries), len(found.tokens))
    return None if fits else "its saliency is of another shape than its layers, queries and tokens"


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageSaliency:
    """Mean saliency of flows between groups of tokens, and each prompt's own. Made by `average_saliencies`.

    Flows of different prompts differ by orders of magnitude, and a few large ones would be most of an arithmetic mean.
    So means are geometric, and their intervals those of the mean of the logarithms. A flow that is exactly zero has no
    logarithm: it is left out of mean and interval and counted by `zeros`. Where only some prompts are zero, the mean
    says how strong the flow is where there is any.
    """

    model: str
    """Name or path of the model."""
    revision: str | None
    layers: tuple[int, ...]
    """The decoder layers that were read, in order."""
    questions: tuple[str, ...]
    """Each prompt's."""
    flows: tuple[str, ...]
    """"source -> target" of two groups, each flow of at least one prompt."""
    prompt_flows: Tensor
    """(flow, prompt, layer) float64, at least 0: mean saliency per edge; NaN where a prompt has no such flow."""

    @property
    def count(self) -> int:
        """How many prompts were averaged."""
        return len(self.questions)

    @property
    def counts(self) -> dict[str, int]:
        """How many of them have each flow, be it zero or not."""
        has_flow = (~self.prompt_flows.isnan()).any(-1)
        return dict(zip(self.flows, has_flow.sum(1).tolist(), strict=True))

    def of(self, flow: str) -> Tensor:
        """(layer,) float64: geometric mean over the prompts in which the flow is above zero; NaN where it is in none.

        TraceError for a flow that no prompt has.
        """
        return 10 ** self._logs[self._index(flow)].nanmean(0)

    def interval(self, flow: str) -> tuple[Tensor, Tensor]:
        """(low, high), each (layer,): 95 % interval of `of` over prompts, by Student's t on the logarithms.

        NaN where fewer than two prompts are above zero; TraceError for an average of one prompt or an unknown flow.
        """
        low, high = mean_interval(self._logs[self._index(flow)])
        return 10**low, 10**high

    def zeros(self, flow: str) -> Tensor:
        """(layer,) int64: in how many prompts the flow is exactly zero. TraceError for a flow that no prompt has."""
        return (self.prompt_flows[self._index(flow)] == 0).sum(0)

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _AVERAGE_LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AverageSaliency":
        """The average that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _AVERAGE_LAYOUT, cls, check=_average_problem)

    def plot(self, path: str | Path) -> Path:
        """The written picture: all flows over the layers, by powers of ten, with their 95 % intervals as bands.

        A line has a gap where its flow is zero in every prompt. The legend says how many prompts have a flow where
        that differs. The suffix names the format (png, pdf or svg).
        """
        styles = dict(zip(self.flows, flow_styles(self.flows), strict=True))
        layers, counts, curves = torch.tensor(self.layers), self.counts, []
        for flow, (mean, low, high) in zip(self.flows, self._log_means.unbind(1), strict=True):
            label = flow if counts[flow] == self.count else f"{flow} (n = {counts[flow]})"
            curves.append(Curve(label=label, x=layers, y=mean, low=low, high=high, style=styles[flow]))
        label = "log10 of saliency per edge"
        return draw_curves(path, [CurvePanel(curves=curves)], titles=self._titles(), y_label=label, reference=None)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per flow and layer: saliency (geometric mean), low and high of its 95 % interval, n and zeros.

        n: the prompts that the mean is over; zeros: those whose flow is exactly zero. low and high are NaN where n is
        1, all three where it is 0.
        """
        mean, low, high = 10**self._log_means
        counts = {"n": (~self._logs.isnan()).sum(1), "zeros": (self.prompt_flows == 0).sum(1)}
        axes = [("flow", self.flows), ("layer", self.layers)]
        return long_frame(axes, {"saliency": mean, "low": low, "high": high, **counts})

    @property
    def _logs(self) -> Tensor:
        """(flow, prompt, layer): log10; NaN also for zero."""
        return self.prompt_flows.masked_fill(self.prompt_flows == 0, torch.nan).log10()

    @property
    def _log_means(self) -> Tensor:
        """(3, flow, layer): means of the logarithms and both ends of their intervals, NaN for a single prompt."""
        logs = self._logs.transpose(0, 1)
        mean = logs.nanmean(0)
        unknown = torch.full_like(mean, torch.nan)
        return torch.stack([mean, *(mean_interval(logs) if self.count > 1 else (unknown, unknown))])

    def _index(self, flow: str) -> int:
        if flow not in self.flows:
            raise TraceError(f"no flow {flow!r} in this average; pass {', '.join(map(repr, self.flows))}")
        return self.flows.index(flow)

    def _titles(self) -> tuple[str, str]:
        """Title and subtitle of the picture."""
        over = f"geometric mean over {self.count} prompts" if self.count > 1 else "one prompt"
        bands = "; bands: 95% intervals of the mean" if self.count > 1 else ""
        is_zero = self.prompt_flows == 0
        is_partly_zero = is_zero.any(1) & ~self._logs.isnan().all(1)
        zeros = "\nwhere a flow is zero in some prompts, it is the mean of the others" if is_partly_zero.any() else ""
        return "What the answer rests on", f"attention x gradient of its loss, {over}{bands}{zeros}"


def average_saliencies(saliencies: Sequence[AttentionSaliency | AverageSaliency]) -> AverageSaliency:
    """Geometric mean over prompts to one model of each flow between groups; a prompt without a flow is left out of it.

    Averages among them stand for the prompts that they are over, and take far less memory than their saliencies.
    TraceError for none, where models or layers differ, and where no prompt has a flow.
    """
    _check_alike(saliencies)
    first, own = saliencies[0], [flows for each in saliencies for flows in _flows_of(each)]
    names = tuple(dict.fromkeys(name for flows in own for name in flows))
    if not names:
        raise TraceError("these saliencies have no flow between groups; read them again with later queries")
    absent = torch.full((len(first.layers),), torch.nan, dtype=torch.float64)
    asked = [each.questions if isinstance(each, AverageSaliency) else (each.question,) for each in saliencies]
    return AverageSaliency(
        model=first.model,
        revision=first.revision,
        layers=first.layers,
        questions=tuple(question for questions in asked for question in questions),
        flows=names,
        prompt_flows=torch.stack([torch.stack([flows.get(name, absent) for flows in own]) for name in names]),
    )


def _flows_of(found: AttentionSaliency | AverageSaliency) -> list[dict[str, Tensor]]:
    """Per prompt the flows (layer,) that it has."""
    if isinstance(found, AttentionSaliency):
        return [found.flows]
    own = [dict(zip(found.flows, flows, strict=True)) for flows in found.prompt_flows.unbind(1)]
    return [{name: flow for name, flow in flows.items() if not flow.isnan().all()} for flows in own]


def _check_alike(saliencies: Sequence[AttentionSaliency | AverageSaliency]) -> None:
    """TraceError for none, or for several that cannot be averaged."""
    if not saliencies:
        raise TraceError("no attention saliencies to average; pass at least one")
    for name in ("model", "revision", "layers"):
        found = dict.fromkeys(getattr(each, name) for each in saliencies)
        if len(found) > 1:
            raise TraceError(
                f"these attention saliencies differ in their {name} ({' and '.join(map(str, found))}); average equal "
                "ones only"
            )


def _average_problem(found: AverageSaliency) -> str | None:
    """What does not fit together in an average that was read from a file."""
    shape = (len(found.flows), len(found.questions), len(found.layers))
    if found.prompt_flows.shape != shape or 0 in shape:
        return "its flows are of another shape than its names, prompts and layers"
    return "some of its flows are below zero" if (found.prompt_flows < 0).any() else None


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
    all its tokens (teacher-forced). One forward and one backward pass.

    Args:
        vlm: The model.
        prompt: The prompt, with a picture.
        queries: The tokens whose attention is explained, none of an answer (default: the question and the last token).
        answer: The answer whose loss is explained; None takes the model's own greedy answer.
        whole_answer: Explain the loss of all tokens of the answer instead of its first token.

    Returns:
        An `AttentionSaliency`.

    Raises:
        TraceError: For a prompt without a picture, and for a group of queries without tokens.
        ModelError: For an unknown group.

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
            embeddings = vlm.embeddings(answered)[:, : last + len(ids)]
        logits = predicting_logits(vlm, answered, embeddings.requires_grad_(), len(ids))[0].double()
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
    """(query, source) float64 on the CPU, from weights and gradients (1, head, query, source)."""
    return (weights.detach().double() * gradients.double())[0].sum(0).abs().cpu()
