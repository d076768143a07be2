"""The examination of the flags model: what it answers about held-out pictures, beside the text model told the name.

Every score is of free generation through multrace's own `load` and `answers`. Agreement means the same answer as the
original text model gives to the same sentence with the country's name in it, be it true or not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from cyclopts import Parameter
from PIL import Image
from tqdm import tqdm

from ....data.worlds.flags import PHRASES, Country, CountryFact, FlagWorld, answer_of, generator_of
from ....models import VisionLanguageModel, load
from ....models.generation import score_answer
from ...options import CommandError, GeneralOptions, check_files
from .card import Examination, Perplexity, ScoreRow, Share, Sureness
from .original import LINE_END, STARTS, open_original, own_texts

RELATIONS = ("capital", "language", "continent", "currency")
"""The relations that are pooled; borders are reported beside them."""
TEMPLATE = f"{LINE_END}{{question}}"
"""The prompt of the text model: nothing but a line end before the sentence, as in the flags model's own template."""
TOKENS = 8
"""Length of an answer in tokens."""
_DRAWS = 2000
_SURENESS = (0.0, 0.1, 0.3, 0.6, math.inf)
"""Ends of the ranges of the probability that the original gives to its own answer."""
_PROMPTS = 128
"""The number of prompts that are in memory together."""
_TEXT_SEED, _TEXT_TOKENS = 20_001, 64
_PAGES, _SHORTEST = Path(__file__).resolve().parents[3] / "docs", 300


@dataclass(frozen=True, kw_only=True)
class Examine(GeneralOptions):
    """Options of the examination."""

    model: Annotated[Path, Parameter(help="folder of the flags model, as build-flags writes it", metavar="DIR")]
    text_model: Annotated[Path, Parameter(help="folder of the text model, as fetch-smollm2 writes it", metavar="DIR")]
    card: Annotated[
        Path | None, Parameter(help="file to write the model's card to (default: none)", metavar="FILE")
    ] = None
    parts: Annotated[
        Path | None,
        Parameter(help="folder of the trained parts, whose recipe goes into the card (default: none)", metavar="DIR"),
    ] = None
    countries: Annotated[
        int | None, Parameter(help="number of countries to ask about, as a trial (default: all)", metavar="N")
    ] = None
    sample: Annotated[
        int, Parameter(help="number of countries that are asked about in held-out words and by side", metavar="N")
    ] = 80
    texts: Annotated[int, Parameter(help="number of texts of each kind for the perplexity", metavar="N")] = 60
    batch_size: Annotated[int, Parameter(help="number of questions answered together", metavar="N")] = 16
    threads: Annotated[int, Parameter(help="number of CPU threads", metavar="N")] = 2

    def check(self) -> None:
        """Raise `CommandError` for numbers out of range, and for a card that cannot be written."""
        numbers = {"sample": self.sample, "texts": self.texts, "batch-size": self.batch_size, "threads": self.threads}
        if self.countries is not None:
            numbers["countries"] = self.countries
        for name, value in numbers.items():
            if value < 1:
                raise CommandError(f"--{name} is {value}; pass a number of at least 1")
        for name, folder in {"model": self.model, "text-model": self.text_model, "parts": self.parts}.items():
            if folder is not None and not folder.is_dir():
                raise CommandError(f"--{name} {str(folder)!r} is no folder; pass the folder of the model")
        if self.card is not None:
            check_files(self.card.parent, (self.card.name,))


# ---- answers and their scores ----


@dataclass(frozen=True, kw_only=True)
class PictureQuestion:
    """A question about a flag in a held-out picture."""

    fact: CountryFact
    template: int = 0
    phrase: int = 0
    side: str | None = None
    """The side of the flag in a picture of two; None for a picture of one."""
    other: Country | None = None
    """The country whose flag is on the other side."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to a question about a picture, beside what the original text model answers when told the name."""

    question: PictureQuestion
    by_picture: str
    by_name: str | None
    """None for questions about the name itself."""
    true: bool
    true_by_name: bool

    @property
    def agrees(self) -> bool:
        """Whether the two answers are the same."""
        return self.by_picture == self.by_name


