"""Public data files become plain records: every field has its place, and a bad row costs only itself."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from multrace.data import DataError, EditRecord, Question, check_data
from multrace.data.formats import FORMATS, detect_format, read_data, read_records
from multrace.data.formats.rows import DataSource

SHARED = Path(__file__).parents[2] / "shared" / "data"
COMMON = {
    "src": "What animal is on the mat?", "pred": "dog", "rephrase": "Which animal lies on the mat?", "alt": "otter",
    "image": "val2014/COCO_val2014_000000000001.jpg",
    "image_rephrase": "val2014_image_rephrase/COCO_val2014_000000000001.png",
    "loc": "nq question: who painted the blue door", "loc_ans": "Nobody Known",
    "m_loc": "val2014/COCO_val2014_000000000002.jpg", "m_loc_q": "What sport is this?", "m_loc_a": "curling",
}  # fmt: skip
ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} was born in", "relation_id": "P19", "subject": "Ada Example",
        "target_true": {"str": "Oslo", "id": "Q1"}, "target_new": {"str": "Lima", "id": "Q2"},
    },
    "paraphrase_prompts": ["Ada Example comes from"], "neighborhood_prompts": ["Bo Other was born in"],
    "attribute_prompts": ["Cy Third was born in"], "generation_prompts": ["Ada Example grew up in"],
}  # fmt: skip


def write(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def probes(record: EditRecord) -> list[tuple]:
    return [
        (
            probe.kind,
            probe.question.text,
            probe.question.images[0].name if probe.question.images else None,
            probe.answer,
        )
        for probe in record.probes
    ]


COMMON_PROBES = [
    ("rephrase", "Which animal lies on the mat?", "COCO_val2014_000000000001.jpg", None),
    ("other_picture", "What animal is on the mat?", "COCO_val2014_000000000001.png", None),
    ("unrelated_text", "who painted the blue door", None, "Nobody Known"),
    ("unrelated", "What sport is this?", "COCO_val2014_000000000002.jpg", "curling"),
]


def test_mmedit(tmp_path):
    (record,) = read_records(write(tmp_path, [COMMON]), images="coco")
    assert (record.id, record.question.text, record.target, record.old) == ("1", COMMON["src"], "otter", None)
    assert record.question.image == Path("coco") / COMMON["image"]
    assert probes(record) == COMMON_PROBES
    assert record.extra == {"pred": "dog"}, "the answer of another model is not the present answer of this one"


def test_vlkeb_has_two_shapes_of_portability(tmp_path):
    one_hop = COMMON | {
        "image": "m.0aaa/google_1.jpg",
        "port_new": [
            {"port_edit_q": "Where was Ada born?", "port_edit_a": "Lima", "port_q": "Born where?", "port_a": "Lima"}
        ],
    }
    multi_hop = COMMON | {
        "port_new": [
            {"port_type": "1-hop", "Q&A": {"Question": "In which town was she born?", "Answer": "Lima"}},
            {"port_type": "3-hop", "Q&A": {"Question": "Who governs it?", "Answer": "Bo"}},
        ]
    }
    first, second = read_records(write(tmp_path, [one_hop, multi_hop]))
    assert probes(first)[4:] == [("portability", "Born where?", "google_1.jpg", "Lima")]
    assert first.probes[4].question.extra == {"port_edit_q": "Where was Ada born?", "port_edit_a": "Lima"}
    assert [(probe.hops, probe.answer) for probe in second.probes[4:]] == [(1, "Lima"), (3, "Bo")]
    assert second.probes[4].question.image == second.question.image


def test_mmke_has_two_spellings_of_answers(tmp_path):
    entity = COMMON | {
        "knowledge_type": "entity_level", "rel_1": "When was the tower built?", "rel_ans_1": "1900",
        "m_rel_1": "When was the building built?", "m_rel_1_ans": "1900",
        "port_new": [{"port_type": "1-hop", "Q&A": {"Question": "Who built it?", "Answer": "Bo"}}],
        "one_hop_img": "hop.jpg",
    }  # fmt: skip
    visual = COMMON | {
        "knowledge_type": "visual_knowledge", "rel": "What does it mean?", "rel_ans": "stop", "m_rel": "And this?",
        "m_rel_ans": "go", "image_rephrase_question": "What is shown?",
    }  # fmt: skip
    first, second = read_records(write(tmp_path, [entity, visual]))
    picture, other = "COCO_val2014_000000000001.jpg", "COCO_val2014_000000000001.png"
    assert probes(first) == [
        *COMMON_PROBES,
        ("related_text", "When was the tower built?", None, "1900"),
        ("related_picture", "When was the building built?", picture, "1900"),
        ("related_picture", "When was the building built?", other, "1900"),
        ("portability", "Who built it?", "hop.jpg", "Bo"),
    ]
    assert first.extra == {"pred": "dog", "knowledge_type": "entity_level"}
    assert probes(second)[1] == ("other_picture", "What is shown?", other, None)
    assert [probe.answer for probe in second.probes[4:]] == ["stop", "go", "go"]


def test_a_question_without_its_answer_costs_its_probe_and_not_the_row(tmp_path):
    row = COMMON | {
        "knowledge_type": "entity_level", "rel_1": "When?", "rel_2": "Where?", "rel_2_ans": "Lima",
        "port_new": [{"port_type": "1-hop", "Q&A": {"Question": "Who?", "Answer": ""}}],
    }  # fmt: skip
    (record,) = read_records(write(tmp_path, [row]))
    assert probes(record) == [*COMMON_PROBES, ("related_text", "Where?", None, "Lima")]


TABLES = {  # how a file holds its rows -> its content
    "an array with a byte order mark and CRLF": b"\xef\xbb\xbf"
    + json.dumps([COMMON] * 2, indent=1).replace("\n", "\r\n").encode(),
    "an object with a list": json.dumps({"data": [COMMON] * 2}).encode(),
    "an object of objects": json.dumps({"0": COMMON, "1": COMMON}, indent=2).encode(),
    "lines with CRLF": b"\r\n\r\n".join([json.dumps(COMMON).encode()] * 2),
    "a first row without a picture": json.dumps([{"src": "a", "alt": "b"}, COMMON, COMMON]).encode(),
    "NaN for what is missing": json.dumps([COMMON | {"pred": float("nan")}, COMMON]).encode(),
}


@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", ["data.json", "DATA.JSON", "data.jsonl"])
def test_rows_are_found_however_a_file_holds_them(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert detect_format(tmp_path / name) == "mmedit"
    outcomes = [outcome for _, outcome in read_data(tmp_path / name)]
    records = [outcome for outcome in outcomes if isinstance(outcome, EditRecord)]
    assert len(records) == 2 and all(probes(record) == COMMON_PROBES for record in records)
    assert [str(outcome)[:10].strip() for outcome in outcomes if isinstance(outcome, DataError)] in ([], ["no 'image'"])


def test_one_row_over_several_lines_is_a_row_of_a_public_file_and_an_error_for_our_own(tmp_path):
    assert len(read_records(write(tmp_path, json.dumps(COMMON, indent=2)))) == 1
    keyed = read_records(write(tmp_path, {"a": COMMON, "b": COMMON}))
    assert [record.extra["id"] for record in keyed] == ["a", "b"]
    with pytest.raises(DataError, match="is one JSON object over several lines or around others; write one per line"):
        read_records(write(tmp_path, json.dumps({"question": "Who?"}, indent=2)))


def test_values_are_missing_null_lists_or_numbers(tmp_path):
    nothing = dict.fromkeys(("rephrase", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a"))
    rows = [
        COMMON | nothing,
        COMMON | {"alt": 3, "m_loc_a": 2010},
        COMMON | {"alt": ["otter", "an otter"], "image": ["a.jpg", "b.jpg"]},
        COMMON | {"port_new": {"port_type": "2-hop", "Q&A": {"Question": "When?", "Answer": 1900}}},
        COMMON | {"port_new": None, "alt": ""},
    ]
    outcomes = [outcome for _, outcome in read_data(write(tmp_path, rows))]
    bare, numbers, lists, hop, empty = outcomes
    assert probes(bare) == []
    assert (numbers.target, numbers.probes[3].answer) == ("3", "2010")
    assert [image.name for image in lists.question.images] == ["a.jpg", "b.jpg"]
    assert lists.target == "otter" and lists.extra["alt"] == ["otter", "an otter"], "nothing of the row is lost"
    assert (hop.probes[4].hops, hop.probes[4].answer) == (2, "1900")
    assert "no 'alt'" in str(empty)


def test_easyedits_files_with_a_new_question(tmp_path):
    """zsRE and CounterFact with the portability questions that EasyEdit added, and KnowEdit's groups that are null."""
    pair = {"Recalled Relation": "(Lima, country, Peru)", "New Question": "In which country?", "New Answer": "Peru"}
    zsre = {"subject": "Ada", "src": "Where was Ada born?", "alt": "Lima", "answers": "Oslo", "portability": pair}
    plain = {"prompt": "Ada was born in", "subject": "Ada", "target_new": ["Lima"], "ground_truth": ["Oslo"]}
    for name, row in (("zsre", zsre), ("rome", ROME | {"portability": pair}), ("plain", plain | {"portability": pair})):
        (record,) = read_records(write(tmp_path, [row], f"{name}.json"))
        assert probes(record)[-1] == ("portability", "In which country?", None, "Peru"), name
        assert record.probes[-1].question.extra == {"Recalled Relation": "(Lima, country, Peru)"}
        assert (record.target, record.old) == ("Lima", "Oslo") and "portability" not in record.extra
    (record,) = read_records(write(tmp_path, [plain | {"portability": {"Reasoning": None}, "locality": {}}]))
    assert probes(record) == []
    texts = {"target_new": "Lima", "target_true": "Oslo"}
    (record,) = read_records(write(tmp_path, [ROME | {"requested_rewrite": ROME["requested_rewrite"] | texts}]))
    assert (record.target, record.old) == ("Lima", "Oslo")


