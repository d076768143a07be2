"""What is edited where: goals with their targets in batches, and the keys and values at the edited tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...data.facts import EditRequest, Question
from ...models import ModelError, Projection, Prompt, Site, VisionLanguageModel, capture
from ...models.errors import plain_number
from ...models.frame import DecoderInput
from ...models.replay.upper import PaddedBatch, at_columns
from ..requests import EditError


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One fact in several contexts, which share their keys and values."""

    prompts: tuple[Prompt, ...]
    """The contexts; each carries the target as its answer, and keys and losses are averaged over them."""
    essence: tuple[Prompt, ...] = ()
    """Prompts whose next token should stay as it is; they get the first key's change and no target."""
    ending: tuple[int, ...] = ()
    """Ids of what the model is to say after the target."""
    ending_key: bool = False
    """Whether the last token of the target has a key for the ending, where answer positions have keys."""


@dataclass(frozen=True, kw_only=True)
class PlainGoal:
    """One goal in plain values."""

    questions: tuple[Question, ...]
    target: str | None
    """The answer that all questions get; None for their prompts without an answer."""
    essence: tuple[Question, ...] = ()
    ending: tuple[int, ...] = ()
    ending_key: bool = False

    def made(self, vlm: VisionLanguageModel) -> Goal:
        """Return the goal with the prompts of this model."""
        return Goal(
            prompts=tuple(vlm.prompt_for(question).with_answer(self.target) for question in self.questions),
            essence=tuple(vlm.prompt_for(question) for question in self.essence),
            ending=self.ending,
            ending_key=self.ending_key,
        )


class Goals:
    """Goals whose prompts are made each time that a goal is read, so that no more than a batch of them exists."""

    def __init__(self, vlm: VisionLanguageModel, plain: Sequence[PlainGoal] = ()) -> None:
        self.vlm, self.plain = vlm, tuple(plain)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> Goal:
        return self.plain[index].made(self.vlm)

    def __iter__(self) -> Iterator[Goal]:
        return (plain.made(self.vlm) for plain in self.plain)


def goals_of(request: EditRequest, *, ending: tuple[int, ...] = (), ending_key: bool = False) -> tuple[PlainGoal, ...]:
    """Return what a request asks for: its question and contexts share a key, each rewrite prompt has one of its own.

    The ending and its key are those of `Goal`.
    """
    own: dict[str, Any] = {"target": request.target, "ending": ending, "ending_key": ending_key}
    first = PlainGoal(questions=(request.question, *request.contexts), essence=request.essence, **own)
    return (first, *(PlainGoal(questions=(question,), **own) for question in request.rewrite_prompts))


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetBatch:
    """Prompts of many facts with their targets, padded so that the first edited token has the same column in all rows.

    A change at that column leaves everything before it as it is, so the prefix (with the picture) is run only once, by
    `PaddedBatch.after_prefix(vlm, batch.entering, batch.start)`. Columns are counted from the end of that prefix.
    """

    entering: DecoderInput
    """What the text stack reads; embeddings are zero where padded."""
    start: int
    """The token that is column 0: the first edited one, or one before it if earlier tokens see that one."""
    goals: Tensor
    """(row,), the goal that a row belongs to."""
    essence: Tensor
    """(row,), True for rows without a target."""
    key_columns: Tensor
    """(row, key), edited tokens; 0 where a goal has fewer keys."""
    key_mask: Tensor
    """(row, key), True for real keys."""
    label_columns: Tensor
    """(row, label), tokens that predict the target (the one that predicts the next token, in rows without a target)."""
    labels: Tensor
    """(row, label), ids of the target's tokens and of what is to follow them."""
    label_mask: Tensor
    """(row, label), True for real labels."""
    ending_mask: Tensor
    """(row, label), True for labels that are the ending of a goal."""

    def rows(self, rows: Tensor) -> TargetBatch:
        """The batch of only some rows, (row,) indices in ascending order."""
        names = [each.name for each in fields(self) if each.name not in ("start", "entering")]
        parts = {name: getattr(self, name)[rows.to(getattr(self, name).device)] for name in names}
        return replace(self, entering=self.entering.of_rows(rows.tolist()), **parts)


