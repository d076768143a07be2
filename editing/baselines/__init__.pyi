from .in_context import InContext as InContext
from .training import FineTune as FineTune, Lora as Lora
