"""The recommended site of an edit, and the places that were considered for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...artefacts import drawing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class SiteCandidate:
    """A place where an edit could be made, and what is known about it before the edit."""

    token: str | int
    layer: int
    effect: float
    """Indirect effect of the MLPs there, in units of the main metric."""
    reach: float
    """Predicted share of the change at the request's other wordings and pictures; nan where there are none."""
    leak: float
    """Predicted share of the change at the same question about others; nan where there are none."""
    leak_own: float
    """Predicted share of the change at other questions about the same subject; nan where there are none."""
    excluded: str = ""
    """Why the place is out of the question; empty if it is not."""


@dataclass(frozen=True, kw_only=True)
class EditSite:
    """The recommended site of an edit: the layer's MLP at the token, with the reason in words."""

    layer: int
    token: str | int
    """The token's group name if it has one (it then names the same token in every prompt), else its position."""
    effect: float
    """Indirect effect of the MLPs there, in units of the main metric."""
    onset: int
    """First layer at which restoring this token's hidden state recovers the requested share of the total effect."""
    reason: str
    reach: float | None = None
    """Predicted share of an edit that arrives at the request's other wordings and pictures; None where unknown."""
    leak: float | None = None
    """Predicted share of an edit that arrives at the same question about others; None where unknown."""
    leak_own: float | None = None
    """Predicted share of an edit that arrives at other questions about the same subject; None where unknown."""
    candidates: tuple[SiteCandidate, ...] = field(default=(), repr=False)
    """Every place that was considered; empty if the effects alone decided."""

    def table(self) -> pd.DataFrame:
        """Return the candidates, one row each: those that are excluded last, the most effective first."""
        import pandas as pd

        ordered = sorted(self.candidates, key=lambda each: (bool(each.excluded), -each.effect))
        return pd.DataFrame(map(asdict, ordered), columns=[each.name for each in fields(SiteCandidate)])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Return a figure of effect, reach and leak of the candidates by layer, with a panel for each token.

        Effects are drawn as shares of the largest one.

        path: Where to write the figure as well (png, pdf or svg by suffix); None for nowhere.

        Raises:
            ArtefactError: There are no candidates, or the file cannot be written.
        """
        tokens = list(dict.fromkeys(each.token for each in self.candidates))
        largest = max((each.effect for each in self.candidates if not each.excluded), default=1.0) or 1.0
        panels = [
            drawing.CurvePanel(
                title=f"edits at {token!r}",
                curves=_curves([each for each in self.candidates if each.token == token], largest),
            )
            for token in tokens
        ]
        titles = ("What an edit would do at each place", f"chosen: layer {self.layer}, {self.token!r}; {self.reason}")
        return drawing.finished(drawing.curves_figure(panels, titles=titles, y_label="share"), path)

    def as_json(self) -> dict[str, Any]:
        """Return the site without its candidates, for files."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "candidates"}


def _curves(candidates: Sequence[SiteCandidate], largest: float) -> list[drawing.Curve]:
    ordered = sorted(candidates, key=lambda each: each.layer)
    layers = torch.tensor([float(each.layer) for each in ordered])
    lines = {
        "indirect effect, of the largest": [
            each.effect / largest if not each.excluded else torch.nan for each in ordered
        ],
        "reach: other wordings and pictures": [each.reach for each in ordered],
        "leak: the same question about others": [each.leak for each in ordered],
        "leak: other questions about the subject": [each.leak_own for each in ordered],
    }
    return [drawing.Curve(label=label, x=layers, y=torch.tensor(values)) for label, values in lines.items()]
