from .in_context import InContext as InContext
from .lora import Lora as Lora
from .training import FineTune as FineTune
