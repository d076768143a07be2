"""A preview of an edit, measured before anything is written: its size, and its effect on neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import EditRequest
from ..editing.changes import NO_OWNER, Delta
from ..editing.errors import EditError
from ..editing.values import key_positions
from ..models import Projection, Prompt, VisionLanguageModel, capture


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much one weight changes."""

    weight: str
    relative: float
    """|D| / |W|, Frobenius norms."""
    rank: int


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A prompt beside the edited one, and the effect of the edit on the outputs of the changed weights there."""

    question: str
    request: int
    """Whose neighbour it is, counted from 0."""
    stays: bool
    """Whether its answer has to stay; otherwise it is the prompt of the request itself, which gets a new answer."""
    at_token: float | None
    """Largest |D k| / |W k| over its keys at the edited token; None if it has no such token."""
    anywhere: float
    """The same over all its positions, the answer's included."""
    before: str
    after: str

    @property
    def flips(self) -> bool:
        """Whether an answer that had to stay changes with the edit."""
        return self.stays and self.before != self.after


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The expected effects of an edit."""

    sizes: tuple[Size, ...]
    neighbours: tuple[Neighbour, ...]
    """Largest change first."""

    def as_json(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        found = [asdict(each) | {"flips": each.flips} for each in self.neighbours]
        return {"weights": [asdict(each) for each in self.sizes], "neighbours": found}


def sizes(vlm: VisionLanguageModel, delta: Delta) -> tuple[Size, ...]:
    """Return the relative norm of each change."""
    found = []
    for name, change in delta.changes.items():
        left, right = change.left.double(), change.right.double()
        squared = ((left.T @ left) * (right @ right.T)).sum().item()  # |L R|^2 without forming L R
        relative = math.sqrt(max(0.0, squared)) / vlm.weight(name).detach().float().norm().item()
        found.append(Size(weight=name, relative=relative, rank=change.rank))
    return tuple(found)


def preview(
    vlm: VisionLanguageModel,
    delta: Delta,
    requests: Sequence[EditRequest],
    tokens: Sequence[str | int],
    projections: Sequence[Projection],
    *,
    progress: bool = False,
) -> Preview:
    """Return what this edit would do; the model ends as it was.

    tokens: where each request is edited; projections: whose weights change. Neighbours are the `keep` prompts of all
    requests and, where there are several requests, each one's own prompt under the change that the others make; the
    answer of one that has nothing to do is to stay, too.
    """
    plain = [(index, each, False) for index, request in enumerate(requests) for each in request.preserve_prompts]
    if len(requests) > 1:
        plain += [(index, request.question, True) for index, request in enumerate(requests)]
    asked = [(index, vlm.prompt_for(question), is_own) for index, question, is_own in plain]
    prompts = [prompt for _, prompt, _ in asked]
    before = vlm.answers(prompts) if prompts else []
    found = []
    bar = tqdm(zip(asked, before, strict=True), desc="neighbours", total=len(asked), disable=not progress, leave=False)
    for (index, prompt, is_own), answer in bar:
        ignored = index if is_own else NO_OWNER
        moves = _moves(vlm, delta, prompt.with_answer(answer), tokens[index], projections, ignored)
        stays = not is_own or delta.requests[index]["status"] != "edited"
        found.append((prompt.question, index, stays, *moves))
    after = []
    if prompts:
        with delta.applied(vlm):
            after = vlm.answers(prompts)
    names = ("question", "request", "stays", "at_token", "anywhere")
    neighbours = [
        Neighbour(**dict(zip(names, each, strict=True)), before=was, after=now)
        for each, was, now in zip(found, before, after, strict=True)
    ]
    return Preview(sizes=sizes(vlm, delta), neighbours=tuple(sorted(neighbours, key=lambda each: -each.anywhere)))


def preview_lines(found: Preview, most: int) -> Iterator[str]:
    """Return the preview as a table, with at most this many neighbours."""
    for each in found.sizes:
        yield f"{'change':<15}  {each.relative:.2%} of the norm of {each.weight} (rank {each.rank})"
    if not found.neighbours:
        yield f"{'neighbours':<15}  none given; --keep-image and --keep-question tell what they would lose"
        return
    flips, stay = (sum(getattr(each, name) for each in found.neighbours) for name in ("flips", "stays"))
    told = f"{flips} of {stay} answers that are to stay would change" if stay else "none of them is to stay"
    yield f"{'neighbours':<15}  {told}"
    yield "  at token  anywhere  neighbour (relative change of the output)"
    for each in found.neighbours[:most]:
        at = "-" if each.at_token is None else f"{each.at_token:.2%}"
        said = f"would change from {each.before!r} to {each.after!r}" if each.flips else f"stays {each.before!r}"
        said = said if each.stays else f"request {each.request} itself, moved by the others"
        yield f"  {at:>8}  {each.anywhere:>8.2%}  {each.question!r}: {said}"
    if len(found.neighbours) > most:
        yield f"  and {len(found.neighbours) - most} more, which move less"


@torch.no_grad()
def _moves(
    vlm: VisionLanguageModel,
    delta: Delta,
    prompt: Prompt,
    token: str | int,
    projections: Sequence[Projection],
    ignored: int,
) -> tuple[float | None, float]:
    """(at the token, anywhere): the largest relative change of output, without the part of the ignored request."""
    with capture(vlm, projections, inputs=True, clone=True) as read, capture(vlm, projections, clone=True) as written:
        vlm.logits(prompt)
    ratios = torch.zeros(prompt.length, dtype=torch.float64)
    for each in projections:
        change = delta.changes[each.name]
        others = change if ignored == NO_OWNER else change.only(change.owners != ignored)
        output = written[each][0].double().cpu() - _bias(each)
        ratios = torch.maximum(ratios, others.moved(read[each][0].cpu()).norm(dim=-1) / output.norm(dim=-1))
    try:
        positions = key_positions(prompt, token, end=True)
    except EditError:
        return None, ratios.max().item()
    return ratios[[each for each in positions if each < prompt.length]].max().item(), ratios.max().item()


def _bias(projection: Projection) -> Tensor:
    bias = projection.bias
    return torch.zeros(1, dtype=torch.float64) if bias is None else bias.detach().double().cpu()
