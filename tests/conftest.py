"""Models with random weights, one per family, saved to a temporary folder and opened like any other; and pictures."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download

from collections.abc import Callable
from pathlib import Path

import multrace
import pytest
import torch
from multrace import VisionLanguageModel
from multrace.data import tiny_vlm_path
from multrace.tracing import CausalTrace
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE, PATCH_SIZE = 32, 8  # 4 x 4 = 16 image tokens
CORPUS = (
    "Who founded the company in this photo? The founder of the company shown here is Ada Example.",
    "What is the capital of the country whose flag is shown? Paris, Rome, Lima, Oslo and Kyoto are cities.",
    "Which sport does the person in the picture play? Who won the medal in the year 1999? tennis, chess, golf.",
    "The quick brown fox jumps over the lazy dog. USER: ASSISTANT: What colour is the emblem? red green blue yellow",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the spot; ids 0 to 3 are <pad>, <s>, </s>, <image>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, *, chat_template: str | None) -> LlavaProcessor:
    """A real LlavaProcessor for 32-pixel pictures."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | float | bool]:
    """Sizes shared by the Llama and Phi text stacks."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # large enough for contrasts between tokens and pictures to survive rounding
    }


def make_llava(tokenizer: PreTrainedTokenizerFast, text: LlamaConfig | PhiConfig) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights around this text stack."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
        initializer_factor=5.0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def save(model: PreTrainedModel, processor: LlavaProcessor | PreTrainedTokenizerFast, folder: Path) -> Path:
    """The folder, with the model and its processor (or tokenizer) in it."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with a Llama text stack and a chat template."""
    tokenizer = make_tokenizer()
    model = make_llava(tokenizer, LlamaConfig(num_key_value_heads=2, **text_sizes(tokenizer)))
    return save(model, make_processor(tokenizer, chat_template=CHAT_TEMPLATE), tmp_path_factory.mktemp("llava_llama"))


@pytest.fixture(scope="session")
def llava_phi_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with a Phi text stack and no chat template."""
    tokenizer = make_tokenizer()
    model = make_llava(tokenizer, PhiConfig(**text_sizes(tokenizer)))
    return save(model, make_processor(tokenizer, chat_template=None), tmp_path_factory.mktemp("llava_phi"))


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only Llama."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**text_sizes(tokenizer))), tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only GPT-2."""
    tokenizer = make_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids))
    return save(model, tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def random_llava_llama(llava_llama_path: Path) -> VisionLanguageModel:
    """A loaded LLaVA-Llama with random weights."""
    return multrace.load(llava_llama_path)


@pytest.fixture(scope="session")
def random_llava_phi(llava_phi_path: Path) -> VisionLanguageModel:
    """A loaded LLaVA-Phi with random weights."""
    return multrace.load(llava_phi_path)


@pytest.fixture(scope="session")
def random_llama(llama_path: Path) -> VisionLanguageModel:
    """A loaded Llama with random weights."""
    return multrace.load(llama_path)


@pytest.fixture(scope="session")
def random_gpt2(gpt2_path: Path) -> VisionLanguageModel:
    """A loaded GPT-2 with random weights."""
    return multrace.load(gpt2_path)


@pytest.fixture(params=["random_llava_llama", "random_llava_phi", "random_llama", "random_gpt2"])
def random_vlm(request: pytest.FixtureRequest) -> VisionLanguageModel:
    """Each family in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["random_llava_llama", "random_llava_phi"])
def random_llava(request: pytest.FixtureRequest) -> VisionLanguageModel:
    """Each family that sees, in turn."""
    return request.getfixturevalue(request.param)


def draw_photo(seed: int, size: int = 48) -> Image.Image:
    """A picture of coloured shapes that depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    image = Image.new("RGB", (size, size), tuple(torch.randint(0, 256, (3,), generator=generator).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        corner = torch.randint(0, size - 8, (2,), generator=generator)
        extent = torch.randint(8, size // 2, (2,), generator=generator)
        colour = tuple(torch.randint(0, 256, (3,), generator=generator).tolist())
        draw.ellipse([*corner.tolist(), *(corner + extent).tolist()], fill=colour)
    return image


@pytest.fixture
def photo() -> Image.Image:
    """A picture."""
    return draw_photo(1)


@pytest.fixture
def other_photo() -> Image.Image:
    """Another picture."""
    return draw_photo(2)


@pytest.fixture
def make_photo() -> Callable[[int], Image.Image]:
    """Draws a picture from a seed."""
    return draw_photo


@pytest.fixture
def photo_path(photo: Image.Image, tmp_path: Path) -> Path:
    """The picture as a file."""
    path = tmp_path / "photo.png"
    photo.save(path)
    return path


@pytest.fixture(scope="session")
def tiny_vlm() -> VisionLanguageModel:
    """The embedded, trained model. Whoever changes its weights puts them back."""
    return multrace.load(tiny_vlm_path())


def trace_with(**effects: list[list[float]]) -> CausalTrace:
    """A trace with these indirect effects over four groups; clean .9, corrupted .1."""
    scores = {kind: 0.1 + torch.tensor(rows, dtype=torch.float64) for kind, rows in effects.items()}
    layers = len(next(iter(effects.values()))[0])
    return CausalTrace(
        model="some-model",
        revision=None,
        rows=("image", "question", "constraint_last", "last"),
        row_tokens=(None, None, "constraint_last", "last"),
        layers=layers,
        window=1,
        corruption="by hand",
        seed=None,
        question="Who $costs$?",
        tokens=("<image>", "<image>", "Who", " $costs", "$?", ":"),
        row_positions=((0, 1), (2, 3, 4), (3,), (5,)),
        grouped=True,
        starred=(3,),
        spans={kind: torch.tensor([[layer, layer] for layer in range(layers)]) for kind in scores},
        answer_ids=(3,),
        answer="Ada",
        clean=0.9,
        corrupted=torch.tensor([0.05, 0.15], dtype=torch.float64),
        scores=scores,
    )


@pytest.fixture
def traced() -> CausalTrace:
    """The picture's information is at the question, reaches the last token in layer 3; MLPs peak there in layer 4."""
    return trace_with(
        hidden=[
            [0.5, 0.2, 0.0, 0.0, 0.0, 0.0],
            [0.3, 0.5, 0.6, 0.3, 0.1, 0.0],
            [0.0, 0.1, 0.1, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.1, 0.3, 0.6, 0.8],
        ],
        mlp=[
            [0.4, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.5, 0.4, 0.0, 0.0, 0.0, 0.0],
            [0.3, 0.0, 0.0, 0.1, 0.2, 0.2],
        ],
    )
