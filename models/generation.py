"""The greedy answers that a model gives to prompts, and its probability of a given answer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import ModelError, NotFiniteError, whole_number
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


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model writes after a prompt, blanks and line ends included."""

    text: str
    """The text without special tokens."""
    stopped: bool
    """Whether the model ended it by itself, before the maximum length."""


def generate(
    model: PreTrainedModel,
    frontend: Frontend,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
    seed: int | None = None,
) -> list[Continuation]:
    """Return one continuation per prompt, in the given order: greedy, or with a seed sampled from the distribution.

    Answers in the prompts are ignored. Rows are padded on the left and masked, so a batch gives what its prompts
    give one by one, up to floating-point rounding of the logits (a tie within it may fall either way). The global
    random state is left as it is. Raises `ModelError` for a number below 1, and for logits that are not finite.
    """
    whole_number(max_new_tokens, "max_new_tokens", least=1)
    whole_number(batch_size, "batch_size", least=1)
    bare = [prompt.with_answer(None) for prompt in prompts]
    check_room(bare, frontend.limit, max_new_tokens)
    tokenizer = frontend.tokenizer
    settings = _plain_settings(model, tokenizer, max_new_tokens, sampled=seed is not None)
    decoding, ends = _with_settings(model, settings), _ids(settings.eos_token_id)
    found: dict[int, Continuation] = {}
    with _drawing(frontend.device, seed):
        for batch in tqdm(batches(bare, batch_size), desc="answering", unit="batch", disable=not progress):
            inputs, _ = collate([bare[index] for index in batch], tokenizer, side="left")
            inputs = to_device(inputs, frontend.device, model.dtype)
            watch = [_FiniteLogits(model.dtype)]
            with torch.no_grad():
                ids = decoding.generate(**inputs, generation_config=settings, logits_processor=watch)
            new = ids[:, inputs["input_ids"].shape[1] :].cpu()
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            stopped = torch.isin(new, torch.tensor(ends, dtype=new.dtype)).any(-1).tolist()
            for index, text, is_over in zip(batch, texts, stopped, strict=True):
                found[index] = Continuation(text=text, stopped=is_over)
    return [found[index] for index in range(len(bare))]


@contextmanager
def _drawing(device: torch.device, seed: int | None) -> Iterator[None]:
    """A block that draws random numbers from a seed, after which the global random state is what it was."""
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _ids(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)


def check_room(prompts: Sequence[Prompt], limit: int | None, max_new_tokens: int) -> None:
    """Raise `ModelError` if an answer could need too many positions; the last token of an answer needs none."""
    longest = max((prompt.length for prompt in prompts), default=0)
    if limit is not None and longest + max_new_tokens - 1 > limit:
        raise ModelError(
            f"a prompt of {longest} tokens with max_new_tokens={max_new_tokens} does not fit into the model's {limit} "
            f"positions; pass max_new_tokens={limit - longest + 1} or less, or a shorter prompt"
        )


def _plain_settings(model: PreTrainedModel, tokenizer: Any, max_new_tokens: int, *, sampled: bool) -> GenerationConfig:
    """Return settings of decoding that take only the special tokens from the model's generation settings.

    sampled: draw each token from the whole distribution instead of taking the most probable one.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    first_eos = next(iter(eos), None) if isinstance(eos, list | tuple) else eos
    padding, vocab = (own.pad_token_id, tokenizer.pad_token_id, first_eos), model.config.get_text_config().vocab_size
    return GenerationConfig(
        do_sample=sampled,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}),
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
