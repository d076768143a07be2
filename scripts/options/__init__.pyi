from . import edit as edit, evaluate as evaluate
from .asking import CorruptionOptions as CorruptionOptions, ModelOptions as ModelOptions
from .edit import RequestOptions as RequestOptions
from .running import RunOptions as RunOptions