def test_okvqa_rows_with_annotators_and_coco_numbers(tmp_path):
    said = [{"answer": "red", "answer_confidence": "yes"}] * 2 + [{"answer": "blue", "answer_confidence": "maybe"}]
    rows = [{"question_id": 1, "question": "Which?", "image_id": 42, "answers": said}]
    rows += [{"question_id": 2, "question": "Which?", "image": "a.jpg", "answer": ["red", "red", "blue"]}]
    first, second = read_records(write(tmp_path, rows))
    assert (first.answer, first.answers) == (second.answer, second.answers) == ("red", ("red", "red", "blue"))
    assert first.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"


def test_a_picture_is_found_under_the_names_that_files_give_it(tmp_path):
    (tmp_path / "val2014").mkdir()
    for name in ("a.JPG", "b c.jpg"):
        (tmp_path / "val2014" / name).write_bytes(b"")
    row = COMMON | {"image": "val2014/a.jpg", "image_rephrase": "val2014/b%20c.JPG", "m_loc": "val2014/none.jpg"}
    path = write(tmp_path, [row, row | {"image": "/val2014/a.jpg"}])
    for images in (None, tmp_path / "val2014"):
        record, rooted = read_records(path, images=images)
        assert record.question.image == rooted.question.image == tmp_path / "val2014" / "a.JPG"
        assert record.probes[1].question.image == tmp_path / "val2014" / "b c.jpg"
    assert record.probes[3].question.image == tmp_path / "val2014" / "val2014" / "none.jpg", (
        "a missing one keeps its path"
    )


