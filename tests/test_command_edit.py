"""multrace edit on the embedded model: one request or a file of them, previews, traces made before, and bad input."""

import json
import math
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import multrace as mt
import pytest
import torch
from multrace.data import World
from multrace.editing import preview
from multrace.editing.changes import WeightChange
from multrace.editing.evaluation import sizes
from multrace.editing.moments import own, second_moments
from multrace.models import VisionLanguageModel, capture
from multrace.scripts import (
    NAMES,
    NEXT,
    CommandError,
    RequestOptions,
    edit_rows,
    editor,
    parse_place,
    request_of,
    variants,
)
from multrace.scripts.edit import Edit
from multrace.scripts.edit_options import make_editor
from multrace.scripts.main import app
from multrace.scripts.options import BASELINES, GRADIENT_EDITORS
from multrace.workflow import Place

pytestmark = pytest.mark.usefixtures("unproven", "load_once")

QUICK = {"steps": "12"}  # enough where it does not matter whether the edit takes


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Pictures and questions of the world in a folder."""

    folder: Path
    rows: tuple[dict[str, str | None], ...]
    """Lines of a file of edits, each picture with a name of its own."""
    answers: tuple[str, ...]
    """What the model says now."""
    other: Path
    """The picture of something else of the first one's kind."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def asked(self, **changes: str | list[str] | None) -> list[str]:
        """Arguments that edit the first row; changes replace an option's value, or leave it out (None)."""
        row = self.rows[0]
        options: dict[str, object] = {name: row[name] for name in ("question", "constraint", "target")}
        options |= {"image": str(self.folder / row["image"]), "where": "5", "out": str(self.out)}
        words = ["edit"]
        for name, value in (options | changes).items():
            if value is not None:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name.replace('_', '-')}", *(str(each) for each in values)]
        return words

    def all(self, rows: Sequence[dict[str, object]] = (), **changes: str | list[str] | None) -> list[str]:
        """Arguments that edit every row."""
        return self.asked(data=self.file(*rows), question=None, constraint=None, target=None, image=None, **changes)

    def file(self, *rows: dict[str, object]) -> str:
        path = self.folder / "edits.jsonl"
        path.write_text("\n".join(map(json.dumps, rows or self.rows)), encoding="utf-8")
        return str(path)

    def picture(self, index: int) -> str:
        return str(self.folder / self.rows[index]["image"])

    def report(self) -> dict[str, object]:
        return json.loads((self.out / "report.json").read_text(encoding="utf-8"))

    def edits(self) -> dict[str, object]:
        """The report of a file of edits."""
        return json.loads((self.out / "summary" / "edit.json").read_text(encoding="utf-8"))

    def prompt(self, vlm: VisionLanguageModel, index: int) -> mt.Prompt:
        return vlm.prompt(self.picture(index), self.rows[index]["question"], constraint=self.rows[index]["constraint"])


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    world = World()
    cases = [world.edit_cases("outdated", "choose")[index] for index in (0, 1, 2)]
    rows = []
    for number, case in enumerate(cases):
        record = world.question(case.fact)
        world.picture(world.entities[case.fact.entity], 0).image.save(tmp_path / f"{number}.png")
        row = {"id": f"fact {number}", "image": f"{number}.png", "target": case.target}
        rows.append(row | {"question": record.text, "constraint": record.constraint})
    first = world.entities[cases[0].fact.entity]
    peer = next(each for each in world.of_kind(first.kind) if each is not first)
    world.picture(peer, 0).image.save(tmp_path / "other.png")
    answers = tuple(case.fact.answer for case in cases)
    (tmp_path / "empty").mkdir()
    return Desk(folder=tmp_path, rows=tuple(rows), answers=answers, other=tmp_path / "other.png")


# ---- one request ----