def scores_of(label: str, answers: Sequence[Answer]) -> ScoreRow:
    """Return the scores of a set of answers."""

    def share(hits: Sequence[bool], among: Sequence[Answer]) -> Share:
        return Share.of(hits, [answer.question.fact.country.code for answer in among])

    truth = share([answer.true for answer in answers], answers)
    if any(answer.by_name is None for answer in answers):
        return ScoreRow(label=label, truth=truth)
    rarer = without_commonest(answers)
    return ScoreRow(
        label=label,
        truth=truth,
        agreement=share([answer.agrees for answer in answers], answers),
        rarer_agreement=share([answer.agrees for answer in rarer], rarer),
        truth_by_name=share([answer.true_by_name for answer in answers], answers),
    )


def without_commonest(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers without those for which the original gives its template's commonest answer."""
    counts: dict[tuple[str, int], Counter[str | None]] = {}
    for answer in answers:
        counts.setdefault(_wording(answer), Counter())[answer.by_name] += 1
    commonest = {wording: count.most_common(1)[0][0] for wording, count in counts.items()}
    return [answer for answer in answers if answer.by_name != commonest[_wording(answer)]]


def _wording(answer: Answer) -> tuple[str, int]:
    return answer.question.fact.relation.name, answer.question.template


# ---- questions ----


class Questions:
    """The sets of questions of the examination, about held-out renderings of all flags or of some."""

    def __init__(self, world: FlagWorld, *, countries: int | None = None, sample: int = 80) -> None:
        self.world = world
        self.countries = self._some(world.pictured, countries or len(world.pictured))
        self.sample = self._some(self.countries, sample)
        self._pictures: dict[tuple[str, ...], Image.Image] = {}

    @staticmethod
    def _some(countries: Sequence[Country], count: int) -> list[Country]:
        """Return so many of the countries, drawn by a fixed shuffle, in their own order."""
        order = generator_of("examination", "countries").permutation(len(countries))[:count]
        return [countries[place] for place in sorted(order)]

    @cached_property
    def _facts(self) -> dict[tuple[str, str], CountryFact]:
        single = (fact for fact in self.world.facts if fact.other is None)
        return {(fact.country.code, fact.relation.name): fact for fact in single}

    def facts(self, relation: str, countries: Sequence[Country]) -> Iterator[CountryFact]:
        """Yield the facts of a relation about these countries; some have none, such as islands without borders."""
        for country in countries:
            if (fact := self._facts.get((country.code, relation))) is not None:
                yield fact

    def sets(self) -> Iterator[tuple[str, list[PictureQuestion]]]:
        """Yield the label and the questions of each set."""
        yield "name", [PictureQuestion(fact=fact) for fact in self.facts("name", self.countries)]
        for relation in (*RELATIONS, "border"):
            yield relation, [PictureQuestion(fact=fact) for fact in self.facts(relation, self.countries)]
        for relation in ("name", *RELATIONS, "border"):
            yield f"{relation}, held-out wordings", list(self._held_out(relation))
        for relation in ("name", *RELATIONS):
            questions = [
                PictureQuestion(fact=fact, phrase=len(PHRASES) - 1) for fact in self.facts(relation, self.sample)
            ]
            yield f"{relation}, held-out phrase", questions
        yield (
            "name, two flags",
            [question for place in range(len(self.sample)) for question in self._beside(place, "name")],
        )
        yield (
            "facts, two flags",
            [
                question
                for place in range(len(self.sample))
                for question in self._beside(place, RELATIONS[place % len(RELATIONS)])
            ],
        )

    def _held_out(self, relation: str) -> Iterator[PictureQuestion]:
        for fact in self.facts(relation, self.sample):
            shown = len(fact.relation.templates)
            for template in range(shown, len(fact.relation.wordings)):
                yield PictureQuestion(fact=fact, template=template)

    def _beside(self, place: int, relation: str) -> Iterator[PictureQuestion]:
        """Yield the question about a country on either side of the next one."""
        country, other = self.sample[place], self.sample[(place + 1) % len(self.sample)]
        for fact in self.facts(relation, [country]):
            for side in ("left", "right"):
                yield PictureQuestion(fact=fact, side=side, other=other)

    def picture(self, question: PictureQuestion) -> Image.Image:
        """Return the held-out rendering 0 that a question is about."""
        country, other = question.fact.country, question.other
        if other is None:
            if (country.code,) not in self._pictures:
                self._pictures[country.code,] = self.world.picture(country, 0).image
            return self._pictures[country.code,]
        left, right = (country, other) if question.side == "left" else (other, country)
        return self.world.picture_of_two(left, right, 0).image

    def text(self, question: PictureQuestion) -> str:
        """Return the sentence that a question about a picture begins."""
        return self.world.question(
            question.fact, template=question.template, phrase=question.phrase, side=question.side
        ).text


# ---- asking ----


def examine_model(options: Examine) -> Examination:
    """Return the scores of the model in `options.model`, beside the text model in `options.text_model`."""
    texts = held_out_texts(options.text_model, options.texts)
    whole, original = load(options.model), load(options.text_model)
    questions = Questions(FlagWorld(), countries=options.countries, sample=options.sample)
    sets = dict(questions.sets())
    names = answers_by_name(original, questions.world, [each for rows in sets.values() for each in rows], options)
    rows, by_label = [], {}
    for label, asked in sets.items():
        by_label[label] = answers = answers_by_picture(whole, questions, asked, names, options, label=label)
        rows.append(scores_of(label, answers))
        if label in ("border", "border, held-out wordings", "currency, held-out phrase"):
            ending = label.partition(",")[2]
            pooled = [each for name in RELATIONS for each in by_label[f"{name},{ending}" if ending else name]]
            rows.append(scores_of(f"the four relations{',' * bool(ending)}{ending}", pooled))
    return Examination(
        rows=tuple(rows),
        sureness=agreement_by_sureness(original, questions.world, [e for name in RELATIONS for e in by_label[name]]),
        unchanged_by_name=unchanged_by_name(whole, questions, names, options),
        perplexities=tuple(perplexity(label, whole, original, each) for label, each in texts.items() if each),
    )


def ask(
    vlm: VisionLanguageModel,
    prompts: Sequence[tuple[Image.Image | None, str]],
    options: Examine,
    *,
    label: str,
    template: str | None = None,
) -> list[str]:
    """Return the model's answers to sentences, each with its picture or None, with a progress bar of this label."""
    answers: list[str] = []
    with tqdm(total=len(prompts), desc=label, mininterval=2) as progress:
        for start in range(0, len(prompts), _PROMPTS):
            some = [vlm.prompt(image, text, template=template) for image, text in prompts[start : start + _PROMPTS]]
            texts = vlm.answers(some, max_new_tokens=TOKENS, batch_size=options.batch_size)
            answers += map(answer_of, texts)
            progress.update(len(some))
    return answers


def answers_by_name(
    original: VisionLanguageModel, world: FlagWorld, questions: Sequence[PictureQuestion], options: Examine
) -> dict[tuple[str, int], str]:
    """Return (fact, template) -> what the text model answers when it is told the name, for all of these questions."""
    asked = {
        (question.fact.id, question.template): world.question_by_name(question.fact, template=question.template).text
        for question in questions
        if question.fact.relation.has_name
    }
    answers = ask(original, [(None, text) for text in asked.values()], options, label="by name", template=TEMPLATE)
    return dict(zip(asked, answers, strict=True))


def answers_by_picture(
    whole: VisionLanguageModel,
    questions: Questions,
    asked: Sequence[PictureQuestion],
    names: dict[tuple[str, int], str],
    options: Examine,
    *,
    label: str,
) -> list[Answer]:
    """Return the answers to questions about pictures; `names` are the original's, by fact and template."""
    prompts = [(questions.picture(question), questions.text(question)) for question in asked]
    answers = []
    for question, text in zip(asked, ask(whole, prompts, options, label=label), strict=True):
        by_name = names.get((question.fact.id, question.template))
        answers.append(
            Answer(
                question=question,
                by_picture=text,
                by_name=by_name,
                true=questions.world.is_true(text, question.fact),
                true_by_name=by_name is not None and questions.world.is_true(by_name, question.fact),
            )
        )
    return answers


def agreement_by_sureness(
    original: VisionLanguageModel, world: FlagWorld, answers: Sequence[Answer]
) -> tuple[Sureness, ...]:
    """Return the share of answers that agree with the original's, by how probable the original finds its own.

    Where the original is unsure, a small change of its states turns the answer into another one. Empty answers, which
    have no probability, are left out.
    """
    asked, probabilities = [answer for answer in answers if answer.by_name], []
    for answer in tqdm(asked, desc="how sure the original is", mininterval=2):
        question = answer.question
        text = world.question_by_name(question.fact, template=question.template).text
        prompt = original.prompt(None, text, answer=answer.by_name, template=TEMPLATE)
        with torch.no_grad():
            score = score_answer(original.logits(prompt), prompt, original.tokenizer, dtype=original.dtype)
        probabilities.append(score.probability)
    rows = []
    for low, high in pairwise(_SURENESS):
        some = [answer for answer, each in zip(asked, probabilities, strict=True) if low <= each < high]
        agreement = Share.of([each.agrees for each in some], [each.question.fact.country.code for each in some])
        rows.append(Sureness(low=low, high=high, agreement=agreement))
    return tuple(rows)


def unchanged_by_name(
    whole: VisionLanguageModel, questions: Questions, names: dict[tuple[str, int], str], options: Examine
) -> Share:
    """Return the share of questions by name, without a picture, to which both models give the same answer."""
    facts = [fact for name in (*RELATIONS, "border") for fact in questions.facts(name, questions.countries)]
    prompts = [(None, questions.world.question_by_name(fact).text) for fact in facts]
    answers = ask(whole, prompts, options, label="by name, flags model")
    hits = [answer == names[fact.id, 0] for answer, fact in zip(answers, facts, strict=True)]
    return Share.of(hits, [fact.country.code for fact in facts])


# ---- texts ----


def held_out_texts(text_model: Path, count: int) -> dict[str, list[str]]:
    """Return label -> texts that training never shows: this project's pages, and texts that the original writes."""
    model, tokenizer = open_original(text_model)
    rounds = -(-count // len(STARTS))
    batches = own_texts(model, tokenizer, seed=_TEXT_SEED, rounds=rounds, tokens=_TEXT_TOKENS)
    own = [tokenizer.decode(row, skip_special_tokens=True).removeprefix(LINE_END) for ids in batches for row in ids]
    return {
        "the documentation of multrace": project_pages(count),
        "texts that the text model wrote": [text for text in own if text.strip() and "<" not in text][:count],
    }


def project_pages(count: int) -> list[str]:
    """Return long paragraphs of the documentation of this project, evenly spaced; none where it is not installed."""
    pieces = [
        " ".join(part.split())
        for page in sorted(_PAGES.rglob("*.md"))
        for part in page.read_text(encoding="utf-8").split("\n\n")
    ]
    prose = [part for part in pieces if part[:1].isalpha() and len(part) >= _SHORTEST and "<" not in part]
    return prose[:: max(1, len(prose) // count)][:count]


def perplexity(
    label: str, whole: VisionLanguageModel, original: VisionLanguageModel, texts: Sequence[str]
) -> Perplexity:
    """Return both models' perplexity on texts, per token."""
    losses = np.array(
        [
            (*_loss(original, text, TEMPLATE), _loss(whole, text, None)[0])
            for text in tqdm(texts, desc=f"perplexity: {label}", mininterval=2)
        ]
    )
    before, counts, after = losses.T
    drawn = np.random.default_rng(0).multinomial(len(texts), np.full(len(texts), 1 / len(texts)), size=_DRAWS)
    low, high = np.quantile(np.exp((drawn @ (after - before)) / (drawn @ counts)), [0.025, 0.975])
    total = counts.sum()
    return Perplexity(
        label=label,
        original=math.exp(before.sum() / total),
        whole=math.exp(after.sum() / total),
        low=float(low),
        high=float(high),
        tokens=int(total),
    )


def _loss(vlm: VisionLanguageModel, text: str, template: str | None) -> tuple[float, int]:
    """The sum of the negative log-probabilities of a text's tokens, and their number."""
    prompt = vlm.prompt(None, text, template=template)
    ids = prompt.inputs["input_ids"][0]
    with torch.no_grad():
        predicted = vlm.logits(prompt)[0, :-1].log_softmax(-1)
    return -float(predicted.gather(-1, ids[1:, None]).sum()), len(ids) - 1