@torch.no_grad()
def target_batch(
    vlm: VisionLanguageModel, goals: Sequence[Goal], token: str | int, *, end: bool = True, every: bool = True
) -> TargetBatch:
    """Return the batch for these goals, to be edited at the token.

    Args:
        vlm: The model.
        goals: The goals, whose prompts carry their targets as answers.
        token: The token that is edited, as in `key_positions`.
        end: Whether the end-of-sequence token has to be predicted after the target, with a key of its own, in place of
            the goal's ending (default True).
        every: As in `key_positions`.

    Raises:
        EditError: As `key_positions`, and if the target of a goal has different numbers of tokens in its contexts.
    """
    ending = end_ids(vlm) if end else ()
    rows, keys = _edited_rows(goals, token, end=bool(ending), every=every)
    start = max(each[0] for each in keys)
    inputs = [vlm.decoder_input(prompt.inputs) for _, prompt, _ in rows]
    entering = DecoderInput.padded(inputs, [start - each[0] for each in keys])
    split = entering.frame.split_before(start)
    labels, label_mask = _padded(
        [() if bare else (*prompt.answer_ids, *(ending or goals[index].ending)) for index, prompt, bare in rows]
    )
    key_columns, key_mask = _padded([[position - each[0] + start - split for position in each] for each in keys])
    first = torch.tensor([prompt_end(prompt) - 1 - each[0] for (_, prompt, _), each in zip(rows, keys, strict=True)])
    counted = torch.where(label_mask, torch.arange(labels.shape[1]), 0)
    return TargetBatch(
        entering=entering,
        start=split,
        goals=torch.tensor([index for index, _, _ in rows]),
        essence=torch.tensor([bare for _, _, bare in rows]),
        key_columns=key_columns,
        key_mask=key_mask,
        label_columns=first[:, None] + counted + start - split,
        labels=labels,
        label_mask=label_mask,
        ending_mask=_ending_mask(label_mask, [0 if ending else len(goals[index].ending) for index, _, _ in rows]),
    )


