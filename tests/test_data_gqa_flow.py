"""The six GQA layouts of the information-flow study: invented rows in each, broken ones, and the published slices."""

import re
from pathlib import Path

import pytest
from multrace.data import DataError, Question, read_data, read_records
from multrace.models import ModelError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gqa_flow"
needs_slices = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data/gqa_flow")

TYPES = "type_detailed,type_semantic,type_structural,operations,captions,image_w,image_h"
ONE = "central object w,central object h,central object x,central object y"
TWO = "object1 w,object1 h,object1 x,object1 y,object2 w,object2 h,object2 x,object2 y"
START, OPTIONS, OBJECT = "question_id,img_id,question,answer", "true option,false option", "central object name"
NAMES = "object1 name,object1 id,object2 name,object2 id"
CATEGORY = f"""{START},{OPTIONS},{OBJECT},central object id,{TYPES},{ONE}
0012,7,"Which animal is this, a puppy or a cat?",cat,cat,puppy,animal,31,categoryThisChoose,cat,choose,\
"[{{'operation': 'select'}}]","a cat. the sign says ""go"".
a cat on
a mat.",500,333,391,158,81,99
0013,8,"Which animals are that, giraffes or elephants?",giraffes,giraffes,elephant,animal,32,categoryThisChoose,cat,\
choose,[],giraffes.,500,375,350,197,150,178
"""
SAMPLES = {
    "ChooseCat": CATEGORY,
    "ChooseAttr": f"""{START},{OPTIONS},{OBJECT},central object id,central object attributes,all objects,{TYPES},{ONE}
21,9,Do the snow pants look yellow or red?,red,red,yellow,snow pants,41,"red, wet","pole, snow",chooseAttr,attr,choose,\
[],a hill.,500,327,63,39,147,109
""",
    "ChooseRel": f"""{START},{OPTIONS},{NAMES},{TYPES},{TWO}
31,10,Is the man to the right or to the left of the telephone?,left,left,right,phone,51,man,52,relChooser,rel,choose,\
[],a man.,500,375,56,30,373,339,294,375,0,0
""",
    "CompareAttr": f"""{START},{NAMES},question word,{TYPES},{TWO}
41,11,What do the doorway and the door frame have in common?,material,doorway,61,door frame,62,common,twoCommon,attr,\
compare,[],a door.,333,500,93,221,208,118,15,211,209,125
""",
    "LogicalObj": f"""{START},{NAMES},question word,{TYPES},{TWO}
51,12,Are there any umbrellas or pillows that are red?,yes,umbrella,71,pillows,-,common,existThatOr,obj,logical,[],\
a beach.,500,368,42,14,209,304,-,-,-,-
""",
    "QueryAttr": f"""{START},{OBJECT},central object id,question word,{TYPES},{ONE}
61,13,On which side of the picture is the end table?,right,end table,81,common,positionQuery,attr,query,[],\
a room.,500,375,70,137,430,166
62,14,On which side of the picture is the picture?,left,picture,82,common,positionQuery,attr,query,[],\
a wall.,500,375,72,82,50,42
""",
}


def write(folder, task, text=None):
    path = folder / f"sample_{task}.csv"
    path.write_text(SAMPLES[task] if text is None else text, encoding="utf-8")
    return path


def read(path, **options):
    return read_records(path, format="gqa-flow", **options)


def one(tmp_path, task, *changes):
    """The first record of a sample in which these words are replaced."""
    text = SAMPLES[task]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return read(write(tmp_path, task, text))[0]


