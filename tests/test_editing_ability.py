"""General ability, the original entity, steps, judges and costs: what an evaluation shows besides the edited facts."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace import EditRequest, MultEdit, VisionLanguageModel
from multrace.data import EditRecord, Probe, Question, World, WorldRequests, untouched_facts, world_records
from multrace.data.facts import (
    ABILITY,
    BY_NAME,
    CLOZE,
    EDITED,
    EFFICACY,
    GIVEN_TEXT,
    LOCALITY,
    ORIGINAL_ENTITY,
    OWN_TEXT,
    PORTABILITY,
)
from multrace.editing import EditError, EditReport, EvaluationSettings, FineTune, evaluate
from multrace.editing.evaluation import (
    BEGINS,
    CONTAINS,
    EXACT,
    JUDGED,
    NOT_NEW,
    PERPLEXITY,
    UNCHANGED,
    CostMeter,
    EditCost,
    ability_tests,
    begins_with_answer,
    cloze_questions,
    contains_answer,
    perplexity,
    seen_statuses,
    text_perplexities,
)
from multrace.workflow import EvaluateSequenceRun, evaluate_sequence, read_cost, run

WORLD = World()
CASES = WORLD.edit_cases("outdated", "choose")[:3]
EDIT = MultEdit(layer=5, stop_loss=0.05)
FACTS = untouched_facts(WORLD, CASES, 4)
NAMED = WORLD.question_by_name(CASES[0].fact)
SETTINGS = EvaluationSettings(forced=False, perplexity_texts=4, perplexity_tokens=12)
BARE = [replace(record, probes=()) for record in world_records(WORLD, CASES, requests=WorldRequests(count=1))]
BAD = EditRecord(id="bad", question=Question(text="Who won?"), target="Pruro")
"""A record that an editor at the constraint cannot edit."""


@pytest.fixture(scope="module")
def record() -> EditRecord:
    """An edit of what is seen in the picture: by name, the entity keeps its fact."""
    probe = Probe(kind=ORIGINAL_ENTITY, question=NAMED, answer=CASES[0].fact.answer)
    return replace(BARE[0], probes=(probe,), preserve_prompts=(NAMED,))


@pytest.fixture(scope="module")
def careful(tiny_vlm: VisionLanguageModel, record: EditRecord) -> EditReport:
    asked = {"settings": SETTINGS, "cloze": FACTS, "texts": ["Namo Fludez"], "progress": False}
    return evaluate(tiny_vlm, [record], EDIT, **asked)


@pytest.fixture(scope="module")
def parrot(tiny_vlm: VisionLanguageModel, record: EditRecord) -> EditReport:
    """The report on a model that was trained to answer everything with the target."""
    questions = (record.question, NAMED, *FACTS, *map(WORLD.question_by_name, WORLD.facts[3:7]))
    requests = [EditRequest(question=question, target=record.target) for question in questions]
    change = FineTune(layer=6, steps=12, learning_rate=0.02).edit(tiny_vlm, requests)
    return evaluate(tiny_vlm, [record], change, mode="batch", settings=SETTINGS, cloze=FACTS, progress=False)


def test_an_edit_that_says_the_target_to_everything_is_caught(careful, parrot):
    for report, share in ((careful, 1), (parrot, 0)):
        assert report.score(EFFICACY, EXACT).after.mean == 1
        for protocol in (UNCHANGED, NOT_NEW):  # the original entity, asked in text
            score = report.score(LOCALITY, protocol, ORIGINAL_ENTITY)
            assert (score.before.mean, score.after.mean) == (1, share)
        score = report.score(ABILITY, UNCHANGED, CLOZE)
        assert (score.before.mean, score.after.mean, score.after.number) == (1, share, len(FACTS))
    quiet, loud = (report.score(ABILITY, PERPLEXITY, OWN_TEXT) for report in (careful, parrot))
    assert quiet.before.mean == loud.before.mean  # the same texts, by their seed
    assert quiet.after.mean < 1.3 * quiet.before.mean < loud.after.mean / 2


def test_headlines_name_the_original_entity_and_the_perplexity(careful, tmp_path):
    table = careful.headlines()
    assert NOT_NEW in table and PERPLEXITY in table and "1 edit per step" in table
    assert not {row["kind"] for row in careful.generations()} & {OWN_TEXT, GIVEN_TEXT}
    path = careful.save(tmp_path / "report.json")
    assert EditReport.load(path) == careful and EditReport.load(path).cost == careful.cost
    content = json.loads(path.read_text())
    assert content["step"] == 1 and content["cost"]["edits"] == 1 and content["cost"]["device"] == "cpu"


def test_a_target_that_the_model_goes_on_after_counts_as_said(careful):
    own = next(row for row in careful.rows if row.kind == EDITED)
    for after, status in ((f"{own.new}, the", "edited"), (f"{own.new} the", "not generated")):
        row = replace(own, after=after, numbers={EXACT: (0.0, 0.0), BEGINS: (0.0, 1.0)})
        assert seen_statuses({own.record: "edited"}, [row]) == {own.record: status}
        assert BEGINS in replace(careful, rows=(row,)).headlines()
    assert BEGINS not in careful.headlines()  # where a model stops, exact match says it all


def test_by_name_is_generality_and_the_original_entity_is_locality(tiny_vlm, record):
    """The same answer to the same question is right for the one kind and wrong for the other."""
    probes = (Probe(kind=BY_NAME, question=NAMED), record.probes[0])
    both = replace(record, probes=probes, preserve_prompts=(), rewrite_prompts=(NAMED,))
    report = evaluate(tiny_vlm, [both], EDIT, settings=EvaluationSettings(forced=False), progress=False)
    _, found, kept = report.rows
    assert found.after == kept.after == record.target
    assert found.numbers[EXACT][1] == 1 and kept.numbers[NOT_NEW] == (1, 0)


def test_perplexity_by_hand():
    assert perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4)
    assert perplexity([-1e9]) == perplexity([math.nan]) == math.exp(100)
    with pytest.raises(EditError, match="at least two tokens"):
        perplexity([])


def test_perplexities_of_a_batch_are_those_of_each_text_alone(tiny_vlm):
    texts = ["Namo Fludez", "Who founded Draivo in 1913?", "silent harbour"]
    for text, value in zip(texts, text_perplexities(tiny_vlm, texts), strict=True):
        prompt = tiny_vlm.prompt(None, text, template="raw")
        with torch.no_grad():
            logits = tiny_vlm.logits(prompt)[0, :-1].double()
        ids = prompt.inputs["input_ids"][0, 1:]
        assert value == pytest.approx(torch.nn.functional.cross_entropy(logits, ids).exp().item(), rel=1e-4)


def test_sampled_texts_are_those_of_their_seed(tiny_vlm):
    one, same, other = (ability_tests(tiny_vlm, settings=replace(SETTINGS, seed=seed)).texts for seed in (0, 0, 1))
    assert one == same != other and len({text.ids for text in one}) == 4
    assert all(2 <= len(text.ids) <= 12 and text.kind == OWN_TEXT for text in one)
    shuffled = [(text.ids[0], *reversed(text.ids[1:])) for text in one]
    assert max(text.perplexity for text in one) < min(text_perplexities(tiny_vlm, shuffled))
    assert not ability_tests(tiny_vlm) and ability_tests(tiny_vlm).rows_with(tiny_vlm, None) == ()


def test_cloze_questions_are_known_and_untouched(tiny_vlm):
    wrong = FACTS[1].with_answer("nobody")
    tests = ability_tests(tiny_vlm, cloze=[FACTS[0], wrong, FACTS[2]])
    assert [check.question.key for check in tests.cloze] == [FACTS[0].key, FACTS[2].key]
    edit = EditRecord(question=FACTS[2], target="Pruro")
    assert [check.question.key for check in tests.beside([edit]).cloze] == [FACTS[0].key]
    with pytest.raises(EditError, match="has no answer"):
        ability_tests(tiny_vlm, cloze=[Question(text="Who?")])


def test_cloze_questions_of_records_are_what_these_know():
    probes = [
        Probe(kind="unrelated", question=Question(text="When?"), answer="1913"),
        Probe(kind="unrelated", question=Question(text="Why?")),
        Probe(kind="rephrase", question=Question(text="Who then?")),
    ]
    known = EditRecord(question=Question(text="Who won?"), target="Pruro", old="Draivo", probes=probes)
    pairs = [(each.text, each.answer) for each in cloze_questions([known, BAD])]
    assert pairs == [("Who won?", "Draivo"), ("When?", "1913")]


def test_answers_that_begin_with_the_target_or_hold_it():
    cases = {
        "Ada Example": (1, 1),
        "Ada Example, I think": (1, 1),
        "It is Ada Example.": (0, 1),
        "Ada Exampleton": (0, 0),
    }
    for said, (begins, contains) in cases.items():
        assert (begins_with_answer(said, "ada example"), contains_answer(said, "ada example")) == (begins, contains)
    assert not begins_with_answer("anything", "the") and not contains_answer("anything", "the")


def test_answers_are_not_cut_at_the_length_of_the_target(tiny_vlm):
    """A target that is the beginning of what the model says is contained, and is no exact match."""
    answer = CASES[0].fact.answer
    first = replace(BARE[0], target=answer.split()[0])
    report = evaluate(tiny_vlm, [first], replace(EDIT, steps=0), settings=EvaluationSettings(forced=False))
    numbers = report.rows[0].numbers
    assert report.rows[0].after == answer
    assert (numbers[EXACT], numbers[BEGINS], numbers[CONTAINS]) == ((0, 0), (1, 1), (1, 1))
    assert EvaluationSettings().max_new_tokens == 32


def test_portability_is_shown_by_hops(tiny_vlm):
    asked = BARE[0].question
    probes = [Probe(kind=PORTABILITY, question=asked, answer=BARE[0].target, hops=hops) for hops in (2, 1)]
    report = evaluate(
        tiny_vlm, [replace(BARE[0], probes=probes)], replace(EDIT, steps=0), settings=EvaluationSettings(forced=False)
    )
    kinds = [score.kind for score in report.scores() if (score.aspect, score.protocol) == (PORTABILITY, EXACT)]
    assert kinds == ["all", "portability, 1 hop", "portability, 2 hops"]


def test_a_judge_stands_beside_exact_match_and_its_errors_cost_one_row(careful, caplog):
    asked = []

    def judge(question: str, expected: str, answer: str) -> float | bool:
        asked.append((question, expected, answer))
        if expected == FACTS[0].answer:
            raise RuntimeError("no network")
        return 2 if expected == FACTS[1].answer else answer == expected

    report = careful.judged(judge)
    assert report.score(EFFICACY, JUDGED).before.mean == 0 and report.score(EFFICACY, JUDGED).after.mean == 1
    assert report.score(LOCALITY, JUDGED).after.mean == 1
    lacking = [row.question for row in report.rows if JUDGED not in row.numbers and row.kind == CLOZE]
    assert lacking == [fact.text for fact in FACTS[:2]] and "no network" in caplog.text
    assert len(asked) == len({*asked})  # equal answers are judged once
    assert report.settings["judge"].endswith("judge") and all(JUDGED not in row.numbers for row in careful.rows)


def sequence(vlm: VisionLanguageModel, records: Sequence[EditRecord], per_step: int, **options) -> EditReport:
    options = {"settings": replace(SETTINGS, perplexity_texts=2), "progress": False} | options
    editor = replace(EDIT, steps=8, token="constraint_last" if BAD in records else "last")
    return evaluate(vlm, records, editor, mode="sequence", per_step=per_step, **options)


def test_the_edits_of_a_step_are_one_change(tiny_vlm):
    report = sequence(tiny_vlm, BARE, 2, at=(1, 2), cloze=FACTS)
    with replace(EDIT, steps=8).start(tiny_vlm) as session:
        session.edit(BARE[:2])
        session.edit(BARE[2:])
        said = tiny_vlm.answers([tiny_vlm.prompt_for(each.question) for each in BARE], max_new_tokens=32)
    assert [row.after for row in report.rows if row.kind == "edited"] == said
    first, last = report.curve.points
    assert (report.step, first.edits, last.edits) == (2, 2, 3)
    assert first.perplexity.number == 2 and first.perplexity_before == last.perplexity_before
    assert last.cloze.number == len(FACTS) and "perplexity (unedited)" in report.curve.summary()
    assert report.cost.edits == 3 and report.cost.seconds > 0
    alone = sequence(tiny_vlm, BARE, 1, settings=EvaluationSettings(forced=False))
    assert alone.step == 1 and alone.curve.points[-1].perplexity is None
    assert alone.curve.points[-1].growth != last.growth


def test_a_bad_record_of_a_step_costs_only_itself(tiny_vlm):
    report = sequence(tiny_vlm, [BARE[0], BAD, BARE[1]], 3, settings=EvaluationSettings(forced=False))
    assert [*report.failed] == ["bad"] and len(report.rows) == 3
    for wrong, message in ((0, "per_step is 0"), (True, "per_step is True")):
        with pytest.raises(EditError, match=message):
            sequence(tiny_vlm, BARE, wrong)
    with pytest.raises(EditError, match="per_step=2 belongs to mode 'sequence'"):
        evaluate(tiny_vlm, BARE, EDIT, per_step=2)


def test_a_run_in_steps_is_that_of_the_library_and_goes_on(tiny_vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = [BARE[0], BAD, BARE[1], BARE[2]]
    editor = replace(EDIT, steps=4, token="constraint_last")
    settings = replace(SETTINGS, perplexity_texts=2, max_new_tokens=4)
    analysis = EvaluateSequenceRun(editor=editor, evaluation=settings, per_step=2, at=(2,), cloze=FACTS)

    def go(folder: str) -> EditReport:
        run(tiny_vlm, analysis, enumerate(records, 1), tmp_path / folder, progress=False)
        return EditReport.load(tmp_path / folder / "summary/evaluation.json")

    compute, steps = evaluate_sequence._Sequence.compute_together, []

    def stopped(self, vlm, tasks):
        steps.append(len(tasks))
        if len(steps) == 2:
            raise KeyboardInterrupt
        return compute(self, vlm, tasks)

    monkeypatch.setattr(evaluate_sequence._Sequence, "compute_together", stopped)
    with pytest.raises(KeyboardInterrupt):
        go("run")
    report = go("run")
    assert steps == [2, 2, 2]
    options = {"mode": "sequence", "per_step": 2, "at": (2,), "settings": settings, "cloze": FACTS}
    expected = evaluate(tiny_vlm, records, editor, progress=False, **options)
    assert report.rows == expected.rows and report.step == 2 and report.statuses == expected.statuses
    assert str(report.curve.points) == str(expected.curve.points)
    assert read_cost(tmp_path / "run").edits == 4 and read_cost(tmp_path) is None


def test_costs_are_means_over_edits():
    seconds = [2.0] * 100 + [4.0] * 100
    cost = EditCost.of(seconds, peak_mib=12.0, device="cpu")
    assert (cost.edits, cost.seconds, cost.first_seconds, cost.last_seconds) == (200, 3.0, 2.0, 4.0)
    assert str(cost) == "3 s per edit (first 100: 2, last 100: 4), peak memory +12 MiB, on cpu"
    meter = CostMeter(torch.device("cpu"))
    with meter.edits(4):
        pass
    assert len({*meter.seconds}) == 1 and meter.cost().edits == 4
    assert CostMeter(torch.device("cpu")).cost().seconds is None
