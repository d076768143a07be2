"""The readings that the options of `multrace flow` ask for."""

from .flow_contributions import Failure, ImageToConstraint, ToLast
from .flow_knockout import Knockout
from .flow_lens import Lens
from .flow_reading import Reading
from .flow_relevance import Cam, Pruned, Saliency, Share
from .options.flow import FlowOptions


def readings_of(settings: FlowOptions) -> tuple[Reading, ...]:
    """Return what is computed for each question."""
    one = settings.is_one
    positions = settings.positions or (("last", "question") if one else ("last",))
    heads = "each" if settings.heads == ("each",) else settings.heads
    knockout = Knockout(flows=settings.flows, windows=settings.windows, heads=heads, whole_answer=settings.whole_answer)
    failure = () if one else (Failure(seed=settings.seed),)
    cam = Cam(samples=settings.smooth, seed=settings.seed)
    known: dict[str, tuple[Reading, ...]] = {
        "knockout": (knockout,),
        "lens": (Lens(positions=positions),),
        "contributions": (ToLast(by_head=one), ImageToConstraint(by_head=one), *failure),
        "relevance": (cam, Share(), Saliency(), Pruned(keep=settings.keep)),
    }
    return tuple(reading for name in settings.analyses for reading in known[name])


def check_settings(settings: FlowOptions) -> None:
    """Raises `CommandError` or `TraceError` for options that do not fit together, or that no model could follow."""
    settings.check()
    for reading in readings_of(settings):
        reading.check_settings()
