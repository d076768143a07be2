"""The answer that a reading explains, the model's own or a given one, and the logits that predict it."""

from typing import Any

from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ..errors import TraceError


def answered(vlm: VisionLanguageModel, prompt: Prompt, answer: str | None) -> Prompt:
    """The prompt with this answer after it, or with the model's own greedy one (None). TraceError if that is empty."""
    if answer is None:
        answer = vlm.answers([prompt])[0]
        if not answer:
            raise TraceError(f"the model's own answer to {prompt.question!r} is empty; pass answer= to explain another")
    return prompt.with_answer(answer)


def predicting_logits(vlm: VisionLanguageModel, prompt: Prompt, embeddings: Tensor, count: int) -> Tensor:
    """(row, answer token, vocab) float32 or wider: what the first `count` tokens of an answer are chosen from.

    embeddings (row, token, hidden) reach at least up to the token that predicts the last of them.
    """
    last = prompt.groups["last"][0]
    return vlm.forward(inputs_embeds=embeddings, positions=range(last, last + count))


def read_fields(vlm: VisionLanguageModel, told: Prompt) -> dict[str, Any]:
    """Fields by which an `ImageReading` knows its model and its prompt."""
    return {
        "model": vlm.name,
        "revision": vlm.revision,
        "question": told.question,
        "input_ids": tuple(told.inputs["input_ids"][0, : told.groups["last"][0] + 1].tolist()),
        "image_positions": told.groups["image"],
        "patches": tuple((patch.position, patch.row, patch.column, patch.image) for patch in told.patches),
    }
