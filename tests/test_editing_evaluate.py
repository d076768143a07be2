"""Evaluation of real edits of the trained embedded model: what it must see, what it must not, and what it must keep."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from multrace.artefacts import ArtefactError, Result
from multrace.data import (
    DataError,
    EditRecord,
    EditRequest,
    Probe,
    Question,
    World,
    WorldRequests,
    untouched_facts,
    world_records,
)
from multrace.data.facts import (
    ABILITY,
    EFFICACY,
    GENERALITY,
    LOCALITY,
    OTHER_PICTURE,
    PORTABILITY,
    SAME_QUESTION_OTHER_PICTURE,
)
from multrace.editing import (
    Baseline,
    Delta,
    EditCurve,
    EditError,
    EditorByRequest,
    EditReport,
    EvaluationSettings,
    FineTune,
    History,
    InContext,
    MultEdit,
    NormBound,
    baseline as measure_baseline,
    evaluate,
    second_moments,
    verify,
)
from multrace.editing.evaluation import (
    BEGINS,
    CONTAINS,
    EXACT,
    FLUENCY,
    HIGHER,
    KL,
    MARGIN,
    SEQUENCE,
    TOKENS,
    TOP1_ANSWER,
    TOP1_WHOLE,
    TOP10_WHOLE,
    UNCHANGED,
    UNCHANGED_RIGHT,
    VQA,
    ProbeRow,
    batch_checks,
    checks_of,
    names_of,
)
from multrace.editing.evaluation.asking import Responses, answers_to_feed, feed
from multrace.models import ModelError, Prompt, VisionLanguageModel

EDIT = MultEdit(layer=5, stop_loss=0.05)
"""The target is certain enough to be said; a search that goes on costs time and tells these tests nothing."""
NOTHING = replace(EDIT, steps=0)
EARLIER_FREE = replace(EDIT, earlier_weight=None)
"""Knows nothing of earlier edits."""
WORLD = World()
CASES = WORLD.edit_cases("outdated", "choose")[:3]


@pytest.fixture(scope="module")
def records() -> tuple[EditRecord, ...]:
    return world_records(WORLD, CASES, requests=WorldRequests(count=1))


@pytest.fixture(scope="module")
def general() -> tuple[Question, ...]:
    return untouched_facts(WORLD, CASES, 2)


@pytest.fixture(scope="module")
def short(records: tuple[EditRecord, ...]) -> list[EditRecord]:
    """A probe of generality and one of locality for each record."""
    return [replace(record, probes=record.probes[:4:3]) for record in records]


@pytest.fixture(scope="module")
def baseline(
    tiny_vlm: VisionLanguageModel, records: tuple[EditRecord, ...], short: list[EditRecord], general: Any
) -> Baseline:
    """Of all probes of the first record, and two of each other."""
    return measure_baseline(tiny_vlm, [records[0], *short[1:]], general=general, batch_size=16)


@pytest.fixture(scope="module")
def first_edit(tiny_vlm: VisionLanguageModel, records: tuple[EditRecord, ...]) -> Delta:
    """The change for the first record alone."""
    return EDIT.edit(tiny_vlm, [records[0]])


@pytest.fixture(scope="module")
def edited(
    tiny_vlm: VisionLanguageModel,
    records: tuple[EditRecord, ...],
    first_edit: Delta,
    baseline: Baseline,
    general: Any,
) -> EditReport:
    """One edit, and what becomes of it."""
    return evaluate(tiny_vlm, records[:1], first_edit, mode="batch", baseline=baseline, general=general)


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


def only_first(count: int) -> EditorByRequest:
    """An editor that refuses all but so many requests."""
    made = []

    def choose(requests: Sequence[EditRequest]) -> MultEdit:
        made.append(requests)
        if len(made) > count:
            raise EditError("no more edits")
        return EARLIER_FREE

    return EditorByRequest(choose=choose)


def test_an_edit_is_seen_and_the_unedited_model_is_shown_beside_it(edited, tiny_vlm, records, baseline):
    for protocol in (EXACT, VQA, TOKENS, SEQUENCE, HIGHER):
        score = edited.score(EFFICACY, protocol)
        assert (score.before.mean, score.after.mean) == (0, 1)
    margin = edited.score(EFFICACY, MARGIN)
    assert margin.before.mean < -0.5 and margin.after.mean > 0.5
    assert edited.score(GENERALITY, EXACT).after.mean > 0.5 > edited.score(GENERALITY, EXACT).before.mean
    assert edited.score(LOCALITY, UNCHANGED_RIGHT, SAME_QUESTION_OTHER_PICTURE).after.mean > 0.5
    assert edited.score(ABILITY, EXACT).before.number == 2
    assert edited.statuses == {records[0].id: "edited"}
    assert list(edited.splits()) == [records[0].id]
    for aspect in (GENERALITY, LOCALITY):  # without which nobody knows of which kind the success is
        assert replace(edited, rows=tuple(row for row in edited.rows if row.aspect != aspect)).splits() == {}


def test_no_edit_changes_no_number(tiny_vlm, records, baseline, general):
    report = evaluate(tiny_vlm, records[:1], NOTHING, baseline=baseline, general=general, batch_size=16)
    assert report.score(EFFICACY, EXACT).after.mean == 0
    assert report.score(LOCALITY, UNCHANGED).after.mean == 1
    assert report.score(LOCALITY, TOP10_WHOLE).after.mean == pytest.approx(1, abs=1e-3)  # other batches, other rounding
    assert report.score(LOCALITY, KL).after.mean == pytest.approx(0, abs=1e-8)
    assert report.splits() == {} and math.isnan(report.split_shares()["generalised"])


def test_locality_sees_a_broken_model(tiny_vlm, records, first_edit, baseline):
    ((name, change),) = first_edit.changes.items()
    loud = replace(first_edit, changes={name: replace(change, left=change.left + 1, right=change.right + 1)})
    report = evaluate(tiny_vlm, records[:1], loud, mode="batch", baseline=baseline)
    for protocol in (UNCHANGED, TOP1_ANSWER, TOP1_WHOLE, TOP10_WHOLE):
        assert report.score(LOCALITY, protocol).after.mean < 0.6
    assert report.score(LOCALITY, KL).after.mean > 0.5


def test_the_model_is_left_bit_equal(tiny_vlm, records, baseline, general):
    before = bits(tiny_vlm)
    bare = [replace(record, probes=()) for record in records]
    editor = replace(EDIT, steps=2)
    change = editor.edit(tiny_vlm, [bare[0]])
    evaluate(tiny_vlm, bare[:1], change, mode="batch", baseline=baseline)
    evaluate(tiny_vlm, bare[:2], editor, mode="sequence", at=(), baseline=baseline)
    with pytest.raises(EditError, match="does not hold"):
        evaluate(tiny_vlm, [replace(records[0], probes=[other()])], change, mode="batch", baseline=baseline)
    assert bits(tiny_vlm) == before


def other() -> Probe:
    return Probe(kind="unrelated", question=Question(text="What is the capital of nothing?"))


def test_teacher_forced_numbers_are_those_of_one_prompt_alone(tiny_vlm, records):
    """A batch of padded rows against one prompt at a time, without the evaluation's code."""
    checks = [*checks_of("first", records[0])]
    prompts = {check.key: tiny_vlm.prompt_for(check.question) for check in checks}
    state = Responses(generated=dict.fromkeys(prompts, "red"))
    feed(tiny_vlm, prompts, answers_to_feed(checks, state), state, batch_size=4)
    for check in checks[::3]:
        bare = prompts[check.key]
        prompt = bare.with_answer(check.new)
        start = prompt.groups["answer"][0] - 1
        with torch.no_grad():
            logits = tiny_vlm.logits(prompt)[0].double()
        score = state.scores[check.key, check.new]
        assert score.ids == prompt.answer_ids
        assert score.predicted == tuple(logits[start:-1].argmax(-1).tolist())
        alone = tiny_vlm.score(list(prompt.images) or None, prompt.question, check.new)
        assert score.log_probabilities == pytest.approx(alone.token_log_probabilities, abs=1e-4)
        if check.stays:
            name = (check.key, check.old(state))
            fed = bare.with_answer(name[1])
            with torch.no_grad():
                logits = tiny_vlm.logits(fed)[0]
            assert state.ranks[name].shape == (fed.length - 1, 10)
            assert torch.equal(state.ranks[name][:, 0].long(), logits[:-1].argmax(-1))
            torch.testing.assert_close(state.first[name], logits[-1 - len(fed.answer_ids)], atol=1e-3, rtol=1e-3)


