"""What dropping image tokens from a layer on saves: tokens that go through layers, and floating-point operations."""

from collections.abc import Sequence

import torch
from torch import Tensor


def tokens_kept(dropped: Tensor, layers: Sequence[int], *, length: int, depth: int) -> Tensor:
    """(..., layer) float64 in 0 to 1: share of the prompt's token-layers that are still computed.

    dropped (..., layer): how many of the prompt's `length` tokens n are gone from each of the layers l on, d of them;
    depth: the decoder's layers L. The share is (n l + (n - d) (L - l)) / (n L).
    """
    left = depth - torch.tensor(layers)
    return 1 - (dropped * left).double() / (length * depth)


def operations_kept(
    dropped: Tensor, layers: Sequence[int], *, length: int, token_operations: Sequence[int], pair_operations: int
) -> Tensor:
    """(..., layer) float64 in 0 to 1: share of the decoder's floating-point operations on the prompt still done.

    A layer i over m tokens takes m c_i + a m (m + 1) / 2 of them: c_i, token_operations, for each token by its
    matrices; a, pair_operations, for each query-key pair of causal attention. m is n before the layer l, n - d from
    there on (`tokens_kept`). Norms, the output head, the vision tower and the answer's tokens are not counted.
    """
    each = torch.tensor(token_operations, dtype=torch.float64)
    rest = length - dropped.double()
    pairs_saved = _pairs(torch.tensor(length, dtype=torch.float64)) - _pairs(rest)
    total = length * each.sum() + len(each) * pair_operations * _pairs(torch.tensor(length, dtype=torch.float64))
    left = torch.tensor([len(each) - layer for layer in layers])
    after = torch.stack([each[layer:].sum() for layer in layers])
    return 1 - (dropped * after + left * pair_operations * pairs_saved) / total


def _pairs(tokens: Tensor) -> Tensor:
    """Query-key pairs of so many tokens, each of which sees itself and those before it."""
    return tokens * (tokens + 1) / 2
