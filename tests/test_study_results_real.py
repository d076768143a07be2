"""The study of editors on a real text model: its runs on the embedded model, the halves, the scores, and the page."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from multrace import VisionLanguageModel
from multrace.artefacts import write_json
from multrace.data import Question, World, tiny_vlm_path
from multrace.data.facts import EDITED, GIVEN_TEXT, OTHER_SUBJECT, REPHRASE
from multrace.editing import ClosedFormEditor, EditError
from multrace.editing.evaluation import BEGINS, PERPLEXITY, ProbeRow
from multrace.editing.moments import Moments
from multrace.editing.siblings import other_subjects
from multrace.scripts import CommandError
from multrace.scripts.main import execute
from multrace.scripts.studies import results_real
from multrace.scripts.studies.results_real import ROWS
from multrace.scripts.studies.text_facts import COUNTERFACT, ZSRE, Facts, known_moments, own_texts, scores_of
from multrace.scripts.studies.text_page import CHOICE, NAME, choice_of, document, folder_of
from multrace.scripts.studies.text_rows import text_rows

SHARED = Path(__file__).parents[2] / "shared" / "data"
ALIKE = ("ultraedit", "multedit-bare")
"""An editor by gradients, whose stream has statistics, and one by a search."""

Study = Callable[..., int]


@pytest.fixture(scope="module")
def counterfact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six edits in EasyEdit's form about people of the embedded world, by name."""
    names = [entity.name for entity in World().entities[:7]]
    rows = [
        {
            "case_id": 10 * number,
            "prompt": f"Who founded {name}?",
            "subject": name,
            "target_new": "Pruro",
            "ground_truth": "Draivo",
            "rephrase_prompt": f"Who is the founder of {name}?",
            "locality_prompt": f"Who founded {other}?",
            "locality_ground_truth": "Draivo",
        }
        for number, (name, other) in enumerate(zip(names, names[1:], strict=False))
    ]
    path = tmp_path_factory.mktemp("counterfact") / "edit.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def study(counterfact: Path) -> Study:
    def started(out: Path, *options: str, rows: tuple[str, ...] = ALIKE, limit: int = 3) -> int:
        arguments = ["--model", str(tiny_vlm_path()), "--counterfact", str(counterfact), "--out", str(out)]
        arguments += ["--limit", str(limit), "--choosing", "1", "--texts", "8", "--only", *rows, *options]
        choice = choice_of(out, "counterfact", "multedit-bare")
        choice.parent.mkdir(parents=True, exist_ok=True)  # a search at an unfit place takes long
        write_json(choice, CHOICE, {"chosen": "layer 7, last", "worths": {"layer 7, last": None}, "edits": 0})
        return execute(results_real.app, arguments)

    return started


