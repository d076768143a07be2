from . import evaluate as evaluate
from .asking import CorruptionOptions as CorruptionOptions, ModelOptions as ModelOptions
from .running import RunOptions as RunOptions
