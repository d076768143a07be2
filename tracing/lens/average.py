"""The logit lens averaged over prompts, by the role that a token plays in each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...artefacts.intervals import mean_interval
from ..errors import TraceError
from .plot import Curve, LinePanel, draw_lines
from .result import NORM_NAMES, NORMS, LogitLens, state_name

_LAYOUT = "multrace average logit lens 1"
QUANTITIES = ("probability", "share", "log_rank")
"""Probability, share of prompts in which the token is the likeliest, and log10 of its rank."""
_CAPTIONS = ("mean probability", "share of prompts, likeliest", "rank (geometric mean)")


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageLogitLens:
    """Logit lens of several prompts at their first read position. Made by `average_lenses`."""

    model: str
    revision: str | None
    position_role: str
    """The position that was averaged."""
    roles: tuple[str, ...]
    """What the followed tokens stand for: "answer, lower case", "answer, capitalised", "word red", ..."""
    questions: tuple[str, ...]
    """Each prompt's."""
    probabilities: Tensor
    """(norm, prompt, state, role) float64; NaN where a prompt follows no token in this role."""
    ranks: Tensor
    """(norm, prompt, state, role) float64 from 1; NaN likewise."""

    @property
    def count(self) -> int:
        """How many prompts were averaged."""
        return self.probabilities.shape[1]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer that each state comes out of; -1 for the embedding."""
        return tuple(range(-1, self.probabilities.shape[2] - 1))

    def mean(self, role: str, quantity: str = "probability", *, norm: bool = True) -> Tensor:
        """(state,) float64: mean over the prompts that have the role, of one of `QUANTITIES`.

        TraceError for an unknown role or quantity.
        """
        return self._values(quantity, norm)[..., self._role(role)].nanmean(0)

    def interval(self, role: str, quantity: str = "probability", *, norm: bool = True) -> tuple[Tensor, Tensor]:
        """(low, high), each (state,) float64: 95 % interval of `mean` over prompts, by Student's t.

        NaN where only one prompt has the role; TraceError for an average of one prompt.
        """
        return mean_interval(self._values(quantity, norm)[..., self._role(role)])

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "AverageLogitLens":
        """The average that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per norm, state, role and quantity: mean, low and high of its 95 % interval, and n.

        n: prompts that have the role; low and high are NaN where it is 1. layer is -1 for the embedding.
        """
        values = torch.stack([torch.stack([self._values(each, norm) for each in QUANTITIES], -1) for norm in NORMS])
        moved = values.transpose(0, 1)  # (prompt, norm, state, role, quantity)
        unknown = torch.full_like(moved[0], torch.nan)
        low, high = mean_interval(moved) if self.count > 1 else (unknown, unknown)
        axes = [("norm", NORMS), ("layer", self.layers), ("role", self.roles), ("quantity", QUANTITIES)]
        columns = {"mean": moved.nanmean(0), "low": low, "high": high, "n": (~moved.isnan()).sum(0)}
        frame = long_frame(axes, columns)
        frame.insert(2, "state", [state_name(layer) for layer in frame["layer"]])
        return frame

    def plot(self, path: str | Path) -> Path:
        """The written picture: mean probability, share of prompts led, and geometric mean rank of each role by layer.

        Bands are 95 % intervals over prompts. Upper row with the model's final norm, lower row without. The suffix
        names the format (png, pdf or svg).
        """
        rows = {name: self._panels(norm) for name, norm in zip(NORM_NAMES, NORMS, strict=True)}
        bands = ", bands: 95% intervals of the mean" if self.count > 1 else ""
        titles = f"Logit lens over {self.count} prompts", f"read at {self.position_role}{bands}"
        return draw_lines(path, rows, layers=self.layers, titles=titles)

    def _panels(self, norm: bool) -> tuple[LinePanel, ...]:
        """A panel for each quantity."""
        return tuple(
            LinePanel(
                caption=caption,
                curves=tuple(self._curve(role, quantity, norm) for role in self.roles),
                is_rank=quantity == "log_rank",
            )
            for quantity, caption in zip(QUANTITIES, _CAPTIONS, strict=True)
        )

    def _curve(self, role: str, quantity: str, norm: bool) -> Curve:
        """A role's mean with its band, within what the quantity can be; ranks are drawn as ranks again."""
        is_rank = quantity == "log_rank"
        mean = self.mean(role, quantity, norm=norm)
        ends = self.interval(role, quantity, norm=norm) if self.count > 1 else ()
        low, high = (end.clamp(0.0, None if is_rank else 1.0) for end in ends) if ends else (mean, mean)
        values = (10**each if is_rank else each for each in (mean, low, high))
        return Curve(label=role, roles=(role,), **dict(zip(("values", "low", "high"), values, strict=True)))

    def _values(self, quantity: str, norm: bool) -> Tensor:
        """(prompt, state, role) float64, NaN where a prompt has no such role."""
        if quantity not in QUANTITIES:
            raise TraceError(f"no quantity {quantity!r} in this average; it has {', '.join(QUANTITIES)}")
        index = NORMS.index(norm)
        if quantity == "probability":
            return self.probabilities[index]
        ranks = self.ranks[index]
        return ranks.log10() if quantity == "log_rank" else (ranks == 1).double().where(~ranks.isnan(), torch.nan)

    def _role(self, role: str) -> int:
        if role not in self.roles:
            raise TraceError(f"no role {role!r} in this average; it has {', '.join(self.roles)}")
        return self.roles.index(role)


