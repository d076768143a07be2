"""How a trace was computed: by which engine, at what cost, and how far it is from the plain way."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """Cost of one trace and what its self-check found."""

    engine: str
    """"replay", which computes only what can have changed, or "plain", one hooked forward pass per cell."""
    reason: str | None = None
    """Why the plain engine ran; None where the fast one did."""
    cells: int = 0
    free_cells: int = 0
    """Cells among them whose score follows from the two runs without any computation."""
    token_layers: int | None = None
    """Positions times decoder layers that were computed, counted; None where nothing was counted."""
    halvings: int = 0
    """How often a batch was halved because memory ran out."""
    checked_cells: int = 0
    """Cells that were computed a second time, the plain way."""
    largest_difference: float | None = None
    """Largest difference between the two over the checked cells, in units of the score; None without a check."""
    plain_noise: float | None = None
    """How far the plain way is from itself between two batch sizes, on the same cells; None without a check."""

    def summary(self) -> str:
        """One line for people."""
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