def test_a_choice_between_two_answers_names_both_and_the_object(tmp_path):
    question, other = read(write(tmp_path, "ChooseCat"), images=tmp_path / "pictures")
    assert question == Question(
        id="0012",  # as it stands: as a number it would lose its zeros
        text="Which animal is this, a puppy or a cat?",
        answer="cat",
        foil="puppy",
        constraint="animal",
        spans={"object": "animal", "true_option": "cat", "false_option": "puppy"},
        image=tmp_path / "pictures" / "7.jpg",
        boxes=((81, 99, 81 + 391, 99 + 158),),
        extra={"task": "ChooseCat", "image_size": [500, 333], "true_option": "cat", "false_option": "puppy"},
    )
    assert list(question.spans) == ["object", "true_option", "false_option"]
    assert other.constraint is None, "the question says the plural"
    assert other.spans == {"true_option": "giraffes"} and other.foil == "elephant"


EXPECTED = {
    "ChooseCat": ({"object": "animal", "true_option": "cat", "false_option": "puppy"}, ((81, 99, 472, 257),)),
    "ChooseAttr": (
        {"object": "snow pants", "true_option": "red", "false_option": "yellow"},
        ((147, 109, 210, 148),),
    ),
    "ChooseRel": (
        {"object2": "man", "true_option": "left", "false_option": "right"},
        ((373, 339, 429, 369), (0, 0, 294, 375)),
    ),
    "CompareAttr": ({"object": "doorway", "object2": "door frame"}, ((208, 118, 301, 339), (209, 125, 224, 336))),
    "LogicalObj": ({"object2": "pillows"}, ((209, 304, 251, 318),)),
    "QueryAttr": ({"object": "end table"}, ((430, 166, 500, 303),)),
}


@pytest.mark.parametrize("task", SAMPLES)
def test_each_layout_gives_its_task_spans_and_boxes(tmp_path, task):
    question = one(tmp_path, task)
    assert question.extra["task"] == task
    assert (question.spans, question.boxes) == EXPECTED[task]
    assert (question.foil is not None) == task.startswith("Choose")


def test_words_that_the_question_says_twice_point_at_nothing(tmp_path):
    question = read(write(tmp_path, "QueryAttr"))[1]
    assert "picture" in question.text
    assert question.spans == {} and question.constraint is None, "but as the whole picture first"


def test_spans_are_written_as_in_the_question(tmp_path):
    question = one(tmp_path, "ChooseAttr", ("Do the snow pants look yellow", "Snow  Pants: are they YELLOW"))
    assert question.spans == {"object": "Snow  Pants", "true_option": "red", "false_option": "YELLOW"}
    assert "object" not in one(tmp_path, "ChooseAttr", ("the snow pants look", "the snow pantsuit look")).spans


def test_spans_name_the_groups_of_a_prompt(tmp_path, tiny_vlm, photo):
    question = read(write(tmp_path, "ChooseCat"), images=tmp_path)[0]
    prompt = tiny_vlm.prompt_for(question.with_image(photo))
    ids = prompt.inputs["input_ids"][0]
    for group, words in (("constraint", "animal"), ("constraint:true_option", "cat"), ("constraint:object", "animal")):
        assert words in tiny_vlm.decode([ids[position] for position in prompt.groups[group]])
    with pytest.raises(ModelError, match=re.escape("7.jpg")):  # noticed now, not when the file was read
        tiny_vlm.prompt_for(question)


def test_a_folder_is_read_whole_and_in_order(tmp_path):
    for task in SAMPLES:
        write(tmp_path, task)
    questions = read_records(tmp_path)
    assert [question.id for question in questions] == ["21", "0012", "0013", "31", "41", "51", "61", "62"]
    assert {question.extra["task"] for question in questions} == set(SAMPLES)


def test_the_task_is_read_off_the_file_name_where_no_type_says_it(tmp_path):
    text = SAMPLES["QueryAttr"].replace("type_semantic", "kind")
    path = tmp_path / "my_queryattr.csv"
    path.write_text(text)
    assert read(path)[0].extra["task"] == "QueryAttr"
    path = path.rename(tmp_path / "mine.csv")
    with pytest.raises(DataError, match=r"line 2: no task: .* looked for attr choose.* none of ChooseAttr, ChooseCat"):
        read(path)


