"""multrace evaluate, run in process: what it prints and writes, and one clear error for a bad file of records."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from multrace import ROME, MultEdit, VisionLanguageModel, load
from multrace.data import (
    DataError,
    EditCase,
    EditRecord,
    Question,
    World,
    WorldRequests,
    another_picture,
    tiny_vlm_path,
    world_records,
)
from multrace.data.facts import ABILITY, EFFICACY, LOCALITY
from multrace.editing import FineTune, InContext
from multrace.editing.evaluation import EXACT, UNCHANGED, EditCurve, EditReport, EvaluationSettings
from multrace.editing.moments import own, second_moments
from multrace.scripts import (
    CommandError,
    RequestOptions,
    edit_rows,
    read_cloze,
    read_general,
    read_texts,
)
from multrace.scripts.main import parse
from multrace.tracing import EditSite, SwapImage, causal_trace
from multrace.tracing.engine import KINDS
from multrace.workflow import EvaluateRun, PlaceTrace, RunError, merge, other_pictures, read_rows, run as run_analysis
from multrace.workflow.located_edit import POSITIONS

pytestmark = pytest.mark.usefixtures("unproven", "load_once")

WORLD = World()
CASE = WORLD.edit_cases("outdated", "choose")[0]


def run(*arguments: object) -> int:
    work, options = parse(["evaluate", *map(str, arguments)])
    return work(options)


def picture(folder: Path, name: str, entity: int, number: int) -> str:
    WORLD.picture(WORLD.entities[entity], number).image.save(folder / name)
    return name


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    """A record of one outdated fact, with its pictures beside it."""
    asked = WORLD.question(CASE.fact)
    other = WORLD.neighbours(CASE, count=1)["other_entities"][0]
    other.image.save(tmp_path / "c.png")
    return {
        "id": "a1",
        "image": picture(tmp_path, "a.png", CASE.fact.entity, 0),
        "question": asked.text,
        "constraint": asked.constraint,
        "target": CASE.target,
        "contexts": [{"image": picture(tmp_path, "a2.png", CASE.fact.entity, 7)}],
        "rewrite_prompts": [{"image": None, "question": WORLD.question_by_name(CASE.fact).text}],
        "preserve_prompts": [],
        "probes": [
            {"kind": "other_picture", "image": picture(tmp_path, "a3.png", CASE.fact.entity, 3)},
            {"kind": "same_question_other_picture", "image": "c.png", "answer": other.answer},
            {"kind": "no_picture"},
            {"kind": "portability", "question": "Where was Ada Example born?", "answer": "Exampleton", "hops": 1},
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file with an object, or a line of text, per line."""

    def lines(*rows: dict[str, Any] | str, name: str = "records.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return lines


# ---- the command ----


def test_a_file_is_evaluated_by_two_editors(row, write, tmp_path, capsys):
    general = write({"image": "a.png", "question": row["question"], "answer": CASE.fact.answer}, name="general.jsonl")
    arguments = ("--data", write(row), "--where", "5:last", "--general", general, "--out", tmp_path / "out")
    assert run(*arguments, "--editor", "multedit", "in-context") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["in-context", "multedit"]
    report = EditReport.load(tmp_path / "out" / "multedit" / "summary" / "evaluation.json")
    score = report.score(EFFICACY, EXACT)
    assert (score.before.mean, score.after.mean, report.mode) == (0, 1, "single")
    assert report.score(LOCALITY, UNCHANGED, "same_question_other_picture").after.mean == 1
    ability = report.score(ABILITY, EXACT)
    assert (ability.before.mean, ability.after.mean) == (1, 0)  # the held-out question is the edited one
    lines = (tmp_path / "out" / "multedit" / "summary" / "generations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dict(each) for each in report.generations()]
    assert json.loads(lines[0])["after"] == CASE.target
    told = EditReport.load(tmp_path / "out" / "in-context" / "summary" / "evaluation.json")
    assert told.score(EFFICACY, EXACT).after.mean == 0  # this model does not read facts in the prompt
    printed = capsys.readouterr().out
    assert "multedit, single" in printed and "free generation, exact match" in printed
    assert "teacher-forced" in (tmp_path / "out" / "multedit" / "summary" / "table.txt").read_text()


def test_the_world_in_sequence(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--world", "outdated", "--limit", "2", "--where", "5", "--mode", "sequence", "--free-only")
    assert run(*arguments, "--probes", "1", "--at", "1", "--out", out) == 0
    names = {"curve.json", "curve.png", "generations.jsonl", "evaluation.json", "table.txt", "rows.parquet"}
    assert names < {path.name for path in (out / "multedit" / "summary").iterdir()}
    curve = EditCurve.load(out / "multedit" / "summary" / "curve.json")
    assert [point.edits for point in curve.points] == [1, 2]
    assert curve.points[-1].efficacy.mean == 1
    assert "norm growth" in capsys.readouterr().out


def test_a_sequence_in_steps_with_texts_and_untouched_facts(write, tmp_path, capsys):
    cloze = write({"question": "Who?", "answer": "nobody"}, {"question": "Why?", "target": "Ada", "old": "Bo"})
    out, texts = tmp_path / "out", tmp_path / "texts.txt"
    texts.write_text("Namo Fludez\n\nsilent harbour\n")
    arguments = ("--world", "outdated", "--limit", "3", "--where", "5", "--mode", "sequence", "--free-only")
    more = ("--per-step", "2", "--perplexity", "2", "--texts", texts, "--cloze", cloze, "--steps", "4", "--probes", "1")
    assert run(*arguments, *more, "--at", "1", "--out", out) == 0
    report = EditReport.load(out / "multedit" / "summary" / "evaluation.json")
    assert (report.step, [point.edits for point in report.curve.points]) == (2, [2, 3])
    kinds = [row.kind for row in report.rows]
    assert (kinds.count("own_text"), kinds.count("given_text"), kinds.count("cloze")) == (2, 2, 0)  # it knows neither
    assert re.search(r"measured here: [\d.e-]+ s per edit, peak memory \+\d+ MiB, on cpu", capsys.readouterr().out)


def test_files_of_texts_and_facts(write, tmp_path):
    assert [(each.text, each.answer) for each in read_cloze(write({"question": "Why?", "target": "Ada", "old": "Bo"}))]
    with pytest.raises(CommandError, match="no question with a known answer"):
        read_cloze(write({"question": "Who?"}))
    with pytest.raises(CommandError, match="row 1 of .*"):
        read_cloze(write("{"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CommandError, match="has no text; write one per line"):
        read_texts(tmp_path / "empty.txt")
    with pytest.raises(CommandError, match="cannot read"):
        read_texts(tmp_path / "gone.txt")


def test_each_edit_of_the_world_where_its_own_trace_says(tiny_vlm, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--world", "outdated", "--limit", "2", "--where", "trace", "--free-only", "--probes", "1")
    assert run(*arguments, "--out", out) == 0
    report = EditReport.load(out / "multedit" / "summary" / "evaluation.json")
    assert report.score(EFFICACY, EXACT).after.mean == 1
    assert report.score(LOCALITY, UNCHANGED, "same_question_other_picture").after.mean == 1
    sites = [own_site(tiny_vlm, case) for case in WORLD.edit_cases("outdated", "choose")[:2]]
    table = read_rows(out / "multedit")
    assert [*zip(table["layer"], table["token"], strict=True)] == [(site.layer, str(site.token)) for site in sites]


def own_site(vlm: VisionLanguageModel, case: EditCase) -> EditSite:
    """Where a trace of the case's question, under another picture of its kind, says that it is to be edited."""
    (record,) = world_records(WORLD, [case], requests=WorldRequests(count=1))
    prompt, swap = vlm.prompt_for(record.question), SwapImage(another_picture(WORLD, case))
    trace = causal_trace(vlm, prompt, corruption=swap, positions=POSITIONS, sites=KINDS, window=3, progress=False)
    return trace.edit_site()


def test_each_request_is_edited_at_its_own_place(tiny_vlm):
    analysis = EvaluateRun(editor=MultEdit(layer=-1, spread=7), trace=PlaceTrace())
    for layer, onset, spread in ((5, 4, 2), (6, 0, 7)):
        site = EditSite(layer=layer, token="last", onset=onset, effect=1.0, reason="")
        editor = analysis.editor_at(site)
        assert (editor.place, editor.spread) == ((layer, "last"), spread)
    assert replace(analysis, editor=FineTune(layer=0)).editor_at(site).layer == 6
    several = FineTune(layers=(0, 1))  # which keep their places, as the adapters of LoRA do
    assert replace(analysis, editor=several).editor_at(site) == several
    assert replace(analysis, editor=InContext()).editor_at(site) == InContext()


def test_a_batch_of_records_has_one_place_from_their_traces(row, write, tmp_path, capsys):
    case = WORLD.edit_cases("outdated", "choose")[1]
    asked = WORLD.question(case.fact)
    second = {
        "id": "a2",
        "image": picture(tmp_path, "b.png", case.fact.entity, 0),
        "question": asked.text,
        "target": case.target,
    }
    file = write({**row, "rewrite_prompts": []}, second)
    assert run("--data", file, "--where", "trace", "--mode", "batch", "--free-only", "--out", tmp_path / "out") == 0
    report = EditReport.load(tmp_path / "out" / "multedit" / "summary" / "evaluation.json")
    assert (report.mode, report.score(EFFICACY, EXACT).after.mean) == ("batch", 1)
    content = json.loads((tmp_path / "out" / "multedit" / "calibration.json").read_text())
    ((layer, token),) = {(site["layer"], site["token"]) for site in content["values"]["sites"].values()}
    table = read_rows(tmp_path / "out" / "multedit")
    assert {*zip(table["layer"], table["token"], strict=True)} == {(layer, str(token))}
    assert len([*(tmp_path / "out" / "multedit" / "traces" / "records").iterdir()]) == 2


def test_traces_need_another_picture_to_put_in_place(row, write, tmp_path):
    with pytest.raises(RunError, match="no other record has another picture; name the place by --where"):
        run("--data", write(row), "--where", "trace", "--model", "/gone", "--out", tmp_path / "out")


def test_the_other_picture_is_that_of_the_nearest_record_with_the_same_question(tmp_path):
    """Of A a, B b, A c, B d, C e; a picture that cannot be read is neither replaced nor put in place of another."""
    for number, name in enumerate("abcde"):
        picture(tmp_path, f"{name}.png", number, 0)
    questions = [
        Question(text=f"{text}?", image=tmp_path / f"{name}.png") for text, name in zip("ABABC", "abcde", strict=True)
    ]
    chosen = other_pictures(questions)
    assert [chosen[each.key].image.stem for each in questions] == ["c", "d", "a", "b", "d"]
    gone = Question(text="A?", image=tmp_path / "gone.png")
    assert other_pictures([*questions[:2], gone])[questions[0].key].image.stem == "b"
    (tmp_path / "empty.png").touch()
    empty = Question(text="A?", image=tmp_path / "empty.png")
    assert other_pictures([*questions[:2], empty])[questions[0].key].image.stem == "b"
    assert other_pictures([questions[0], Question(text="No picture?")]) == {}


def test_a_batch_without_steps_edits_nothing(row, write, tmp_path):
    out = tmp_path / "out"
    assert run("--data", write(row), "--where", "5:last", "--mode", "batch", "--steps", "0", "--out", out) == 0
    report = EditReport.load(out / "multedit" / "summary" / "evaluation.json")
    assert (report.mode, report.score(EFFICACY, EXACT).after.mean) == ("batch", 0)
    assert report.score(LOCALITY, UNCHANGED).after.mean == 1


BAD_OPTIONS = {
    "neither data nor world": ([], "pass either --data"),
    "both": (["--data", "x.jsonl", "--world", "outdated"], "pass either --data"),
    "no edits": (["--world", "outdated", "--limit", "0"], "--limit 0"),
    "no probes": (["--world", "outdated", "--probes", "0"], "--probes is 0"),
    "no place": (["--world", "outdated", "--where", "nowhere"], "no place 'nowhere'"),
    "measuring after none": (["--world", "outdated", "--at", "0"], "--at is 0"),
    "contexts below none": (["--world", "outdated", "--contexts", "-1"], "--contexts is -1; pass at least 0"),
    "probes of a file": (["--data", "x.jsonl", "--probes", "3"], "--probes belongs to --world"),
    "pictures of the world": (["--world", "outdated", "--images", "x"], "--images belongs to --data"),
    "growth of single edits": (["--world", "outdated", "--growth", "0.2"], "--growth belongs to --mode sequence"),
    "steps of single edits": (["--world", "outdated", "--per-step", "5"], "--per-step belongs to --mode sequence"),
    "steps of none": (["--world", "outdated", "--mode", "sequence", "--per-step", "0"], "--per-step is 0"),
    "no texts": (["--world", "outdated", "--texts", "gone.txt"], "cannot read .gone.txt"),
    "no such file": (["--data", "gone.jsonl"], "cannot read .gone.jsonl"),
    "facts of no world": (["--world", "outdated", "--general", "world:many"], "write world or world:100"),
    "general in a sequence": (["--world", "outdated", "--general", "world", "--mode", "sequence"], "--general"),
    "no moments": (
        ["--world", "outdated", "--editor", "memit", "--moments", "none"],
        "by multrace moments, or --moment-weight 0",
    ),
    "moments that no weight replaces": (
        ["--world", "outdated", "--editor", "alphaedit", "--moments", "none"],
        "made by multrace moments$",
    ),
    "a setting of another editor": (["--world", "outdated", "--editor", "ft", "--ridge", "1"], "no setting 'ridge'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_found_before_the_model_is_opened(arguments: list[str], message: str, tmp_path: Path):
    where = [] if "--where" in arguments else ["--where", "5:last"]
    with pytest.raises((CommandError, DataError), match=message):
        run(*arguments, *where, "--model", "/gone", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_single_edits_weigh_old_keys_by_the_same_samples(row, write, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "LEAST", 24)
    monkeypatch.setattr(own, "MOST", 24)
    other = {**row, "id": "a2", "image": "c.png", "contexts": [], "rewrite_prompts": [], "probes": []}
    drawn = []
    monkeypatch.setattr(own, "second_moments", lambda *given, **rest: drawn.append(1) or second_moments(*given, **rest))
    data = write({**row, "probes": []}, other)
    assert run("--data", data, "--where", "5:last", "--free-only", "--editor", "rome", "--out", tmp_path / "out") == 0
    report = EditReport.load(tmp_path / "out" / "rome" / "summary" / "evaluation.json")
    score = report.score(EFFICACY, EXACT).after
    assert (score.mean, score.records) == (1, 2) and len(drawn) == 1
    settings = [EvaluateRun(editor=editor(layer=5)).settings()["moments"] for editor in (ROME, MultEdit)]
    assert settings == ["own samples", None]


def test_a_place_that_does_not_exist_is_an_error_and_not_a_result(row, write, tmp_path):
    with pytest.raises(RunError, match="layer 99"):
        run("--data", write(row), "--where", "99:last", "--out", tmp_path / "out")


def test_an_evaluation_goes_on_where_it_stopped(row, write, tmp_path, capsys):
    """A bad line and a record that cannot be edited cost only themselves; two shards are the whole, bit for bit."""
    other = {**row, "id": "a2", "question": row["question"].replace("Who", "Which person"), "contexts": []}
    other |= {name: [] for name in ("rewrite_prompts", "probes")} | {"constraint": None}
    data = write(row, {"id": "bad"}, other)
    arguments = ("--data", data, "--where", "5:last", "--free-only")
    assert run(*arguments, "--limit", "1", "--out", tmp_path / "out") == 0
    first = tmp_path / "out" / "multedit" / "records"
    (folder,) = first.iterdir()
    changed = folder.stat().st_mtime_ns
    assert run(*arguments, "--out", tmp_path / "out") == 1  # a row is unreadable
    assert folder.stat().st_mtime_ns == changed, "the first record was evaluated again"
    assert len([*first.iterdir()]) == 2
    for shard in ("1/2", "2/2"):
        assert run(*arguments, "--shard", shard, "--out", tmp_path / shard[0]) == 1
    merge([tmp_path / name / "multedit" for name in "12"], tmp_path / "whole")
    for name in ("evaluation.json", "rows.parquet"):
        whole = (tmp_path / "whole" / "summary" / name).read_bytes()
        assert whole == (tmp_path / "out" / "multedit" / "summary" / name).read_bytes()
    with pytest.raises(RunError, match="steps|settings|editor"):
        run(*arguments, "--steps", "4", "--out", tmp_path / "out")
    with pytest.raises(CommandError, match="--shard belongs to the modes single and batch"):
        run("--world", "outdated", "--where", "5:last", "--mode", "sequence", "--shard", "1/2", "--out", tmp_path / "x")


def test_rows_that_contradict_each_other_are_noted(row, write, tmp_path, capsys):
    plain = {**row, "probes": [], "rewrite_prompts": [], "contexts": []}
    other = {**plain, "id": "a2", "target": "Someone Else"}
    arguments = ("--data", write(plain, other), "--where", "5:last", "--free-only", "--steps", "2")
    assert run(*arguments, "--out", tmp_path / "out") == 0
    assert "note: rows 1 and 2 give one question different targets; each edit is made" in capsys.readouterr().out
    gone = {**plain, "id": "a3", "image": str(tmp_path / "gone.png")}
    arguments = ("--data", write(gone, plain), *arguments[2:])
    assert run(*arguments, "--out", tmp_path / "one") == 1
    printed = capsys.readouterr().out
    assert "note:" not in printed and "1 record done, 1 failed" in printed


# ---- the file ----


def rows_of(path: str | Path, **options: Any) -> list[tuple[int, Any]]:
    """Rows of a file with their edits, or with why they cannot be edited."""
    rows = edit_rows(RequestOptions(data=Path(path), **options), traced=False)
    return [(row, str(record) if isinstance(record, DataError) else record) for row, record in rows]


def test_the_edits_of_a_file_become_prompts(row, write, tiny_vlm: VisionLanguageModel):
    ((_, record),) = rows_of(write(row))
    assert (record.id, record.target, len(record.probes)) == ("a1", CASE.target, 4)
    assert [len(each) for each in (record.contexts, record.rewrite_prompts, record.preserve_prompts)] == [1, 1, 0]
    assert "constraint_last" in tiny_vlm.prompt_for(record.question).groups
    nameless = {key: value for key, value in row.items() if key != "id"}
    assert [number for number, _ in rows_of(write(nameless, "", nameless))] == [1, 3]


CHANGES = {
    "no target": ({"target": None}, "'contexts' belongs to an edit .*; add 'target'"),
    "misspelt key": ({"targets": "x", "target": None}, "did you mean 'target'"),
    "picture that is not there": ({"image": "gone.png"}, "no picture at"),
    "constraint that is not said": ({"constraint": "the moon"}, "the moon"),
    "a span that is not said": ({"spans": {"object": "the sun"}}, "the sun"),
    "contexts that are no list": ({"contexts": {"image": "a.png"}}, "'contexts' is no list"),
    "a probe's picture that is not there": ({"probes": [{"kind": "other_picture", "image": "z.png"}]}, "z.png"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_bad_record_is_named_by_its_line(change: dict[str, Any], message: str, row, write):
    bad = {**row, "id": "b", **change}
    bad = {key: value for key, value in bad.items() if value is not None}
    (_, good), (number, error) = rows_of(write(row, bad))
    assert good.id == "a1" and number == 2
    assert re.search(message, error)


def test_all_lines_are_checked_and_ids_are_their_own(row, write):
    (_, good), *errors = rows_of(write(row, "{", {"id": "c"}))
    assert good.id == "a1" and [number for number, _ in errors] == [2, 3]
    assert re.match(r"line 2 of .*not JSON", errors[0][1])
    (_, (number, error)) = rows_of(write(row, row))
    assert number == 2 and "the id 'a1' is that of line 1 too" in error
    with pytest.raises(DataError, match="it is empty"):
        rows_of(write("", " "))


def test_the_edits_of_a_public_file_are_read(tmp_path, row):
    public = {"src": "Who is it?", "alt": "Ada", "image": "a.png", "rephrase": "Who?", "m_loc": "c.png"}
    (tmp_path / "vlkeb.json").write_text(json.dumps([public]))
    ((_, record),) = rows_of(tmp_path / "vlkeb.json")
    assert record.target == "Ada" and [probe.kind for probe in record.probes] == ["rephrase"]
    ((number, error),) = rows_of(tmp_path / "vlkeb.json", images=tmp_path / "elsewhere")
    assert number == 1 and re.search("no picture at .*elsewhere", error)


def test_held_out_questions_need_an_answer(write, tmp_path):
    assert read_general(write({"question": "Who?", "answer": "Ada"}))[0].answer == "Ada"
    with pytest.raises(CommandError, match="line 1 of .*no 'answer'"):
        read_general(write({"question": "Who?"}))


def test_records_of_a_file_are_asked_by_a_template(row, write, tmp_path):
    plain = {"question": row["rewrite_prompts"][0]["question"], "target": CASE.target}
    path = write(plain, {**plain, "template": "raw"})
    short = ["--data", path, "--where", "5:last", "--steps", "2", "--free-only", "--max-new-tokens", "2"]
    assert run(*short, "--template", r"\n{question}", "--out", tmp_path / "out") == 0
    questions = [Question(text=plain["question"], template=template) for template in ("\n{question}", "raw")]
    records = [EditRecord(question=question, target=CASE.target) for question in questions]
    analysis = EvaluateRun(
        editor=MultEdit(layer=5, steps=2), evaluation=EvaluationSettings(forced=False, max_new_tokens=2)
    )
    vlm = load(tiny_vlm_path())
    expected = run_analysis(vlm, analysis, enumerate(records, 1), tmp_path / "library", progress=False)
    assert expected.done == 2
    folders = [tmp_path / "out" / "multedit", tmp_path / "library"]
    names, others = (json.loads((folder / "records.json").read_text())["names"] for folder in folders)
    assert names == others  # names hold what is asked, the template included
    with pytest.raises(CommandError, match="--template belongs to --data"):
        run("--world", "outdated", "--where", "5:last", "--template", "raw", "--out", tmp_path / "world")
