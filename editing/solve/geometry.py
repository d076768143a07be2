"""What an edit would reach and what it would leak to, layer by layer and token by token, before anything is edited.

The change that a request asks for is D = r d^T with a direction d that the keys and the cost alone decide, so that it
moves the output at any other key q by (d q) r: a share d q of what the request asks for at its own key. The share at
the request's other wordings and pictures is its reach, that at other questions its leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...data.facts import EditRequest, Question
from ...models import Projection, VisionLanguageModel, patch
from ...models.hooks import StopForward
from ...models.replay.upper import PaddedBatch
from ..moments import Moments
from ..requests import Augmentation, EditError, edited_questions
from ..siblings import SiblingFinder, Siblings, SiblingSet
from ..values import Goal, key_positions, target_batch
from ..values.keys import chunks
from .kept import HELD_OUT, is_last_token
from .problem import Rows, solve
from .settings import ClosedFormSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """Predicted reach and leak of edits of some requests at each token and layer."""

    tokens: tuple[str | int, ...]
    """The tokens, as an edit names them."""
    layers: tuple[int, ...]
    """The layers."""
    reach: Tensor
    """(token, layer) float64, mean share of the change at other wordings and pictures of the requests; nan for none."""
    leak: Tensor
    """(token, layer) float64, mean absolute share at the same question about others; nan for none."""
    leak_own: Tensor
    """(token, layer) float64, mean absolute share at other questions about the same subject; nan for none."""
    left: Tensor
    """(token, layer) float64, mean share of a squared key that kept keys leave."""

    @property
    def has_siblings(self) -> bool:
        """Whether there was anything that an edit could leak to."""
        return bool(torch.isfinite(self.leak).any())


@torch.no_grad()
def predict_geometry(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    editor: ClosedFormSettings,
    *,
    tokens: Sequence[str | int],
    layers: Sequence[int] | None = None,
    moments: Moments | None = None,
    most: int = 6,
    progress: bool = False,
) -> Geometry:
    """Return what edits of single requests would reach and leak to at each token and layer, in one run per question.

    Siblings that the editor keeps are kept in the prediction, too, and the leak is that at siblings that are not kept.

    Args:
        vlm: The unedited model.
        requests: The requests; the first `most` of them are run, and the others supply subjects and pictures.
        editor: The settings of the edits: what they keep, what a change costs, and which projection it changes. Its own
            layer and token do not matter.
        tokens: The tokens at which an edit could be made; one that a request's question lacks is not predicted for it.
        layers: The layers (default: all).
        moments: Second moments of keys, for editors that weigh old keys by them.
        most: Maximum number of requests that are run.
        progress: Show a progress bar.

    Returns:
        The means over the requests that are run, for each token and layer.

    Source: ROME, arXiv 2202.05262, equation 2, for the direction of a change.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import Siblings, predict_geometry
        >>> vlm = mt.load(tiny_vlm_path())
        >>> question = mt.Question(text="Who founded Previco?", constraint="Previco")
        >>> request = mt.EditRequest(question=question, target="Pruro")
        >>> siblings = Siblings(names=("Brovon", "Fulex", "Lailon", "Valdex"), own=0)
        >>> geometry = predict_geometry(vlm, [request], mt.MultEdit(layer=0, siblings=siblings), tokens=["last"])
        >>> geometry.leak.shape == (1, vlm.layers), bool((geometry.leak > 0).all())
        (True, True)
    """
    layers = tuple(range(vlm.layers)) if layers is None else tuple(layers)
    finder, siblings = SiblingFinder(vlm), editor.siblings or Siblings()
    sets = finder.find(requests, siblings, only=range(min(most, len(requests))))
    pairs = list(zip(requests, sets, strict=False))
    found = [
        _shares(vlm, request, own, editor, tokens=tokens, layers=layers, moments=moments)
        for request, own in tqdm(pairs, desc="what edits would leak to", disable=not progress, leave=False)
    ]
    stacked = torch.stack(found)  # request, quantity, token, layer
    reach, leak, leak_own, left = stacked.nanmean(0)
    return Geometry(tokens=tuple(tokens), layers=layers, reach=reach, leak=leak, leak_own=leak_own, left=left)


def _shares(
    vlm: VisionLanguageModel,
    request: EditRequest,
    siblings: SiblingSet,
    editor: ClosedFormSettings,
    *,
    tokens: Sequence[str | int],
    layers: Sequence[int],
    moments: Moments | None,
) -> Tensor:
    """(quantity, token, layer) float64 of one request: reach, leak, leak to its own subject, share of the key left."""
    groups = {
        "request": (request.question,),
        "wordings": _wordings(request),
        "others": siblings.others,
        "own": siblings.own,
        "asked": request.preserve_prompts,
    }
    questions = [question for group in groups.values() for question in group]
    projections = {
        layer: replace(editor, layer=layer, where=None, spread=1).projections(vlm)[layer] for layer in layers
    }
    keys = keys_everywhere(vlm, questions, tokens, list(projections.values()))
    owners = [name for name, group in groups.items() for _ in group]
    result = torch.full((4, len(tokens), len(layers)), float("nan"), dtype=torch.float64)
    keeps = editor.siblings is not None
    for token, name in enumerate(tokens):
        for place, (layer, projection) in enumerate(projections.items()):
            present: dict[str, list[Tensor]] = {owner: [] for owner in groups}
            for owner, row in zip(owners, keys[place][:, token], strict=True):
                if torch.isfinite(row).all() and row.any():
                    present[owner].append(row.double())
            if present["request"]:
                own_is_kept = keeps and is_last_token(vlm, request.question, name)
                kept = {"others": keeps, "own": own_is_kept}
                cost = partial(editor.cost, layer, projection, moments)
                result[:, token, place] = _of_cell(present, kept, editor, cost)
    return result


def _of_cell(present: dict[str, list[Tensor]], kept: dict[str, bool], editor: ClosedFormSettings, cost: Any) -> Tensor:
    """(quantity,) of one request at one token of one layer."""
    (key,) = present["request"]
    asks = {"residuals": [key.new_ones(1, 1)], "weights": [editor.weight], "names": ["key"], "edited": 1}
    rows, seen = Rows(keys=[key[None]], directions=None, **asks), {}
    weight = float("inf") if editor.preserve_weight is None else editor.preserve_weight
    if present["asked"]:
        rows.add([("asked", torch.stack(present["asked"]))], weight)
    for name, is_kept in kept.items():
        keys = present[name]
        seen[name] = keys[HELD_OUT - 1 :: HELD_OUT] if is_kept else keys
        own = [each for number, each in enumerate(keys) if is_kept and number % HELD_OUT != HELD_OUT - 1]
        if own:
            stacked = torch.stack(own)
            is_mean = editor.siblings is not None and editor.siblings.mean
            rows.add([(name, stacked.mean(0, keepdim=True) if is_mean else stacked)], weight)
    ridge = rows.ridge(editor.ridge_fraction) if editor.ridge is None else editor.ridge
    solution = solve(cost(ridge), rows.problem())
    direction = (solution.left @ solution.right)[0]

    def mean(name: str, keys: list[Tensor], *, absolute: bool) -> float:
        if not keys:
            return float("nan")
        shares = torch.stack(keys) @ direction.to(key)
        return (shares.abs() if absolute else shares).mean().item()

    return torch.tensor(
        [
            mean("wordings", present["wordings"], absolute=False),
            mean("others", seen["others"], absolute=True),
            mean("own", seen["own"], absolute=True),
            rows.ridge(1.0) / key.square().sum().item(),
        ],
        dtype=torch.float64,
    )


def _wordings(request: EditRequest) -> tuple[Question, ...]:
    """The request's own other wordings and pictures; without any, variants of its picture."""
    own = edited_questions(request)[1:]
    if own or not request.question.images:
        return own
    return tuple(Augmentation().questions(request.question))


