"""Model folders with one damaged or older file: what can be derived is; the rest is a ModelError naming the file."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import multrace
import pytest
import torch
from huggingface_hub import constants
from multrace import ModelError
from multrace.models.guards import without_panics
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

QUESTION = "Who founded the company in this photo?"
Edit = Callable[[dict], object]


@pytest.fixture
def damaged(llava_llama_path, tmp_path) -> Callable[[str, Edit], Path]:
    """Copies the model, and changes the JSON object of one of its files."""

    def make(name: str, edit: Edit) -> Path:
        folder = Path(shutil.copytree(llava_llama_path, tmp_path / "damaged"))
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))
        return folder

    return make


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        multrace.load(folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    return str(caught.value)


def without(*names: str) -> Edit:
    def remove(content: dict) -> None:
        for name in names:
            del content[name]

    return remove


OLDER = [
    ("num_additional_image_tokens",),
    ("vision_feature_select_strategy",),
    ("patch_size",),
    ("patch_size", "num_additional_image_tokens"),
    ("patch_size", "vision_feature_select_strategy"),
    ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"),
]


@pytest.mark.parametrize("names", OLDER, ids=" ".join)
def test_a_processor_older_than_its_fields_is_completed(names, damaged, random_llava_llama, photo, tmp_path):
    vlm = multrace.load(damaged("processor_config.json", without(*names)))
    prompt, expected = (model.prompt(photo, QUESTION) for model in (vlm, random_llava_llama))
    assert prompt.tokens == expected.tokens and len(prompt.groups["image"]) == 16
    assert torch.equal(vlm.logits(prompt), random_llava_llama.logits(expected))
    vlm.save_pretrained(tmp_path / "whole")
    written = json.loads((tmp_path / "whole" / "processor_config.json").read_text())
    assert (written["patch_size"], written["num_additional_image_tokens"]) == (8, 1)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_class_token_is_counted_as_the_model_selects_features(strategy, llava_llama_path, damaged, photo):
    folder = damaged(
        "processor_config.json", without("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    )
    config = json.loads((folder / "config.json").read_text()) | {"vision_feature_select_strategy": strategy}
    (folder / "config.json").write_text(json.dumps(config))
    vlm = multrace.load(folder)
    assert len(vlm.prompt(photo, QUESTION).groups["image"]) == {"default": 16, "full": 17}[strategy]
    assert vlm.processor.num_additional_image_tokens == 1


def test_a_patch_that_the_tower_cannot_have(damaged):
    folder = damaged("processor_config.json", without("patch_size"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["patch_size"] = [8, 8]
    (folder / "config.json").write_text(json.dumps(config))
    assert "no usable configuration in" in refusal(folder)


def test_a_processor_that_lacks_a_field_and_has_a_wrong_one(damaged):
    def edit(content: dict) -> None:
        del content["num_additional_image_tokens"]
        content["patch_size"] = 16

    assert "writes 3 tokens for a picture of which the model makes 16; mend its" in refusal(
        damaged("processor_config.json", edit)
    )


PROCESSORS = {
    "one token too many": (
        {"num_additional_image_tokens": 2},
        "writes 17 tokens for a picture of which the model makes 16",
    ),
    "other patches": ({"patch_size": 16}, "writes 4 tokens for a picture of which the model makes 16"),
    "another selection": ({"vision_feature_select_strategy": "full"}, "writes 17 tokens"),
    "no number": ({"num_additional_image_tokens": "1"}, "has num_additional_image_tokens='1', which no model has"),
    "a number beyond all memory": ({"num_additional_image_tokens": 2**31}, "num_additional_image_tokens=2147483648"),
    "words for a size": ({"patch_size": "eight"}, "has patch_size='eight', which no model has"),
    "no patches": ({"patch_size": 0}, "has patch_size=0, which"),
    "another way to select": (
        {"vision_feature_select_strategy": ["full"]},
        "has vision_feature_select_strategy=['full']",
    ),
    "another kind of processor": ({"processor_class": "NoSuchProcessor"}, "has no processor, only a"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_processor_that_does_not_fit_its_model(case, damaged):
    changes, found = PROCESSORS[case]
    message = refusal(damaged("processor_config.json", lambda content: content.update(changes)))
    assert found in message
    assert "processor" in message


@pytest.mark.parametrize("field", ["image_std", "rescale_factor"])
def test_pixels_that_are_not_finite_are_the_processors_fault(field, damaged):
    value = [0.0, 0.0, 0.0] if field == "image_std" else float("inf")
    message = refusal(
        damaged("processor_config.json", lambda content: content["image_processor"].update({field: value}))
    )
    assert "makes pixels that are not finite: its image_mean, image_std or rescale_factor is wrong; " in message


def test_code_that_comes_with_a_model_is_one_line(damaged):
    """Without being asked to run it, and if a package that it imports is missing."""
    code = {"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}
    folder = damaged("config.json", lambda content: content.update(code))
    (folder / "own.py").write_text("import no_such_package\n")
    message = refusal(folder)
    assert message == (
        f"{str(folder)!r} comes with Python code of its own, which its configuration needs; read it, and pass "
        "trust_remote_code=True (--trust-remote-code) to run it"
    )
    message = refusal(folder, trust_remote_code=True)
    assert "needs a package that is not installed here" in message and "no_such_package" in message
    assert message.endswith("; install it")  # no extra of ours brings it


def test_the_error_names_the_fields_of_the_processor(damaged):
    message = refusal(damaged("processor_config.json", lambda content: content.update(num_additional_image_tokens=2)))
    assert "mend its processor_config.json (patch_size 8, num_additional_image_tokens 2, vision_feature" in message


CONFIGURATIONS = {
    "an unknown activation": ({"hidden_act": "nosuch"}, "(text_config.hidden_act='nosuch')"),
    "a number for words": ({"hidden_act": 3}, "Field 'hidden_act' expected str, got int"),
    "words for a number": ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
    "no heads": ({"num_attention_heads": 0}, "(text_config.num_attention_heads=0)"),
    "a negative size": ({"intermediate_size": -64}, "config.json"),
    "more layers than memory holds": ({"num_hidden_layers": 2**31}, "names 2147483648 layers (num_hidden_layers)"),
    "more tokens than memory holds": ({"vocab_size": 2**31}, "describes a model of"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_of_which_no_model_can_be_made(case, damaged):
    changes, found = CONFIGURATIONS[case]
    message = refusal(damaged("config.json", lambda content: content["text_config"].update(changes)))
    assert found in message
    assert "config.json" in message


@pytest.mark.parametrize("content", ["[]", "3", "null", '"config"', "{}", "[" * 100_000, "\ufffe"])
def test_a_configuration_that_is_no_object(content, llava_llama_path, tmp_path):
    folder = Path(shutil.copytree(llava_llama_path, tmp_path / "damaged"))
    (folder / "config.json").write_text(content)
    assert "no usable configuration in" in refusal(folder)


LOST = {  # what the defaults of the lost sizes would make: seven billion weights, without the text_config
    "text_config": "layers.0.self_attn.q_proj.weight' is (4096, 4096) there, and (32, 32) in the files",
    "text_config.hidden_size": "layers.0.self_attn.q_proj.weight' is (32, 4096) there, and (32, 32) in the files",
    "text_config.vocab_size": "embed_tokens.weight' is (32000, 32) there, and (400, 32) in the files",
    "text_config.num_hidden_layers": "describes a model of",
    "text_config.intermediate_size": "is (11008, 32) there, and (64, 32) in the files",
    "vision_config": "describes a model of",
}


@pytest.mark.parametrize("field", LOST)
def test_sizes_that_were_lost_are_not_made_up(field, damaged):
    def edit(content: dict) -> None:
        *above, name = field.split(".")
        for part in above:
            content = content[part]
        del content[name]

    folder = damaged("config.json", edit)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(folder)
    assert "the config.json of" in message and "its files hold" in message and LOST[field] in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize("field", ["size", "crop_size"])
@pytest.mark.parametrize("side", [10**5, 10**9, 0, -1])
def test_pictures_that_would_fill_the_memory_are_not_made(field, side, damaged):
    def edit(content: dict) -> None:
        content["image_processor"][field] = {"height": side, "width": side}

    message = refusal(damaged("processor_config.json", edit))
    assert "the processor_config.json of" in message and f" has {field}=" in message and "image_size=32" in message


def test_a_processor_that_fills_all_positions_is_named(damaged):
    def edit(content: dict) -> None:
        content["image_processor"]["crop_size"] = {"height": 256, "width": 256}

    message = refusal(damaged("processor_config.json", edit))
    assert "cannot be asked a short question: the prompt has 1" in message and "processor_config.json" in message


def test_a_padding_token_that_the_model_lacks_is_not_used(damaged, random_llava_llama, photo, other_photo):
    vlm = multrace.load(damaged("tokenizer_config.json", lambda content: content.update(pad_token="<none>")))
    assert vlm.tokenizer.pad_token_id == vlm.vocab == 400
    prompts = [vlm.prompt(photo, QUESTION), vlm.prompt(other_photo, "Who?")]
    expected = [random_llava_llama.prompt(photo, QUESTION), random_llava_llama.prompt(other_photo, "Who?")]
    assert vlm.answers(prompts) == random_llava_llama.answers(expected)


def test_a_word_that_the_model_lacks_is_refused(damaged):
    def edit(content: dict) -> None:
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 400, "content": "Zyx", "special": False})

    vlm = multrace.load(damaged("tokenizer.json", edit))
    with pytest.raises(ModelError, match=r"reads 'Zyx' as token 400, and the model has 400 tokens; mend its tokenizer"):
        vlm.prompt(None, "Who is Zyx?")
    with pytest.raises(ModelError, match="as token 400"):
        vlm.prompt(None, "Who?", answer="Zyx")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("bomb", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000])
def test_json_without_end_is_one_line(name, bomb, llava_llama_path, tmp_path):
    folder = Path(shutil.copytree(llava_llama_path, tmp_path / "damaged"))
    (folder / name).write_text(bomb)
    assert name in refusal(folder)


def test_another_image_token_than_the_processor_writes(damaged):
    for image_token in (5, 399, 400, -1):
        folder = damaged("config.json", lambda content, token=image_token: content.update(image_token_index=token))
        message = refusal(folder)
        assert (
            f"says that token {image_token} stands for a picture, and its processor writes '<image>', token 3"
            in message
        )
        shutil.rmtree(folder)


TOKENIZERS = {
    "no model": lambda content: content.update(model=None),
    "another model": lambda content: content["model"].update(type="NoSuchModel"),
    "words for ids": lambda content: content["model"].update(vocab={"a": "b"}),
    "no such normalizer": lambda content: content.update(normalizer={"type": "NoSuchNormalizer"}),
    "a prefix longer than its words": lambda content: content["model"].update(continuing_subword_prefix="a" * 100),
    "merges of unknown tokens": lambda content: content["model"].update(merges=[["\u4e00", "\u4e01"]]),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_of_wrong_content(case, damaged):
    message = refusal(damaged("tokenizer.json", TOKENIZERS[case]))
    assert "no usable processor in" in message and "(read from tokenizer.json)" in message
    assert message.endswith("; put one there with processor.save_pretrained(folder)")


SPECIAL_TOKENS = {
    "words": "one",
    "a fraction": 1.5,
    "a truth": True,
    "beyond the vocabulary": 2**63,
    "a list of words": ["one"],
    "a list of nothing": [None],
}


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("case", SPECIAL_TOKENS)
def test_generation_settings_of_wrong_types(case, field, damaged):
    message = refusal(damaged("generation_config.json", lambda content: content.update({field: SPECIAL_TOKENS[case]})))
    assert "generation_config.json" in message and field in message


def test_a_padding_token_that_is_none(damaged, random_llava_llama, photo, other_photo):
    vlm = multrace.load(damaged("generation_config.json", lambda content: content.update(pad_token_id=-1)))
    prompts = [vlm.prompt(photo, QUESTION), vlm.prompt(other_photo, "Who?")]
    assert vlm.answers(prompts) == random_llava_llama.answers(prompts)


def test_generation_settings_that_are_no_object(llava_llama_path, tmp_path):
    folder = Path(shutil.copytree(llava_llama_path, tmp_path / "damaged"))
    for content, found in {"{": "is not whole JSON", "[1]": "holds a JSON list, not an object"}.items():
        (folder / "generation_config.json").write_text(content)
        assert f"the file '{folder / 'generation_config.json'}' {found}" in refusal(folder)


INDICES = {
    "cut": ('{"weight_map": {"a', "is not whole JSON"),
    "a list": ("[]", "holds a JSON list"),
    "no map": ("{}", "has no weight_map from tensors to files"),
    "a map of lists": ('{"weight_map": {"a": ["b"]}}', "has no weight_map from tensors to files"),
    "nested without end": ("[" * 100_000, "is not whole JSON"),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_damaged_index_of_weights(case, llava_llama_path, tmp_path):
    content, found = INDICES[case]
    folder = Path(shutil.copytree(llava_llama_path, tmp_path / "damaged"))
    (folder / "model.safetensors.index.json").write_text(content)
    message = refusal(folder)
    assert f"the file '{folder / 'model.safetensors.index.json'}' {found}" in message


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "nosuch", 3])
def test_attention_that_is_not_here(attention, llava_llama_path):
    message = refusal(llava_llama_path, attention=attention)
    assert f"cannot open {str(llava_llama_path)!r} with attention={attention!r}: " in message
    assert message.endswith("; pass 'sdpa' or 'eager'")


def test_a_broken_configuration_is_not_blamed_on_attention(damaged):
    folder = damaged("config.json", lambda content: content["text_config"].update(hidden_act="nosuch"))
    assert "no usable configuration in" in refusal(folder, attention="eager")


def rewrite(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith(name))
    save_file(tensors | {key: change(tensors[key])}, folder / "model.safetensors", {"format": "pt"})


def with_last(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[-1, -1] = value
        return weight

    return change


NOT_FINITE = [
    pytest.param(name, value, dtype, marks=() if dtype == "auto" or name.startswith("embed") else pytest.mark.slow)
    for dtype in ("auto", "float16", "bfloat16", "float64")
    for value in (float("nan"), float("inf"), -float("inf"))
    for name in ("layers.3.mlp.down_proj.weight", "embed_tokens.weight")
]
"""Every value in both weights as the file is opened without a dtype, and in one of them in every other dtype."""


@pytest.mark.parametrize(("name", "value", "dtype"), NOT_FINITE)
def test_weights_that_are_not_finite(name, value, dtype, llava_llama_path, tmp_path):
    folder = Path(shutil.copytree(llava_llama_path, tmp_path / "damaged"))
    rewrite(folder, name, with_last(value))
    message = refusal(folder, dtype=dtype)
    assert f"{name}' of " in message
    if dtype == "float16" and value == value:  # an infinity may come from rounding to float16
        assert message.endswith("pass dtype='bfloat16' or 'float32', which tells the two apart")
    else:
        assert message.endswith("holds values that are not finite in its file; fetch the model again")
    assert multrace.load(folder, dtype=dtype, verify=False).layers == 4


def test_weights_that_overflow_only_in_the_dtype_asked_for(llava_llama_path, tmp_path):
    folder = Path(shutil.copytree(llava_llama_path, tmp_path / "large"))
    rewrite(folder, "embed_tokens.weight", with_last(1e5))  # the last token's, which the probe does not use
    message = refusal(folder, dtype="float16")
    assert "is infinite in float16, because it is too large for that or damaged; pass dtype='bfloat16' or" in message
    for dtype in ("bfloat16", "float32"):
        assert multrace.load(folder, dtype=dtype).layers == 4


def test_finite_weights_whose_logits_are_not(llava_llama_path, tmp_path):
    folder = Path(shutil.copytree(llava_llama_path, tmp_path / "large"))
    rewrite(folder, "lm_head.weight", lambda weight: weight * 0 + 3e4)
    assert "and its weights are all finite; pass dtype='float32'" in refusal(folder, dtype="float16")
    rewrite(folder, "lm_head.weight", lambda weight: weight * 0 + 3e38)
    message = refusal(folder)
    assert "and its weights are all finite; its weights are damaged" in message


@pytest.fixture
def cached(llava_llama_path, tmp_path, monkeypatch) -> Path:
    """A copy of the model in the hub's local cache, under the id org/model."""
    root = tmp_path / "models--org--model"
    shutil.copytree(llava_llama_path, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return root / "snapshots" / "abc"


INDEX = "model.safetensors.index.json"
HUB = {
    "a damaged configuration": ("config.json", "{", "no usable configuration in 'org/model': It looks like"),
    "a damaged tokenizer": ("tokenizer.json", '{"model": 3}', "no usable processor in 'org/model': "),
    "a wrong special token": ("generation_config.json", '{"bos_token_id": "one"}', "has bos_token_id='one'"),
    "no whole weights": ("model.safetensors", "half", "model.safetensors' is not a whole safetensors file"),
    "an index without a map": (INDEX, "{}", "has no weight_map from tensors to files"),
    "a lost file of weights": (
        INDEX,
        '{"weight_map": {"a": "b.safetensors"}}',
        "no usable safetensors weights in 'org",
    ),
}


@pytest.mark.parametrize("case", HUB)
def test_a_damaged_model_of_the_hub(case, cached):
    name, content, found = HUB[case]
    assert multrace.load("org/model").layers == 4
    (cached / name).write_text(content)
    if name == INDEX:  # which is read only where there is no single file
        (cached / "model.safetensors").unlink()
    assert found in refusal("org/model")


def test_a_model_of_the_hub_in_several_files(cached):
    whole = multrace.load("org/model")
    (cached / "model.safetensors").rename(cached / "part.safetensors")
    weights = dict.fromkeys(load_file(cached / "part.safetensors"), "part.safetensors")
    (cached / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    parts = multrace.load("org/model")
    assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), parts.model.parameters(), strict=True))
    assert parts.stored_dtype == whole.stored_dtype


@pytest.mark.parametrize("field", LOST)
def test_lost_sizes_of_a_model_of_the_hub_are_not_made_up(field, cached):
    content = json.loads((cached / "config.json").read_text())
    *above, name = field.split(".")
    del (content[above[0]] if above else content)[name]
    (cached / "config.json").write_text(json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal("org/model")
    assert "the config.json of 'org/model'" in message and LOST[field] in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_panic_of_the_tokenizers_library_is_an_error(damaged):
    path = damaged("tokenizer.json", lambda content: content["model"].update(continuing_subword_prefix="a" * 100))
    with pytest.raises(BaseException, match="out of range") as caught:
        Tokenizer.from_file(str(path / "tokenizer.json"))
    assert not isinstance(caught.value, Exception)  # which is why it needs a guard of its own
    with pytest.raises(RuntimeError, match="out of range"), without_panics():
        Tokenizer.from_file(str(path / "tokenizer.json"))
    with pytest.raises(KeyboardInterrupt), without_panics():
        raise KeyboardInterrupt
