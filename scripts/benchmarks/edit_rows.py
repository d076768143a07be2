"""A row of the editing benchmark: two ways to the same result, what each costs, and how far the results are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CommandError


@dataclass(frozen=True, kw_only=True)
class EditRow:
    """One row of the table; both ways' figures are for the same amount of work."""

    label: str
    seconds: float
    """Ours."""
    seconds_usual: float
    """The usual way's, multiplied where it was timed on a part."""
    unit: str
    """What work is counted in: "token-layers" or "GFLOP"."""
    work: float
    work_usual: float
    difference: float
    """|ours - usual| / |usual| of the results, the worst where there are several."""
    tolerance: float
    """The difference at which the row would have been refused."""
    details: Mapping[str, float | int | str]
    """Figures of this kind of row by name: what was asked, and what else was measured."""

    @property
    def ratio_seconds(self) -> float:
        """The usual way's seconds over ours."""
        return self.seconds_usual / self.seconds

    @property
    def ratio_work(self) -> float:
        """The usual way's work over ours."""
        return self.work_usual / self.work

    def record(self) -> dict[str, Any]:
        """The row with its ratios, as it stands in the JSON."""
        return {**asdict(self), "ratio_seconds": self.ratio_seconds, "ratio_work": self.ratio_work}


def apart(found: Tensor, wanted: Tensor, *, tolerance: float, label: str, scale: Tensor | None = None) -> float:
    """|found - wanted| / |scale| (Frobenius; scale: wanted, if it is not given).

    CommandError if it is above the tolerance or not finite: a ratio of the costs of different results says nothing.
    """
    wanted = wanted.to(found.device, torch.float64)
    size = (wanted if scale is None else scale.double()).norm()
    difference = ((found.double() - wanted).norm() / size).item()
    if not difference <= tolerance:
        raise CommandError(
            f"{label}: ours and the usual way differ by {difference:.1e} of the result, {tolerance:.0e} is allowed; "
            "they did not compute the same, so there is no ratio; try another --seed, or --dtype float32"
        )
    return difference
