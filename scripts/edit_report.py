"""The report of `multrace edit`: lines of text, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..editing.changes import Delta
from ..editing.evaluation.preview import Preview, Size, preview_lines
from ..editing.requests import EDITED, NOT_GENERATED
from ..workflow.located_edit import TraceShift
from .edit_where import Place

_SHOWN = 20
"""Maximum number of requests, neighbours or shifts that are printed; the report has all."""
_MOSTLY = 0.9
_STATES = ("before", "with the edit", "after undo")


@dataclass(frozen=True, kw_only=True, eq=False)
class EditOutcome:
    """A finished edit and its results."""

    delta: Delta
    places: tuple[Place, ...]
    """The place of each request."""
    notes: tuple[str, ...]
    shifts: tuple[TraceShift | None, ...]
    answers: tuple[tuple[str, ...], ...]
    """(before, with the edit, after undo) of each request."""
    shares: tuple[float | None, ...]
    """Of what each request asked for, over all its keys, after rounding to the model's dtype; None without keys."""
    is_undone: bool
    """Whether every touched weight is bit-identical to what it was."""
    sizes: tuple[Size, ...]
    preview: Preview | None = None

    @property
    def edited(self) -> int:
        """Return how many requests were edited."""
        return sum(request["status"] == "edited" for request in self.delta.requests)

    @property
    def missed(self) -> int:
        """Return for how many requests the edited model does not say the target."""
        return sum(not self._says_target(index) for index in range(len(self.answers)))

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        requests = [
            {
                **request,
                "place": asdict(place),
                "answers": dict(zip(_STATES, answers, strict=True)),
                "says_target": self._says_target(index),
                "retained": share,
                "shift": None if shift is None else list(shift.lines()),
            }
            for index, (request, place, answers, share, shift) in enumerate(
                zip(self.delta.requests, self.places, self.answers, self.shares, self._all_shifts(), strict=True)
            )
        ]
        made = {"model": self.delta.model, "revision": self.delta.revision, "settings": dict(self.delta.settings)}
        sizes = [asdict(each) for each in self.sizes]
        found = {"requests": requests, "weights": sizes, "undone_bit_for_bit": self.is_undone}
        return made | found | {"notes": list(self.notes)}

    def lines(self) -> Iterator[str]:
        """Yield what was edited where, the answers in each state of the model, and notes."""
        yield from self._one() if len(self.answers) == 1 else self._many()
        yield from () if self.is_undone else ("after undo some weights differ!",)
        if any(share is not None and share < _MOSTLY for share in self.shares):
            yield "less than 90% is retained; a higher precision, a smaller ridge or export --peft gives the rest"
        if self.missed:
            yield f"{self.missed} of {len(self.answers)} do not say their target; another --where or more --steps may help"
        for shift in self._all_shifts()[:_SHOWN]:
            yield from (f"{'traced again':<15}  {line}" for line in (shift.lines() if shift else ()))
        yield from (f"{'note':<15}  {note}" for note in self.notes)
        if self.preview is not None:
            yield ""
            yield from preview_lines(self.preview, _SHOWN)

    def _one(self) -> Iterator[str]:
        (request,) = self.delta.requests
        yield f"question   {request['question']}"
        yield f"target     {request['target']}"
        yield f"edited at  {self.places[0]}"
        yield from () if request["status"] == "edited" else (f"status     {request['status']}",)
        yield ""
        yield from (f"{state:<15}  {answer}" for state, answer in zip(_STATES, self.answers[0], strict=True))
        yield f"{'retained':<15}  {_share(self.shares[0])} of the requested change"

    def _many(self) -> Iterator[str]:
        right = sum(self._says_target(index) for index in range(len(self.answers)))
        for place, count in _counted(self.places):
            yield f"edited at  {place}" + (f" ({count} requests)" if count < len(self.places) else "")
        yield f"edited     {self.edited} of {len(self.answers)} requests; {right} now say their target"
        yield ""
        rows = [("", "question", "target", *_STATES, "retained")]
        for index, request in enumerate(self.delta.requests[:_SHOWN]):
            said = (
                self.answers[index]
                if request["status"] in (EDITED, NOT_GENERATED)
                else (self.answers[index][0], request["status"])
            )
            row = (str(index), request["question"], request["target"], *said)
            rows.append((*row, *[""] * (6 - len(row)), _share(self.shares[index])))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        yield from (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        if len(self.answers) > _SHOWN:
            yield f"and {len(self.answers) - _SHOWN} more, in the report"

    def _says_target(self, index: int) -> bool:
        return self.answers[index][1] == str(self.delta.requests[index]["target"]).strip()

    def _all_shifts(self) -> tuple[TraceShift | None, ...]:
        return self.shifts or (None,) * len(self.answers)


def _counted(places: Sequence[Place]) -> list[tuple[str, int]]:
    """Places in words and how many requests have them; the reason where all have the same."""
    alike = len(set(places)) == 1
    words = [str(place) if alike else str(place).partition(":")[0] for place in places]
    return sorted(((each, words.count(each)) for each in set(words)), key=lambda pair: -pair[1])


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
