"""Run `multrace trace` for one question or for every line of a file."""

from .options.trace import TraceOptions
from .outputs import check_files
from .trace_files import FILES, compute_trace, forget_cells, summary, write_trace
from .trace_records import trace_records


def run(settings: TraceOptions) -> int:
    """Trace one question or every line of a file; write traces and maps, print effects and causal blocks."""
    settings.check()
    return trace_records(settings) if settings.question is None else _trace_one(settings)


def _trace_one(settings: TraceOptions) -> int:
    settings.check_question()
    corruption = settings.corruption()
    check_files(settings.out, FILES)
    vlm = settings.open_model()
    prompt = settings.prompt(vlm)
    trace = compute_trace(settings, vlm, prompt, corruption)
    written = write_trace(trace, prompt, settings.out)
    forget_cells(settings.out)
    print(*summary(trace), sep="\n")
    print("written:", ", ".join(map(str, written)))
    return 0
