"""The facts of the study of a real model: what it answers to cloze questions by itself, and what of that is true.

A cloze question is a sentence without its end, "The capital of France is", which a language model goes on with; its
answer is the beginning of the continuation. There are three sources: the country in a picture of its flag, the
country's name, and the statements of CounterFact (arXiv 2202.05262).
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar

from ...artefacts import write_whole
from ...data import EditRecord, Question, read_data
from ...data.worlds.flags import HALVES, CountryFact, FlagWorld, answer_of, begins_with, generator_of
from ...models import VisionLanguageModel
from ...workflow import Analysis, Outcome, Summary, Task, question_of_record

TEMPLATE = "\n{question}"
"""The prompt of a question to the text model: a line end comes first, since position 0 is an attention sink."""
RELATIONS = ("capital", "language", "continent", "currency")
"""The relations that the study asks about."""
CHOOSING, REPORTING = HALVES
"""Settings are chosen on the facts of the first half of the countries, and all reported numbers are of the second."""
PICTURE, OTHER_PICTURE = 0, 1
"""The held-out renderings of a flag: the one that is asked about, and the one that replaces another country's."""


@dataclass(frozen=True, kw_only=True)
class Answers(Analysis):
    """The free answer to each cloze question."""

    name: ClassVar[str] = "answers"

    max_new_tokens: int = 8
    """Longest continuation in tokens."""
    batch: int = 16
    """Number of questions that are answered together."""

    @property
    def together(self) -> int:
        """The number of questions that are answered together."""
        return self.batch

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the answer to one question."""
        (outcome,) = self.compute_together(vlm, [task])
        return outcome

    def compute_together(self, vlm: VisionLanguageModel, tasks: Sequence[Task]) -> list[Outcome]:
        """Return the answers to a group of questions."""
        questions = [question_of_record(task.record) for task in tasks]
        prompts = [vlm.prompt_for(question) for question in questions]
        texts = vlm.answers(prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch)
        pairs = zip(questions, texts, strict=True)
        return [Outcome(row={"question": question.text, "answer": answer_of(text)}) for question, text in pairs]

    def summary(self) -> Summary:
        """Return a summary with nothing besides the table."""
        return Summary()


# ---- facts of the text model ----


def counterfact_questions(path: Path, vlm: VisionLanguageModel, longest: int) -> Iterator[Question]:
    """Yield the statements of a CounterFact file that take at most so many tokens, with their true answers.

    Raises `DataError` if the file cannot be read.
    """
    for _, record in read_data(path):
        if isinstance(record, EditRecord) and record.old is not None and not record.question.images:
            question = Question(
                id=f"counterfact {record.id}",
                text=record.question.text,
                constraint=record.question.constraint,
                template=TEMPLATE,
                answer=record.old,
            )
            if vlm.prompt_for(question).length <= longest:
                yield question


def capital_questions(world: FlagWorld) -> Iterator[Question]:
    """Yield the question for the capital of each country or territory by its name, with its answers."""
    for country in world.countries:
        if country.capital:
            fact = world.fact(f"{country.code}-capital")
            asked = world.question_by_name(fact)
            yield Question(
                id=f"capital {country.code}",
                text=asked.text,
                constraint=asked.constraint,
                template=TEMPLATE,
                answer=asked.answer,
                answers=asked.answers,
            )


def known_questions(questions: Sequence[Question], answers: Mapping[str, str]) -> list[Question]:
    """Return the questions whose answers, given by the questions' ids, begin with a true one."""
    known = []
    for question in questions:
        truths = [each for each in (question.answer, *question.answers) if each is not None]
        if question.id in answers and begins_with(answers[question.id], truths):
            known.append(question)
    return known


# ---- facts about the country in a picture ----


def half_of(country: str) -> str:
    """Return the half of the countries in which this one is, so that no flag is in both."""
    return HALVES[int(generator_of("half", country).integers(len(HALVES)))]


def pictured_questions(world: FlagWorld, folder: Path, limit: int) -> list[Question]:
    """Return questions for facts about the country in a picture of its flag; the pictures go into the folder.

    `extra` says the country, the relation and the half. The order is random but always the same, and relations take
    turns, so that the first questions are a sample of all.
    """
    facts = [fact for fact in world.facts if fact.relation.name in RELATIONS]
    return [_pictured(world, fact, folder) for fact in _taking_turns(facts)[:limit]]


def _pictured(world: FlagWorld, fact: CountryFact, folder: Path) -> Question:
    code = fact.country.code
    extra = {"country": code, "relation": fact.relation.name, "half": half_of(code)}
    boxes = world.picture(fact.country, PICTURE).boxes
    return replace(world.question(fact), image=_picture(world, folder, code, PICTURE), boxes=boxes, extra=extra)


def _picture(world: FlagWorld, folder: Path, code: str, number: int) -> Path:
    """Return the path of a held-out rendering of a flag, which is written if it is not there yet."""
    path = folder / f"{code}-{number}.png"
    if not path.is_file():
        content = io.BytesIO()
        world.picture(world.country(code), number).image.save(content, "png")
        write_whole(path, content.getvalue())
    return path


def _taking_turns(facts: Sequence[CountryFact]) -> list[CountryFact]:
    """Return the facts in a random order in which relations take turns."""
    lines = []
    for name in RELATIONS:
        line = [fact for fact in facts if fact.relation.name == name]
        generator_of("order", name).shuffle(line)  # type: ignore[arg-type]
        lines.append(line)
    return [fact for turn in zip_longest(*lines) for fact in turn if fact is not None]


def named_question(world: FlagWorld, question: Question) -> Question:
    """Return the same question by the country's name."""
    named = world.question_by_name(world.fact(question.id))
    return replace(named, id=question.id, extra=question.extra)


def with_answers(questions: Sequence[Question], answers: Mapping[str, str], world: FlagWorld) -> list[Question]:
    """Return the questions that have an answer, with it and whether it is right in `extra`.

    answers: The model's own answers by the questions' ids.
    """
    judged = []
    for question in questions:
        if answer := answers.get(question.id):
            extra = {**question.extra, "answer": answer, "right": world.is_true(answer, world.fact(question.id))}
            judged.append(replace(question, extra=extra))
    return judged


def with_other_pictures(
    vlm: VisionLanguageModel, questions: Sequence[Question], world: FlagWorld, folder: Path
) -> list[Question]:
    """Return the questions that have another country's picture to swap for: its answer begins with another token.

    The other country is of the same half, and the model's own answers to the same question count, so that the swap
    really changes the answer.
    """
    groups: dict[tuple[str, str], list[Question]] = {}
    first = {}
    for question in questions:
        groups.setdefault((question.extra["relation"], question.extra["half"]), []).append(question)
        first[question.id] = vlm.prompt(None, question.text).answer_tokens(question.extra["answer"])[0]
    swapped = []
    for question in questions:
        group = groups[question.extra["relation"], question.extra["half"]]
        others = [other for other in group if first[other.id] != first[question.id]]
        if others:
            other = others[int(generator_of("swap", question.id).integers(len(others)))]
            path = _picture(world, folder, other.extra["country"], OTHER_PICTURE)
            swapped.append(replace(question, corrupt=f"swap:{path}"))
    return swapped


def of_half(questions: Sequence[Question], half: str, limit: int, *, right: bool | None = True) -> list[Question]:
    """Return the first questions of a half: those with a right answer, with a wrong one, or (None) with any."""
    chosen = [each for each in questions if each.extra["half"] == half and right in (None, each.extra["right"])]
    return chosen[:limit]
