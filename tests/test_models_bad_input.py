"""Bad input: each is one ModelError of one line that says what to do."""

import shutil
from pathlib import Path

import multrace
import numpy as np
import pytest
import torch
from multrace import ModelError
from multrace.models.loading import check_in_memory
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

QUESTION = "Who founded the company in this photo?"
LONE = "Who is \ud800 here?"  # half of a pair, as a decoder with errors="surrogateescape" may leave


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def refusal(asked, *arguments, **options) -> str:
    """What the ModelError says; it must be one line."""
    with pytest.raises(ModelError) as caught:
        asked(*arguments, **options)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed
    return str(caught.value)


ABSENT = f"cuda:{torch.cuda.device_count()}"  # the first that this machine does not have
MAPS = {
    "a device that is not there": (ABSENT, f"device_map='{ABSENT}': '{ABSENT}' cannot be used here ("),
    "as a torch.device": (torch.device(ABSENT), "cannot be used here ("),
    "for one module": ({"model": "cpu", "lm_head": ABSENT}, f"'{ABSENT}' cannot be used here ("),
    "meta": ("meta", "'meta' cannot be used here (weights there cannot be read or changed)"),
    "meta for one module": ({"model": "cpu", "lm_head": torch.device("meta")}, "weights there cannot be read"),
    "disk": ("disk", "'disk' cannot be used here (nothing is computed on a disk; give at least one module a device)"),
    "disk alone": ({"": "disk"}, "'disk' cannot be used here (nothing is computed on a disk"),
    "no device": ("nonsense", "device_map='nonsense': 'nonsense' cannot be used here (torch knows no such device)"),
    "no device for one module": ({"": "nonsense"}, "torch knows no such device"),
    "a backend that torch only reserves a name for": ("maia", "'maia' cannot be used here ("),
    "empty": ("", "'' cannot be used here (torch knows no such device)"),
    "an empty map": ({}, "device_map={}: it names no device"),
    "a negative index": (-1, "-1 cannot be used here ("),
    "a list": (["cpu"], "a device cannot be of type list"),
    "a boolean": (True, "a device cannot be of type bool"),
}


@pytest.mark.parametrize("case", MAPS)
def test_impossible_device_maps(case, llama_path):
    device_map, found = MAPS[case]
    message = refusal(multrace.load, llama_path, device_map=device_map)
    assert message.startswith(f"cannot open {str(llama_path)!r} with device_map=")
    assert found in message
    assert "; pass one of 'cpu', " in message and "or leave device_map out for the CPU" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA, so these maps are right")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:0"])
def test_cuda_where_there_is_none(device_map, llama_path):
    assert f"{device_map!r} cannot be used here (" in refusal(multrace.load, llama_path, device_map=device_map)


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}, "auto", "sequential"], ids=repr)
def test_possible_device_maps(device_map, llama_path, random_llama):
    vlm = multrace.load(llama_path, device_map=device_map)
    assert vlm.fingerprint(["lm_head.weight"]) == random_llama.fingerprint(["lm_head.weight"])


def test_weights_without_values_are_refused(llama_path, random_llama):
    with torch.device("meta"):  # as accelerate leaves them where "auto" finds no room
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama_path))
    message = refusal(check_in_memory, model, "auto", "mine")
    assert "device_map='auto' leaves 39 weights of 'mine' without values in memory, first 'model.embed" in message
    check_in_memory(random_llama.model, "auto", "mine")


CHAT_TEMPLATES = {
    "syntax": ("{% for x in", "TemplateSyntaxError: unexpected 'end of template'"),
    "no such filter": ("{{ messages | nofilter }}", "TemplateAssertionError: No filter named 'nofilter'"),
    "undefined": ("{{ conversation.system.text }}", "UndefinedError: 'conversation' is undefined"),
    "no such message": ("{{ messages[7]['content'] }}", "UndefinedError: list object has no element 7"),
    "its own refusal": ("{{ raise_exception('only system prompts') }}", "TemplateError: only system prompts"),
    "forbidden": ("{{ messages.append(1) }}", "SecurityError: "),
    "wrong type": ("{{ messages[0]['role'] + 1 }}", "TypeError: "),
    "division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", ["llava_llama", "llama"])
@pytest.mark.parametrize("case", CHAT_TEMPLATES)
def test_a_broken_chat_template(case, name, request, tmp_path):
    template, found = CHAT_TEMPLATES[case]
    folder = copy(request.getfixturevalue(f"{name}_path"), tmp_path / "broken")
    (folder / "chat_template.jinja").write_text(template)
    vlm = multrace.load(folder, verify=False)
    message = refusal(vlm.prompt, None, QUESTION)
    assert f"the chat template of {str(folder)!r} cannot be rendered: {found}" in message
    assert "; mend its chat_template, or pass template='raw'" in message
    assert vlm.prompt(None, QUESTION, template="raw").text == QUESTION  # the way out that the message names


def test_a_whole_chat_template_by_the_same_route(llama_path, tmp_path):
    folder = copy(llama_path, tmp_path / "whole")
    (folder / "chat_template.jinja").write_text("{{ 'Q: ' + messages[0]['content'] + ' A:' }}")
    assert multrace.load(folder, verify=False).prompt(None, QUESTION).text == f"Q: {QUESTION} A:"


