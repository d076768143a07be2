"""Where among the image tokens a quantity lies: by index, and how many tokens hold most of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import TraceError


def index_shares(mass: Tensor, bins: int) -> Tensor:
    """(..., bin), summing to one: the share of the mass (..., image token) in equally many tokens each, by index.

    Of 576 tokens, 16 bins hold 36 each. Where tokens do not divide evenly, bins differ by one token. NaN where there
    is no mass at all. TraceError for more bins than tokens or none.
    """
    count = mass.shape[-1]
    if not 1 <= bins <= count:
        raise TraceError(f"cannot put {count} image tokens into {bins} bins; pass a number from 1 to {count}")
    parts = [mass[..., start:stop].sum(-1) for start, stop in bin_edges(count, bins)]
    return torch.stack(parts, -1) / mass.sum(-1, keepdim=True)


def bin_edges(count: int, bins: int) -> list[tuple[int, int]]:
    """The first index of each bin, and the one after its last."""
    return [(count * index // bins, count * (index + 1) // bins) for index in range(bins)]


def tokens_for_share(mass: Tensor, share: float) -> Tensor:
    """(...,) int64: the fewest image tokens that hold this share of the mass (..., image token); 0 without any mass.

    TraceError for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise TraceError(f"no share {share} of the picture's mass; pass one above 0 and at most 1, such as 0.8")
    ordered = mass.double().sort(-1, descending=True).values
    wanted = share * ordered.sum(-1, keepdim=True)
    reached = ordered.cumsum(-1) >= wanted * (1 - 1e-12)  # all of it is reached in spite of rounding
    first = torch.where(reached, torch.arange(1, mass.shape[-1] + 1), mass.shape[-1]).min(-1).values
    return torch.where(wanted[..., 0] > 0, first, 0)


def over_grid(values: Tensor, positions: Sequence[int], patches: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """(..., image, row, column): values (..., position) on the patches, NaN where no position is.

    patches: (position, row, column, image). TraceError where image tokens form no grid.
    """
    if not patches:
        raise TraceError("the image tokens of this prompt form no grid of patches; read their values one by one")
    sizes = [max(patch[axis] for patch in patches) + 1 for axis in (3, 1, 2)]
    grid = torch.full((*values.shape[:-1], *sizes), torch.nan, dtype=values.dtype)
    index = {position: number for number, position in enumerate(positions)}
    for position, row, column, image in patches:
        if position in index:
            grid[..., image, row, column] = values[..., index[position]]
    return grid
