"""The logit lens averaged over prompts, by the role that a token plays in each prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean
from ...artefacts.drawing.styles import name_of_model
from ...artefacts.results import Result, long_frame
from ..errors import TraceError
from .plot import LensCurve, LinePanel, lines_figure
from .result import NORM_NAMES, NORMS, LogitLens, state_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

QUANTITIES = ("probability", "share", "log_rank")
"""The probability, the share of prompts in which the token is the likeliest, and log10 of its rank."""
_CAPTIONS = ("mean probability", "share of prompts, likeliest", "rank (geometric mean)")
_AXES = ("norm", "state", "role")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageLogitLens(Result):
    """The logit lens averaged over prompts, at the first read position of each. `average` returns it."""

    layout: ClassVar[str] = "multrace average logit lens 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    position_role: str
    """The role of the position that was averaged."""
    roles: tuple[str, ...]
    """The roles of the followed tokens: "answer, lower case", "answer, capitalised", "word red", ..."""
    count: int
    """Number of prompts."""
    probability: Mean
    """(norm, state, role): the probability, averaged over the prompts that follow a token in this role."""
    share: Mean
    """(norm, state, role): 1 where the token is the likeliest, else 0."""
    log_rank: Mean
    """(norm, state, role): log10 of the rank."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer whose output each state is; -1 for the embedding."""
        return tuple(range(-1, self.probability.shape[1] - 1))

    def mean(self, role: str, quantity: str = "probability", *, norm: bool = True) -> Tensor:
        """Return the mean (state,) float64 of one of `QUANTITIES` over the prompts that have the role.

        Raises `TraceError` for an unknown role or quantity.
        """
        place = self._place(role, quantity, norm)
        return getattr(self, quantity).mean[place]

    def interval(self, role: str, quantity: str = "probability", *, norm: bool = True) -> tuple[Tensor, Tensor]:
        """Return (low, high), each (state,): the 95 % interval of `mean` over prompts by Student's t.

        NaN if only one prompt has the role. Raises `ArtefactError` for an average of one prompt.
        """
        place = self._place(role, quantity, norm)
        mean = getattr(self, quantity)
        low, high = mean.band() if self.count > 1 else mean.interval()
        return low[place], high[place]

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per norm, state, role and quantity: mean, low and high of its interval, and n.

        The column n holds the number of prompts that have the role; low and high are NaN where n is 1. The layer of the
        embedding is -1.
        """
        means = [getattr(self, quantity) for quantity in QUANTITIES]
        low, high = (torch.stack(ends, -1) for ends in zip(*(mean.band() for mean in means), strict=True))
        columns = {"mean": torch.stack([mean.mean for mean in means], -1), "low": low, "high": high}
        axes = {"norm": NORMS, "layer": self.layers, "role": self.roles, "quantity": QUANTITIES}
        frame = long_frame(axes, columns | {"n": torch.stack([mean.count for mean in means], -1)})
        frame.insert(2, "state", [state_name(layer) for layer in frame["layer"]])
        return frame

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with the mean probability, top-1 share and geometric mean rank of each role.

        The top-1 share is the share of prompts in which the token is the likeliest. Bands are 95 % intervals over
        prompts. The upper row uses the model's final norm, and the lower row does not. The figure is also written to
        the path if one is given (png, pdf or svg by suffix).
        """
        rows = {name: self._panels(norm) for name, norm in zip(NORM_NAMES, NORMS, strict=True)}
        bands = ", bands: 95% intervals of the mean" if self.count > 1 else ""
        titles = f"Logit lens over {self.count} prompts", f"read at {self.position_role}{bands}"
        return drawing.finished(lines_figure(rows, layers=self.layers, titles=titles), path)

    def _panels(self, norm: bool) -> tuple[LinePanel, ...]:
        """Return a panel for each quantity."""
        return tuple(
            LinePanel(
                caption=caption,
                curves=tuple(self._curve(role, quantity, norm) for role in self.roles),
                is_rank=quantity == "log_rank",
            )
            for quantity, caption in zip(QUANTITIES, _CAPTIONS, strict=True)
        )

    def _curve(self, role: str, quantity: str, norm: bool) -> LensCurve:
        """Return the mean of a role with its band; log ranks are converted back to ranks."""
        is_rank, place = quantity == "log_rank", self._place(role, quantity, norm)
        mean = getattr(self, quantity)
        low, high = (end[place].clamp(0.0, None if is_rank else 1.0) for end in mean.band())
        values, low, high = (10**part if is_rank else part for part in (mean.mean[place], low, high))
        return LensCurve(label=role, roles=(role,), values=values, low=low, high=high)

    def _place(self, role: str, quantity: str, norm: bool) -> tuple[int, slice, int]:
        """Return the index in a mean that selects the values (state,) of a role."""
        if quantity not in QUANTITIES:
            raise TraceError(f"no quantity {quantity!r} in this average; it has {', '.join(QUANTITIES)}")
        if role not in self.roles:
            raise TraceError(f"no role {role!r} in this average; it has {', '.join(self.roles)}")
        return NORMS.index(norm), slice(None), self.roles.index(role)

    def _lines(self) -> tuple[str, str]:
        role = self.roles[0]
        return (
            f"AverageLogitLens of {name_of_model(self.model)} over {self.count} prompts, read at {self.position_role}",
            f"{role}: the likeliest in {float(self.mean(role, 'share')[-1]):.0%} of prompts in the end, mean "
            f"probability {float(self.mean(role)[-1]):.3g}",
        )

    def _problem(self) -> str | None:
        states = self.probability.shape[1]
        fits = [getattr(self, name).fits(len(NORMS), states, len(self.roles)) for name in QUANTITIES]
        return None if all(fits) and states > 1 else "its tensors are of other shapes than its layers and roles"


class LogitLensAverager(Averager[LogitLens, AverageLogitLens]):
    """Average the logit lens by role over prompts, at the first read position of each prompt.

    A token that plays two roles in a prompt counts in both. A prompt that lacks a role (for example the foil) does not
    count towards the average of that role.
    """

    alike = ("model", "revision", "layers", "position_role")

    def _take(self, result: LogitLens) -> None:
        own = {role: index for index, members in enumerate(result.followed.roles) for role in members}
        axes = dict(zip(_AXES, (NORMS, result.layers, tuple(own)), strict=True))
        probabilities, ranks = (part[:, 0][..., list(own.values())] for part in (result.probabilities, result.ranks))
        self._add("probability", probabilities, axes)
        self._add("share", ranks == 1, axes)
        self._add("log_rank", ranks.double().log10(), axes)

    def _average(self) -> AverageLogitLens:
        names = self._labels("probability", "role")
        order = sorted(range(len(names)), key=lambda index: _order(names[index]))
        return AverageLogitLens(
            model=self.first.model,
            revision=self.first.revision,
            position_role=self.first.position_role,
            roles=tuple(names[index] for index in order),
            count=self.count,
            **{name: self._mean(name)[:, :, order] for name in QUANTITIES},
        )


def _order(role: str) -> int:
    """Return a sort key that puts the answer first, then the false option, then all others in their given order."""
    return next((place for place, side in enumerate(("answer", "false option")) if role.startswith(f"{side}, ")), 2)