def test_what_another_edit_changes_does_not_count_as_to_be_left_alone(tiny_vlm, records):
    bare = [replace(record, probes=()) for record in records[:2]]
    probe = Probe(kind=SAME_QUESTION_OTHER_PICTURE, question=bare[0].question)
    bare[1] = replace(bare[1], probes=(probe, Probe(kind="unrelated", question=records[2].question)))
    change = EDIT.edit(tiny_vlm, bare)
    settings = {"settings": EvaluationSettings(forced=False)}
    together = evaluate(tiny_vlm, bare, change, mode="batch", **settings)
    sequence = evaluate(tiny_vlm, bare, NOTHING, mode="sequence", at=(), **settings)
    for report in (together, sequence):
        (missing,) = report.left_out
        assert missing.record == bare[1].id and repr(bare[0].id) in missing.reason
        assert "left out: 1 question" in report.summary()
        assert [row.kind for row in report.rows] == ["edited", "edited", "unrelated"]
    alone = evaluate(tiny_vlm, bare, EDIT, **settings)
    assert alone.left_out == () and len(alone.rows) == 4
    assert alone.score(LOCALITY, UNCHANGED, SAME_QUESTION_OTHER_PICTURE).after.mean == 1
    wider = replace(bare[0], probes=(Probe(kind=OTHER_PICTURE, question=records[2].question),))
    assert (
        len(evaluate(tiny_vlm, [wider, bare[1]], change, mode="batch", **settings).left_out) == 2
    )  # the first is to be seen there, too
    both = evaluate(tiny_vlm, bare[1:], change, mode="batch", **settings)
    assert both.score(LOCALITY, UNCHANGED, SAME_QUESTION_OTHER_PICTURE).after.mean == 0  # as it would have counted


