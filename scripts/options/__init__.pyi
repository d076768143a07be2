from .asking import CorruptionOptions as CorruptionOptions, ModelOptions as ModelOptions
from .bench_edit import BenchEdit as BenchEdit
from .demo import Demo as Demo
from .edit import RequestOptions as RequestOptions
from .editors import NAMES as NAMES
from .moments import parse_layers as parse_layers
from .trace import TraceOptions as TraceOptions
