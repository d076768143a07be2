"""Second moments of what all down projections read: one pass for all layers, and one early-stopped pass per layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...editing.moments import second_moments
from ...models import Prompt, VisionLanguageModel, collate
from ...models.hooks import StopForward
from .edit_facts import make_prompts
from .edit_rows import EditRow, apart
from .rates import now
from .subjects import Subject
from .token_layers import counted_token_layers

TOLERANCE = 1e-5
"""Both take products in float32 and sums in float64; other batches would be other sums."""


@dataclass(frozen=True, kw_only=True)
class MomentCase:
    """One row: over how many prompts."""

    needs_model: ClassVar[bool] = True

    label: str
    prompts: int
    batch_size: int

    def measure(self, subject: Subject) -> EditRow:
        """The row. Half of the usual way's layers go before ours, half after, so that a busy machine slows both."""
        vlm, prompts = subject.vlm, make_prompts(subject, self.prompts)
        layers = range(vlm.layers)
        usual_moment(vlm, prompts[:1], layer=0, batch_size=1)  # what a first pass sets up is nobody's cost
        usual, seconds = {}, 0.0
        with tqdm(total=2 * vlm.layers, desc=self.label, unit="layer", leave=False) as bar:
            with counted_token_layers(vlm) as work_usual:
                seconds += self._usual(vlm, prompts, layers[::2], usual, bar)
            with counted_token_layers(vlm) as work:
                started = now(vlm.device)
                moments = second_moments(vlm, prompts, batch_size=self.batch_size)
                mine = now(vlm.device) - started
            bar.update(vlm.layers)
            with counted_token_layers(vlm) as rest:
                seconds += self._usual(vlm, prompts, layers[1::2], usual, bar)
        differences = [
            apart(moments.matrix(layer), usual[layer], tolerance=TOLERANCE, label=f"{self.label}, layer {layer}")
            for layer in layers
        ]
        return EditRow(
            label=self.label,
            seconds=mine,
            seconds_usual=seconds,
            unit="token-layers",
            work=work.total,
            work_usual=work_usual.total + rest.total,
            difference=max(differences),
            tolerance=TOLERANCE,
            details={
                "layers": vlm.layers,
                "prompts": self.prompts,
                "tokens": moments.count(),
                "width": vlm.mlp,
                "seconds_per_layer": mine / vlm.layers,
                "seconds_per_layer_usual": seconds / vlm.layers,
            },
        )

    def _usual(
        self,
        vlm: VisionLanguageModel,
        prompts: Sequence[Prompt],
        layers: Sequence[int],
        found: dict[int, Tensor],
        bar: tqdm,
    ) -> float:
        """Seconds; the moments of these layers are put into `found`, on the CPU."""
        seconds = 0.0
        for layer in layers:
            started = now(vlm.device)
            moment = usual_moment(vlm, prompts, layer=layer, batch_size=self.batch_size)
            seconds += now(vlm.device) - started
            found[layer] = moment.cpu()
            bar.update()
        return seconds


@torch.no_grad()
def usual_moment(vlm: VisionLanguageModel, prompts: Sequence[Prompt], *, layer: int, batch_size: int) -> Tensor:
    """The mean of k k^T (width, width) float64 over all tokens, by passes that end at this layer's down projection.

    One layer at a time is how the statistics of ROME and MEMIT are collected (arXiv 2202.05262, 2210.07229).
    """
    projection = vlm.down_projection(layer)
    total = torch.zeros(projection.width, projection.width, dtype=torch.float64, device=projection.weight.device)
    count = 0
    for start in range(0, len(prompts), batch_size):
        inputs, _ = collate(prompts[start : start + batch_size], vlm.tokenizer)
        kept = inputs["attention_mask"].bool()

        def read(_module: nn.Module, arguments: tuple[Any, ...], kept: Tensor = kept) -> None:
            keys = arguments[0][kept.to(arguments[0].device)]
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            total.add_(keys.T @ keys)
            raise StopForward

        handle = projection.module.register_forward_pre_hook(read)
        try:
            with suppress(StopForward):
                vlm.logits(inputs)
        finally:
            handle.remove()
        count += int(kept.sum())
    return total / count