def test_an_edit_is_reported_and_can_be_loaded(
    desk: Desk, tiny_vlm: VisionLanguageModel, capsys: pytest.CaptureFixture
):
    assert app(desk.asked(where="trace", corrupt=f"swap:{desk.picture(1)}", trace_after=[])) == 0
    printed = capsys.readouterr().out
    report = desk.report()
    (request,) = report["requests"]
    target, prompt = desk.rows[0]["target"], desk.prompt(tiny_vlm, 0)
    assert request["answers"] == {"before": desk.answers[0], "with the edit": target, "after undo": desk.answers[0]}
    assert request["says_target"]
    assert report["undone_bit_for_bit"]
    assert f"layer {request['place']['layer']}, token 'last'" in printed
    assert printed.count("traced again") == len(request["shift"]) == 3
    delta = mt.Delta.load(desk.out / "edit.safetensors")
    assert tiny_vlm.answers([prompt]) == [desk.answers[0]]
    with delta.applied(tiny_vlm):
        assert tiny_vlm.answers([prompt]) == [target]
    (name,) = delta.changes
    weight, change = tiny_vlm.weight(name).double(), delta.changes[name]
    dense = change.left.double() @ change.right.double()
    assert report["weights"][0]["relative"] == pytest.approx((dense.norm() / weight.norm()).item(), rel=1e-5)


def test_prompts_that_go_with_a_request(desk: Desk):
    extra = {"context_image": [desk.picture(0)], "also_image": [desk.picture(1)], "also_text": ["Who is it?"]}
    extra |= {"also_question": ["Who plays?"], "keep_question": ["What colour is the sign?"]}
    assert app(desk.asked(keep_image=[desk.picture(2)], **extra, **QUICK)) == 1  # too few steps for so many prompts
    (request,) = desk.report()["requests"]
    assert [request[part] for part in ("contexts", "rewrite_prompts", "preserve_prompts")] == ["1", "3", "2"]


def test_variants_of_the_picture_become_contexts(desk: Desk, tiny_vlm: VisionLanguageModel):
    words = desk.rows[0]
    asked = {"question": words["question"], "target": words["target"], "constraint": words["constraint"]}
    for count in (0, 1, 4):
        options = RequestOptions(image=desk.picture(0), context_image=(desk.picture(1),), augment=count, **asked)
        request, augmentation = request_of(options, tiny_vlm), variants(count)
        request = request if augmentation is None else augmentation.of(request)
        assert len(request.contexts) == 1 + count
        pictures = {
            tiny_vlm.prompt_for(question).images[0].tobytes() for question in (request.question, *request.contexts)
        }
        assert len(pictures) == 2 + count


def test_variants_of_a_file_count_for_records_with_a_picture(desk: Desk):
    rows = (desk.rows[0], desk.rows[1] | {"image": None, "constraint": None})
    assert app(desk.all(rows=rows, augment="2", **QUICK)) == 1  # too few steps
    assert [request["contexts"] for request in desk.edits()["requests"]] == ["2", "0"]


@pytest.mark.parametrize(("weight", "flips"), [("0.001", 1), ("inf", 0)])
def test_a_dry_run_writes_nothing_and_tells_what_would_change(
    desk: Desk, weight: str, flips: int, capsys: pytest.CaptureFixture
):
    """In layer 0 the key is the wording: an edit there fires for another picture, unless its key is kept."""
    before = sorted(desk.folder.rglob("*"))
    assert app(desk.asked(where="0", keep_image=str(desk.other), preserve_weight=weight, dry_run=[])) == 0
    printed = capsys.readouterr().out
    assert sorted(desk.folder.rglob("*")) == before
    assert f"{flips} of 1 answers that should stay would change" in printed
    assert printed.count("would change from") == flips
    assert "% of the norm of model.language_model.layers.0.mlp.down_proj.weight (rank 2)" in printed
    assert "this was a dry run" in printed


