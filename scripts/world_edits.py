"""Edits of the built-in world with the prompts of a model."""

from __future__ import annotations

from collections.abc import Sequence

from .. import data
from ..data import EditCase, Question, World, WorldRequests
from ..editing.evaluation import Probe, Record
from ..editing.requests import EditRequest
from ..models import Prompt, VisionLanguageModel


def world_records(
    vlm: VisionLanguageModel, world: World, cases: Sequence[EditCase], *, requests: WorldRequests | None = None
) -> tuple[Record, ...]:
    """Return `data.world_records` with prompts of the model."""
    return tuple(_record(vlm, record) for record in data.world_records(world, cases, requests=requests))


def untouched_facts(
    vlm: VisionLanguageModel, world: World, cases: Sequence[EditCase], number: int | None = None
) -> tuple[tuple[Prompt, str], ...]:
    """Return (prompt, answer) of `data.untouched_facts`."""
    facts = data.untouched_facts(world, cases, number)
    return tuple((_prompt(vlm, fact), fact.answer) for fact in facts if fact.answer is not None)


def _record(vlm: VisionLanguageModel, record: data.EditRecord) -> Record:
    lists = ("contexts", "rewrite_prompts", "preserve_prompts")
    prompts = {name: tuple(_prompt(vlm, question) for question in getattr(record, name)) for name in lists}
    request = EditRequest(prompt=_prompt(vlm, record.question), target=record.target, name=record.id, **prompts)
    probes = tuple(
        Probe(kind=probe.kind, prompt=_prompt(vlm, probe.question), answer=probe.answer) for probe in record.probes
    )
    return Record(request=request, probes=probes, name=record.id)


def _prompt(vlm: VisionLanguageModel, question: Question) -> Prompt:
    return vlm.prompt(question.image, question.text, constraint=question.constraint)
