"""The study of a real model on the embedded one: parts against theorems, and the page, which repeats its numbers."""

import io
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multrace import VisionLanguageModel
from multrace.artefacts import drawing
from multrace.data import Question, World, world_questions
from multrace.data.worlds.flags import FlagWorld
from multrace.scripts.main import execute
from multrace.scripts.studies import real_model
from multrace.scripts.studies.real_facts import (
    CHOOSING,
    HALVES,
    REPORTING,
    Answers,
    capital_questions,
    counterfact_questions,
    known_questions,
    named_question,
    of_half,
    pictured_questions,
    with_answers,
    with_other_pictures,
)
from multrace.scripts.studies.real_figures import small_png, write_figures
from multrace.scripts.studies.real_model import PARTS, PictureStudy
from multrace.scripts.studies.real_numbers import best_threshold, mean_of, share_of, trace_numbers
from multrace.scripts.studies.real_page import DIFFERENT, FINDINGS, NOT_SEEN, SEEN, page
from multrace.scripts.studies.real_readings import BEST, NONE, ImageTokens, token_shares
from multrace.scripts.studies.real_traces import SubjectTrace, scaled_window, token_places
from multrace.tracing import knockout_probability
from multrace.workflow import Task, read_rows, run
from PIL import Image

SMALL = 60_000
"""Largest size of a figure in the documentation, in bytes."""


@dataclass(frozen=True)
class Measured:
    """All parts of the study on a few facts of the embedded model."""

    study: PictureStudy
    results: dict[str, Any]


