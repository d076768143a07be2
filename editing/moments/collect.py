"""Second moments of what projections read, over pictures and texts: all wanted layers in one pass, split by token type.

Editors use them as the price of disturbing what a layer knows already (C in ROME, arXiv 2202.05262, and MEMIT,
arXiv 2210.07229, there over text only).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Projection, Prompt, VisionLanguageModel, batches, collate, patch
from ...models.hooks import StopForward
from ..requests import EditError
from .moments import (
    KINDS,
    PROBES,
    ConvergencePoint,
    MomentCache,
    Moments,
    Watch,
    hash_of_corpus,
    hash_of_settings,
    hash_of_weights,
    token_types,
    wide,
    written_by,
)

__all__ = ["Moments", "ConvergencePoint", "memory_of_moments", "second_moments"]

Written = Literal["mlp", "attention"]
_LARGEST_BLOCK = 256
_MIB = 2**20


@torch.no_grad()
def second_moments(
    vlm: VisionLanguageModel,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    projection: Written = "mlp",
    expert: int | None = None,
    batch_size: int = 8,
    memory: float | None = None,
    tolerance: float | None = None,
    every: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Moments:
    """Return the second moments of what the projections of these layers read at every token of the prompts.

    Products are taken in float32 (float64 for a float64 model) and summed in float64. The model runs no further than
    the last of the layers, whose output it does not compute. Prompts are read in order, more than once: first to hash
    them, then once for each group of layers; a sequence that makes them on demand keeps memory small.

    Args:
        vlm: The unedited model.
        prompts: What the model reads; draw them in random order, since convergence is read from their halves.
        layers: Layers, negative from the end; None for all.
        projection: "mlp" for the inputs of down projections, "attention" for those of attention's output projections.
        expert: A routed expert whose inputs are read instead, each times its routing weight; those of tokens that are
            routed elsewhere are zero and count as such.
        batch_size: Number of prompts that run together.
        memory: Budget in MiB for the sums and what they need beside model and activations. Layers then go in groups,
            one pass each, with the same result bit for bit; None reads all layers in one pass.
        tolerance: Stop once all numbers of a reading of convergence are below this share; None or 0 reads everything.
        every: Number of prompts between two readings of convergence; None is a sixteenth of them, at most 256. Blocks
            of so many prompts go to two halves in turn, and a reading compares these.
        cache: A folder in which the sums are kept after every reading (all of them are written each time: choose a
            large `every` for many wide layers) and the result at the end. The same weights, prompts and settings find
            it again, and an interrupted run goes on from there, bit-equal to an uninterrupted one. The result reads its
            sums from these files as they are needed. A damaged file is passed over with a warning.
        progress: Show progress bars.

    Returns:
        The moments, apart for image, question and template tokens.

    Raises:
        EditError: A setting is out of range, the memory too small, or a number not finite.
        ModelError: A layer does not exist.

    Source: C in ROME (arXiv 2202.05262) and MEMIT (arXiv 2210.07229), there over text only.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> moments = mt.second_moments(vlm, [vlm.prompt(None, "Who won?")], layers=[5], progress=False)
        >>> tuple(moments.matrix(5).shape) == (moments.width(5), moments.width(5))
        True
    """
    wanted = _layers(vlm, layers)
    every = _check(prompts, projection, batch_size, tolerance, every)
    read = written_by(projection, expert)
    counted, corpus = hash_of_corpus(prompts, progress=progress)
    groups = _groups(vlm, wanted, read, types=len(counted), memory=memory)
    settings = {"batch_size": batch_size, "every": every, "tolerance": tolerance, "layers": wanted}
    hashes = {"weights": hash_of_weights(vlm, wanted[-1], progress=progress), "corpus": corpus}
    place = {"projection": read, "device": vlm.device.type, "groups": groups}
    run = _Collection(
        vlm=vlm,
        prompts=prompts,
        projections={layer: projection_of(vlm, layer, read) for layer in wanted},
        batch_size=batch_size,
        every=every,
        tolerance=tolerance,
        cache=None if cache is None else MomentCache(cache, hash_of_settings(**hashes, **settings, **place)),
        progress=progress,
    )
    watch, sums, limit = Watch(wanted), {}, len(prompts)
    for number, group in enumerate(groups):
        tally = run.read(number, group, limit, None if number else watch)
        limit = tally.done  # where the first pass stopped, the others stop
        sums |= tally.sums
    return Moments(
        sums=sums,
        counts=dict(zip(KINDS, tally.counts.tolist(), strict=True)),
        prompts=limit,
        settings={name: str(value) for name, value in settings.items()},
        convergence=tuple(watch.readings),
        model=vlm.name,
        revision=vlm.revision,
        projection=read,
        **hashes,
    )


def memory_of_moments(
    vlm: VisionLanguageModel,
    layers: Sequence[int] | None = None,
    *,
    projection: Written = "mlp",
    expert: int | None = None,
    types: int = 3,
) -> float:
    """Return how many MiB one pass over these layers needs beside the model and its activations.

    These are a float64 sum for each layer and type of token, one product, and the small matrices from which convergence
    is read.

    Args:
        vlm: The model.
        layers: Layers, negative from the end; None for all.
        projection: "mlp" or "attention", as in `second_moments`.
        expert: A routed expert, as in `second_moments`.
        types: Number of types of token that occur (image, question, template), at most 3.

    Raises:
        ModelError: A layer does not exist.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.editing.moments import memory_of_moments
        >>> vlm = mt.load(tiny_vlm_path())
        >>> memory_of_moments(vlm, [5]) < memory_of_moments(vlm) < 100
        True
    """
    read = written_by(projection, expert)
    widths = [projection_of(vlm, layer, read).width for layer in _layers(vlm, layers)]
    return (_fixed(widths) + sum(8 * types * width**2 for width in widths)) / _MIB


@dataclass(frozen=True, kw_only=True, eq=False)
class _Collection:
    """What all passes over the prompts share."""

    vlm: VisionLanguageModel
    prompts: Sequence[Prompt]
    projections: dict[int, Projection]
    batch_size: int
    every: int
    tolerance: float | None
    cache: MomentCache | None
    progress: bool

    def read(self, number: int, group: Sequence[int], limit: int, watch: "Watch | None") -> "_Tally":
        """One pass over the first `limit` prompts; what the cache has of it is not computed again."""
        tally = self._resumed(number, group, limit, watch) or _Tally(group)
        layers = group if watch is None else watch.layers
        bar = tqdm(
            total=limit, initial=tally.done, desc=f"second moments of {len(group)} layers", unit="prompt",
            disable=not self.progress,
        )  # fmt: skip
        with bar:
            while tally.done < limit and not (watch and watch.is_calm(self.tolerance)):
                for start, stop in self._batches(tally.done, limit):
                    self._add([self.prompts[index] for index in range(start, stop)], layers, tally, watch)
                    tally.done = stop
                    bar.update(stop - start)
                if watch and tally.done % (2 * self.every) == 0:
                    watch.read(tally.done)
                    bar.set_postfix(halves=f"{max(watch.readings[-1].halves):.2g}")
                if self.cache is not None:
                    self.cache.write(number, tally.done, tally.sums, tally.tensors(watch))
        self._settle(number, tally)
        return tally

    def _batches(self, start: int, limit: int) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) of each batch up to the end of a block; a batch is never in two."""
        end = min(start + self.every, limit)
        for first in range(start, end, self.batch_size):
            yield first, min(first + self.batch_size, end)

    def _add(self, chunk: Sequence[Prompt], layers: Sequence[int], tally: "_Tally", watch: "Watch | None") -> None:
        """Run prompts as far as the last of the layers, and add what each layer reads as soon as it is read."""
        for batch in batches(chunk, len(chunk)):
            self._add_batch([chunk[index] for index in batch], layers, tally, watch)

    def _add_batch(
        self, chunk: Sequence[Prompt], layers: Sequence[int], tally: "_Tally", watch: "Watch | None"
    ) -> None:
        """Run prompts that fit into one batch."""
        inputs, offsets = collate(chunk, self.vlm.tokenizer)
        types = torch.zeros(len(chunk), max(prompt.length for prompt in chunk), dtype=torch.uint8)
        for row, prompt, offset in zip(types, chunk, offsets, strict=True):
            row[offset:] = token_types(prompt)
        tally.counts += types.long().flatten().bincount(minlength=len(KINDS) + 1)[1:]
        half = (tally.done // self.every) % 2
        last = max(layers)

        def visit(layer: int, states: Tensor) -> Tensor:
            tally.add(layer, states, types)
            if watch is not None:
                watch.add(layer, states, types, half)
            if layer == last:
                raise StopForward
            return states

        # not `capture`, which would hold the inputs of all layers at once
        visits: dict[Projection, Callable[[Tensor], Tensor]] = {
            self.projections[layer]: partial(visit, layer) for layer in layers
        }
        with suppress(StopForward), patch(self.vlm, visits, inputs=True):
            self.vlm.logits(inputs)

    def _resumed(self, number: int, group: Sequence[int], limit: int, watch: "Watch | None") -> "_Tally | None":
        found = None if self.cache is None else self.cache.read(number, self._shapes(group))
        if found is None or found[0] > limit:
            return None
        done, sums, tensors = found
        tally = _Tally(group, done=done, counts=tensors["counts"])
        for layer, parts in sums.items():
            device = self.projections[layer].device if done < limit else "cpu"
            tally.sums[layer] = {kind: part.to(device) for kind, part in parts.items()}
        if watch is not None:
            watch.restore(tensors)
        return tally

    def _settle(self, number: int, tally: "_Tally") -> None:
        """Move the sums of a finished pass to where they take least room: the cache on disk, or else the CPU."""
        found = None if self.cache is None else self.cache.read(number, self._shapes(tally.sums))
        if found is not None and found[0] == tally.done:
            tally.sums = found[1]
        else:
            tally.sums = {
                layer: {kind: part.cpu() for kind, part in parts.items()} for layer, parts in tally.sums.items()
            }

    def _shapes(self, group: Iterable[int]) -> dict[int, dict[str, tuple[int, int]]]:
        widths = {layer: self.projections[layer].width for layer in group}
        return {layer: dict.fromkeys(KINDS, (width, width)) for layer, width in widths.items()}


@dataclass(eq=False)
class _Tally:
    """The growing sums of one pass."""

    group: Sequence[int]
    done: int = 0
    """Number of prompts in the sums."""
    counts: Tensor = field(default_factory=lambda: torch.zeros(len(KINDS), dtype=torch.long))
    """(type,) int64, number of tokens in the sums."""
    sums: dict[int, dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = {layer: {} for layer in self.group}

    def add(self, layer: int, states: Tensor, types: Tensor) -> None:
        """Add the products of states (batch, token, width), if the layer belongs to this pass."""
        if layer not in self.sums:
            return
        parts, where = self.sums[layer], types.to(states.device)
        for number, kind in enumerate(KINDS, start=1):
            rows = wide(states[where == number])
            if len(rows):
                if kind not in parts:
                    parts[kind] = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
                parts[kind] += rows.T @ rows

    def tensors(self, watch: "Watch | None") -> dict[str, Tensor]:
        """Return everything but the sums that a pass needs to continue."""
        return {"counts": self.counts} | ({} if watch is None else watch.tensors())


def _layers(vlm: VisionLanguageModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of the layers from 0, ascending, each once."""
    wanted = sorted({vlm.layer_index(layer) for layer in (range(vlm.layers) if layers is None else layers)})
    if not wanted:
        raise EditError("second moments of no layer; pass layers=[3, 4, 5], or None for all")
    return tuple(wanted)


def projection_of(vlm: VisionLanguageModel, layer: int, read: str) -> Projection:
    """Return the projection of a layer whose inputs are read, named as `Moments.projection` names it."""
    kind, _, expert = read.partition(" ")
    if expert:
        return vlm.expert_projection(layer, int(expert))
    return vlm.down_projection(layer) if kind == "mlp" else vlm.attention_projection(layer)


def _groups(
    vlm: VisionLanguageModel, layers: Sequence[int], read: str, *, types: int, memory: float | None
) -> tuple[tuple[int, ...], ...]:
    """Groups of as many layers as the memory holds. Raises `EditError` if it does not hold one."""
    if memory is None:
        return (tuple(layers),)
    widths = {layer: projection_of(vlm, layer, read).width for layer in layers}
    sizes = {layer: 8 * types * width**2 for layer, width in widths.items()}
    fixed = _fixed(list(widths.values()))
    room = memory * _MIB - fixed
    if max(sizes.values()) > room:
        least, whole = (
            ceil((fixed + size) / _MIB * 1000) / 1000 for size in (max(sizes.values()), sum(sizes.values()))
        )
        raise EditError(
            f"memory={memory} MiB is too little for second moments of layers {', '.join(map(str, layers))} of "
            f"'{vlm.name}': one layer at a time takes {least} MiB, all in one pass {whole}; pass at least {least}"
        )
    groups: list[list[int]] = [[]]
    for layer in layers:
        if sum(sizes[each] for each in groups[-1]) + sizes[layer] > room:
            groups.append([])
        groups[-1].append(layer)
    return tuple(map(tuple, groups))


def _fixed(widths: Sequence[int]) -> int:
    """Bytes that every pass needs: one product, and the small sums of all layers, three per layer."""
    return 4 * max(widths) ** 2 + sum(3 * 8 * width * min(width, PROBES) for width in widths)


def _check(
    prompts: Sequence[Prompt], projection: str, batch_size: int, tolerance: float | None, every: int | None
) -> int:
    """The number of prompts between readings. Raises `EditError` for a setting out of range."""
    holds = {
        "projection 'mlp' or 'attention'": projection in ("mlp", "attention"),
        "batch_size of at least 1": batch_size >= 1,
        "tolerance of at least 0, or None": tolerance is None or tolerance >= 0,
        "every of at least 1, or None": every is None or every >= 1,
        "prompts, at least one": len(prompts) > 0,
    }
    for wanted, is_so in holds.items():
        if not is_so:
            name = wanted.split()[0].rstrip(",")
            given = {"projection": projection, "batch_size": batch_size, "tolerance": tolerance, "every": every}
            raise EditError(f"second_moments got {name}={given.get(name, 'nothing')!r}; pass {wanted}")
    blocks = ceil(ceil(len(prompts) / 16) / batch_size)
    return every or max(batch_size, min(_LARGEST_BLOCK, blocks * batch_size))
