"""Questions and edit records made of the flags world, and files of them that the commands of multrace read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ...errors import DataError
from ...facts import (
    BY_NAME,
    NO_PICTURE,
    OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
    UNRELATED,
    EditRecord,
    PictureSource,
    Probe,
    Question,
    questions_of,
    with_questions,
)
from ...jsonl import write_lines
from .questions import PHRASES
from .splits import SplitRow
from .world import CountryFact, FlagWorld, generator_of

_DIGITS = 16


def flag_questions(
    facts: Sequence[CountryFact], *, world: FlagWorld | None = None, number: int = 0
) -> tuple[Question, ...]:
    """Return the question about each fact with held-out rendering `number` of its flag (default 0) and its box.

    Example:
        >>> from multrace.data.worlds.flags import FlagWorld, flag_questions
        >>> world = FlagWorld()
        >>> flag_questions([world.fact("jp-capital")], world=world)
        (Question('The capital of the country in this photo is' -> 'Tokyo', 1 picture),)
    """
    world = world or FlagWorld()
    return tuple(world.pictured_question(fact, number) for fact in facts)


def flag_records(
    rows: Sequence[SplitRow], known: Sequence[CountryFact], *, world: FlagWorld | None = None, count: int = 4
) -> tuple[EditRecord, ...]:
    """Return an edit record for each row: its target is the true answer, and its probes have held-out renderings.

    The answer has to change about other renderings, other wordings (those that training never used among them), both,
    one of two flags, and by name. It has to stay about facts that the model knows: the same question about other
    flags, other questions about the same flag, and other questions about other flags; and without a picture.

    Args:
        rows: Rows of the splits "wrong" or "long_tail", for example `world.splits` of one split and half.
        known: Facts that the model knows: answers to questions about these have to stay.
        world: The flags world; None (default) makes one.
        count: The maximum number of probes of each kind (default 4).

    Returns:
        The records, in the order of the rows.

    Raises:
        DataError: `count` is less than 1, or a row names an unknown fact.

    Example:
        >>> from multrace.data.worlds.flags import FlagWorld, SplitRow, flag_records
        >>> world = FlagWorld()
        >>> row = SplitRow(id="au-capital", country="au", relation="capital", split="wrong", half="choosing",
        ...                answer="Sydney", by_name="Sydney", truth="Canberra")
        >>> flag_records([row], [world.fact("jp-capital"), world.fact("au-continent")], world=world)
        (EditRecord('The capital of the country in this photo is' -> 'Canberra', 21 probes),)
    """
    if count < 1:
        raise DataError(f"{count} probes of each kind: pass count=1 or more")
    world = world or FlagWorld()
    return tuple(_record(world, row, known, count) for row in rows)


def _record(world: FlagWorld, row: SplitRow, known: Sequence[CountryFact], count: int) -> EditRecord:
    fact = world.fact(row.id)
    question = world.pictured_question(fact, 0)
    return EditRecord(
        id=row.id,
        question=question,
        target=row.truth,
        old=row.answer or None,
        group=row.split,
        probes=(*_moving(world, fact, question, count), *_staying(world, fact, question, known, count)),
    )


def _moving(world: FlagWorld, fact: CountryFact, question: Question, count: int) -> Iterator[Probe]:
    """Yield the probes whose answer is to become the target."""
    wordings = [
        world.question(fact, template=template, phrase=phrase)
        for phrase in range(len(PHRASES))
        for template in range(len(fact.relation.wordings))
        if (template, phrase) != (0, 0)
    ]
    order = generator_of("wordings", fact.id).permutation(len(wordings))
    wordings = [wordings[place].with_answer(None) for place in order[:count]]
    other = world.replacement(fact)
    for number in range(1, count + 1):
        yield Probe(kind=OTHER_PICTURE, question=world.pictured_question(fact, number))
    for each in wordings:
        yield Probe(kind=REPHRASE, question=each.with_image(question.image))
    for number, each in enumerate(wordings, 1):
        picture = world.picture(fact.country, number).image
        yield Probe(kind=REPHRASE_OTHER_PICTURE, question=each.with_image(picture))
    for side in ("left", "right"):
        yield Probe(kind=REPHRASE_OTHER_PICTURE, question=world.question_of_two(fact, other, side, 0))
    if fact.relation.has_name:
        for template in range(min(count, len(fact.relation.wordings))):
            yield Probe(kind=BY_NAME, question=world.question_by_name(fact, template=template))


def _staying(
    world: FlagWorld, fact: CountryFact, question: Question, known: Sequence[CountryFact], count: int
) -> Iterator[Probe]:
    """Yield the probes whose answer is to stay."""
    order = generator_of("known", fact.id).permutation(len(known))
    shuffled = [known[place] for place in order]
    own = [other for other in shuffled if other.country == fact.country and other.id != fact.id]
    others = [other for other in shuffled if other.country != fact.country]
    same = [other for other in others if other.relation == fact.relation]
    rest = [other for other in others if other.relation != fact.relation]
    for kind, facts in ((SAME_QUESTION_OTHER_PICTURE, same), (OTHER_QUESTION_SAME_PICTURE, own), (UNRELATED, rest)):
        for other in facts[:count]:
            asked = world.pictured_question(other, 0)
            yield Probe(kind=kind, question=asked, answer=asked.answer)
    yield Probe(kind=NO_PICTURE, question=question.with_image(None).with_answer(None))


# ---- files ----


def write_flags(folder: Path, records: Iterable[Question | EditRecord]) -> Path:
    """Write records with pictures in memory as a file of lines, and return the path: flags.jsonl in the folder.

    The pictures become PNG files in the folder "pictures", named by their content, so that one that several questions
    show is written once. Raises `DataError` if the folder cannot be written to.
    """
    pictures: dict[str, Path] = {}
    return write_lines(
        folder / "flags.jsonl", (_with_files(record, folder / "pictures", pictures) for record in records)
    )


def _with_files(record: Question | EditRecord, folder: Path, pictures: dict[str, Path]) -> Question | EditRecord:
    return with_questions(record, {place: _with_file(each, folder, pictures) for place, each in questions_of(record)})


def _with_file(question: Question, folder: Path, pictures: dict[str, Path]) -> Question:
    if not isinstance(question.image, Image.Image):
        return question
    return replace(question, image=_saved(question.image, folder, pictures))


def _saved(image: Image.Image, folder: Path, pictures: dict[str, Path]) -> PictureSource:
    """Return the path of the file of a picture, which is written unless it was before."""
    name = hashlib.sha256(image.tobytes()).hexdigest()[:_DIGITS]
    if name not in pictures:
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        path = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded.getvalue())
        except OSError as error:
            raise DataError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another folder") from error
        pictures[name] = path
    return pictures[name]
