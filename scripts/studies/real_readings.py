"""Readings of the study of a real model: flows of attention, when the answer appears, image tokens, cliff, failure.

Each is an analysis for `multrace.workflow.run`. The questions come from `real_facts`; their `extra` holds the model's
own answer, which is what is followed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...data import Question
from ...models import Prompt, VisionLanguageModel
from ...models.replay.observe import masking
from ...tracing import (
    AttentionContributions,
    AttentionKnockout,
    Box,
    Engine,
    ImagePruning,
    attention_contributions,
    attention_knockout,
    box_positions,
    failure_features,
    logit_lens,
    prune_image_tokens,
)
from ...workflow import Analysis, Outcome, Summary, Task, question_of_record
from .real_traces import SavedAverage, seed_of

FLOWS = (
    "image -> question",
    "image -> constraint",
    "image -> last",
    "question -> last",
    "constraint -> last",
    "last -> last",
)
"""The flows from the picture to the answer, after arXiv 2411.18620, and those through the constraint."""
BOXED_FLOWS = ("object -> question", "other patches -> question")
"""The first flow, by whether the image tokens show the flag."""
PLACES = ("constraint_last", "last")
"""The tokens at which the answer is looked for."""
EARLY = 1 / 4
"""Share of the layers, from the first one, whose contributions rank the image tokens: those in which words read them
(arXiv 2406.04236). In later ones states are longer, so that they would outweigh all others."""
BEST, RANDOM = "best", "random"
ONLY_BOX, NO_BOX, NONE = "only the box", "all but the box", "none"


def own_answer(question: Question) -> str:
    """Return the model's own answer, which `real_facts` wrote into the question."""
    return str(question.extra["answer"])


