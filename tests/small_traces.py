"""Short traces of one question, which tests of scores and of weak corruptions share."""

from multrace import Prompt, VisionLanguageModel
from multrace.tracing import CausalTrace, Corruption, Engine, causal_trace
from PIL import Image

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
ENGINES = {"plain": Engine(name="plain"), "replay": Engine(name="replay", checks=0)}
ROWS = ("image", "question", "last")


def ask(vlm: VisionLanguageModel, image: Image.Image | None) -> Prompt:
    return vlm.prompt(image if vlm.has_vision else None, QUESTION, constraint=CONSTRAINT)


def trace(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, **settings: object) -> CausalTrace:
    settings = {"sites": "mlp", "window": 1, "positions": ROWS, "even_if_weak": True, "progress": False} | settings
    return causal_trace(vlm, prompt, corruption=corruption, **settings)
