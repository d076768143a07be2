"""The directions that old keys fill, which AlphaEdit does not touch: by size, by share, and with the keys of edits."""

import torch
from torch import Tensor

from ..requests import EditError
from .cost import check_square


def null_space(moment: Tensor, threshold: float | None = None, *, share: float | None = None) -> Tensor:
    """Return the directions to protect, (direction, width): the largest eigenvectors of a moment of keys.

    A change that does not touch them leaves the outputs at nearly all old keys as they are. What is left for edits are
    the other width - direction dimensions. Source: AlphaEdit (arXiv 2410.02355), with a threshold of 2e-2. A threshold
    depends on the scale and on the spectrum of a model's keys; a share of what the keys hold does not depend on the
    scale.

    Args:
        moment: (width, width), symmetric.
        threshold: Smallest eigenvalue of a protected direction, above 0, in units of a squared key entry; it has to be
            chosen for each model.
        share: In place of it, the share of the trace that the protected directions hold at least, between 0 and 1; as
            few directions as possible.

    Raises:
        EditError: No direction is left for edits, a number is out of range, or both or neither of them are given.

    Example:
        >>> import torch
        >>> from multrace.editing.solve import null_space
        >>> moment = torch.diag(torch.tensor([1.0, 90.0, 9.0]))
        >>> null_space(moment, share=0.9).abs()
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    check_square(moment, len(moment))
    if (threshold is None) == (share is None):
        raise EditError(f"null_space got threshold={threshold} and share={share}; pass one of them, as share=0.99")
    if threshold is not None and not (threshold > 0 and threshold < float("inf")):
        raise EditError(f"threshold={threshold} is not a finite number above 0; pass for example threshold=0.02")
    if share is not None and not 0 < share < 1:
        raise EditError(f"share={share} is not between 0 and 1; pass for example share=0.99")
    values, vectors = torch.linalg.eigh(moment.double())
    if threshold is not None:
        kept = int((values < threshold).sum())
        if not kept:
            raise EditError(
                f"all {len(moment)} directions have a second moment of at least {threshold:g} (the smallest is "
                f"{values[0].item():.3g}), so nothing is left to edit in; pass a threshold between that and "
                f"{values[-1].item():.3g}"
            )
        return vectors[:, kept:].T.contiguous()
    held = values.clamp(min=0).flip(0).cumsum(0)
    kept = len(values) - int((held < share * held[-1]).sum()) - 1
    if not kept:
        raise EditError(
            f"it takes all {len(moment)} directions to hold {share:g} of the second moment, so nothing is left to edit "
            f"in; pass a share of at most {(held[-2] / held[-1]).item():.6g}"
        )
    return vectors[:, kept:].T.contiguous()


def protected_directions(moment: Tensor, *, threshold: float | None = None, share: float | None = None) -> Tensor:
    """Return the directions that an editor protects, as `null_space`, and refuse to protect none.

    Args:
        moment: (width, width), symmetric.
        threshold: Smallest eigenvalue of a protected direction, as a share of the mean eigenvalue.
        share: In place of it, the share of the trace that the protected directions hold.

    Raises:
        EditError: No direction would be protected, or none is left for edits: the message says what to pass.
    """
    if share is not None:
        return null_space(moment, share=share)
    mean = moment.diagonal().double().mean().item()
    if threshold is None or not mean > 0:
        raise EditError(f"no direction can be protected by a second moment of mean {mean:g}; collect it from prompts")
    try:
        protected = null_space(moment, threshold * mean)
    except EditError as error:
        raise EditError(f"null_threshold={threshold:g} of the mean {mean:.3g}: {error}; or null_share=0.99") from error
    if not len(protected):
        largest = torch.linalg.eigvalsh(moment.double())[-1].item() / mean
        raise EditError(
            f"no direction has a second moment of null_threshold={threshold:g} times the mean, so nothing would be "
            f"protected; pass at most {largest:.3g}, or null_share=0.99"
        )
    return protected


def with_edited_keys(moment: Tensor, edited: Tensor | None, weight: float) -> Tensor:
    """Return (K K^T / t + lambda C) / (lambda + 1), the second moment of old keys and of the keys of t edits.

    Source: BetaEdit (arXiv 2605.09285), which takes the null space of it anew every 1,000 edits.

    Args:
        moment: C, the second moment of old keys.
        edited: K K^T / t, the mean of k k^T over the keys of edits; None for none.
        weight: lambda, above 0.
    """
    if edited is None:
        return moment
    return (edited + weight * moment.to(edited)) / (weight + 1)
