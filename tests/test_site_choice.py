"""The site of an edit by cause and by geometry: which MLPs count as causes, what leaks, tables, pictures and files."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import multrace as mt
import pytest
import torch
from matplotlib.figure import Figure
from model_fixtures import trace_with
from multrace.artefacts import ArtefactError
from multrace.data import World
from multrace.editing import Geometry
from multrace.editing.moments import second_moments
from multrace.editing.siblings import Siblings
from multrace.models import VisionLanguageModel
from multrace.tracing import CausalTrace, EditSite, average
from multrace.workflow import choose_site, locate

COMPANIES = tuple(entity.name for entity in World().of_kind("company"))
NONE = [0.0] * 6
TOKENS = ("constraint_last", "last")


def traced(name: Sequence[float], last: Sequence[float], *, onset: int = 0, window: int = 3) -> CausalTrace:
    """A trace with these effects of MLPs at the two tokens; hidden states at the name carry the fact from onset on."""
    half = window // 2
    spans = torch.tensor([[max(0, layer - half), min(5, layer + half)] for layer in range(6)])
    hidden = [0.6 if layer >= onset else 0.0 for layer in range(6)]
    trace = trace_with(hidden=[NONE, NONE, hidden, [0.0, 0.0, 0.0, 0.6, 0.6, 0.6]], mlp=[NONE, NONE, [*name], [*last]])
    return replace(trace, window=window, spans={**trace.spans, "mlp": spans})


def geometry(
    leak: Sequence[Sequence[float]],
    *,
    reach: float | Sequence[Sequence[float]] = 1.0,
    own: float | Sequence[Sequence[float]] = 0.0,
    tokens: tuple[str, ...] = TOKENS,
    layers: Sequence[int] = tuple(range(6)),
) -> Geometry:
    """What edits would reach and leak to at each token (row) and layer."""
    leaks = torch.tensor(leak, dtype=torch.float64)
    reach, own = (torch.tensor(each, dtype=torch.float64).expand_as(leaks).clone() for each in (reach, own))
    parts = {"reach": reach, "leak_own": own, "left": torch.ones_like(leaks)}
    return Geometry(tokens=tokens, layers=tuple(layers), leak=leaks, **parts)


EVEN = [[0.1] * 6] * 2


# ---- causes ----


def test_windows_that_restore_a_corrupted_token_are_no_causes():
    """Under a corruption of the text the embedding itself brings everything back, and its MLPs with it."""
    trace = traced([0.5, 0.4, 0.2, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.05, 0.0])
    effects = trace.indirect_effect("mlp")[2]
    assert trace.onset("constraint_last") == 0 and int(effects.argmax()) == 0  # the site without the windows
    assert (trace.first_sound_layer(0), trace.first_sound_layer(1), trace.first_sound_layer(4)) == (2, 1, 4)
    assert trace.edit_site().layer == 2
    site = choose_site(trace, geometry(EVEN))
    assert (site.layer, site.token, site.onset) == (2, "constraint_last", 0)
    excluded = {each.layer: each.excluded for each in site.candidates if each.token == "constraint_last"}
    assert [bool(excluded[layer]) for layer in range(6)] == [True, True, False, False, False, False]
    assert "restores the corrupted token itself" in excluded[1]
    alone = replace(trace, window=1, spans={"hidden": trace.spans["hidden"], "mlp": trace.spans["hidden"]})
    assert alone.first_sound_layer(0) == 1 and choose_site(alone, geometry(EVEN)).layer == 1


def test_windows_that_all_hold_layer_0_leave_a_token_no_site():
    trace = traced([0.5, 0.4, 0.2, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.2, 0.1], window=13)
    assert trace.first_sound_layer(0) is None and trace.first_sound_layer(3) == 3
    assert (trace.edit_site().layer, trace.edit_site().token) == (4, "last")
    site = choose_site(trace, geometry(EVEN))
    assert (site.layer, site.token) == (4, "last")
    assert all(each.excluded for each in site.candidates if each.token == "constraint_last")


def test_layers_below_the_onset_are_no_causes():
    trace = traced([0.0, 0.5, 0.2, 0.1, 0.1, 0.0], NONE, onset=2)
    site = choose_site(trace, geometry([[0.01, 0.01, 0.2, 0.1, 0.1, 0.01], [0.1] * 6]))
    assert site.layer in (2, 3, 4) and site.onset == 2
    reasons = [each.excluded for each in site.candidates if each.token == "constraint_last"]
    assert reasons == ["before the onset, layer 2"] * 2 + [""] * 4


def test_only_half_of_the_largest_effect_makes_a_cause():
    trace = traced([0.0, 0.0, 0.4, 0.21, 0.19, 0.0], NONE)
    free = [[0.2, 0.2, 0.2, 0.2, 0.0, 0.0], [0.2] * 6]
    better = [[0.9] * 6, [0.9] * 6]
    better[0] = [0.9, 0.9, 0.5, 0.8, 1.0, 1.0]
    assert choose_site(trace, geometry(free, reach=better)).layer == 3  # layers 4 and 5 reach more and leak nothing


# ---- reach and leak ----


def test_the_leak_to_others_is_bounded_and_the_worth_decides():
    trace = traced([0.0, 0.0, 0.3, 0.4, 0.35, 0.3], NONE)
    leak = [[0.0, 0.0, 0.24, 0.4, 0.2, 0.26], [0.0] * 6]
    reach = [[1.0, 1.0, 0.6, 1.0, 0.7, 1.0], [1.0] * 6]
    own = [[0.0, 0.0, 0.1, 0.0, 0.3, 0.0], [0.0] * 6]
    found = geometry(leak, reach=reach, own=own)
    assert trace.edit_site().layer == 3  # by the effects alone
    site = choose_site(trace, found)
    assert (site.layer, site.reach, site.leak, site.leak_own) == (2, 0.6, 0.24, 0.1)  # .6 x .9 against .7 x .7
    assert site.effect == pytest.approx(0.3)
    assert choose_site(trace, found, leak_bound=0.5).layer == 3
    assert choose_site(trace, found, leak_bound=0.21).layer == 4
    assert site.reason == (
        "75% of the largest effect of an MLP; a change there reaches 60% at other wordings and pictures, leaks 24% at "
        "the same question about others and 10% at other questions about the subject"
    )


def test_where_every_cause_leaks_the_site_is_the_one_that_leaks_least():
    trace = traced([0.0, 0.0, 0.3, 0.4, 0.35, 0.0], NONE)
    site = choose_site(trace, geometry([[0.0, 0.0, 0.5, 0.6, 0.45, 0.0], [0.0] * 6]))
    assert (site.layer, site.leak) == (4, 0.45)
    assert "no cause leaks less than 25%: keep more siblings" in site.reason


def test_reach_is_no_more_than_whole_and_unknown_reach_no_demerit():
    trace = traced([0.0, 0.0, 0.4, 0.4, 0.4, 0.0], NONE)
    own = [[0.0, 0.0, 0.2, 0.1, 0.3, 0.0], [0.0] * 6]
    assert choose_site(trace, geometry(EVEN, reach=[[1.0, 1.0, 1.9, 1.2, 1.0, 1.0], [1.0] * 6], own=own)).layer == 3
    site = choose_site(trace, geometry(EVEN, reach=nan, own=own))
    assert (site.layer, site.reach) == (3, None)
    assert "reaches" not in site.reason
    unasked = choose_site(trace, geometry(EVEN, own=nan))
    assert unasked.leak_own is None and "about the subject" not in unasked.reason


def test_without_anything_to_leak_to_the_largest_effect_decides():
    trace = traced([0.0, 0.0, 0.3, 0.4, 0.35, 0.0], NONE)
    for nothing in (None, geometry([[nan] * 6] * 2)):
        site = choose_site(trace, nothing)
        assert site == trace.edit_site()
        assert (site.layer, site.reach, site.leak, site.leak_own, site.candidates) == (3, None, None, None, ())


def test_tokens_that_nothing_is_predicted_for_are_taken_last():
    """A token that a trace names by its position has effects and no prediction, which is no promise."""
    trace = traced([0.0, 0.0, 0.3, 0.2, 0.2, 0.0], [0.0, 0.0, 0.0, 0.1, 0.4, 0.1])
    trace = replace(trace, row_tokens=(None, None, "constraint_last", 5))
    known = geometry([[0.2] * 6], tokens=("constraint_last",))
    assert (trace.edit_site().token, trace.edit_site().layer) == (5, 4)
    site = choose_site(trace, known)
    assert (site.token, site.layer, site.leak) == ("constraint_last", 2, 0.2)
    assert all(isnan(each.leak) and isnan(each.reach) for each in site.candidates if each.token == 5)
    weak = replace(trace, samples={**trace.samples, "mlp": trace.samples["mlp"].clone()})
    weak.samples["mlp"][:, 2] = 0.1  # the named token acts no more, and the other one is the only cause
    site = choose_site(weak, known)
    assert (site.token, site.layer, site.leak) == (5, 4, None)


def test_layers_without_moments_are_out_of_the_question():
    trace = traced([0.0, 0.0, 0.3, 0.4, 0.35, 0.0], NONE)
    site = choose_site(trace, geometry([[0.1] * 2] * 2, layers=(2, 4)))
    assert site.layer in (2, 4)
    reasons = {each.layer: each.excluded for each in site.candidates if each.token == "constraint_last"}
    assert (reasons[3], reasons[4]) == ("no second moments of this layer", "")
    assert choose_site(trace, geometry([[0.1]] * 2, layers=(0,))).layer == 3  # nothing is left to choose from


def test_an_average_chooses_as_a_trace_does():
    trace = traced([0.0, 0.0, 0.3, 0.4, 0.35, 0.0], NONE)
    found = geometry([[0.0, 0.0, 0.1, 0.6, 0.45, 0.0], [0.0] * 6])
    one, mean = (choose_site(each, found) for each in (trace, average([trace, trace])))
    assert (one.layer, one.token, one.leak, one.onset) == (mean.layer, mean.token, mean.leak, mean.onset)
    assert one.layer == 2


def test_what_is_no_trace_of_causes_stays_an_error():
    trace = traced(NONE, NONE)
    with pytest.raises(mt.TraceError, match="does not lower"):
        choose_site(replace(trace, clean_scores=torch.tensor([0.1], dtype=torch.float64)), geometry(EVEN))
    site = choose_site(trace, geometry(EVEN))  # no MLP acts at all
    assert abs(site.effect) < 1e-12 and len(site.candidates) == 12


# ---- tables, pictures, files ----


@pytest.fixture
def site() -> EditSite:
    trace = traced([0.5, 0.4, 0.2, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.15, 0.0])
    return choose_site(trace, geometry(EVEN, reach=nan))


def test_a_table_has_every_place_with_those_that_count_first(site: EditSite):
    table = site.table()
    assert [*table.columns] == ["token", "layer", "effect", "reach", "leak", "leak_own", "excluded"]
    assert len(table) == len(site.candidates) == 12
    counted = int((table["excluded"] == "").sum())
    assert (table["excluded"].iloc[:counted] == "").all() and (table["excluded"].iloc[counted:] != "").all()
    for part in (table.iloc[:counted], table.iloc[counted:]):
        assert part["effect"].is_monotonic_decreasing
    assert (table["token"].iloc[0], table["layer"].iloc[0]) == ("constraint_last", 2)
    assert table["effect"].max() == pytest.approx(0.5)  # of layer 0, which is excluded
    assert EditSite(layer=1, token="last", effect=0.1, onset=0, reason="").table().empty


def test_a_picture_has_a_panel_for_each_token(site: EditSite, tmp_path: Path):
    figure = site.plot(tmp_path / "site.png")
    assert isinstance(figure, Figure)
    assert (tmp_path / "site.png").stat().st_size > 10_000
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title("left") for axes in panels] == ["edits at 'constraint_last'", "edits at 'last'"]
    effects = next(line for line in panels[0].lines if len(line.get_ydata()) == 6)
    assert [*effects.get_ydata()][2:] == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-6)
    with pytest.raises(ArtefactError, match="no curves"):
        EditSite(layer=1, token="last", effect=0.1, onset=0, reason="").plot()


def test_a_site_comes_back_from_plain_values(site: EditSite):
    plain = site.as_json()
    assert "candidates" not in plain and plain["reach"] is None
    assert EditSite(**plain) == replace(site, candidates=())
    strongest = EditSite(layer=1, token=4, effect=0.1, onset=0, reason="")
    assert EditSite(**strongest.as_json()) == strongest
    assert "candidates" not in repr(site)


# ---- on the embedded model ----


@pytest.fixture(scope="module")
def requests() -> list[mt.EditRequest]:
    texts = [f"Who founded {name}?" for name in COMPANIES[:2]]
    questions = [mt.Question(text=text, constraint=name) for text, name in zip(texts, COMPANIES, strict=False)]
    return [mt.EditRequest(question=question, target="Pruro") for question in questions]


@pytest.fixture(scope="module")
def traces(tiny_vlm: VisionLanguageModel, requests: list[mt.EditRequest]) -> list[CausalTrace]:
    options = {"positions": TOKENS, "sites": ("hidden", "mlp"), "progress": False}
    corruption = mt.ReplaceText(COMPANIES[7])
    prompts = [tiny_vlm.prompt_for(request.question) for request in requests]
    return [mt.causal_trace(tiny_vlm, prompt, corruption=corruption, **options) for prompt in prompts]


KEPT = Siblings(names=COMPANIES[1:13], own=0)


def test_a_located_edit_leaks_what_its_site_says(
    tiny_vlm: VisionLanguageModel, requests: list[mt.EditRequest], traces: list[CausalTrace]
):
    options = {"traces": traces[:1], "progress": False}
    editor = mt.MultEdit(layer=0, steps=2, answer_keys=False, siblings=KEPT)
    (site,) = locate(tiny_vlm, requests[:1], editor=editor, **options).edit_sites
    assert [each.token for each in site.candidates[::8]] == [
        token for row, token in enumerate(traces[0].row_tokens) if traces[0].onset(row) is not None
    ]
    chosen = next(each for each in site.candidates if (each.token, each.layer) == (site.token, site.layer))
    assert not chosen.excluded and chosen.leak == site.leak
    delta = replace(editor, layer=None, where=site).edit(tiny_vlm, requests[:1], progress=False)
    assert delta.requests[0]["leak"] == pytest.approx(site.leak, rel=1e-3)
    (strongest,) = locate(tiny_vlm, requests[:1], editor=None, **options).edit_sites
    assert strongest == traces[0].edit_site() and strongest.candidates == ()
    (known,) = locate(tiny_vlm, requests[:1], editor=lambda **place: replace(editor, **place), **options).edit_sites
    assert replace(known, candidates=()) == replace(site, candidates=())  # where nan is not nan


def test_each_request_is_predicted_by_itself_and_all_together(
    tiny_vlm: VisionLanguageModel, requests: list[mt.EditRequest], traces: list[CausalTrace]
):
    editor = mt.MultEdit(layer=0, siblings=KEPT)
    each = locate(tiny_vlm, requests, traces=traces, editor=editor, per_request=True, progress=False).edit_sites
    together = locate(tiny_vlm, requests, traces=traces, editor=editor, progress=False).edit_sites
    assert together[0] == together[1]
    alone = [
        locate(tiny_vlm, [request], traces=[trace], editor=editor, progress=False).edit_site
        for request, trace in zip(requests, traces, strict=True)
    ]
    assert [(site.layer, site.token) for site in each] == [(site.layer, site.token) for site in alone]
    assert each[0].candidates != each[1].candidates


def test_editors_that_weigh_old_keys_are_predicted_where_there_are_moments(
    tiny_vlm: VisionLanguageModel, requests: list[mt.EditRequest], traces: list[CausalTrace]
):
    prompts = [tiny_vlm.prompt_for(request.question) for request in requests]
    moments = second_moments(tiny_vlm, prompts, layers=(3, 4), progress=False)
    options = {"traces": traces[:1], "progress": False}
    editor = mt.ROME(layer=0, siblings=KEPT, ridge_fraction=0.01)
    site = locate(tiny_vlm, requests[:1], editor=editor, moments=moments, **options).edit_site
    assert {each.layer for each in site.candidates if not isnan(each.leak)} == {3, 4}
    assert site.layer in (3, 4)
    refreshed = mt.AlphaEdit(layer=0, siblings=KEPT, null_share=0.9, null_refresh=5, spread=1)
    free = locate(tiny_vlm, requests[:1], editor=refreshed, **options).edit_site  # without moments
    assert not any(isnan(each.leak) for each in free.candidates)


def test_the_choice_changes_no_weight(
    tiny_vlm: VisionLanguageModel, requests: list[mt.EditRequest], traces: list[CausalTrace], make_photo: Callable
):
    before = {name: weight.clone() for name, weight in tiny_vlm.model.state_dict().items()}
    locate(tiny_vlm, requests[:1], traces=traces[:1], editor=mt.MultEdit(layer=0, siblings=KEPT), progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_vlm.model.state_dict().items())
