"""The algebra: equal to each published formula, the optimum of its objective, exact where promised, thin, and named."""

import math

import pytest
import reference
import torch
from multrace.editing import EditError
from multrace.editing.solve import Cost, Problem, Solution, build_cost, null_space, solve
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN, WIDTH = 12, 40
EXACT = math.inf
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(width: int = WIDTH, condition: float = 100.0, seed: int = 9) -> Tensor:
    """A symmetric (width, width) with eigenvalues from 1 to 1 / condition, evenly on a log scale."""
    basis, _ = torch.linalg.qr(draw(width, width, seed=seed))
    moment = (basis * torch.logspace(0, -math.log10(condition), width, dtype=torch.float64)) @ basis.T
    return (moment + moment.T) / 2


def rows(keys: Tensor, residuals: Tensor, weights: float | list[float] = 1.0, **more) -> Problem:
    given = torch.tensor([weights] * len(keys) if isinstance(weights, float) else weights, dtype=torch.float64)
    names = more.pop("names", tuple(f"fact {index}" for index in range(len(keys))))
    return Problem(keys=keys, residuals=residuals, weights=given, names=names, **more)


def change(solution: Solution) -> Tensor:
    return solution.left @ solution.right


# the published formulas, as settings


def test_multedit():
    weight, keys, values = draw(HIDDEN, WIDTH), draw(1, WIDTH, seed=1), draw(1, HIDDEN, seed=2)
    found = change(solve(build_cost(WIDTH, ridge=0.3), rows(keys, values - keys @ weight.T)))
    torch.testing.assert_close(found, reference.multedit(weight, keys[0], values[0], 0.3), **CLOSE)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("count", [2, 7, WIDTH + 5])
def test_multedit_of_many_keys(count, ridge):
    weight, keys, values = draw(HIDDEN, WIDTH), draw(count, WIDTH, seed=1), draw(count, HIDDEN, seed=2)
    solution = solve(build_cost(WIDTH, ridge=ridge), rows(keys, values - keys @ weight.T))
    expected = reference.multedit_many(weight, keys.T, values.T, ridge)
    torch.testing.assert_close(change(solution), expected, rtol=1e-9, atol=1e-10)
    assert solution.relaxed == ()


def test_rome_with_its_two_keys():
    weight, keys, values, moment = draw(HIDDEN, WIDTH), draw(1, WIDTH, seed=1), draw(1, HIDDEN, seed=2), second_moment()
    mean = keys + 0.3 * draw(1, WIDTH, seed=3)
    asked = {"keys": keys, "residuals": values - keys @ weight.T, "weights": EXACT}
    made = build_cost(WIDTH, ridge=0.0, moment=moment, moment_weight=1.0)
    solution = solve(made, rows(**asked, directions=mean))
    expected = reference.rome(weight, keys[0], mean[0], values[0], moment)
    torch.testing.assert_close(change(solution), expected, **CLOSE)
    torch.testing.assert_close((weight + change(solution)) @ keys[0], values[0], **CLOSE)
    one_key = change(solve(made, rows(**asked)))
    assert (one_key - expected).norm() > 0.1 * expected.norm()  # the second key does matter


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("weight", [0.5, 15000.0])
def test_memit(count, weight):
    keys, residuals, moment = draw(count, WIDTH), draw(count, HIDDEN, seed=1), second_moment()
    made = build_cost(WIDTH, ridge=0.0, moment=moment, moment_weight=weight)
    expected = reference.memit(keys.T, residuals.T, moment, weight)
    torch.testing.assert_close(change(solve(made, rows(keys, residuals))), expected, **CLOSE)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 6])
def test_emmet(count, ridge):
    keys, residuals, moment = draw(count, WIDTH), draw(count, HIDDEN, seed=1), second_moment()
    made = build_cost(WIDTH, ridge=0.0, moment=moment, moment_weight=3.0)
    solution = solve(made, rows(keys, residuals, 1 / ridge if ridge else EXACT))
    expected = reference.emmet(keys.T, residuals.T, moment, 3.0, ridge)
    torch.testing.assert_close(change(solution), expected, **CLOSE)
    met = (change(solution) @ keys.T - residuals.T).abs().max()
    assert met < 1e-10 if ridge == 0 else met > 1e-5


