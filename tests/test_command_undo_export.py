"""`multrace undo` and `multrace export`: what they write, and one line for whatever cannot be done."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace import editing
from multrace.data import EditRequest, Question, tiny_vlm_path
from multrace.editing import Delta, MultEdit, WeightChange
from multrace.editing.changes import History, load_edit, save_merged
from multrace.models import VisionLanguageModel, load
from multrace.scripts import CommandError
from multrace.scripts.main import parse
from safetensors.torch import load_file

Run = Callable[..., int]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("unproven"),
]


@pytest.fixture
def multrace() -> Run:
    """The commands, as the command line runs them, with errors let through."""

    def run(*arguments: object) -> int:
        work, options = parse([str(argument) for argument in arguments])
        return work(options)

    return run


def made(vlm: VisionLanguageModel, *, seed: int = 0, count: int = 3) -> Delta:
    """One key for each request, solved at a ridge of one in plain form."""
    projection, generator = vlm.down_projection(2), torch.Generator().manual_seed(seed)
    keys = torch.randn(count, projection.width, generator=generator)
    residuals = 30 * torch.randn(count, projection.hidden, generator=generator)
    left = torch.linalg.solve(keys @ keys.T + torch.eye(count), residuals).T
    parts = {"keys": keys, "residuals": residuals, "weights": torch.ones(count), "owners": torch.arange(count)}
    return Delta(
        changes={projection.name: WeightChange(left=left, right=keys, **parts)},
        fingerprints=vlm.fingerprint([projection.name]),
        model=vlm.name,
        requests=tuple({"question": f"What is number {index}?", "target": "red"} for index in range(count)),
    )


@pytest.fixture
def edit(tiny_vlm: VisionLanguageModel, tmp_path: Path) -> Path:
    return made(tiny_vlm).save(tmp_path / "edit.safetensors")


@pytest.fixture
def history(tiny_vlm: VisionLanguageModel, tmp_path: Path) -> Path:
    first = History().added("monday", made(tiny_vlm))
    with first.applied(tiny_vlm):
        return first.added("tuesday", made(tiny_vlm, seed=1)).saved(tmp_path / "history").folder


def factors(delta: Delta) -> list[torch.Tensor]:
    return [*next(iter(delta.factors.values()))]


@pytest.mark.parametrize("resolve", [False, True])
def test_undoing_every_request_says_how_to_reach_the_original_and_writes_nothing(
    resolve, multrace, edit, tmp_path, capsys
):
    flags = ["--resolve"] if resolve else []
    assert multrace("undo", "--edit", edit, "--request", 0, 1, 2, *flags, "--out", tmp_path / "less") == 0
    assert "answer without --edit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [edit]


@pytest.mark.parametrize("resolve", [False, True])
def test_undo_takes_requests_out_of_an_edit(resolve, multrace, edit, tmp_path, capsys):
    kept = edit.read_bytes()
    flags = ["--resolve"] if resolve else []
    assert multrace("undo", "--edit", edit, "--request", 0, 2, *flags, "--out", tmp_path / "less") == 0
    assert capsys.readouterr().out.splitlines()[0] == "0  'What is number 1?' -> 'red'"
    found, wanted = Delta.load(tmp_path / "less" / "edit.safetensors"), Delta.load(edit).without(0, 2, resolve=resolve)
    assert all(map(torch.equal, factors(found), factors(wanted)))
    assert torch.equal(factors(found)[0], factors(Delta.load(edit).without(0, 2))[0]) is not resolve
    assert edit.read_bytes() == kept


@pytest.mark.parametrize("resolve", [False, True])
def test_undo_takes_edits_out_of_a_history(resolve, multrace, history, tmp_path, capsys):
    flags = ["--resolve"] if resolve else []
    assert multrace("undo", "--edit", history, "--name", "monday", *flags, "--out", tmp_path / "less") == 0
    listing = capsys.readouterr().out
    assert ("monday" in listing) is not resolve and "tuesday" in listing
    found, before = load_edit(tmp_path / "less" / "history"), load_edit(history)
    assert isinstance(found, History) and found.names == ("tuesday",)
    later = before.entries[1].delta
    assert torch.equal(factors(found.composed())[0], factors(later)[0]) is not resolve
    assert multrace("undo", "--edit", history, "--name", "tuesday", "--request", 1, "--out", tmp_path / "some") == 0
    assert load_edit(tmp_path / "some" / "history").entries[1].withdrawn == (1,)


def test_export_writes_checks_and_says_so(multrace, edit, tmp_path, capsys, tiny_vlm):
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert multrace("export", "--edit", edit, "--peft", adapter, "--merged", merged) == 0
    said = capsys.readouterr().out
    assert said.count("3 of 3 answers are the same") == 2 and "retained" in said
    delta, prompt = Delta.load(edit), tiny_vlm.prompt(None, "What is number 1?")
    unedited = tiny_vlm.logits(prompt)
    with delta.applied(tiny_vlm):
        edited = tiny_vlm.logits(prompt)
    torch.testing.assert_close(load(merged, verify=False).logits(prompt), edited, rtol=1e-5, atol=1e-5)
    assert (edited - unedited).abs().max() > 0.01
    assert sorted(file.name for file in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_cut_to_a_rank_and_says_how_to_serve_it(multrace, tmp_path, capsys, dtype):
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    path = made(load(tiny_vlm_path(), dtype=dtype, verify=False)).save(tmp_path / "edit.safetensors")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    given = ["export", "--edit", path, "--dtype", dtype, "--serve-dtype", "bfloat16"]
    assert multrace(*given, "--peft", cut, "--rank", 2) == 0
    said = capsys.readouterr().out
    assert "rank 2 of 3; rank 3 would lose nothing; cut in the metric of the edit's keys" in said
    assert said.count("kept by the cut") == 3 and "the cut takes most from " in said
    assert "rounded to bfloat16, logits move by at most" in said and "beside the whole edit: " in said
    assert said.splitlines()[-1].endswith(f"--enable-lora --max-lora-rank 8 --lora-modules cut={cut}")
    assert multrace(*given, "--peft", whole) == 0
    said = capsys.readouterr().out
    assert "by the cut" not in said and "beside the whole edit" not in said and "--max-lora-rank 8" in said
    shapes = {
        folder: {min(tensor.shape) for tensor in load_file(folder / "adapter_model.safetensors").values()}
        for folder in (cut, whole)
    }
    assert shapes == {cut: {2}, whole: {3}}


def test_an_export_that_does_not_survive_serving_is_an_error(multrace, edit, tmp_path, monkeypatch):
    compare = editing.verify_export

    def broken(*given, **named):
        found = compare(*given, **named)
        return replace(found, cast=replace(found.cast, answers=tuple((one, "other") for one, _ in found.cast.answers)))

    monkeypatch.setattr(editing, "verify_export", broken)
    with pytest.raises(CommandError, match="not in the precision of --serve-dtype: .*0 of 3 answers stay"):
        multrace("export", "--edit", edit, "--merged", tmp_path / "merged", "--serve-dtype", "bfloat16")


def test_a_history_is_exported_as_one_model(multrace, history, tmp_path, tiny_vlm):
    merged = tmp_path / "merged"
    assert multrace("export", "--edit", history, "--merged", merged, "--question", "What is number 1?") == 0
    prompt, whole = tiny_vlm.prompt(None, "What is number 1?"), load_edit(history)
    with whole.applied(tiny_vlm):
        edited = tiny_vlm.logits(prompt)
    torch.testing.assert_close(load(merged, verify=False).logits(prompt), edited, rtol=1e-4, atol=1e-3)


BAD = {
    "nothing to take out": (["undo", "--edit", "EDIT"], "say which request to take out of .* numbers from 0 to 2"),
    "a name in an edit": (["undo", "--edit", "EDIT", "--name", "a"], "nothing has a name"),
    "a request out of range": (["undo", "--edit", "EDIT", "--request", "7"], "it has 3 requests"),
    "no name in a history": (["undo", "--edit", "HISTORY"], "one of monday, tuesday"),
    "an unknown name": (["undo", "--edit", "HISTORY", "--name", "sunday"], "there are: monday, tuesday"),
    "no file": (["undo", "--edit", "missing", "--request", "0"], "missing"),
    "a truncated file": (["undo", "--edit", "TRUNCATED", "--request", "0"], "truncated"),
    "nothing to write": (["export", "--edit", "EDIT"], "--peft DIR, --merged DIR"),
    "one folder for two": (["export", "--edit", "EDIT", "--peft", "x", "--merged", "x"], "choose two folders"),
    "a folder in use": (["export", "--edit", "EDIT", "--merged", "USED"], "is not empty"),
    "a rank of a merged model": (["export", "--edit", "EDIT", "--merged", "x", "--rank", "4"], "pass --peft DIR"),
    "a rank of nothing": (["export", "--edit", "EDIT", "--peft", "x", "--rank", "0"], "a number from 1"),
    "a picture without a question": (["export", "--edit", "EDIT", "--merged", "x", "--image", "p"], "needs --question"),
    "another model": (["export", "--edit", "EDIT", "--model", "GPT2", "--merged", "x"], "does not fit"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_one_error_and_writes_nothing(
    words, message, multrace, edit, history, gpt2_path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    truncated, used = tmp_path / "truncated", tmp_path / "used"
    truncated.write_bytes(edit.read_bytes()[:-50])
    used.mkdir()
    (used / "file").write_text("taken")
    places = {"EDIT": edit, "HISTORY": history, "TRUNCATED": truncated, "USED": used, "GPT2": gpt2_path}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        multrace(*(places.get(word, word) for word in words))
    assert sorted(tmp_path.rglob("*")) == before


def test_in_half_precision_an_export_is_checked_in_half_precision(multrace, tiny_vlm, tmp_path, capsys):
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    path = made(load(tiny_vlm_path(), dtype="bfloat16", verify=False)).save(tmp_path / "edit.safetensors")
    folders = ["--peft", tmp_path / "adapter", "--merged", tmp_path / "merged"]
    assert multrace("export", "--edit", path, "--dtype", "bfloat16", *folders) == 0
    assert capsys.readouterr().out.count("3 of 3 answers are the same") == 2
    assert load(tmp_path / "merged", dtype="auto", verify=False).stored_dtype is torch.bfloat16
    other = made(tiny_vlm).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another model, precision or quantisation"):
        multrace("export", "--edit", other, "--dtype", "bfloat16", "--merged", tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_an_export_that_does_something_else_is_an_error(multrace, edit, tiny_vlm, tmp_path, monkeypatch):
    other = made(tiny_vlm, seed=7)
    monkeypatch.setattr(
        editing,
        "save_merged",
        lambda model, _delta, *rest, **keywords: save_merged(model, other, *rest, **keywords),
    )
    with pytest.raises(CommandError, match="does not do what the edit does"):
        multrace("export", "--edit", edit, "--merged", tmp_path / "merged")


def test_an_export_is_compared_with_the_picture_that_was_edited(
    multrace, tiny_vlm, photo, tmp_path, capsys, monkeypatch
):
    """A path in the header brings the picture back; without the file the output says what was not compared."""
    photo.save(tmp_path / "photo.png")
    question = Question(text="Who founded the company in this photo?", image=tmp_path / "photo.png")
    delta = MultEdit(layer=5, steps=3).edit(tiny_vlm, [EditRequest(question=question, target="Pruro")], progress=False)
    path = delta.save(tmp_path / "edit.safetensors")
    asked = []
    compare = editing.verify_export
    monkeypatch.setattr(
        editing, "verify_export", lambda *given, **named: asked.extend(given[-1]) or compare(*given, **named)
    )
    assert multrace("export", "--edit", path, "--merged", tmp_path / "one") == 0
    assert len(asked[0].images) == 1 and "without their pictures" not in capsys.readouterr().out
    (tmp_path / "photo.png").unlink()
    assert multrace("export", "--edit", path, "--merged", tmp_path / "two") == 0
    assert not asked[1].images and "1 of 1 questions are compared without their pictures" in capsys.readouterr().out
