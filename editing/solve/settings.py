"""The settings that closed-form editors share: where they edit, and what a change of the weights costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, Protocol, cast

from torch import Tensor

from ...models import ExpertProjection, ModelError, Projection, VisionLanguageModel
from ..moments import Moments, MomentSource
from ..requests import EditError
from ..siblings import Siblings
from ..values import ValueSettings
from .cost import Cost, build_cost
from .null_space import protected_directions, with_edited_keys

OWN_RIDGE = 1e-3
"""Ridge of the moments of own samples, as a share of the median square of an entry of a key."""
_ALL_EXPERTS = "all experts"


class EditPlace(Protocol):
    """Anything that names a layer and a token to edit, such as the site that a causal trace chooses."""

    @property
    def layer(self) -> int:
        """The layer whose projection is changed."""

    @property
    def token(self) -> str | int:
        """The name of a token group, or a position."""


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings(ValueSettings):
    """The settings that closed-form editors share: where they edit, and what a change of the weights costs.

    Raises `EditError` for a setting out of range, or for both or neither of `layer` and `where`.
    """

    layer: int | None = None
    """The layer that is changed (the last one of several), negative from the end; a causal trace tells which."""
    spread: int = 1
    """Number of layers that share the change, the last of which is `layer` (MEMIT). With more than one, the wanted
    value is the output of that whole layer."""
    token: str | int = "last"
    """The token that is edited, in all contexts: the name of a token group (its last position counts) or a position."""
    where: EditPlace | None = None
    """A layer and a token that were chosen elsewhere, in place of `layer` and `token`."""
    projection: Literal["mlp", "attention"] = "mlp"
    """The weight that is changed: "mlp" is the down projection of the MLP, "attention" the output projection."""
    expert: int | Literal["routed"] | None = None
    """In a layer of experts, the routed expert whose slice alone is changed, or "routed" for all that the edited tokens
    are routed to. None is the expert that every token sees, or "routed" where there is none."""
    weight: float = 1.0
    """Weight of each edited key in the least-squares problem; inf meets what is asked there exactly."""
    preserve_weight: float | None = None
    """Weight of the keys whose outputs are to stay, those of `preserve_prompts` and of siblings; inf keeps them
    exactly. None keeps them exactly where that leaves each request at least half of what it would be given without
    them, and otherwise with the largest weight that does, first of siblings and then of `preserve_prompts`."""
    siblings: Siblings | None = None
    """The questions whose outputs are to stay without being asked for; None for those of `preserve_prompts` alone."""
    earlier_weight: float | None = None
    """Weight of the keys of earlier edits of a session, whose outputs are to stay; None ignores them."""
    ridge_fraction: float = 0.02
    """The ridge as a share of the mean squared norm of what the kept keys leave of the edited ones; the norm of keys
    varies by a factor of 25 over layers."""
    ridge: float | None = None
    """The ridge in units of a squared key norm, in place of `ridge_fraction`."""
    moment_weight: float = 0.0
    """Number of old keys that the second moment of keys stands for; 0 needs no moments."""
    moment_kind: str = "all"
    """The tokens whose second moment is taken: all, image, question, template or text."""
    null_threshold: float | None = None
    """Eigenvectors of the second moment with at least this eigenvalue, as a share of the mean eigenvalue, are not
    touched; None allows all directions."""
    null_share: float | None = None
    """Share of the trace of the second moment, such as 0.99, that the untouched directions hold, as few as possible, in
    place of `null_threshold`. Unlike a threshold it does not depend on the spectrum that a model's keys have."""
    null_refresh: int | None = None
    """Number of edits of a session after which the untouched directions are taken anew, with the keys of its edits
    beside the old ones (BetaEdit); None takes them once."""
    null_moment_weight: float = 3000.0
    """Weight of the second moment of old keys beside that of the keys of edits, where `null_refresh` takes both."""
    norm_anchor: Literal["pilot"] | float | None = None
    """Norm that the wanted output at an edit's first key is scaled to (NAS, arXiv 2602.02543), and that later ones do
    not exceed: a number, or "pilot" for the mean over the first `norm_pilot` edits of a session, which are made as they
    are. An edit with an output above twice the norm fails."""
    norm_pilot: int = 100
    """Number of edits whose wanted outputs give the norm of `norm_anchor="pilot"`. The paper takes 1,000; on
    the embedded model the norms differ by a fifth from their mean, which 100 of them tell to 2 %."""
    change_limit: float | None = None
    """Largest Frobenius norm of a weight's change by one edit, as a share of that of the weight; an edit beyond it is
    refused. None allows any."""
    growth_limit: float | None = None
    """Largest Frobenius norm of an edited weight, as a multiple of that before the first edit, such as 1.5; an edit
    that would exceed it is refused. None allows any."""
    two_keys: bool = False
    """ROME: the direction of the change is the mean key over contexts, and its size is set at the key of the prompt."""
    refined: bool = False
    """Factorise the second moment in float32 and refine the solution, for devices with slow float64."""

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
        if self.expert is not None and (self.projection != "mlp" or not _is_expert(self.expert)):
            raise EditError(
                f"{name} got expert={self.expert!r} and projection={self.projection!r}; "
                "pass the number of an expert, 'routed' or None, and projection='mlp'"
            )
        positive = ("weight", "preserve_weight", "earlier_weight", "null_threshold", "null_moment_weight")
        for field in (*positive, "null_refresh", "norm_pilot", "change_limit"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise EditError(f"{name} got {field}={value}; pass a number above 0")
        self._check_streams(name)

    def _check_streams(self, name: str) -> None:
        """Raise `EditError` for settings of long streams that are out of range."""
        if self.null_share is not None and not 0 < self.null_share < 1:
            raise EditError(f"{name} got null_share={self.null_share}; pass a share between 0 and 1, such as 0.99")
        if self.null_refresh is not None and not self.has_null_space:
            raise EditError(
                f"{name} got null_refresh={self.null_refresh} and leaves no direction untouched; pass null_share=0.99 "
                "or null_threshold=1.0 as well, or leave null_refresh out"
            )
        anchor = self.norm_anchor
        if not (anchor in (None, "pilot") or (isinstance(anchor, int | float) and 0 < anchor < float("inf"))):
            raise EditError(f"{name} got norm_anchor={anchor!r}; pass a norm above 0, 'pilot' or None")
        if self.growth_limit is not None and not self.growth_limit > 1:
            raise EditError(
                f"{name} got growth_limit={self.growth_limit}, a multiple of the norm before the first edit; pass a "
                "number above 1, such as 1.5"
            )

    @property
    def place(self) -> tuple[int, str | int]:
        """The layer (the last one of several) and the token to edit."""
        return (cast(int, self.layer), self.token) if self.where is None else (self.where.layer, self.where.token)

    @property
    def needs_moments(self) -> bool:
        """Whether the editor needs second moments of keys, for its cost or for its null space."""
        return self.moment_weight > 0 or self.has_null_space

    @property
    def has_null_space(self) -> bool:
        """Whether the editor leaves directions untouched that old keys fill."""
        return self.null_threshold is not None or self.null_share is not None

    def projections(self, vlm: VisionLanguageModel) -> dict[int, Projection]:
        """Return the projections that are changed by layer (from 0), lowest first.

        Raises `EditError` for a layer or an expert that does not exist.
        """
        last = self.place[0]
        try:
            number = vlm.layer_index(last)
            layers = range(number - self.spread + 1, number + 1)
            found = {layer: self._projection(vlm, layer) for layer in layers if layer >= 0}
        except ModelError as error:
            raise EditError(f"cannot edit layer {last}: {error}") from error
        if len(found) < self.spread:
            raise EditError(f"{self.spread} layers up to layer {number} do not exist; pass a smaller spread")
        return found

    def _projection(self, vlm: VisionLanguageModel, layer: int) -> Projection:
        if self.projection == "attention":
            return vlm.attention_projection(layer)
        if self.expert is None and (vlm.has_down_projection(layer) or not vlm.expert_count(layer)):
            return vlm.down_projection(layer)
        return vlm.expert_projection(layer, self.expert if isinstance(self.expert, int) else None)

    def cost(
        self,
        layer: int,
        projection: Projection,
        moments: Moments | None,
        ridge: float | None = None,
        *,
        edited: Tensor | None = None,
    ) -> Cost:
        """Return the cost of a change of one layer's weight.

        To the moments of own samples, which may be of few tokens, it adds a ridge of a thousandth of the median square
        of an entry of a key. The median, since in many models a few entries decide the mean.

        Args:
            layer: The layer, from 0.
            projection: Its projection, as `projections` gives it.
            moments: Second moments of keys, if the settings need them.
            ridge: The ridge, in units of a squared key norm; None for the absolute one of the settings, or 0.
            edited: Second moment of the keys of earlier edits, which the untouched directions are to hold as well.

        Returns:
            The cost, with its moment factorised.

        Raises:
            EditError: Second moments are needed and none are given, a number is out of range, or the directions that
                are left untouched are all or none.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> editor = mt.MultEdit(layer=5, ridge=0.5)
            >>> ((layer, projection),) = editor.projections(vlm).items()
            >>> editor.cost(layer, projection, None).ridge
            0.5
        """
        ridge = (self.ridge or 0.0) if ridge is None else ridge
        if not self.needs_moments:
            return build_cost(projection.width, ridge=ridge)
        self.check_moments(moments or False, [projection])
        matrix = cast(Moments, moments).matrix(layer, self.moment_kind)
        if cast(Moments, moments).is_own:  # a few samples need not span all directions
            diagonal = matrix.diagonal()
            diagonal.add_(OWN_RIDGE * (diagonal.median() or diagonal.mean()))
        protected = None
        if self.has_null_space:
            filled = with_edited_keys(matrix, edited, self.null_moment_weight)
            protected = protected_directions(filled, threshold=self.null_threshold, share=self.null_share)
        return build_cost(
            projection.width,
            ridge=ridge,
            moment=matrix if self.moment_weight else None,
            moment_weight=self.moment_weight,
            protected=protected,
            refined=self.refined,
        )

    def check_moments(self, moments: MomentSource, projections: Iterable[Projection] = ()) -> None:
        """Raise `EditError` if these settings need second moments and get none, or none of these projections.

        moments: as `ClosedFormEditor.start` takes them; own ones can be of any projection but several experts.
        """
        if not self.needs_moments:
            return
        if moments is False:
            raise EditError(
                f"{type(self).__name__} weighs old keys by their second moment, and none is given; leave moments out "
                "to take those of the model's own samples, collect them with second_moments(vlm, prompts) or "
                "`multrace moments`, or set moment_weight=0"
            )
        for projection in projections:
            read = self.read_by(projection)
            if not isinstance(moments, Moments):
                if read == _ALL_EXPERTS:
                    raise EditError(
                        f"{type(self).__name__} weighs old keys by their second moment, and {projection} is several "
                        "experts, whose keys have none together; pass expert= with the number of one, or "
                        "moment_weight=0"
                    )
            elif moments.projection != read:
                raise EditError(
                    f"{type(self).__name__} weighs old keys of {read!r} in {projection}, and the second moments given "
                    f"are of {moments.projection!r}; pass moments of the same weight, and expert= for one of experts"
                )

    def read_by(self, projection: Projection) -> str:
        """Return the name of what a projection reads, as `Moments.projection` has it."""
        if not isinstance(projection, ExpertProjection):
            return self.projection
        numbers = projection.experts.numbers
        return f"expert {numbers[0]}" if len(numbers) == 1 else _ALL_EXPERTS

    def as_text(self) -> dict[str, str]:
        """Return the settings as text, for the header of a saved edit."""
        layer, token = self.place
        settings = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "where"}
        settings |= {"editor": type(self).__name__, "layer": layer, "token": token}
        return {name: str(value) for name, value in settings.items()}


def _is_expert(expert: object) -> bool:
    return expert == "routed" or (isinstance(expert, int) and not isinstance(expert, bool))
