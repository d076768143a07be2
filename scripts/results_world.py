"""The requests of the results, with all their questions and the unedited answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from ..data import World
from ..data.world import EditCase
from ..editing.evaluation import Baseline, EvaluationSettings, Record, baseline
from ..editing.moments import Moments, second_moments
from ..models import Prompt, VisionLanguageModel
from ..tracing import EditSite, SwapImage
from ..workflow.sites import locate
from .world_edits import WorldRequests, another_picture, untouched_facts, world_records

CONTEXTS = 3
"""Number of other pictures of the entity that an edit gets; no probe uses them."""
_MOMENT_FACTS = 400


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """The records of one half of one split, and what every row shares."""

    world: World
    cases: tuple[EditCase, ...]
    records: tuple[Record, ...]
    """As the default edits them: with other pictures as contexts."""
    baseline: Baseline
    moments: Moments
    """Second moments of keys over questions that training taught, in all layers, by projection of the MLP."""
    sites: tuple[EditSite, ...] = field(repr=False)
    """Where each request's own trace, under the picture of another entity, says that it is to be edited."""
    named: Mapping[str, Prompt] = field(default_factory=dict, repr=False)
    """The question of each request by the entity's name, without a picture, in a wording that no probe has."""
    notes: tuple[str, ...] = ()
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)

    def first(self, number: int) -> Self:
        """Return the same with the first requests only."""
        names = tuple(repr(record.request.label) for record in self.records[:number])  # as notes begin
        return replace(
            self,
            cases=self.cases[:number],
            records=self.records[:number],
            sites=self.sites[:number],
            notes=tuple(note for note in self.notes if note.startswith(names)),
        )


def make_bench(vlm: VisionLanguageModel, split: str, part: str, number: int, probes: int) -> Bench:
    """Return the first `number` requests of a split's part, with `probes` questions of each kind."""
    world = World()
    cases = _cases(world, split, part, number)
    records = world_records(vlm, world, cases, requests=WorldRequests(count=probes, contexts=CONTEXTS))
    settings = EvaluationSettings(forced=False)
    facts = untouched_facts(vlm, world, cases, _MOMENT_FACTS)
    found = locate(
        vlm,
        [record.request for record in records],
        corruptions=[SwapImage(another_picture(world, case)) for case in cases],
        per_request=True,
        progress=True,
    )
    return Bench(
        world=world,
        cases=cases,
        records=records,
        baseline=baseline(vlm, records, settings=settings, batch_size=64, progress=True),
        moments=second_moments(vlm, [prompt for prompt, _ in facts], progress=True),
        sites=found.edit_sites,
        named={case.fact.id: _by_name(vlm, world, case) for case in cases},
        notes=found.notes,
        settings=settings,
    )


def site_by_request(bench: Bench) -> Mapping[str, EditSite]:
    """The site of each request by its name."""
    return {record.request.name: site for record, site in zip(bench.records, bench.sites, strict=True)}


def _cases(world: World, split: str, part: str, number: int) -> tuple[EditCase, ...]:
    """As many cases as requested; if the part has fewer, the last cases of the other part follow.

    Settings are chosen on the first ones of a part, so that the last ones are as good as unseen.
    """
    other = "choose" if part == "report" else "report"
    return (*world.edit_cases(split, part), *reversed(world.edit_cases(split, other)))[:number]


def _by_name(vlm: VisionLanguageModel, world: World, case: EditCase) -> Prompt:
    asked = world.question_by_name(case.fact)
    return vlm.prompt(None, asked.question, constraint=asked.constraint)