def test_a_question_asked_twice_is_answered_once(tiny_vlm, photo, other_photo):
    question = "What colour is the emblem?"
    prompts = [tiny_vlm.prompt(photo, question), tiny_vlm.prompt(photo, question, constraint="the emblem")]
    record = EditRecord(
        question=prompts[0],
        target="red",
        probes=[Probe(kind="other_question_same_picture", question=prompt) for prompt in prompts],
    )
    keys = {probe.question.key for probe in record.probes} | {record.question.key}
    assert len(keys) == 1
    for prompt in (tiny_vlm.prompt(other_photo, question), tiny_vlm.prompt(None, question)):
        assert prompt.as_question().key not in keys
    found = measure_baseline(tiny_vlm, [record])
    assert len(found.responses.generated) == 1


def test_raw_answers_survive_saving(edited, tmp_path):
    path = edited.save(tmp_path / "deep" / "report.json")
    assert EditReport.load(path) == edited
    assert [*path.parent.iterdir()] == [path]
    first = edited.generations()[0]
    assert (first["kind"], first["before"], first["after"]) == ("edited", CASES[0].fact.answer, CASES[0].target)
    assert len(json.loads(path.read_text())["scores"]) == len(edited.to_dataframe()) == len(edited.scores())
    text = edited.summary()
    assert "free generation, exact match" in text and "of 1 successful edits" in text
    assert "teacher-forced" not in edited.headlines()


