"""multrace moments: what it reads, what it prints, and one line for whatever cannot be read."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from multrace import VisionLanguageModel
from multrace.data import DataError, world_questions
from multrace.editing import EditError
from multrace.editing.moments import Moments, own_prompts, second_moments
from multrace.models import ModelError
from multrace.scripts import CommandError, moments as command
from multrace.scripts.main import parse
from multrace.scripts.moments import parse_layers
from PIL import Image

QUESTIONS = ("Who founded the company in this photo?", "Which sport does the person in the picture play?", "Who won?")


@pytest.fixture
def records(tmp_path: Path, make_photo: Callable[[int], Image.Image]) -> Path:
    """Two pictures and a text, then two lines that cannot be read."""
    for seed in (1, 2):
        make_photo(seed).save(tmp_path / f"{seed}.png")
    lines = [{"image": f"{image}.png", "question": text} for image, text in zip((1, 2), QUESTIONS, strict=False)]
    lines += [{"image": None, "question": QUESTIONS[2]}, {"image": "none.png", "question": "Who?"}, {"image": "1.png"}]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(*words: object) -> int:
    return command.run(parse(["moments", *map(str, words)])[1])


def test_records_become_moments(
    records: Path, random_llava_llama: VisionLanguageModel, llava_llama_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = records.parent
    options = ["--layers", "1,2-3", "--batch-size", 1, "--every", 1, "--memory", 1, "--out", folder / "out"]
    assert (
        run("--model", llava_llama_path, "--data", records, "--format", "lines", *options, "--cache", folder / "parts")
        == 0
    )
    vlm = random_llava_llama
    images = (folder / "1.png", folder / "2.png", None)
    prompts = [vlm.prompt(image, question) for image, question in zip(images, QUESTIONS, strict=True)]
    expected = second_moments(vlm, prompts, layers=[1, 2, 3], batch_size=1, every=1)
    found = Moments.load(folder / "out" / "moments.safetensors")
    assert all(torch.equal(found.matrix(layer), expected.matrix(layer)) for layer in (1, 2, 3))
    assert (found.counts, found.corpus, found.weights) == (expected.counts, expected.corpus, expected.weights)
    assert len(list((folder / "parts").iterdir())) == 1
    printed = capsys.readouterr().out
    for words in ("layers       1, 2, 3 (mlp)", "prompts      3 of 3; 2 records left out", "image 32", "none.png"):
        assert words in printed
    assert re.search(r"row 5: line 5 .*question", printed)
    assert re.search(r"\n +2 +\d+\.\d\d% +-\n", printed)
    assert re.search(r"time +\d", printed)


def test_the_world_is_read_without_data(
    tiny_vlm: VisionLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--projection", "attention", "--layers", 2, "--seed", 3, "--out", tmp_path]
    assert run("--world", "--limit", 6, *options) == 0
    found = Moments.load(tmp_path / "moments.safetensors")
    prompts = [tiny_vlm.prompt_for(question) for question in world_questions(6, seed=3)]
    expected = second_moments(tiny_vlm, prompts, layers=[2], projection="attention")
    assert torch.equal(found.matrix(2), expected.matrix(2))
    assert found.count("image") == 6 * 64
    assert "convergence  not measured" in capsys.readouterr().out


def test_the_models_own_samples_need_no_corpus(
    tiny_vlm: VisionLanguageModel, tmp_path: Path, make_photo: Callable[[int], Image.Image]
):
    make_photo(1).save(tmp_path / "photo.png")
    options = ["--own", "--images", tmp_path, "--limit", 6, "--seed", 2, "--layers", 5, "--cache", tmp_path / "kept"]
    assert run(*options, "--out", tmp_path / "out") == 0
    found = Moments.load(tmp_path / "out" / "moments.safetensors")
    expected = second_moments(tiny_vlm, own_prompts(tiny_vlm, pictures=tmp_path, number=6, seed=2), layers=[5])
    assert torch.equal(found.matrix(5), expected.matrix(5)) and found.is_own
    assert found.count("image") == 3 * 64 and any((tmp_path / "kept").iterdir())


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "one of --data FILE, --world and --own"),
        (["--own", "--world", "--limit", 3], "one of --data"),
        (["--own", "--memory", 3], "--memory does not belong to --own"),
        (["--own", "--images", "no-such-folder"], "no picture in the folder"),
        (["--data", "a.jsonl", "--world"], "one of --data"),
        (["--world", "--limit", 0], "at least one question"),
        (["--world"], "pass the number of questions as --limit N"),
        (["--world", "--limit", 3, "--format", "mmedit"], "--format belongs to --data"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--world", "--limit", 3, "--layers", "7-3"], "no layers '7-3'"),
        (["--world", "--limit", 3, "--layers", "first"], "no layers 'first'"),
    ],
)
def test_what_cannot_be_read_is_said_before_a_model_is_opened(words: list, match: str, tmp_path: Path):
    with pytest.raises((CommandError, DataError, EditError), match=match):
        run(*words, "--model", tmp_path / "no-model", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_of_which_none_can_be_read_are_an_error(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"image": "none.png", "question": "Who?"}\n', encoding="utf-8")
    with pytest.raises(CommandError, match=r"none of the 1 records .*none\.png"):
        run("--data", path, "--out", tmp_path / "out")
    path.write_text('{"question": "Who?"}\n', encoding="utf-8")
    with pytest.raises(CommandError, match="none of the 1 records .* multrace data check lists all"):
        run("--data", path, "--format", "mmedit", "--out", tmp_path / "out")


def test_a_layer_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(ModelError, match="no layer 40"):
        run("--world", "--limit", 1, "--layers", "0,40", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_are_spelt_as_numbers_and_ranges():
    assert parse_layers("5") == (5,)
    assert parse_layers("0, 2,5-7") == (0, 2, 5, 6, 7)