def test_a_preview_measures_what_the_naive_way_does(desk: Desk, tiny_vlm: VisionLanguageModel):
    vlm, projection = tiny_vlm, tiny_vlm.down_projection(5)
    prompts = [desk.prompt(vlm, index) for index in range(3)]
    requests = [
        mt.EditRequest(question=prompts[0], target=desk.rows[0]["target"], preserve_prompts=(prompts[2],)),
        mt.EditRequest(question=prompts[1], target=desk.rows[1]["target"]),
    ]
    untouched = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    delta = mt.MultEdit(layer=5, steps=12, preserve_weight=1e-3).edit(vlm, requests)
    found = preview(vlm, requests, delta, progress=False)
    assert all(torch.equal(weight, untouched[name]) for name, weight in vlm.model.state_dict().items())
    kept = next(each for each in found.neighbours if each.stays)
    own = next(each for each in found.neighbours if each.request == 1)
    change = delta.changes[projection.name]
    assert len(found.neighbours) == 3
    assert (kept.request, kept.before, kept.flips) == (0, desk.answers[2], kept.after != kept.before)
    assert slow_ratio(vlm, projection, prompts[2], desk.answers[2], change) == pytest.approx(
        (kept.at_token, kept.anywhere), rel=1e-4
    )
    others = change.only(change.owners != 1)
    assert slow_ratio(vlm, projection, prompts[1], desk.answers[1], others) == pytest.approx(
        (own.at_token, own.anywhere), rel=1e-4
    )
    assert sizes(vlm, delta)[0].rank == change.rank


def slow_ratio(
    vlm: VisionLanguageModel, projection: mt.models.Projection, prompt: mt.Prompt, answer: str, change: WeightChange
) -> tuple[float, float]:
    """(at the answer's positions, anywhere): largest |D k| / |W k|, with D written out."""
    dense, weight = change.left.double() @ change.right.double(), projection.weight.detach().double()
    full = prompt.with_answer(answer)
    with capture(vlm, [projection], inputs=True) as read, torch.no_grad():
        vlm.logits(full)
    ratios = [((dense @ key).norm() / (weight @ key).norm()).item() for key in read[projection][0].double()]
    return max(ratios[prompt.groups["last"][0] :]), max(ratios)


def test_shares_count_keys_by_what_they_ask_for(tiny_vlm: VisionLanguageModel, desk: Desk):
    requests = [
        mt.EditRequest(question=desk.prompt(tiny_vlm, index), target=desk.rows[index]["target"]) for index in (0, 1)
    ]
    delta = mt.MultEdit(layer=5, steps=12).edit(tiny_vlm, requests)
    (name,) = delta.changes
    change = delta.changes[name]
    moved = change.keys.double() @ (change.left.double() @ change.right.double()).T
    for index, share in enumerate(delta.shares(delta.retained(tiny_vlm))):
        own = change.owners == index
        asked = change.residuals[own].double()
        assert share == pytest.approx(((moved[own] * asked).sum() / asked.square().sum()).item(), abs=1e-4)


# ---- endings, siblings and their leak ----


def by_name(desk: Desk, **changes: object) -> list[str]:
    """Arguments that edit a fact that the model is asked by name."""
    words = {"question": "Who founded Previco?", "constraint": "Previco", "target": "Pruro", "image": None}
    return desk.asked(**words | {"where": "5", "steps": "2"} | changes)


NAMED = [entity.name for entity in World().of_kind("company")][1:9]


def test_the_printed_edit_and_the_report_say_what_leaks(desk: Desk, capsys: pytest.CaptureFixture):
    names = desk.folder / "names.txt"
    names.write_text("\n".join(["", *NAMED, " "]), encoding="utf-8")
    assert app(by_name(desk, dry_run=[], sibling_names=str(names))) == 0
    dry = capsys.readouterr().out
    assert app(by_name(desk, sibling_names=str(names))) == 1  # too few steps
    printed, (request,) = capsys.readouterr().out, desk.report()["requests"]
    line = f"predicted leak   {request['leak']:.0%} at the same question about others, "
    line += f"{request['leak_own']:.0%} at other questions about the subject"
    assert line in dry.splitlines() and line in printed.splitlines()
    assert 0 < request["leak_own"] < 1 and 0.9 < request["share"] < 1
    (settings,) = [mt.Delta.load(desk.out / "edit.safetensors").settings]
    assert settings["siblings"] == str(mt.editing.Siblings(names=tuple(NAMED)))
    assert app(by_name(desk, siblings="none")) == 1
    assert "leak" not in capsys.readouterr().out
    assert "leak" not in desk.report()["requests"][0]
    assert mt.Delta.load(desk.out / "edit.safetensors").settings["siblings"] == "None"


