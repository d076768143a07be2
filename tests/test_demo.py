"""The demo and what chains tracing and editing: on the embedded model, with its report."""

import re
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path

import multrace as mt
import pytest
import torch
from multrace.data import FlagWorld, World, tiny_vlm_path
from multrace.data.world import EditCase
from multrace.data.worlds.flags import SplitRow
from multrace.scripts import CommandError
from multrace.scripts.demo import Demo, demo
from multrace.scripts.demos import (
    FlagEdits,
    FlagMarking,
    Report,
    ReportedFact,
    VerifiedQuestion,
    answered_again,
    asked_splits,
    edit_record,
    flag_record,
    own_errors,
    plot_scores,
    scores,
    summary,
    verified as verified_answers,
    write_report,
)
from multrace.scripts.main import app
from multrace.scripts.studies import flag_edits

CASES = 3


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def request_of(vlm: mt.VisionLanguageModel, world: World, case: EditCase) -> mt.EditRequest:
    record = world.question(case.fact)
    picture = world.picture(world.entities[case.fact.entity], 0).image
    return mt.EditRequest(question=vlm.prompt(picture, record.text, constraint=record.constraint), target=case.target)


def swap_of(world: World, case: EditCase) -> mt.SwapImage:
    entity = world.entities[case.fact.entity]
    first = case.fact.answer.split()[0]
    other = next(peer for peer in world.of_kind(entity.kind) if peer.facts[case.fact.key].split()[0] != first)
    return mt.SwapImage(world.picture(other, 1).image)


@pytest.fixture(scope="module")
def located(tiny_vlm, world) -> tuple[mt.workflow.LocatedEdit, tuple[EditCase, ...]]:
    """Facts of the part for choosing, traced and edited one at a time."""
    cases = world.edit_cases("outdated", "choose")[:CASES]
    requests = [request_of(tiny_vlm, world, case) for case in cases]
    corruptions = [swap_of(world, case) for case in cases]
    return mt.locate_then_edit(tiny_vlm, requests, corruptions=corruptions, jointly=False), cases


@pytest.fixture(scope="module")
def verified(tiny_vlm, world, located) -> list[list[VerifiedQuestion]]:
    """The answers around each located edit."""
    edit, cases = located
    return [
        list(verified_answers(tiny_vlm, delta, edit_record(world, case, count=4)))
        for case, delta in zip(cases, edit.deltas, strict=True)
    ]


def test_edits_where_the_trace_says_move_what_should_move_and_nothing_else(located, verified):
    edit, _ = located
    probes = [probe for rows in verified for probe in rows]
    shares = summary(probes)
    assert edit.edit_site.token == "last"
    assert edit.edit_site.layer >= edit.edit_site.onset
    assert shares["efficacy"] >= 0.9
    assert shares["other pictures"] >= 0.8
    assert shares["other wordings"] >= 0.8
    assert shares["other entities"] >= 0.9
    assert shares["other relations"] >= 0.9
    for score in scores(probes):
        assert score.undone == score.unedited
    without = [replace(probe, answers=replace(probe.answers, edited=probe.answers.unedited)) for probe in probes]
    assert summary(without)["efficacy"] == 0


def test_below_the_onset_an_edit_fires_for_other_pictures_too(tiny_vlm, world, located, verified):
    edit, cases = located
    early = []
    for case, probes in zip(cases, verified, strict=True):
        others = [probe for probe in probes if probe.kind in ("edited", "same_question_other_picture")]
        delta = mt.MultEdit(layer=0, token="last").edit(tiny_vlm, [request_of(tiny_vlm, world, case)])
        with delta.applied(tiny_vlm):
            early += answered_again(tiny_vlm, others)
    traced = summary([probe for probes in verified for probe in probes])["other entities"]
    assert edit.edit_site.onset > 0
    assert summary(early)["efficacy"] >= 0.9 and summary(early)["other entities"] < traced - 0.2


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_facts_edited_jointly_all_take(tiny_vlm, world, count):
    cases = world.edit_cases("outdated", "choose")[CASES : CASES + count]
    requests = [request_of(tiny_vlm, world, case) for case in cases]
    edit = mt.locate_then_edit(tiny_vlm, requests, corruptions=[swap_of(world, case) for case in cases])
    (delta,) = edit.deltas
    with delta.applied(tiny_vlm):
        answers = tiny_vlm.answers([tiny_vlm.prompt_for(request.question) for request in requests])
    assert answers == [case.target for case in cases]
    assert tiny_vlm.answers([tiny_vlm.prompt_for(request.question) for request in requests]) != answers


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_long_tail_facts_are_inserted(tiny_vlm, world, count):
    cases = world.edit_cases("long_tail", "choose")[:count]
    requests = [request_of(tiny_vlm, world, case) for case in cases]
    before = tiny_vlm.answers([tiny_vlm.prompt_for(request.question) for request in requests])
    learned = 0
    for case, request in zip(cases, requests, strict=True):
        delta = mt.MultEdit(layer=5, token="last").edit(tiny_vlm, [request])
        with delta.applied(tiny_vlm):
            learned += tiny_vlm.answers([tiny_vlm.prompt_for(request.question)]) == [case.target]
    assert learned == len(cases)
    assert tiny_vlm.answers([tiny_vlm.prompt_for(request.question) for request in requests]) == before
    assert not any(answer == case.target for answer, case in zip(before, cases, strict=True))


