"""The closed form: equal to the published dense form, exact limits, bounded rank, and errors for what has no answer."""

import pytest
import torch
from multrace.editing.errors import EditError
from multrace.editing.solve import ridge_update
from torch import Tensor

HIDDEN, MLP = 12, 40
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def published(weight: Tensor, keys: Tensor, values: Tensor, ridge: float) -> Tensor:
    """(lambda W' + Z K^T)(lambda I + K K^T)^-1 with the MLP-wide inverse of the paper; normal equations for n keys."""
    identity = torch.eye(weight.shape[1], dtype=torch.float64)
    return (ridge * weight + values.T @ keys) @ torch.linalg.inv(ridge * identity + keys.T @ keys)


def problem(edits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (hidden, mlp), keys (edit, mlp) and wanted values (edit, hidden) in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HIDDEN, MLP), (edits, MLP), (edits, HIDDEN))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def change(weight: Tensor, keys: Tensor, values: Tensor, ridge: float) -> Tensor:
    left, right = ridge_update(keys, values - keys @ weight.T, ridge=ridge)
    return left @ right


@pytest.mark.parametrize("ridge", [1e-3, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("edits", [1, 2, 7, MLP + 5])
def test_equals_the_published_dense_form(edits, ridge):
    weight, keys, values = problem(edits)
    torch.testing.assert_close(
        weight + change(weight, keys, values, ridge), published(weight, keys, values, ridge), rtol=1e-8, atol=1e-9
    )


def test_one_key_is_the_rank_one_form():
    weight, keys, values = problem(1)
    key, value = keys[0], values[0]
    rank_one = torch.outer(value - weight @ key, key) / (0.3 + key @ key)
    torch.testing.assert_close(change(weight, keys, values, 0.3), rank_one, **CLOSE)


def test_is_the_minimum_of_the_objective():
    weight, keys, values = problem(5)
    edited = (weight + change(weight, keys, values, 0.7)).requires_grad_()
    objective = (keys @ edited.T - values).square().sum() + 0.7 * (edited - weight).square().sum()
    (gradient,) = torch.autograd.grad(objective, edited)
    assert gradient.abs().max() < 1e-11
    (elsewhere,) = torch.autograd.grad(
        (keys @ (moved := weight.clone().requires_grad_()).T - values).square().sum()
        + 0.7 * (moved - weight).square().sum(),
        moved,
    )
    assert elsewhere.abs().max() > 1  # the same check does fail away from the minimum


@pytest.mark.parametrize("edits", [1, 6])
def test_a_vanishing_ridge_meets_the_constraint(edits):
    weight, keys, values = problem(edits)
    torch.testing.assert_close(keys @ (weight + change(weight, keys, values, 0.0)).T, values, **CLOSE)
    distances = [
        (keys @ (weight + change(weight, keys, values, r)).T - values).norm().item() for r in (1.0, 1e-2, 1e-4, 1e-6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1e-2 and distances[-1] < 1e-5


@pytest.mark.parametrize("ridge", [0.0, 0.01, 5.0, 400.0])
def test_the_realised_fraction_of_one_key(ridge):
    weight, keys, values = problem(1)
    residual, norm = values - keys @ weight.T, keys.square().sum()
    torch.testing.assert_close(keys @ change(weight, keys, values, ridge).T, residual * norm / (ridge + norm), **CLOSE)


def test_orthogonal_inputs_are_untouched_and_others_are_not():
    weight, keys, values = problem(3)
    keys[:, MLP // 2 :] = 0
    other = torch.cat(
        [torch.zeros(MLP // 2), torch.randn(MLP // 2, generator=torch.Generator().manual_seed(1))]
    ).double()
    left, right = ridge_update(keys, values, ridge=0.1)
    assert torch.equal(left @ (right @ other), torch.zeros(HIDDEN, dtype=torch.float64))
    assert (left @ (right @ other.flip(0))).abs().max() > 0.01


@pytest.mark.parametrize("edits", [1, 2, 5])
def test_rank_is_bounded_by_the_number_of_keys(edits):
    weight, keys, values = problem(edits)
    assert torch.linalg.matrix_rank(change(weight, keys, values, 0.1)) == edits


def test_nothing_asked_is_nothing_changed():
    _, keys, values = problem(4)
    left, right = ridge_update(keys, torch.zeros_like(values), ridge=0.1)
    assert not (left @ right).any()


def test_float64_comes_out_whatever_goes_in():
    _, keys, values = problem(2)
    for dtype in (torch.bfloat16, torch.float32):
        low = ridge_update(keys.to(dtype), values.to(dtype), ridge=0.1)
        high = ridge_update(keys.to(dtype).double(), values.to(dtype).double(), ridge=0.1)
        assert all(a.dtype is torch.float64 and torch.equal(a, b) for a, b in zip(low, high, strict=True))


BAD = {
    "rows disagree": (torch.ones(2, 3), torch.ones(1, 3), 0.1, "do not fit together"),
    "no edit": (torch.ones(0, 3), torch.ones(0, 3), 0.1, "at least one edit"),
    "a vector": (torch.ones(3), torch.ones(3), 0.1, r"pass keys \(edit, mlp\)"),
    "negative ridge": (torch.ones(1, 3), torch.ones(1, 3), -1.0, "at least 0"),
    "ridge is not a number": (torch.ones(1, 3), torch.ones(1, 3), float("nan"), "at least 0"),
    "key is not finite": (torch.full((1, 3), float("inf")), torch.ones(1, 3), 0.1, "not finite"),
    "residual is not finite": (torch.ones(1, 3), torch.full((1, 3), float("nan")), 0.1, "not finite"),
    "same key twice without ridge": (torch.ones(2, 3), torch.ones(2, 3), 0.0, "linearly dependent"),
    "a key of zero without ridge": (torch.zeros(1, 3), torch.ones(1, 3), 0.0, "linearly dependent"),
}


@pytest.mark.parametrize(("keys", "residuals", "ridge", "message"), BAD.values(), ids=BAD)
def test_what_has_no_answer_is_an_error(keys, residuals, ridge, message):
    with pytest.raises(EditError, match=message):
        ridge_update(keys, residuals, ridge=ridge)
