"""Editors: frozen hyper-parameters that turn requests into a delta. The model is never left changed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from tqdm import tqdm

from ..models import ModelError, VisionLanguageModel
from .delta import Delta, WeightChange
from .errors import EditError
from .requests import EditRequest
from .solve import ridge_update
from .values import ValueResult, ValueSettings, optimise_values

logger = logging.getLogger("multrace")
_LIKELY = 0.5  # a target below it, even with its value met in full, is hardly what free generation will say


class EditPlace(Protocol):
    """Anything that names a layer and a token to edit, such as the choice a causal trace makes."""

    @property
    def layer(self) -> int:
        """The layer whose MLP is changed."""

    @property
    def token(self) -> str | int:
        """The name of a token group, or a position."""


@dataclass(frozen=True, kw_only=True)
class MultEdit(ValueSettings):
    """MultEdit (arXiv 2406.04236): one down projection changed in closed form to give a wanted value at a key.

    All requests are met by one regularised least-squares solve (solve.ridge_update). The defaults come from a sweep
    on a small model; `paper` has the published constants. EditError for a setting out of range, or for both or neither
    of layer and where.
    """

    layer: int | None = None
    """The layer whose MLP is changed, negative from the end; take it from a causal trace."""
    token: str | int = "last"
    """The token that is edited: a group name (its last position counts) or a position, the same in all contexts."""
    where: EditPlace | None = None
    """A choice of layer and token made elsewhere, in place of `layer` and `token`."""
    ridge_fraction: float = 0.05
    """The ridge as a share of the mean squared key norm: that of one key differs by a factor of 25 between layers."""
    ridge: float | None = None
    """An absolute ridge in place of ridge_fraction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.layer is None) == (self.where is None):
            raise EditError(
                f"MultEdit got layer={self.layer} and where={self.where}; "
                "pass one of them: layer=5, or where=the site that a trace chose"
            )
        if self.ridge_fraction < 0 or (self.ridge is not None and self.ridge < 0):
            raise EditError(
                f"MultEdit got ridge_fraction={self.ridge_fraction} and ridge={self.ridge}; pass numbers of at least 0"
            )

    @classmethod
    def paper(cls, *, layer: int = 2, token: str | int = "constraint_last", clamp: float | None = 1e-4) -> Self:
        """The published constants: layer 2, last constraint token, ridge 0.01, 10 steps of Adam at 0.1, clamp 1e-4.

        The clamp is odd: it holds the change to a ten-thousandth of the output's norm, where ROME allows 4 and MEMIT
        0.75. The first step of Adam is far longer than that in any real model, so the clamp alone decides, and in
        half precision most of so small a change is rounded away. It can hardly be what gave the published scores;
        clamp=4 or None is the fair baseline. The ridge is odd too: being absolute, its strength depends on the key
        norm of the layer. Unlike the released script this scores all target tokens rather than the first, and squares
        the norm in the weight decay.
        """
        search = {"steps": 10, "learning_rate": 0.1, "weight_decay": 1e-3, "stop_loss": 0.0, "end_of_answer": False}
        return cls(layer=layer, token=token, clamp=clamp, ridge=0.01, **search)

    def edit(self, vlm: VisionLanguageModel, requests: Sequence[EditRequest], *, progress: bool = False) -> Delta:
        """The change after which each request's prompt is answered with its target; Delta.applied puts it in.

        progress shows a bar over requests, or over search steps for a single one. A request whose search ended
        with the target less likely than not is logged as a warning; loss and probability of each stand in
        Delta.requests. EditError for no requests, a layer or token that does not exist, contexts that disagree, or
        keys that cannot be told apart at ridge 0.
        """
        requests = tuple(requests)
        if not requests:
            raise EditError("no requests to edit; pass at least one EditRequest")
        layer, token = (self.layer, self.token) if self.where is None else (self.where.layer, self.where.token)
        try:
            name = vlm.down_projection(layer).name
        except ModelError as error:
            raise EditError(f"cannot edit layer {layer}: {error}") from error
        several = len(requests) > 1
        bar = tqdm(requests, desc=f"values at layer {layer}", disable=not (progress and several), leave=False)
        search = {"layer": layer, "token": token, "settings": self, "progress": progress and not several}
        results = [optimise_values(vlm, request, **search) for request in bar]
        return Delta(
            changes={name: self._solve(results)},
            fingerprints=vlm.fingerprint([name]),
            model=vlm.name,
            revision=vlm.revision,
            settings=self._as_text(layer, token),
            requests=tuple(self._report(request, result) for request, result in zip(requests, results, strict=True)),
        )

    def _solve(self, results: Sequence[ValueResult]) -> WeightChange:
        keys = torch.cat([result.keys for result in results])
        residuals = torch.cat([result.change for result in results])
        relative = self.ridge_fraction * keys.double().square().sum(-1).mean().item()
        left, right = ridge_update(keys, residuals, ridge=relative if self.ridge is None else self.ridge)
        parts = {"left": left, "right": right, "keys": keys, "residuals": residuals}
        return WeightChange(**{part: tensor.float().cpu() for part, tensor in parts.items()})

    def _as_text(self, layer: int, token: str | int) -> dict[str, str]:
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "where"}
        settings |= {"editor": type(self).__name__, "layer": layer, "token": token}
        return {name: str(value) for name, value in settings.items()}

    def _report(self, request: EditRequest, result: ValueResult) -> dict[str, str]:
        if result.loss > self.stop_loss and result.probability < _LIKELY and self.steps:
            logger.warning(
                "even with its wanted value, %r has a probability of %.2f after %d steps; "
                "more steps, another layer or another token may help",
                *(request.target, result.probability, result.steps),
            )
        found = {"loss": f"{result.loss:.6g}", "probability": f"{result.probability:.6g}", "steps": str(result.steps)}
        return {**request.summary(), **found}
