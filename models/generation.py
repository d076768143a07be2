"""Greedy answers in left-padded batches, and the probability a model gives to an answer."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import ModelError
from .prompts import Prompt, collate

_NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "return_dict_in_generate": False,
}
"""Values that change nothing; None would not do, since `generate` fills it with the model's own setting again."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How probable a model finds a given answer after a prompt; end-of-sequence is not counted."""

    log_probability: float
    """Sum over the answer's tokens, natural logarithm."""
    token_log_probabilities: tuple[float, ...]
    tokens: tuple[str, ...]

    @property
    def probability(self) -> float:
        """Product over the answer's tokens."""
        return math.exp(self.log_probability)


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int, progress: bool
) -> list[str]:
    """One greedy answer per prompt, special tokens and outer blanks removed, in the order given.

    Answers that prompts carry are left out. Rows are padded on the left and masked, so a batch gives what its prompts
    give one by one, up to floating-point rounding of the logits (a tie within it may fall either way).
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ModelError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
    settings = _greedy(model, tokenizer, max_new_tokens)
    answers: list[str] = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc="answering", unit="batch", disable=not progress):
        chunk = [prompt.with_answer(None) for prompt in prompts[start : start + batch_size]]
        inputs, _ = collate(chunk, tokenizer, side="left")
        with torch.no_grad():
            ids = model.generate(**inputs, generation_config=settings)
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def _greedy(model: nn.Module, tokenizer: Any, max_new_tokens: int) -> Any:
    """The model's own generation settings (stop tokens) without sampling, penalties or a length of their own."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(**_NEUTRAL, max_new_tokens=max_new_tokens, max_length=None)
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        eos = settings.eos_token_id
        fallback = eos[0] if isinstance(eos, list) else eos
        settings.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else fallback
    return settings


def score_answer(logits: Tensor, prompt: Prompt, tokenizer: Any) -> Score:
    """The score of the prompt's own answer (not empty) from its logits (1, token, vocab), in float64."""
    first = prompt.groups["answer"][0]
    predicting = logits[0, first - 1 : first - 1 + len(prompt.answer_ids)].double().log_softmax(dim=-1)
    chosen = predicting[torch.arange(len(prompt.answer_ids)), list(prompt.answer_ids)]
    return Score(
        log_probability=float(chosen.sum()),
        token_log_probabilities=tuple(chosen.tolist()),
        tokens=tuple(tokenizer.decode([token]) for token in prompt.answer_ids),
    )