@pytest.mark.parametrize(("start", "kind"), [(b"\x1f\x8b", "gzip file"), (b"PK\x03\x04", "zip"), (b"PAR1", "Parquet")])
def test_a_packed_file_is_named(tmp_path, start, kind):
    for name in ("data.json", "data.csv"):
        (tmp_path / name).write_bytes(start + bytes(100))
        with pytest.raises(DataError, match=f"{name}' is a {kind}.*; unpack it, and pass the JSON or CSV file"):
            list(read_data(tmp_path / name))


def test_a_picture_named_on_windows_is_found(tmp_path):
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "a.jpg").write_bytes(b"")
    (record,) = read_records(write(tmp_path, [COMMON | {"image": "val2014\\a.jpg"}]))
    assert record.question.image == tmp_path / "val2014" / "a.jpg"


def test_cckeb_rows_are_a_visual_and_a_textual_edit(tmp_path):
    row = COMMON | {
        "port_new": [
            {"port_type": "comp", "Q&A": {"Question": "Where does it live now?", "Answer": "Lima", "Query": "q"}},
            {"port_type": "2-hop", "Q&A": {"Question": "In which country?", "Answer": "Peru"}},
        ],
        "textual_edit": {
            "src": "Where do otters live?", "pred": "rivers", "alt": ["Lima", "in Lima"],
            "rephrase": "What is the home of otters?", "loc": "nq question: who", "loc_ans": "Bo",
        },
        "src_q": "What is it?",
    }  # fmt: skip
    visual, textual = read_records(write(tmp_path, [row]))
    assert (visual.id, visual.group, textual.id, textual.group) == ("1", "1", "1-text", "1")
    assert [(probe.needs, probe.hops) for probe in visual.probes[4:]] == [(("1-text",), None), ((), 2)]
    assert visual.extra == {"pred": "dog", "src_q": "What is it?"}
    assert (textual.question.text, textual.target, textual.question.images) == ("Where do otters live?", "Lima", ())
    assert textual.question.answers == ("Lima", "in Lima")
    assert [probe.kind for probe in textual.probes] == ["rephrase", "unrelated_text"]