def average_lenses(lenses: Sequence[LogitLens]) -> AverageLogitLens:
    """The logit lens by role over prompts, at the first read position of each.

    A token that plays two roles in a prompt counts in both; a prompt without a role (no foil) is left out of it.
    TraceError for none, and where models, numbers of layers or the roles of the first positions differ.
    """
    _check_alike(lenses)
    first = lenses[0]
    names = [role for each in lenses for roles in each.followed.roles for role in roles]
    roles = tuple(sorted(dict.fromkeys(names), key=_order))
    return AverageLogitLens(
        model=first.model,
        revision=first.revision,
        position_role=first.position_roles[0],
        roles=roles,
        questions=tuple(each.question for each in lenses),
        probabilities=torch.stack([_by_role(each, each.probabilities, roles) for each in lenses], 1),
        ranks=torch.stack([_by_role(each, each.ranks, roles) for each in lenses], 1),
    )


def _order(role: str) -> int:
    """The answer first, then the false option, then the rest as they came."""
    return next((place for place, side in enumerate(("answer", "false option")) if role.startswith(f"{side}, ")), 2)


def _by_role(lens: LogitLens, values: Tensor, roles: Sequence[str]) -> Tensor:
    """(norm, state, role) float64 of (norm, position, state, followed token) at the first position."""
    own = {role: index for index, members in enumerate(lens.followed.roles) for role in members}
    first = values[:, 0].double()
    missing = torch.full_like(first[..., 0], torch.nan)
    return torch.stack([first[..., own[role]] if role in own else missing for role in roles], -1)


def _check_alike(lenses: Sequence[LogitLens]) -> None:
    if not lenses:
        raise TraceError("no lenses to average; pass at least one")
    for name, of in (
        ("model", lambda each: each.model),
        ("revision", lambda each: each.revision),
        ("number of layers", lambda each: len(each.layers) - 1),
        ("first position", lambda each: each.position_roles[0]),
    ):
        found = dict.fromkeys(of(each) for each in lenses)
        if len(found) > 1:
            raise TraceError(
                f"these lenses differ in their {name} ({' and '.join(map(str, found))}); average equal ones only"
            )


def _problem(average: AverageLogitLens) -> str | None:
    """What does not fit together in an average that was read from a file."""
    states = average.probabilities.shape[2]
    shape = (len(NORMS), len(average.questions), states, len(average.roles))
    fits = [each.shape == shape for each in (average.probabilities, average.ranks)] + [states > 1]
    return None if all(fits) else "its tensors are of other shapes than its prompts and roles"
