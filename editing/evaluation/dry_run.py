"""What an edit would do, measured before anything is kept: its size, its effect on neighbours, and its own probes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...data.facts import EditRecord, EditRequest
from ...models import Projection, Prompt, VisionLanguageModel, capture
from ..changes import NO_OWNER, Change, Delta
from ..moments import Moments
from ..requests import EDITED, NOT_GENERATED, EditError, answers_where_finite
from ..solve import Editor
from ..values import key_positions
from .asking import checks_of, names_of


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
    """Index of the request whose neighbour it is, from 0."""
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

    def __repr__(self) -> str:
        flips = sum(each.flips for each in self.neighbours)
        return f"Preview: {len(self.sizes)} weights changed, {flips} of {self.staying} answers that should stay change"

    @property
    def staying(self) -> int:
        """Number of neighbours whose answers should stay."""
        return sum(each.stays for each in self.neighbours)

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
    requests: Sequence[EditRequest],
    editor: Editor | Delta,
    *,
    tokens: Sequence[str | int] | None = None,
    moments: Moments | None = None,
    progress: bool = True,
) -> Preview:
    """Return what an edit would do; the model is left unchanged, and nothing is written.

    Neighbours are the `preserve_prompts` of all requests and, if there are several requests, the question of each one
    under the change that the others make; the answer of a request that has nothing to do should stay, too.

    Args:
        vlm: The unedited model.
        requests: The facts to write.
        editor: The editor, or the edit that it made of these requests.
        tokens: The token at which each request is edited; None for the token of the editor.
        moments: Second moments of keys, for editors that need them.
        progress: Show a progress bar.

    Raises:
        EditError: No edit can be made, or the edit was made of another number of requests.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import preview
        >>> vlm = mt.load(tiny_vlm_path())
        >>> kept = mt.Question(text="Who lost?")
        >>> request = mt.EditRequest(question=mt.Question(text="Who won?"), target="Pruro", preserve_prompts=[kept])
        >>> preview(vlm, [request], mt.MultEdit(layer=5), progress=False).neighbours[0].flips
        False
    """
    delta = editor if isinstance(editor, Delta) else editor.start(vlm, moments=moments).propose(requests)
    if len(delta.requests) != len(requests):
        raise EditError(f"the edit was made of {len(delta.requests)} requests, and {len(requests)} are given")
    tokens = [_token(delta)] * len(requests) if tokens is None else tokens
    projections = _projections(vlm, delta)
    plain = [(index, each, False) for index, request in enumerate(requests) for each in request.preserve_prompts]
    if len(requests) > 1:
        plain += [(index, request.question, True) for index, request in enumerate(requests)]
    questions = [question for _, question, _ in plain]
    before = answers_where_finite(vlm, questions)
    found = []
    bar = tqdm(zip(plain, before, strict=True), desc="neighbours", total=len(plain), disable=not progress, leave=False)
    for (index, question, is_own), answer in bar:
        prompt = vlm.prompt_for(question).with_answer(answer or None)
        moves = _moves(vlm, delta, prompt, tokens[index], projections, index if is_own else NO_OWNER)
        stays = not is_own or delta.requests[index]["status"] not in (EDITED, NOT_GENERATED)
        found.append((question.text, index, stays, *moves))
    with delta.applied(vlm):
        after = answers_where_finite(vlm, questions)
    names = ("question", "request", "stays", "at_token", "anywhere")
    neighbours = [
        Neighbour(**dict(zip(names, each, strict=True)), before=was or "", after=now or "")
        for each, was, now in zip(found, before, after, strict=True)
    ]
    return Preview(sizes=sizes(vlm, delta), neighbours=tuple(sorted(neighbours, key=lambda each: -each.anywhere)))


def preview_lines(found: Preview, most: int) -> Iterator[str]:
    """Yield the preview as lines of text, with at most this many neighbours."""
    for each in found.sizes:
        yield f"{'change':<15}  {each.relative:.2%} of the norm of {each.weight} (rank {each.rank})"
    if not found.neighbours:
        yield f"{'neighbours':<15}  no other questions were given; --keep-image and --keep-question name some"
        return
    flips = sum(each.flips for each in found.neighbours)
    if found.staying:
        yield f"{'neighbours':<15}  {flips} of {found.staying} answers that should stay would change"
    else:
        yield f"{'neighbours':<15}  no questions were given whose answers should stay"
    yield "how far the edit moves what the changed weights write at other questions, in percent of what they write:"
    yield "  at the edited token  largest at any token  question"
    for each in found.neighbours[:most]:
        at = "-" if each.at_token is None else f"{each.at_token:.2%}"
        said = f"would change from {each.before!r} to {each.after!r}" if each.flips else f"stays {each.before!r}"
        said = said if each.stays else f"request {each.request}, as far as the edits of the other requests move it"
        yield f"  {at:>19}  {each.anywhere:>20.2%}  {each.question!r}: {said}"
    if len(found.neighbours) > most:
        yield f"  and {len(found.neighbours) - most} more, which move less"


@dataclass(frozen=True, kw_only=True)
class VerifiedAnswer:
    """One question of a record, answered by the unedited model, under the change, and after it was taken out."""

    record: str
    kind: str
    question: str
    wanted: str | None
    """The answer that is right while the change is in the model; None if it is not known."""
    unedited: str
    edited: str
    undone: str

    def is_right(self, state: str) -> bool:
        """Return whether the answer in this state ("unedited", "edited", "undone") is the wanted one."""
        return self.wanted is not None and getattr(self, state) == self.wanted.strip()


def verify(
    vlm: VisionLanguageModel, change: Change, records: Sequence[EditRecord], *, batch_size: int = 32
) -> tuple[VerifiedAnswer, ...]:
    """Return the free answers to all questions of the records before, under and after a change.

    Args:
        vlm: The unedited model, which ends as it began.
        change: The change that makes the edits of the records.
        records: The edits with the questions that check them.
        batch_size: Number of questions that are answered together.

    Raises:
        EditError: No records, two records with one id, or a change that does not fit the model.
    """
    checks = [each for name, record in zip(names_of(records), records, strict=True) for each in checks_of(name, record)]
    questions = [check.question for check in checks]
    transform = getattr(change, "prompt_transform", None)
    unedited = answers_where_finite(vlm, questions, batch_size=batch_size)
    with change.applied(vlm):
        edited = answers_where_finite(vlm, questions, batch_size=batch_size, transform=transform)
    undone = answers_where_finite(vlm, questions, batch_size=batch_size)
    return tuple(
        VerifiedAnswer(
            record=check.record,
            kind=check.kind,
            question=check.question.text,
            wanted=check.known if check.stays else check.new,
            unedited=before or "",
            edited=during or "",
            undone=after or "",
        )
        for check, before, during, after in zip(checks, unedited, edited, undone, strict=True)
    )


def _token(delta: Delta) -> str | int:
    """The token at which an edit was made, from its settings as text."""
    token = delta.settings.get("token", "last")
    return int(token) if token.lstrip("-").isdigit() else token


def _projections(vlm: VisionLanguageModel, delta: Delta) -> list[Projection]:
    """The projections whose weights the edit changes."""
    found = [find(layer) for layer in range(vlm.layers) for find in (vlm.down_projection, vlm.attention_projection)]
    return [each for each in found if each.name in delta.changes]


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
