"""Models with random weights, one per family, saved to a temporary folder and opened like any other; and pictures."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import multrace
import pytest
import torch
from matplotlib.figure import Figure
from multrace import VisionLanguageModel
from multrace.data import tiny_vlm_path
from multrace.tracing import CausalTrace, EngineReport
from PIL import Image, ImageDraw
from random_models import CHAT_TEMPLATE, make_llava, make_processor, make_tokenizer, save, text_sizes
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PhiConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

USER_CACHE = multrace.workflow.cache_folder()
"""The cache of the user, in which the real models are."""


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever the tests keep in the cache of the user lies in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTRACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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


def loaded(name: str) -> Callable[..., VisionLanguageModel]:
    """A fixture: the model at this path, loaded once; its proof is a test of its own."""

    @pytest.fixture(scope="session", name=f"random_{name}")
    def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
        return multrace.load(request.getfixturevalue(f"{name}_path"), verify=False)

    return model


NAMES = ("llava_llama", "llava_phi", "llama", "gpt2")
random_llava_llama, random_llava_phi, random_llama, random_gpt2 = (loaded(name) for name in NAMES)


@pytest.fixture(params=NAMES)
def random_vlm(request: pytest.FixtureRequest) -> VisionLanguageModel:
    """Each family in turn."""
    return request.getfixturevalue(f"random_{request.param}")


@pytest.fixture(params=NAMES[:2])
def random_llava(request: pytest.FixtureRequest) -> VisionLanguageModel:
    """Each family that sees, in turn."""
    return request.getfixturevalue(f"random_{request.param}")


@pytest.fixture(scope="session")
def load_double() -> Callable[[Path], VisionLanguageModel]:
    """Loads a model in float64, each once; `exact` below makes it compute in that."""
    return cache(lambda path: multrace.load(path, dtype="float64", verify=False))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifts Llama's norm from float32, which rounds differences away; the other families' norms cast nothing."""

    def forward(self: LlamaRMSNorm, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def exact_llava(llava_llama_path: Path, load_double: Callable, exact: None) -> VisionLanguageModel:
    """LLaVA-Llama (two query heads for each key head) in true float64."""
    return load_double(llava_llama_path)


@pytest.fixture(params=NAMES)
def exact_vlm(request: pytest.FixtureRequest, load_double: Callable, exact: None) -> VisionLanguageModel:
    """Each family in turn, in true float64."""
    return load_double(request.getfixturevalue(f"{request.param}_path"))


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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are files without content, for tests that do not look at them: drawing takes most of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, content, **words: None)


@pytest.fixture(scope="session")
def tiny_vlm() -> VisionLanguageModel:
    """The embedded, trained model. Whoever changes its weights puts them back."""
    return multrace.load(tiny_vlm_path())


@pytest.fixture(scope="session")
def flags_model_path() -> Path:
    """The real model that reads flags, in the cache of the user."""
    folder = multrace.workflow.cached_model("flags-vlm", cache=USER_CACHE)
    if folder is None:
        pytest.skip("needs the model that reads flags in the cache: make test-real")
    return folder


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands open their models without the proof, for tests of what they do then."""
    load = multrace.models.load
    monkeypatch.setattr(multrace.models, "load", lambda path, **settings: load(path, **settings | {"verify": False}))


@pytest.fixture
def load_once(
    tiny_vlm: VisionLanguageModel, random_llava_llama: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that ask for the embedded model or the LLaVA-Llama as it is get the one that is loaded.

    They must put its weights back. A copy in another folder is loaded anew.
    """
    load, opened = multrace.models.load, {str(vlm.name): vlm for vlm in (tiny_vlm, random_llava_llama)}

    def once(path: str | Path, **settings: object) -> VisionLanguageModel:
        is_plain = all(value in (None, "auto", False) for value in settings.values())
        return opened[str(path)] if is_plain and str(path) in opened else load(path, **settings)

    monkeypatch.setattr(multrace.models, "load", once)


def trace_with(**effects: list[list[float]]) -> CausalTrace:
    """A trace with these indirect effects over four groups; two noise samples; clean .9, corrupted .1."""
    corrupted = torch.tensor([[0.05, 0.15]], dtype=torch.float64)
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
        scale=None,
        deviation=None,
        question="Who $costs$?",
        tokens=("<image>", "<image>", "Who", " $costs", "$?", ":"),
        input_ids=(9, 9, 1, 2, 3, 4),
        row_positions=((0, 1), (2, 3, 4), (3,), (5,)),
        grouped=True,
        starred=(3,),
        patches=((0, 0, 0, 0), (1, 0, 1, 0)),
        spans={kind: torch.tensor([[layer, layer] for layer in range(layers)]) for kind in scores},
        answer_ids=(3,),
        answer="Ada",
        foil_ids=(),
        foil=None,
        clean_scores=torch.tensor([0.9], dtype=torch.float64),
        corrupted_scores=corrupted,
        samples={kind: values[None, ..., None].expand(-1, -1, -1, 2).clone() for kind, values in scores.items()},
        is_predicted=True,
        agreement={},
        engine=EngineReport(engine="plain", reason="made by hand", cells=48),
    )


def shifted(trace: CausalTrace, shift: float | torch.Tensor = 0.0, **changes: object) -> CausalTrace:
    """The same trace with its restored scores raised by this much, in every cell and sample."""
    return replace(trace, samples={kind: values + shift for kind, values in trace.samples.items()}, **changes)


@pytest.fixture
def shift_trace() -> Callable[..., CausalTrace]:
    """Raises all restored scores of a trace, and changes fields."""
    return shifted


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
