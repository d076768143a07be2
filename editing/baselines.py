"""The baselines that closed-form editors are compared with, by one name: fine-tuning, LoRA, in-context editing."""

from .fine_tuning import DenseChange, FineTune
from .in_context import ContextChange, InContext
from .lora import Lora, LowRankChange

__all__ = ["ContextChange", "DenseChange", "FineTune", "InContext", "Lora", "LowRankChange"]