def test_reports_and_curves_are_results(edited, sequence, tmp_path):
    """Drawn, printed and saved as every other result; one changed letter of an answer is noticed."""
    for result in (edited, sequence.curve):
        assert isinstance(result, Result) and result.layout.startswith("multrace edit ")
        assert result.plot(tmp_path / "figure.png").axes and (tmp_path / "figure.png").stat().st_size > 10_000
        assert "<img" in result._repr_html_()
    labels = [label.get_text() for label in edited.plot().axes[0].get_yticklabels()]
    shares = [score for score in edited.scores() if score.protocol in (EXACT, UNCHANGED)]
    assert labels == [f"{score.aspect}, {score.kind}: {score.protocol}" for score in shares]
    with pytest.raises(ArtefactError, match="no questions to draw"):
        replace(edited, rows=()).plot()
    path = edited.save(tmp_path / "report.json")
    path.write_text(path.read_text().replace(f'"after": "{CASES[0].target}"', '"after": "Somebody Else"'))
    with pytest.raises(EditError, match="not what its SHA-256 vouches for"):
        EditReport.load(path)


def test_a_question_names_its_picture(edited, records):
    names = [tuple(row["pictures"]) for row in edited.generations()]
    assert names[0] == records[0].question.picture_names and names[0][0].startswith("sha256:")
    assert len({name for name in names if name}) > 1 and () in names


def test_a_damaged_report_is_refused(edited, tmp_path):
    path = edited.save(tmp_path / "report.json")
    words = json.loads(path.read_text())
    del words["rows"][0]["before"]
    for content in ("{", '{"format": "other"}', "[]", json.dumps(words)):
        path.write_text(content)
        with pytest.raises(EditError):
            EditReport.load(path)
    with pytest.raises(EditError, match="this report has"):
        edited.score(PORTABILITY, EXACT)


def test_intervals_of_a_report_are_those_of_its_seed(edited):
    again = replace(edited, rows=edited.rows)
    assert again.scores() == edited.scores()


def test_a_request_that_fails_is_named_and_counts_as_unedited(tiny_vlm, records, short, baseline):
    report = evaluate(tiny_vlm, short[:2], only_first(1), baseline=baseline)
    assert report.statuses == {records[0].id: "edited", records[1].id: "failed: no more edits"}
    assert report.score(EFFICACY, EXACT).after.mean == 0.5
    failed = [row for row in report.rows if row.record == records[1].id]
    assert failed and all(row.before == row.after for row in failed)
    assert "no more edits" in report.summary()


def test_portability_and_present_answers_are_as_given(tiny_vlm, records, first_edit):
    first = records[0]
    asked = first.question
    probes = [
        Probe(kind=PORTABILITY, question=asked, answer=first.target, hops=2),
        Probe(kind=PORTABILITY, question=asked, answer="something else", hops=3),
    ]
    record = replace(first, probes=probes, old="never said")
    report = evaluate(tiny_vlm, [record], first_edit, mode="batch")
    assert report.score(PORTABILITY, EXACT).after.mean == 0.5
    assert report.score(PORTABILITY, EXACT, "portability, 2 hops").after.mean == 1
    assert report.score(PORTABILITY, EXACT, "portability, 3 hops").after.mean == 0
    assert report.rows[0].old == "never said"
    assert report.rows[1].old == CASES[0].fact.answer


def test_free_generation_alone_and_fluency(tiny_vlm, records):
    settings = EvaluationSettings(forced=False, fluency_tokens=4, max_new_tokens=2)
    bare = replace(records[0], probes=())
    report = evaluate(tiny_vlm, [bare], NOTHING, settings=settings)
    assert set(report.rows[0].numbers) == {EXACT, VQA, BEGINS, CONTAINS, FLUENCY}
    with pytest.raises(EditError, match="the same settings"):
        evaluate(
            tiny_vlm,
            [bare],
            NOTHING,
            baseline=measure_baseline(tiny_vlm, [bare]),
            settings=settings,
        )
    for wrong in ("max_new_tokens=0", "fluency_tokens=-1", "seed=-1"):
        name, _, value = wrong.partition("=")
        with pytest.raises(EditError, match=f"{wrong}; pass at least"):
            EvaluationSettings(**{name: int(value)})


