"""Tracing and editing chained: trace the facts, let the trace choose layer and token, edit there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from .editing import Delta, EditRequest, MultEdit
from .models import VisionLanguageModel
from .tracing import AverageTrace, Corruption, EditSite, TraceError, average, causal_trace

GROUPS = ("image", "question", "constraint_last", "last")
"""The token groups that are traced unless others are asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocatedEdit:
    """What `locate_then_edit` found and made."""

    trace: AverageTrace
    """Mean indirect effects over the requests."""
    site: EditSite
    """The layer and token that the trace chose."""
    deltas: tuple[Delta, ...] = field(repr=False)
    """One delta for all requests together, or one for each."""


def locate_then_edit(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    *,
    corruptions: Sequence[Corruption],
    jointly: bool = True,
    groups: Sequence[str] = GROUPS,
    window: int = 3,
    progress: bool = False,
) -> LocatedEdit:
    """Trace, site and deltas for these facts; the model is left as it was.

    Every request's prompt is traced for the model's present answer under its own corruption (the picture of something
    else, as a rule, since only image corruption shows where the picture arrives); the mean trace chooses one site for
    all. jointly: all requests in one closed-form solve, else one delta each. TraceError if the numbers of requests and
    corruptions differ, if a corruption does not lower its answer's probability, or if the trace shows no site;
    EditError as `MultEdit.edit`.
    """
    if not requests or len(requests) != len(corruptions):
        raise TraceError(
            f"{len(requests)} requests with {len(corruptions)} corruptions; "
            "pass at least one request, and one corruption for each"
        )
    pairs = list(zip(requests, corruptions, strict=True))
    trace = average(
        [
            causal_trace(vlm, request.prompt, corruption=corruption, positions=groups, window=window, progress=False)
            for request, corruption in tqdm(pairs, desc="tracing facts", disable=not progress)
        ]
    )
    site = trace.edit_site()
    editor = MultEdit(where=site)
    batches = [list(requests)] if jointly else [[request] for request in requests]
    deltas = [editor.edit(vlm, batch) for batch in tqdm(batches, desc="editing facts", disable=not progress)]
    return LocatedEdit(trace=trace, site=site, deltas=tuple(deltas))