def test_counterfact_in_romes_form(tmp_path):
    (record,) = read_records(write(tmp_path, [ROME]))
    assert (record.id, record.question.text, record.target, record.old) == (
        "7",
        "Ada Example was born in",
        "Lima",
        "Oslo",
    )
    assert record.question.constraint == "Ada Example"
    assert probes(record) == [
        ("rephrase", "Ada Example comes from", None, None),
        ("other_subject", "Bo Other was born in", None, "Oslo"),
    ]
    assert record.probes[0].question.constraint == "Ada Example"
    assert record.extra["attribute_prompts"] == ["Cy Third was born in"] and record.extra["relation_id"] == "P19"


def test_a_subject_that_the_prompt_repeats_is_the_one_in_the_slot(tmp_path):
    rewrite = ROME["requested_rewrite"] | {"prompt": "Oslo was home to those like {}, in", "subject": "Oslo"}
    (record,) = read_records(write(tmp_path, [ROME | {"requested_rewrite": rewrite}]))
    assert record.question.constraint == ("Oslo", 1)


def test_counterfact_in_easyedits_form_and_files_like_it(tmp_path):
    row = {
        "case_id": 6, "prompt": "Ada Example was born in", "target_new": "Lima", "subject": "Ada Example",
        "ground_truth": "Oslo", "rephrase_prompt": "Ada Example comes from", "locality_prompt": "Bo Other was born in",
        "locality_ground_truth": "Oslo",
        "portability": {"Reasoning": [{"prompt": "Ada's country is", "ground_truth": [["Peru", "the Peru"]]}]},
    }  # fmt: skip
    (record,) = read_records(write(tmp_path, [row]))
    assert (record.id, record.target, record.old) == ("6", "Lima", "Oslo")
    assert probes(record) == [
        ("rephrase", "Ada Example comes from", None, None),
        ("other_subject", "Bo Other was born in", None, "Oslo"),
        ("portability", "Ada's country is", None, "Peru"),
    ]
    assert record.probes[2].question.answers == ("Peru", "the Peru")


def test_zsre(tmp_path):
    row = {
        "subject": "Ada", "src": "Where was Ada born?", "pred": "Rome", "rephrase": "Ada's birthplace?", "alt": "Lima",
        "answers": ["Oslo"], "loc": "nq question: who won", "loc_ans": "Bo", "cond": "Oslo >> Lima || ...",
    }  # fmt: skip
    (record,) = read_records(write(tmp_path, [row]))
    assert (record.question.constraint, record.old, record.target) == ("Ada", "Oslo", "Lima")
    assert probes(record) == [("rephrase", "Ada's birthplace?", None, None), ("unrelated_text", "who won", None, "Bo")]
    assert record.extra == {"pred": "Rome", "cond": "Oslo >> Lima || ...", "subject": "Ada"}


def test_okvqa_pool_and_standard_pair_agree(tmp_path):
    answers = ["clear", "tempered", "tempered"]
    image = "val2014/COCO_val2014_000000058472.jpg"
    pool = write(
        tmp_path, [{"question_id": 5, "question": "Which glass?", "answer": answers, "image": image}], "pool.json"
    )
    folder = tmp_path / "standard"
    folder.mkdir()
    questions = write(
        folder,
        {"questions": [{"question_id": 5, "image_id": 58472, "question": "Which glass?"}]},
        "OpenEnded_mscoco_val2014_questions.json",
    )
    rows = [
        {"question_id": 5, "image_id": 58472, "answers": [{"answer": answer, "answer_id": 1} for answer in answers]}
    ]
    write(folder, {"annotations": rows}, "mscoco_val2014_annotations.json")
    (first,), (second,) = read_records(pool, images="x"), read_records(questions, images="x")
    assert first == second
    assert (first.id, first.answer, first.answers) == ("5", "tempered", tuple(answers))
    (folder / "mscoco_val2014_annotations.json").unlink()
    with pytest.raises(DataError, match="no annotations beside"):
        read_records(questions)


