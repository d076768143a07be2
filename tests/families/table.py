"""What the tests know of each family: whether it opens, which engine traces it, and what it needs. docs/families.md is
made from this table, and the battery checks each line of it on a model."""

from dataclasses import dataclass
from importlib.util import find_spec

from .folders import Recipe
from .seeing import SEEING
from .texts import TEXTS

RECIPES: dict[str, Recipe] = {**SEEING, **TEXTS}


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the battery expects of one family."""

    title: str
    """The name that people know."""
    core: bool = False
    """Whether `make test` runs its battery."""
    refused: str = ""
    """Words of the reason why `load` refuses it; empty if it is proven."""
    plain: str = ""
    """Words of the reason why the fast engine leaves it to plain passes; empty if the fast engine runs."""
    partly: str = ""
    """Words of the warning that only some layers have attention edges to cut; empty if all have."""
    placeless: str = ""
    """Words of the reason why image tokens have no place in the picture; empty if boxes give positions."""
    mixes: bool = False
    """Whether the tower is a convolutional network, which carries a change of one place anywhere."""
    crosses: bool = False
    """Whether pictures enter by cross-attention and stand at no position of the prompt."""
    why: str = ""
    """The same in words for docs/families.md, where something does not work or is slow."""
    pictures: str = "unequal"
    """How many pictures its processor takes in one prompt: several of "unequal" sizes, only "equal" ones, or "one"."""
    experts: bool = False
    """Whether no single map writes the MLP output, so that routed experts are edited."""
    dtype: str = "float64"
    """The dtype in which it is checked: transformers has no float64 products of experts."""
    needs: tuple[str, ...] = ()
    """Packages that its processor or its model needs besides multrace's own."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The needed packages that this machine lacks."""
        return tuple(package for package in self.needs if find_spec(package) is None)


LINEAR = {
    "partly": "only 3 have attention edges to cut",
    "why": "layers of linear attention carry a running state from token to token, and have no edges to cut",
}  # fmt: skip
EXPERTS = {"experts": True, "dtype": "float32"}
QUERIES = "quer"
VISION, TIMM = ("torchvision",), ("torchvision", "timm")

KNOWN: dict[str, Known] = {
    "qwen2_vl": Known(title="Qwen2-VL", core=True),
    "qwen2_5_vl": Known(title="Qwen2.5-VL", core=True),
    "qwen3_vl": Known(title="Qwen3-VL", core=True),
    "qwen3_vl_moe": Known(title="Qwen3-VL with experts", **EXPERTS),
    "qwen3_5": Known(title="Qwen3.5", **LINEAR),
    "glm4v": Known(title="GLM-4V", core=True),
    "kimi_k25": Known(title="Kimi K2.5", needs=VISION),
    "minicpmv4_6": Known(title="MiniCPM-V 4.6", **LINEAR),
    "llava": Known(title="LLaVA", core=True),
    "vipllava": Known(title="ViP-LLaVA"),
    "llava_next": Known(title="LLaVA-NeXT", core=True),
    "llava_onevision": Known(title="LLaVA-OneVision", core=True),
    "video_llava": Known(title="Video-LLaVA"),
    "fast_vlm": Known(title="FastVLM", mixes=True, needs=TIMM),
    "perception_lm": Known(title="PerceptionLM", pictures="equal", needs=TIMM),
    "mistral3": Known(title="Mistral 3", core=True),
    "pixtral": Known(title="Pixtral"),
    "idefics3": Known(title="Idefics 3", core=True),
    "smolvlm": Known(title="SmolVLM"),
    "internvl": Known(title="InternVL", core=True),
    "aya_vision": Known(title="Aya Vision"),
    "cohere2_vision": Known(title="Command A Vision", needs=VISION),
    "ovis2": Known(title="Ovis2"),
    "llama4": Known(title="Llama 4", needs=VISION, dtype="float32"),
    "got_ocr2": Known(title="GOT-OCR2"),
    "aria": Known(title="Aria", placeless=QUERIES, dtype="float32"),
    "paligemma": Known(title="PaliGemma"),
    "paligemma2": Known(title="PaliGemma 2", core=True),
    "gemma3": Known(title="Gemma 3", core=True),
    "gemma3n": Known(
        title="Gemma 3n", needs=TIMM, refused="AltUp", why="AltUp: four streams in place of one residual stream"
    ),
    "gemma4": Known(title="Gemma 4 with inputs per layer and shared keys"),
    "gemma4_dense": Known(title="Gemma 4"),
    "deepseek_vl": Known(title="DeepSeek-VL"),
    "deepseek_vl_hybrid": Known(title="DeepSeek-VL, two resolutions"),
    "janus": Known(title="Janus"),
    "blip-2": Known(title="BLIP-2 over OPT", pictures="one", placeless=QUERIES),
    "instructblip": Known(title="InstructBLIP", pictures="one", placeless=QUERIES),
    "mllama": Known(
        title="Llama 3.2 Vision",
        crosses=True,
        placeless="no position",
        partly="only 0, 2, 4, 5 have attention edges to cut",
        why="layers of cross-attention have no edges to cut",
    ),
    "phi4_multimodal": Known(
        title="Phi-4-multimodal",
        needs=VISION,
        refused="inside its text stack",
        why="pictures are embedded inside its text stack",
    ),
    "florence2": Known(
        title="Florence-2",
        refused="encoder",
        why="an encoder-decoder, whose two stacks each have a residual stream of their own",
    ),
    "llama": Known(title="Llama"),
    "qwen2": Known(title="Qwen2"),
    "qwen3": Known(title="Qwen3"),
    "mistral": Known(title="Mistral"),
    "gemma": Known(title="Gemma"),
    "gemma2": Known(title="Gemma 2"),
    "gemma3_text": Known(title="Gemma 3, text only"),
    "phi": Known(title="Phi"),
    "phi3": Known(title="Phi-3"),
    "gpt_neox": Known(title="GPT-NeoX"),
    "gptj": Known(title="GPT-J"),
    "olmo2": Known(title="OLMo 2"),
    "olmo3": Known(title="OLMo 3"),
    "gpt_oss": Known(title="GPT-OSS", **EXPERTS),
    "mixtral": Known(title="Mixtral", **EXPERTS),
    "qwen3_moe": Known(title="Qwen3 with experts", **EXPERTS),
    "glm4": Known(title="GLM-4"),
    "cohere2": Known(title="Command R7B"),
    "granite": Known(title="Granite"),
    "smollm3": Known(title="SmolLM3"),
    "opt": Known(title="OPT"),
}
