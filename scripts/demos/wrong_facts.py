"""What a demo edits: facts that a model states wrongly, the questions that check them, and pictures to swap for.

Both worlds have one demo. What differs is here: the model, the facts, how its answers are read, and the editor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ... import data, editing, models, tracing, workflow
from ...data.worlds import flags
from ..options import CommandError
from .answers import (
    BY_NAME,
    OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
    Marking,
    VerifiedQuestion,
)

if TYPE_CHECKING:
    from os import PathLike

    from PIL import Image

    from ...data import EditCase, EditRecord, Question
    from ...data.worlds.flags import CountryFact
    from ...editing.solve import ClosedFormEditor

logger = logging.getLogger("multrace")
KINDS = (
    OTHER_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
)
"""The kinds of probes that are asked in both worlds."""
_FIRST_CONTEXT = 20
"""The first held-out rendering that an edit of the flags model sees besides the edited one; no probe shows them."""
FLAG_TOKENS = 8
"""Length of an answer about a flag in tokens."""
ASKED_COUNTRIES = 40
"""Number of countries about which a model without splits is asked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WrongFacts:
    """Facts that a model states wrongly, and all that it takes to trace, edit and verify them."""

    vlm: models.VisionLanguageModel
    records: Sequence[EditRecord]
    corruptions: Sequence[tracing.Corruption]
    """For each fact, the picture of something else."""
    editor: Callable[..., ClosedFormEditor]
    """Makes the settings of an edit from `layer` and `token`."""
    marking: Marking
    title: str
    description: str
    """What the facts are, behind their number."""


# ---- the embedded model ----


def embedded_facts(*, limit: int, seed: int) -> WrongFacts:
    """Return facts of the embedded model that are outdated.

    Raises `CommandError` if there are not that many.
    """
    world = data.World()
    cases = world.edit_cases("outdated", "report", seed)
    _check_limit(limit, len(cases), "outdated facts")
    cases = cases[:limit]  # the first ones: none is picked by its result
    return WrongFacts(
        vlm=models.load(data.tiny_vlm_path()),
        records=[edit_record(world, case) for case in cases],
        corruptions=[tracing.SwapImage(_other_picture(world, case)) for case in cases],
        editor=editing.MultEdit,
        marking=Marking(),
        title="multrace: outdated facts, found and changed",
        description=f"outdated facts of the embedded model (seed {seed})",
    )


def edit_record(world: data.World, case: EditCase, *, count: int = 8) -> EditRecord:
    """Return the record of a case, with at most `count` probes of each kind that the report shows."""
    (record,) = data.world_records(world, [case], requests=data.WorldRequests(count=count))
    return replace(record, probes=tuple(probe for probe in record.probes if probe.kind in KINDS))


def _other_picture(world: data.World, case: EditCase) -> Image.Image:
    """Return a picture of the next entity of the kind whose answer has another first word, which the trace scores."""
    entity = world.entities[case.fact.entity]
    peers = world.of_kind(entity.kind)
    start = peers.index(entity) + 1
    first = case.fact.answer.split()[0]
    other = next(peer for peer in (*peers[start:], *peers[:start]) if peer.facts[case.fact.key].split()[0] != first)
    return world.picture(other, 0).image


def _check_limit(limit: int, number: int, what: str) -> None:
    if number == 0:
        raise CommandError(f"there are no {what}, so there is nothing to edit; use another model")
    if not 1 <= limit <= number:
        raise CommandError(f"--limit {limit}: there are {number} {what} to report on; pass 1 to {number}")


# ---- the model that reads flags ----


@dataclass(frozen=True, kw_only=True)
class FlagEdits:
    """How errors of the flags model are edited and checked; `studies.flag_edits` compares the numbers with others."""

    kept: int = 12
    """Number of other countries whose answers an edit keeps."""
    contexts: int = 2
    """Number of other renderings that an edit sees."""
    ridge_fraction: float = 0.001
    """The ridge, as the editors have it."""
    probes: int = 2
    """Maximum number of probes of each kind."""
    half: str = "reporting"
    """The half of the errors that are edited, and of the known facts that are probed. An edit keeps the other half."""

    def editor(self, *, layer: int, token: str | int) -> ClosedFormEditor:
        """Return the settings of an edit: the text goes on after an answer, so its end is not part of the target."""
        return editing.MultEdit(layer=layer, token=token, ending="none", ridge_fraction=self.ridge_fraction)