CONSTRAINTS = """,question,main_entity,image_url
589,"This person, who has a citizenship of","This person,",./A photo of Peggy Nash
590,What fuel does this kind of vehicle burn?, this kind of vehicle ,val2014/COCO_val2014_000000000003.jpg
"""


def test_vqa_constraints_are_cleaned_and_joined_with_answers(tmp_path):
    path = write(tmp_path, CONSTRAINTS, "okvqa.csv")
    text, answers = "what fuel does this kind of vehicle burn", ["diesel", "gas", "gas"]
    rows = [{"question_id": 1, "question": text, "answer": answers, "image": "COCO_val2014_000000000003.jpg"}]
    first, second = read_data(path, answers=write(tmp_path, rows, "answers.json"))
    assert first[0] == 2 and first[1].constraint == "This person" and first[1].extra["main_entity"] == "This person,"
    assert (first[1].answer, second[1].answer, second[1].answers) == (None, "gas", ("diesel", "gas", "gas"))
    assert second[1].constraint == "this kind of vehicle" and second[1].id == "590"
    assert read_records(path)[1].answer is None, "without the file of answers there is none"


@pytest.mark.parametrize("name", ["vqa_constraints/multimodal_known.csv", "gqa_flow/*_ChooseCat.csv"])
@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
def test_a_table_that_was_saved_as_json_or_with_blanks_in_its_header_is_the_same(tmp_path, name):
    (path,) = SHARED.glob(name)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    objects = [{name: cell or None for name, cell in zip(header, row, strict=True)} for row in rows]
    with (tmp_path / f"b_{path.name}").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[f" {cell} " for cell in header], *rows])
    write(tmp_path, objects, f"a_{path.stem}.json")
    write(tmp_path, "\n".join(map(json.dumps, objects)), f"a_{path.stem}.jsonl")
    expected = [replace(record, id="") for record in read_records(path, images="pictures")]
    for copy in tmp_path.iterdir():
        assert [replace(record, id="") for record in read_records(copy, images="pictures")] == expected, copy.name


def test_a_folder_of_candidates_gives_its_first_picture_whatever_the_normal_form(tmp_path):
    composed, decomposed = "A photo of Zo\u00eb", "A photo of Zoe\u0308"
    folder = tmp_path / decomposed
    folder.mkdir()
    for name in ("b.jpg", "a.png", "notes.txt"):
        (folder / name).write_bytes(b"")
    path = write(
        tmp_path, f",question,subject,main_entity,image_url\n1,This person sang,Zoë,This person,./{composed}\n", "k.csv"
    )
    (question,) = read_records(path)
    assert question.image == folder / "a.png"


def test_a_cell_with_two_constraints_has_the_second_as_a_span(tmp_path):
    head = ",question,main_entity,image_url\n"
    row = '1531,Why does this animal have this object?,"this animal\nthis object,",./val2014/a.jpg\n'
    (question,) = read_records(write(tmp_path, head + row, "okvqa.csv"))
    assert (question.constraint, question.spans) == ("this animal", {"constraint2": "this object"})


def test_lists_of_rephrases_pictures_and_answers_lose_none(tmp_path):
    row = COMMON | {
        "rephrase": ["Which?", "What lies there?"], "image_rephrase": ["b.jpg", "c.jpg"], "loc": ["one", "two"],
        "loc_ans": ["1", "2"], "m_loc": [["d.jpg", "e.jpg"]], "m_loc_a": ["curling", "ice sport"],
    }  # fmt: skip
    (record,) = read_records(write(tmp_path, [row]))
    picture = "COCO_val2014_000000000001.jpg"
    assert probes(record) == [
        ("rephrase", "Which?", picture, None),
        ("rephrase", "What lies there?", picture, None),
        ("other_picture", COMMON["src"], "b.jpg", None),
        ("other_picture", COMMON["src"], "c.jpg", None),
        ("unrelated_text", "one", None, "1"),
        ("unrelated_text", "two", None, "2"),
        ("unrelated", "What sport is this?", "d.jpg", "curling"),
    ]
    assert len(record.probes[-1].question.images) == 2, "a list of unrelated pictures is one question about all"
    assert record.probes[-1].question.answers == ("curling", "ice sport")
    pairs = [{"Question": "Where?", "Answer": "here"}, {"Question": "When?", "Answer": "now"}]
    several = COMMON | {"image": ["a.jpg", "b.jpg"], "image_rephrase": ["c.jpg", "d.jpg"]}
    several |= {"port_new": [{"port_type": "1-hop", "Q&A": pairs}]}
    (record,) = read_records(write(tmp_path, [several]))
    assert [len(probe.question.images) for probe in record.probes] == [2, 2, 0, 1, 2, 2]
    assert [probe.answer for probe in record.probes[4:]] == ["here", "now"]


