"""What an edit has done: where it is, and what the model answers before it, with it and after its undo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ..artefacts import write_json
from ..data import EditRequest
from ..editing import EDITED, NOT_GENERATED, ClosedFormEditor, Delta, RuntimeEdit, room_for_targets
from ..editing.changes.weight_change import Rounding
from ..editing.evaluation import preview, preview_lines, sizes
from ..editing.requests import answers_where_finite, says_target, target_probability
from ..editing.solve.kept import OTHERS, OWN, leak_in_words
from ..models import VisionLanguageModel
from ..tracing import EditSite
from .located_edit import TraceShift

_LAYOUT = "multrace edit outcome 1"
_SHOWN = 20
"""Maximum number of requests, neighbours or shifts that are printed; the report has all."""
_MOSTLY = 0.9
_HALF = 2
"""Size in bytes of the dtypes in which an edit can be rounded away."""
_STATES = ("before", "with the edit", "after undo")
_QUIET = 16
"""A progress bar is shown only above this number of answers."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The (last) layer and the token to edit, and why."""

    layer: int
    token: str | int
    reason: str
    spread: int | None = None
    """Number of layers that share the change; None for as many as the editor has."""

    def __str__(self) -> str:
        first = self.layer if self.spread is None else self.layer - self.spread + 1
        layers = f"layer {self.layer}" if first == self.layer else f"layers {first} to {self.layer}"
        return f"{layers}, token {self.token!r}: {self.reason}"

    @classmethod
    def of_site(cls, site: EditSite) -> Self:
        """Return the place that a trace chose."""
        return cls(layer=site.layer, token=site.token, reason=site.reason)

    @classmethod
    def of_editor(cls, editor: ClosedFormEditor, layer: int) -> Self:
        """Return the place that an editor names, at a layer that is counted from 0."""
        spread = editor.spread if editor.spread > 1 else None
        return cls(layer=layer, token=editor.place[1], reason="as asked", spread=spread)


