"""States that several cells put into one layer call, gathered so that each module is patched once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from ...models import Site, VisionLanguageModel, patch
from ...models.families.addresses import Projection
from ...models.replay.recording import Recording

Target = Site | Projection


@dataclass(kw_only=True, eq=False)
class Writes:
    """What a call of one layer, on rows in sample-major order, gets written into its modules."""

    samples: int
    here: tuple[int, ...]
    """Positions that the call computes, ascending."""
    _entries: dict[tuple[Target, int, int], list[tuple[int, Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, target: Target, columns: slice, lane: int, positions: Sequence[int], run: Recording) -> None:
        """One lane gets what the run holds for the target at these positions, as far as they are computed here."""
        here = set(self.here)
        positions = [place for place in positions if place in here]
        if not positions:
            return
        is_state = isinstance(target, Site) and target.kind == "hidden"
        stored = run.states[target.layer + 1] if is_state else run.outputs[target]
        values = run.at(stored, positions)[..., columns]
        start, stop, _ = columns.indices(stored.shape[-1])
        where = torch.tensor(_numbers(self.here, positions), device=stored.device)
        self._entries.setdefault((target, start, stop), []).append((lane, where, values))

    @contextmanager
    def placed(self, vlm: VisionLanguageModel) -> Iterator[None]:
        """A block in which they are written: sites' outputs, projections' inputs."""
        outputs: dict[Target, list[tuple[int, int]]] = {}
        inputs: dict[Target, list[tuple[int, int]]] = {}
        for target, start, stop in self._entries:
            (outputs if isinstance(target, Site) else inputs).setdefault(target, []).append((start, stop))
        with patch(vlm, {target: self._function(target, each) for target, each in outputs.items()}):
            with patch(vlm, {target: self._function(target, each) for target, each in inputs.items()}, inputs=True):
                yield

    def _function(self, target: Target, columns: Sequence[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
        gathered = []
        for start, stop in columns:
            entries = self._entries[target, start, stop]
            lanes = torch.cat([torch.full_like(where, lane) for lane, where, _ in entries])
            where = torch.cat([where for _, where, _ in entries])
            values = torch.cat([values.expand(self.samples, -1, -1) for _, _, values in entries], dim=1)
            gathered.append((slice(start, stop), lanes, where, values))

        def write(output: Tensor) -> Tensor:
            changed = rearrange(output, "(s c) t w -> s c t w", s=self.samples).clone()
            for part, lanes, where, values in gathered:
                changed[:, lanes, where, part] = values
            return rearrange(changed, "s c t w -> (s c) t w")

        return write


def _numbers(within: Sequence[int], wanted: Sequence[int]) -> list[int]:
    number = {place: index for index, place in enumerate(within)}
    return [number[place] for place in wanted]
