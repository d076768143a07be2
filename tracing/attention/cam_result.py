"""LLaVA-CAM's heat of every image token by layer: saved, loaded, drawn and handed on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

from ...artefacts.drawing.overlay import Overlay
from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ...models import Prompt
from .image_maps import ImageReading, draw_tiles

_LAYOUT = "multrace relevance map 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class RelevanceMap(ImageReading):
    """How much the answer rests on each image token, as each layer's features tell it. Made by `llava_cam`."""

    samples: int
    """Noisy copies that were averaged; 0 for the picture itself."""
    noise: float | None
    """Standard deviation of the noise, in units of the processed pixels; None where there was none."""
    seed: int | None
    """What the noise was drawn with; None where there was none."""
    threshold: float
    """Normalised heat below it counts as none."""
    heat: Tensor
    """(layer, image token) float64, at least 0: mean over copies, in units of the model's own features and logits."""

    @property
    def normalised(self) -> Tensor:
        """(layer, image token) float64, 0 to 1: heat over the layer's maximum, below the threshold 0.

        All zeros in a layer of `silent_layers`.
        """
        highest = self.heat.amax(1, keepdim=True)
        shares = self.heat / highest.masked_fill(highest == 0, 1.0)
        return shares.masked_fill(shares < self.threshold, 0.0)

    @property
    def silent_layers(self) -> tuple[int, ...]:
        """Layers without any heat, so that nothing could be divided by its maximum."""
        return tuple(layer for layer, heat in zip(self.layers, self.heat, strict=True) if not heat.any())

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "RelevanceMap":
        """The map that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem)

    def plot(self, path: str | Path) -> Path:
        """The written picture: one small map of normalised heat per layer, without the picture below it."""
        grid = self.over_picture(self.normalised) if self.patches else self.normalised[:, None, None]
        captions = [self._caption(layer) for layer in self.layers]
        return draw_tiles(path, grid, captions, kind="mlp", titles=self._titles, unit="heat")

    def overlay(self, path: str | Path, prompt: Prompt, layers: Sequence[int] | None = None) -> Path:
        """The written picture: normalised heat over the prompt's picture as the model saw it.

        layers: one panel each; if None, four of those with heat, spread over the depth. TraceError for another prompt,
        for layers that were not read, and where image tokens form no grid.
        """
        grid = self.over_picture(self.normalised)
        rows = self._rows_of(layers, [layer for layer in self.layers if layer not in self.silent_layers])
        overlays = [Overlay(title=self._caption(self.layers[row]), values=grid[row]) for row in rows]
        return self._draw_over(path, prompt, overlays, kind="mlp", titles=self._titles, unit="heat")

    def to_dataframe(self) -> pd.DataFrame:
        """One line per layer and image token with its heat, raw and normalised, and its place in the picture."""
        axes = [("layer", self.layers), ("image_token", range(len(self.image_positions)))]
        return long_frame(axes, self._image_columns() | {"heat": self.heat, "normalised": self.normalised})

    def _caption(self, layer: int) -> str:
        return f"layer {layer}" + (" (no heat)" if layer in self.silent_layers else "")

    @property
    def _titles(self) -> tuple[str, str]:
        """Title and subtitle of pictures."""
        smoothed = f"mean of {self.samples} noisy copies (sigma {self.noise:g})" if self.samples else "not smoothed"
        cut = f", heat below {self.threshold:g} left out" if self.threshold else ""
        return self.question, f"LLaVA-CAM by decoder layer for {self.answer!r}, each over its maximum; {smoothed}{cut}"


def _problem(found: RelevanceMap) -> str | None:
    """What does not fit together in a map that was read from a file."""
    fits = found.heat.shape == (len(found.layers), len(found.image_positions))
    return None if fits else "its heat is of another shape than its layers and image tokens"