@dataclass(frozen=True, kw_only=True, eq=False)
class EditOutcome:
    """A finished edit: the change, where it is, and what the model answers before it, with it and after its undo."""

    delta: Delta
    places: tuple[Place, ...]
    """The place of each request."""
    notes: tuple[str, ...]
    shifts: tuple[TraceShift | None, ...]
    """What the edit moved in the trace of each request; empty where nothing was traced again."""
    answers: tuple[tuple[str, ...], ...]
    """(before, with the edit, after undo) of each request."""
    shares: tuple[float | None, ...]
    """Of what each request asked for, over all its keys, after rounding to the model's dtype; None without keys."""
    rounding: tuple[Rounding, ...]
    """What rounding to the model's dtype takes from each changed weight."""
    probabilities: tuple[tuple[float, float], ...]
    """(in the weights, beside them in float32): the probability of each target with the change; empty for a model that
    computes in float32, where both are the same."""
    is_undone: bool
    """Whether every touched weight is bit-identical to what it was."""
    sizes: tuple[Any, ...]
    preview: Any | None = None

    @classmethod
    def of(
        cls,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        delta: Delta,
        *,
        places: Sequence[Place],
        notes: Sequence[str] = (),
        shifts: Sequence[TraceShift | None] = (),
        previewed: bool = False,
        progress: bool = True,
    ) -> Self:
        """Return the outcome of a change: the model is asked before, with and after it, and ends as it began.

        Args:
            vlm: The model without the change.
            requests: The requests of the change.
            delta: The change.
            places: The place of each request.
            notes: What was not as expected.
            shifts: What the change moved in the traces.
            previewed: Ask also how the change affects the questions whose answers are to stay.
            progress: Show a progress bar for many questions.
        """
        options: dict[str, Any] = {"progress": progress and len(requests) > _QUIET}
        options["max_new_tokens"] = max(16, room_for_targets(vlm, requests))
        before = _answers(vlm, requests, **options)
        with delta.applied(vlm):
            edited = _answers(vlm, requests, **options)
        after = _answers(vlm, requests, **options)
        tokens = [place.token for place in places]
        return cls(
            delta=delta,
            places=tuple(places),
            notes=tuple(notes),
            shifts=tuple(shifts),
            answers=tuple(zip(before, edited, after, strict=True)),
            shares=delta.shares(delta.retained(vlm)),
            rounding=tuple(delta.rounding(vlm).values()),
            probabilities=() if vlm.dtype.itemsize > _HALF else _probabilities(vlm, requests, delta),
            is_undone=vlm.fingerprint(delta.changes) == delta.fingerprints,
            sizes=tuple(sizes(vlm, delta)),
            preview=preview(vlm, requests, delta, tokens=tokens) if previewed else None,
        )

    @property
    def edited(self) -> int:
        """The number of requests that were edited."""
        return sum(request["status"] == EDITED for request in self.delta.requests)

    @property
    def missed(self) -> int:
        """The number of requests whose targets the edited model does not say."""
        return sum(not self.says_target(index) for index in range(len(self.answers)))

    def says_target(self, index: int) -> bool:
        """Return whether the edited model answers a request with its target."""
        return says_target(self.answers[index][1], str(self.delta.requests[index]["target"]))

    def save_report(self, path: Path) -> None:
        """Write everything but the change itself as a JSON file."""
        write_json(path, _LAYOUT, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        requests = [
            {
                **request,
                "place": asdict(place),
                "answers": dict(zip(_STATES, answers, strict=True)),
                "says_target": self.says_target(index),
                "retained": share,
                "shift": None if shift is None else list(shift.lines()),
            }
            for index, (request, place, answers, share, shift) in enumerate(
                zip(self.delta.requests, self.places, self.answers, self.shares, self._all_shifts(), strict=True)
            )
        ]
        made = {"model": self.delta.model, "revision": self.delta.revision, "settings": dict(self.delta.settings)}
        weights = [asdict(each) for each in self.sizes]
        parts = {"requests": requests, "weights": weights, "undone_bit_for_bit": self.is_undone}
        parts |= {"rounding": [asdict(each) for each in self.rounding], "target_probabilities": self.probabilities}
        return made | parts | {"notes": list(self.notes)}

    def lines(self) -> Iterator[str]:
        """Yield what was edited where, the answers in each state of the model, and notes."""
        yield from self._one() if len(self.answers) == 1 else self._many()
        if self.probabilities:
            yield f"{'rounding':<15}  {self._rounding()}"
        yield from () if self.is_undone else ("after undo some weights differ!",)
        if any(share is not None and share < _MOSTLY for share in self.shares):
            yield "less than 90% is retained; a higher precision, a smaller ridge or export --peft gives the rest"
        if self.missed:
            yield f"{self.missed} of {len(self.answers)} do not say their target; try another --where or more --steps"
        for shift in self._all_shifts()[:_SHOWN]:
            yield from (f"{'traced again':<15}  {line}" for line in (shift.lines() if shift else ()))
        yield from (f"{'note':<15}  {note}" for note in self.notes)
        if self.preview is not None:
            yield ""
            yield from preview_lines(self.preview, _SHOWN)

    def _rounding(self) -> str:
        """Return one line on what half precision takes from the change and from the targets' probability."""
        worst = min(self.rounding, key=lambda each: each.survives)
        rounded, whole = (sum(column) / len(self.probabilities) for column in zip(*self.probabilities, strict=True))
        return f"{worst}; P(target) {rounded:.3f} in the weights, {whole:.3f} with the change in float32 beside them"

    def _one(self) -> Iterator[str]:
        (request,) = self.delta.requests
        yield f"question   {request['question']}"
        yield f"target     {request['target']}"
        yield f"edited at  {self.places[0]}"
        yield from () if request["status"] == EDITED else (f"status     {request['status']}",)
        yield ""
        yield from (f"{state:<15}  {answer}" for state, answer in zip(_STATES, self.answers[0], strict=True))
        yield f"{'retained':<15}  {_share(self.shares[0])} of the requested change"
        yield from (f"{'predicted leak':<15}  {leak}" for leak in (leak_in_words(request),) if leak)

    def _many(self) -> Iterator[str]:
        right = sum(self.says_target(index) for index in range(len(self.answers)))
        for place, count in _counted(self.places):
            yield f"edited at  {place}" + (f" ({count} requests)" if count < len(self.places) else "")
        yield f"edited     {self.edited} of {len(self.answers)} requests; {right} now say their target"
        yield ""
        leaks = any(map(leak_in_words, self.delta.requests))
        head = ("", "question", "target", *_STATES, "retained", *(["leak"] if leaks else []))
        rows: list[tuple[str, ...]] = [head]
        for index, request in enumerate(self.delta.requests[:_SHOWN]):
            is_made = request["status"] in (EDITED, NOT_GENERATED)
            said = self.answers[index] if is_made else (self.answers[index][0], request["status"])
            row = (str(index), *map(str, (request["question"], request["target"], *said)))
            end = [_share(self.shares[index]), *([_leak(request)] if leaks else [])]
            rows.append((*row, *[""] * (6 - len(row)), *end))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        yield from (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        if leaks:
            yield "leak: predicted share of a change at the same question about others / at others about the subject"
        if len(self.answers) > _SHOWN:
            yield f"and {len(self.answers) - _SHOWN} more, in the report"

    def _all_shifts(self) -> tuple[TraceShift | None, ...]:
        return self.shifts or (None,) * len(self.answers)


def _answers(vlm: VisionLanguageModel, requests: Sequence[EditRequest], **options: Any) -> list[str]:
    """The answers to the requests' questions; empty where the logits are not finite."""
    return [answer or "" for answer in answers_where_finite(vlm, [each.question for each in requests], **options)]


def _probabilities(
    vlm: VisionLanguageModel, requests: Sequence[EditRequest], delta: Delta
) -> tuple[tuple[float, float], ...]:
    """Return the probability of each target with the change in the weights, and with the change beside them."""
    columns = []
    for change in (delta, RuntimeEdit(delta=delta)):
        with change.applied(vlm):
            prompts = (vlm.prompt_for(each.question, answer=each.target) for each in requests)
            columns.append([target_probability(vlm, prompt) for prompt in prompts])
    return tuple(zip(*columns, strict=True))


def _counted(places: Sequence[Place]) -> list[tuple[str, int]]:
    """Places in words and how many requests have them; the reason where all have the same."""
    alike = len(set(places)) == 1
    words = [str(place) if alike else str(place).partition(":")[0] for place in places]
    return sorted(((each, words.count(each)) for each in set(words)), key=lambda pair: -pair[1])


def _leak(report: Mapping[str, Any]) -> str:
    return " / ".join(_share(report.get(kind)) for kind in (OTHERS, OWN)) if leak_in_words(report) else "-"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