def test_a_file_of_edits_has_a_column_for_what_leaks(desk: Desk, capsys: pytest.CaptureFixture):
    rows = [
        {"id": name, "question": f"Who founded {name}?", "constraint": name, "target": "Pruro"} for name in NAMED[:2]
    ]
    names = desk.folder / "names.txt"
    names.write_text("\n".join(NAMED), encoding="utf-8")
    assert app(desk.all(rows=rows, sibling_names=str(names), steps="2")) == 1
    printed, requests = capsys.readouterr().out, desk.edits()["requests"]
    for request in requests:
        own = f"{request['leak_own']:.1%}" if "leak_own" in request else "-"
        assert f"{request['leak']:.1%} / {own}" in printed
    assert "leak: predicted share of a change at the same question about others / at others about" in printed
    assert app(desk.all(rows=rows, siblings="none", steps="2", out=str(desk.folder / "none"))) == 1
    assert "leak" not in capsys.readouterr().out


def test_pictures_of_others_are_kept(desk: Desk, tiny_vlm: VisionLanguageModel):
    folder = desk.folder / "others"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    for number in range(1, 3):
        (folder / f"{number}.png").write_bytes(Path(desk.picture(number)).read_bytes())
    prompt = tiny_vlm.prompt(folder / "2.png", desk.rows[0]["question"])
    moved, (said,) = [], tiny_vlm.answers([prompt])
    for more in ({"sibling_pictures": str(folder)}, {"siblings": "none"}):
        assert app(desk.asked(where="0", steps="2", preserve_weight="inf", out=str(desk.folder / "a"), **more)) == 1
        delta = mt.Delta.load(desk.folder / "a" / "edit.safetensors")
        moved.append(slow_ratio(tiny_vlm, tiny_vlm.down_projection(0), prompt, said, delta.changes.popitem()[1]))
    assert moved[0][0] < 0.1 * moved[1][0]


@pytest.mark.parametrize("ending", ["own", "stop", "none"])
def test_an_ending_is_asked_for_by_name(desk: Desk, ending: str):
    assert app(by_name(desk, ending=ending, siblings="none", steps="1")) == 1
    delta = mt.Delta.load(desk.out / "edit.safetensors")
    (change,) = delta.changes.values()
    assert delta.settings["ending"] == ending
    assert change.rank == (1 if ending == "none" else 2)  # the word, and its end


def test_settings_of_siblings_make_an_editor():
    options = Edit(siblings="auto", ending="none")
    assert make_editor(options, layer=5) == mt.MultEdit(layer=5, ending="none")
    rome = replace(options, editor="rome", moment_weight=0.0, ridge_fraction=0.1)
    assert make_editor(rome, layer=5).siblings == mt.editing.Siblings()
    assert make_editor(replace(rome, siblings=None), layer=5).siblings is None
    assert make_editor(Edit(preset="paper"), layer=2).siblings is None


# ---- a file of requests ----


def test_a_file_of_edits_is_one_edit(desk: Desk, tiny_vlm: VisionLanguageModel, capsys: pytest.CaptureFixture):
    done = desk.rows[2] | {"target": desk.answers[2], "constraint": None}
    path = desk.file(*desk.rows[:2], done)
    alone = {"question": None, "constraint": None, "target": None, "image": None}
    assert app(desk.asked(data=path, where="trace", corrupt=NEXT, **alone)) == 0
    printed, report = capsys.readouterr().out, desk.edits()
    assert [request["status"] for request in report["requests"]] == ["edited", "edited", "nothing to do"]
    assert "edited     2 of 3 requests; 3 now say their target" in printed
    assert [request["name"] for request in report["requests"]] == ["fact 0", "fact 1", "fact 2"]
    assert any("no constraint span" in note for note in report["notes"])
    with mt.Delta.load(desk.out / "summary" / "edit.safetensors").applied(tiny_vlm):
        answers = tiny_vlm.answers([desk.prompt(tiny_vlm, index) for index in range(3)])
    assert answers == [desk.rows[0]["target"], desk.rows[1]["target"], desk.answers[2]]