def test_alphaedit_with_the_keys_of_earlier_edits():
    keys, residuals, earlier = draw(4, WIDTH), draw(4, HIDDEN, seed=1), draw(3, WIDTH, seed=2)
    moment = second_moment(condition=1e4)
    protected = null_space(moment, 0.02)
    asked = rows(torch.cat([keys, earlier]), torch.cat([residuals, torch.zeros(3, HIDDEN)]))
    found = change(solve(build_cost(WIDTH, ridge=10.0, protected=protected), asked))
    expected = reference.alphaedit(keys.T, residuals.T, earlier.T, moment, 0.02, 10.0)
    torch.testing.assert_close(found, expected, **CLOSE)
    unprotected = change(solve(build_cost(WIDTH, ridge=10.0), asked))
    assert (unprotected - expected).norm() > 0.1 * expected.norm()


# the optimum


def mixed_problem() -> tuple[Cost, Problem, Tensor, Tensor]:
    """Ridge, moment and protected directions; edits of several weights, exact edits, preserved keys. And M, and Q."""
    moment, protected = second_moment(), torch.linalg.qr(draw(WIDTH, 3, seed=4))[0].T
    residuals = draw(8, HIDDEN, seed=1)
    residuals[[2, 5]] = 0
    weights = [EXACT, 3.0, EXACT, 0.2, EXACT, 50.0, 1.0, 7.0]
    made = build_cost(WIDTH, ridge=0.2, moment=moment, moment_weight=4.0, protected=protected)
    return (
        made,
        rows(draw(8, WIDTH), residuals, weights),
        0.2 * torch.eye(WIDTH, dtype=torch.float64) + 4.0 * moment,
        protected,
    )


def slope(found: Tensor, asked: Problem, whole: Tensor, fixed: Tensor) -> Tensor:
    """The gradient of the objective along the changes that leave the outputs at the fixed rows as they are."""
    weighted = torch.isfinite(asked.weights)
    point = found.clone().requires_grad_()
    parts = asked.keys[weighted].T, asked.residuals[weighted].T, asked.weights[weighted]
    (gradient,) = torch.autograd.grad(reference.objective(point, *parts, whole), point)
    basis, _ = torch.linalg.qr(fixed.T)
    return gradient - gradient @ basis @ basis.T


def test_a_mixed_problem_is_at_its_constrained_optimum():
    made, asked, whole, protected = mixed_problem()
    solution = solve(made, asked)
    found, exact = change(solution), torch.isinf(asked.weights)
    assert (found @ asked.keys[exact].T - asked.residuals[exact].T).abs().max() < 1e-10
    assert (found @ protected.T).abs().max() < 1e-12
    fixed = torch.cat([asked.keys[exact], protected])
    assert slope(found, asked, whole, fixed).abs().max() < 1e-9
    assert slope(found + 1e-3 * draw(HIDDEN, WIDTH, seed=6), asked, whole, fixed).abs().max() > 1e-3
    assert solution.relaxed == () and torch.equal(solution.weights, asked.weights)


def test_a_free_metric_gives_the_least_change_that_fits():
    keys, residuals = draw(5, WIDTH), draw(5, HIDDEN, seed=1)
    for weights in (EXACT, 1.0):  # nothing speaks against meeting a finite weight in full
        found = change(solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, weights)))
        torch.testing.assert_close(found, (torch.linalg.pinv(keys) @ residuals).T, **CLOSE)


@pytest.mark.parametrize("ridge", [0.01, 5.0, 400.0])
def test_the_realised_share_of_one_key(ridge):
    keys, residuals = draw(1, WIDTH), draw(1, HIDDEN, seed=1)
    found, norm = change(solve(build_cost(WIDTH, ridge=ridge), rows(keys, residuals))), keys.square().sum()
    torch.testing.assert_close(keys @ found.T, residuals * norm / (ridge + norm), **CLOSE)


@pytest.mark.parametrize("moment", [None, second_moment()], ids=["ridge", "moment"])
def test_a_preserved_key_is_left_and_others_are_not(moment):
    keys, residuals = draw(5, WIDTH), draw(5, HIDDEN, seed=1)
    residuals[3:] = 0
    made = build_cost(WIDTH, ridge=0.1, moment=moment, moment_weight=0.0 if moment is None else 1.0)
    kept = change(solve(made, rows(keys, residuals, [1.0, 1.0, 1.0, EXACT, EXACT]))) @ keys[3:].T
    assert kept.abs().max() < 1e-10
    without = change(solve(made, rows(keys[:3], residuals[:3]))) @ keys[3:].T
    assert without.abs().max() > 0.01
    soft = [change(solve(made, rows(keys, residuals, [1.0] * 3 + [w] * 2))) @ keys[3:].T for w in (1.0, 10.0, 1e3)]
    assert without.norm() > soft[0].norm() > soft[1].norm() > soft[2].norm() > 1e-8


