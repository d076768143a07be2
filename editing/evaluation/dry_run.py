"""Measures what an edit does without keeping it: how much it changes weights, and how it moves other answers.

`preview` compares the outputs of the changed weights and the answers at neighbouring questions before and under the
edit. `verify` asks the questions of records before, under and after a change.
"""

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
from ..moments import MomentSource
from ..requests import EDITED, NOT_GENERATED, EditError, answers_where_finite
from ..solve import Editor
from ..values import key_positions
from .checks import checks_of, names_of


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of the change of one weight."""

    weight: str
    """Name of the parameter."""
    relative: float
    """|D| / |W|: the Frobenius norm of the change as a share of that of the weight."""
    rank: int
    """Number of keys that the change has, which bounds its rank."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A question near an edited one, and what the edit does to the outputs of the changed weights and to its answer."""

    question: str
    """Text of the question."""
    request: int
    """Index of the request that the question belongs to, from 0."""
    stays: bool
    """Whether the answer has to stay. False for the question of a request that is edited, which gets a new answer."""
    at_token: float | None
    """Largest |D k| / |W k| over its keys k at the edited token; None if it has no such token."""
    anywhere: float
    """Largest |D k| / |W k| over all positions of the question and its answer."""
    before: str
    """Answer of the unedited model; empty if the logits are not finite."""
    after: str
    """Answer of the edited model; empty if the logits are not finite."""

    @property
    def flips(self) -> bool:
        """Whether the answer has to stay and yet changes with the edit."""
        return self.stays and self.before != self.after


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What an edit would do to weights and to neighbouring questions. Made by `preview`."""

    sizes: tuple[Size, ...]
    """The size of each changed weight's change."""
    neighbours: tuple[Neighbour, ...]
    """The neighbours, the one whose outputs move most first."""

    def __repr__(self) -> str:
        flips = sum(each.flips for each in self.neighbours)
        return f"Preview: {len(self.sizes)} weights changed, {flips} of {self.staying} answers that should stay change"

    @property
    def staying(self) -> int:
        """Number of neighbours whose answers should stay."""
        return sum(each.stays for each in self.neighbours)

    def as_json(self) -> dict[str, Any]:
        """Return the preview as plain lists and numbers."""
        found = [asdict(each) | {"flips": each.flips} for each in self.neighbours]
        return {"weights": [asdict(each) for each in self.sizes], "neighbours": found}