def test_an_unedited_model_that_says_nothing_has_no_old_answer_to_compare(tiny_vlm, records, first_edit):
    probe = Probe(kind="unrelated", question=records[2].question)
    record = replace(records[0], probes=(probe,))
    responses = Responses(generated={record.question.key: "", probe.question.key: ""})
    silent = Baseline(model="silent", revision=None, settings=EvaluationSettings(), responses=responses)
    own, other = evaluate(tiny_vlm, [record], first_edit, mode="batch", baseline=silent).rows
    assert (own.before, own.old, own.after) == ("", "", record.target) and own.numbers[EXACT] == (0, 1)
    assert {HIGHER, MARGIN}.isdisjoint(own.numbers) and UNCHANGED not in other.numbers
    assert TOKENS in own.numbers and KL in other.numbers  # scores that the baseline lacks are measured


def test_an_edit_in_the_prompt_is_asked_in_its_words(tiny_vlm, records, baseline):
    bare = replace(records[0], probes=records[0].probes[:2])
    change = InContext().edit(tiny_vlm, [bare])
    row = evaluate(tiny_vlm, [bare], change, mode="batch", baseline=baseline).rows[0]
    worded = change.prompt_transform(tiny_vlm.prompt_for(bare.question))
    assert row.after == tiny_vlm.answers([worded])[0]
    told = margin(tiny_vlm, worded, row)
    assert row.numbers[MARGIN] == pytest.approx(
        (margin(tiny_vlm, tiny_vlm.prompt_for(bare.question), row), told), abs=1e-5
    )
    assert abs(row.numbers[MARGIN][0] - told) > 1e-3
    untold = {"mode": "batch", "baseline": baseline, "prompt_transform": lambda prompt: prompt}
    plain = evaluate(tiny_vlm, [bare], change, **untold).rows[0]
    assert plain.numbers[MARGIN][0] == pytest.approx(plain.numbers[MARGIN][1], abs=1e-5)
    with pytest.raises(EditError, match="no sequence"):
        evaluate(tiny_vlm, [bare], InContext(), mode="sequence", baseline=baseline)


def margin(vlm: VisionLanguageModel, prompt: Prompt, row: ProbeRow) -> float:
    """P(new) - P(old), each the geometric mean over its tokens, from the library's own score."""
    scores = [vlm.score(list(prompt.images), prompt.question, answer) for answer in (row.new, row.old)]
    new, old = (score.probability ** (1 / len(score.tokens)) for score in scores)
    return new - old


@pytest.fixture(scope="module")
def sequence(tiny_vlm: VisionLanguageModel, short: list[EditRecord], baseline: Baseline) -> EditReport:
    return evaluate(tiny_vlm, short, EDIT, mode="sequence", at=(1,), baseline=baseline)


def test_a_sequence_keeps_its_first_edit(sequence, records, tmp_path):
    report, curve = sequence, sequence.curve
    assert EditReport.load(report.save(tmp_path / "report.json")) == report
    assert [point.edits for point in curve.points] == [1, 3]
    assert [point.efficacy.number for point in curve.points] == [1, 3]
    assert curve.points[-1].efficacy.mean == report.score(EFFICACY, EXACT).after.mean == 1
    assert curve.points[-1].first_holds is True and curve.points[-1].retention == 1
    assert 0 < curve.points[0].growth <= curve.points[1].growth
    assert EditCurve.load(curve.save(tmp_path / "curve.json")) == curve
    (axes,) = curve.plot(tmp_path / "curve.png").axes
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    drawn = {line.get_label(): line for line in axes.lines}
    assert any([*line.get_xdata()] == [1, 3] and [*line.get_ydata()] == [100, 100] for line in drawn.values())
    assert "norm growth" in curve.summary() and len(curve.to_dataframe()) == 2
    with pytest.raises(ArtefactError, match="png"):
        curve.plot(tmp_path / "curve.txt")
    assert report.score(EFFICACY, TOKENS).after.mean == 1  # the last report has the other protocols too


