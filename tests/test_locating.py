"""Where traces say that facts are to be edited, and what is edited there: rules, fallbacks, order and undo."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import multrace as mt
import pytest
import torch
from multrace.data import World
from multrace.editing.solve import MEMIT
from multrace.models import VisionLanguageModel
from multrace.tracing import EditSite, WeakCorruption, average
from multrace.workflow import Located, locate, locate_then_edit

TRACING = {"positions": ("constraint_last", "last"), "sites": ("hidden", "mlp")}  # all that the choice needs
CASES = (0, 8, 23)
"""Facts whose own traces choose three different layers."""


@dataclass(frozen=True)
class Facts:
    """Facts of the world that the model is to learn anew."""

    requests: tuple[mt.EditRequest, ...]
    corruptions: tuple[mt.SwapImage, ...]

    @property
    def targets(self) -> list[str]:
        return [request.target for request in self.requests]

    def answers(self, vlm: VisionLanguageModel) -> list[str]:
        return vlm.answers([vlm.prompt_for(request.question) for request in self.requests])


def facts_of(vlm: VisionLanguageModel, indices: Sequence[int]) -> Facts:
    world = World()
    cases = world.edit_cases("outdated", "choose")
    requests, corruptions = [], []
    for case in (cases[index] for index in indices):
        record, entity = world.question(case.fact), world.entities[case.fact.entity]
        prompt = vlm.prompt(world.picture(entity, 0).image, record.text, constraint=record.constraint)
        requests.append(mt.EditRequest(question=prompt, target=case.target))
        first = case.fact.answer.split()[0]
        peers = world.of_kind(entity.kind)
        other = next(peer for peer in peers if peer.facts[case.fact.key].split()[0] != first)
        corruptions.append(mt.SwapImage(world.picture(other, 1).image))
    return Facts(requests=tuple(requests), corruptions=tuple(corruptions))


@pytest.fixture(scope="module")
def facts(tiny_vlm: VisionLanguageModel) -> Facts:
    return facts_of(tiny_vlm, CASES)


@pytest.fixture(scope="module")
def located(tiny_vlm: VisionLanguageModel, facts: Facts) -> Located:
    """Each fact with a site of its own."""
    return locate(tiny_vlm, facts.requests, corruptions=facts.corruptions, per_request=True, **TRACING)


@pytest.fixture(autouse=True)
def weights_stay(tiny_vlm: VisionLanguageModel):
    """Nothing here may leave a weight other than it was."""
    before = {name: weight.clone() for name, weight in tiny_vlm.model.state_dict().items()}
    yield
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_vlm.model.state_dict().items())


def slow_site(trace: mt.CausalTrace | mt.tracing.AverageTrace, fraction: float = 0.25) -> tuple[int, str, int]:
    """(layer, token, onset): the rule in plain words."""
    hidden, mlp = trace.indirect_effect("hidden").tolist(), trace.indirect_effect("mlp").tolist()
    found = []
    for row, token in enumerate(trace.row_tokens):
        carrying = [layer for layer, effect in enumerate(hidden[row]) if effect >= fraction * trace.total_effect]
        found += [
            (mlp[row][layer], layer, token, carrying[0]) for layer in range(min(carrying, default=99), trace.layers)
        ]
    best = max(found)
    return best[1:]


# ---- where ----


def test_each_fact_is_edited_at_or_after_the_onset_of_its_own_trace(located: Located):
    assert [(site.layer, site.token, site.onset) for site in located.edit_sites] == [
        slow_site(each) for each in located.traces
    ]
    assert all(site.layer >= site.onset for site in located.edit_sites)
    assert len({site.layer for site in located.edit_sites}) == 3
    assert located.notes == ()


def test_one_site_for_all_is_that_of_the_mean(tiny_vlm: VisionLanguageModel, facts: Facts, located: Located):
    found = locate(tiny_vlm, facts.requests, traces=located.traces)
    assert {(site.layer, site.token, site.onset) for site in found.edit_sites} == {slow_site(average(located.traces))}
    assert found.edit_site == found.average.edit_site()


def test_given_traces_choose_what_they_chose_when_they_were_made(
    tiny_vlm: VisionLanguageModel, facts: Facts, located: Located, tmp_path
):
    paths = [trace.save(tmp_path / f"{number}.safetensors") for number, trace in enumerate(located.traces)]
    loaded = [mt.CausalTrace.load(path) for path in paths]
    assert locate(tiny_vlm, facts.requests, traces=loaded, per_request=True).edit_sites == located.edit_sites
    mean = locate(tiny_vlm, facts.requests, traces=located.average)
    assert mean.edit_sites == (located.average.edit_site(),) * 3


def test_a_weak_corruption_takes_the_site_of_the_mean_and_says_so(
    tiny_vlm: VisionLanguageModel, facts: Facts, located: Located
):
    weak = mt.SwapImage(facts.requests[1].question.images[0])
    corruptions = (facts.corruptions[0], weak, None)
    found = locate(tiny_vlm, facts.requests, corruptions=corruptions, per_request=True, **TRACING)
    assert found.edit_sites == (located.edit_sites[0],) * 3
    assert found.traces[1:] == (None, None)
    assert "does not lower the answer's probability" in found.notes[0]
    assert "no corruption is given" in found.notes[1]
    with pytest.raises(WeakCorruption):  # without any trace there is no mean to fall back on
        locate(tiny_vlm, facts.requests[1:2], corruptions=[weak], **TRACING)


def test_a_fact_without_a_constraint_takes_the_token_that_the_trace_names(tiny_vlm: VisionLanguageModel, facts: Facts):
    bare = replace(facts.requests[0], question=tiny_vlm.prompt(facts.requests[0].question.images[0], "Who is it?"))
    request = replace(facts.requests[1], preserve_prompts=(bare.question,))
    found = locate(tiny_vlm, [bare, request, facts.requests[0]], corruptions=facts.corruptions, **TRACING)
    assert [site.token for site in found.edit_sites[:2]] == ["last", "last"]
    assert [trace.rows for trace in found.traces] == [("last",), ("last",), ("constraint_last", "last")]
    assert len(found.notes) == 2
    assert all("no constraint span in all its prompts; edited at 'last'" in note for note in found.notes)


def test_traces_of_something_else_are_refused(tiny_vlm: VisionLanguageModel, facts: Facts, located: Located):
    with pytest.raises(mt.TraceError, match="this trace is of the question .*trace the prompt that is to be edited"):
        locate(tiny_vlm, facts.requests, traces=located.traces[::-1])
    for other in (replace(located.traces[0], model="another"), replace(located.average, model="another")):
        given = other if isinstance(other, mt.tracing.AverageTrace) else [other]
        with pytest.raises(mt.TraceError, match="this trace is of 'another'"):
            locate(tiny_vlm, facts.requests[:1], traces=given)
    with pytest.raises(mt.TraceError, match="3 requests with 2 traces"):
        locate(tiny_vlm, facts.requests, traces=located.traces[:2])
    with pytest.raises(mt.TraceError, match="nothing tells where to edit"):
        locate(tiny_vlm, facts.requests)


# ---- what is edited there ----


@pytest.fixture(scope="module")
def edited(tiny_vlm: VisionLanguageModel, facts: Facts, located: Located) -> mt.workflow.LocatedEdit:
    """Three facts at three sites in one delta."""
    return locate_then_edit(tiny_vlm, facts.requests, traces=located.traces, per_request=True)


def test_facts_at_different_sites_become_one_delta(
    tiny_vlm: VisionLanguageModel, facts: Facts, edited: mt.workflow.LocatedEdit
):
    (delta,) = edited.deltas
    assert sorted(delta.changes) == [tiny_vlm.down_projection(layer).name for layer in (4, 5, 6)]
    assert [request["target"] for request in delta.requests] == facts.targets
    assert not set(facts.answers(tiny_vlm)) & set(facts.targets)
    with delta.applied(tiny_vlm):
        assert facts.answers(tiny_vlm) == facts.targets


@pytest.mark.parametrize("index", range(3))
def test_each_fact_owns_its_part_of_the_delta(
    tiny_vlm: VisionLanguageModel, facts: Facts, edited: mt.workflow.LocatedEdit, index: int
):
    others = [number for number in range(3) if number != index]
    with edited.deltas[0].without(*others).applied(tiny_vlm):
        answers = facts.answers(tiny_vlm)
    assert answers[index] == facts.targets[index]
    assert [answers[other] for other in others] != [facts.targets[other] for other in others]


def test_one_delta_each_knows_nothing_of_the_others(tiny_vlm: VisionLanguageModel, facts: Facts, located: Located):
    few = mt.MultEdit(layer=0, steps=3)
    edit = locate_then_edit(
        tiny_vlm, facts.requests, traces=located.traces, editor=few, per_request=True, jointly=False
    )
    for number, delta in enumerate(edit.deltas):
        editor = replace(few, layer=None, where=located.edit_sites[number])
        alone = editor.edit(tiny_vlm, facts.requests[number : number + 1])
        assert [*delta.changes] == [*alone.changes]
        assert all(torch.equal(delta.changes[name].left, change.left) for name, change in alone.changes.items())


def test_work_is_spread_over_no_layer_below_the_onset(tiny_vlm: VisionLanguageModel, facts: Facts, located: Located):
    first, trace = facts.requests[:1], located.traces[:1]
    site = located.edit_sites[0]
    assert site.layer - site.onset == 2
    wide = locate_then_edit(tiny_vlm, first, traces=trace, editor=mt.MultEdit(layer=0, spread=5, steps=2))
    names = [tiny_vlm.down_projection(layer).name for layer in range(site.onset, site.layer + 1)]
    assert [*wide.deltas[0].changes] == names
    assert "spread over 3 layers and not 5" in wide.notes[0]

    def memit(*, layer: int, token: str) -> MEMIT:
        return MEMIT(layer=layer, token=token, spread=2, moment_weight=0, ridge_fraction=0.1, steps=2)

    narrow = locate_then_edit(tiny_vlm, first, traces=trace, editor=memit)
    assert [*narrow.deltas[0].changes] == names[1:]
    assert narrow.deltas[0].settings["editor"] == "MEMIT"
    assert narrow.notes == ()


def test_requests_that_cannot_be_edited_are_named_and_the_others_go_on(
    tiny_vlm: VisionLanguageModel, facts: Facts, located: Located
):
    requests = (facts.requests[0], replace(facts.requests[0], target="nobody"), facts.requests[1])
    traces = (located.traces[0], located.traces[0], located.traces[1])
    edit = locate_then_edit(tiny_vlm, requests, traces=traces, per_request=True)
    (delta,) = edit.deltas
    statuses = [request["status"] for request in delta.requests]
    assert statuses[2] == "edited"
    assert all(status.startswith("failed: two requests contradict each other") for status in statuses[:2])
    assert len(edit.notes) == 2
    with delta.applied(tiny_vlm):
        assert facts.answers(tiny_vlm)[1] == facts.targets[1]
    with pytest.raises(mt.EditError, match="contradict"):  # nothing is left to go on with
        locate_then_edit(tiny_vlm, requests[:2], traces=traces[:2], per_request=True)


def test_one_by_one_a_failure_is_a_note_and_no_delta(tiny_vlm: VisionLanguageModel, facts: Facts, located: Located):
    def at_six(*, layer: int, token: str) -> mt.MultEdit:
        return mt.MultEdit(layer=layer if layer == 6 else 40, token=token, steps=2)

    edit = locate_then_edit(
        tiny_vlm, facts.requests, traces=located.traces, per_request=True, jointly=False, editor=at_six
    )
    assert [delta is None for delta in edit.deltas] == [False, True, True]
    assert all("could not be edited: cannot edit layer 40" in note for note in edit.notes)


def test_a_second_trace_shows_what_moved(tiny_vlm: VisionLanguageModel, facts: Facts):
    asked = {"corruptions": facts.corruptions[:1], "trace_after": True, **TRACING}
    edit = locate_then_edit(tiny_vlm, facts.requests[:1], **asked)
    (shift,) = edit.shifts
    assert shift.before is edit.traces[0]
    assert facts.targets[0].startswith(shift.after.answer)
    assert not facts.targets[0].startswith(shift.before.answer)
    difference = shift.after.indirect_effect("mlp") - shift.before.indirect_effect("mlp")
    assert torch.equal(shift.effect("mlp"), difference)
    assert difference.abs().max() > 0.01
    assert len(list(shift.lines())) == 3
    nothing = locate_then_edit(tiny_vlm, facts.requests[:1], editor=mt.MultEdit(layer=0, steps=0), **asked).shifts[0]
    assert torch.equal(nothing.effect("mlp"), torch.zeros_like(difference))


def test_a_second_trace_needs_something_to_destroy(tiny_vlm: VisionLanguageModel, facts: Facts, located: Located):
    with pytest.raises(mt.TraceError, match="a second trace needs corruptions"):
        locate_then_edit(tiny_vlm, facts.requests, traces=located.traces, trace_after=True)


def test_a_site_is_what_editors_take(tiny_vlm: VisionLanguageModel, located: Located):
    assert isinstance(located.edit_site, EditSite)
    assert mt.MultEdit(where=located.edit_site).place == (located.edit_site.layer, located.edit_site.token)