BOX = {  # the cells of the box, in a picture of 500 x 375
    "a pixel too wide": ("71,137,430,166", (430, 166, 500, 303)),
    "half outside": ("100,100,-50,-25", (0, 0, 50, 75)),
    "fractions": ("70.5,137.0,429.5,166.2", (429, 166, 500, 304)),
    "dashes": ("-,-,-,-", None),
    "nothing": (",,,", None),
    "not a number": ("nan,NaN,nan,nan", None),
}


@pytest.mark.parametrize(("cells", "box"), BOX.values(), ids=BOX)
def test_boxes_are_cut_to_the_picture_or_not_there(tmp_path, cells, box):
    question = one(tmp_path, "QueryAttr", ("70,137,430,166", cells))
    assert question.boxes == (() if box is None else (box,))
    assert question.constraint == "end table"


def test_a_name_that_is_no_name_is_no_object(tmp_path):
    question = one(tmp_path, "LogicalObj", ("umbrellas or pillows", "umbrellas - or so -"), (",pillows,", ",-,"))
    assert question.spans == {} and question.constraint is None


BROKEN = {
    "empty answer": ("QueryAttr", ("table?,right,", "table?, ,"), r"line 2: no answer; fill it in"),
    "no question": ("QueryAttr", ("On which side of the picture is the end table?", ""), "line 2: no question;"),
    "no picture": ("QueryAttr", ("61,13,", "61,,"), "line 2: no img_id;"),
    "no option": ("ChooseAttr", ("red,red,yellow", "red,red,-"), "line 2: no false option in a question of ChooseAttr"),
    "box of letters": ("QueryAttr", ("430,166", "430,x"), "line 2: central object y is 'x'; it should be a number"),
    "half a box": ("QueryAttr", ("430,166", "430,-"), "line 2: central object y is '-'; it should be a number"),
    "endless box": ("QueryAttr", ("430,166", "430,inf"), "line 2: central object y is 'inf'"),
    "box outside": ("QueryAttr", ("430,166", "501,166"), r"line 2: the box .* outside the picture of 500 x 375 pixels"),
    "flat box": ("QueryAttr", ("70,137,430", "0,137,430"), "line 2: the box .* is empty or outside"),
    "no width": ("QueryAttr", ("500,375,70", "-,375,70"), "line 2: image_w is '-'; it should be a number"),
    "width of 0": ("QueryAttr", ("500,375,70", "0,375,70"), "line 2: image_w is '0'; .* 1 or more"),
    "cell too many": ("QueryAttr", ("430,166", "430,166,1"), "line 2: 19 cells instead of 18"),
    "cell too few": ("QueryAttr", ("430,166", "430"), "line 2: 17 cells instead of 18"),
    "third row": ("ChooseCat", ('elephants?",giraffes', 'elephants?",'), "line 5: no answer"),
    "open quotation mark": ("ChooseCat", ('a mat."', "a mat."), "line 2: this is not CSV: .*; compare"),
    "no column": ("QueryAttr", ("answer,", "reply,"), "line 1: no column 'answer' in the header 'question_id"),
    "no box column": ("ChooseRel", ("object2 h", "height"), "line 1: no column 'object2 h' .* 'object1' and 'object2'"),
    "half the options": ("ChooseAttr", ("false option", "lie"), "line 1: no column 'false option'"),
}