def _questions(folder: Path) -> list[Question]:
    """Four facts of the embedded world, two of each half, each with the picture of another entity."""
    chosen = []
    for number, question in enumerate(world_questions(4)):
        other = folder / f"{number}.png"
        World().picture(World().entities[number + 7], 0).image.save(other)
        extra = {"country": str(number // 2), "relation": str(number % 2), "half": HALVES[number % 2]}
        answer = {"answer": question.answer, "right": number < 3}
        chosen.append(replace(question, corrupt=f"swap:{other}", extra={**extra, **answer}))
    return chosen


@pytest.fixture(scope="module")
def measured(tiny_vlm: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("study")
    asked = _questions(folder)
    known = [replace(question, extra={**question.extra, "right": True}) for question in asked]
    limits = {CHOOSING: 1, REPORTING: 2}
    study = PictureStudy(vlm=tiny_vlm, runs=folder / "runs", asked=asked, named=known, known=known, limits=limits)
    results = {
        **study.about(),
        **{part: study.measure(part) for part in PARTS if part not in ("rome", "noise by name")},
    }
    results["noise by name"] = results["noise"]
    results["rome"] = {**trace_numbers(folder / "runs" / "noise" / REPORTING), "known": {"capitals": [2, 4]}}
    return Measured(study=study, results=json.loads(json.dumps(results)))


# ---- the parts ----


@pytest.mark.parametrize("part", ["swap", "noise"])
def test_the_last_token_after_the_last_layer_brings_everything_back(measured: Measured, part: str):
    trace = measured.results[part]
    row = trace["rows"].index("last token")
    assert trace["kinds"]["hidden"]["effect"][row][-1] == pytest.approx(trace["total"][0], abs=1e-4)
    assert trace["clean"] - trace["corrupted"] == pytest.approx(trace["total"][0], abs=1e-4)
    assert abs(trace["kinds"]["mlp"]["effect"][row][0]) < abs(trace["total"][0])


def test_the_constraint_carries_what_the_picture_said(measured: Measured):
    """The embedded model was trained so that its first three layers bring it there, and nothing reads it later."""
    swap, picture = measured.results["swap"], measured.results["picture"]
    constraint = swap["kinds"]["hidden"]["effect"][swap["rows"].index("constraint")]
    (image,) = picture["kinds"]["hidden"]["effect"]
    assert constraint[2] > 0.8 * swap["total"][0] and abs(image[2]) < 0.05 * swap["total"][0]
    assert constraint[-1] == image[-1] == 0
    assert picture["total"] == swap["total"]
    assert "From layer 0 on, they bring back less than half of it" in _page({"picture": picture})


def test_peaks_are_chosen_on_one_half_and_read_on_the_other(measured: Measured):
    folders = {half: measured.study.runs / "swap" / half for half in HALVES}
    own, other = trace_numbers(folders[CHOOSING]), measured.results["swap"]
    assert other["chosen_on"] == 1 and own["chosen_on"] is None
    for kind, cells in other["kinds"].items():
        for row, peak in cells["peaks"].items():
            index = other["rows"].index(row)
            curve = own["kinds"][kind]["effect"][own["rows"].index(row)]
            assert curve[peak["layer"]] == pytest.approx(max(curve), abs=1e-5)
            assert peak["effect"][0] == cells["effect"][index][peak["layer"]]


def test_flows_through_the_constraint_and_the_answer_at_the_end(measured: Measured):
    flows, window = measured.results["flows"]["flows"], str(measured.results["flows"]["windows"][-1])
    assert flows["image -> question"][window]["strongest"][0] < -20
    assert flows["image -> last"][window]["change"][-1] == pytest.approx(0, abs=1)
    assert flows["question -> last"][window]["layer"] < measured.results["flows"]["layers"]
    last = measured.results["emergence"]["places"]["last"]
    assert last["leads"][-1][0] == 1 and last["ranks"][1][-1] == 1 and last["ranks"][1][0] > 1


def test_image_tokens_that_stay(measured: Measured, tiny_vlm: VisionLanguageModel):
    question = measured.study.known[0]
    prompt = tiny_vlm.prompt_for(question)
    count = len(prompt.groups["image"])
    row = ImageTokens(keep=(1, count)).compute(tiny_vlm, Task(record=question, number=0)).row
    assert row[f"{BEST} {count}"] and row["box tokens"] < count
    token = prompt.answer_tokens(question.extra["answer"])[0]
    everything = range(prompt.length)
    without = knockout_probability(tiny_vlm, prompt, "image", everything, answer_id=token)
    assert row[NONE] == (without > 0.5)
    tokens = measured.results["tokens"]
    assert tokens["subset"]["size"] == 4 and 0 < tokens["for_80"][0] < 1
    assert tokens["agreement"]["same_picture"][3] == 0  # no country has two known facts in one half


def test_nothing_is_dropped_before_the_first_layer_but_the_floor(measured: Measured):
    cliff = measured.results["cliff"]
    assert cliff["stays"][0][:3] == cliff["floor"][:3]
    assert cliff["stays"][-1][0] == 1 and cliff["cliff"] in cliff["layers"]
    assert cliff["chosen_on"] == len(list(read_rows(measured.study.runs / "cliff" / CHOOSING)["id"]))
    told = _page({"cliff": {**cliff, "chosen_on": 47}})
    assert "more than 5 % of the answers to 47 facts of the other half, which is 2 of them" in told
    shares = [f"{100 * row[0]:.0f} [" for row in cliff["stays"]]
    cells = told.split("| from layer 0 |")[1].split("\n")[2].split("| ")[1:]
    assert len(cells) == len(shares) == 8 and all(map(str.startswith, cells, shares))


def test_failure_is_predicted_from_answers_of_both_kinds_only(measured: Measured):
    failure = measured.results["failure"]
    assert failure["right"][0] == 0.5 and failure["right"][3] == 2
    assert "too few" in failure["problem"]  # one error cannot be in two folds


def test_a_second_run_computes_nothing(measured: Measured, monkeypatch: pytest.MonkeyPatch):
    for kind in (SubjectTrace, ImageTokens):
        monkeypatch.setattr(kind, "compute", None)
    for part in ("noise", "tokens"):
        assert json.loads(json.dumps(measured.study.measure(part))) == measured.results[part]


def test_rows_of_rome(tiny_vlm: VisionLanguageModel):
    assert scaled_window(48) == 10 and scaled_window(30) == 6 and scaled_window(2) == 1
    prompt = tiny_vlm.prompt(
        None, "Who founded the company in this photo in the year?", constraint="the company in this"
    )
    subject, last = prompt.groups["constraint"], prompt.groups["last"][0]
    places = token_places(prompt)
    assert places[0] == subject[0] and subject[-1] in places and places[-1] == last and subject[-1] + 1 in places
    assert len(places) == 6 and list(places) == sorted(places)


def test_long_states_of_late_layers_do_not_rank_image_tokens():
    mass = torch.tensor([[1.0, 3.0], [3.0, 1.0], *([[900.0, 100.0]] * 6)])
    assert token_shares(mass).tolist() == [0.5, 0.5] != (mass.sum(0) / mass.sum()).tolist()


# ---- the facts ----


def test_facts_about_flags(tiny_vlm: VisionLanguageModel, tmp_path: Path):
    world = FlagWorld()
    questions = pictured_questions(world, tmp_path, 16)
    assert len({question.extra["relation"] for question in questions[:4]}) == 4  # relations take turns
    with Image.open(questions[0].images[0]) as picture:
        expected = world.picture(world.country(questions[0].extra["country"]), 0).image
        assert picture.tobytes() == expected.tobytes()
    named = named_question(world, questions[0])
    assert named.id == questions[0].id and named.image is None
    answers = {question.id: question.answer if number else "Atlantis" for number, question in enumerate(questions)}
    judged = with_answers(questions, answers, world)
    assert [question.extra["right"] for question in judged] == [False] + [True] * 15
    halves = [of_half(judged, half, 99, right=None) for half in HALVES]
    flags = [{question.extra["country"] for question in half} for half in halves]
    assert sum(map(len, halves)) == 16 and not flags[0] & flags[1]
    assert questions[0].id not in {question.id for half in HALVES for question in of_half(judged, half, 99)}
    swapped = with_other_pictures(tiny_vlm, judged, world, tmp_path)
    for question in swapped:
        code = Path(question.corrupt.removeprefix("swap:")).name.split("-1.")[0]
        (other,) = [each for each in judged if each.extra["country"] == code and each.text == question.text]
        assert other.extra["half"] == question.extra["half"] and other.extra["answer"] != question.extra["answer"]


def test_known_facts_of_the_text_model(tiny_vlm: VisionLanguageModel, tmp_path: Path):
    row = {
        "case_id": 6,
        "prompt": "Draivo, that was created in",
        "target_new": "Philadelphia",
        "subject": "Draivo",
        "ground_truth": "Birmingham",
    }
    (tmp_path / "counterfact-edit.json").write_text(json.dumps([row]))
    (question,) = counterfact_questions(tmp_path / "counterfact-edit.json", tiny_vlm, 40)
    assert (question.constraint, question.answer) == ("Draivo", "Birmingham")
    assert not list(counterfact_questions(tmp_path / "counterfact-edit.json", tiny_vlm, 3))
    capitals = {each.id: each for each in capital_questions(FlagWorld())}
    assert capitals["capital fr"].text == "The capital of France is"
    answers = {question.id: "Birmingham in England", "capital fr": "Parisian", "capital it": "the city of Rome"}
    known = known_questions([question, *capitals.values()], answers)
    assert [each.id for each in known] == [question.id, "capital it"]


def test_answers_are_the_same_one_by_one_and_together(tiny_vlm: VisionLanguageModel, tmp_path: Path):
    questions = world_questions(2)
    run(tiny_vlm, Answers(batch=2), enumerate(questions, 1), tmp_path / "out", progress=False)
    rows = read_rows(tmp_path / "out")
    assert list(rows["answer"]) == [question.answer for question in questions]


def test_means_shares_and_thresholds():
    assert mean_of([1.0, 3.0])[::3] == [2.0, 2] and mean_of([1.0])[1] is None
    assert share_of([True, True, False, False])[::3] == [0.5, 4] and share_of([])[0] is None
    scores, right = [0.1, 0.2, 0.3, 0.4], [True, False, True, True]
    assert best_threshold(np.array(scores), np.array(right)) in (0.1, 0.3)
    assert best_threshold(np.array(scores), np.zeros(4, bool)) == float("inf")


# ---- the page ----


def _page(results: Mapping[str, Any]) -> str:
    return page(results, {})


def test_the_page_repeats_the_numbers(measured: Measured, tmp_path: Path):
    drawn = ("swap", "flows", "emergence", "tokens", "cliff", "failure")
    figures = write_figures({part: measured.results[part] for part in drawn}, tmp_path)
    text = page(measured.results, figures)
    for name in figures.values():
        assert f"({name})" in text and 0 < (tmp_path / name).stat().st_size < SMALL
    assert {*figures} == {*drawn} - {"failure"}
    for change in ("swap", "flows", "cliff", "tokens", "emergence"):
        other = deepcopy(measured.results)
        other[change]["count"] = 4711
        assert "4711" in _page(other) and "4711" not in text


def test_the_page_leaves_out_what_was_not_measured(measured: Measured):
    assert "## " not in _page({}) and "published |" not in _page({})
    only = _page({"cliff": measured.results["cliff"]})
    assert only.count("\n## ") == 2 and "arXiv 2406.06579" in only and "arXiv 2202.05262" not in only


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, NOT_SEEN),
        ({2: -80}, DIFFERENT),
        ({2: -80, 6: -30}, DIFFERENT),  # this window of seven layers still has layer 3, of the first stage
        ({2: -80, 8: -30}, SEEN),
        ({2: -80, 8: -4}, DIFFERENT),
        ({2: -80, 16: -30}, DIFFERENT),
    ],
)
def test_the_second_stage_of_the_picture_lies_apart_from_the_first(changes: dict, verdict: str):
    change = [changes.get(layer, 0) for layer in range(30)]
    cells = {"change": change, "low": [each - 1 for each in change], "high": [each + 1 for each in change]}
    results = {"flows": {"layers": 30, "windows": [1, 7], "flows": {"image -> question": {"7": cells}}}}
    (finding,) = [each for each in FINDINGS if "two stages" in each.claim]
    assert finding.judge(results)[0] == verdict


