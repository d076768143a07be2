"""How well a score tells right from wrong answers, and how sure that is."""

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
"""Bootstrap samples of an interval."""


def auroc(scores: NDArray, is_right: NDArray) -> float:
    """The share of pairs of a right and a wrong answer of which the right one scores higher; ties count half.

    scores (record,), is_right (record,) booleans with at least one of each.
    """
    return float(weighted_auroc(scores, is_right, np.ones((1, len(scores))))[0])


def weighted_auroc(scores: NDArray, is_right: NDArray, counts: NDArray) -> NDArray:
    """(draw,): `auroc` of samples that hold each record so many times; counts (draw, record)."""
    _, place = np.unique(scores, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(place.max() + 1))
    right, wrong = (
        np.add.reduceat((counts * members)[:, order], starts, axis=1, dtype=np.float64)
        for members in (is_right, ~is_right)
    )
    below = wrong.cumsum(1) - wrong
    return (right * (below + wrong / 2)).sum(1) / (right.sum(1) * wrong.sum(1))


def bootstrap_counts(is_right: NDArray, *, seed: int, draws: int = DRAWS) -> NDArray:
    """(draw, record): how often each record is drawn; right and wrong answers keep their numbers in every draw."""
    generator = np.random.default_rng(seed)
    counts = np.zeros((draws, len(is_right)), dtype=np.int64)
    for members in (is_right, ~is_right):
        size = int(members.sum())
        counts[:, members] = generator.multinomial(size, np.full(size, 1 / size), size=draws)
    return counts
