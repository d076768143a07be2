from .asking import CorruptionOptions as CorruptionOptions, ModelOptions as ModelOptions
from .running import RunOptions as RunOptions
