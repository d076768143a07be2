"""The settings that closed-form editors share: where to edit, and what a change of the weights costs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Protocol, cast

from ...models import ModelError, Projection, VisionLanguageModel
from ..errors import EditError
from ..moments import Moments
from ..values import ValueSettings
from .cost import Cost, build_cost, null_space


class EditPlace(Protocol):
    """Anything that names a layer and a token to edit, such as the choice a causal trace makes."""

    @property
    def layer(self) -> int:
        """The layer whose projection is changed."""

    @property
    def token(self) -> str | int:
        """The name of a token group, or a position."""


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings(ValueSettings):
    """The settings that closed-form editors share: where to edit, and what a change of the weights costs.

    Raises `EditError` for a setting out of range, or for both or neither of `layer` and `where`.
    """

    layer: int | None = None
    """The (last) layer that is changed, negative from the end; take it from a causal trace."""
    spread: int = 1
    """How many layers share the work, `layer` being the last of them (MEMIT); values then are whole layer outputs."""
    token: str | int = "last"
    """The token that is edited: a group name (its last position counts) or a position, the same in all contexts."""
    where: EditPlace | None = None
    """A choice of layer and token made elsewhere, in place of `layer` and `token`."""
    projection: Literal["mlp", "attention"] = "mlp"
    """Which weight is changed: the down projection of the MLP, or the output projection of attention."""
    weight: float = 1.0
    """Of each key in the least-squares problem, inf for exact."""
    preserve_weight: float = float("inf")
    """Of the keys of the requests' `preserve_prompts` prompts, inf for exact: how firmly their outputs stay."""
    earlier_weight: float | None = None
    """Of the keys of edits made before, in a sequence; None leaves them out."""
    ridge_fraction: float = 0.02
    """The ridge as a share of the mean squared key norm: that of one key differs by a factor of 25 between layers."""
    ridge: float | None = None
    """An absolute ridge in place of ridge_fraction."""
    moment_weight: float = 0.0
    """How many old keys the second moment of keys stands for; 0 does without one."""
    moment_kind: str = "all"
    """Which tokens' second moment: all, image, question, template or text."""
    null_threshold: float | None = None
    """Directions of the second moment above it are not touched, as a share of its mean eigenvalue; None touches all."""
    two_keys: bool = False
    """ROME: the direction of the change is the mean key over contexts, its size is set at the prompt's own key."""
    refined: bool = False
    """Factorise the second moment in float32 and refine, for devices with slow float64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if (self.layer is None) == (self.where is None):
            raise EditError(
                f"{name} got layer={self.layer} and where={self.where}; "
                "pass one of them: layer=5, or where=the site that a trace chose"
            )
        if self.ridge_fraction < 0 or (self.ridge is not None and self.ridge < 0):
            raise EditError(
                f"{name} got ridge_fraction={self.ridge_fraction} and ridge={self.ridge}; pass numbers of at least 0"
            )
        if self.spread < 1 or self.projection not in ("mlp", "attention"):
            raise EditError(
                f"{name} got spread={self.spread} and projection={self.projection!r}; "
                "pass a spread of at least 1, and 'mlp' or 'attention'"
            )
        for field in ("weight", "preserve_weight", "earlier_weight", "null_threshold"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise EditError(f"{name} got {field}={value}; pass a number above 0")

    @property
    def place(self) -> tuple[int, str | int]:
        """The (last) layer and the token to edit."""
        return (cast(int, self.layer), self.token) if self.where is None else (self.where.layer, self.where.token)

    @property
    def needs_moments(self) -> bool:
        """Whether its cost or its null space are made of second moments of keys."""
        return self.moment_weight > 0 or self.null_threshold is not None

    def projections(self, vlm: VisionLanguageModel) -> dict[int, Projection]:
        """The projections that are changed by their layers (from 0), lowest first. EditError for layers not there."""
        last = self.place[0]
        find = vlm.down_projection if self.projection == "mlp" else vlm.attention_projection
        try:
            number = vlm.layer_index(last)
            found = {layer: find(layer) for layer in range(number - self.spread + 1, number + 1) if layer >= 0}
        except ModelError as error:
            raise EditError(f"cannot edit layer {last}: {error}") from error
        if len(found) < self.spread:
            raise EditError(f"{self.spread} layers up to layer {number} do not exist; pass a smaller spread")
        return found

    def cost(self, layer: int, projection: Projection, moments: Moments | None, ridge: float | None = None) -> Cost:
        """Return the cost of one layer. ridge: stands in for a relative one, which an edit takes from its keys.

        Raises `EditError` if second moments are needed and none are given.
        """
        ridge = (self.ridge or 0.0) if ridge is None else ridge
        if not self.needs_moments:
            return build_cost(projection.width, ridge=ridge)
        self.check_moments(moments)
        matrix = cast(Moments, moments).matrix(layer, self.moment_kind)
        protected = None
        if self.null_threshold is not None:
            protected = null_space(matrix, self.null_threshold * matrix.diagonal().mean().item())
        options = {"moment": matrix, "moment_weight": self.moment_weight} if self.moment_weight else {}
        return build_cost(projection.width, ridge=ridge, protected=protected, refined=self.refined, **options)

    def check_moments(self, moments: Moments | None) -> None:
        """Raise `EditError` if these settings need second moments and none are given."""
        if self.needs_moments and moments is None:
            raise EditError(
                f"{type(self).__name__} weighs old keys by their second moment, and none is given; "
                "collect them with second_moments(vlm, prompts) or `multrace moments`, or set moment_weight=0"
            )

    def as_text(self) -> dict[str, str]:
        """The settings as text, for the header of a saved edit."""
        layer, token = self.place
        settings = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "where"}
        settings |= {"editor": type(self).__name__, "layer": layer, "token": token}
        return {name: str(value) for name, value in settings.items()}