def test_an_edited_model_saved_whole_reloads_with_the_new_answer(tiny_vlm, world, located, tmp_path):
    edit, cases = located
    request = request_of(tiny_vlm, world, cases[0])
    with edit.deltas[0].applied(tiny_vlm):
        edited = tiny_vlm.answers([tiny_vlm.prompt_for(request.question)])
        tiny_vlm.save_pretrained(tmp_path / "edited", dtype=torch.float32)
    assert mt.load(tmp_path / "edited").answers([tiny_vlm.prompt_for(request.question)]) == edited == [cases[0].target]


def test_requests_and_corruptions_must_pair_up(tiny_vlm, world):
    case = world.edit_cases("outdated", "choose")[0]
    with pytest.raises(mt.TraceError, match="1 requests with 0 corruptions"):
        mt.locate_then_edit(tiny_vlm, [request_of(tiny_vlm, world, case)], corruptions=[])


def test_a_corruption_that_takes_nothing_away_locates_nothing(tiny_vlm, world):
    request = request_of(tiny_vlm, world, world.edit_cases("outdated", "choose")[0])
    same = mt.SwapImage(request.question.images[0])
    with pytest.raises(mt.TraceError, match="does not lower the answer's probability"):
        mt.locate_then_edit(tiny_vlm, [request], corruptions=[same])


def check_report(folder: Path, printed: str, facts: int) -> None:
    """The report, its pictures and the saved artefacts of so many facts; what was printed says the same."""
    assert re.search(rf"efficacy\)\s+{facts}\s+0%", printed)
    assert "bit for bit" in printed
    assert len(re.findall(r"it said '.+', should say '.+', now says '.+'", printed)) == facts
    edits = [f"edit_{number:02d}.safetensors" for number in range(1, facts + 1)]
    traces = [f"trace_{number:02d}.png" for number in range(1, facts + 1)]
    found = {file.name for file in folder.iterdir()}
    assert found == {"report.html", "scores.png", "trace.png", "tokens.png", "trace.safetensors", *edits, *traces}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained
    assert page.count("<mark>") == facts
    assert mt.tracing.AverageTrace.load(folder / "trace.safetensors").count == facts
    assert all(mt.Delta.load(folder / name).requests for name in edits)