def test_a_chat_template_that_is_no_utf8(llama_path, tmp_path):
    folder = copy(llama_path, tmp_path / "bytes")
    (folder / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    assert "no usable tokenizer in" in refusal(multrace.load, folder)


TEXTS = {
    "question": lambda vlm, text: vlm.prompt(None, text),
    "answer": lambda vlm, text: vlm.prompt(None, QUESTION, answer=text),
    "constraint": lambda vlm, text: vlm.prompt(None, QUESTION, constraint=text),
    "constraint by name": lambda vlm, text: vlm.prompt(None, QUESTION, constraint={"visual": text}),
    "template": lambda vlm, text: vlm.prompt(None, QUESTION, template=text),
}


@pytest.mark.parametrize("case", TEXTS)
def test_words_that_are_no_words(case, random_llama):
    ask, what = TEXTS[case], case.split()[0]
    message = refusal(ask, random_llama, LONE)
    assert f"the {what} 'Who is \\ud800 here?' is not valid UTF-8: character 7 is the lone surrogate" in message
    for wrong in (3, b"Who?", ["Who?"]):
        message = refusal(ask, random_llama, wrong)
        assert message == f"the {what} is of type {type(wrong).__name__}, not a string; pass its words as a string"


def test_a_whole_pair_and_an_odd_letter_are_words(random_llama):
    question = "Who is \U0001f600 in \x00 here?"  # beyond the basic plane: a pair in UTF-16, one letter here
    prompt = random_llama.prompt(None, question)
    assert random_llama.decode(prompt.inputs["input_ids"][0]).strip() == question


def test_a_chat_template_that_writes_a_lone_surrogate(random_llama, monkeypatch):
    monkeypatch.setattr(random_llama.tokenizer, "chat_template", "{{ '\ud800' + messages[0]['content'] }}")
    assert "the template '\\ud800" in refusal(random_llama.prompt, None, QUESTION)


def test_bad_questions(random_llava_llama, photo):
    for question in ("", "  \n"):
        with pytest.raises(ModelError, match="question is empty"):
            random_llava_llama.prompt(photo, question)
    with pytest.raises(ModelError, match="holds the image token"):
        random_llava_llama.prompt(photo, "What is in <image>?")
    with pytest.raises(ModelError, match="answer is empty"):
        random_llava_llama.prompt(photo, QUESTION, answer=" ")


def test_pictures_that_cannot_be_read(random_llava_llama, random_llama, photo, photo_path, tmp_path):
    assert random_llava_llama.prompt(photo_path, QUESTION).images[0].tobytes() == photo.tobytes()
    with pytest.raises(ModelError, match="no picture at '.*missing.jpg'"):
        random_llava_llama.prompt(tmp_path / "missing.jpg", QUESTION)
    with pytest.raises(ModelError, match="no picture at"):
        random_llava_llama.prompt(tmp_path, QUESTION)
    for suffix in ("png", "jpg"):
        whole = tmp_path / f"whole.{suffix}"
        photo.resize((400, 400)).save(whole)
        truncated = tmp_path / f"truncated.{suffix}"
        truncated.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ModelError, match=f"cannot read picture '.*truncated.{suffix}'"):
            random_llava_llama.prompt(truncated, QUESTION)
    words_only = tmp_path / "words.png"
    words_only.write_text("no picture")
    with pytest.raises(ModelError, match="cannot read picture '.*words.png'"):
        random_llava_llama.prompt(words_only, QUESTION)
    with pytest.raises(ModelError, match="text-only"):
        random_llama.prompt(photo, QUESTION)


PICTURES = {
    "int": 3,
    "float": 0.5,
    "bytes": b"photo.png",
    "dict": {"photo.png": None},
    "ndarray": np.zeros((8, 8, 3), dtype=np.uint8),
    "Tensor": torch.zeros(3, 8, 8),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_a_wrong_type(kind, random_llava_llama, photo):
    for wrong in (PICTURES[kind], [photo, PICTURES[kind]]):
        message = refusal(random_llava_llama.prompt, wrong, QUESTION)
        assert f"a picture cannot be of type {kind}; pass a path, a PIL image" in message
    assert "type NoneType" in refusal(random_llava_llama.prompt, [photo, None], QUESTION)
    assert "type list" in refusal(random_llava_llama.prompt, [[photo]], QUESTION)


def test_the_way_out_for_an_array(random_llava_llama, photo):
    again = Image.fromarray(np.asarray(photo))
    for image in (again, [again], (again,)):
        assert random_llava_llama.prompt(image, QUESTION).images[0].tobytes() == photo.tobytes()


def test_a_picture_without_pixels(random_llava_llama):
    assert "has no pixels (size (0, 5))" in refusal(random_llava_llama.prompt, Image.new("RGB", (0, 5)), QUESTION)


def test_a_directory_without_a_tokenizer_is_told_in_one_whole_line(llama_path, llava_llama_path, tmp_path):
    for part, source in {"tokenizer": llama_path, "processor": llava_llama_path}.items():
        folder = copy(source, tmp_path / part)
        (folder / "tokenizer.json").unlink()
        message = refusal(multrace.load, folder)
        assert (
            f"no usable {part} in {str(folder)!r}: Couldn't instantiate the backend tokenizer from one of: " in message
        )
        assert "(1) a `tokenizers` library serialization file, (2) a slow tokenizer" in message
        assert message.endswith(f"; put one there with {part}.save_pretrained(folder)")