@pytest.mark.parametrize(("task", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_as_published_is_refused_with_file_and_line(tmp_path, task, change, message):
    with pytest.raises(DataError, match=rf"sample_{task}\.csv, {message}"):
        one(tmp_path, task, change)


FILES = {
    "empty": (b"", "line 1: the file is empty"),
    "header only": (SAMPLES["QueryAttr"].splitlines()[0].encode(), "line 1: no rows below the header"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1: .* is not UTF-8"),
    "JSON": (b'{"rows": 1}\n', "line 1: no column 'question_id', 'img_id'"),
    "UTF-16": (SAMPLES["QueryAttr"].encode("utf-16"), "line 1: .* is not UTF-8"),
    "Latin-1": (SAMPLES["QueryAttr"].replace("a room", "a caf\xe9").encode("latin-1"), r"line 2: 'a caf.*not UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_files_of_another_kind_are_refused(tmp_path, content, message):
    path = tmp_path / "QueryAttr.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)
    outcomes = [outcome for _, outcome in read_data(path, format="gqa-flow")]
    assert [isinstance(outcome, Question) for outcome in outcomes] == [False, True][: len(outcomes)]
    assert len(outcomes) == 1 + ("caf" in message)


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    for path, message in ((tmp_path / "none.csv", "no file or folder"), (tmp_path, r"no \*.csv in the folder")):
        with pytest.raises(DataError, match=message):
            read(path, problems=[])


def test_utf8_with_a_mark_and_windows_lines_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + SAMPLES["ChooseCat"].replace("\n", "\r\n").encode())
    assert read(path) == read(write(tmp_path, "ChooseCat"))


def test_bad_rows_cost_themselves_only_where_problems_are_collected(tmp_path):
    header, *rows = SAMPLES["QueryAttr"].splitlines()
    bad = rows[0].replace("right", ""), rows[0].replace("430,", "far,"), rows[0] + ",1"
    path = write(tmp_path, "QueryAttr", "\n".join([header, bad[0], *rows * 3, bad[1], bad[2], rows[1], ""]))
    write(tmp_path, "ChooseRel", "nothing,of,use\n1,2,3\n")
    problems = []
    questions = read(tmp_path, problems=problems)
    assert [question.text.split()[-1] for question in questions] == ["table?", "picture?"] * 3 + ["picture?"]
    assert [question.id for question in questions] == ["61", "62", "61~2", "62~2", "61~3", "62~3", "62~4"]
    places = [re.search(r"sample_(\w+)\.csv, line (\d+)", problem).groups() for problem in problems]
    assert places == [("ChooseRel", "1"), ("QueryAttr", "2"), ("QueryAttr", "9"), ("QueryAttr", "10")]
    with pytest.raises(DataError, match="line 2: no answer"):
        read(path)


# The published files, of which forty rows each may lie beside the checkout.


@needs_slices
def test_every_published_row_is_read():
    problems = []
    questions = read_records(SHARED, images="pictures", problems=problems)
    assert problems == [] and len(questions) == 6 * 40
    tasks = [question.extra["task"] for question in questions]
    assert {task: tasks.count(task) for task in SAMPLES} == dict.fromkeys(SAMPLES, 40)
    assert len({question.id for question in questions}) == 6 * 40
    assert all(question.image.parent == Path("pictures") and question.image.suffix == ".jpg" for question in questions)
    for task, question in zip(tasks, questions, strict=True):
        assert len(question.boxes) == (2 if task in ("ChooseRel", "CompareAttr") else 1)
        assert (question.extra.get("true_option") == question.answer) == task.startswith("Choose")
        width, height = question.extra["image_size"]
        assert all(right <= width and bottom <= height for _, _, right, bottom in question.boxes)


@needs_slices
def test_published_spans_are_found_by_a_prompt(tiny_vlm):
    questions = read_records(SHARED)
    for question in questions:
        if question.spans:
            prompt = tiny_vlm.prompt_for(question.with_image(None))
            assert {f"constraint:{name}" for name in question.spans} < set(prompt.groups)
    spans = [(question.extra["task"], *question.spans) for question in questions]
    assert spans.count(("ChooseAttr", "object", "true_option", "false_option")) == 40
    assert spans.count(("CompareAttr", "object", "object2")) == 40
    assert spans.count(("LogicalObj",)) == 28, "most of its questions ask in the plural"
