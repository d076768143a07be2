"""The doctor of data files: each fault is found in its row, a fix mends what it says, a clean file has no findings."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from multrace.data import (
    FINDINGS,
    FORMATS,
    DataError,
    EditRecord,
    Question,
    World,
    WorldRequests,
    check_data,
    read_data,
    read_lines,
    read_records,
    world_records,
    write_lines,
)
from multrace.data.check import ERROR, SEVERITIES
from multrace.data.jsonl import EditLine, ProbeLine, QuestionLine
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared" / "data"


def kinds(report) -> list[tuple[int, str]]:
    return [(finding.row, finding.kind) for finding in report.findings]


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def save_pictures(folder: Path) -> None:
    """Pictures that can be shown, but not as they are, and pictures that cannot."""
    Image.new("I;16", (40, 30), 40_000).save(folder / "deep.png")
    Image.new("RGBA", (40, 30), (9, 9, 9, 100)).save(folder / "clear.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 30)).save(folder / "turned.jpg", exif=exif)
    Image.new("1", (15_000, 15_000)).save(folder / "huge.png")
    (folder / "text.png").write_bytes(b"no picture")


def test_a_file_of_the_world_is_clean(tmp_path):
    """Records of the built-in world, with their pictures in files, give the doctor nothing to say."""
    world = World()
    records = world_records(world, world.edit_cases("outdated", "report")[:2], requests=WorldRequests(count=2))

    def filed(question: Question) -> Question:
        if question.image is None:
            return question
        path = tmp_path / f"{question.key}.png"
        question.image.save(path)
        return replace(question, image=path)

    rows = [
        EditRecord(
            id=record.id,
            question=filed(record.question),
            target=record.target,
            probes=[replace(probe, question=filed(probe.question)) for probe in record.probes],
        )
        for record in records
    ]
    path = write_lines(tmp_path / "world.jsonl", rows)
    report = check_data(path, fix=tmp_path / "clean.jsonl")
    assert kinds(report) == [] and report.rows == report.written == 2
    assert (tmp_path / "clean.jsonl").read_bytes() == path.read_bytes()


def test_pictures_are_looked_at_without_being_decoded(tmp_path, photo):
    save_pictures(tmp_path)
    names = ["photo.png", "deep.png", "clear.png", "turned.jpg", "huge.png", "text.png", "none.png"]
    path = write(tmp_path, *({"question": f"What is in {name}?", "image": name} for name in names))
    report = check_data(path, fix=tmp_path / "clean.jsonl")
    assert kinds(report) == [
        (2, "picture_sixteen_bit"),
        (3, "picture_transparent"),
        (4, "picture_turned"),
        (5, "picture_unusable"),
        (6, "picture_unusable"),
        (7, "picture_missing"),
    ]
    assert "225.0 megapixels" in report.findings[3].message
    assert [record.images[0].name for record in read_records(tmp_path / "clean.jsonl")] == names[:4]
    assert report.written == 4 and not report.remaining_errors
    assert [finding.row for finding in check_data(path).remaining_errors] == [5, 6, 7], (
        "nothing is mended without a fix"
    )
    assert kinds(check_data(path, pictures=False)) == []


def test_what_a_picture_is_like_is_noted_once_for_its_row(tmp_path, photo):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(tmp_path / "print.jpg")
    (tmp_path / "upper.JPG").write_bytes((tmp_path / "print.jpg").read_bytes())
    names = ["moving.gif", "print.jpg", "https://example.org/a.jpg", "upper.jpg"]
    probes = [{"kind": "rephrase", "question": "Which?"}]
    rows = ({"question": f"What is {name}?", "image": name, "target": "Ada", "probes": probes} for name in names)
    report = check_data(write(tmp_path, *rows))
    assert kinds(report) == [
        (1, "picture_animated"),
        (2, "picture_cmyk"),
        (3, "picture_unusable"),
        (4, "picture_missing"),
    ]
    assert "cannot be the URL 'https://example.org/a.jpg'" in report.findings[2].message
    assert "but one at" in report.findings[3].message and "upper.JPG" in report.findings[3].message


def test_a_folder_of_a_name_with_stops_is_said_to_hold_several_pictures(tmp_path, photo):
    folder = tmp_path / "A photo of J. B. Example"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes((tmp_path / "photo.png").read_bytes())
    head = ",question,director,main_entity,image_url\n"
    row = "0,Name a film by this director?,J. B. Example,this director,./A photo of J. B. Example\n"
    (tmp_path / "films.csv").write_text(head + row)
    report = check_data(tmp_path / "films.csv")
    assert kinds(report) == [(2, "picture_of_several"), (2, "answer_is_pictured")]


def test_a_question_that_should_stay_is_not_the_edited_one(tmp_path, photo):
    row = {"question": "Who is it?", "image": "photo.png", "target": "Ada"}
    stays = [{"kind": "same_question_other_picture", "image": image} for image in ("photo.png", "other.png")]
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    entries = [{"image": "photo.png"}, {"image": "other.png"}]
    same = [{"kind": "other_picture", "image": "photo.png"}, {"kind": "other_picture", "image": "other.png"}]
    rows = [row | {"probes": stays, "preserve_prompts": entries}, row | {"question": "Who else?", "probes": same}]
    report = check_data(write(tmp_path, *rows), fix=tmp_path / "clean.jsonl")
    assert [(finding.row, finding.kind, finding.place) for finding in report.findings] == [
        (1, "keeps_the_edit", ("preserve_prompts", 0)),
        (1, "keeps_the_edit", ("probes", 0)),
        (2, "rephrase_is_source", ("probes", 0)),
    ]
    assert not check_data(tmp_path / "clean.jsonl").findings
    first, second = read_records(tmp_path / "clean.jsonl")
    assert (len(first.probes), len(first.preserve_prompts), len(second.probes)) == (1, 1, 1)


def test_a_fix_keeps_what_probes_need(tmp_path):
    textual = {"question": "Where is Ada?", "target": "Lima"}
    needs = [{"kind": "portability", "question": "Whose town?", "answer": "Bo", "needs": [id]} for id in ("b", "d")]
    rows = [
        textual | {"id": "a"},
        textual | {"id": "b"},
        {"id": "c", "question": "Who?", "target": "Ada", "probes": needs},
    ]
    rows += [{"id": "d", "question": "When?", "target": "now", "image": "none.png"}]
    path = write(tmp_path, *rows)
    check_data(path, fix=tmp_path / "clean.jsonl")
    assert not check_data(tmp_path / "clean.jsonl").findings
    assert [probe.needs for probe in read_records(tmp_path / "clean.jsonl")[1].probes] == [("a",)]


def test_a_missing_picture_of_a_probe_costs_the_probe(tmp_path, photo):
    probes = [{"kind": "other_picture", "image": "none.png"}, {"kind": "no_picture"}]
    row = {"question": "Who is it?", "image": "photo.png", "target": "Ada", "probes": probes, "corrupt": "swap:no.png"}
    report = check_data(write(tmp_path, row, row | {"corrupt": None}), fix=tmp_path / "clean.jsonl")
    found = [(finding.row, finding.kind, finding.place, finding.fix) for finding in report.findings]
    assert found == [
        (1, "picture_missing", None, "the row is left out"),
        (1, "picture_missing", ("probes", 0), "the question is left out"),
        (2, "picture_missing", ("probes", 0), "the question is left out"),
        (2, "duplicate", None, "the row is left out"),
    ]
    assert report.written == 0 and not (tmp_path / "clean.jsonl").exists()
    report = check_data(write(tmp_path, row | {"corrupt": None}), fix=tmp_path / "clean.jsonl")
    (record,) = read_records(tmp_path / "clean.jsonl")
    assert [probe.kind for probe in record.probes] == ["no_picture"] and not report.remaining_errors


SPANS = {  # question, span -> findings, span after a fix
    ("Is the car red?", "the car"): ([], "the car"),
    ("Is the car red?", "the car,"): (["span_spelling"], "the car"),
    ("Is the car red?", " The  Car "): (["span_spelling"], "the car"),
    ("Is the car red?", "'the car'"): (["span_spelling"], "the car"),
    ("Is Plus! red?", "Plus!"): ([], "Plus!"),
    ("Is the car, red?", "the car,"): (["span_spelling"], "the car"),
    ("Is the car red?", "is the"): (["span_spelling", "span_cut_off"], "Is the"),
    ("Is the car red?", "the boat"): (["span_absent"], "the boat"),
    ("Is a car a car?", "car"): (["span_repeated"], "car"),
    ("Is a car a car?", ("car", 1)): ([], ("car", 1)),
    ("Is a car a car?", ("Car,", 1)): (["span_spelling"], ("car", 1)),
    ("Is a car a car?", ("car", 2)): (["span_repeated"], ("car", 2)),
}


@pytest.mark.parametrize(("question", "span"), SPANS)
def test_spans_are_compared_with_the_question(question, span, tmp_path):
    found, cleaned = SPANS[question, span]
    path = write_lines(tmp_path / "data.jsonl", [Question(text=question, constraint=span, spans={"object": span})])
    report = check_data(path, fix=tmp_path / "clean.jsonl")
    assert [kind for _, kind in kinds(report)] == found * 2
    (record,) = read_records(tmp_path / "clean.jsonl")
    assert record.constraint == record.spans["object"] == cleaned
    again = [kind for _, kind in kinds(check_data(tmp_path / "clean.jsonl"))]
    assert again == [kind for kind in found * 2 if kind != "span_spelling"]


UNFINISHED = {  # question with the constraint in brackets -> what it goes on with, as published rows do
    "The capital of [this short-lived] state was": "state",
    "The headquarter of [this religious] organization is in": "organization",
    "[This TV] series debuted on": "series",
    "[This library] software system, a product of the former": "software system",
    "[This news] agency's articles are written in": "agency",
    "[This flooring] material, that originated in": "material",
    "[This streaming] service started in": "service",
    "Who is [the bald] man in this photo?": "man",
    "[This person] died in the city of": None,
    "[This person's] expertise is in the field of": None,
    "[This glacier] belongs to the continent of": None,
    "What is [this surf trick] called?": None,
    "What musical instrument is [this man] playing?": None,
    "How long does [this animal] usually live?": None,
    "In what year was [this desert] first introduced?": None,
    "Are [these animals] mammals or insects?": None,
    "What is [the person in the photo] wearing?": None,
}


@pytest.mark.parametrize("marked", UNFINISHED)
def test_a_constraint_that_ends_before_its_noun_is_noted(marked, tmp_path, photo):
    start, end = marked.index("["), marked.index("]") - 1
    question, noun = marked.replace("[", "").replace("]", ""), UNFINISHED[marked]
    words = question[start:end]
    path = write_lines(tmp_path / "data.jsonl", [Question(text=question, constraint=words, image=tmp_path / "p.png")])
    findings = [finding for finding in check_data(path, pictures=False).findings if finding.kind == "span_unfinished"]
    assert [finding.message.split(" goes on with ")[1].split(" in ")[0] for finding in findings] == (
        [] if noun is None else [repr(noun)]
    )
    assert all(finding.severity == "note" and not finding.fix for finding in findings)
    write_lines(path, [Question(text=question, constraint=words)])
    assert not [finding for finding in check_data(path).findings if finding.kind == "span_unfinished"], "no picture"


TOO_LONG = {  # question with the constraint in brackets -> the verb of the question in it
    "What kind of [cat is this]?": "is",
    "Which [animals are those]?": "are",
    "What food [does this animal] eat?": "does",
    "What kind of cat is [this]?": None,
    "What colour is [the hat that is the largest]?": None,
    "What is [the man whose wife is a queen] called?": None,
    "Who directed [This Is The End]?": None,
}


@pytest.mark.parametrize("marked", TOO_LONG)
def test_a_constraint_with_a_verb_of_the_question_is_noted(marked, tmp_path):
    question, words = marked.replace("[", "").replace("]", ""), marked.split("[")[1].split("]")[0]
    path = write_lines(tmp_path / "a.jsonl", [Question(text=question, constraint=words, image=tmp_path / "p.png")])
    findings = [f for f in check_data(path, pictures=False).findings if f.kind in ("span_too_long", "span_cut_off")]
    messages = [] if TOO_LONG[marked] is None else [f"the span {words!r} holds the verb {TOO_LONG[marked]!r}"]
    assert [finding.message.split(" of the question")[0] for finding in findings] == messages


def test_targets_rephrases_and_other_rows_are_compared(tmp_path):
    edit = {"question": "Who won?", "target": "Ada", "probes": [{"kind": "rephrase", "question": "who  won ?"}]}
    path = write(
        tmp_path,
        edit | {"id": "a", "old": "ada."},
        edit | {"id": "b"},
        edit
        | {
            "id": "c",
            "target": "Bo",
            "probes": [{"kind": "portability", "question": "Why?", "answer": "x", "needs": ["a", "z"]}],
        },
        {"question": "Who won?", "answer": "Ada"},
        {"question": "Who won?", "answer": "the Ada"},
        {"question": "Who won?", "answer": "Bo"},
        {"question": "What colour?", "answer": "red", "answers": ["blue", "Green", "green"]},
        {"question": "What colour is it?", "answer": "blue", "answers": ["blue", "Green", "green"]},
        '{"question": ',
    )  # fmt: skip
    report = check_data(path, fix=tmp_path / "clean.jsonl")
    assert kinds(report) == [
        (1, "target_is_old"),
        (1, "rephrase_is_source"),
        (2, "rephrase_is_source"),
        (2, "duplicate"),
        (3, "contradiction"),
        (3, "needs_unknown"),
        (5, "duplicate"),
        (6, "other_answer"),
        (7, "answer_not_annotated"),
        (8, "not_annotators_choice"),
        (9, "unreadable_row"),
    ]
    assert "the target of 'Who won?' is 'Bo' here and 'Ada' in row 1" in report.findings[4].message
    assert report.findings[-1].message.startswith("this is not JSON"), "the row is named once"
    assert [finding.kind for finding in report.remaining_errors] == ["contradiction", "needs_unknown"]
    cleaned = [record for _, record in read_lines(tmp_path / "clean.jsonl")]
    assert [record.id for record in cleaned[:2]] == ["a", "c"] and len(cleaned) == report.written == 6
    assert cleaned[0].probes == ()


def test_texts_and_boxes_that_no_model_can_use(tmp_path, photo):
    path = write(
        tmp_path,
        {"question": "What does </s> mean?"},
        {"question": "Who?", "target": "Ada <|im_end|>"},
        {"question": "Why " + "so " * 1000 + "long?"},
        {"question": "Is 3 < 4 and <b> a tag?"},
        {"question": "Where?", "image": "photo.png", "boxes": [[0, 0, 40, 30], [30, 0, 50, 30], [40, 0, 50, 9]]},
        {"question": "Where else", "image": "photo.png"},
    )
    report = check_data(path, fix=tmp_path / "clean.jsonl")
    assert kinds(report) == [
        (1, "special_token"),
        (2, "special_token"),
        (3, "text_long"),
        (5, "box_outside"),
        (5, "box_outside"),
        (6, "no_question_mark"),
    ]
    assert read_records(tmp_path / "clean.jsonl")[4].boxes == ((0, 0, 40, 30), (30, 0, 40, 30))


def test_answers_are_compared_with_those_of_annotators_in_another_file(tmp_path, photo):
    pool = [{"question_id": 1, "question": "What sport?", "image": "photo.png", "answer": ["golf"] * 9 + ["tennis"]}]
    (tmp_path / "pool.json").write_text(json.dumps(pool))
    probe = {"kind": "unrelated", "question": "What sport?", "image": "photo.png"}
    rows = [
        {"question": f"Who {number}?", "image": None, "target": "Ada", "probes": [probe | {"answer": answer}]}
        for number, answer in enumerate(("golf", "tennis", "chess"))
    ]
    report = check_data(write(tmp_path, *rows), answers=tmp_path / "pool.json")
    assert kinds(report) == [(2, "not_annotators_choice"), (3, "answer_not_annotated")]
    assert "'chess' to 'What sport?' is none of 'golf', 'tennis'" in report.findings[1].message


def test_a_public_row_with_a_question_but_no_answer_says_so(tmp_path):
    row = {"src": "Who?", "alt": "Ada", "image": "a.jpg", "rephrase": "Who is it?", "loc": "why", "loc_ans": ""}
    row |= {
        "m_loc": "b.jpg",
        "m_loc_q": "What?",
        "m_loc_a": "tea",
        "rel_1": "When?",
        "rel_1_ans": "1900",
        "m_rel_2": "Is it?",
    }
    hops = [{"port_type": "1-hop", "Q&A": {"Question": "Where?", "Answer": answer}} for answer in ("Oslo", None)]
    (tmp_path / "a.json").write_text(json.dumps([row, row | {"src": "Why?", "loc_ans": "so", "port_new": hops}]))
    report = check_data(tmp_path / "a.json", format="vlkeb", pictures=False)
    found = [(finding.row, finding.message.split()[0]) for finding in report.findings]
    assert found == [(1, "'loc'"), (1, "'m_rel_2'"), (2, "'m_rel_2'"), (2, "'port_new'")]
    (tmp_path / "b.json").write_text(json.dumps([row | {"m_loc": None, "image_rephrase_question": "Who else?"}]))
    messages = " ".join(finding.message for finding in check_data(tmp_path / "b.json", pictures=False).findings)
    assert "whose picture, 'm_loc', is missing" in messages and "whose picture, 'image_rephrase', is" in messages
    assert {kind for _, kind in kinds(report)} == {"unanswered"}


def test_a_report_counts_by_kind_and_is_json(tmp_path):
    report = check_data(write(tmp_path, "{", "[", {"question": "Who?"}))
    assert dict(report.counts) == {"unreadable_row": 2} and report.rows == 3
    content = json.loads(json.dumps(report.to_dict()))
    assert content["counts"] == {"unreadable_row": 2} and content["findings"][0]["severity"] == ERROR
    assert {kind.severity for kind in FINDINGS.values()} == set(SEVERITIES)
    with pytest.raises(DataError, match="cannot read"):
        check_data(tmp_path / "none.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
def test_the_traps_of_published_files_are_reported(tmp_path):
    pool = SHARED / "mmedit" / "okvqa_loc.json"
    counts = {
        name: dict(check_data(SHARED / name, answers=pool, pictures=False).counts)
        for name in ("mmedit/evqa_eval.json", "counterfact/counterfact-edit.json", "zsre/zsre_mend_train.json")
    }
    assert counts["mmedit/evqa_eval.json"] == {"target_is_old": 10, "rephrase_is_source": 6, "not_annotators_choice": 2}
    assert counts["counterfact/counterfact-edit.json"] == {"contradiction": 1, "rephrase_is_source": 8}
    assert counts["zsre/zsre_mend_train.json"] == {"target_is_old": 8, "rephrase_is_source": 4}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
def test_constraints_of_published_files_that_end_before_their_noun_are_noted():
    """Of the 16 rows of VQA-Constraints these two; of the 207 constraints of GQA one of food, one of clothing."""
    notes = {}
    for path in sorted(SHARED.glob("*/*.csv")):
        found = check_data(path, pictures=False).findings
        assert not any(finding.kind == "span_too_long" for finding in found)
        notes[path.parent.name, path.stem.split("_")[-1]] = [
            finding.message.split(" in ")[0] for finding in found if finding.kind == "span_unfinished"
        ]
    assert notes.pop(("vqa_constraints", "known")) == [
        "the constraint 'this religious' goes on with 'organization'",
        "the constraint 'this short-lived' goes on with 'state'",
    ]
    assert notes.pop(("gqa_flow", "ChooseCat")) == [
        "the constraint 'food' goes on with 'item'",
        "the constraint 'clothing' goes on with 'item'",
    ]
    assert len(notes) == 5 and not any(notes.values())


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
def test_constraints_of_published_questions_that_swallow_the_verb_are_noted(tmp_path):
    """OK-VQA asks "Which kind of cake is this?"; the constraint "cake is this" swallows the verb."""
    matches = [
        (record, re.search(r"\b[a-z]+ (?:is|are) (?:this|these)\b", record.text))
        for _, record in read_data(SHARED / "mmedit" / "okvqa_loc.json")
    ]
    swallowed = [replace(record, constraint=match[0]) for record, match in matches if match]
    write_lines(tmp_path / "long.jsonl", swallowed)
    report = check_data(tmp_path / "long.jsonl", pictures=False)
    assert dict(report.counts) == {"span_too_long": 17} and len(swallowed) == 17


def test_the_page_about_data_files_names_every_key_format_and_finding(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    lines = page.split("```json\n")[1].split("```")[0]
    (tmp_path / "page.jsonl").write_text(lines)
    assert [type(record) for record in read_records(tmp_path / "page.jsonl")] == [Question, EditRecord]
    for kind, finding in FINDINGS.items():
        assert (
            f"| {finding.severity} | `{kind}` | {finding.title} | {finding.fix or 'nothing: decide yourself'} |" in page
        )
    for line in (QuestionLine, EditLine, ProbeLine):
        assert all(f"| `{each.name}` | {each.metadata['description']} |" in page for each in fields(line))
    assert all(f"| `{name}` | {form.title} |" in page for name, form in FORMATS.items())
