"""The published formulas of closed-form edits, written out with their width-wide inverses in float64, as oracles.

Everything is in columns, as in the papers: W (hidden, width), keys K (width, n), wanted outputs Z or their changes R =
Z - W K (hidden, n), a second moment C (width, width). Each returns the change of W, (hidden, width).
"""

import torch
from torch import Tensor


def multedit(W: Tensor, k: Tensor, z: Tensor, ridge: float) -> Tensor:
    """(lambda W' + z k^T)(lambda I + k k^T)^-1 - W', for one key k (width,). arXiv 2406.04236."""
    return (ridge * W + torch.outer(z, k)) @ torch.linalg.inv(ridge * _identity(k) + torch.outer(k, k)) - W


def multedit_many(W: Tensor, K: Tensor, Z: Tensor, ridge: float) -> Tensor:
    """(lambda W' + Z K^T)(lambda I + K K^T)^-1 - W', the same normal equation with a column for each key."""
    return (ridge * W + Z @ K.T) @ torch.linalg.inv(ridge * _identity(K) + K @ K.T) - W


def rome(W: Tensor, k: Tensor, k_star: Tensor, z: Tensor, C: Tensor) -> Tensor:
    """Lambda (C^-1 k*)^T, Lambda = (z - W k) / ((C^-1 k*)^T k), for one key. arXiv 2202.05262, eq. 2."""
    u = torch.linalg.inv(C) @ k_star
    return torch.outer((z - W @ k) / (u @ k), u)


def memit(K: Tensor, R: Tensor, C: Tensor, weight: float) -> Tensor:
    """R K^T (Lambda C + K K^T)^-1. arXiv 2210.07229, eq. 14."""
    return R @ K.T @ torch.linalg.inv(weight * C + K @ K.T)


def emmet(K: Tensor, R: Tensor, C: Tensor, weight: float = 1.0, ridge: float = 0.0) -> Tensor:
    """R (K^T (Lambda C)^-1 K + ridge I)^-1 K^T (Lambda C)^-1. arXiv 2403.14236; the ridge is in its code."""
    inverse = torch.linalg.inv(weight * C)
    return R @ torch.linalg.inv(K.T @ inverse @ K + ridge * torch.eye(K.shape[1], dtype=K.dtype)) @ K.T @ inverse


def alphaedit(K: Tensor, R: Tensor, earlier: Tensor, C: Tensor, threshold: float, ridge: float) -> Tensor:
    """Delta of (P (K K^T + K_p K_p^T) + L2 I) Delta^T = P K R^T, K_p the keys of earlier edits. arXiv 2410.02355.

    P = U U^T, U the singular vectors of C with a singular value below the threshold.
    """
    vectors, values, _ = torch.linalg.svd(C)
    P = vectors[:, values < threshold] @ vectors[:, values < threshold].T
    return torch.linalg.solve(P @ (K @ K.T + earlier @ earlier.T) + ridge * _identity(K), P @ K @ R.T).T


def objective(change: Tensor, K: Tensor, R: Tensor, weights: Tensor, metric: Tensor) -> Tensor:
    """sum_i w_i |D k_i - r_i|^2 + tr(D M D^T), differentiable in D."""
    return ((change @ K - R).square() * weights).sum() + torch.trace(change @ metric @ change.T)


def _identity(keys: Tensor) -> Tensor:
    return torch.eye(len(keys), dtype=keys.dtype)
