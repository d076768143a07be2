"""The record of a computation: its engine, its cost, and its agreement with plain forward passes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """The cost of one result and the outcome of its self-check."""

    engine: str
    """"replay", which computes only what can have changed, or "plain", one hooked forward pass per cell."""
    reason: str | None = None
    """The reason why the plain engine ran; None if the fast one did."""
    cells: int = 0
    """Number of scored cells."""
    free_cells: int = 0
    """Number of cells whose score follows from the base runs without computation."""
    token_layers: int | None = None
    """Number of positions times decoder layers that were computed; None if nothing was counted."""
    halvings: int = 0
    """Number of times that a batch was halved because memory ran out."""
    checked_cells: int = 0
    """Number of cells that were computed a second time by plain forward passes."""
    largest_difference: float | None = None
    """Largest difference between the two over the checked cells, in units of the score; None without a check."""
    plain_noise: float | None = None
    """Difference of plain forward passes between two batch sizes, on the same cells; None without a check."""

    def summary(self) -> str:
        """Return the report as one line of text."""
        parts = [f"{self.engine} engine" + (f" ({self.reason})" if self.reason else "")]
        parts.append(f"{self.cells} cells" + (f", {self.free_cells} of them free" if self.free_cells else ""))
        if self.token_layers is not None:
            parts.append(f"{self.token_layers} token-layers")
        if self.halvings:
            parts.append(f"batch halved {self.halvings} times")
        if self.largest_difference is not None:
            noise = "" if self.plain_noise is None else f" (the plain way's own noise: {self.plain_noise:.1e})"
            parts.append(
                f"{self.checked_cells} cells recomputed the plain way, largest difference "
                f"{self.largest_difference:.1e}{noise}"
            )
        return "; ".join(parts)