def test_a_sequence_sees_an_edit_that_is_lost(tiny_vlm, records, baseline):
    """The second request takes back what the first wrote."""
    first, bare = records[0], replace(records[0], probes=())
    pair = [bare, EditRecord(question=first.question, target=CASES[0].fact.answer, id="back")]
    curve = evaluate(tiny_vlm, pair, EARLIER_FREE, mode="sequence", at=(1, 2)).curve
    assert [point.first_holds for point in curve.points] == [True, False]
    assert [point.retention for point in curve.points] == [1, 0.5]
    assert [point.efficacy.mean for point in curve.points] == [1, 0.5]


def growth_of(vlm: VisionLanguageModel, request: EditRequest) -> float:
    """Relative growth of the norm of the one weight that an edit of this request changes."""
    delta = EDIT.edit(vlm, [request])
    (name,) = delta.changes
    before = vlm.weight(name).double().norm()
    with delta.applied(vlm):
        return (vlm.weight(name).double().norm() / before - 1).item()


def test_growth_beyond_the_bound_is_a_warning_or_the_end(tiny_vlm, records, baseline, caplog):
    bare = [replace(record, probes=()) for record in records]
    with caplog.at_level(logging.WARNING, logger="multrace"):
        curve = evaluate(tiny_vlm, bare[:1], EDIT, mode="sequence", norm_bound=NormBound(growth=10.0)).curve
        assert (curve.exceeded_at, caplog.text) == (None, "")
        assert curve.points[0].growth == pytest.approx(growth_of(tiny_vlm, bare[0]), rel=1e-4)
        stop = NormBound(growth=1e-6, stop=True)
        report = evaluate(tiny_vlm, bare, replace(EDIT, steps=2), mode="sequence", norm_bound=stop)
        curve = report.curve
    assert (curve.exceeded_at, curve.stopped_at, len(report.rows)) == (1, 1, 1)
    assert "has grown by" in caplog.text
    with pytest.raises(EditError, match="at least 0"):
        NormBound(growth=-1)


def test_a_sequence_goes_on_after_a_failure(tiny_vlm, records):
    bare = [replace(record, probes=()) for record in records]
    curve = evaluate(tiny_vlm, bare, only_first(1), mode="sequence").curve
    assert [status[:6] for status in curve.statuses.values()] == ["edited", "failed", "failed"]
    assert curve.points[-1].efficacy.mean == pytest.approx(1 / 3) and curve.points[-1].retention == 1


def test_fluency_is_measured_at_the_end_of_a_sequence(tiny_vlm, records):
    bare = [replace(record, probes=()) for record in records[:2]]
    settings = EvaluationSettings(forced=False, fluency_tokens=4, max_new_tokens=4)
    report = evaluate(tiny_vlm, bare, NOTHING, mode="sequence", at=(1, 2), settings=settings)
    assert [point.edits for point in report.curve.points] == [1, 2]
    assert all(FLUENCY in row.numbers for row in report.rows)


def test_an_editor_in_a_batch_is_the_change_that_it_makes(tiny_vlm, records, baseline):
    bare = [replace(record, probes=record.probes[:1]) for record in records[:2]]
    whole = evaluate(tiny_vlm, bare, EDIT, mode="batch", baseline=baseline)
    change = EDIT.edit(tiny_vlm, bare)
    assert whole == evaluate(tiny_vlm, bare, change, mode="batch", baseline=baseline)
    assert [row.after for row in whole.rows if row.kind == "edited"] == [case.target for case in CASES[:2]]


