"""The model under study: loading, prompts, addresses and hooks."""

from .addresses import Projection, Site
from .baukit_names import Trace, TraceDict
from .errors import ModelError, ReplayError
from .families import FAMILIES, Family
from .generation import Score
from .hooks import capture, patch
from .loading import load
from .prompts import Patch, Prompt, collate
from .vlm import VisionLanguageModel

__all__ = [
    "FAMILIES",
    "Family",
    "ModelError",
    "Patch",
    "Projection",
    "Prompt",
    "ReplayError",
    "Score",
    "Site",
    "Trace",
    "TraceDict",
    "VisionLanguageModel",
    "capture",
    "collate",
    "load",
    "patch",
]