class FlagMarking(Marking):
    """The answer is what comes before the end of the clause, and is right if it begins with a true answer."""

    rule = (
        "Greedy free generation. An answer ends with its line or clause, and is right if it begins with a true answer."
    )

    def __init__(self, world: data.FlagWorld) -> None:
        self.world = world

    def answer_in(self, text: str) -> str:
        """Return the answer in what the model generated, which goes on after it."""
        return flags.answer_of(text)

    def is_right(self, answer: str, question: VerifiedQuestion) -> bool:
        """Return whether the answer is true: of the edited fact, or of the fact that should stay."""
        fact = question.answers.record if question.moves else question.question.id
        return self.world.is_true(answer, self.world.fact(fact))


def flag_facts(
    *,
    limit: int,
    seed: int,
    model: str | PathLike[str] | None = None,
    cache: str | PathLike[str] | None = None,
    wheel: str | PathLike[str] | None = None,
) -> WrongFacts:
    """Return real errors of the model that reads flags, which is fetched and built if it is not there.

    The errors are those of the split "wrong" on which results are reported. A model without splits is asked for them.

    Args:
        limit: The number of errors.
        seed: The random seed of their choice.
        model: The folder of another model that reads flags; None for the one that `build_flags` makes.
        cache: The folder of the cache; None for the user's.
        wheel: A file of the wheel of the text model, for a machine without a network.

    Raises:
        CommandError: There are not that many errors.
        ModelError: The model cannot be made or opened.

    Example:
        from multrace.scripts.demos import flag_facts

        facts = flag_facts(limit=10, seed=0)
    """
    world = data.FlagWorld()
    rows, reason = _splits(world, model)
    if rows is not None:
        _check_limit(limit, len(own_errors(rows, seed)), "errors")  # before anything is fetched
    path = workflow.build_flags(cache=cache, wheel=wheel) if model is None else model
    vlm = models.load(path)
    if rows is None:
        logger.warning("%s; the model is asked about %d countries for its errors", reason, ASKED_COUNTRIES)
        rows = asked_splits(vlm, world, seed=seed)
    return facts_to_fix(vlm, world, rows, limit=limit, seed=seed)


def facts_to_fix(
    vlm: models.VisionLanguageModel,
    world: data.FlagWorld,
    rows: Sequence[flags.SplitRow],
    *,
    limit: int,
    seed: int,
    edits: FlagEdits | None = None,
) -> WrongFacts:
    """Return the first errors of a half in the splits of a model, by `seed`.

    Raises `CommandError` if there are not that many. edits: how they are edited; None for the settings of the demo.
    """
    edits = edits or FlagEdits()
    errors = own_errors(rows, seed, half=edits.half)
    _check_limit(limit, len(errors), "errors")
    errors = errors[:limit]  # the first ones: none is picked by its result
    return WrongFacts(
        vlm=vlm,
        records=[flag_record(world, row, rows, edits=edits) for row in errors],
        corruptions=[tracing.SwapImage(_other_flag(world, row, rows)) for row in errors],
        editor=edits.editor,
        marking=FlagMarking(world),
        title="multrace: real errors, found and fixed",
        description=f"real errors of a model that reads flags (seed {seed})",
    )


def _splits(world: data.FlagWorld, model: str | PathLike[str] | None) -> tuple[tuple[flags.SplitRow, ...] | None, str]:
    """Return the splits of the shipped model, or None and the reason why there are none."""
    if model is not None:
        return None, "the splits that multrace has are of another model"
    try:
        return world.splits, ""
    except data.DataError as error:
        return None, str(error)


def asked_splits(
    vlm: models.VisionLanguageModel, world: data.FlagWorld, *, seed: int, countries: int = ASKED_COUNTRIES
) -> tuple[flags.SplitRow, ...]:
    """Return the splits of a model that is asked about some countries, by picture and by name."""
    members = [country for country in world.pictured if country.is_country]
    order = flags.generator_of("demo", "countries", seed).permutation(len(members))[:countries]
    chosen = {members[place].code for place in order}
    facts = [
        fact for fact in world.facts if fact.country.code in chosen and fact.relation.has_name and fact.other is None
    ]
    return world.splits_from(answers_about(vlm, world, facts, progress=True))