def test_a_sequence_tells_editors_of_the_earlier_edits(tiny_vlm, records, first_edit, baseline):
    """The second edit of a sequence keeps the first one's key, so it differs from one that knows nothing of it."""
    bare = [replace(record, probes=()) for record in records[:2]]
    first = first_edit
    with EDIT.start(tiny_vlm, history=History().added("first", first)) as session:
        aware, blind = session.propose([bare[1]]), EDIT.edit(tiny_vlm, [bare[1]])
    ((name, change),) = aware.changes.items()
    assert not torch.equal(change.left, blind.changes[name].left)
    norms = {}
    for deltas in ((first, aware), (first, blind)):
        handles = [delta.apply(tiny_vlm) for delta in deltas]
        norms[deltas[1]] = tiny_vlm.weight(name).double().norm().item()
        for handle in reversed(handles):
            handle.undo()
    start = tiny_vlm.weight(name).double().norm().item()
    growth = evaluate(tiny_vlm, bare, EDIT, mode="sequence", at=(), baseline=baseline).curve.points[-1].growth
    assert growth == pytest.approx(norms[aware] / start - 1, rel=1e-9)
    assert growth != pytest.approx(norms[blind] / start - 1, rel=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mode": "together"}, "no evaluation mode 'together'; pass one of 'single', 'batch', 'sequence'"),
        ({"mode": "single"}, "mode 'single' makes each edit itself and needs an editor, but got a Delta"),
        ({"mode": "sequence"}, "mode 'sequence' makes each edit itself"),
    ],
)
def test_a_mode_that_does_not_fit_is_refused(tiny_vlm, records, first_edit, keywords, message):
    with pytest.raises(EditError, match=message):
        evaluate(tiny_vlm, records[:1], first_edit, **keywords)


def test_what_a_sequence_cannot_use_is_refused(tiny_vlm, records, general):
    with pytest.raises(EditError, match="general questions are asked in modes 'single' and 'batch'"):
        evaluate(tiny_vlm, records[:1], EDIT, mode="sequence", general=general)
    with pytest.raises(EditError, match="prompt_transform belongs to mode 'batch'"):
        evaluate(tiny_vlm, records[:1], EDIT, prompt_transform=lambda prompt: prompt)


def test_values_are_described_in_two_lines(tiny_vlm, records, first_edit, sequence, baseline):
    request, delta, (name,) = records[0], first_edit, first_edit.changes
    moments = second_moments(tiny_vlm, [tiny_vlm.prompt_for(request.question)], layers=[3], progress=False)
    values = (request, records[0], delta, History().added("first", delta), moments, sequence, sequence.curve, baseline)
    for value in values:
        lines = repr(value).split("\n")
        assert len(lines) <= 2 and all(len(line) <= 250 for line in lines)
    assert repr(request.target) in repr(request) and name in repr(delta) and repr(request.target) in repr(delta)
    assert "1 edit in effect (first)" in repr(History().added("first", delta))
    assert "efficacy 100% (unedited 0%)" in repr(sequence)


