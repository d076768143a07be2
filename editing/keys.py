"""What a projection looks up and what it answers: its inputs and outputs at the edited tokens."""

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
"""Where a value is put: the output of a projection, or of a whole decoder layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lookup:
    """Keys and present outputs of one goal at one place, averaged over its contexts."""

    keys: Tensor
    """(key, width) float32 or wider, mean over contexts."""
    plain_keys: Tensor
    """(key, width), of the goal's first prompt alone."""
    before: Tensor
    """(key, hidden), output at the place, mean over contexts."""


def keys_and_values(
    vlm: VisionLanguageModel, prompts: Sequence[Prompt], *, layer: int, token: str | int, end: bool = True
) -> tuple[Tensor, Tensor]:
    """(keys, values) of one fact, (key, mlp) and (key, hidden), float32, averaged over the prompts.

    The prompts state the fact in different pictures or words and carry its target as their answer
    (Prompt.with_answer). There is one key per answer position at the prompt's last token, and one key elsewhere. Values
    include the projection's bias. EditError as key_positions; ModelError for a layer that does not exist.
    """
    projection = vlm.down_projection(layer)
    (found,) = lookups(vlm, [Goal(prompts=tuple(prompts))], token, [(projection, projection)], end=end)[projection]
    return found.keys, found.before


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
    """For each projection a lookup per goal, from whole runs of the model as it is now.

    places: projections, each with the place whose output counts as its value. end and every as in target_batch.
    """
    found: dict[Projection, list[Lookup]] = {projection: [None] * len(goals) for projection, _ in places}
    for chunk in chunks(goals, rows_at_once):
        batch = target_batch(vlm, [goals[index] for index in chunk], token, end=end, every=every)
        with watched(vlm, places) as seen:
            batch.logits(vlm)
        for projection, place in places:
            for index, each in zip(chunk, split(batch, *seen(projection, place)), strict=True):
                found[projection][index] = each
    return found


@contextmanager
def watched(vlm: VisionLanguageModel, places: Sequence[tuple[Projection, Place]]) -> Iterator:
    """A function from a projection and a place to what was read and written there in the block's last run."""
    projections, outputs = {each for each, _ in places}, {place for _, place in places}
    with capture(vlm, projections, inputs=True, clone=True) as read, capture(vlm, outputs, clone=True) as written:
        yield lambda projection, place: (read[projection], written[place])


def split(batch: TargetBatch, inputs: Tensor, outputs: Tensor) -> list[Lookup]:
    """One lookup per goal of a batch, from a projection's inputs and a place's outputs (row, column, width)."""
    keys, values = (wide_at(batch, states) for states in (inputs, outputs))
    found = []
    for goal in range(int(batch.goals.max()) + 1):
        rows = ((batch.goals == goal) & ~batch.essence).nonzero().flatten()
        count = int(batch.key_mask[rows[0]].sum())
        mine, theirs = keys[rows.to(keys.device), :count], values[rows.to(values.device), :count]
        found.append(Lookup(keys=mine.mean(0), plain_keys=mine[0], before=theirs.mean(0)))
    return found


def wide_at(batch: TargetBatch, states: Tensor) -> Tensor:
    """(row, key, width) in float32 or wider: states at the key columns."""
    picked = at_columns(states, batch.key_columns)
    return picked.to(torch.promote_types(picked.dtype, torch.float32))


def chunks(goals: Sequence[Goal], rows_at_once: int) -> list[list[int]]:
    """Indices of goals in batches of at most so many prompts (or one goal), prompts of like length together."""
    order = sorted(range(len(goals)), key=lambda index: goals[index].prompts[0].length)
    found: list[list[int]] = []
    room = 0
    for index in order:
        size = len(goals[index].prompts) + len(goals[index].essence)
        if room < size:
            found.append([])
            room = rows_at_once
        found[-1].append(index)
        room -= size
    return found
