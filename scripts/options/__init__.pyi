from . import edit as edit, evaluate as evaluate, flow as flow, trace as trace
from .asking import CorruptionOptions as CorruptionOptions, ModelOptions as ModelOptions
from .edit import RequestOptions as RequestOptions
from .editors import NAMES as NAMES
from .trace import TraceOptions as TraceOptions
