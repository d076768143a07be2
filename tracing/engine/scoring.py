"""The scores of an answer: its probability, log probability or logit difference, or any function of logits.

Causal traces, attention knockouts and pruning all score through `Scoring`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models import Prompt, VisionLanguageModel
from ...models.frame import DecoderInput
from .cells import Measure, TraceError

METRICS = ("probability", "log_probability", "logit_difference")
FIRST, WHOLE = "first token", "answer"
"""Scores of knockouts and pruning: the probability of the answer's first token, and of all its tokens."""

Metric = str | Callable[[Tensor], Tensor]
"""A name in `METRICS`, or a function from logits (row, answer position, vocab) to scores (row,)."""

_LONGEST_FOIL = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """The tokens that are scored, and the metrics that score them."""

    metrics: tuple[Metric, ...]
    answer_ids: tuple[int, ...]
    """The answer's first token, or all of its tokens."""
    foil_ids: tuple[int, ...] = ()
    """The tokens that a logit difference subtracts."""
    is_predicted: bool = True
    """True if the answer's first token is the likeliest one after the clean prompt."""

    @classmethod
    def of_answer(cls, ids: Sequence[int], *, whole: bool) -> "Scoring":
        """Return a scoring by the first token's probability and, if `whole`, by that of all tokens together."""
        return cls(metrics=(FIRST, WHOLE) if whole else (FIRST,), answer_ids=tuple(ids))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics; functions go by their own name."""
        return tuple(_name(metric) for metric in self.metrics)

    @property
    def branches(self) -> tuple[tuple[tuple[int, ...], Measure], ...]:
        """The token sequences that follow the prompt, each with the function that scores it.

        The first one measures every metric and, last, the answer's probability. A foil of several tokens is predicted
        after other tokens than the answer's and needs a second sequence, on which only its logits are summed.
        """
        answer = (self.answer_ids, self._measure)
        return (answer, (self.foil_ids, self._foil_logits)) if len(self.foil_ids) > 1 else (answer,)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return scores (..., metric, sample) from the columns (..., column, sample) that the branches measured."""
        scores = parts[0][..., : len(self.metrics), :].clone()
        for index, metric in enumerate(self.metrics):
            if metric == "logit_difference" and len(parts) > 1:
                scores[..., index, :] -= parts[1][..., 0, :]
        return scores

    def _measure(self, logits: Tensor) -> Tensor:
        """Return columns (row, metric + 1) float64 from logits (row, answer position, vocab)."""
        logits = logits.double()
        chosen = logits[:, range(len(self.answer_ids)), list(self.answer_ids)]
        each = chosen - _finite(logits.logsumexp(-1))
        log_probability = each.sum(-1)
        probability = log_probability.exp()
        values = {"probability": probability, "log_probability": log_probability}
        values |= {FIRST: each[:, 0].exp(), WHOLE: probability}
        if len(self.foil_ids) > 0:
            foil = logits[:, 0, self.foil_ids[0]] if len(self.foil_ids) == 1 else 0.0
            values["logit_difference"] = chosen.sum(-1) - foil
        columns = [values[metric] if isinstance(metric, str) else _called(metric, logits) for metric in self.metrics]
        return torch.stack([*columns, probability], dim=-1)

    def _foil_logits(self, logits: Tensor) -> Tensor:
        """Return (row, 1) float64: the sum of the foil's own logits."""
        chosen = logits.double()[:, range(len(self.foil_ids)), list(self.foil_ids)]
        return _finite(chosen.sum(-1, keepdim=True))


def _finite(values: Tensor) -> Tensor:
    """Return the values if all of them are finite."""
    if not bool(values.isfinite().all()):
        raise TraceError(
            "the model computes logits that are not finite, so nothing can be scored: a number overflowed or a weight "
            "is damaged; load it with a dtype of a wider range, such as 'bfloat16', or load an intact checkpoint"
        )
    return values


