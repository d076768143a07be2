"""Keys and values: what a projection reads, and what it or its layer writes, at the edited tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import Projection, Prompt, Site, VisionLanguageModel, capture
from ..models.replay.padded import at_columns
from .targets import Goal, TargetBatch, target_batch

Place = Projection | Site
"""Where a value is put: the output of a projection or of a whole decoder layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lookup:
    """Keys and current outputs of one goal at one place, averaged over its contexts."""

    keys: Tensor
    """(key, width) float32 or wider, inputs of the projection: mean over contexts."""
    plain_keys: Tensor
    """(key, width), inputs of the projection in the goal's first prompt alone."""
    before: Tensor
    """(key, hidden), outputs of the place before the edit: mean over contexts."""


def keys_and_values(
    vlm: VisionLanguageModel, prompts: Sequence[Prompt], *, layer: int, token: str | int, end: bool = True
) -> tuple[Tensor, Tensor]:
    """Return what a layer's down projection reads and writes at the edited tokens of one fact.

    Args:
        vlm: The model.
        prompts: The fact in different pictures or words; each prompt carries the target as its answer
            (`Prompt.with_answer`).
        layer: The layer, negative from the end.
        token: The token that is edited, as in `key_positions`: one key per answer position at the prompt's last token,
            and one key elsewhere.
        end: Whether the last token of the answer has a key, too, which predicts that the answer is over (default True).

    Returns:
        Keys (key, mlp) and values (key, hidden), float32 or wider, averaged over the prompts. Values include the
        projection's bias.

    Raises:
        EditError: For a token that a prompt lacks, or prompts that disagree on the number of target tokens.
        ModelError: For a layer that does not exist.

    Source: ROME, arXiv 2202.05262, equation 3.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "What colour is this?", answer="Pruro")
        >>> keys, values = keys_and_values(vlm, [prompt], layer=4, token="last")
        >>> keys.shape == (len(prompt.answer_ids) + 1, vlm.mlp), values.shape == (len(keys), vlm.hidden)
        (True, True)
    """
    projection = vlm.down_projection(layer)
    (lookup,) = lookups(vlm, [Goal(prompts=tuple(prompts))], token, [(projection, projection)], end=end)[projection]
    return lookup.keys, lookup.before


@torch.no_grad()
def lookups(
    vlm: VisionLanguageModel,
    goals: Sequence[Goal],
    token: str | int,
    places: Sequence[tuple[Projection, Place]],
    *,
    end: bool = True,
    every: bool = True,
    rows_at_once: int = 64,
) -> dict[Projection, list[Lookup]]:
    """Return for each projection one lookup per goal, from whole runs of the model as it is now.

    Args:
        vlm: The model.
        goals: The goals to look up.
        token: The token that is edited, as in `key_positions`.
        places: Projections, each with the place whose output counts as its value.
        end: As in `target_batch`.
        every: As in `target_batch`.
        rows_at_once: Number of prompts that are run together (default 64).

    Raises:
        EditError: As `target_batch`.
    """
    results: dict[Projection, dict[int, Lookup]] = {projection: {} for projection, _ in places}
    for chunk in chunks(goals, rows_at_once):
        batch = target_batch(vlm, [goals[index] for index in chunk], token, end=end, every=every)
        with watched(vlm, places) as captured:
            batch.logits(vlm)
        for projection, place in places:
            results[projection].update(zip(chunk, split(batch, *captured(projection, place)), strict=True))
    return {projection: [own[index] for index in range(len(goals))] for projection, own in results.items()}


@contextmanager
def watched(vlm: VisionLanguageModel, places: Sequence[tuple[Projection, Place]]) -> Iterator:
    """Yield a function from a projection and a place to what they read and wrote in the last run in the block."""
    projections, outputs = {projection for projection, _ in places}, {place for _, place in places}
    with capture(vlm, projections, inputs=True, clone=True) as read, capture(vlm, outputs, clone=True) as written:
        yield lambda projection, place: (read[projection], written[place])


def split(batch: TargetBatch, inputs: Tensor, outputs: Tensor) -> list[Lookup]:
    """Return one lookup per goal of a batch, from a projection's inputs and a place's outputs (row, column, width)."""
    keys, values = (wide_at(batch, states) for states in (inputs, outputs))
    result = []
    for goal in range(int(batch.goals.max()) + 1):
        rows = ((batch.goals == goal) & ~batch.essence).nonzero().flatten()
        count = int(batch.key_mask[rows[0]].sum())
        read, written = keys[rows.to(keys.device), :count], values[rows.to(values.device), :count]
        result.append(Lookup(keys=read.mean(0), plain_keys=read[0], before=written.mean(0)))
    return result


def wide_at(batch: TargetBatch, states: Tensor) -> Tensor:
    """States at the key columns, (row, key, width), in float32 or wider."""
    picked = at_columns(states, batch.key_columns)
    return picked.to(torch.promote_types(picked.dtype, torch.float32))


def chunks(goals: Sequence[Goal], rows_at_once: int) -> list[list[int]]:
    """Indices of goals in batches of at most `rows_at_once` prompts (or one goal), goals of similar length together."""
    order = sorted(range(len(goals)), key=lambda index: goals[index].prompts[0].length)
    batches: list[list[int]] = []
    room = 0
    for index in order:
        size = len(goals[index].prompts) + len(goals[index].essence)
        if room < size:
            batches.append([])
            room = rows_at_once
        batches[-1].append(index)
        room -= size
    return batches
