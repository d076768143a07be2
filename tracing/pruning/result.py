"""The result of image token pruning for one question."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.drawing.figure import name_of_model
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...models import Prompt
from ..attention.image_reading import ImageReading, check_prompt
from ..engine.report import EngineReport
from ..errors import TraceError
from ..knockout.result import same_answer
from .plot import Levels, PruningLine, draw_kept, draw_pruning


def tokens_kept(dropped: Tensor, layers: Sequence[int], *, length: int, depth: int) -> Tensor:
    """(..., layer) float64 in 0 to 1: share of the prompt's token-layers that are still computed.

    dropped (..., layer): how many of the prompt's `length` tokens n are gone from each of the layers l on, d of them;
    depth: the decoder's layers L. The share is (n l + (n - d) (L - l)) / (n L).
    """
    left = depth - torch.tensor(layers)
    return 1 - (dropped * left).double() / (length * depth)


def operations_kept(
    dropped: Tensor, layers: Sequence[int], *, length: int, token_operations: Sequence[int], pair_operations: int
) -> Tensor:
    """(..., layer) float64 in 0 to 1: share of the decoder's floating-point operations on the prompt still done.

    A layer i over m tokens takes m c_i + a m (m + 1) / 2 of them: c_i, token_operations, for each token by its
    matrices; a, pair_operations, for each query-key pair of causal attention. m is n before the layer l, n - d from
    there on (`tokens_kept`). Norms, the output head, the vision tower and the answer's tokens are not counted.
    """
    each = torch.tensor(token_operations, dtype=torch.float64)
    rest = length - dropped.double()
    pairs_saved = _pairs(torch.tensor(length, dtype=torch.float64)) - _pairs(rest)
    total = length * each.sum() + len(each) * pair_operations * _pairs(torch.tensor(length, dtype=torch.float64))
    left = torch.tensor([len(each) - layer for layer in layers])
    after = torch.stack([each[layer:].sum() for layer in layers])
    return 1 - (dropped * after + left * pair_operations * pairs_saved) / total


def _pairs(tokens: Tensor) -> Tensor:
    """Query-key pairs of so many tokens, each of which sees itself and those before it."""
    return tokens * (tokens + 1) / 2


_LAYOUT = "multrace image pruning 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePruning(ImageReading):
    """One question's answer with image tokens gone from some layer on. Made by `prune_image_tokens`; arXiv 2406.06579.

    `layers` are the first layers without them, each dropped token being gone up to the last layer.
    """

    depth: int
    """How many layers the decoder has."""
    keep: tuple[int | str, ...]
    """How many image tokens stay; "all" of them."""
    kept: Tensor
    """(keep, layer, image token) bool: which ones stay."""
    scores: tuple[str, ...]
    """What is scored: the "first token" of the answer, and "answer", all its tokens; the first is the main one."""
    gold: str | None
    """The right answer, if it is known."""
    baseline: Tensor
    """(score,) float64: the answer's probability with every image token."""
    floor: Tensor
    """(score,) float64: its probability with no image token in any layer, by the words alone."""
    probabilities: Tensor
    """(score, keep, layer) float64: its probability with the other image tokens gone from that layer on."""
    baseline_answer: str
    """The model's free greedy answer with every image token."""
    floor_answer: str
    """The one with no image token in any layer."""
    answers: tuple[tuple[str, ...], ...]
    """Per keep and layer the free greedy answer."""
    token_operations: tuple[int, ...]
    """Per decoder layer the floating-point operations of its matrices for one token."""
    pair_operations: int
    """Floating-point operations of one layer's attention for one query and key, all heads together."""
    engine: EngineReport

    @property
    def length(self) -> int:
        """How many tokens the prompt has."""
        return len(self.input_ids)

    @property
    def is_right(self) -> Tensor | None:
        """(keep, layer) bool: the free answer is the right one (`same_answer`); None without a right answer."""
        if self.gold is None:
            return None
        return torch.tensor([[same_answer(each, self.gold) for each in row] for row in self.answers])

    @property
    def baseline_is_right(self) -> bool | None:
        """The model's own answer, with every image token, is the right one; None without a right answer."""
        return None if self.gold is None else same_answer(self.baseline_answer, self.gold)

    @property
    def floor_is_right(self) -> bool | None:
        """The answer by the words alone is the right one; None without a right answer."""
        return None if self.gold is None else same_answer(self.floor_answer, self.gold)

    @property
    def dropped(self) -> Tensor:
        """(keep, layer) int64: how many image tokens are gone."""
        return (~self.kept).sum(-1)

    def tokens_kept(self) -> Tensor:
        """(keep, layer) float64: share of the prompt's token-layers that are still computed.

        (n l + (n - d) (L - l)) / (n L) for n tokens, d of them dropped from layer l on, and L layers.
        """
        return tokens_kept(self.dropped, self.layers, length=self.length, depth=self.depth)

    def operations_kept(self) -> Tensor:
        """(keep, layer) float64: share of the decoder's floating-point operations on the prompt that are still done.

        The sum over layers of m c + a m (m + 1) / 2, with m = n tokens before layer l and n - d from there on, over the
        same sum with m = n throughout: c `token_operations` of the layer, a `pair_operations` for each query-key pair.
        """
        counts = {"token_operations": self.token_operations, "pair_operations": self.pair_operations}
        return operations_kept(self.dropped, self.layers, length=self.length, **counts)

    def settled_from(self, keep: int | str = 0) -> int | None:
        """The first layer from which on dropping never changes the free answer; None if it still does at the last."""
        same = [same_answer(each, self.baseline_answer) for each in self.answers[self._keep(keep)]]
        return lasting_from(self.layers, same)

    def summary(self, score: str | None = None) -> str:
        """Lines for people: what is answered with the whole picture and without any, then from where on it stays."""
        index = self._score(score)
        name = f"{self.answer.strip()!r}" + (", first token" if self.scores[index] == "first token" else "")
        lines = [self.question]
        ends = (
            ("with every image token", self.baseline, self.baseline_answer, self.baseline_is_right),
            ("with none in any layer", self.floor, self.floor_answer, self.floor_is_right),
        )
        for words, probability, said, is_right in ends:
            verdict = "" if is_right is None else ", right" if is_right else f", not {self.gold!r}"
            lines.append(f"  {words}: p({name}) = {float(probability[index]):.3g}; it says {said!r}{verdict}")
        return "\n".join([*lines, *(f"  {self._keep_line(keep)}" for keep in self.keep)])

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "ImagePruning":
        """The pruning that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem, nested={"engine": EngineReport})

    def to_dataframe(self) -> pd.DataFrame:
        """One line per score, keep and layer, the first one without the dropped tokens.

        Columns: probability, baseline and floor; answer and is_right (None without a right answer) of the free answer;
        dropped, how many tokens are gone; tokens_kept and operations_kept, shares of the work.
        """
        axes = [("score", self.scores), ("keep", self.keep), ("layer", self.layers)]
        values = {"probability": self.probabilities}
        values |= {name: getattr(self, name)[:, None, None] for name in ("baseline", "floor")}
        work = {"tokens_kept": self.tokens_kept(), "operations_kept": self.operations_kept()}
        frame = long_frame(axes, values | {"dropped": self.dropped} | work)
        said = [each for row in self.answers for each in row] * len(self.scores)
        is_right = [None] * len(said) if self.gold is None else [same_answer(each, self.gold) for each in said]
        return frame.assign(answer=said, is_right=is_right)

    def plot(self, path: str | Path, score: str | None = None) -> Path:
        """The written picture (png, pdf or svg by suffix): probability by layer, a line per keep, with what is saved.

        TraceError for a score that was not computed.
        """
        index, saved = self._score(score), 1 - self.operations_kept()
        lines = [
            PruningLine(label=keep_label(keep), values=self.probabilities[index, row], saved=saved[row])
            for row, keep in enumerate(self.keep)
        ]
        levels = Levels(baseline=float(self.baseline[index]), floor=float(self.floor[index]))
        what = "first token's probability" if self.scores[index] == "first token" else "probability"
        subtitle = f"{what.capitalize()} of the answer {self.answer.strip()!r}\n{name_of_model(self.model)}"
        return draw_pruning(path, self.layers, lines, levels=levels, titles=(self.question, subtitle), y_label=what)

    def overlay(
        self, path: str | Path, prompt: Prompt, keep: int | None = None, layers: Sequence[int] | None = None
    ) -> Path:
        """The written picture: the image tokens that stay, in the picture as the model saw it; the others are faded.

        keep: how many; None for the first number that leaves some and not all. layers: one panel each; None for four of
        them. TraceError for another prompt than the one that was asked, and where image tokens form no grid.
        """
        row = self._partial() if keep is None else self._keep(keep)
        check_prompt(self, prompt)
        places = self._rows_of(layers, ())
        grid = self.over_picture(self.kept[row].double()) > 0
        captions = [f"from layer {self.layers[place]} on" for place in places]
        titles = self.question, f"Image tokens that stay: the best {self.keep[row]} of {len(self.image_positions)}"
        return draw_kept(path, prompt, grid[list(places)], captions, titles=titles)

    def _keep(self, keep: int | str) -> int:
        return index_of_keep(keep, self.keep)

    def _partial(self) -> int:
        counts = self.kept.sum(-1).amax(-1).tolist()
        found = [row for row, count in enumerate(counts) if 0 < count < len(self.image_positions)]
        if not found:
            raise TraceError(
                f"image tokens stay here all or none (keep={self.keep}), which shows nothing; prune with another "
                f"keep, from 1 to {len(self.image_positions) - 1}"
            )
        return found[0]

    def _score(self, score: str | None) -> int:
        return 0 if score is None else index_of_score(score, self.scores)

    def _keep_line(self, keep: int | str) -> str:
        layer = self.settled_from(keep)
        if layer is None:
            return f"{keep_label(keep)}: dropping the others changes the answer even from layer {self.layers[-1]} on"
        saved = 1 - self.operations_kept()[self._keep(keep), self.layers.index(layer)]
        words = f"the answer stays from layer {layer} on, which saves {float(saved):.0%} of operations"
        return f"{keep_label(keep)}: {words}"


def lasting_from(layers: Sequence[int], claims: Sequence[bool]) -> int | None:
    """The first of the layers from which on all claims, one per layer, hold; None if the last does not."""
    held = len(claims) - next((number for number, holds in enumerate(reversed(claims)) if not holds), len(claims))
    return layers[held] if held < len(layers) else None


def keep_label(keep: int | str) -> str:
    """How many tokens stay, in words."""
    if keep in (0, "all"):
        return "all image tokens dropped" if keep == 0 else "none dropped"
    return f"best {keep} image token{'' if keep == 1 else 's'} kept"


def index_of_keep(keep: int | str, known: Sequence[int | str]) -> int:
    """Where a number of tokens stands among those that were asked for. TraceError shows these."""
    return _index("keep", keep, known)


def index_of_score(score: str, known: Sequence[str]) -> int:
    """Where a score stands among those that were computed. TraceError shows these."""
    return _index("score", score, known)


def _index(kind: str, label: int | str, known: Sequence[int | str]) -> int:
    if label not in known:
        raise TraceError(
            f"no {kind} {label!r} in this pruning: it holds {', '.join(map(repr, known))}; pass one of these, or "
            "prune again with that one"
        )
    return known.index(label)


def _problem(pruning: ImagePruning) -> str | None:
    """What does not fit together in a pruning that was read from a file."""
    shape, scores = (len(pruning.keep), len(pruning.layers)), len(pruning.scores)
    fits = [pruning.kept.shape == (*shape, len(pruning.image_positions)), pruning.kept.dtype == torch.bool]
    fits += [pruning.baseline.shape == pruning.floor.shape == (scores,)]
    fits += [pruning.probabilities.shape == (scores, *shape)]
    fits += [[len(row) for row in pruning.answers] == [shape[1]] * shape[0], min(*shape, scores) > 0]
    fits += [len(pruning.token_operations) == pruning.depth, max(pruning.layers) < pruning.depth]
    return None if all(fits) else "its tensors are of other shapes than its keeps, layers and scores"