@pytest.mark.parametrize("weighted", [False, True], ids=["ridge", "moment"])
def test_protected_directions_are_left_and_taken_out_of_the_metric(weighted):
    protected, keys = torch.linalg.qr(draw(WIDTH, 7, seed=4))[0].T, draw(6, WIDTH)
    moment = second_moment() if weighted else None
    made = build_cost(WIDTH, ridge=0.5, moment=moment, moment_weight=2.0 * weighted, protected=protected)
    whole = 0.5 * torch.eye(WIDTH, dtype=torch.float64) + (2.0 * moment if weighted else 0)
    free = torch.linalg.qr(protected.T, mode="complete")[0][:, 7:]
    torch.testing.assert_close(
        made.divided(keys), keys @ free @ torch.linalg.inv(free.T @ whole @ free) @ free.T, **CLOSE
    )
    assert (made.divided(keys) @ protected.T).abs().max() < 1e-13
    assert (build_cost(WIDTH, ridge=0.5).divided(keys) @ protected.T).abs().max() > 0.1


def test_the_null_space_is_what_the_moment_hardly_sees():
    moment = second_moment(condition=1e4)
    protected = null_space(moment, 0.02)
    assert len(protected) == int((torch.linalg.eigvalsh(moment) >= 0.02).sum()) and 0 < len(protected) < WIDTH
    torch.testing.assert_close(protected @ protected.T, torch.eye(len(protected), dtype=torch.float64), **CLOSE)
    free = torch.linalg.qr(protected.T, mode="complete")[0][:, len(protected) :]
    assert torch.linalg.eigvalsh(free.T @ moment @ free).max() < 0.02
    assert len(null_space(moment, 2.0)) == 0  # nothing to protect, which the cost takes
    torch.testing.assert_close(build_cost(WIDTH, ridge=1.0, protected=null_space(moment, 2.0)).divided(moment), moment)
    with pytest.raises(EditError, match="all 40 directions .* pass a threshold between"):
        null_space(moment, 1e-6)


# precision and cost


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("condition", "falls_back"), [(1e2, False), (1e5, False), (3e8, True), (1e11, True)])
def test_refined_is_as_good_as_float64(condition, falls_back, scale):
    moment, keys = scale * second_moment(condition=condition), draw(6, WIDTH)
    settings = {"ridge": 0.0, "moment": moment, "moment_weight": 15000.0}
    refined, plain = build_cost(WIDTH, **settings, refined=True), build_cost(WIDTH, **settings)
    found = refined.divided(keys)
    error = (found - plain.divided(keys)).norm() / found.norm()
    assert error < 1e-14 * condition + 1e-12
    if not falls_back:
        rough = torch.linalg.inv((15000 * moment).float()).double()
        assert (keys @ rough - found).norm() / found.norm() > 100 * error  # float32 alone does not get there
    with Log() as log:
        refined.divided(keys)
        build_cost(WIDTH, **settings, refined=True).divided(keys)
    dtypes = {dtype for name, shape, dtype in log.outputs if name == "linalg_cholesky_ex" and shape == (WIDTH, WIDTH)}
    assert (torch.float64 in dtypes) == falls_back and torch.float32 in dtypes


def test_a_refined_solution_is_the_float64_one():
    _, asked, _, protected = mixed_problem()
    settings = {"ridge": 0.2, "moment": second_moment(), "moment_weight": 4.0, "protected": protected}
    refined, plain = (solve(build_cost(WIDTH, **settings, refined=way), asked) for way in (True, False))
    torch.testing.assert_close(change(refined), change(plain), **CLOSE)


class Log(TorchDispatchMode):
    """Notes (name, shape, dtype) of each tensor that an operation of torch puts out."""

    def __init__(self):
        super().__init__()
        self.outputs: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        tensors = [out] if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else []
        self.outputs += [(name, tuple(part.shape), part.dtype) for part in tensors if isinstance(part, Tensor)]
        return out


@pytest.mark.parametrize("refined", [False, True])
def test_one_factorisation_serves_several_batches(refined):
    with Log() as log:
        made = build_cost(WIDTH, ridge=0.1, moment=second_moment(), moment_weight=2.0, refined=refined)
        for seed in range(3):
            solve(made, rows(draw(4, WIDTH, seed=seed), draw(4, HIDDEN, seed=seed + 10)))
    factorised = [shape for name, shape, _ in log.outputs if name == "linalg_cholesky_ex" and len(shape) == 2]
    assert factorised == [(WIDTH, WIDTH)] + 3 * [(4, 4)]


