"""Long streams of edits: recursive least squares, norm anchor, null space with the keys of edits, limits of growth."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from multrace import EditRequest
from multrace.data import World, tiny_vlm_path
from multrace.editing import (
    MEMIT,
    AlphaEdit,
    Delta,
    EditError,
    History,
    Moments,
    MultEdit,
    WeightChange,
    second_moments,
)
from multrace.editing.changes import HistoryEntry
from multrace.editing.solve import Cost, Problem, anchor_norm, build_cost, null_space, recursive as recursion, solve
from multrace.editing.solve.earlier import EarlierKeys
from multrace.editing.solve.recursive import RunningCost
from multrace.models import VisionLanguageModel, load
from torch import Tensor

WIDTH, HIDDEN = 96, 10
WIDE = 128  # width of the attention output projections of the embedded model
WORLD = World()
CASES = WORLD.edit_cases("outdated", "report")[:6]
TIGHT = 1e-10


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that float32 holds exactly, since the keys of an edit are kept in it."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def moment() -> Tensor:
    rows = draw(3 * WIDTH, WIDTH, seed=7) * torch.logspace(0, -2, WIDTH, dtype=torch.float64)
    return rows.T @ rows / len(rows)


COSTS = {
    "ridge": lambda: build_cost(WIDTH, ridge=0.3),
    "moment": lambda: build_cost(WIDTH, ridge=0.0, moment=moment(), moment_weight=50.0),
    "half moment, refined": lambda: build_cost(
        WIDTH, ridge=0.1, moment=moment().float(), moment_weight=50.0, refined=True
    ),
    "null space": lambda: build_cost(WIDTH, ridge=0.3, protected=null_space(moment(), share=0.9)),
    "moment and null space": lambda: build_cost(
        WIDTH, ridge=0.1, moment=moment(), moment_weight=20.0, protected=null_space(moment(), share=0.5)
    ),
}


def dense(cost: Cost) -> tuple[Tensor, Tensor]:
    """M (width, width), and an orthonormal basis (width, direction) of what a change may touch."""
    whole = cost.ridge * torch.eye(WIDTH, dtype=torch.float64)
    whole = whole if cost.moment is None else whole + cost.moment_weight * cost.moment.double()
    basis = torch.eye(WIDTH, dtype=torch.float64)
    if cost.protected is not None:
        basis = torch.linalg.qr(cost.protected.T, mode="complete")[0][:, len(cost.protected) :]
    return whole, basis


def normal_equations(cost: Cost, right: Tensor, keys: Tensor) -> Tensor:
    """X with X (M + K^T K) = right within the directions that a change may touch."""
    whole, basis = dense(cost)
    return right @ basis @ torch.linalg.solve(basis.T @ (whole + keys.T @ keys) @ basis, basis.T)


@dataclass
class Stream:
    """Edits of a bare weight on top of each other, as a session makes them of the weight of a model."""

    cost: Cost
    weight: Tensor = field(default_factory=lambda: draw(HIDDEN, WIDTH, seed=3))
    keys: EarlierKeys = field(default_factory=EarlierKeys)
    steps: int = 0
    kinds: list[type] = field(default_factory=list)

    def edit(self, keys: Tensor, values: Tensor, *facts: str) -> Tensor:
        """Write values (n, hidden) at keys (n, width), each of a fact, and return what the weight gave there before."""
        held = self.keys.held(self.cost, 1.0, self.weight, "w", set(facts))
        self.kinds.append(type(held))
        before = keys @ self.weight.T
        asked = {"weights": torch.ones(len(keys)), "names": tuple(map(str, range(len(keys))))}
        solution = solve(held, Problem(keys=keys, residuals=values - before, **asked))
        self.weight = self.weight + solution.left @ solution.right
        parts = {"left": solution.left.float(), "right": solution.right.float(), "keys": keys.float()}
        change = WeightChange(**parts, residuals=(values - before).float(), owners=torch.arange(len(keys)))
        requests = tuple({"facts": fact} for fact in facts)
        delta = Delta(changes={"w": change}, fingerprints={"w": ""}, model="m", requests=requests)
        self.keys.follow(HistoryEntry.of(str(self.steps), delta, step=self.steps, on_top=True))
        self.steps += 1
        return before


@pytest.fixture
def factorised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each matrix that is factorised from here on."""
    sizes: list[int] = []
    plain = torch.linalg.cholesky_ex

    def counted(matrix: Tensor, **options: Any) -> Any:
        sizes.append(len(matrix))
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    return sizes


