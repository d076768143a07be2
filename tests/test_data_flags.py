"""The flags world: its files are what SOURCES.md says, its questions point to constraints, its splits are fair."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from multrace.data import (
    DataError,
    FlagWorld,
    find_spans,
    flag_questions,
    flag_records,
    read_pictures,
    read_records,
    write_flags,
)
from multrace.data.worlds import flags
from multrace.data.worlds.flags import (
    HALVES,
    PHRASES,
    RELATIONS,
    SHARED_RELATIONS,
    SPLITS,
    SplitRow,
    answer_of,
    generator_of,
    read_countries,
    read_splits,
    write_splits,
)
from multrace.scripts.demos import FLAG_TOKENS, answers_about
from multrace.scripts.main import app
from multrace.scripts.studies import flags_splits
from PIL import Image, ImageChops

FOLDER = Path(flags.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "flags_world.md"


@pytest.fixture(scope="module")
def world() -> FlagWorld:
    return FlagWorld()


# ---- files ----


def test_every_flag_opens_and_all_of_them_are_small(world):
    files = sorted(path.stem for path in (FOLDER / "png").iterdir())
    assert files == [country.code for country in world.countries] and len(set(files)) == 254
    for country in world.countries:
        flag = world.flag(country)
        assert flag.mode == "RGBA" and flag.width == 100 and 30 <= flag.height <= 125
    assert sum(path.stat().st_size for path in (FOLDER / "png").iterdir()) < 300_000
    assert sum(country.is_country for country in world.countries) == 193
    with pytest.raises(DataError, match="no flag of 'xx'"):
        flags.flag_of("xx")


def _difference(world: FlagWorld, one: str, other: str) -> float:
    pictures = []
    for code in (one, other):
        flag = world.flag(world.country(code))
        pictures.append(Image.alpha_composite(Image.new("RGBA", flag.size, "white"), flag).convert("RGB"))
    small = [picture.resize((48, 32)) for picture in pictures]
    return float(np.asarray(ImageChops.difference(*small)).mean())


def test_countries_that_fly_another_ones_flag_have_its_picture(world):
    borrowed = {country.code: country.same_flag_as for country in world.countries if country.same_flag_as}
    assert len(borrowed) == 16 and not set(borrowed) & set(borrowed.values())
    differences = {code: _difference(world, code, owner) for code, owner in borrowed.items()}
    lookalikes = {"mc", "td"}
    assert {code for code, difference in differences.items() if difference} == lookalikes
    assert all(differences[code] < 11 for code in lookalikes)
    assert min(_difference(world, code, "fr") for code in ("nl", "lu", "it", "ru")) > 11


def test_facts_are_complete_and_neighbours_are_mutual(world):
    for country in world.countries:
        assert country.continent and country.name == country.name.strip()
        for code in country.neighbours:
            assert country.code in world.country(code).neighbours or country.code.startswith("gb-"), (
                country.code,
                code,
            )
    bare = {country.code for country in world.countries if not country.capital}
    assert bare == {"aq", "bv", "hm", "tk", "um"}
    assert all(
        country.capital and country.currency and country.languages for country in world.countries if country.is_country
    )


def test_sources_and_licences_are_named():
    text = (FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    for word in (
        "svg-country-flags",
        "public domain",
        "countries-list",
        "Copyright (c) 2014 Annexare Studio",
        "GeoNames",
    ):
        assert word in text
    assert "creativecommons.org/licenses/by/4.0" in text and "The above copyright notice" in text
    assert "Changes" in text


def test_a_table_that_lacks_a_column_is_refused(tmp_path):
    (tmp_path / "facts.csv").write_text("code,name\nfr,France\n")
    with pytest.raises(DataError, match="lacks the columns aliases, capital"):
        read_countries(tmp_path / "facts.csv")
    with pytest.raises(DataError, match="cannot read"):
        read_countries(tmp_path / "none.csv")


# ---- questions ----


def test_wordings_of_training_and_held_out_ones_are_disjoint():
    for relation in (*RELATIONS, *SHARED_RELATIONS):
        assert relation.held_out and not set(relation.templates) & set(relation.held_out)
        assert len(set(relation.wordings)) == len(relation.wordings)
    every = [template for relation in (*RELATIONS, *SHARED_RELATIONS) for template in relation.wordings]
    assert len(set(every)) == len(every) and len(set(PHRASES)) == 3


def test_the_page_shows_every_wording():
    page = PAGE.read_text(encoding="utf-8")
    for relation in (*RELATIONS, *SHARED_RELATIONS):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{relation.name}` |")]
        shown = re.sub(r"Canada|Austria", "{other}", row).replace("The flag in this photo", "{flag}")
        cells = [re.split(r" · ", cell.strip()) for cell in shown.strip("|").split(" | ")[1:]]
        assert [tuple(cell) for cell in cells] == [relation.templates, relation.held_out]


def test_spans_point_to_the_constraint_once(world):
    facts = {fact.relation.name: fact for fact in world.facts}
    assert set(facts) == {relation.name for relation in (*RELATIONS, *SHARED_RELATIONS)}
    for fact in facts.values():
        for template in range(len(fact.relation.wordings)):
            asked = [world.question(fact, template=template, phrase=phrase) for phrase in range(len(PHRASES))]
            asked += [world.question(fact, template=template, side=side) for side in ("left", "right")]
            asked += [world.question_by_name(fact, template=template)] if fact.relation.has_name else []
            for question in asked:
                assert len(find_spans(question.text, question.constraint)) == 1
                assert all(len(find_spans(question.text, words)) == 1 for words in question.spans.values())
                assert "{" not in question.text and question.text[0].isupper()


def test_the_other_phrases_word_the_same_question(world):
    name, capital = world.fact("us-name"), world.fact("us-capital")
    assert world.question(name, template=2).text == "The flag in this photo is the flag of"
    assert world.question(name, template=2, side="left").constraint == "The flag on the left"
    assert world.question(capital, side="right").text == "The capital of the country on the right is"
    assert world.question_by_name(capital).text == "The capital of the United States is"
    with pytest.raises(DataError, match="is a name"):
        world.question_by_name(name)
    with pytest.raises(DataError, match="no fact 'us-king'"):
        world.fact("us-king")


def test_no_question_about_a_picture_is_about_a_borrowed_flag(world):
    codes = {fact.country.code for fact in world.facts}
    assert len(codes) == 238 and not codes & {"mc", "td", "gf", "sj"}
    assert len({fact.id for fact in world.facts}) == len(world.facts) > 1900


def test_a_replacement_has_none_of_the_right_answers(world):
    for fact in world.facts[::37]:
        other = world.replacement(fact)
        replaced = flags.CountryFact(country=other, relation=fact.relation)
        assert not set(world.answers(fact)) & set(world.answers(replaced))


def test_the_answer_to_two_constraints_needs_both(world):
    shared = [fact for fact in world.facts if fact.other is not None]
    assert len(shared) > 600
    for fact in shared[::11]:
        one, other = (
            set(world.answers(flags.CountryFact(country=country, relation=fact.relation)))
            for country in (fact.country, fact.other)
        )
        assert set(world.answers(fact)) == one & other and one != other


# ---- answers ----


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris.\n\nThe capital", "Paris"),
        (' the U.S. dollar ("USD")', "the U.S. dollar"),
        (" St. John's, which", "St. John's"),
        ("\nNothing", "Nothing"),
        (" Washington, D.C.", "Washington"),
        (" euro; the", "euro"),
        ("", ""),
    ],
)
def test_an_answer_ends_at_the_first_stop(text, answer):
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("fact", "right", "wrong"),
    [
        ("ua-capital", ["Kyiv", "Kiev", "called Kyiv", "Kyiv and its"], ["Kyivan", "Lviv", "", "the capital"]),
        ("br-capital", ["Brasilia", "Brasília"], ["Rio de Janeiro"]),
        ("za-capital", ["Cape Town", "Pretoria"], ["Johannesburg"]),
        ("ca-currency", ["dollar", "Canadian dollar", "Canadian Dollars"], ["US dollar", "Canadian", "franc"]),
        ("sn-currency", ["franc", "CFA franc", "West African CFA franc"], ["French franc", "African currency"]),
        ("us-currency", ["U.S. dollar", "United States dollar"], ["Canadian dollar"]),
        ("th-continent", ["Asia", "Southeast Asia"], ["Southeast", "Africa"]),
        ("us-continent", ["North America"], ["South America", "America"]),
        ("gt-continent", ["Central America", "North America"], ["South America"]),
        ("ch-language", ["German", "Romansh"], ["Swiss", "English"]),
        ("mx-border", ["the United States of America", "Belize"], ["Canada"]),
        ("nl-name", ["Netherlands", "the Netherlands", "Holland"], ["Nether"]),
        ("ch-shared_language-it", [], []),
    ],
)
def test_truth_is_whole_words_whatever_their_case_and_accents(world, fact, right, wrong):
    if right:
        asked = world.fact(fact)
        assert [world.is_true(answer, asked) for answer in right + wrong] == [True] * len(right) + [False] * len(wrong)


def test_evasive_answers_are_not_definite(world):
    cases = {
        "au-capital": (["Sydney", "the city of Sydney"], ["the capital of Australia", "a city", "22 countries", ""]),
        "se-currency": (["Euro", "Ghana Dollar", "Swedish kronas"], ["local currency", "gold of their country"]),
        "ke-language": (["English", "French"], ["a blend of English and Swahili", "also the official language"]),
        "fj-continent": (["Africa", "West Africa"], ["the Pacific", "Earth"]),
        "fr-border": (["the United Kingdom"], ["22 countries", "the Mediterranean Sea"]),
    }
    for id, (definite, evasive) in cases.items():
        fact = world.fact(id)
        assert all(world.is_definite(answer, fact) for answer in definite), id
        assert not any(world.is_definite(answer, fact) for answer in evasive), id


# ---- pictures ----


def test_renderings_are_the_same_at_every_call_and_differ_by_number(world):
    france, sweden = world.country("fr"), world.country("se")
    first, again, second = (FlagWorld().picture(france, number) for number in (0, 0, 1))
    assert first.image.tobytes() == again.image.tobytes() and first.boxes == again.boxes
    assert first.image.tobytes() != second.image.tobytes() != world.picture(sweden, 1).image.tobytes()
    assert first.image.size == (128, 128) and first.image.mode == "RGB"
    pair = world.picture_of_two(france, sweden, 0)
    assert len(pair.boxes) == 2 and pair.boxes[0][0] < pair.boxes[1][0]


def test_training_has_other_random_numbers_than_held_out_renderings():
    held_out = generator_of("held out", "fr", 0).integers(1 << 62, size=4).tolist()
    assert held_out == generator_of("held out", "fr", 0).integers(1 << 62, size=4).tolist()
    others = [("train", 0), ("held out", "fr", 1), ("held out", "f", "r0"), ("held out", "fr0")]
    assert all(generator_of(*key).integers(1 << 62, size=4).tolist() != held_out for key in others)


def test_the_box_of_a_picture_holds_the_flag(world):
    """Of the flag of Vietnam, which is red, the red lies inside the box: more than half of it, and little outside."""
    inside, outside = [], []
    for number in range(12):
        picture = world.picture(world.country("vn"), number)
        pixels = np.asarray(picture.image, float)
        red = (pixels[..., 0] > 2 * pixels[..., 1]) & (pixels[..., 0] > 2 * pixels[..., 2]) & (pixels[..., 0] > 90)
        left, top, right, bottom = picture.boxes[0]
        assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128
        within = np.zeros((128, 128), bool)
        within[top:bottom, left:right] = True
        inside.append(red[within].mean())
        outside.append(red[~within].mean() if (~within).any() else 0.0)
    assert np.median(inside) > 0.4 and np.median(outside) < 0.1


def test_a_question_of_two_flags_has_the_box_of_its_own(world):
    fact, other = world.fact("jp-capital"), world.country("ke")
    left, right = (world.question_of_two(fact, other, side, 3) for side in ("left", "right"))
    assert left.text == "The capital of the country on the left is" and left.answer == right.answer == "Tokyo"
    assert left.boxes[0][0] < right.boxes[0][0] and left.image.tobytes() != right.image.tobytes()
    assert left.boxes == world.picture_of_two(fact.country, other, 3).boxes[:1]


# ---- splits ----


def _answers(world: FlagWorld) -> dict[str, tuple[str, str]]:
    """Answers as of a model: right about many, wrong about some, evasive about the rest, in a fixed pattern."""
    wrong = {
        "capital": "Sydney",
        "language": "Klingon",
        "continent": "Antarctica",
        "currency": "baht",
        "border": "Fiji",
    }
    answers = {}
    for number, fact in enumerate(world.facts):
        kind = fact.relation.name.removeprefix("shared_")
        said = (world.answers(fact)[0], wrong.get(kind, "Fiji"), "a land of")[number % 3]
        answers[fact.id] = (said, said if fact.relation.has_name else "")
    return answers


def test_splits_are_disjoint_and_their_halves_balanced(world):
    rows = world.splits_from(_answers(world))
    assert len({row.id for row in rows}) == len(rows) and {row.split for row in rows} == set(SPLITS)
    counts = Counter((row.split, row.relation, row.half) for row in rows)
    for split, relation in {(row.split, row.relation) for row in rows}:
        choosing, reporting = (counts[split, relation, half] for half in HALVES)
        assert abs(choosing - reporting) <= 1
    for split in SPLITS:
        sizes = [sum(row.split == split and row.half == half for row in rows) for half in HALVES]
        assert abs(sizes[0] - sizes[1]) <= 4
    assert rows == world.splits_from(dict(reversed(_answers(world).items())))


def test_a_split_holds_what_it_says(world):
    answers = {
        "jp-capital": ("Tokyo", "Tokyo"),
        "au-capital": ("Sydney", "Sydney"),
        "fr-capital": ("London", "Paris"),
        "fj-capital": ("the largest city", "the largest city"),
        "gl-capital": ("Copenhagen", "Copenhagen"),
        "pe-capital": ("Lima", "the capital of the country"),
        "se-capital": ("a city", "Stockholm"),
        "it-name": ("Italy", ""),
        "at-name": ("Peru", ""),
        "bo-name": ("a nation", ""),
    }
    split = {row.id: row.split for row in world.splits_from(answers)}
    assert split == {
        "jp-capital": "known",
        "it-name": "known",
        "au-capital": "wrong",
        "fr-capital": "wrong",
        "at-name": "wrong",
        "fj-capital": "long_tail",
        "gl-capital": "long_tail",
    }
    (row,) = [row for row in world.splits_from(answers) if row.id == "au-capital"]
    assert (row.answer, row.by_name, row.truth, row.country) == ("Sydney", "Sydney", "Canberra", "au")


def test_the_shipped_splits_follow_from_the_answers_in_them(world):
    assert world.splits_from({row.id: (row.answer, row.by_name) for row in world.splits}) == world.splits
    sizes = Counter(row.split for row in world.splits)
    assert sizes["known"] >= 200 and sizes["wrong"] >= 200 and sizes["long_tail"] >= 50
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{split}` | {count:,} |" in page for split, count in sizes.items())


def test_splits_survive_their_file_and_a_damaged_one_is_refused(world, tmp_path):
    rows = world.splits_from(_answers(world))
    path = write_splits(rows, tmp_path / "splits.csv")
    assert read_splits(path) == rows
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(",known,", ",unknown,", 1))
    with pytest.raises(DataError, match="split 'unknown'"):
        read_splits(path)
    path.write_text(re.sub(r",by_name,truth\n", "\n", text, count=1))
    with pytest.raises(DataError, match="lacks 'by_name'"):
        read_splits(path)
    with pytest.raises(DataError, match="none.csv.*pass a file that write_splits wrote"):
        read_splits(tmp_path / "none.csv")


# ---- records ----


def test_records_survive_their_file_and_their_probes_do_not_mix(world, tmp_path):
    row = SplitRow(
        id="au-capital", country="au", relation="capital", split="wrong", half="choosing",
        answer="Sydney", by_name="Sydney", truth="Canberra",
    )  # fmt: skip
    known = [world.fact(id) for id in ("jp-capital", "fr-capital", "au-continent", "se-currency", "au-language")]
    (record,) = flag_records([row], known, world=world, count=2)
    assert record.target == "Canberra" and record.old == "Sydney" and record.group == "wrong"
    kinds = Counter(probe.kind for probe in record.probes)
    assert kinds == {
        "other_picture": 2, "rephrase": 2, "rephrase_other_picture": 4, "by_name": 2, "same_question_other_picture": 2,
        "other_question_same_picture": 2, "unrelated": 1, "no_picture": 1,
    }  # fmt: skip
    assert all(probe.answer is None for probe in record.probes if not probe.stays)
    path = write_flags(tmp_path / "out", [record, *flag_questions(known, world=world)])
    again = read_records(path)
    assert [type(each).__name__ for each in again] == ["EditRecord"] + ["Question"] * 5
    assert again[0].target == record.target and len(again[0].probes) == len(record.probes)
    assert read_pictures(again[0].question.image)[0].tobytes() == record.question.image.tobytes()
    pictures = list((tmp_path / "out" / "pictures").iterdir())
    assert len(pictures) == 1 + 2 + 2 + 3, "the edited one, two renderings, two of two flags, and one per other flag"
    with pytest.raises(DataError, match="pass count=1"):
        flag_records([row], known, world=world, count=0)


def test_a_model_is_asked_by_picture_and_by_name(world, tiny_vlm):
    """The embedded model cannot read flags, so that it knows nothing here; its answers are those of `answers`."""
    facts = [world.fact(id) for id in ("fr-capital", "fr-name", "de-language", "ke-continent")]
    answers = answers_about(tiny_vlm, world, facts)
    assert list(answers) == [fact.id for fact in facts] and answers["fr-name"][1] == ""
    prompts = [
        tiny_vlm.prompt_for(world.pictured_question(facts[0], 0)),
        tiny_vlm.prompt(None, "The capital of France is"),
    ]
    said = tiny_vlm.answers(prompts, max_new_tokens=FLAG_TOKENS)
    assert answers["fr-capital"] == (answer_of(said[0]), answer_of(said[1]))
    rows = world.splits_from(answers)
    assert not [row for row in rows if row.split == "known"]
    assert f"long_tail {'choosing':10}" in flags_splits.sizes(rows)


def test_the_command_writes_questions_and_edits(world, tmp_path, capsys):
    table = write_splits(world.splits_from(_answers(world)), tmp_path / "splits.csv")
    arguments = ["--splits", str(table), "--limit", "2", "--probes", "1"]
    assert app(["data", "flags", str(tmp_path / "known"), "--split", "known", *arguments]) == 0
    assert app(["data", "flags", str(tmp_path / "wrong"), "--split", "wrong", "--half", "choosing", *arguments]) == 0
    out = capsys.readouterr().out
    assert "known/flags.jsonl (2 questions)" in out and "wrong/flags.jsonl (2 edits)" in out
    for folder in ("known", "wrong"):
        assert app(["data", "check", str(tmp_path / folder / "flags.jsonl")]) == 0
        assert "0 errors" in (out := capsys.readouterr().out) and "warning" not in out
    halves = {row.id: row.half for row in read_splits(table)}
    assert [halves[record.id] for record in read_records(tmp_path / "wrong" / "flags.jsonl")] == ["choosing"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "none.csv"], "cannot read the splits 'none.csv'"),
        (["--limit", "0"], "--limit is 0"),
        (["--probes", "0"], "--probes is 0"),
    ],
)
def test_bad_input_of_the_command_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert app(["data", "flags", "out", "--split", "known", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()