def test_pictures_are_swapped_among_records_of_one_question_if_they_can(desk: Desk):
    def swaps(*rows: dict[str, str | None]) -> list[str | None]:
        asked = edit_rows(RequestOptions(data=Path(desk.file(*rows)), corrupt=NEXT), traced=True)
        return [record.question.corrupt and record.question.corrupt.removeprefix("swap:") for _, record in asked]

    first, second, third = desk.rows
    assert first["question"] == second["question"] != third["question"]
    pictures = [desk.picture(index) for index in range(3)]
    assert swaps(first, third, second) == [pictures[1], pictures[1], pictures[0]]
    assert swaps(first, second | {"image": None, "constraint": None}, third) == [pictures[2], None, pictures[0]]
    with pytest.raises(CommandError, match="needs records with different pictures"):
        swaps(first, second | {"image": first["image"]})


def test_a_picture_swapped_for_itself_takes_the_place_of_the_others(desk: Desk, capsys: pytest.CaptureFixture):
    assert app(desk.all(where="trace", corrupt=f"swap:{desk.picture(0)}", dry_run=[], **QUICK)) == 0
    printed = capsys.readouterr().out
    assert printed.count("takes the site of the average") == 1
    assert "'fact 0' takes the site of the average" in printed
    assert not desk.out.exists()


def test_wrong_lines_are_skipped_and_listed(desk: Desk, capsys: pytest.CaptureFixture):
    rows = [desk.rows[0], desk.rows[1] | {"target": " "}, desk.rows[2] | {"image": "gone.png"}]
    words = desk.all(rows=rows)
    assert app(words) == 1
    printed = capsys.readouterr().out
    assert "1 record done, 2 rows unreadable" in printed
    assert "line 2" in printed and "no picture at" in printed
    assert [request["name"] for request in desk.edits()["requests"]] == ["fact 0"]
    desk.file(desk.rows[0])
    assert app(words) == 0  # unreadable rows may be taken out
    assert app(desk.all(rows=rows[1:], out=str(desk.folder / "none"), model=str(desk.folder / "no model"))) == 2
    assert "there is no record to analyse; row 1" in capsys.readouterr().err  # the file is read before the model


# ---- where ----

RANGES: dict[str, tuple[str, Place]] = {
    "range": ("3-5", Place(layer=5, token="last", spread=3, reason="as asked")),
    "range and group": ("0-1:constraint_last", Place(layer=1, token="constraint_last", spread=2, reason="as asked")),
    "range of one": ("4-4:-2", Place(layer=4, token=-2, spread=1, reason="as asked")),
    "from the end": ("-2", Place(layer=-2, token="last", reason="as asked")),
}


@pytest.mark.parametrize(("where", "place"), RANGES.values(), ids=RANGES)
def test_a_range_of_layers_shares_the_work(where: str, place: Place):
    assert parse_place(where) == place


def test_layers_share_the_work_and_old_keys_are_weighed(
    desk: Desk, tiny_vlm: VisionLanguageModel, capsys: pytest.CaptureFixture
):
    prompts = [desk.prompt(tiny_vlm, index) for index in range(3)]
    path = second_moments(tiny_vlm, prompts, layers=(4, 5)).save(desk.folder / "moments.safetensors")
    asked = {"editor": "memit", "moments": str(path), "ridge_fraction": "0.01", "moment_weight": "5", **QUICK}
    streams = {"earlier_weight": "1", "norm_anchor": "pilot", "norm_pilot": "7", "growth_limit": "2"}
    streams |= {"null_share": "0.5", "null_refresh": "9", "change_limit": "1e3"}
    assert app(desk.asked(where="4-5", **asked, **streams)) == 1  # too few steps
    delta = mt.Delta.load(desk.out / "edit.safetensors")
    given = {name: delta.settings[name] for name in streams}
    assert given == {**streams, "earlier_weight": "1.0", "growth_limit": "2.0", "change_limit": "1000.0"}
    assert [*delta.changes] == [tiny_vlm.down_projection(layer).name for layer in (4, 5)]
    assert {name: delta.settings[name] for name in ("editor", "spread", "moment_weight", "steps")} == {
        "editor": "MEMIT",
        "spread": "2",
        "moment_weight": "5.0",
        "steps": "12",
    }
    for weightless in ({"editor": "multedit"}, {"editor": "memit", "moment_weight": "0"}):
        assert app(desk.asked(where="4-5", **{"moments": str(path), **weightless})) == 2
        assert f"--moments plays no part, since {weightless['editor']} would not" in capsys.readouterr().err


