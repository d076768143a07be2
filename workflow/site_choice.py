"""The site of an edit by cause and by geometry: where a trace finds the fact, and where a change reaches and leaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import isnan, nan
from typing import Any

from ..data.facts import EditRequest
from ..editing.moments import Moments
from ..editing.solve import ClosedFormEditor
from ..editing.solve.geometry import Geometry, predict_geometry
from ..models import VisionLanguageModel
from ..tracing import AverageTrace, CausalTrace, EditSite, SiteCandidate, TraceError

EditorAt = ClosedFormEditor | Callable[..., ClosedFormEditor]
"""Settings whose layer and token are replaced, or what makes settings from `layer` and `token`."""
LEAK_BOUND = 0.25
"""Largest predicted share of a change that may arrive at the same question about others."""
_MOST = 6
"""Number of requests whose geometry is averaged."""
EFFECT_SHARE = 0.5
"""Share of the largest indirect effect from which on a place counts as a cause."""


def choose_site(
    trace: CausalTrace | AverageTrace,
    geometry: Geometry | None,
    *,
    fraction: float = 0.25,
    leak_bound: float = LEAK_BOUND,
) -> EditSite:
    """Return the site of an edit: a cause of the answer where a change reaches the fact and leaks little.

    Causes are the MLPs at or after the onset of their token whose indirect effect is at least half of the largest. Of
    those with a predicted leak within the bound, the site is the one with the largest reach x (1 - leak to other
    questions about the same subject); of several with no leak within the bound, the one that leaks least. Without a
    geometry, or where nothing is known that an edit could leak to, the site is that of the largest effect.

    Args:
        trace: A trace of hidden states and MLPs, or an average of traces.
        geometry: What edits would reach and leak to, for the trace's tokens.
        fraction: As in `CausalTrace.edit_site`.
        leak_bound: Largest predicted leak to the same question about others.

    Raises:
        TraceError: As `CausalTrace.edit_site`.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import Siblings, predict_geometry
        >>> from multrace.workflow import choose_site
        >>> vlm, others = mt.load(tiny_vlm_path()), ("Brovon", "Fulex", "Lailon", "Valdex")
        >>> prompt = vlm.prompt(None, "Who founded Previco?", constraint="Previco")
        >>> options = {"corruption": mt.ReplaceText("Nimvex"), "positions": ("last",), "progress": False}
        >>> trace = mt.causal_trace(vlm, prompt, **options)
        >>> editor = mt.MultEdit(layer=0, siblings=Siblings(names=others, own=0))
        >>> request = mt.EditRequest(question=prompt, target="Pruro")
        >>> site = choose_site(trace, predict_geometry(vlm, [request], editor, tokens=["last"]))
        >>> site.layer >= site.onset, 0 < site.leak <= 0.25
        (True, True)
    """
    strongest = trace.edit_site(fraction)
    if geometry is None or not geometry.has_siblings:
        return strongest
    candidates = tuple(_candidates(trace, geometry, fraction))
    largest = max((each.effect for each in candidates if not each.excluded), default=0.0)
    causes = [each for each in candidates if not each.excluded and each.effect >= EFFECT_SHARE * largest]
    if largest <= 0 or not causes:
        return replace(strongest, candidates=candidates)
    causes = [each for each in causes if not isnan(each.leak)] or causes  # what is not predicted is no merit
    bounded = [each for each in causes if _known(each.leak, 0.0) <= leak_bound]
    best = max(bounded, key=_worth) if bounded else min(causes, key=lambda each: each.leak)
    onset = trace.onset(_row_of(trace, best.token), fraction)
    return EditSite(
        layer=best.layer,
        token=best.token,
        effect=best.effect,
        onset=onset or 0,
        reason=_reason(best, largest, is_bounded=bool(bounded), bound=leak_bound),
        reach=_or_none(best.reach),
        leak=_or_none(best.leak),
        leak_own=_or_none(best.leak_own),
        candidates=candidates,
    )


def placed(editor: EditorAt, *, layer: int, token: str | int) -> ClosedFormEditor:
    """Return settings at this layer and token."""
    if isinstance(editor, ClosedFormEditor):
        return replace(editor, where=None, layer=layer, token=token)
    return editor(layer=layer, token=token)


class SiteChooser:
    """Chooses the site of requests by a trace and by the geometry of their edits, which is predicted once for each."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        requests: Sequence[EditRequest],
        editor: EditorAt | None,
        moments: Moments | None,
        fraction: float,
        progress: bool,
    ) -> None:
        self.vlm, self.requests, self.editor, self.moments = vlm, requests, editor, moments
        self.fraction, self.progress = fraction, progress
        self._sites: dict[CausalTrace | AverageTrace, EditSite | TraceError] = {}

    def site(self, trace: CausalTrace | AverageTrace, members: Sequence[int]) -> EditSite:
        """Return the site that this trace gives the requests of these numbers. Raises `TraceError` if it shows none."""
        if trace not in self._sites:
            try:
                self._sites[trace] = self._chosen(trace, members)
            except TraceError as error:
                self._sites[trace] = error
        found = self._sites[trace]
        if isinstance(found, TraceError):
            raise found
        return found

    def _chosen(self, trace: CausalTrace | AverageTrace, members: Sequence[int]) -> EditSite:
        trace.edit_site(self.fraction)  # raises what is wrong with the trace before any work
        if self.editor is None:
            return choose_site(trace, None, fraction=self.fraction)
        first = [self.requests[index] for index in members]
        others = [request for index, request in enumerate(self.requests) if index not in set(members)]
        editor = placed(self.editor, layer=0, token="last")
        asked = {"moments": self.moments, "progress": self.progress}
        geometry = geometry_of(self.vlm, first, editor, trace, at_hand=others, **asked)
        return choose_site(trace, geometry, fraction=self.fraction)


