"""The greedy answers that a model gives to prompts, and its probability of a given answer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import ModelError, NotFiniteError
from .frontend import Frontend, to_device
from .prompts import Prompt, batches, collate

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Score:
    """The probability that a model assigns to a given answer after a prompt, without the end-of-sequence token."""

    log_probability: float
    """Sum of the natural log-probabilities of the answer's tokens."""
    token_log_probabilities: tuple[float, ...]
    tokens: tuple[str, ...]

    @property
    def probability(self) -> float:
        """The product of the probabilities of the answer's tokens."""
        return math.exp(self.log_probability)


def generate(
    model: PreTrainedModel,
    frontend: Frontend,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
) -> list[str]:
    """Return one greedy answer per prompt, in the given order, without special tokens and surrounding whitespace.

    Answers in the prompts are ignored. Rows are padded on the left and masked, so a batch gives what its prompts
    give one by one, up to floating-point rounding of the logits (a tie within it may fall either way). Raises
    `ModelError` if the model computes logits that are not finite.
    """
    bare = [prompt.with_answer(None) for prompt in prompts]
    check_room(bare, frontend.limit, max_new_tokens)
    tokenizer, settings = frontend.tokenizer, _greedy(model, frontend.tokenizer, max_new_tokens)
    decoding = _with_settings(model, settings)
    answers: dict[int, str] = {}
    for batch in tqdm(batches(bare, batch_size), desc="answering", unit="batch", disable=not progress):
        inputs, _ = collate([bare[index] for index in batch], tokenizer, side="left")
        inputs = to_device(inputs, frontend.device, model.dtype)
        with torch.no_grad():
            ids = decoding.generate(**inputs, generation_config=settings, logits_processor=[_FiniteLogits(model.dtype)])
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers |= {index: text.strip() for index, text in zip(batch, texts, strict=True)}
    return [answers[index] for index in range(len(bare))]


def check_room(prompts: Sequence[Prompt], limit: int | None, max_new_tokens: int) -> None:
    """Raise `ModelError` if an answer could need too many positions; the last token of an answer needs none."""
    longest = max((prompt.length for prompt in prompts), default=0)
    if limit is not None and longest + max_new_tokens - 1 > limit:
        raise ModelError(
            f"a prompt of {longest} tokens with max_new_tokens={max_new_tokens} does not fit into the model's {limit} "
            f"positions; pass max_new_tokens={limit - longest + 1} or less, or a shorter prompt"
        )


def _greedy(model: PreTrainedModel, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Return settings for greedy decoding that take only the special tokens from the model's generation settings."""
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    first_eos = next(iter(eos), None) if isinstance(eos, list | tuple) else eos
    padding, vocab = (own.pad_token_id, tokenizer.pad_token_id, first_eos), model.config.get_text_config().vocab_size
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=eos,
        pad_token_id=next((token for token in padding if token is not None and 0 <= token < vocab), None),
    )


def _with_settings(model: PreTrainedModel, settings: GenerationConfig) -> Any:
    """Return a shallow copy of the model that shares every module and hook and has these generation settings.

    `generate` takes each setting that its caller leaves unset from the model, so passing a fresh configuration
    alone would not exclude a `min_new_tokens` or a list of suppressed tokens.
    """
    shared = copy.copy(model)
    shared.generation_config = settings
    return shared


class _FiniteLogits:
    """A logits processor that changes nothing; raises `ModelError` if a row has no greatest value.

    It derives from no class of transformers, which asks for none and takes seconds to import.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _finite(scores, self.dtype)


def _finite(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits (..., vocab) unchanged; minus infinity marks an impossible token and is allowed.

    dtype: the dtype that the model computes in, which determines the advice in the error.
    """
    if not bool(logits.amax(-1).isfinite().all()):
        advice = (
            "a number overflowed there, or a weight is not finite; load the model with dtype='float32'"
            if dtype in (torch.float16, torch.bfloat16)
            else "a weight is not finite; undo the last change to the weights, or load the model again"
        )
        raise NotFiniteError(f"the model computes logits that are not finite in {dtype}, so it has no answer: {advice}")
    return logits


def score_answer(logits: Tensor, prompt: Prompt, tokenizer: Any, *, dtype: torch.dtype) -> Score:
    """Return the score of the prompt's own answer (not empty) from its logits (1, token, vocab), in float64.

    dtype: the dtype that the model computes in. Raises `ModelError` for logits that are not finite.
    """
    first = prompt.groups["answer"][0]
    predicting = _finite(logits[0, first - 1 : first - 1 + len(prompt.answer_ids)], dtype).double().log_softmax(dim=-1)
    chosen = predicting[torch.arange(len(prompt.answer_ids)), list(prompt.answer_ids)]
    return Score(
        log_probability=float(chosen.sum()),
        token_log_probabilities=tuple(chosen.tolist()),
        tokens=tuple(tokenizer.decode([token]) for token in prompt.answer_ids),
    )
