from .in_context import CHANGES as CHANGES, InContext as InContext
from .training import FineTune as FineTune, Lora as Lora
