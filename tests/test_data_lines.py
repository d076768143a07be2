"""Our own lines: what is written is read back equal, and what is wrong with a line is one line and costs only that."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from multrace.data import DataError, EditRecord, Probe, Question, check_data, read_lines, schema, write_lines
from multrace.data.facts import PROBE_KINDS
from PIL import Image

QUESTION = {"question": "Who founded the company in this photo?", "image": "logo.jpg", "constraint": "the company"}
EDIT = {**QUESTION, "id": "a", "target": "Ada"}
WORDS = "who founded the company is this é 公司 'quoted' \"said\" back\\slash 😀 tab\t zero\u200bwidth A, b?".split(" ")


@pytest.fixture
def write(tmp_path):
    def make(*lines: object) -> Path:
        path = tmp_path / "lines.jsonl"
        texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
        path.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts))
        return path

    return make


def records(path: Path, **options: object) -> list[object]:
    return [record for _, record in read_lines(path, **options)]


# ---- what is written is read back ----


def some_question(rng: random.Random, folder: Path, own: Question | None = None) -> Question:
    """A random question; one that belongs to a record shares the record's text, picture or constraint now and then."""

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 8))).strip() or "who"

    def maybe(value):
        return value if rng.random() < 0.4 else None

    def picture() -> Path:
        return rng.choice([folder, folder / "sub folder", folder.parent]) / f"{rng.randint(0, 3)}.jpg"

    text = own.text if own and rng.random() < 0.3 else words()
    pictures = rng.choice([None, picture(), (picture(), picture())])
    return Question(
        text=text,
        image=own.image if own and rng.random() < 0.3 else pictures,
        id=rng.choice(["", f"q{rng.random()}"]),
        constraint=own.constraint
        if own and rng.random() < 0.3
        else rng.choice([None, words(), (words(), rng.randint(-1, 3)), (words(), "all")]),
        spans={name: rng.choice([words(), (words(), 1)]) for name in rng.sample(["object", "true_option", "text"], 2)}
        if rng.random() < 0.3
        else {},
        replacement=maybe(words()),
        answer=maybe(words()),
        answers=tuple(words() for _ in range(rng.randint(0, 2))),
        foil=maybe(words()),
        boxes=tuple((rng.randint(0, 5), 2, rng.randint(6, 9), 3) for _ in range(rng.randint(0, 2))),
        corrupt=maybe(rng.choice(["noise:0.5", f"swap:{folder / 'x.jpg'}", f"mean:{folder / 'x'},/y.png", "swap:"])),
        template=maybe("Question: {question} Answer:"),
        extra=rng.choice([{}, {"source": [1, None, {"a": 0.5}], "note é": "x"}]),
    )


def some_record(rng: random.Random, folder: Path, number: int) -> Question | EditRecord:
    own = some_question(rng, folder)
    if rng.random() < 0.4:
        return replace(own, id=f"question {number}")

    def some() -> tuple[Question, ...]:
        return tuple(some_question(rng, folder, own) for _ in range(rng.randint(0, 2)))

    return EditRecord(
        id=f"record {number}",
        question=own,
        target=f"{rng.choice(WORDS)} x",
        old=rng.choice([None, "old"]),
        contexts=some(),
        rewrite_prompts=some(),
        preserve_prompts=some(),
        essence=some(),
        probes=tuple(
            Probe(
                kind=rng.choice(PROBE_KINDS),
                question=question,
                answer=rng.choice(WORDS),
                hops=rng.choice([None, 1, 4]),
                needs=rng.choice([(), ("record 1", "b")]),
            )
            for question in some() + some()
        ),
        group=rng.choice(["", "g"]),
        extra=rng.choice([{}, {"case_id": 3}]),
    )


def wholly_equal(one: object, other: object) -> bool:
    """Equal in every field; `==` on mappings and tuples compares all of them."""
    return type(one) is type(other) and vars(one) == vars(other)


@pytest.mark.parametrize("seed", range(20))
def test_random_records_are_read_back_equal(seed, tmp_path):
    rng = random.Random(seed)
    written = [some_record(rng, tmp_path, number) for number in range(30)]
    back = list(read_lines(write_lines(tmp_path / "all.jsonl", written)))
    assert [number for number, _ in back] == list(range(1, 31))
    for (_, record), original in zip(back, written, strict=True):
        assert wholly_equal(record, original), (record, original)
    again = write_lines(tmp_path / "again.jsonl", (record for _, record in back))
    assert again.read_bytes() == (tmp_path / "all.jsonl").read_bytes()