BAD = {
    "unknown kind": ({"kind": "sideways"}, "no kind of probe 'sideways'"),
    "portability without an answer": ({"kind": "portability"}, "has no answer"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_probes(words: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        Probe(question=Question(text="Who?"), **words)


def test_records_have_names_of_their_own(records):
    assert names_of(records) == tuple(case.fact.id for case in CASES)
    plain = replace(records[0], id="")
    assert names_of([plain, plain]) == ("0", "1")
    with pytest.raises(EditError, match="2 records have the id"):
        names_of([records[0], records[0]])
    with pytest.raises(EditError, match="no records"):
        names_of([])


def test_what_is_not_a_list_of_records_or_requests_is_refused(tiny_vlm, records):
    editor = MultEdit(layer=5)
    with pytest.raises(EditError, match="the records are of type generator; pass a list"):
        evaluate(tiny_vlm, (record for record in records), editor)
    with pytest.raises(EditError, match="the records are of type EditRecord; pass a list"):
        evaluate(tiny_vlm, records[0], editor)
    with pytest.raises(ModelError, match="batch_size is -1; it must be at least 1"):
        measure_baseline(tiny_vlm, records, batch_size=-1)
    with pytest.raises(EditError, match="one of type Question; pass a list of EditRecord"):
        evaluate(tiny_vlm, [records[0].question], editor)
    for edit in (editor.edit, FineTune(layer=5).edit, InContext().edit):
        with pytest.raises(EditError, match="the requests are of type EditRecord; pass a list"):
            edit(tiny_vlm, records[0])
        with pytest.raises(EditError, match="one of type Question; pass a list of EditRequest"):
            edit(tiny_vlm, [records[0].question])


def test_what_the_worlds_edits_are_told_is_not_what_they_are_asked():
    settings = WorldRequests(count=3, contexts=2, by_name=True, keep=3)
    (record,) = world_records(WORLD, CASES[:1], requests=settings)
    told = {question.key for question in (*record.contexts, *record.rewrite_prompts, *record.preserve_prompts)}
    assert len(told) == 6
    assert not told & {probe.question.key for probe in record.probes}


def test_a_probe_that_needs_another_edit_is_asked_where_that_edit_is(tiny_vlm, records):
    needy = Probe(kind=PORTABILITY, question=records[2].question, answer="nobody", needs=(records[1].id,))
    pair = [replace(records[0], probes=(needy,)), replace(records[1], probes=())]
    alone = evaluate(tiny_vlm, pair, NOTHING, settings=EvaluationSettings(forced=False), progress=False)
    (missing,) = alone.left_out
    assert (missing.record, missing.kind) == (records[0].id, PORTABILITY) and repr(records[1].id) in missing.reason
    assert [row.kind for row in alone.rows] == ["edited", "edited"]
    together = evaluate(tiny_vlm, pair, NOTHING, mode="batch", settings=EvaluationSettings(forced=False))
    assert together.left_out == () and [row.kind for row in together.rows] == ["edited", PORTABILITY, "edited"]


def test_held_out_questions_of_a_batch_are_asked_with_one_record_each_unless_an_edit_changes_them():
    pair = {name: EditRecord(question=Question(text=f"{name}?"), target="new", id=name) for name in "ab"}
    general = [Question(text=text, answer="old") for text in ("a?", "c?", "d?")]
    checks, (missing,) = batch_checks(pair, dict.fromkeys("ab", "edited"), general)
    texts = {name: [check.question.text for check in own] for name, own in checks.items()}
    assert texts == {"a": ["a?", "d?"], "b": ["b?", "c?"]}
    assert (missing.record, missing.kind, missing.question) == ("a", "general", "a?")
    assert batch_checks(pair, dict.fromkeys("ab", "failed: so"), general)[1] == ()


def test_an_edit_that_is_not_said_is_not_edited(tiny_vlm, records, first_edit):
    bare = replace(records[0], probes=())
    change = NOTHING.edit(tiny_vlm, [bare])
    (request,) = change.requests
    assert (request["status"], request["says"]) == ("not generated", CASES[0].fact.answer)
    assert isinstance(request["probability"], float) and request["probability"] < 0.5
    report = evaluate(tiny_vlm, [bare], NOTHING, settings=EvaluationSettings(forced=False), progress=False)
    assert report.statuses == {bare.id: "not generated"}
    assert report.not_generated == {bare.id: CASES[0].fact.answer} and "1 not generated" in repr(report)
    assert first_edit.requests[0]["status"] == "edited"


def test_verification_asks_before_under_and_after_a_change(tiny_vlm, records, first_edit):
    record = replace(records[0], probes=records[0].probes[:2])
    answers = verify(tiny_vlm, first_edit, [record])
    first = answers[0]
    assert (first.unedited, first.edited, first.undone) == (CASES[0].fact.answer, CASES[0].target, first.unedited)
    assert first.is_right("edited") and not first.is_right("undone") and len(answers) == 3