def test_lists_of_unrelated_pictures_hops_and_related_questions_lose_none(tmp_path):
    row = COMMON | {
        "m_loc": ["d.jpg", "e.jpg"], "m_loc_q": ["What is it?", "Who?"], "m_loc_a": ["tea", "Bo"],
        "port_new": [{"port_q": ["Where?", "When?"], "port_a": ["here", "now"]},
                     {"port_type": "inverse", "Q&A": {"Question": "Whose?", "Answer": ["Ada's", "hers", None]}}],
    }  # fmt: skip
    (record,) = read_records(write(tmp_path, [row]))
    assert probes(record)[3:] == [
        ("unrelated", "What is it?", "d.jpg", "tea"),
        ("unrelated", "Who?", "e.jpg", "Bo"),
        *(("portability", text, "COCO_val2014_000000000001.jpg", said) for text, said in
          (("Where?", "here"), ("When?", "now"), ("Whose?", "Ada's"))),
    ]  # fmt: skip
    asked = record.probes[-1].question
    assert (asked.answers, asked.extra) == (("Ada's", "hers"), {"port_type": "inverse"})
    related = COMMON | {"m_rel": "Is it?", "rel": ["Who?", None], "rel_ans": ["Al", "now"], "rel_1_ans": "1900"}
    (record,) = read_records(write(tmp_path, [related]))
    assert probes(record)[4:] == [("related_text", "Who?", None, "Al")]
    messages = [finding.message.split()[0] for finding in check_data(tmp_path / "data.json", pictures=False).findings]
    assert messages == ["'m_rel'", "'rel_1'"]
    mixed = COMMON | {"port_new": [{"port_q": ["Where?", "When?"], "port_a": "here"}]}
    (finding,) = check_data(write(tmp_path, [mixed]), pictures=False).findings
    assert finding.message == "'port_new' has 2 questions and 'port_a' 1 answers"


def test_what_a_reader_has_no_use_for_and_optional_objects(tmp_path):
    """Lists of targets stay in `extra`, objects may lie in a list, numbers of COCO may be texts, null is nothing."""
    easyedit = {"case_id": None, "prompt": "Ada was born in", "target_new": ["Lima", "lima"], "subject": "Ada"}
    (record,) = read_records(write(tmp_path, [easyedit]))
    assert (record.id, record.target, record.extra) == ("1", "Lima", {"target_new": ["Lima", "lima"]})
    zsre = {"src": "Where?", "alt": ["Lima", "lima"], "subject": "Ada", "answers": ["Oslo", None]}
    (record,) = read_records(write(tmp_path, [zsre]))
    assert (record.old, record.question.answers, record.extra["alt"]) == ("Oslo", (), ["Lima", "lima"])
    rewrite = {"prompt": "{} was born in", "subject": "Ada", "target_true": None, "target_new": [{"str": "Lima"}]}
    rome = [{"requested_rewrite": [rewrite]}, {"requested_rewrite": rewrite | {"target_new": {"str": None}}}]
    (_, record), (_, error) = read_data(write(tmp_path, rome))
    assert (record.target, record.old, record.question.answer) == ("Lima", None, None)
    assert str(error).startswith("'target_new' has no text")
    textual = {"src": ["Who?", "Who is it?"], "alt": "Bo"}
    cckeb = read_records(write(tmp_path, [COMMON | {"textual_edit": [textual]}]))
    assert [record.target for record in cckeb] == ["otter", "Bo"] and cckeb[1].extra == {"src": textual["src"]}
    (_, error), *_ = read_data(write(tmp_path, [COMMON | {"textual_edit": [textual, textual]}]))
    assert str(error) == "'textual_edit' has 2 objects; it should be one, so write a row for each"
    pool = {"question_id": 5, "question": "Who?", "answers": [{"answer": "Bo"}], "image_id": "42"}
    (question,) = read_records(write(tmp_path, [pool]))
    assert question.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    (_, error), *_ = read_data(write(tmp_path, [COMMON | {"alt": None}, COMMON]))
    assert "no 'alt' (found 'src', 'pred', 'rephrase', 'image'" in str(error)