def keys_everywhere(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    tokens: Sequence[str | int],
    projections: Sequence[Projection],
    *,
    rows_at_once: int = 32,
) -> tuple[Tensor, ...]:
    """Return what each projection reads at tokens of questions, (question, token, width), in one run of each question.

    It is nan where a question lacks a token. The model stops after the last of the projections.
    """
    shape = len(questions), len(tokens)
    found = tuple(torch.full((*shape, projection.width), float("nan")) for projection in projections)
    goals = [Goal(prompts=(vlm.prompt_for(question),)) for question in questions]
    for chunk in chunks(goals, rows_at_once):
        own = [goals[index] for index in chunk]
        batch = target_batch(vlm, own, 0, end=False, every=False)
        columns = torch.tensor([[_column(goal, token) for token in tokens] for goal in own])
        read = _Read(columns, len(projections))
        visits = {projection: partial(read.visit, place) for place, projection in enumerate(projections)}
        with suppress(StopForward), patch(vlm, visits, inputs=True):
            PaddedBatch.after_prefix(vlm, batch.entering, batch.start).logits(vlm, batch.label_columns)
        for place, keys in read.keys.items():
            found[place][chunk] = keys
    return found


class _Read:
    """What projections read at some columns of a batch; the run stops after the last of them."""

    def __init__(self, columns: Tensor, places: int) -> None:
        self.columns, self.places = columns, places
        self.keys: dict[int, Tensor] = {}

    def visit(self, place: int, states: Tensor) -> Tensor:
        rows = torch.arange(len(self.columns), device=states.device)[:, None]
        picked = states[rows, self.columns.clamp(min=0).to(states.device)].float().cpu()
        self.keys[place] = torch.where((self.columns >= 0)[..., None], picked, torch.nan)
        if len(self.keys) == self.places:
            raise StopForward
        return states


def _column(goal: Goal, token: str | int) -> int:
    """The position of a token in a goal's prompt, or -1."""
    (prompt,) = goal.prompts
    try:
        return key_positions(prompt, token, end=False, every=False)[0]
    except EditError:
        return -1