def _name(metric: Metric) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _called(metric: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    scores = metric(logits)
    if not isinstance(scores, Tensor) or scores.shape != logits.shape[:1]:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise TraceError(
            f"the metric {_name(metric)} must turn logits {tuple(logits.shape)} into one score per row, "
            f"({len(logits)},); it returned {shape}"
        )
    if logits.requires_grad and not scores.requires_grad:
        raise TraceError(
            f"the metric {_name(metric)} has no gradient, by which effects could be estimated; leave out exact_cells"
        )
    return scores.double()


def choose_scoring(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    runs: tuple[DecoderInput, DecoderInput],
    *,
    answer: str | None,
    foil: str | None,
    whole_answer: bool,
    metrics: Metric | Sequence[Metric],
) -> Scoring:
    """Return the scoring of a trace with these clean and corrupted runs.

    Without an answer, the model's own is used. Without a foil, a logit difference subtracts the corrupted run's
    answer (its likeliest token that is not the answer's). Raises `TraceError` for an unknown metric, and for a foil
    that no metric uses or that is scored by the same tokens as the answer.
    """
    metrics = _checked(metrics)
    predicted = int(vlm.next_token_probabilities(runs[0].of_rows([0]))[0].argmax())
    if answer is None and whole_answer:
        answer = vlm.answers([prompt])[0]
    answer_ids = (predicted,) if answer is None else scored_ids(prompt, answer, whole=whole_answer)
    foil_ids: tuple[int, ...] = ()
    if foil is not None and "logit_difference" not in metrics:
        raise TraceError(
            "a foil plays no part without metrics='logit_difference' (--metrics logit_difference); ask for it or leave "
            "out the foil"
        )
    if foil is not None:
        foil_ids = prompt.with_answer(foil).answer_ids
        foil_ids = foil_ids if whole_answer else foil_ids[:1]
    elif "logit_difference" in metrics:
        foil_ids = _corrupted_answer(vlm, runs[1], answer_ids, whole_answer)
    if foil_ids and foil_ids == answer_ids:
        raise TraceError(
            f"the foil {vlm.decode(list(foil_ids))!r} and the answer are scored by the same tokens; pass another foil, "
            "or whole_answer=True if they differ in later tokens"
        )
    is_predicted = answer_ids[0] == predicted
    return Scoring(metrics=metrics, answer_ids=answer_ids, foil_ids=foil_ids, is_predicted=is_predicted)


def _checked(metrics: Metric | Sequence[Metric]) -> tuple[Metric, ...]:
    chosen = (metrics,) if isinstance(metrics, str) or callable(metrics) else tuple(metrics)
    unknown = [metric for metric in chosen if not callable(metric) and metric not in METRICS]
    if unknown or not chosen:
        raise TraceError(
            f"no metric {unknown[0] if unknown else '(none given)'!r}; pass some of {', '.join(METRICS)}, or a "
            "function from logits (row, answer position, vocab) to scores (row,)"
        )
    chosen = tuple(dict.fromkeys(chosen))
    names = [_name(metric) for metric in chosen]
    if len(set(names)) < len(names):
        raise TraceError(f"several metrics of one name among {', '.join(names)}; give each function a name of its own")
    return chosen


def scored_ids(prompt: Prompt, answer: str | None, *, whole: bool) -> tuple[int, ...]:
    """Return the answer's scored tokens: the first, or all if `whole`. Raises `TraceError` for an empty answer."""
    if not answer:
        raise TraceError(f"the answer to {prompt.question!r} is empty; pass answer= to score another")
    ids = prompt.with_answer(answer).answer_ids
    return ids if whole else ids[:1]


def _corrupted_answer(
    vlm: VisionLanguageModel, corrupted: DecoderInput, answer_ids: tuple[int, ...], whole: bool
) -> tuple[int, ...]:
    """Return the likeliest token after the corrupted prompt other than the answer's; if whole, continued greedily."""
    probabilities = vlm.next_token_probabilities(corrupted).mean(0)
    probabilities[answer_ids[0]] = -1.0
    ids = (int(probabilities.argmax()),)
    while whole and len(ids) < _LONGEST_FOIL:
        following = int(vlm.next_token_probabilities(vlm.extend(corrupted, (*ids, 0))).mean(0).argmax())
        if following in vlm.end_ids:
            break
        ids = (*ids, following)
    return ids


def same_answer(a: str, b: str) -> bool:
    """Return whether two answers are equal except for case, surrounding blanks and a final full stop."""
    plain = [text.strip().lower().removesuffix(".").rstrip() for text in (a, b)]
    return plain[0] == plain[1]