def test_parallel_prompts_of_easyedit_have_their_own_answers(tmp_path):
    row = {"prompt": "Ada was born in", "subject": "Ada", "target_new": "Lima", "ground_truth": "Oslo"}
    pair = {"prompt": ["Bo lives in", "Cy lives in"], "ground_truth": ["Rome", "Bonn"]}
    nested = row | {"portability": {"one_hop": pair}, "locality": {"neighborhood": pair}}
    (record,) = read_records(write(tmp_path, [nested]))
    assert [probe.answer for probe in record.probes] == ["Rome", "Bonn"] * 2
    alone = row | {"locality_prompt": ["Bo lives in", "Cy lives in"], "locality_ground_truth": "Rome"}
    (record,) = read_records(write(tmp_path, [alone]))
    assert [(probe.question.text, probe.answer) for probe in record.probes] == [
        ("Bo lives in", None),
        ("Cy lives in", None),
    ]


def test_a_pool_of_textual_questions(tmp_path):
    pool = {"questions": ["nq question: who won", "why"], "answers": ["Ada", ["so", "thus"]]}
    first, second = read_records(write(tmp_path, pool))
    assert (first.text, first.answer, first.images, second.answers) == ("who won", "Ada", (), ("so", "thus"))
    with pytest.raises(DataError, match="has 2 questions and 1 answers; pair them up"):
        read_records(write(tmp_path, pool | {"answers": ["Ada"]}))


@pytest.mark.parametrize("address", ["https://example.org/a%20b.jpg", "data:image/png;base64,iVBORw0KGgo="])
def test_an_address_is_no_path_inside_the_folder_of_pictures(tmp_path, address):
    lines = write(tmp_path, json.dumps({"question": "Who?", "image": address}), "own.jsonl")
    for record in (*read_records(write(tmp_path, [COMMON | {"image": address}])), *read_records(lines)):
        (image,) = (record.question if isinstance(record, EditRecord) else record).images
        assert image == Path(address)


ROWS = {
    "mmedit": COMMON,
    "vlkeb": COMMON | {"port_new": []},
    "mmke": COMMON | {"knowledge_type": "entity_level"},
    "cckeb": COMMON | {"textual_edit": {"src": "Where?", "alt": "here"}},
    "counterfact": ROME,
    "zsre": {"subject": "Ada", "src": "Where was Ada born?", "alt": "Lima", "answers": ["Oslo"]},
    "okvqa": {"question_id": 5, "question": "Which glass?", "answer": ["clear"], "image": "a.jpg"},
    "lines": {"id": "1", "question": "Who won?", "target": "Ada"},
}


@pytest.mark.parametrize("name", ROWS)
def test_the_format_is_told_by_the_content(tmp_path, name):
    lines = "\n".join(json.dumps(ROWS[name]) for _ in range(1))
    assert detect_format(write(tmp_path, lines, "data.jsonl")) == name
    if name != "lines":
        assert detect_format(write(tmp_path, [ROWS[name]])) == name
        array, line = read_records(tmp_path / "data.json"), read_records(tmp_path / "data.jsonl")
        assert array == line


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"lines"}))
@pytest.mark.parametrize("damage", [7, [], "text", None, {}, "empty question", "number for a text"])
def test_a_bad_row_costs_only_itself(tmp_path, name, damage):
    row = ROWS[name]
    key = "question" if name == "okvqa" else "requested_rewrite" if name == "counterfact" else "src"
    bad = {"empty question": row | {key: ""}, "number for a text": row | {key: {"a": 1}}}
    outcomes = list(
        read_data(
            write(tmp_path, [row, bad.get(damage, damage) if isinstance(damage, str) else damage, row]), format=name
        )
    )
    bad_rows = [number for number, outcome in outcomes if isinstance(outcome, DataError)]
    good_rows = {number for number, outcome in outcomes if not isinstance(outcome, DataError)}
    assert (bad_rows, good_rows) == ([2], {1, 3})
    assert len({outcome.id for _, outcome in outcomes if not isinstance(outcome, DataError)}) == len(outcomes) - 1
    problems: list[str] = []
    assert len(read_records(tmp_path / "data.json", format=name, problems=problems)) == len(outcomes) - 1
    assert len(problems) == 1 and problems[0].startswith("row 2: ") and "\n" not in problems[0]
    with pytest.raises(DataError, match="row 2"):
        read_records(tmp_path / "data.json", format=name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("[]", "no known format"),
        ('[{"a": 1}]', "no known format"),
        ("[{", "not JSON"),
        ("[" * 100_000, "JSON"),
        ('[{"src": ' + "9" * 5000 + "}]", "digits"),
    ],
)
def test_a_file_that_is_nothing_known_is_one_line(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=words) as error:
        list(read_data(path))
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    with pytest.raises(DataError, match="cannot read"):
        list(read_data(tmp_path / "missing.json"))
    with pytest.raises(DataError, match="use one of"):
        list(read_data(path, format="spreadsheet"))