def test_a_file_moves_with_its_pictures(tmp_path, write):
    old, new = tmp_path / "old", tmp_path / "new"
    question = Question(text="Who?", image=old / "pictures" / "a.jpg", corrupt=f"swap:{old / 'b.jpg'}")
    path = write_lines(old / "lines.jsonl", [question])
    assert json.loads(path.read_text()) == {"image": "pictures/a.jpg", "question": "Who?", "corrupt": "swap:b.jpg"}
    new.mkdir()
    moved = path.rename(new / "lines.jsonl")
    (record,) = records(moved)
    assert record.image == new / "pictures" / "a.jpg" and record.corrupt == f"swap:{new / 'b.jpg'}"
    (elsewhere,) = records(moved, images=tmp_path / "pool")
    assert elsewhere.image == tmp_path / "pool" / "pictures" / "a.jpg"
    (absolute,) = records(write({"question": "Who?", "image": str(tmp_path / "x.jpg")}), images="nowhere")
    assert absolute.image == tmp_path / "x.jpg"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = write_lines(tmp_path / "lines.jsonl", [Question(text="Who?")])
    before = path.read_bytes()
    picture = Image.new("RGB", (2, 2))
    with pytest.raises(DataError, match="a picture in memory cannot stand in a file of lines; save it"):
        write_lines(path, [Question(text="What?"), Question(text="Where?", image=picture)])
    with pytest.raises(DataError, match="half a surrogate"):
        write_lines(path, [Question(text="What \ud800?")])
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["lines.jsonl"]
    with pytest.raises(DataError, match="cannot write .*: .*; choose a folder that you may write to"):
        write_lines(path / "below_a_file.jsonl", [Question(text="What?")])


# ---- what an entry inherits ----


def test_an_entry_completes_itself_from_its_record(write, tmp_path):
    line = {
        **EDIT,
        "template": "Q: {question}",
        "contexts": [{"image": "other.jpg"}],
        "rewrite_prompts": [{"question": "Is the company here?"}, {"question": "Who?", "template": None}],
        "preserve_prompts": [{"image": "other.jpg", "constraint": None}, {"image": None, "constraint": "photo"}],
        "probes": [
            {"kind": "no_picture"},
            {"kind": "rephrase", "question": "Is the company the company?"},
            {"kind": "related_text", "question": "Is the company old?", "answer": "yes"},
            {"kind": "related_picture", "question": "Is the company old?", "answer": "yes", "image": ["1", "2"]},
        ],
    }
    (record,) = records(write(line))
    logo, other = tmp_path / "logo.jpg", tmp_path / "other.jpg"
    text, words, template = QUESTION["question"], "the company", "Q: {question}"
    assert record.question == Question(text=text, image=logo, constraint=words, template=template)
    assert record.contexts == (replace(record.question, image=other),)
    assert record.rewrite_prompts == (
        replace(record.question, text="Is the company here?"),
        Question(text="Who?", image=logo),
    )
    assert record.preserve_prompts == (
        Question(text=text, image=other, template=template),
        Question(text=text, constraint="photo", template=template),
    )
    assert [(probe.question.text, probe.question.image, probe.question.constraint) for probe in record.probes] == [
        (text, None, words),
        ("Is the company the company?", logo, None),
        ("Is the company old?", None, words),
        ("Is the company old?", (tmp_path / "1", tmp_path / "2"), words),
    ]


def test_a_constraint_with_a_number_is_inherited_where_it_means_the_same(write):
    own = {"question": "A car by a car?", "constraint": ["car", 1], "target": "no"}
    entries = [{"image": "x.jpg"}, {"question": "Is the car red?"}, {"question": "Is the car by a car?"}]
    (record,) = records(write({**own, "contexts": entries}))
    assert [entry.constraint for entry in record.contexts] == [("car", 1), "car", None]


def test_a_probe_has_one_answer(write):
    kept, moved = Question(text="Who?", answer="Bo"), Question(text="Who else?", answer="Bo")
    assert Probe(kind="unrelated", question=kept).answer == "Bo"
    assert Probe(kind="unrelated", question=kept, answer="Cy").answer == "Cy"
    assert Probe(kind="portability", question=kept).answer == "Bo"
    assert Probe(kind="rephrase", question=moved).answer is None, "the target decides, not what was right before"
    assert Probe(kind="unrelated", question=kept).question == Question(text="Who?")
    with pytest.raises(DataError, match="the hops of a portability probe are 0; give a whole number"):
        Probe(kind="portability", question=kept, hops=0)


