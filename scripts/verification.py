"""Answers to the probes of an edit, unedited, edited and undone, and whether they changed as they should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import EditCase, Question, World
    from ..editing import Delta
    from ..models import VisionLanguageModel

PROBES: Mapping[str, tuple[str, bool]] = {
    "edited": ("the edited question and picture (efficacy)", True),
    "renderings": ("other pictures of the same entity (generality)", True),
    "paraphrases": ("other wordings (generality)", True),
    "paraphrased_renderings": ("other wordings, other pictures (generality)", True),
    "other_entities": ("other entities, same question (locality)", False),
    "other_relations": ("other relations of the entity (locality)", False),
    "two_constraint": ("two-constraint questions of the entity (locality)", False),
}
"""Kind of probe -> (description, whether its answer should become the target)."""


@dataclass(frozen=True, kw_only=True)
class ProbeAnswers:
    """One question asked in all three states of the model."""

    kind: str
    record: Question
    """Its answer is the right one after the edit: the target, or what training taught."""
    unedited: str
    edited: str
    undone: str

    def is_right(self, state: str) -> bool:
        """Return whether the answer in this state ("unedited", "edited", "undone") equals the record's exactly."""
        return getattr(self, state) == self.record.answer


def probe_records(world: World, case: EditCase, *, count: int = 8) -> list[tuple[str, Question]]:
    """Return (kind, record) of every question about one case: the edited question first, then its neighbours."""
    picture = world.picture(world.entities[case.fact.entity], 0).image
    edited = world.question(case.fact).with_answer(case.target).with_image(picture)
    neighbours = world.neighbours(case, count=count)
    return [("edited", edited), *((kind, record) for kind in PROBES for record in neighbours.get(kind, ()))]


SUMMARIES: Mapping[str, tuple[str, ...]] = {
    "efficacy": ("edited",),
    "other pictures": ("renderings",),
    "other wordings": ("paraphrases", "paraphrased_renderings"),
    "other entities": ("other_entities",),
    "other relations": ("other_relations", "two_constraint"),
}
"""Short names of what is reported about an edit -> the kinds of probes it is measured on."""


def summary(probes: Sequence[ProbeAnswers]) -> Mapping[str, float]:
    """Return name of SUMMARIES -> share of right answers under the edit, 0 to 1.

    Where the answer should stay, only questions count that the unedited model answered rightly: an edit cannot keep
    what was not there. NaN where no question is left.
    """
    shares = {}
    for name, kinds in SUMMARIES.items():
        moves = PROBES[kinds[0]][1]
        chosen = [probe for probe in probes if probe.kind in kinds and (moves or probe.is_right("unedited"))]
        right = sum(probe.is_right("edited") for probe in chosen)
        shares[name] = right / len(chosen) if chosen else float("nan")
    return shares


def verify(
    vlm: VisionLanguageModel, delta: Delta, records: Sequence[tuple[str, Question]], *, batch_size: int = 32
) -> tuple[ProbeAnswers, ...]:
    """Return the free answers to every record before, under and after the delta; the model ends as it began."""
    prompts = [vlm.prompt(record.image, record.text) for _, record in records]
    unedited = vlm.answers(prompts, batch_size=batch_size)
    with delta.applied(vlm):
        edited = vlm.answers(prompts, batch_size=batch_size)
    undone = vlm.answers(prompts, batch_size=batch_size)
    rows = zip(records, unedited, edited, undone, strict=True)
    return tuple(
        ProbeAnswers(kind=kind, record=record, unedited=before, edited=during, undone=after)
        for (kind, record), before, during, after in rows
    )


def edited_answers(
    vlm: VisionLanguageModel, probes: Sequence[ProbeAnswers], *, batch_size: int = 32
) -> tuple[ProbeAnswers, ...]:
    """Return the same probes with what the model answers now, under another edit, in place of `edited`."""
    prompts = [vlm.prompt(probe.record.image, probe.record.text) for probe in probes]
    answers = vlm.answers(prompts, batch_size=batch_size)
    return tuple(replace(probe, edited=answer) for probe, answer in zip(probes, answers, strict=True))


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """Shares of right answers of one kind of probe, 0 to 1, and how many there were."""

    kind: str
    number: int
    unedited: float
    edited: float
    undone: float


def scores(probes: Sequence[ProbeAnswers]) -> tuple[ProbeScore, ...]:
    """Return one score per kind of probe, in the order of PROBES."""
    rows = []
    for kind in PROBES:
        chosen = [probe for probe in probes if probe.kind == kind]
        if chosen:
            shares = {
                state: sum(probe.is_right(state) for probe in chosen) / len(chosen)
                for state in ("unedited", "edited", "undone")
            }
            rows.append(ProbeScore(kind=kind, number=len(chosen), **shares))
    return tuple(rows)