@pytest.mark.parametrize(
    ("layer", "effect", "verdict"),
    [(1, [0.2, 0.1, 0.3, 9], SEEN), (6, [0.2, 0.1, 0.3, 9], DIFFERENT), (1, [0.2, -0.1, 0.5, 9], NOT_SEEN)],
)
def test_a_finding_is_judged_by_place_and_certainty(measured: Measured, layer: int, effect: list, verdict: str):
    results = deepcopy(measured.results)
    results["noise"]["total"] = [0.5, 0.4, 0.6, 9]
    results["noise"]["kinds"]["mlp"]["peaks"]["last constraint token"] = {"layer": layer, "effect": effect}
    (finding,) = [each for each in FINDINGS if each.needs == ("noise",)]
    assert finding.judge(results)[0] == verdict
    assert f"layer {layer} of 8" in finding.judge(results)[1]


# ---- the command ----


def test_bad_requests_are_answered_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, words in (
        (["--parts", "flow"], "cannot measure --parts 'flow'"),
        (["--parts", "flows"], "no model to study"),
        (["--parts", "rome"], "needs the text model"),
        (["--asked", "1"], "--asked is 1"),
    ):
        assert execute(real_model.app, ["--out", str(tmp_path), *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_small_figures_keep_the_colours_of_rare_cells():
    values = torch.zeros(6, 30)
    values[-1, 23:] = torch.linspace(0.2, 0.4, 7)

    def drawn():  # anew for each file, since saving moves the parts of a figure
        kinds = ("hidden", "mlp", "attention")
        panels = [drawing.Panel(kind=kind, window=3, values=values, low=0.0, scale=0.4) for kind in kinds]
        words = {"titles": ("title", "subtitle"), "unit": "effect"}
        return drawing.heat_maps(panels, rows=list("abcdef"), stars=[False] * 6, **words)

    raw = io.BytesIO()
    drawn().savefig(raw, format="png", dpi=90)
    files = raw, io.BytesIO(small_png(drawn()))
    whole, small = (np.asarray(Image.open(file).convert("RGB"), int) for file in files)
    assert abs(small - whole).max() <= 5