def _ending_mask(label_mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """(row, label), True for the last so many labels of each row that has a target."""
    from_end = label_mask.flip(-1).cumsum(-1).flip(-1)  # 1 for the last label
    return label_mask & (from_end <= torch.tensor(sizes)[:, None])


def check_goals(
    vlm: VisionLanguageModel, goals: Sequence[Goal] | Goals, token: str | int, *, end: bool = True, every: bool = True
) -> None:
    """Raise the `EditError` that `target_batch` would raise for these goals, without running the model."""
    for goal in goals:
        _edited_rows([goal], token, end=end and bool(end_ids(vlm)), every=every)


def _edited_rows(
    goals: Sequence[Goal], token: str | int, *, end: bool, every: bool
) -> tuple[list[tuple[int, Prompt, bool]], list[tuple[int, ...]]]:
    """Rows of a batch (goal, prompt, whether it has no target), and the positions to edit in each."""
    rows = [(index, prompt, False) for index, goal in enumerate(goals) for prompt in goal.prompts]
    rows += [(index, prompt.with_answer(None), True) for index, goal in enumerate(goals) for prompt in goal.essence]
    keys = [
        key_positions(prompt, token, end=end or goals[index].ending_key, every=every and not bare)
        for index, prompt, bare in rows
    ]
    _check_contexts(rows, keys, token)
    return rows, keys


def key_positions(prompt: Prompt, token: str | int, *, end: bool = True, every: bool = True) -> tuple[int, ...]:
    """Return the positions to edit in a prompt that carries its target as answer.

    At the prompt's last token there is one position per answer position, since the later tokens of an answer are
    produced where the first key never occurs. Anywhere else there is one position.

    Args:
        prompt: The prompt, with its target as answer.
        token: The name of a token group (its last position counts) or a position in the prompt, negative from its end.
        end: Whether the last target token counts as well, which predicts that the answer is over (default True).
        every: Whether the answer's positions are edited at all (default True); False leaves one position.

    Raises:
        EditError: For a token that the prompt lacks.
    """
    length, token = prompt_end(prompt), plain_number(token)
    try:
        positions = prompt.positions(token + length if isinstance(token, int) and token < 0 else token)
    except ModelError:
        positions = ()
    if not positions or not 0 <= max(positions) < length:
        named = ", ".join(name for name, found in prompt.groups.items() if found and max(found) < length)
        raise EditError(
            f"cannot edit at token {token!r} of {prompt.question!r}: the prompt has positions 0 to {length - 1} and "
            f"groups {named}; pass one of these, or make the prompt with constraint='the phrase that names the thing'"
        )
    position = max(positions)
    is_answer = every and position == length - 1
    return tuple(range(position, position + max(1, len(prompt.answer_ids) + end))) if is_answer else (position,)


def prompt_end(prompt: Prompt) -> int:
    """The number of tokens before the answer."""
    return prompt.positions("last")[-1] + 1


def end_ids(vlm: VisionLanguageModel) -> tuple[int, ...]:
    """The id that ends an answer (the first of several), or nothing for a model without one."""
    return vlm.end_ids[:1]


def _check_contexts(
    rows: Sequence[tuple[int, Prompt, bool]], keys: Sequence[tuple[int, ...]], token: str | int
) -> None:
    found: dict[int, set[tuple[int, int]]] = {}
    for (index, prompt, bare), each in zip(rows, keys, strict=True):
        if not bare:
            found.setdefault(index, set()).add((len(prompt.answer_ids), len(each)))
    for index, sizes in found.items():
        if len(sizes) > 1:
            question = next(prompt.question for at, prompt, _ in rows if at == index)
            raise EditError(
                f"the contexts of {question!r} disagree on the number of target tokens "
                f"({sorted({tokens for tokens, _ in sizes})}) or on whether {token!r} is the last token; "
                "use one template for all, or pass them as `rewrite_prompts`, with keys of their own"
            )


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The numbers with zeros after those of each row, (row, longest), and the mask that is True for real ones."""
    longest = max(1, *(len(row) for row in rows))
    numbers = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return numbers, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


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
    goals: Sequence[Goal] | Goals,
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
        inputs = PaddedBatch.after_prefix(vlm, batch.entering, batch.start)
        with watched(vlm, places) as captured:
            inputs.logits(vlm, batch.label_columns)
        for projection, place in places:
            results[projection].update(zip(chunk, split(batch, *captured(projection, place)), strict=True))
    return {projection: [own[index] for index in range(len(goals))] for projection, own in results.items()}


@contextmanager
def watched(vlm: VisionLanguageModel, places: Sequence[tuple[Projection, Place]]) -> Iterator:
    """Yield a function from a projection and a place to what they read and wrote in the last run in the block."""
    projections, outputs = {projection for projection, _ in places}, {place for _, place in places}
    with capture(vlm, projections, inputs=True, clone=True) as read, capture(vlm, outputs, clone=True) as written:
        yield lambda projection, place: (_of_run(read, projection), _of_run(written, place))


def _of_run(states: Mapping[Any, Tensor], key: object) -> Tensor:
    """Return what a part of the model read or wrote. Raises `EditError` if it did not run."""
    if key not in states:
        raise EditError(
            f"{str(key)!r} does not run for these prompts, so it cannot be edited with them: its layer attends to "
            "pictures; pass requests with a picture, or another layer"
        )
    return states[key]


def split(batch: TargetBatch, inputs: Tensor, outputs: Tensor) -> list[Lookup]:
    """Return one lookup per goal of a batch, from a projection's inputs and a place's outputs (row, column, width)."""
    keys, values = (wide_at(batch, states) for states in (inputs, outputs))
    result = []
    for goal in range(int(batch.goals.max()) + 1):
        rows = ((batch.goals == goal) & ~batch.essence).nonzero().flatten()
        count = int(batch.key_mask[rows[0]].sum())
        read, written = keys[rows.to(keys.device), :count], values[rows.to(values.device), :count]
        result.append(Lookup(keys=read.mean(0), plain_keys=read[0].clone(), before=written.mean(0)))
    return result


def wide_at(batch: TargetBatch, states: Tensor) -> Tensor:
    """States at the key columns, (row, key, width), in float32 or wider."""
    picked = at_columns(states, batch.key_columns)
    return picked.to(torch.promote_types(picked.dtype, torch.float32))


def chunks(goals: Sequence[Goal] | Goals, rows_at_once: int) -> list[list[int]]:
    """Indices of goals in batches of at most `rows_at_once` prompts (or one goal), goals of similar length together."""
    if len(goals) == 1:
        return [[0]]
    extents = [(goal.prompts[0].length, len(goal.prompts) + len(goal.essence)) for goal in goals]
    order = sorted(range(len(goals)), key=lambda index: extents[index][0])
    batches: list[list[int]] = []
    room = 0
    for index in order:
        size = extents[index][1]
        if room < size:
            batches.append([])
            room = rows_at_once
        batches[-1].append(index)
        room -= size
    return batches
