"""multrace bench: measure how fast multrace is, side by side with the usual way in one run."""

from collections.abc import Mapping
from types import ModuleType

from . import bench_edit, bench_flow, bench_trace

HELP = "measure speed and memory against the usual way"
EXAMPLE = """examples:
  multrace bench trace --quick
  multrace bench flow --quick
  multrace bench edit --quick
  multrace bench trace --help
"""
COMMANDS: Mapping[str, ModuleType] = {"trace": bench_trace, "flow": bench_flow, "edit": bench_edit}
"""Commands of its own, each a module like those of the other commands."""
