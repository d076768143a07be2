"""The average over prompts for the results of all experiments."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from ..artefacts.averages import Averager, averaged
from ..artefacts.folders import ArtefactError
from ..artefacts.results import Result
from .attention.contributions import ContributionsAverager
from .attention.contributions_result import AttentionContributions
from .attention.weights import AttentionSaliency, AttentionShare, SaliencyAverager, ShareAverager
from .causal.average import TraceAverager
from .causal.result import CausalTrace
from .knockout.result import AttentionKnockout, KnockoutAverager
from .lens.logit_lens import LogitLensAverager
from .lens.result import LogitLens
from .pruning.average import PruningAverager
from .pruning.result import ImagePruning


def average(results: Iterable[Result], **options: Any) -> Any:
    """Return the average over prompts of results of one experiment that were made with equal settings.

    Results are added one by one and are not kept, so a generator that loads them from files needs memory for only one
    of them.

    Args:
        results: results of one kind, such as `CausalTrace`, `AttentionKnockout` or `LogitLens`.
        options: settings of this kind's average: `only_right` and `filtered` of an `AttentionKnockout` (see
            `KnockoutAverager`); `groups`, `reduction`, `share` and `bins` of `AttentionContributions` (see
            `ContributionsAverager`).

    Returns:
        The average, such as an `AverageTrace`, with means, 95 % intervals over prompts, `plot` and `to_dataframe`.

    Raises:
        ArtefactError: for no results, for results of different kinds, and for results with different settings.
        TraceError: for results that have no common part to average.

    Example:
        >>> import multrace as mt
        >>> vlm = mt.load(mt.data.tiny_vlm_path())
        >>> prompts = [vlm.prompt(None, f"Who founded {name}?", constraint=name) for name in ("Kimdor", "Lovmis")]
        >>> settings = {"corruption": mt.TextNoise(), "progress": False, "even_if_weak": True}
        >>> mean = mt.average(mt.causal_trace(vlm, prompt, **settings) for prompt in prompts)
        >>> mean.count
        2
    """
    remaining = iter(results)
    first = next(remaining, None)
    if first is None:
        raise ArtefactError("no results to average; pass at least one")
    return averaged(averager_of(type(first), **options), chain([first], remaining))


def averager_of(kind: type[Result], **options: Any) -> Averager[Any, Any]:
    """Return an empty average for results of this kind, to which they are added one by one; options as in `average`.

    Raises `ArtefactError` for a kind of result that has no average.
    """
    averagers: dict[type, Any] = {
        AttentionContributions: ContributionsAverager,
        AttentionKnockout: KnockoutAverager,
        AttentionSaliency: SaliencyAverager,
        AttentionShare: ShareAverager,
        CausalTrace: TraceAverager,
        ImagePruning: PruningAverager,
        LogitLens: LogitLensAverager,
    }
    if kind not in averagers:
        kinds = ", ".join(each.__name__ for each in averagers)
        raise ArtefactError(f"a {kind.__name__} has no average over prompts; pass results of one kind: {kinds}")
    return averagers[kind](**options)
