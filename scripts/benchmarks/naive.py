"""Tracing as the scripts of the field do it: one hooked call of the whole model for each cell.

As in ROME's script, row 0 of the batch is the clean run and the other rows are corrupted; the vision tower sees the
picture once for each row, the logits of all tokens are computed, and nothing is kept from one cell to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...models import Prompt, Site, VisionLanguageModel, capture, patch
from ...tracing.engine.cells import Measure, Runs, StateCell


def naive_scores(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    runs: Runs,
    cells: Sequence[StateCell],
    measure: Measure,
    *,
    states: Mapping[Site, Tensor],
) -> Tensor:
    """(cell, metric, sample) float64 on the CPU: what `plain_scores` gives, at the field's price.

    Kinds are hidden, mlp and attention, nothing is severed. states: the base run's hidden states (`base_states`),
    which only direct effects need.
    """
    samples = runs.base.shape[0]
    inputs = {name: value.expand(samples + 1, *value.shape[1:]) for name, value in prompt.inputs.items()}
    scores = []
    for cell in cells:
        edits = _edits(vlm, runs, cell, states)
        corrupt = {Site("hidden", 0): lambda embeddings: torch.cat([embeddings[:1], runs.base.to(embeddings)])}
        with torch.no_grad(), patch(vlm, corrupt, inputs=True), patch(vlm, edits):
            logits = vlm.logits(inputs)
        scores.append(measure(logits[1:, list(runs.scored)]).double().cpu().T)
    return torch.stack(scores)


def base_states(vlm: VisionLanguageModel, runs: Runs) -> dict[Site, Tensor]:
    """Per layer the hidden states of the base run (sample, token, hidden)."""
    sites = [Site("hidden", layer) for layer in range(vlm.layers)]
    with torch.no_grad(), capture(vlm, sites) as states:
        vlm.forward(inputs_embeds=runs.base)
    return {site: states[site] for site in sites}


def _edits(
    vlm: VisionLanguageModel, runs: Runs, cell: StateCell, states: Mapping[Site, Tensor]
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """What each hook does: clean states at the cell's positions, base states at the frozen ones of a direct effect."""
    restored = {Site(cell.kind, layer): list(cell.positions) for layer in range(cell.first, cell.last + 1)}
    edits = {site: _writing(None, positions) for site, positions in restored.items()}
    if cell.is_direct:
        frozen = [position for position in runs.frozen if position not in cell.positions]
        for layer in range(vlm.layers):
            site = Site("hidden", layer)
            freeze, restore = _writing(states[site], frozen), edits.get(site)
            edits[site] = freeze if restore is None else _both(freeze, restore)
    return edits


def _writing(states: Tensor | None, positions: list[int]) -> Callable[[Tensor], Tensor]:
    """A hook that writes states (sample, token, hidden) into the corrupted rows; None: those of the clean row."""

    def write(output: Tensor) -> Tensor:
        written = output.clone()
        written[1:, positions] = output[:1, positions] if states is None else states[:, positions]
        return written

    return write


def _both(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda output: second(first(output))