def answers_about(
    vlm: models.VisionLanguageModel,
    world: data.FlagWorld,
    facts: Sequence[CountryFact],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, tuple[str, str]]:
    """Return the model's answers as `FlagWorld.splits_from` takes them: id -> (by picture, by name or "").

    Args:
        vlm: The model.
        world: The flags world.
        facts: The facts to ask for, about held-out rendering 0 and by name where that can be asked.
        batch_size: The number of questions answered together (default 16).
        progress: Show a progress bar for each of the two ways of asking (default False).
    """

    def answers(questions: Sequence[Question]) -> list[str]:
        prompts = [vlm.prompt_for(question) for question in questions]
        options = {"max_new_tokens": FLAG_TOKENS, "batch_size": batch_size, "progress": progress}
        return [flags.answer_of(text) for text in (vlm.answers(prompts, **options) if prompts else ())]

    named = [fact for fact in facts if fact.relation.has_name]
    by_picture = answers([world.pictured_question(fact, 0) for fact in facts])
    by_name = answers([world.question_by_name(fact) for fact in named])
    names = {fact.id: answer for fact, answer in zip(named, by_name, strict=True)}
    return {fact.id: (answer, names.get(fact.id, "")) for fact, answer in zip(facts, by_picture, strict=True)}


def own_errors(rows: Sequence[flags.SplitRow], seed: int, *, half: str = "reporting") -> list[flags.SplitRow]:
    """Return the errors of a half in an order that the seed shuffles.

    Those that the model makes by name, too, come first: they are errors of its knowledge, and not of its eyes.
    """
    wrong = [row for row in rows if (row.split, row.half) == ("wrong", half)]
    order = flags.generator_of("demo", "errors", seed).permutation(len(wrong))
    return sorted((wrong[place] for place in order), key=lambda row: row.answer != row.by_name)


def flag_record(
    world: data.FlagWorld, row: flags.SplitRow, rows: Sequence[flags.SplitRow], *, edits: FlagEdits | None = None
) -> EditRecord:
    """Return the record of an error: it sees more renderings, and keeps what the model knows of other countries.

    It keeps facts of one half of what the model knows. The probes ask for those of the other half, and for what is
    known of the country itself. `FlagEdits` has the numbers.

    Args:
        world: The flags world.
        row: The error.
        rows: All splits.
        edits: How it is edited; None for the settings of the demo.
    """
    edits = edits or FlagEdits()
    fact, kinds = world.fact(row.id), (*KINDS, BY_NAME)
    known = [(world.fact(each.id), each.half) for each in _known(rows)]
    probed = [each for each, half in known if half == edits.half or each.country == fact.country]
    (record,) = flags.flag_records([row], probed, world=world, count=edits.probes)
    peers = [each for each, _ in known if each not in probed and each.relation == fact.relation]
    order = flags.generator_of("demo", "kept", row.id).permutation(len(peers))[: edits.kept]
    return replace(
        record,
        contexts=tuple(world.pictured_question(fact, _FIRST_CONTEXT + number) for number in range(edits.contexts)),
        preserve_prompts=tuple(world.pictured_question(peers[place], 0) for place in order),
        probes=tuple(probe for probe in record.probes if probe.kind in kinds),
    )


def _known(rows: Sequence[flags.SplitRow]) -> list[flags.SplitRow]:
    return [row for row in rows if row.split == "known"]


def _other_flag(world: data.FlagWorld, row: flags.SplitRow, rows: Sequence[flags.SplitRow]) -> Image.Image:
    """Return a picture of a flag about which the model is right, and says something else than about this one."""
    first = row.answer.split()[:1]
    peers = [each for each in _known(rows) if each.relation == row.relation and each.answer.split()[:1] != first]
    order = flags.generator_of("demo", "swap", row.id).permutation(len(peers))
    fact = world.fact(row.id)
    other = world.fact(peers[order[0]].id).country if peers else world.replacement(fact)
    return world.picture(other, 0).image
