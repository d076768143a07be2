"""The best change of a smaller rank: nearest to an edit in what it does to the edit's own keys.

Let D be the change of a weight in y = W k and M = A^T A a metric on keys. By Eckart and Young (1936), applied to D A^T,
the D' of rank r that minimises tr((D - D') M (D - D')^T) is P D, where P projects outputs orthogonally onto the r
leading eigenvectors of D M D^T. So D' k is the projection of D k for every k: no output moves further than the edit
moves it, and what the edit leaves alone is left alone.
With the factors D = left right, the eigenvectors are those of left (right M right^T) left^T, which are found in the
span of `left`; M itself is never formed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...models import VisionLanguageModel
from ..moments import Moments
from ..requests import EditError
from .delta import Delta
from .weight_change import NO_OWNER, WeightChange

_ELSEWHERE = 1e-6  # weight of the directions that no key has, as a share of that of the average direction of the keys
_LOST = 1e-10  # share of the squared effect that float32 factors do not have to begin with


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Orthonormal directions of a weight's output, those first along which its change does most in a metric."""

    vectors: Tensor
    """(hidden, n) float64, the eigenvectors of D M D^T in the span of the change."""
    effects: Tensor
    """(n,) float64, their eigenvalues, largest first: the mean squared change of the output along each."""

    def retained(self, rank: int) -> float:
        """Return the share of the squared effect that the first `rank` directions have; 1 for a change of none."""
        whole = float(self.effects.sum())
        return float(self.effects[:rank].sum()) / whole if whole else 1.0

    @property
    def lossless(self) -> int:
        """The smallest rank, at least 1, that leaves out nothing but the rounding of float32 factors."""
        left_out = self.effects.sum() - self.effects.cumsum(0)
        return 1 + int((left_out[:-1] > _LOST * self.effects.sum()).sum())

    def cut(self, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return factors (hidden, rank) and (rank, width), float64, of the best change of this rank."""
        kept = self.vectors[:, :rank]
        return kept, (kept.T @ left.double()) @ right.double()


@torch.no_grad()
def leading_directions(
    left: Tensor, right: Tensor, *, keys: Tensor | None = None, moment: Tensor | None = None
) -> Directions:
    """Return the directions in which D = left @ right acts, sorted by how much it does there in a metric M.

    With keys K (n, width) or a second moment C or both, B = K^T K / n + C (what is missing counts as 0) and
    M = B + 1e-6 tr(B) / width I: each direction that no key has weighs a millionth of the average one. Without both
    M = I, so that the directions are those of the plain SVD of D.

    Args:
        left: (hidden, rank).
        right: (rank, width).
        keys: The inputs at which the change is to be met, (n, width).
        moment: The mean of k k^T over other inputs, (width, width).
    """
    left, right = left.double(), right.double()
    basis, coordinates = torch.linalg.qr(left)
    inner = _inner(right, keys, moment)
    effects, vectors = torch.linalg.eigh(coordinates @ inner @ coordinates.T)
    return Directions(vectors=basis @ vectors.flip(1), effects=effects.flip(0).clamp(min=0))


def _inner(right: Tensor, keys: Tensor | None, moment: Tensor | None) -> Tensor:
    """Return right M right^T, (rank, rank) float64, for the metric M of `leading_directions`."""
    own, size = right @ right.T, 0.0
    inner = torch.zeros_like(own)
    if keys is not None and len(keys):
        read = right @ keys.double().T / len(keys) ** 0.5
        inner, size = inner + read @ read.T, size + float(keys.double().square().sum()) / len(keys)
    if moment is not None:
        inner, size = inner + right @ moment.to(right) @ right.T, size + float(moment.diagonal().sum())
    return inner + _ELSEWHERE * size / right.shape[1] * own if size else own


def truncate(vlm: VisionLanguageModel, delta: Delta, *, rank: int, moments: Moments | None = None) -> Delta:
    """Return the delta with each weight's change cut to at most this rank, as `to_peft(rank=)` writes it.

    The change D of a weight becomes the D' of that rank which minimises the error on the edit's own keys, tr((D - D')
    M (D - D')^T) with M as in `leading_directions`: sum over keys |(D - D') k|^2, but for a part of a millionth. Keys,
    residuals and requests stay, so that `retained` and `evaluate` say what the cut costs.

    Args:
        vlm: The model that was edited.
        delta: The edit.
        rank: The largest rank, at least 1; a change of no larger rank stays as it is.
        moments: Second moments of keys, whose mean then counts as much as the mean over the edit's own keys.

    Returns:
        A delta with the same keys, residuals, requests and fingerprints; `settings["truncated_to"]` is the rank.

    Raises:
        EditError: The rank is not a number from 1, or the moments are not of the weights that the edit changes.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing import truncate
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who won?")
        >>> request = mt.EditRequest(question=prompt, target="Pruro", rewrite_prompts=[vlm.prompt(None, "Who lost?")])
        >>> delta = mt.MultEdit(layer=5, steps=25).edit(vlm, [request], progress=False)
        >>> (change,) = delta.changes.values()
        >>> change.rank
        4
        >>> with truncate(vlm, delta, rank=3).applied(vlm):
        ...     vlm.answers([prompt])
        ['Pruro']
    """
    check_rank(rank)
    changes = {}
    for name, change in delta.changes.items():
        changes[name] = change
        if change.rank > rank:
            found = weight_directions(vlm, name, change, moments)
            kept = found.vectors[:, :rank]
            changes[name] = replace(change, left=(kept @ (kept.T @ change.left.double())).float())
    return replace(delta, changes=changes, settings={**delta.settings, "truncated_to": str(rank)})


def weight_directions(
    vlm: VisionLanguageModel, name: str, change: WeightChange, moments: Moments | None = None
) -> Directions:
    """Return the directions of one weight's change in the metric of its own keys, and of moments if they are given."""
    moment = None if moments is None else moment_of(vlm, name, moments)
    return leading_directions(change.left, change.right, keys=change.keys, moment=moment)


def check_rank(rank: int) -> None:
    """Raise `EditError` unless this is a rank that a change can be cut to."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise EditError(f"cannot cut a change to rank {rank!r}; pass a whole number from 1, such as rank=16")


def moment_of(vlm: VisionLanguageModel, name: str, moments: Moments) -> Tensor:
    """Return the mean of k k^T of what the weight of this name reads. Raises `EditError` if it is not among these."""
    for layer in moments.layers:
        if layer < vlm.layers and name in _names(vlm, layer, moments.projection):
            return moments.matrix(layer)
    raise EditError(
        f"the moments are of {moments.projection!r} in layers {[*moments.layers]}, and the edit changes {name}; "
        "collect them for the layers that were edited, or pass none"
    )


def _names(vlm: VisionLanguageModel, layer: int, projection: str) -> Mapping[str, slice]:
    kind, _, expert = projection.partition(" ")
    if kind == "expert":
        return vlm.expert_projection(layer, int(expert)).slices if vlm.expert_count(layer) > int(expert) else {}
    if kind == "attention":
        return vlm.attention_projection(layer).slices
    return vlm.down_projection(layer).slices if vlm.has_down_projection(layer) else {}


def effects_of_requests(change: WeightChange, directions: Directions, requests: int) -> Tensor:
    """Return the squared change of the outputs at each request's own keys along each direction.

    (request, direction) float64; 0 for a request without keys. Their sum over all directions is the whole of it.
    """
    along = (change.moved(change.keys) @ directions.vectors).square()
    owned = change.owners != NO_OWNER
    return along.new_zeros(requests, along.shape[1]).index_add_(0, change.owners[owned], along[owned])
