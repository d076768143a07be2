"""The model under study: loading, prompts, addresses and hooks."""

from .baukit_names import Trace, TraceDict
from .errors import ModelError, ReplayError
from .families.addresses import Projection, Site
from .families.table import FAMILIES, Family
from .generation import Score
from .hooks import capture, patch
from .loading.load import load
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