def sizes(vlm: VisionLanguageModel, delta: Delta) -> tuple[Size, ...]:
    """Return the size of each change of an edit, relative to the weights of the model."""
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
    moments: MomentSource = None,
    progress: bool = True,
) -> Preview:
    """Return what an edit would do to weights and neighbouring questions; the model is left unchanged.

    The neighbours are the `preserve_prompts` of all requests. If there are several requests, the question of each one
    is a neighbour of the others too: its outputs are then measured under their part of the change alone. Its answer
    has to stay only if the request has nothing to do.

    Args:
        vlm: The unedited model.
        requests: The facts to write.
        editor: The editor, or the edit that it made of these requests.
        tokens: The token at which each request is edited, a group or a position; None for the token of the editor.
        moments: Second moments of keys, for editors that need them; as in `MultEdit.start`.
        progress: Show a progress bar.

    Returns:
        The relative size of each change, and the neighbours with their answers before and under the edit.

    Raises:
        EditError: No edit can be made, or the edit was made of another number of requests.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import preview
        >>> vlm = mt.load(tiny_vlm_path())
        >>> kept = mt.Question(text="Who lost?")
        >>> request = mt.EditRequest(question=mt.Question(text="Who won?"), target="Pruro", preserve_prompts=[kept])
        >>> preview(vlm, [request], mt.MultEdit(layer=5, steps=5), progress=False).neighbours[0].flips
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
    moves: list[tuple[bool, float | None, float]] = []
    bar = tqdm(zip(plain, before, strict=True), desc="neighbours", total=len(plain), disable=not progress, leave=False)
    for (index, question, is_own), answer in bar:
        prompt = vlm.prompt_for(question).with_answer(answer or None)
        stays = not is_own or delta.requests[index]["status"] not in (EDITED, NOT_GENERATED)
        moves.append((stays, *_moves(vlm, delta, prompt, tokens[index], projections, index if is_own else NO_OWNER)))
    with delta.applied(vlm):
        after = answers_where_finite(vlm, questions)
    neighbours = [
        Neighbour(
            question=question.text,
            request=index,
            stays=stays,
            at_token=at_token,
            anywhere=anywhere,
            before=was or "",
            after=now or "",
        )
        for (index, question, _), (stays, at_token, anywhere), was, now in zip(plain, moves, before, after, strict=True)
    ]
    return Preview(sizes=sizes(vlm, delta), neighbours=tuple(sorted(neighbours, key=lambda each: -each.anywhere)))


def preview_lines(result: Preview, most: int) -> Iterator[str]:
    """Yield a preview as lines of text, with at most `most` neighbours."""
    for each in result.sizes:
        yield f"{'change':<15}  {each.relative:.2%} of the norm of {each.weight} (rank {each.rank})"
    if not result.neighbours:
        yield f"{'neighbours':<15}  no other questions were given; --keep-image and --keep-question name some"
        return
    flips = sum(each.flips for each in result.neighbours)
    if result.staying:
        yield f"{'neighbours':<15}  {flips} of {result.staying} answers that should stay would change"
    else:
        yield f"{'neighbours':<15}  no questions were given whose answers should stay"
    yield "how far the edit moves what the changed weights write at other questions, in percent of what they write:"
    yield "  at the edited token  largest at any token  question"
    for each in result.neighbours[:most]:
        at = "-" if each.at_token is None else f"{each.at_token:.2%}"
        said = f"would change from {each.before!r} to {each.after!r}" if each.flips else f"stays {each.before!r}"
        said = said if each.stays else f"request {each.request}, as far as the edits of the other requests move it"
        yield f"  {at:>19}  {each.anywhere:>20.2%}  {each.question!r}: {said}"
    if len(result.neighbours) > most:
        yield f"  and {len(result.neighbours) - most} more, which move less"


@dataclass(frozen=True, kw_only=True)
class VerifiedAnswer:
    """The answers to one question of a record: of the unedited model, under the change, and after its undo."""

    record: str
    """Id of the record."""
    kind: str
    """Kind of question, one of `data.facts.KINDS`."""
    question: str
    """Text of the question."""
    wanted: str | None
    """The answer that is right while the change is in the model; None if it is not known."""
    unedited: str
    """Answer of the unedited model."""
    edited: str
    """Answer while the change is in the model."""
    undone: str
    """Answer after the change was taken out again."""

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

    Returns:
        One entry per question: for each record its own question, then its probes.

    Raises:
        EditError: No records, two records with one id, or a change that does not fit the model.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing.evaluation import verify
        >>> vlm = mt.load(tiny_vlm_path())
        >>> record = mt.EditRecord(question=mt.Question(text="Who won?"), target="Pruro")
        >>> (answer,) = verify(vlm, mt.MultEdit(layer=5, steps=25).edit(vlm, [record], progress=False), [record])
        >>> answer.edited, answer.undone == answer.unedited
        ('Pruro', True)
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
    """The token at which an edit was made, read from its settings."""
    token = delta.settings.get("token", "last")
    return int(token) if token.lstrip("-").isdigit() else token


def _projections(vlm: VisionLanguageModel, delta: Delta) -> list[Projection]:
    """The projections whose weights an edit changes, from the lowest layer up."""
    found: list[Projection] = []
    for layer in range(vlm.layers):
        found += [vlm.down_projection(layer)] if vlm.has_down_projection(layer) else []
        found.append(vlm.attention_projection(layer))
    slices = [slice_ for name in delta.changes if (slice_ := vlm.expert_slice(name)) is not None]
    return [each for each in (*found, *slices) if each.name in delta.changes]


@torch.no_grad()
def _moves(
    vlm: VisionLanguageModel,
    delta: Delta,
    prompt: Prompt,
    token: str | int,
    projections: Sequence[Projection],
    ignored: int,
) -> tuple[float | None, float]:
    """Return (at the token, anywhere): the largest |D k| / |W k|, with D without the part of the ignored request."""
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
