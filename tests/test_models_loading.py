"""Opening models: dtypes, sizes, and one clear line for everything that cannot be opened."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import multrace
import pytest
import torch
from multrace import ModelError
from multrace.models import Family, PictureFront, TextStack
from multrace.models.families import PICTURE_FRONTS, TEXT_STACKS, family_of
from random_models import make_tokenizer, text_sizes
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    Florence2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import is_torchvision_available


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_sizes_and_names(random_vlm):
    assert (random_vlm.layers, random_vlm.hidden, random_vlm.heads) == (4, 32, 4)
    assert random_vlm.mlp == (128 if random_vlm.family.name == "gpt2" else 64)
    assert random_vlm.dtype == torch.float32
    assert random_vlm.device == torch.device("cpu")
    assert random_vlm.has_vision == (random_vlm.family.vision is not None) == random_vlm.family.name.startswith("llava")
    assert Path(random_vlm.name).is_dir()
    assert random_vlm.processor.tokenizer is random_vlm.tokenizer if random_vlm.has_vision else True


def test_a_loaded_model_is_at_rest(random_vlm):
    assert not any(module.training for module in random_vlm.model.modules())
    assert not any(parameter.requires_grad for parameter in random_vlm.model.parameters())


def test_text_models_have_no_vision_tower(random_llama, random_llava_llama):
    assert isinstance(random_llava_llama.vision_tower, torch.nn.Module)
    with pytest.raises(ModelError, match="text-only"):
        _ = random_llama.vision_tower


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llava_llama", "llava_phi", "llama", "gpt2"])
def test_half_precision_files_compute_in_float32_on_the_cpu(stored, name, request, tmp_path):
    dtype = getattr(torch, stored)
    request.getfixturevalue(f"random_{name}").save_pretrained(tmp_path / "half", dtype=dtype)
    automatic = multrace.load(tmp_path / "half")
    assert (automatic.dtype, automatic.stored_dtype) == (torch.float32, dtype)
    asked = multrace.load(tmp_path / "half", dtype=stored)  # the proof holds in half precision too
    assert asked.dtype == asked.stored_dtype == dtype


def test_double_precision_on_request(llava_phi_path, photo):
    vlm = multrace.load(llava_phi_path, dtype=torch.float64)
    assert vlm.dtype == vlm.logits(vlm.prompt(photo, "Who?")).dtype == torch.float64
    assert vlm.stored_dtype == torch.float32


def test_the_proof_holds_under_both_attention_paths(llava_phi_path):
    for attention in ("sdpa", "eager"):
        assert multrace.load(llava_phi_path, attention=attention).model.config._attn_implementation == attention


def test_a_family_of_ones_own(llava_llama_path, random_llava_llama):
    mine = Family(name="mine", model_types=("llava",), text_types=("llama",), vision="vision_tower")
    assert multrace.load(llava_llama_path, families=(mine,)).family is mine
    assert random_llava_llama.family.name == "llava_llama"
    other = replace(mine, text_types=("phi",))  # serves another pair, and is no row for a half of this one
    assert multrace.load(llava_llama_path, families=(other,)).family == random_llava_llama.family


def test_a_row_for_one_half_comes_before_the_tables(llava_llama_path):
    text, front = (
        TextStack(text_types=("llama",), down="mlp.gone"),
        PictureFront(model_types=("llava",), projector=None),
    )
    assert multrace.load(llava_llama_path, families=(front,)).family.projector is None
    with pytest.raises(ModelError, match="no projection of site 'mlp 0' at 'model.language_model.layers.0.mlp.gone'"):
        multrace.load(llava_llama_path, families=(text,))


def test_families_are_pairs_of_a_text_stack_and_a_picture_front():
    assert family_of(LlamaConfig()).name == "llama"
    assert family_of(MistralConfig()) == replace(family_of(LlamaConfig()), name="mistral", model_types=("mistral",),
                                                 text_types=("mistral",))  # fmt: skip
    pair = family_of(LlavaConfig(text_config=GPT2Config()))
    assert (pair.name, pair.layers, pair.transposed, pair.vision) == ("llava_gpt2", "h", True, "vision_tower")
    assert family_of(Gemma3Config()).name == "gemma3"
    assert family_of(Gemma3Config()).mlp_norm == family_of(Gemma3TextConfig()).mlp_norm == "post_feedforward_layernorm"
    assert family_of(Gemma3TextConfig()).vision is None
    for types in ([name for row in TEXT_STACKS for name in row.text_types],
                  [name for row in PICTURE_FRONTS for name in row.model_types]):  # fmt: skip
        assert len({*types}) == len(types)


def test_an_encoder_decoder_is_refused():
    for config in (BartConfig(), Florence2Config()):
        with pytest.raises(ModelError, match=f"model type '{config.model_type}' is an encoder-decoder"):
            family_of(config)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "~/no-such-model"])
def test_an_unknown_path(name):
    with pytest.raises(ModelError, match=f"no model directory at '{name}'"):
        multrace.load(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "not a model id"])
def test_an_unknown_id(name):
    with pytest.raises(
        ModelError, match=f"no configuration of '{name}': it is no directory, it is not in the local cache"
    ):
        multrace.load(name)


def test_a_file_is_no_model(llava_llama_path):
    with pytest.raises(ModelError, match="no model directory at .*model.safetensors', which is a file; pass a folder"):
        multrace.load(llava_llama_path / "model.safetensors")


def test_an_empty_directory(tmp_path):
    with pytest.raises(ModelError, match="no usable configuration in .*: it has no config.json, and is empty; pass a"):
        multrace.load(tmp_path)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "it is a LlamaForSequenceClassification"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "it is a BertForMaskedLM"),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, "transformers has no class for that"),
    ],
)
def test_a_model_that_does_not_continue_texts(entries, reason, llama_path, tmp_path):
    folder = copy(llama_path, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(ModelError, match=f"does not continue texts: {reason}; pass a model") as caught:
        multrace.load(folder)
    assert "\n" not in str(caught.value)


FOLDERS = {
    "an adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": ""},
        "it is a PEFT adapter of 'org/base' and no model; pass its base model",
    ),
    "a GGUF file": ({"a.gguf": "", "b.txt": ""}, "it has no config.json; pass its file 'a.gguf' itself"),
    "other files": (
        {f"{name}.txt": "" for name in "abcdef"},
        "it has no config.json, only a.txt, .*, e.txt ...; pass a",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_something_else(case, tmp_path):
    files, reason = FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=f"no usable configuration in .*: {reason}"):
        multrace.load(tmp_path)


def test_a_broken_configuration(llama_path, tmp_path):
    folder = copy(llama_path, tmp_path / "broken")
    (folder / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(ModelError, match="no usable configuration"):
        multrace.load(folder)
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelError, match="no usable configuration"):
        multrace.load(folder)


def test_a_directory_without_a_processor(llava_llama_path, llama_path, tmp_path):
    tokenizer_only = copy(llava_llama_path, tmp_path / "tokenizer_only")
    (tokenizer_only / "processor_config.json").unlink()
    with pytest.raises(ModelError, match="processor"):
        multrace.load(tokenizer_only)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llava_llama_path / name, nothing)
    with pytest.raises(ModelError, match="processor"):
        multrace.load(nothing)
    text = tmp_path / "text"
    text.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_path / name, text)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        multrace.load(text)


def test_a_corrupt_weight_file(llava_llama_path, tmp_path):
    whole = (llava_llama_path / "model.safetensors").read_bytes()
    damages = {
        "truncated": whole[: len(whole) // 2],
        "no_header": whole[:4],
        "empty": b"",
        "wrong_header": b"\xff" * 8 + whole[8:],
    }
    for name, content in damages.items():
        folder = copy(llava_llama_path, tmp_path / name)
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors' is not a whole safetensors file"):
            multrace.load(folder)


def test_pickled_weights_are_refused(llava_llama_path, tmp_path):
    folder = copy(llava_llama_path, tmp_path / "pickled")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        multrace.load(folder)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="has only pytorch_model.bin, and pickled weights can run code"):
        multrace.load(folder)


def test_missing_and_misshapen_weights_are_not_made_up(llava_llama_path, tmp_path):
    folder = copy(llava_llama_path, tmp_path / "lacking")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "down_proj" in name)
    save_file(
        {key: value for key, value in state.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"1 are missing or of another shape, first '.*down_proj.weight'"):
        multrace.load(folder)
    save_file(state | {name: state[name][:, :-1].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="down_proj"):
        multrace.load(folder)


def test_sharded_weights_and_a_missing_shard(llava_llama_path, random_llava_llama, tmp_path):
    folder = copy(llava_llama_path, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_pretrained(llava_llama_path).save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    names = ["lm_head.weight", "model.language_model.layers.0.mlp.down_proj.weight"]
    assert multrace.load(folder).fingerprint(names) == random_llava_llama.fingerprint(names)
    shards[0].unlink()
    with pytest.raises(ModelError, match=f"lacks the weight files {shards[0].name}"):
        multrace.load(folder)


def test_bad_dtypes(llama_path):
    for dtype in ("float3", "int8", torch.int32):
        with pytest.raises(ModelError, match="in dtype"):
            multrace.load(llama_path, dtype=dtype)


def test_code_that_comes_with_a_model_does_not_run_unasked(llama_path, tmp_path):
    folder = copy(llama_path, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ModelError, match="comes with Python code of its own, which its configuration needs"):
        multrace.load(folder)
    assert not marker.exists()


QWEN = ("<image>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
PICTURES = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2,
            "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}}  # fmt: skip
IMAGES, VIDEOS = {"image_processor_type": "Qwen2VLImageProcessor"}, {"video_processor_type": "Qwen2VLVideoProcessor"}
NAMED = {"processor_class": "Qwen2_5_VLProcessor"}
LAYOUTS = {
    "one file": {"processor_config.json": {**NAMED, "image_processor": {**PICTURES, **IMAGES},
                                           "video_processor": {**PICTURES, **VIDEOS}}},
    "a file for each": {"preprocessor_config.json": {**PICTURES, **IMAGES, **NAMED},
                        "video_preprocessor_config.json": {**PICTURES, **VIDEOS}},
    "no file for videos": {"preprocessor_config.json": {**PICTURES, **IMAGES}},
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen_path(tmp_path_factory):
    """A Qwen2.5-VL with random weights, without the files of its processor."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN[1:])})
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(QWEN))
    grid = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2}
    text = {**text_sizes(tokenizer), "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**grid, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32,
                       "fullatt_block_indexes": [1], "window_size": 32},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def qwen(folder):
    row = Family(
        name="qwen", model_types=("qwen2_5_vl",), text_types=("qwen2_5_vl_text",), vision="visual", projector="visual"
    )
    return multrace.load(folder, families=(row,), verify=False)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_processor_of_pictures_and_videos_opens_without_torchvision(layout, qwen_path, photo, tmp_path):
    assert not is_torchvision_available()
    folder = copy(qwen_path, tmp_path / "model")
    for file, content in layout.items():
        (folder / file).write_text(json.dumps(content))
    vlm = qwen(folder)
    grid = vlm.prompt(photo.resize((64, 32)), "Who?", template="{image}{question}").inputs["image_grid_thw"]
    assert grid.tolist() == [[1, 4, 8]]
    vlm.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert written["processor_class"] == "Qwen2_5_VLProcessor"
    assert written["video_processor"].items() >= PICTURES.items()
    again = qwen(tmp_path / "saved")
    assert again.processor.to_dict() == vlm.processor.to_dict()
    assert pickle.loads(pickle.dumps(vlm.prompt(photo, "Who?"))).frontend.processor.to_dict() == vlm.processor.to_dict()


def test_pictures_that_only_torchvision_reads(qwen_path, tmp_path):
    folder = copy(qwen_path, tmp_path / "model")
    layout = {"processor_class": "Llama4Processor", "image_processor": {"image_processor_type": "Llama4ImageProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(layout))
    with pytest.raises(ModelError, match=r"torchvision.* only; pip install 'multrace\[vision\]'$"):
        qwen(folder)
