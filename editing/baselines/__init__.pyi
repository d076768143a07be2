from .breadth_first import BreadthFirst as BreadthFirst
from .fine_tuning import FineTune as FineTune
from .in_context import (
    InContext as InContext,
    change_file as change_file,
    save_change as save_change,
    stored_change as stored_change,
)
from .lora import Lora as Lora