@pytest.mark.parametrize("steps", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["one step", "to the end"])
def test_the_demo_writes_its_report_and_prints_its_table(tmp_path, capsys, monkeypatch, steps):
    """The quick form makes each edit in one step."""
    monkeypatch.setattr(
        "multrace.scripts.demos.wrong_facts.edit_record", partial(edit_record, count=1)
    )  # few probes of each kind
    if steps:
        monkeypatch.setattr("multrace.editing.MultEdit", partial(mt.MultEdit, steps=steps))
    folder = tmp_path / "demo"
    folder.mkdir()
    for name in ("edit_02.safetensors", "trace_02.png"):
        (folder / name).write_bytes(b"of an earlier run over two facts")
    assert app(["demo", "--limit", "1", "--seed", "4", "--every-layer", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\d)(?: \(the trace's\))? +\d", printed, flags=re.MULTILINE) == list("01234567")
    check_report(folder, printed, 1)


@pytest.mark.slow
def test_the_demo_takes_as_many_facts_as_it_is_told(tmp_path):
    page, table = demo(Demo(out=tmp_path / "demo", seed=4, limit=2))
    assert page == tmp_path / "demo" / "report.html"
    check_report(page.parent, table, 2)


@pytest.mark.slow
def test_another_seed_takes_other_facts(tmp_path):
    tables = [demo(Demo(out=tmp_path / str(seed), seed=seed, limit=1)) for seed in (0, 1)]
    pages = [page.read_text(encoding="utf-8") for page, _ in tables]
    questions = [re.search(r"<strong>(.*?)</strong>", page).group(1) for page in pages]
    pictures = [re.search(r'alt="the edited picture" src="(.*?)"', page).group(1) for page in pages]
    assert (questions[0], pictures[0]) != (questions[1], pictures[1])


@pytest.mark.parametrize("facts", [0, 10_000])
def test_a_number_of_facts_that_there_is_not_is_refused(tmp_path, facts):
    with pytest.raises(CommandError, match="pass 1 to 160"):
        demo(Demo(out=tmp_path / "demo", limit=facts))
    assert not (tmp_path / "demo").exists()


def test_the_report_escapes_what_people_wrote(tiny_vlm, world, tmp_path):
    case = world.edit_cases("outdated", "choose")[0]
    bad = "<script>alert(1)</script>"
    delta = mt.MultEdit(layer=5, steps=0).edit(tiny_vlm, [request_of(tiny_vlm, world, case)])
    probes = verified_answers(tiny_vlm, delta, replace(edit_record(world, case, count=1), target=bad, probes=()))
    chart = plot_scores(scores(probes), tmp_path / "scores.png"), bad
    words = {"title": bad, "subtitle": bad, "reason": bad, "undo": bad, "rule": bad, "notes": [bad]}
    fact = ReportedFact(probes=probes, leak=bad, trace=chart)
    report = Report(scores=scores(probes), chart=chart, plots=[chart], facts=[fact], **words)
    page = write_report(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert bad not in page
    assert "&lt;script&gt;" in page
    assert page.count("predicted leak: &lt;script&gt;") == 1
    without = write_report(replace(report, facts=[replace(fact, leak="")]), tmp_path / "other.html")
    assert "predicted leak" not in without.read_text(encoding="utf-8")


# ---- real errors of a model that reads flags ----


@pytest.fixture(scope="module")
def flag_world() -> FlagWorld:
    return FlagWorld()


def split_row(world: FlagWorld, id: str, split: str, half: str, answer: str | None = None) -> SplitRow:
    """A row in which the model says the same by picture and by name."""
    fact, truth = world.fact(id), world.answers(world.fact(id))[0]
    said = truth if answer is None else answer
    place = {"country": fact.country.code, "relation": fact.relation.name}
    return SplitRow(id=id, split=split, half=half, answer=said, by_name=said, truth=truth, **place)


@pytest.fixture(scope="module")
def flag_rows(flag_world) -> list[SplitRow]:
    """Splits of a model that knows many things and errs about Australia, Nigeria and Brazil."""
    known = {
        "choosing": ("fr-capital", "jp-capital", "de-capital", "au-language", "it-language"),
        "reporting": ("es-capital", "se-capital", "au-continent", "us-language", "jp-continent"),
    }
    rows = [split_row(flag_world, id, "known", half) for half, ids in known.items() for id in ids]
    rows += [split_row(flag_world, "au-capital", "wrong", "reporting", "Sydney")]
    rows += [replace(split_row(flag_world, "br-capital", "wrong", "reporting", "Paris"), by_name="Rio de Janeiro")]
    return [*rows, split_row(flag_world, "ng-capital", "wrong", "choosing", "Lagos")]


def test_errors_are_of_the_half_to_report_on_and_those_of_knowledge_come_first(flag_rows):
    for seed in range(5):
        assert [row.id for row in own_errors(flag_rows, seed)] == ["au-capital", "br-capital"]
    more = [replace(row, id=f"{row.id}-{number}") for row in flag_rows for number in range(9)]
    orders = {tuple(row.id for row in own_errors(more, seed)) for seed in (0, 0, 1)}
    assert len(orders) == 2 and len({frozenset(order) for order in orders}) == 1


def test_what_an_edit_of_a_flag_keeps_is_not_what_is_probed(flag_world, flag_rows):
    record = flag_record(flag_world, own_errors(flag_rows, 0)[0], flag_rows, edits=FlagEdits(probes=3))
    kept = {question.id for question in record.preserve_prompts}
    stays = {probe.question.id for probe in record.probes if probe.stays}
    assert record.target == "Canberra" and len(record.contexts) == 2
    assert kept == {"fr-capital", "jp-capital", "de-capital"}
    assert stays == {"es-capital", "se-capital", "au-continent", "au-language"}
    kinds = {probe.kind for probe in record.probes if not probe.stays}
    assert kinds == {"other_picture", "rephrase", "rephrase_other_picture", "by_name"}
    shown = {tuple(image.tobytes() for image in probe.question.images) for probe in record.probes}
    assert not shown & {tuple(image.tobytes() for image in question.images) for question in record.contexts}


def test_settings_are_chosen_with_the_halves_the_other_way_round(flag_world, flag_rows):
    (error,) = own_errors(flag_rows, 0, half="choosing")
    record = flag_record(flag_world, error, flag_rows, edits=FlagEdits(half="choosing", kept=1, contexts=3))
    assert error.id == "ng-capital" and record.target == "Abuja" and len(record.contexts) == 3
    kept = {question.id for question in record.preserve_prompts}
    assert len(kept) == 1 and kept <= {"es-capital", "se-capital"}
    stays = {probe.question.id for probe in record.probes if probe.stays}
    assert stays and stays <= {"fr-capital", "jp-capital", "de-capital", "au-language", "it-language"}
    editor = FlagEdits(ridge_fraction=0.5).editor(layer=2, token="last")
    assert (editor.layer, editor.token, editor.ridge_fraction, editor.ending) == (2, "last", 0.5, "none")


def test_settings_are_compared_on_one_half_and_reported_on_the_other(tiny_vlm, capsys, monkeypatch):
    """Equal settings have equal answers, though the first are verified and the others only answered again."""
    monkeypatch.setattr(mt.editing, "MultEdit", partial(mt.MultEdit, steps=3))
    demo_edits, asked = FlagEdits(probes=1, kept=0, contexts=0), []
    nothing_moves = replace(demo_edits, ridge_fraction=1e9)
    tried = {"nothing moves": nothing_moves, "the demo's": demo_edits, "the same": demo_edits}
    monkeypatch.setattr(flag_edits, "TRIED", tried)
    monkeypatch.setattr(flag_edits, "summary", lambda probes: asked.append(probes) or summary(probes))
    assert flag_edits.run(flag_edits.FlagEditsOptions(model=tiny_vlm_path(), limit=2)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[:4]] == ["choosing", *tried]
    assert lines[4].startswith("best: ") and lines[5].split()[0] == "reporting"
    nothing, first, again, reported = ([probe.answers.edited for probe in probes] for probes in asked[:4])
    unedited = [probe.answers.unedited for probe in asked[0]]
    assert nothing == unedited != first == again
    halves = [{probe.answers.record for probe in probes} for probes in (asked[0], asked[3])]
    assert [len(half) for half in halves] == [2, 2] and not halves[0] & halves[1] and reported


def test_the_best_settings_have_the_highest_mean_of_the_columns_with_questions():
    shares = {"first": {"a": 0.5, "b": 0.5, "c": nan}, "second": {"a": 0.2, "b": 0.9, "c": nan}}
    assert flag_edits.best_of(shares) == "second"
    assert flag_edits.best_of({**shares, "third": shares["second"]}) == "second"
    assert flag_edits.table("choosing", shares).splitlines()[2].split() == ["second", "20.0%", "90.0%", "nan%", "55.0%"]


def test_answers_about_flags_end_with_their_clause_and_are_marked_by_the_truth(tiny_vlm, flag_world, flag_rows):
    marking, record = FlagMarking(flag_world), flag_record(flag_world, own_errors(flag_rows, 0)[0], flag_rows)
    assert marking.answer_in(" Canberra, which is a city") == "Canberra"
    delta = mt.MultEdit(layer=5, steps=0).edit(tiny_vlm, [replace(record, contexts=(), preserve_prompts=())])
    moving, staying = (
        next(probe for probe in verified_answers(tiny_vlm, delta, record, marking) if probe.moves == moves)
        for moves in (True, False)
    )
    assert marking.is_right("the city of Canberra", moving) and not marking.is_right("Sydney", moving)
    truth = flag_world.answers(flag_world.fact(staying.question.id))[0]
    assert marking.is_right(truth, staying) and not marking.is_right("Canberra", staying)


def test_a_model_without_splits_is_asked_for_its_errors(tmp_path, capsys, monkeypatch):
    """The embedded model says names of its own world about flags, which is wrong about every country."""
    monkeypatch.setattr("multrace.scripts.demos.wrong_facts.asked_splits", partial(asked_splits, countries=12))
    monkeypatch.setattr("multrace.scripts.demos.wrong_facts.FlagEdits", partial(FlagEdits, probes=1))
    monkeypatch.setattr("multrace.editing.MultEdit", partial(mt.MultEdit, steps=1))
    model = ["--model", str(tiny_vlm_path())]
    assert app(["demo", "--world", "flags", *model, "--limit", "2", "--out", str(tmp_path / "real")]) == 0
    check_report(tmp_path / "real", capsys.readouterr().out, 2)


@pytest.mark.parametrize("option", ["--model", "--cache", "--wheel"])
def test_options_of_the_model_that_reads_flags_need_its_world(tmp_path, capsys, option):
    assert app(["demo", option, str(tmp_path), "--out", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err == (
        f"multrace: {option} is for the model that reads flags; pass --world flags, too\n"
    )


@pytest.mark.real
@pytest.mark.slow
def test_real_errors_are_fixed_and_undone(flags_model_path, tmp_path, capsys):
    folder = tmp_path / "real"
    assert app(["demo", "--world", "flags", "--limit", "2", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    check_report(folder, printed, 2)
    assert len(re.findall(r"now says '.+'$", printed, flags=re.MULTILINE)) >= 1  # without FAILED behind it