# recursive least squares


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_edits_one_by_one_come_to_the_optimum_of_all_of_them_in_one_solve(cost, factorised):
    """MEMIT with earlier keys is recursive least squares: dense normal equations in float64, from the first weight."""
    count = 14
    keys, values = draw(count, WIDTH), draw(count, HIDDEN, seed=1)
    turn, once, forgetful = Stream(cost()), Stream(cost()), Stream(cost())
    start = turn.weight
    factorised.clear()
    for number in range(count):
        turn.edit(keys[number, None], values[number, None], str(number))
    slow = factorised.count(WIDTH)
    for number in range(count):
        forgetful.keys = EarlierKeys()
        forgetful.edit(keys[number, None], values[number, None], str(number))
    once.edit(keys, values, *map(str, range(count)))
    wanted = normal_equations(turn.cost, (values - keys @ start.T).T @ keys, keys)
    for stream in (turn, once):
        assert (stream.weight - start - wanted).norm() < TIGHT * wanted.norm()
    assert (forgetful.weight - start - wanted).norm() > 1e-2 * wanted.norm()
    assert turn.kinds[1:] == [RunningCost] * (count - 1) and slow <= 2


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_a_fact_edited_again_takes_its_old_key_out_of_the_recursion(cost):
    """The optimum without the old target, but for what the first edit left undone of it, which stays undone."""
    keys, values = draw(12, WIDTH), draw(12, HIDDEN, seed=1)
    keys[10] = (keys[4] + 0.1 * draw(WIDTH, seed=5)).float().double()
    names = [str(number) for number in range(12)]
    names[10] = "4"
    stream, blind = Stream(cost()), Stream(cost())
    start = stream.weight
    for number, name in enumerate(names):
        if number == 10:
            undone = keys[4] @ stream.weight.T - values[4]
        stream.edit(keys[number, None], values[number, None], name)
        blind.edit(keys[number, None], values[number, None], str(number))
    left = [number for number in range(12) if number != 4]
    right = (values - keys @ start.T)[left].T @ keys[left] - undone[:, None] @ keys[4, None]
    wanted = normal_equations(stream.cost, right, keys[left])
    assert (stream.weight - start - wanted).norm() < TIGHT * wanted.norm()
    missed = [((each.weight @ keys[10]) - values[10]).norm() for each in (stream, blind)]
    assert missed[0] < 0.9 * missed[1], "held at its old target, the new one is met less well"


@pytest.mark.parametrize("damage", [0.0, 1e-3, 1.0], ids=["whole", "worn", "lost"])
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_a_kept_inverse_gives_what_a_factorisation_gives(cost, damage, factorised):
    """Keys come and go; a damaged inverse is found by its residuals, and made anew."""
    stream = Stream(cost())
    for number in range(30):
        facts = (str(number % 11), str(number))
        stream.edit(draw(2, WIDTH, seed=2 * number), draw(2, HIDDEN, seed=2 * number + 1), *facts)
    running = stream.keys._running["w"]
    for matrix in running._matrices():
        matrix += damage * matrix.norm() / WIDTH * draw(WIDTH, WIDTH, seed=8)
    keys, name = draw(3, WIDTH, seed=99), {"7"}
    assert not running.is_stale
    for facts in (set(), name):
        running.is_stale = False
        fast = stream.keys.held(stream.cost, 1.0, stream.weight, "w", facts)
        slow = stream.cost.holding(stream.keys.gram(stream.weight, "w", facts), 1.0)
        assert isinstance(fast, RunningCost)
        for one, other in zip(fast.parts(keys), slow.parts(keys), strict=True):
            assert (one - other).norm() < TIGHT * other.norm()
        assert running.is_stale == (damage > 0)
    factorised.clear()
    stream.edit(draw(1, WIDTH, seed=98), draw(1, HIDDEN), "new")
    assert (stream.keys._running["w"] is running) == (damage == 0)
    assert (WIDTH in factorised) == (damage > 0)