# ---- what is wrong with a line ----


def test_unknown_keys_are_kept_unless_they_mean_a_known_one(write):
    (question, edit) = records(
        write({"question": "Who?", "difficulty": 3}, {**EDIT, "source": "web", "extra": {"n": 1}})
    )
    assert question.extra == {"difficulty": 3} and edit.extra == {"source": "web", "n": 1}
    for key, meant in {"img": "image", "questoin": "question", "alt": "target", "keep": "preserve_prompts"}.items():
        (error,) = records(
            write(
                {"question" if meant != "question" else "id": "Who?", "target": "x", key: "y"}
                if meant != "target"
                else {"question": "Who?", key: "y"}
            )
        )
        assert isinstance(error, DataError) and f"no key {key!r}; did you mean {meant!r}?" in str(error)


BAD = {  # line -> what its error says
    '{"question": 5}': "'question' is 5; write what to ask",
    '{"question": null}': "no 'question' (found nothing); add what to ask",
    '{"id": "a", "target": "x"}': "no 'question' (found 'id', 'target'); add",
    '{"question": " "}': "the question is empty",
    '{"question": "Q?", "target": null}': "no 'target' (found 'question'); add the new answer",
    '{"question": "Q?", "target": " "}': "the target of the edit of 'Q?' is ' '",
    '{"question": "Q?", "target": ["x"]}': "'target' is [\"x\"]; write the new answer, as text",
    '{"question": "Q?", "answer": true}': "'answer' is true; write the right answer, as text",
    '{"question": "Q?", "answers": "yes"}': "'answers' is \"yes\"; write a list of all right answers",
    '{"question": "Q?", "image": ""}': "'image' is \"\"; write the path",
    '{"question": "Q?", "image": "a\\u0000b"}': "'image' is \"a\\u0000b\"; write the path",
    '{"question": "Q?", "image": [3]}': "'image' is [3]; write the path",
    '{"question": "Q?", "constraint": ["Q", 1.0]}': "'constraint' is [\"Q\", 1.0]; write the words of the question",
    '{"question": "Q?", "spans": {"object": null}}': "'spans' is {\"object\": null}; write an object",
    '{"question": "Q?", "boxes": [[1, 2, 3]]}': "'boxes' is [[1, 2, 3]]; write where",
    '{"question": "Q?", "boxes": [[1, 2, 1, 3]]}': "the box [1, 2, 1, 3] of the question 'Q?' is empty",
    '{"question": "Q?", "extra": 3}': "'extra' is 3; write an object",
    '{"question": "Q?", "target": "x", "contexts": {}}': None,
    '{"question": "Q?", "target": "x", "contexts": {"image": "x"}}': "'contexts' is no list of objects; write more",
    '{"question": "Q?", "target": "x", "probes": [3]}': "'probes' is no list of objects; write questions that check",
    '{"question": "Q?", "target": "x", "contexts": [{"answer": "y"}]}': "names neither 'image' nor 'question'",
    '{"question": "Q?", "target": "x", "probes": [{"kind": 1, "image": "x"}]}': "'kind' of 'probes' 1 is 1; write the",
    '{"question": "Q?", "target": "x", "probes": [{"image": "x"}]}': "no 'kind' of 'probes' 1 "
    "(found 'question', 'image')",
    '{"question": "Q?", "target": "x", "probes": [{"kind": "x", "image": "x"}]}': "no kind of probe 'x'; use one of",
    '{"question": "Q?", "target": "x", "probes": [{"kind": "portability", "image": "x"}]}': "has no answer; add",
    '{"question": "Q?", "targets": "x"}': "no key 'targets'; did you mean 'target'?",
    '{"question": "Q?", "probes": []}': "'probes' belongs to an edit (found 'question', 'probes'); add 'target'",
    "[1]": "a list instead of an object; write each of its objects on a line of its own",
    "5": "a int instead of an object",
    "nul": "this is not JSON that can be used",
    '{"question": "Q?", "question": "R?"}': "the key 'question' is there twice",
    '{"question": "\\ud800"}': "half a surrogate pair",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_costs_itself_and_says_what_to_write(line, write):
    path = write({"question": "First?"}, "", line, {"question": "Last?"})
    first, third, last = read_lines(path)
    assert first == (1, Question(text="First?")) and last == (4, Question(text="Last?"))
    if BAD[line] is None:
        assert isinstance(third[1], EditRecord)
    else:
        assert third[0] == 3 and isinstance(third[1], DataError)
        message = str(third[1])
        assert BAD[line] in message and message.startswith(f"line 3 of {str(path)!r}: ") and "\n" not in message


def test_ids_are_given_once(write):
    one, error, other = records(write({**EDIT, "id": 7}, {"question": "Who?", "id": "7"}, {"question": "Who?"}))
    assert one.id == "7" and other.id == ""
    assert "line 2 of" in str(error) and "the id '7' is that of line 1 too; give each its own" in str(error)


def test_files_that_hold_nothing_are_errors(tmp_path, write):
    for content, message in {"": "it is empty", " \n\n": "it is empty"}.items():
        with pytest.raises(DataError, match=message):
            records(write(content))
    with pytest.raises(DataError, match=r"cannot read '.*none.jsonl': No such file"):
        records(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        records(tmp_path)


def test_a_line_too_long_for_memory_is_not_read(write, monkeypatch):
    monkeypatch.setattr("multrace.data.jsonl.LONGEST_LINE", 1000)
    long = {"question": "W" * 5000}
    error, question = records(write(long, {"question": "Who?"}))
    assert "line 1 of" in str(error) and "is longer than 1000 bytes" in str(error) and question.text == "Who?"


# ---- the schema ----


def test_a_written_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    steps, fsync, replace_file = [], os.fsync, Path.replace

    def synced(descriptor):
        fsync(descriptor)
        steps.append(("on the disk", os.fstat(descriptor).st_size))

    def replaced(path, target):
        steps.append(("in place", path.stat().st_size))
        return replace_file(path, target)

    path = write_lines(tmp_path / "lines.jsonl", [Question(text="Who?", id="a")])
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_lines(path, [Question(text="Who won?", id="a"), Question(text="When?", id="b")])
    size = path.stat().st_size
    assert steps == [("on the disk", size), ("in place", size)] and len(list(tmp_path.iterdir())) == 1


def test_the_schema_describes_every_key_and_its_examples_are_read(write):
    value = schema()
    for name, of in value["$defs"].items():
        assert all(each["description"] for each in of["properties"].values()), name
    examples = [example for of in value["$defs"].values() for example in of.get("examples", ())]
    assert len(examples) >= 2 and not any(isinstance(record, DataError) for record in records(write(*examples)))
    assert value["$defs"]["ProbeLine"]["properties"]["kind"]["enum"] == list(PROBE_KINDS)
    json.dumps(value)


# ---- damaged files ----


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four faults: bytes changed, cut out, repeated, swapped, and values of other types."""
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.choices(range(len(content) + 1), k=2))
        end = min(end, at + rng.choice([1, 4, 200]))
        piece = rng.choice(
            [
                bytes([rng.randrange(256)]),
                b"",
                content[at:end] * 2,
                b"null",
                b"[" * 70,
                b'"',
                b"{}",
                b"9" * 500,
                b"\\ud800",
            ]
        )
        content = content[:at] + piece + content[end:]
    return content


def check_damaged(tmp_path: Path, number: int, *, doctor: int) -> int:
    """The number of lines that were refused; every `doctor`-th file is checked and mended, too."""
    rng = random.Random(number)
    path = write_lines(tmp_path / "all.jsonl", [some_record(rng, tmp_path, each) for each in range(4)])
    content, errors = path.read_bytes(), 0
    for turn in range(number):
        path.write_bytes(damaged(content, rng))
        try:
            for _, record in read_lines(path):
                assert isinstance(record, Question | EditRecord | DataError)
                if isinstance(record, DataError):
                    errors += 1
                    assert "\n" not in str(record) and len(str(record)) < 1500
            if turn % doctor:
                continue
            report = check_data(path, fix=tmp_path / "clean.jsonl")
            assert report.rows and sum(finding.kind == "unreadable_row" for finding in report.findings) <= report.rows
        except DataError as error:
            assert "\n" not in str(error) and any(word in str(error) for word in ("empty", "format", "UTF-8")), error
    return errors


def test_damaged_lines_are_read_or_refused_in_one_line(tmp_path):
    assert check_damaged(tmp_path, 200, doctor=1) > 100


@pytest.mark.slow
def test_ten_thousand_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    assert check_damaged(tmp_path, 10_000, doctor=20) > 5000
