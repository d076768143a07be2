"""The algebra of closed-form edits: one regularised least-squares problem, solved in float64."""

import torch
from torch import Tensor

from .errors import EditError


def ridge_update(keys: Tensor, residuals: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """Factors (left, right) of the weight change that adds the residuals at the keys and moves the weight least.

    keys (edit, mlp): inputs K of the weight W, one a row; residuals (edit, hidden): wanted minus current output, Z -
    W'K. ridge, at least 0: the price lambda of a change in the weight, in units of a squared key norm. left (hidden,
    edit) @ right (edit, mlp) is the change of W in y = W k, at most of rank `edit`:

        W* = argmin |W K - Z|^2 + lambda |W - W'|^2 = W' + (Z - W'K) (lambda I + K^T K)^-1 K^T

    This is the published (lambda W' + z k^T)(lambda I + k k^T)^-1 with the inverse taken over edits instead of over
    the MLP width: exact, and an n x n solve. One key gives the rank-one form (z - W'k) k^T / (lambda + |k|^2), which
    realises the fraction |k|^2 / (lambda + |k|^2) of what was asked. Computed and returned in float64 whatever comes
    in. EditError if shapes disagree, a number is not finite, or ridge is 0 and keys are linearly dependent. MultEdit,
    arXiv 2406.04236.
    """
    _check(keys, residuals, ridge)
    keys, residuals = keys.double(), residuals.double()
    gram = keys @ keys.T + ridge * torch.eye(len(keys), dtype=torch.float64, device=keys.device)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or not _well_posed(factor):
        raise EditError(
            f"{len(keys)} linearly dependent keys cannot all be met with ridge={ridge:g}; "
            "pass a ridge above 0 (0.05 times the mean squared key norm is a good start), or edit fewer facts at once"
        )
    return torch.cholesky_solve(residuals, factor).T, keys


def _well_posed(factor: Tensor) -> bool:
    """Whether the system behind this Cholesky factor still has digits left in float64."""
    diagonal = factor.diagonal()
    smallest, largest = diagonal.min().item(), diagonal.max().item()
    return smallest > 0 and (smallest / largest) ** 2 > factor.shape[0] * torch.finfo(torch.float64).eps


def _check(keys: Tensor, residuals: Tensor, ridge: float) -> None:
    if keys.ndim != 2 or residuals.ndim != 2 or len(keys) != len(residuals) or not len(keys):
        raise EditError(
            f"keys {tuple(keys.shape)} and residuals {tuple(residuals.shape)} do not fit together; "
            "pass keys (edit, mlp) and residuals (edit, hidden), at least one edit"
        )
    if not (ridge >= 0 and ridge < float("inf")):
        raise EditError(f"ridge={ridge} is not a finite number of at least 0; pass for example ridge=0.01")
    for name, tensor in (("keys", keys), ("residuals", residuals)):
        if not torch.isfinite(tensor).all():
            raise EditError(
                f"the {name} hold numbers that are not finite; load the model in float32, or lower the learning rate"
            )