def test_a_cost_of_an_edit_that_is_over_is_not_used_again():
    stream = Stream(COSTS["ridge"]())
    for number in range(4):
        stream.edit(draw(1, WIDTH, seed=number), draw(1, HIDDEN, seed=number), str(number))
    held = stream.keys.held(stream.cost, 1.0, stream.weight, "w", set())
    stream.edit(draw(1, WIDTH, seed=9), draw(1, HIDDEN, seed=9), "9")
    with pytest.raises(AssertionError, match="that of one edit"):
        held.parts(draw(1, WIDTH))


def test_many_keys_at_once_are_factorised(factorised):
    """Updating the inverse by a sixteenth of the width or more would cost more than making it."""
    stream = Stream(COSTS["ridge"]())
    for number in range(5):
        facts = [f"{number}.{row}" for row in range(WIDTH // 16 + 1)]
        stream.edit(draw(len(facts), WIDTH, seed=number), draw(len(facts), HIDDEN, seed=number), *facts)
    assert factorised.count(WIDTH) == 4 and stream.keys._running["w"].is_stale


# on the model


def request_of(index: int, target: str | None = None) -> EditRequest:
    case = CASES[index]
    question = WORLD.question(case.fact).with_image(WORLD.picture(WORLD.entities[case.fact.entity], 0).image)
    return EditRequest(question=question, target=case.target if target is None else target)


@pytest.fixture(scope="module")
def double() -> Iterator[VisionLanguageModel]:
    vlm = load(tiny_vlm_path(), verify=False)
    vlm.model.double()
    yield vlm


@pytest.fixture(scope="module")
def moments(double: VisionLanguageModel) -> Moments:
    return second_moments(
        double,
        [double.prompt_for(request_of(index).question) for index in range(6)],
        layers=[5],
        projection="attention",
        progress=False,
    )


def test_a_session_of_memit_keeps_the_inverse_and_gives_the_same_edits(double, moments, factorised, monkeypatch):
    """With earlier keys each edit costs no factorisation; without the kept inverse each edit costs one."""
    place = {"layer": 5, "token": "last"}
    paper = MEMIT.paper(**place, earlier_weight=1.0, moment_weight=200.0)
    editor = replace(paper, projection="attention", spread=1, steps=2, ridge=0.05)
    assert MEMIT.paper(**place).earlier_weight is None
    order, counts, deltas = (0, 1, 0), [], []
    for few in (recursion._FEW, WIDE + 1):
        monkeypatch.setattr(recursion, "_FEW", few)
        factorised.clear()
        with editor.start(double, moments=moments) as session:
            deltas.append([session.edit([request_of(index)]) for index in order])
        counts.append(factorised.count(WIDE))
    assert counts == [2, 3]
    for one, other in zip(*deltas, strict=True):
        ((left, right),), ((other_left, other_right),) = one.factors.values(), other.factors.values()
        assert (left @ right - other_left @ other_right).norm() < 1e-5 * (left @ right).norm()


# the norm anchor

ANCHORED = MultEdit(layer=5, steps=3, ending="stop", norm_anchor="pilot", norm_pilot=2)


@pytest.fixture(scope="module")
def values(tiny_vlm_once: VisionLanguageModel) -> list[Any]:
    with ANCHORED.start(tiny_vlm_once) as session:
        return [session.search([request_of(index)]) for index in range(4)]


@pytest.fixture(scope="module")
def tiny_vlm_once() -> VisionLanguageModel:
    return load(tiny_vlm_path(), verify=False)


def wanted(values: Any) -> Tensor:
    return values[0].results[0].values


def first_norm(values: Any) -> float:
    return wanted(values)[0].norm().item()


def changes(delta: Delta) -> WeightChange:
    (change,) = delta.changes.values()
    return change


def residuals_of(editor: Any, vlm: VisionLanguageModel, values: list[Any], **options: Any) -> list[Tensor]:
    with editor.start(vlm, **options) as session:
        deltas = [session.edit([request_of(index)], values=each) for index, each in enumerate(values)]
    return [changes(delta).residuals for delta in deltas]


def test_after_the_pilot_edits_wanted_outputs_have_the_norm_of_the_anchor(tiny_vlm_once, values, whole):
    plain, scaled = residuals_of(replace(ANCHORED, norm_anchor=None), tiny_vlm_once, values[:3]), whole[:3]
    anchor = (first_norm(values[0]) + first_norm(values[1])) / 2
    assert all(one.equal(other) for one, other in zip(plain[:2], scaled[:2], strict=True))
    output = wanted(values[2])
    factors = anchor / output.norm(dim=-1, keepdim=True)
    factors[1:] = factors[1:].clamp(max=1)  # later answer positions are never scaled up
    assert (factors[0] != 1).all() and (factors[1:] == 1).any()
    expected = plain[2] + output * (factors - 1)
    torch.testing.assert_close(scaled[2], expected, rtol=1e-4, atol=1e-4)
    assert (scaled[2] - plain[2]).norm() > 1e-2 * plain[2].norm()


def test_the_anchor_of_a_pilot_drops_its_largest_norms():
    assert anchor_norm([1.0] * 38 + [50.0, 70.0]) == 1.0
    assert anchor_norm([1.0, 3.0]) == 2.0


def test_a_given_or_measured_anchor_holds_from_the_first_edit_on(tiny_vlm_once, values):
    with ANCHORED.start(tiny_vlm_once) as session:
        anchor = session.measure_anchor([request_of(0), request_of(1)], values=[values[0][0], values[1][0]])
        assert anchor == pytest.approx((first_norm(values[0]) + first_norm(values[1])) / 2)
        measured = session.edit([request_of(2)], values=values[2])
    given = replace(ANCHORED, norm_anchor=anchor).edit(tiny_vlm_once, [request_of(2)], values=values[2], progress=False)
    alone = ANCHORED.edit(tiny_vlm_once, [request_of(2)], values=values[2], progress=False)
    free = replace(ANCHORED, norm_anchor=None).edit(tiny_vlm_once, [request_of(2)], values=values[2], progress=False)
    assert changes(measured).left.equal(changes(given).left) and changes(alone).left.equal(changes(free).left)
    assert not changes(given).left.equal(changes(alone).left)
    assert measured.requests[0]["norm_anchor"] == given.requests[0]["norm_anchor"] == anchor


def test_over_several_layers_the_output_of_the_last_projection_has_the_norm(double):
    """The residual stream keeps what others add to it: it moves by the module's wanted output minus its present one."""
    editor = MultEdit(layer=5, spread=2, steps=3)
    (found,) = editor.search(double, [request_of(0)], progress=False)
    with editor.start(double) as session:
        seen = session.measure_anchor([request_of(0)], values=[found])
    assert not 0.9 < found.results[0].values[0].norm().item() / seen < 1.1, "of the residual stream"
    plain = editor.edit(double, [request_of(0)], values=[found], progress=False)
    scaled = replace(editor, norm_anchor=0.6 * seen).edit(double, [request_of(0)], values=[found], progress=False)
    residuals = [delta.changes[double.down_projection(4).name].residuals.double() for delta in (plain, scaled)]
    change = found.results[0].change.double()
    assert (2 * residuals[0] - change).norm() < 1e-4 * change.norm(), "half in each layer"
    # v (a / |v| - 1) is as long as |v| is away from a
    shift = 2 * (residuals[1] - residuals[0])[0].norm().item()
    assert shift == pytest.approx(0.4 * seen, rel=1e-4)


def test_an_output_above_twice_the_anchor_fails_and_the_others_go_on(tiny_vlm_once, values):
    sizes = [wanted(each).norm(dim=-1).max().item() for each in values[:2]]
    assert sizes[0] != sizes[1]
    small, large = sorted((0, 1), key=sizes.__getitem__)
    editor = replace(ANCHORED, norm_anchor=(sizes[0] + sizes[1]) / 4)
    both = [values[0][0], values[1][0]]
    delta = editor.edit(tiny_vlm_once, [request_of(0), request_of(1)], values=both, progress=False)
    assert "more than 2 times the norm anchor" in str(delta.requests[large]["status"])
    assert "failed" not in str(delta.requests[small]["status"]) and "norm_anchor" in delta.requests[small]
    assert set(changes(delta).owners.tolist()) == {small}
    with pytest.raises(EditError, match="no request could be edited.*norm anchor"):
        editor.edit(tiny_vlm_once, [request_of(large)], values=[both[large]], progress=False)


@pytest.fixture(scope="module")
def whole(tiny_vlm_once: VisionLanguageModel, values: list[Any]) -> list[Tensor]:
    """The residuals of four edits in one session."""
    return residuals_of(ANCHORED, tiny_vlm_once, values)


@pytest.mark.parametrize("stop", [1, 2, 3], ids=["in the pilot", "after the pilot", "anchored"])
def test_a_session_goes_on_with_the_anchor_of_its_history(stop, tiny_vlm_once, values, whole, tmp_path):
    with ANCHORED.start(tiny_vlm_once, history=History.open(tmp_path / "history")) as session:
        for index in range(stop):
            session.edit([request_of(index)], values=values[index])
    history = History.open(tmp_path / "history")
    history = history.without("3") if stop == 3 else history
    with ANCHORED.start(tiny_vlm_once, history=history) as session:
        rest = [session.edit([request_of(index)], values=values[index]) for index in range(stop, 4)]
    anchors = {delta.requests[0].get("norm_anchor") for delta in rest[max(0, 2 - stop) :]}
    assert [*anchors] == [pytest.approx((first_norm(values[0]) + first_norm(values[1])) / 2)]
    if stop < 3:
        for one, delta in zip(whole[stop:], rest, strict=True):
            torch.testing.assert_close(one, changes(delta).residuals)


# the null space


def test_the_protected_share_does_not_depend_on_the_scale_and_is_the_least_number_of_directions():
    whole = moment()
    values = torch.linalg.eigvalsh(whole).flip(0)
    for share in (0.3, 0.9, 0.999):
        found = null_space(whole, share=share)
        held = [(values[:count].sum() / values.sum()).item() for count in (len(found) - 1, len(found))]
        assert held[0] < share <= held[1]
        assert len(null_space(1e6 * whole, share=share)) == len(found)
    assert len(null_space(100 * whole, 0.02)) > len(null_space(whole, 0.02))


REFUSED = {
    "everything by share": ({"null_share": 1 - 1e-9}, "takes all 128 directions .* pass a share of at most 0.9"),
    "nothing by threshold": ({"null_threshold": 1e4}, "nothing would be protected; pass at most .*null_share=0.99"),
    "everything by threshold": ({"null_threshold": 1e-9}, "nothing is left to edit in; .*or null_share=0.99"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_null_space_of_all_or_of_nothing_is_refused(settings, message, double):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 128, generator=generator)
    matrix = (rows.T @ rows / 400).double()
    editor = replace(AlphaEdit(layer=5, spread=1, projection="attention", null_threshold=None), **settings)
    taken = _Taken(matrix)
    ((layer, projection),) = editor.projections(double).items()
    with pytest.raises(EditError, match=message):
        editor.cost(layer, projection, taken)
    assert replace(editor, null_threshold=None, null_share=0.9).cost(layer, projection, taken).protected is not None


@dataclass
class _Taken:
    """Second moments of one matrix."""

    whole: Tensor
    projection: str = "attention"
    is_own: bool = False

    def matrix(self, layer: int, kind: str) -> Tensor:
        return self.whole


def test_the_null_space_is_taken_anew_with_the_keys_of_edits(double, moments):
    """Every two edits, from the mean of k k^T over all keys so far beside the second moment; also after a reopening."""
    settings: dict[str, Any] = {"layer": 5, "spread": 1, "steps": 1, "ridge": 0.5, "null_share": 0.9}
    editor = AlphaEdit(**settings, projection="attention", null_refresh=2, null_moment_weight=3.0)
    projection = double.attention_projection(5)
    old = moments.matrix(5, "all").double()
    with editor.start(double, moments=moments) as session:
        spaces, keys = [], []
        for index in range(5):
            spaces.append(session.shared.cost(editor, 5, projection, 0.5).protected)
            keys.append(changes(session.edit([request_of(index)])).keys.double())
    expected = [null_space(old, share=0.9)]
    for count in (2, 4):
        rows = torch.cat(keys[:count])
        expected.append(null_space((rows.T @ rows / len(rows) + 3.0 * old) / 4.0, share=0.9))
    for number, epoch in enumerate((0, 0, 1, 1, 2)):
        assert same_space(spaces[number], expected[epoch])
    assert not same_space(expected[0], expected[1]) and not same_space(expected[1], expected[2])
    less = History()
    for entry in session.history.entries[:3]:
        less = less.added(entry.name, entry.delta, on_top=entry.on_top)
    with editor.start(double, moments=moments, history=less) as later:
        assert same_space(later.shared.cost(editor, 5, projection, 0.5).protected, expected[1])


def same_space(one: Tensor, other: Tensor) -> bool:
    return len(one) == len(other) and bool((one.T @ one - other.T @ other).norm() < 1e-6)


# limits


LIMITS: dict[str, tuple[Callable[[float], dict[str, float]], str]] = {
    "growth": (lambda size: {"growth_limit": 1 + 1e-3 * size}, "grow to .* times its norm .* growth_limit of"),
    "change": (lambda size: {"change_limit": 0.1 * size}, "of its norm, more than the change_limit"),
}


@pytest.mark.parametrize(("limit", "message"), LIMITS.values(), ids=LIMITS)
def test_an_edit_that_would_break_a_limit_is_refused_and_changes_nothing(limit, message, tiny_vlm_once, values):
    name = tiny_vlm_once.down_projection(5).name
    before = tiny_vlm_once.fingerprint([name])
    free = replace(ANCHORED, norm_anchor=None)
    with replace(free, **limit(1e-3)).start(tiny_vlm_once) as session:
        with pytest.raises(EditError, match=message):
            session.edit([request_of(0)], values=values[0])
        assert tiny_vlm_once.fingerprint([name]) == before and not session.history.names
    loose = residuals_of(replace(free, **limit(1e4)), tiny_vlm_once, values[:2])
    assert all(
        one.equal(other) for one, other in zip(loose, residuals_of(free, tiny_vlm_once, values[:2]), strict=True)
    )


def test_growth_is_measured_from_before_the_first_edit(tiny_vlm_once, values, tmp_path):
    """Two edits grow a weight further than one; the limit between them is broken by the second, also once reopened."""
    name, free = tiny_vlm_once.down_projection(5).name, replace(ANCHORED, norm_anchor=None)
    sizes = [tiny_vlm_once.weight(name).double().norm().item()]
    with free.start(tiny_vlm_once) as session:
        for index in range(2):
            session.edit([request_of(index)], values=values[index])
            sizes.append(tiny_vlm_once.weight(name).double().norm().item())
    assert sizes[0] < sizes[1] < sizes[2]
    limited = replace(free, growth_limit=(sizes[1] + sizes[2]) / 2 / sizes[0])
    history = History.open(tmp_path / "history")
    with limited.start(tiny_vlm_once, history=history) as session:
        session.edit([request_of(0)], values=values[0])
        with pytest.raises(EditError, match="growth_limit"):
            session.edit([request_of(1)], values=values[1])
    with limited.start(tiny_vlm_once, history=History.open(tmp_path / "history")) as session:
        with pytest.raises(EditError, match="growth_limit"):
            session.edit([request_of(1)], values=values[1])


BAD_SETTINGS = {
    "share": ({"null_share": 1.0}, "null_share=1.0; pass a share between"),
    "refresh without a null space": ({"null_refresh": 3}, "leaves no direction untouched; pass null_share"),
    "refresh of none": ({"null_refresh": 0, "null_share": 0.9}, "null_refresh=0; pass a number above 0"),
    "anchor by name": ({"norm_anchor": "mean"}, "norm_anchor='mean'; pass a norm above 0, 'pilot' or None"),
    "anchor of zero": ({"norm_anchor": 0.0}, "pass a norm above 0"),
    "growth below one": ({"growth_limit": 0.5}, "growth_limit=0.5, a multiple of the norm"),
    "change of none": ({"change_limit": 0.0}, "change_limit=0.0; pass a number above 0"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(EditError, match=message):
        MultEdit(layer=5, **settings)