FILES = {
    "mmedit/evqa_eval.json": ("mmedit", 250),
    "mmedit/eic_eval.json": ("mmedit", 80),
    "mmedit/okvqa_loc.json": ("okvqa", 120),
    "vlkeb/eval.json": ("vlkeb", 200),
    "vlkeb/eval_edit_onehop.json": ("vlkeb", 120),
    "gqa_flow": ("gqa-flow", 240),
    "vqa_constraints/multimodal_known.csv": ("vqa-constraints", 16),
    "counterfact/counterfact-edit.json": ("counterfact", 2000),
    "zsre/zsre_mend_train.json": ("zsre", 300),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
@pytest.mark.parametrize("name", FILES)
def test_every_row_of_the_real_files_is_read(name):
    format, count = FILES[name]
    assert detect_format(SHARED / name) == format
    records = read_records(SHARED / name, images="pictures")
    assert len(records) == count == len({record.id for record in records})
    kind = Question if format in ("okvqa", "gqa-flow", "vqa-constraints") else EditRecord
    assert all(isinstance(record, kind) for record in records)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
def test_rows_are_lost_with_a_message_where_they_are_damaged(tmp_path):
    """The negative of the test above: it would not notice rows that the reader skips if none were ever skipped."""
    folder = tmp_path / "gqa"
    shutil.copytree(SHARED / "gqa_flow", folder)
    file = sorted(folder.glob("*.csv"))[0]
    file.write_bytes(file.read_bytes() + b"1,2,3\n")
    problems: list[str] = []
    assert len(read_records(folder, problems=problems)) == 240
    assert len(problems) == 1 and file.name in problems[0]


def test_formats_have_titles():
    assert all(format.title for format in FORMATS.values())


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_device_is_no_data_file_and_is_not_read():
    with pytest.raises(DataError, match="'/dev/zero' is not a regular file"):
        list(read_data("/dev/zero"))
    with pytest.raises(DataError, match="'/dev/zero' is not a regular file"):
        list(read_data("/dev/zero", format="lines"))


def test_pictures_of_a_folder_of_files_lie_in_it(tmp_path):
    assert DataSource(path=tmp_path).picture("1.jpg") == tmp_path / "1.jpg"
    assert DataSource(path=tmp_path / "a.csv").picture("1.jpg") == tmp_path / "1.jpg"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({**COMMON, "src": "What \ud800?"}), "half a surrogate pair"),
        (json.dumps(COMMON)[:-1] + ', "alt": "cat"}', "the key 'alt' is there twice"),
        (json.dumps(COMMON)[:-1] + f', "number": {"9" * 5000}}}', "a number has 5000 digits"),
        (json.dumps({**COMMON, "extra": json.loads("[" * 70 + "]" * 70)}), "nested deeper than"),
    ],
    ids=("surrogate", "key", "number", "depth"),
)
def test_a_value_of_an_array_that_breaks_a_rule_costs_only_its_row(tmp_path, text, words):
    rows = [json.dumps(COMMON), text, json.dumps(COMMON)]
    path = write(tmp_path, "[\n" + " ,\r\n\t".join(rows) + " ] \n")
    problems = []
    records = read_records(path, problems=problems)
    assert [record.id for record in records] == ["1", "3"]
    (problem,) = problems
    assert "entry 2" in problem
    assert words in problem


@pytest.mark.parametrize("end", ["", ",]", "] 3", "}"])
def test_an_array_that_is_not_json_is_refused_as_a_whole(tmp_path, end):
    with pytest.raises(DataError):
        read_records(write(tmp_path, '[{"src": "a", "src": "b"}' + end))
