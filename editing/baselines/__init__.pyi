from .in_context import (
    InContext as InContext,
    change_file as change_file,
    save_change as save_change,
    stored_change as stored_change,
)
from .training import FineTune as FineTune, Lora as Lora