def geometry_of(
    vlm: VisionLanguageModel,
    requests: Sequence[EditRequest],
    editor: ClosedFormEditor,
    trace: CausalTrace | AverageTrace,
    *,
    at_hand: Sequence[EditRequest] = (),
    moments: Moments | None = None,
    progress: bool = False,
) -> Geometry | None:
    """Return the geometry of edits at the tokens that a trace has a name for; None if it names none.

    Moments that the editor needs and that are not given are left out of the prediction. at_hand: other requests, which
    supply subjects and pictures.
    """
    tokens = [token for token in trace.row_tokens if isinstance(token, str)]
    if not tokens:
        return None
    if editor.needs_moments and moments is None:
        editor = replace(editor, moment_weight=0.0, null_threshold=None, null_share=None, null_refresh=None)
    options: dict[str, Any] = {"tokens": tokens, "moments": moments, "progress": progress}
    if editor.needs_moments and moments is not None:  # elsewhere no edit can be made
        options["layers"] = [layer for layer in moments.layers if layer < vlm.layers]
    return predict_geometry(vlm, [*requests, *at_hand], editor, most=min(len(requests), _MOST), **options)


def _candidates(trace: CausalTrace | AverageTrace, geometry: Geometry, fraction: float) -> Iterator[SiteCandidate]:
    effects = trace.indirect_effect("mlp").nan_to_num()
    for row, token in enumerate(trace.row_tokens):
        if token is None or (onset := trace.onset(row, fraction)) is None:
            continue
        start = trace.first_sound_layer(onset)
        place = geometry.tokens.index(token) if token in geometry.tokens else None
        for layer in range(effects.shape[1]):
            excluded = ""
            if layer < onset:
                excluded = f"before the onset, layer {onset}"
            elif start is None or layer < start:
                excluded = "its window restores the corrupted token itself"
            elif layer not in geometry.layers:
                excluded = "no second moments of this layer"
            is_known = place is not None and layer in geometry.layers
            at = (place, geometry.layers.index(layer)) if is_known else None
            yield SiteCandidate(
                token=token,
                layer=layer,
                effect=float(effects[row, layer]),
                reach=nan if at is None else geometry.reach[at].item(),
                leak=nan if at is None else geometry.leak[at].item(),
                leak_own=nan if at is None else geometry.leak_own[at].item(),
                excluded=excluded,
            )


def _row_of(trace: CausalTrace | AverageTrace, token: str | int) -> int:
    return trace.row_tokens.index(token)


def _worth(candidate: SiteCandidate) -> float:
    return min(_known(candidate.reach, 1.0), 1.0) * (1 - min(_known(candidate.leak_own, 0.0), 1.0))


def _known(value: float, otherwise: float) -> float:
    return otherwise if isnan(value) else value


def _or_none(value: float) -> float | None:
    return None if isnan(value) else value


def _reason(best: SiteCandidate, largest: float, *, is_bounded: bool, bound: float) -> str:
    """One line that says why."""
    share = f"{best.effect / largest:.0%} of the largest effect of an MLP"
    reach = "" if isnan(best.reach) else f"reaches {best.reach:.0%} at other wordings and pictures, "
    own = "" if isnan(best.leak_own) else f" and {best.leak_own:.0%} at other questions about the subject"
    leak = f"leaks {_known(best.leak, 0.0):.0%} at the same question about others{own}"
    end = "" if is_bounded else f"; no cause leaks less than {bound:.0%}: keep more siblings, or edit fewer facts"
    return f"{share}; a change there {reach}{leak}{end}"