def test_old_keys_are_weighed_without_any_file(
    desk: Desk, tiny_vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(own, "LEAST", 24)
    monkeypatch.setattr(own, "MOST", 24)
    assert app(desk.asked(editor="rome")) == 0
    target = desk.rows[0]["target"]
    with mt.Delta.load(desk.out / "edit.safetensors").applied(tiny_vlm):
        assert tiny_vlm.answers([desk.prompt(tiny_vlm, 0)]) == [target]
    assert app(desk.asked(editor="rome", moments="own", out=str(desk.folder / "again"))) == 0
    assert (desk.folder / "again" / "edit.safetensors").read_bytes() == (desk.out / "edit.safetensors").read_bytes()
    assert app(desk.asked(editor="multedit", moments="own")) == 2
    assert "--moments plays no part" in capsys.readouterr().err


def test_a_trace_made_before_says_where(desk: Desk, tiny_vlm: VisionLanguageModel, capsys: pytest.CaptureFixture):
    swap, prompt = mt.SwapImage(desk.picture(1)), desk.prompt(tiny_vlm, 0)
    words = {"sites": ("hidden", "mlp"), "positions": ("constraint_last", "last"), "progress": False}
    trace = mt.causal_trace(tiny_vlm, prompt, corruption=swap, **words)
    path = str(trace.save(desk.folder / "trace.safetensors"))
    assert app(desk.asked(where=None, trace=path, dry_run=[], **QUICK)) == 0
    site = trace.edit_site()
    assert f"layer {site.layer}, token {site.token!r}: {site.reason}" in capsys.readouterr().out
    assert app(desk.asked(where=None, trace=path, question=desk.rows[2]["question"], constraint=None)) == 2
    assert "this trace is of the question" in capsys.readouterr().err
    replace(trace, model="another").save(path)
    assert app(desk.asked(where=None, trace=path)) == 2
    assert "this trace is of 'another'" in capsys.readouterr().err
    assert not desk.out.exists()


# ---- bad input: one line, exit code 2, nothing left behind ----


def test_a_file_of_edits_is_one_gradient_step(desk: Desk, tiny_vlm: VisionLanguageModel, capsys: pytest.CaptureFixture):
    step = {"editor": "ultraedit", "where": "5-6"}
    bad = {"id": "bad", "image": "missing.png", "question": "Who?", "target": "Pruro"}
    assert app(desk.all([*desk.rows, bad], **step)) == 1
    assert "missing.png" in capsys.readouterr().out
    delta = mt.Delta.load(desk.out / "edit.safetensors")
    assert [*delta.changes] == [tiny_vlm.down_projection(layer).name for layer in (5, 6)]
    assert len(desk.report()["requests"]) == len(delta.requests) == len(desk.rows)
    assert desk.report()["undone_bit_for_bit"]
    with delta.applied(tiny_vlm):
        said = tiny_vlm.answers([desk.prompt(tiny_vlm, index) for index in range(len(desk.rows))])
    assert [each["answers"]["with the edit"] for each in desk.report()["requests"]] == list(said)
    assert app(desk.all(retry_failed=[], **step)) == 2
    assert "--retry-failed belongs to editors that search for values" in capsys.readouterr().err


BAD: dict[str, tuple[dict[str, object], str]] = {  # name: changed options, what the line must say
    "layer that is not there": ({"where": "40"}, "cannot edit at --where 40: no layer 40 in"),
    "range from above": ({"where": "5-3"}, "no place '5-3'"),
    "two numbers of layers": ({"where": "4-5", "spread": "3"}, "--where 4-5 and --spread 3 disagree"),
    "unknown token": ({"where": "5:nowhere"}, "cannot edit at token 'nowhere'"),
    "gradient step by a trace": ({"editor": "ultraedit", "where": "trace"}, "pass --where LAYER or --where FIRST-LAST"),
    "gradient step at a token": ({"editor": "ultraedit", "where": "5:constraint_last"}, "not 'constraint_last'"),
    "no moments": ({"editor": "rome", "moments": "none"}, "--moments is none; leave --moments out"),
    "moments of nothing": ({"moments": "{folder}/0.png"}, "is not a readable safetensors file"),
    "nothing to trace under": ({"where": "trace"}, "needs --corrupt"),
    "trace at a place": ({"trace": "{folder}/0.png"}, "belong to --where trace"),
    "no trace": ({"where": "trace", "trace": "{folder}/0.png"}, "{folder}/0.png"),
    "dry run that writes": ({"dry_run": [], "save_model": "{folder}/model"}, "--dry-run writes nothing"),
    "no request": ({"question": None}, "pass either --question with --target, or --data"),
    "no target": ({"target": None}, "the target of the edit is None"),
    "no file": ({"question": None, "constraint": None, "target": None, "image": None, "data": "gone"}, "'gone'"),
    "both": ({"question": None, "constraint": None, "data": "{folder}/edits.jsonl"}, "belongs to one request"),
    "variants of no picture": ({"image": None, "augment": "3"}, "--augment 3 needs a picture"),
    "variants below none": ({"augment": "-1"}, "--augment -1 needs"),
    "picture to keep": ({"keep_image": "{folder}/gone.png"}, "no picture at '{folder}/gone.png'"),
    "setting out of range": ({"clamp": "0"}, "pass clamp above 0"),
    "ending that there is not": ({"ending": "dot"}, "--ending"),
    "siblings that there are not": ({"siblings": "some"}, "--siblings"),
    "names and none": ({"siblings": "none", "sibling_names": "{folder}/0.png"}, "--siblings none keeps none"),
    "no names": ({"sibling_names": "{folder}/gone.txt"}, "cannot read '{folder}/gone.txt'"),
    "names in a picture": ({"sibling_names": "{folder}/0.png"}, "cannot read '{folder}/0.png'"),
    "empty names": ({"sibling_names": "/dev/null"}, "'/dev/null' has no text; write one per line"),
    "no folder of pictures": ({"sibling_pictures": "{folder}/0.png"}, "'{folder}/0.png' is no folder"),
    "folder without pictures": ({"sibling_pictures": "{folder}/empty"}, "'{folder}/empty' holds no picture"),
    "siblings of a gradient step": ({"editor": "ultraedit", "siblings": "auto"}, "has no setting 'siblings'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(changes: dict[str, object], message: str, desk: Desk, capsys: pytest.CaptureFixture):
    def placed(value: object) -> object:
        return value.replace("{folder}", str(desk.folder)) if isinstance(value, str) else value

    assert app(desk.asked(**{name: placed(value) for name, value in changes.items()})) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert placed(message) in said.err
    assert said.err.count("\n") == 1
    assert not desk.out.exists()


# ---- editors by name ----


@pytest.mark.parametrize("name", NAMES)
def test_every_editor_has_a_name_and_sessions(name: str, desk: Desk, tiny_vlm: VisionLanguageModel):
    settings = {"in-context": {}, "ft-bf": {"epochs": 1}, "lora-bf": {"epochs": 1}}.get(name, {"steps": 1})
    settings |= {} if name in BASELINES else {"moment_weight": 0.0, "null_threshold": None, "ridge_fraction": 0.1}
    settings = {"step_size": 2.0, "ridge_fraction": 0.1} if name in GRADIENT_EDITORS else settings
    made = editor(name, layer=5, **settings)
    request = mt.EditRequest(question=desk.prompt(tiny_vlm, 0), target=desk.rows[0]["target"])
    with made.start(tiny_vlm) as session:
        change = session.edit([request], progress=False)
    assert change.settings == made.as_text()
    assert change.requests[0]["target"] == request.target
    with change.applied(tiny_vlm):
        pass


def test_spread_is_the_editors_own_as_far_as_there_are_layers():
    assert [editor("memit", layer=layer).spread for layer in (7, 1, 0)] == [3, 2, 1]
    assert editor("memit", layer=7, spread=2).spread == 2
    assert editor("multedit", layer=7).spread == 1


def test_a_gradient_step_changes_the_layers_up_to_the_one_that_is_named():
    assert [editor("ultraedit", layer=layer).layers for layer in (7, 0, -1)] == [(6, 7), (0,), (-2, -1)]
    assert editor("stableedit", layer=6, spread=3, step_size=1.0, warm_up=2) == mt.editing.StableEdit(
        layers=(4, 5, 6), step_size=1.0, warm_up=2
    )
    assert editor("ultraedit", layer=6, preset="paper") == mt.editing.UltraEdit.paper(layers=(5, 6))
    with pytest.raises(CommandError, match="3 layers up to layer 1 do not exist"):
        editor("ultraedit", layer=1, spread=3)


def test_a_preset_is_what_was_published_and_settings_go_over_it():
    paper = editor("multedit", layer=2, preset="paper")
    assert (paper, paper.clamp, paper.ridge) == (mt.MultEdit.paper(layer=2, token="last"), 1e-4, 0.01)
    assert editor("multedit", layer=2, preset="paper", clamp=math.inf).clamp == math.inf
    assert editor("ft", layer=1, preset="paper").learning_rate == 5e-4
    assert editor("ft", layer=1, projection="attention").projection == "attention"
    assert editor("ft", layer=1, projection="mlp").projection == "mlp"


def test_baselines_train_breadth_first_by_name():
    made = editor("ft-bf", layer=5, epochs=3, held_out=0.0, learning_rate=1e-3)
    order = mt.editing.BreadthFirst(epochs=3, held_out=0.0)
    assert made == mt.editing.FineTune.breadth_first(layer=5, learning_rate=1e-3, order=order)
    assert editor("ft-bf", layer=5, preset="paper", mini_batch=8) == replace(
        mt.editing.FineTune.locft(layer=5), order=mt.editing.BreadthFirst(epochs=25, mini_batch=8, held_out=0.0)
    )
    assert editor("lora-bf", layer=5, patience=1).order == mt.editing.BreadthFirst(patience=1)


@pytest.mark.parametrize("name", ["ft", "ft-l", "ft-bf"])
def test_fine_tuning_trains_the_layers_of_a_range(name: str):
    made = editor(name, layer=6, spread=2)
    assert (made.layer, made.layers) == (None, (5, 6))
    assert editor(name, layer=-1, spread=2).layers == (-2, -1)
    assert editor(name, layer=6, spread=1) == editor(name, layer=6)
    with pytest.raises(CommandError, match="3 layers up to layer 1 are more than there are; pass at most 2"):
        editor(name, layer=1, spread=3)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "editor": (lambda: editor("remit", layer=1), "no editor 'remit'; pass one of multedit, rome"),
    "preset": (lambda: editor("rome", layer=1, preset="best"), "no preset 'best'"),
    "no preset": (lambda: editor("lora", layer=1, preset="paper"), "lora has no published constants"),
    "setting": (
        lambda: editor("lora", layer=1, clamp=4.0),
        "lora has no setting 'clamp'; leave it out, or pass one of steps",
    ),
    "steps of epochs": (
        lambda: editor("ft-bf", layer=1, steps=4),
        "ft-bf has no setting 'steps'; leave it out, or pass one of learning_rate.*epochs, mini_batch, held_out",
    ),
    "epochs of steps": (lambda: editor("ft", layer=1, epochs=4), "ft has no setting 'epochs'"),
    "setting of all": (
        lambda: editor("rome", layer=1, rank=4),
        "rome has no setting 'rank'; leave it out, or pass one of learning_rate",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_editors_that_there_are_not(make: Callable[[], object], message: str):
    with pytest.raises(CommandError, match=message):
        make()


@pytest.fixture
def nearly_full_disk() -> Iterator[None]:
    """No file can grow beyond two megabytes: an edit fits, the embedded model does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_model_loses_no_edit(desk, capsys, nearly_full_disk):
    assert app(desk.asked(**QUICK, save_model=str(desk.folder / "model"))) == 2
    assert "cannot save a model to" in capsys.readouterr().err
    assert sorted(path.name for path in desk.out.iterdir()) == ["edit.safetensors", "report.json"]
    assert len(mt.Delta.load(desk.out / "edit.safetensors").requests) == 1
    assert not (desk.folder / "model").exists()