@dataclass(frozen=True, kw_only=True)
class Flows(Analysis):
    """What the answer's first token loses without attention from one group of tokens to another."""

    name: ClassVar[str] = "flows"

    windows: tuple[int, ...]
    """Numbers of layers that are cut together."""
    checks: int = 0
    """Number of cells of each question that the engine computes again as a check."""

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the knockout of one question."""
        question = question_of_record(task.record)
        flows = attention_knockout(
            vlm,
            vlm.prompt_for(question),
            flows=(*FLOWS, *(BOXED_FLOWS if question.boxes else ())),
            windows=self.windows,
            boxes=_boxes(question),
            answer=own_answer(question),
            engine=Engine(checks=self.checks),
            progress=False,
        )
        return Outcome(row={"question": question.text}, results={"knockout": flows})

    def summary(self) -> Summary:
        """Return the average of all knockouts."""
        return SavedAverage("knockout", AttentionKnockout)


@dataclass(frozen=True, kw_only=True)
class Emergence(Analysis):
    """The rank and probability of the answer's first token after every layer, at two tokens of the prompt."""

    name: ClassVar[str] = "emergence"

    top: int = 1
    """Number of likeliest tokens that are kept of each state."""

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the logit lens of one question."""
        question = question_of_record(task.record)
        prompt, answer = vlm.prompt_for(question), own_answer(question)
        token = prompt.answer_tokens(answer)[0]
        options = {"positions": PLACES, "words": (token,), "top": self.top, "progress": False}
        lens = logit_lens(vlm, prompt, answer=answer, **options)
        row = {f"first layer at {place}": lens.first_layer(token, position=place) for place in PLACES}
        row["token"] = token
        return Outcome(row={"question": question.text, **row}, results={"lens": lens})

    def summary(self) -> Summary:
        """Return a summary with nothing besides the table."""
        return Summary()


@dataclass(frozen=True, kw_only=True)
class ImageTokens(Analysis):
    """Contributions of the image tokens to the constraint, and whether the answer stays with a few image tokens only.

    All other image tokens are cut from every other token in all layers. The tokens that stay are those with the largest
    shares of the contributions (`token_shares`); equally many at random; those that show the flag's box; or those that
    do not.
    """

    name: ClassVar[str] = "image tokens"

    keep: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Numbers of image tokens that stay."""

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the contributions of one question, and for each set of image tokens whether the answer stays."""
        question = question_of_record(task.record)
        prompt = vlm.prompt_for(question)
        image = prompt.groups["image"]
        options = {"queries": "constraint", "sources": "image", "by_head": False, "progress": False}
        contributions = attention_contributions(vlm, prompt, **options)
        shares = token_shares(contributions.image_mass())
        box = {place for each in _boxes(question) for place in box_positions(vlm, prompt, each)}
        token = prompt.answer_tokens(own_answer(question))[0]
        sets = dict(self._sets(image, shares, box, seed_of(question)))
        stays = {name: _likeliest_without(vlm, prompt, set(image) - places) == token for name, places in sets.items()}
        inside = [place in box for place in image]
        row = {
            "question": question.text,
            "box tokens": sum(inside),
            "box mass": float(shares[inside].sum()),
            **stays,
        }
        small = replace(contributions, weights=contributions.weights.mean(1, keepdim=True))
        return Outcome(row=row, results={"contributions": small})

    def _sets(self, image: Sequence[int], shares: Tensor, box: set[int], seed: int) -> Iterator[tuple[str, set[int]]]:
        """Yield the name and the positions of each set of image tokens that stay."""
        ranked = [image[index] for index in shares.argsort(descending=True).tolist()]
        mixed = [image[index] for index in torch.randperm(len(image), generator=_generator(seed)).tolist()]
        for count in self.keep:
            yield f"{BEST} {count}", set(ranked[:count])
            yield f"{RANDOM} {count}", set(mixed[:count])
        yield ONLY_BOX, box
        yield NO_BOX, set(image) - box
        yield NONE, set()

    def summary(self) -> Summary:
        """Return the average contributions."""
        return SavedAverage("contributions", AttentionContributions)


def token_shares(mass: Tensor) -> Tensor:
    """Return the share (image token,) of the contributions (layer, image token), mean over the early layers.

    Example:
        >>> import torch
        >>> from multrace.scripts.studies.real_readings import token_shares
        >>> token_shares(torch.tensor([[1.0, 3.0], [9.0, 1.0], [9.0, 1.0], [9.0, 1.0]]))
        tensor([0.2500, 0.7500])
    """
    early = mass[: max(1, round(len(mass) * EARLY))]
    return (early / early.sum(1, keepdim=True)).mean(0)


def _likeliest_without(vlm: VisionLanguageModel, prompt: Prompt, cut: set[int]) -> int:
    """Return the model's next token if no other token attends to these positions in any layer."""
    entering = vlm.embed(prompt)
    hidden = torch.zeros(1, entering.length, entering.length, dtype=torch.bool)
    hidden[:, :, sorted(cut)] = True
    hidden[0].fill_diagonal_(False)
    with masking(vlm, dict.fromkeys(range(vlm.layers), hidden)):
        return int(vlm.next_token_probabilities(entering).argmax())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, kw_only=True)
class Cliff(Analysis):
    """The model's free answer without any image token from each layer on, as long as its own answer is."""

    name: ClassVar[str] = "cliff"

    step: int = 1
    """Distance between the layers from which on image tokens are dropped."""

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the pruning of one question; an answer counts as right if it is the model's own."""
        question = question_of_record(task.record)
        prompt, answer = vlm.prompt_for(question), own_answer(question)
        pruned = prune_image_tokens(
            vlm,
            prompt,
            layers=range(0, vlm.layers, self.step),
            generated=answer,
            gold=answer,
            max_new_tokens=len(prompt.answer_tokens(answer)),
            engine=Engine(checks=0),
            progress=False,
        )
        return Outcome(row={"question": question.text}, results={"pruning": pruned})

    def summary(self) -> Summary:
        """Return the average of all prunings."""
        return SavedAverage("pruning", ImagePruning)


@dataclass(frozen=True, kw_only=True)
class Failure(Analysis):
    """Features of the run of each question that may tell whether the answer is true."""

    name: ClassVar[str] = "failure"

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the features of one question."""
        question = question_of_record(task.record)
        features = failure_features(vlm, vlm.prompt_for(question), answer=own_answer(question))
        row: Mapping[str, Any] = {
            "right": bool(question.extra["right"]),
            "first token": features.first_probability,
            "whole answer": features.answer_probability,
        }
        return Outcome(row={"question": question.text, **row}, results={"features": features})

    def summary(self) -> Summary:
        """Return a summary with nothing besides the table."""
        return Summary()


def _boxes(question: Question) -> list[Box]:
    return [Box(*box) for box in question.boxes]
