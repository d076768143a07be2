"""One backward pass through the answers of requests: what projections read and write there, and the loss's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ...models import Projection, VisionLanguageModel, capture, patch
from ...models.replay.upper import PaddedBatch, at_columns
from ..requests import EditError
from .keys import Goals, PlainGoal, TargetBatch, target_batch


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerGradients:
    """What one projection reads and writes where the answers are predicted, and the gradients of their loss.

    There is a row for each token that predicts a token of a prompt's answer (and its end, if that is asked for), in the
    order of the prompts and of their tokens.
    """

    inputs: Tensor
    """(row, width) float32 or wider: what the projection reads."""
    gradients: Tensor
    """(row, hidden): the gradient of the loss, the sum of negative log-probabilities in nats, at what it writes."""
    outputs: Tensor
    """(row, hidden): what it writes."""
    owners: Tensor
    """(row,) int64 on the CPU: the index of the prompt of each row."""
    losses: Tensor
    """(row,) the negative log-probability of the token that each row predicts, in nats."""

    def only(self, kept: Tensor) -> AnswerGradients:
        """Return the rows where `kept` (row,) is True."""
        names = ("inputs", "gradients", "outputs", "owners", "losses")
        return AnswerGradients(**{name: getattr(self, name)[kept.to(getattr(self, name).device)] for name in names})

    @classmethod
    def joined(cls, parts: Sequence[AnswerGradients]) -> AnswerGradients:
        """Return the rows of all parts, one part after the other."""
        names = ("inputs", "gradients", "outputs", "owners", "losses")
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def answer_gradients(
    vlm: VisionLanguageModel,
    goals: Sequence[PlainGoal],
    projections: Sequence[Projection],
    *,
    end: bool = True,
    rows_at_once: int = 16,
    progress: bool = False,
) -> dict[Projection, AnswerGradients]:
    """Return the inputs, outputs and gradients of projections where answers are predicted, from the model as it is now.

    The answer is fed in (teacher forcing), and its loss is the sum over its tokens, so that each token counts alike
    however prompts are divided into batches. All projections share one backward pass, which runs only over the tokens
    that predict the answer: the loss does not depend on what a projection writes there through any earlier token.

    Args:
        vlm: The model, which is left as it is.
        goals: The questions with their answers; each question of a goal is a prompt of its own.
        projections: The projections to read, from the lowest layer up.
        end: Whether the end-of-sequence token has to be predicted, too, if the model has one (default True).
        rows_at_once: Number of prompts that are run together (default 16); it bounds memory.
        progress: Show a progress bar (default False).

    Returns:
        The rows of each projection; `owners` counts the questions of all goals in their order.

    Raises:
        EditError: A projection does not run for these prompts.
        ModelError: A question cannot be made into a prompt, or the model has no gradients.

    Source: the gradient of a weight is the sum over tokens of the outer products of these two, as in MEND (arXiv
    2110.11309) and UltraEdit (arXiv 2505.14679).

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing.values import PlainGoal, answer_gradients
        >>> vlm = mt.load(tiny_vlm_path())
        >>> goal = PlainGoal(questions=(mt.Question(text="Who won?"),), target="Pruro")
        >>> (rows,) = answer_gradients(vlm, [goal], [vlm.down_projection(5)]).values()
        >>> rows.inputs.shape == (2, vlm.mlp), rows.gradients.shape == (2, vlm.hidden)  # the answer and its end
        (True, True)
    """
    prompts = [PlainGoal(questions=(question,), target=goal.target) for goal in goals for question in goal.questions]
    parts: dict[Projection, list[AnswerGradients]] = {projection: [] for projection in projections}
    starts = range(0, len(prompts), rows_at_once)
    for start in tqdm(starts, desc="gradients", unit="batch", disable=not progress, leave=False):
        own = Goals(vlm, prompts[start : start + rows_at_once])
        with vlm.gradients():
            batch = target_batch(vlm, [*own], "last", end=end)
            for projection, part in _of_batch(vlm, batch, projections, start).items():
                parts[projection].append(part)
    return {projection: AnswerGradients.joined(each) for projection, each in parts.items()}


def _of_batch(
    vlm: VisionLanguageModel, batch: TargetBatch, projections: Sequence[Projection], first: int
) -> dict[Projection, AnswerGradients]:
    """The rows of one batch, whose first prompt has the number `first`."""
    inputs = PaddedBatch.after_prefix(vlm, batch.entering, batch.start)
    written: dict[Projection, Tensor] = {}

    def tap(projection: Projection, output: Tensor) -> Tensor:
        # nothing below the lowest projection is differentiated, and so nothing of it is kept
        written[projection] = output if written else output.detach().requires_grad_()
        return written[projection]

    taps = {projection: lambda output, own=projection: tap(own, output) for projection in projections}
    with capture(vlm, projections, inputs=True) as read, patch(vlm, taps):
        logits = inputs.logits(vlm, batch.label_columns)
    if missing := [projection for projection in projections if projection not in written]:
        raise EditError(
            f"{str(missing[0])!r} does not run for these prompts, so it cannot be edited with them: its layer attends "
            "to pictures; pass requests with a picture, or other layers"
        )
    mask = batch.label_mask.to(logits.device)
    losses = cross_entropy(logits[mask], batch.labels.to(logits.device)[mask], reduction="none")
    gradients = torch.autograd.grad(losses.sum(), [written[each] for each in projections], materialize_grads=True)
    owners = (first + batch.goals)[:, None].expand(batch.label_mask.shape)[batch.label_mask]
    return {
        projection: AnswerGradients(
            inputs=_rows(batch, read[projection]),
            gradients=_rows(batch, gradient),
            outputs=_rows(batch, written[projection]),
            owners=owners,
            losses=losses.detach(),
        )
        for projection, gradient in zip(projections, gradients, strict=True)
    }


def _rows(batch: TargetBatch, states: Tensor) -> Tensor:
    """States (row, column, width) at the columns that predict the answer, (label, width) in float32 or wider."""
    picked = at_columns(states.detach(), batch.label_columns)[batch.label_mask.to(states.device)]
    return picked.to(torch.promote_types(picked.dtype, torch.float32))