def peak_bytes(action) -> int:
    """The most memory that tensors and workspaces of torch held at once during the action."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is given back
        peak = max(peak, held)
    return peak


def test_without_a_moment_nothing_is_as_large_as_width_by_width():
    width, count = 20_000, 8
    asked = rows(draw(count, width), draw(count, 64, seed=1), [EXACT, 1.0] * 4)
    protected = torch.linalg.qr(draw(width, 4, seed=2))[0].T
    for more in ({}, {"protected": protected}):
        peak = peak_bytes(lambda more=more: solve(build_cost(width, ridge=0.1, **more), asked))
        assert count * width * 8 <= peak < 10 * count * width * 8  # and width x width would be 2500 keys' worth
    small = 500
    asked = rows(draw(count, small), draw(count, 64, seed=1))
    with_moment = {"ridge": 0.1, "moment": second_moment(small), "moment_weight": 1.0}
    assert peak_bytes(lambda: solve(build_cost(small, **with_moment), asked)) > small * small * 8  # which would be seen


# constraints that cannot be told apart


def twins(sine: float, disagreement: float = 1.0) -> tuple[Tensor, Tensor]:
    """Five keys of which 1 and 3 are at an angle with this sine, and of very different lengths; and residuals."""
    keys, residuals = draw(5, WIDTH), draw(5, HIDDEN, seed=1)
    across = draw(WIDTH, seed=2)
    across -= (across @ keys[1]) / (keys[1] @ keys[1]) * keys[1]
    keys[3] = 1000 * (keys[1] + sine / math.sqrt(1 - sine**2) * across * keys[1].norm() / across.norm())
    residuals[3] = 1000 * (residuals[1] + disagreement * draw(HIDDEN, seed=3))
    return keys, residuals


@pytest.mark.parametrize("weighted", [False, True], ids=["free", "moment"])
@pytest.mark.parametrize("sine", [0.0, 1e-12, 1e-7, 1e-3])
def test_contradictory_exact_constraints_are_named_and_meet_in_the_middle(sine, weighted):
    keys, residuals = twins(sine)
    made = build_cost(
        WIDTH, ridge=0.0, moment=second_moment(condition=4.0) if weighted else None, moment_weight=weighted
    )
    solution = solve(made, rows(keys, residuals, EXACT))
    found = change(solution)
    assert solution.relaxed == ("fact 1", "fact 3")
    assert torch.isfinite(solution.weights).tolist() == [False, True, False, True, False]
    assert solution.condition < 1e5
    others = [0, 2, 4]
    assert (found @ keys[others].T - residuals[others].T).abs().max() < 1e-9
    alone = change(solve(made, rows(keys[:3], residuals[:3], EXACT)))
    assert found.norm() < 40 * alone.norm()
    if sine < 1e-3:
        middle = (residuals[1] + residuals[3] / 1000) / 2
        assert (found @ keys[1] - middle).norm() < 0.01 * middle.norm()


@pytest.mark.parametrize("sine", [0.0, 1e-3])
def test_parallel_constraints_that_agree_are_met_all_but_a_thousandth(sine):
    keys, residuals = twins(sine, disagreement=0.0)
    solution = solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, EXACT))
    assert solution.relaxed == ("fact 1", "fact 3")
    errors = (change(solution) @ keys.T - residuals.T).norm(dim=0) / residuals.norm(dim=1)
    assert errors.max() < 2e-3


@pytest.mark.parametrize("sine", [0.02, 0.3])
def test_separated_exact_constraints_are_met_and_nothing_is_relaxed(sine):
    keys, residuals = twins(sine)
    solution = solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, EXACT))
    assert solution.relaxed == () and torch.isinf(solution.weights).all()
    errors = (change(solution) @ keys.T - residuals.T).norm(dim=0) / residuals.norm(dim=1)
    assert errors.max() < 1e-9


def test_separation_is_a_setting():
    keys, residuals = twins(1e-3)
    exact = solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, EXACT), separation=1e-4)
    assert exact.relaxed == () and (change(exact) @ keys.T - residuals.T).abs().max() < 1e-5
    relaxed = solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, EXACT))
    assert change(exact).norm() > 5 * change(relaxed).norm()  # what a contradiction costs where it is met


def test_a_key_in_the_span_of_several_others_names_them_and_no_one_else():
    keys, residuals = draw(6, WIDTH), draw(6, HIDDEN, seed=1)
    keys[5] = keys[0] - 2 * keys[2] + keys[4]
    solution = solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, EXACT, names=tuple("abcdef")))
    assert solution.relaxed == ("a", "c", "e", "f")


def test_a_name_with_several_rows_is_named_once():
    keys, residuals = draw(4, WIDTH), draw(4, HIDDEN, seed=1)
    keys[2:] = keys[:2]
    solution = solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, EXACT, names=("a", "a", "b", "b")))
    assert solution.relaxed == ("a", "b")


def test_more_exact_keys_than_the_width_are_relaxed():
    keys, residuals = draw(WIDTH + 20, WIDTH), draw(WIDTH + 20, HIDDEN, seed=1)
    solution = solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, EXACT))
    assert len(solution.relaxed) == WIDTH + 20
    least_squares = torch.linalg.lstsq(keys, residuals).solution.T
    assert (change(solution) - least_squares).norm() < 0.2 * least_squares.norm()


def test_dependent_keys_of_finite_weight_are_solved_as_asked():
    keys, residuals = twins(0.0)
    solution = solve(build_cost(WIDTH, ridge=0.1), rows(keys, residuals, 1.0))
    expected = residuals.T @ keys @ torch.linalg.inv(0.1 * torch.eye(WIDTH, dtype=torch.float64) + keys.T @ keys)
    torch.testing.assert_close(change(solution), expected, rtol=1e-6, atol=1e-7)
    assert solution.relaxed == ()


def test_an_exact_edit_within_the_protected_directions_is_named():
    keys, residuals = draw(3, WIDTH), draw(3, HIDDEN, seed=1)
    protected = keys[1:2] / keys[1].norm()
    solution = solve(build_cost(WIDTH, ridge=1.0, protected=protected), rows(keys, residuals, EXACT))
    found = change(solution)
    assert solution.relaxed == ("fact 1",)
    assert (found @ keys[1]).abs().max() < 1e-9
    assert (found @ keys[[0, 2]].T - residuals[[0, 2]].T).abs().max() < 1e-10
    assert found.norm() < 10


def test_a_key_of_zero_asks_for_nothing():
    keys, residuals = draw(2, WIDTH), draw(2, HIDDEN, seed=1)
    keys[0] = 0
    solution = solve(build_cost(WIDTH, ridge=0.0), rows(keys, residuals, EXACT))
    alone = solve(build_cost(WIDTH, ridge=0.0), rows(keys[1:], residuals[1:], EXACT))
    assert solution.relaxed == ("fact 0",)
    torch.testing.assert_close(change(solution), change(alone), **CLOSE)


def test_rome_with_keys_that_do_not_meet_its_directions_is_named():
    keys, residuals = draw(3, WIDTH), draw(3, HIDDEN, seed=1)
    directions = keys + 0.1 * draw(3, WIDTH, seed=2)
    made = build_cost(WIDTH, ridge=0.0)
    fine = solve(made, rows(keys, residuals, EXACT, directions=directions))
    assert fine.relaxed == () and (change(fine) @ keys.T - residuals.T).abs().max() < 1e-10
    keys[2] = keys[0]
    twice = solve(made, rows(keys, residuals, EXACT, directions=directions))
    assert twice.relaxed == ("fact 0", "fact 2")
    assert (change(twice) @ keys[1] - residuals[1]).abs().max() < 1e-9
    assert change(twice).norm() < 5 * change(fine).norm()
    keys[2] = draw(WIDTH, seed=5)
    directions[2] = directions[0]
    assert set(solve(made, rows(keys, residuals, EXACT, directions=directions)).relaxed) >= {"fact 0", "fact 2"}


# what comes in and what is refused


def test_float64_comes_out_whatever_goes_in():
    keys, residuals = draw(2, WIDTH), draw(2, HIDDEN, seed=1)
    for dtype in (torch.bfloat16, torch.float32):
        low = solve(build_cost(WIDTH, ridge=0.1), rows(keys.to(dtype), residuals.to(dtype)))
        high = solve(build_cost(WIDTH, ridge=0.1), rows(keys.to(dtype).double(), residuals.to(dtype).double()))
        assert low.left.dtype == low.right.dtype == low.weights.dtype == torch.float64
        assert torch.equal(low.left, high.left) and torch.equal(low.right, high.right)


def test_nothing_asked_is_nothing_changed():
    assert not change(solve(build_cost(WIDTH, ridge=0.1), rows(draw(4, WIDTH), torch.zeros(4, HIDDEN)))).any()


def test_what_went_in_is_left_as_it_was():
    moment, protected, keys, residuals = second_moment(), torch.eye(WIDTH)[:2], draw(3, WIDTH), draw(3, HIDDEN)
    asked = rows(keys, residuals, [EXACT, EXACT, 1.0])
    given = [moment, protected, keys, residuals, asked.weights]
    before = [tensor.clone() for tensor in given]
    for refined in (False, True):
        made = build_cost(WIDTH, ridge=0.3, moment=moment, moment_weight=2.0, protected=protected, refined=refined)
        solve(made, asked)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


ONE = torch.ones(1, 3)
BAD_ROWS = {
    "rows disagree": ({"keys": torch.ones(2, 3)}, "do not fit together"),
    "no row": ({"keys": ONE[:0], "residuals": ONE[:0], "weights": ONE[0, :0], "names": ()}, "at least one edit"),
    "a vector": ({"keys": torch.ones(1)}, r"pass keys \(n, width\)"),
    "a name too many": ({"names": ("a", "b")}, "one name a row"),
    "directions of another width": ({"directions": torch.ones(1, 4)}, "directions shaped like the keys"),
    "weights as a column": ({"weights": torch.ones(1, 1)}, r"weights must be \(n,\)"),
    "weight of zero": ({"weights": torch.zeros(1)}, "above 0, with inf for exact"),
    "weight is not a number": ({"weights": torch.full((1,), math.nan)}, "above 0, with inf for exact"),
    "key is not finite": ({"keys": math.inf * ONE}, "the keys hold numbers that are not finite"),
    "residual is not finite": ({"residuals": math.nan * ONE}, "the residuals hold numbers that are not finite"),
    "direction is not finite": ({"directions": math.nan * ONE}, "the directions hold numbers that are not finite"),
}


@pytest.mark.parametrize(("parts", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_make_no_sense_are_an_error(parts, message):
    fine = {"keys": ONE, "residuals": ONE, "weights": torch.ones(1), "names": ("a",)}
    with pytest.raises(EditError, match=message):
        Problem(**(fine | parts))


EYE = torch.eye(3, dtype=torch.float64)
BAD_METRICS = {
    "negative ridge": ({"ridge": -1.0}, "ridge=-1.0 is not a finite number of at least 0"),
    "ridge is not a number": ({"ridge": math.nan}, "at least 0"),
    "weight is infinite": ({"moment": EYE, "moment_weight": math.inf}, "moment_weight=inf"),
    "weight without a moment": ({"moment_weight": 1.0}, "none is given; pass moment="),
    "moment of another width": ({"moment": torch.eye(4), "moment_weight": 1.0}, r"is \(3, 3\); found \(4, 4\)"),
    "moment is not finite": ({"moment": math.nan * EYE, "moment_weight": 1.0}, "second moment holds numbers"),
    "moment is lopsided": ({"moment": torch.ones(3, 3).tril(), "moment_weight": 1.0}, "not symmetric"),
    "moment without full rank": ({"moment": torch.ones(3, 3), "moment_weight": 1.0, "ridge": 0.0}, "or pass a ridge"),
    "protected of another width": ({"protected": torch.eye(4)[:1]}, r"\(direction, 3\)"),
    "everything protected": ({"protected": EYE}, "fewer than 3 of them"),
    "protected at an angle": ({"protected": torch.ones(2, 3) / 3**0.5}, "not orthonormal"),
    "protected is not finite": ({"protected": math.nan * EYE[:1]}, "not orthonormal"),
}


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize(("settings", "message"), BAD_METRICS.values(), ids=BAD_METRICS)
def test_a_metric_that_makes_no_sense_is_an_error(settings, message, refined):
    with pytest.raises(EditError, match=message):
        build_cost(3, **({"ridge": 0.1} | settings), refined=refined)


def test_keys_of_another_width_and_settings_out_of_range_are_errors():
    asked = rows(ONE, ONE)
    with pytest.raises(EditError, match=r"keys \(1, 3\) do not fit a weight of width 5"):
        solve(build_cost(5, ridge=0.1), asked)
    for more in ({"fallback_weight": 0.0}, {"fallback_weight": math.inf}, {"separation": 0.0}, {"separation": 1.0}):
        with pytest.raises(EditError, match="must be finite and above 0, separation="):
            solve(build_cost(3, ridge=0.1), asked, **more)
    with pytest.raises(EditError, match="pass for example threshold=0.02"):
        null_space(EYE, 0.0)