@pytest.fixture(scope="module")
def undisturbed(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert study(out, "--settings", "single", "sequence") == 0
    return out


def without_costs(text: str) -> str:
    """The page without the times and the memory in the last two columns, which differ from run to run."""
    return re.sub(r"\|[^|]*\|[^|]*\|$", "|", text, flags=re.MULTILINE)


def test_a_study_that_was_interrupted_gives_the_numbers_of_an_undisturbed_one(study, undisturbed, tmp_path):
    assert study(tmp_path, "--settings", "single", limit=2) == 0
    assert study(tmp_path, "--settings", "sequence") == 0
    folder = folder_of(tmp_path, "counterfact", "sequence", "ultraedit", 3)
    names = json.loads((folder / "records.json").read_text())["names"]
    shutil.rmtree(folder / "records" / names[-1])  # as if stopped before the last edit
    shutil.rmtree(folder / "summary")
    assert study(tmp_path, "--settings", "single", "sequence") == 0
    page = document(undisturbed)
    assert without_costs(document(tmp_path)) == without_costs(page)
    assert (undisturbed / NAME).read_text() == page
    assert len(re.findall(r"^\| (?:UltraEdit|… without siblings) \| 3 \| 1 \|", page, re.MULTILINE)) == 4


def test_the_page_says_what_is_not_run(undisturbed, tmp_path):
    page = document(undisturbed)
    single = page.split("## CounterFact: one edit at a time")[1].split("##")[0]
    assert len(re.findall(r"\| not run yet \|", single)) == len(ROWS) - len(ALIKE)
    assert "| *unedited* |" in single and "| UltraEdit | 3 | 1 |" in single
    assert "## CounterFact: in sequence, a hundred edits per step\n\nNot run yet." in page
    assert execute(results_real.app, ["--out", str(tmp_path), "--page-only", "--docs", str(tmp_path / "docs")]) == 0
    empty = (tmp_path / "docs" / NAME).read_text()
    assert "no model yet" in empty and empty.count("Not run yet.") == 6


def test_a_sequence_under_way_is_shown_up_to_its_last_measurement(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    folder = folder_of(tmp_path / "out", "counterfact", "sequence", "ultraedit", 3)
    names = json.loads((folder / "records.json").read_text())["names"]
    shutil.rmtree(folder / "records" / names[-1])
    part = document(tmp_path / "out").split("in sequence, one edit per step\n")[1].split("##")[0]
    assert "| UltraEdit | not run yet |" in part and "| … without siblings | 3 | 1 |" in part


def test_a_choice_is_kept(study, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "out")
    path = choice_of(tmp_path / "out", "counterfact", "ultraedit")
    choice = json.loads(path.read_text())
    assert choice["edits"] == 1 and choice["worths"][choice["chosen"]] == max(choice["worths"].values())
    path.write_text(path.read_text().replace(f'"chosen": "{choice["chosen"]}"', '"chosen": "layer 99"'))
    capsys.readouterr()
    assert study(tmp_path / "out", "--settings", "single") == 2
    assert str(path) in capsys.readouterr().err


def test_unknown_rows_and_missing_files_are_one_error_line(study, tmp_path, capsys):
    assert study(tmp_path, rows=("multedi",)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot measure --only multedi; pass some of multedit, " in error
    assert study(tmp_path, "--settings", "double") == 2
    assert execute(results_real.app, ["--out", str(tmp_path)]) == 2
    assert "pass --model DIR" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# ---- facts, scores and moments ----


def test_halves_share_no_edit_and_longer_sequences_end_with_what_was_not_chosen_on(counterfact):
    facts = Facts.read(counterfact, COUNTERFACT)
    ids = [record.id for record in (*facts.choosing, *facts.reporting)]
    assert len({*ids}) == len(ids) == 6
    assert facts.reported(2) == facts.reporting[:2]
    assert facts.reported(5) == (*facts.reporting, facts.choosing[2], facts.choosing[1])
    assert {record.question.template for record in facts.reporting} == {COUNTERFACT.template}
    assert {probe.question.template for record in facts.reporting for probe in record.probes} == {COUNTERFACT.template}


def _row(kind: str, before: str, after: str, *, old: str = "Rome", begins: tuple[float, float] = (0, 0)) -> ProbeRow:
    numbers = {} if kind == OTHER_SUBJECT else {BEGINS: begins}
    words = {"question": "?", "pictures": (), "new": "Paris", "old": old, "before": before, "after": after}
    return ProbeRow(record="1", kind=kind, hops=None, numbers=numbers, **words)


def test_scores_by_hand():
    text = ProbeRow(
        record="1",
        kind=GIVEN_TEXT,
        hops=None,
        **dict.fromkeys(("question", "new", "old", "before", "after"), ""),
        pictures=(),
        numbers={PERPLEXITY: (2.0, 3.0)},
    )
    scores = scores_of(
        [
            _row(EDITED, "Rome", "Paris, the city", begins=(0.0, 1.0)),
            _row(REPHRASE, "Rome", "Rome", begins=(0.0, 0.0)),
            _row(OTHER_SUBJECT, "Rome. It is", "Rome, which"),  # unchanged up to the mark, and right
            _row(OTHER_SUBJECT, "Rome", "Paris"),  # was right, and is spoilt
            _row(OTHER_SUBJECT, "Oslo", "Oslo"),  # unchanged, and wrong before and after
            text,
        ]
    )
    assert (scores.rewrite.after, scores.rephrase.after) == (1, 0)
    assert scores.unchanged.after == pytest.approx(2 / 3)
    assert (scores.right.before, scores.right.after) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert scores.kept_right == pytest.approx(0.5) and scores.perplexity == 1.5
    assert scores.worth == pytest.approx((1 + 0 + 2 / 3) / 3)
    nothing = scores_of([])
    assert nothing.rewrite is nothing.right is nothing.kept_right is nothing.perplexity is None and nothing.worth == 0


def test_moments_are_of_the_models_own_texts_and_are_kept(
    tiny_vlm: VisionLanguageModel, random_llama: VisionLanguageModel, tmp_path
):
    file = tmp_path / "texts.json"
    texts = own_texts(tiny_vlm, file, 3, max_new_tokens=5)
    assert own_texts(tiny_vlm, tmp_path / "again.json", 3, max_new_tokens=5) == texts
    assert own_texts(tiny_vlm, file, 2) == texts[:2]  # longer ones are not sampled: the file has enough
    path = known_moments(tiny_vlm, tmp_path / "moments.safetensors", [2, 3], texts)
    before = path.read_bytes()
    assert Moments.load(path).layers == (2, 3)
    assert known_moments(tiny_vlm, path, [3], texts).read_bytes() == before
    with pytest.raises(EditError):
        known_moments(random_llama, path, [3], texts)
    with pytest.raises(CommandError, match="texts of another model"):
        own_texts(random_llama, file, 2)


def test_no_sibling_begins_with_the_end_of_a_text(random_llama: VisionLanguageModel):
    """Random logits rank every token, the special ones included, which no prompt may spell."""
    question = Question(text="The capital of Rome is", constraint="Rome")
    assert "Rome" not in other_subjects(random_llama, question, number=random_llama.vocab)


@pytest.mark.parametrize("layers", [1, 4, 30])
def test_every_row_fits_every_depth(layers):
    for row in text_rows():
        for editor in row.candidates(layers).values():
            if isinstance(editor, ClosedFormEditor):
                assert 0 <= editor.place[0] - editor.spread + 1 <= editor.place[0] < layers
                assert not editor.needs_moments or row.moment_layers(layers)
    assert len({row.label for row in text_rows()}) == len(ROWS) == len({*ROWS})


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
def test_the_published_files_are_read_whole():
    counterfact = Facts.read(SHARED / "counterfact" / "counterfact-edit.json", COUNTERFACT)
    zsre = Facts.read(SHARED / "zsre" / "zsre_mend_train.json", ZSRE)
    assert [len(half) for facts in (counterfact, zsre) for half in (facts.choosing, facts.reporting)] == [
        1000,
        1000,
        150,
        150,
    ]
    assert len(counterfact.reported(2000)) == 2000
    questions = {record.question.key for record in counterfact.reporting}
    assert not questions & {record.question.key for record in counterfact.choosing}
