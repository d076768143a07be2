"""The plain engine: one forward pass for each cell, with hooks or masks.

It is slow and simple on purpose: it is the reference of the tests, and the fallback for models that cannot be replayed.
For cells of the decoder, the vision tower runs once, and everything after it starts from the merged embeddings. Cells
before the decoder (layers of the vision tower, and the projector) have no other engine.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...models import Prompt, Site, VisionLanguageModel, capture, patch
from ...models.families import Key, Kind
from ...models.frame import DecoderInput
from ...models.replay.crossing import crossing_layers
from ...models.replay.observe import layers_without_attention, masking
from ...models.replay.recording import Cut
from .cells import (
    Cell,
    CellScores,
    EdgeCell,
    Measure,
    Runs,
    StateCell,
    TraceError,
    all_edges,
    skipped_in_words,
    state_cells,
)

_Write = Callable[[Tensor], Tensor]
_Inputs = Mapping[str, Tensor]
_Keys = Mapping[int, Key]


def plain_scores(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[Cell], measure: Measure, *, bar: tqdm | None = None
) -> Tensor:
    """Return the scores (cell, metric, sample), float64 on the CPU, of the base run with each cell's change."""
    scores = []
    for _, values in each_plain(vlm, runs, cells, measure):
        scores.append(values)
        if bar is not None:
            bar.update()
    return torch.stack(scores)


def each_plain(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[Cell], measure: Measure, *, known: Collection[int] = ()
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number and the scores (metric, sample) of each cell in turn, except for those that are known.

    For state cells, every layer's outputs of the kinds that they name, (sample, token, width) each, are held in memory.
    Raises `ReplayError` if edges are to be cut in a model whose attention cannot be masked.
    """
    changing: Any = _masked(vlm, runs) if all_edges(cells) else _put_in(vlm, runs, state_cells(cells))
    base = runs.base.for_rows(runs.samples)
    for number, cell in enumerate(cells):
        if number not in known:
            with changing(cell):
                values = run_scores(vlm, base, runs, measure)
            yield number, values


def run_scores(vlm: VisionLanguageModel, entering: DecoderInput, runs: Runs, measure: Measure) -> Tensor:
    """Return (metric, sample) float64 on the CPU: the scores of an unchanged run with one row for each sample."""
    with torch.no_grad():
        logits = vlm.forward(entering, positions=runs.scored)
        return measure(logits).double().T.cpu()


# ---- edge cells ----


def _masked(vlm: VisionLanguageModel, runs: Runs) -> Callable[[EdgeCell], AbstractContextManager]:
    """Return a function that gives the context in which a cell's edges are masked."""

    def changing(cell: EdgeCell) -> AbstractContextManager:
        mask = hidden_edges(cell.cut, runs.length, vlm.heads)
        return masking(vlm, dict.fromkeys(range(cell.first, cell.last + 1), mask))

    return changing


def lacking_edges(vlm: VisionLanguageModel, entering: DecoderInput, cells: Sequence[Cell]) -> str:
    """Return a warning if edge cells concern layers without attention edges in this run, else nothing.

    Raises `TraceError` if tokens are to be dropped from such layers, which would still carry them on.
    """
    edges = [cell for cell in cells if isinstance(cell, EdgeCell)]
    skipped = vlm.skipped_layers(entering) if edges else ()
    if skipped and any(set(skipped).intersection(range(cell.first, cell.last + 1)) for cell in edges):
        return f"{skipped_in_words(vlm, skipped)}; nothing is cut there"
    without = set(layers_without_attention(vlm)) if edges else set()
    crossing = set(crossing_layers(vlm)) if edges else set()
    with_edges = [str(layer) for layer in range(vlm.layers) if layer not in without | crossing]
    if not with_edges:  # nothing can be cut at all, which the engine says
        return ""
    if any(cell.is_dropped for cell in edges) and without:
        raise TraceError(
            f"tokens cannot be dropped from {vlm.name!r}: decoder layer {min(without)} keeps a running state, in which "
            "they remain; use attention_knockout, which cuts the edges that there are"
        )
    if not any((without | crossing).intersection(range(cell.first, cell.last + 1)) for cell in edges):
        return ""
    others = "keep a running state, through which every token still reaches all later ones"
    return f"of the layers of {vlm.name!r}, only {', '.join(with_edges)} have attention edges to cut; the others " + (
        others if without else "attend to pictures, which stand at no position"
    )


def hidden_edges(cut: Cut, length: int, heads: int) -> Tensor:
    """Return booleans (head or 1, query, key) that are True for the edges that are cut."""
    sources, targets = (
        torch.zeros(length, dtype=torch.bool).index_fill(0, torch.tensor(sorted(each), dtype=torch.long), True)
        for each in (cut.sources, cut.targets)
    )
    edges = targets[:, None] & sources[None, :]
    if not cut.heads:
        return edges[None]
    chosen = torch.zeros(heads, 1, 1, dtype=torch.bool).index_fill(0, torch.tensor(cut.heads), True)
    return chosen & edges


# ---- state cells ----


def _put_in(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[StateCell]
) -> Callable[[StateCell], AbstractContextManager]:
    """Return a function that gives the context in which a cell's source states are patched in and others are frozen."""
    base, source = (each.for_rows(runs.samples) for each in (runs.base, runs.source))
    skipped = vlm.skipped_layers(base)
    keys = {kind: _keys(vlm, kind, skipped) for kind in {cell.kind for cell in cells}}
    sources = _states(vlm, source, keys, runs)
    frozen_keys = {cell.severed: _keys(vlm, cell.severed, skipped) for cell in cells if cell.severed}
    if any(cell.is_direct for cell in cells):
        frozen_keys["hidden"] = _keys(vlm, "hidden", skipped)
    own = _states(vlm, base, frozen_keys, runs)

    def changing(cell: StateCell) -> AbstractContextManager:
        put, frozen = _writes(vlm, cell, runs, (keys[cell.kind], sources), (frozen_keys, own))
        stack = ExitStack()
        stack.enter_context(patch(vlm, _in_turn(put), inputs=cell.kind == "head"))
        stack.enter_context(patch(vlm, _in_turn(frozen)))
        return stack

    return changing


def _keys(vlm: VisionLanguageModel, kind: str, skipped: Collection[int]) -> _Keys:
    """Return, by layer, the module whose output, or for heads whose input, a kind of cell reads and writes.

    Layers that are skipped have none, nor have layers without attention heads where these are read.
    """
    without = {*skipped, *(layers_without_attention(vlm) if kind == "head" else ())}
    layers = [layer for layer in range(vlm.layers) if layer not in without]
    if kind == "head":
        return {layer: vlm.attention_projection(layer) for layer in layers}
    return {layer: Site(cast(Kind, kind), layer) for layer in layers}


def _states(
    vlm: VisionLanguageModel, entering: DecoderInput, keys: Mapping[str, _Keys], runs: Runs
) -> dict[Key, Tensor]:
    """Return these modules' outputs (for heads their inputs) in the run on this input, (sample, token, width).

    The run has as many equal samples as the other run: matrix products of another size round differently, and
    patching in a state that the corruption never touched would no longer have exactly no effect.
    """
    outputs = [key for kind, each in keys.items() if kind != "head" for key in each.values()]
    if not keys:
        return {}
    with (
        torch.no_grad(),
        capture(vlm, outputs, clone=True) as written,
        capture(vlm, keys.get("head", {}).values(), inputs=True, clone=True) as read,
    ):
        vlm.forward(entering, positions=runs.scored)
    return {**written, **read}


def _writes(
    vlm: VisionLanguageModel,
    cell: StateCell,
    runs: Runs,
    source: tuple[_Keys, dict[Key, Tensor]],
    base: tuple[Mapping[str, _Keys], dict[Key, Tensor]],
) -> tuple[dict[Key, list[_Write]], dict[Key, list[_Write]]]:
    """Return the writes that patch in the cell's states and those that freeze other states."""
    put: dict[Key, list[_Write]] = {}
    frozen: dict[Key, list[_Write]] = {}
    columns = slice(None)
    if cell.kind == "head":
        size = vlm.attention_projection(cell.first).width // vlm.heads
        columns = slice(cell.head * size, (cell.head + 1) * size)
    for layer, key in source[0].items():
        if cell.first <= layer <= cell.last:
            put.setdefault(key, []).append(_write(source[1][key], list(cell.positions), columns))
    for layer, key in base[0][cell.severed].items() if cell.severed else ():
        if layer > cell.last:
            frozen.setdefault(key, []).append(_write(base[1][key], list(cell.positions), slice(None)))
    others = sorted(set(runs.frozen) - set(cell.positions)) if cell.is_direct else []
    for key in base[0]["hidden"].values() if others else ():
        frozen.setdefault(key, []).append(_write(base[1][key], others, slice(None)))
    return put, frozen


def _write(values: Tensor, positions: list[int], columns: slice) -> _Write:
    """Return a patch that writes values (sample, token, width) at some positions and leaves the others."""

    def write(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, positions, columns] = values[:, positions, columns]
        return changed

    return write


def _in_turn(writes: Mapping[Key, Sequence[_Write]]) -> dict[Key, _Write]:
    """Return one patch for each module, which applies all of the module's writes."""

    def all_of(functions: Sequence[_Write]) -> _Write:
        def write(output: Tensor) -> Tensor:
            for function in functions:
                output = function(output)
            return output

        return write

    return {key: all_of(functions) for key, functions in writes.items()}


# ---- cells before the decoder ----


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """Model inputs of both runs of one prompt, one for each sample, or one for all of them."""

    prompt: Prompt
    base: tuple[_Inputs, ...]
    source: tuple[_Inputs, ...]


def with_pictures(
    vlm: VisionLanguageModel,
    inputs: Shown,
    runs: Runs,
    cells: Sequence[Cell],
    measure: Measure,
    *,
    measured: CellScores,
    bar: tqdm | None = None,
) -> CellScores:
    """Return the scores of all cells: those before the decoder are computed here, the others are taken as measured.

    Each cell takes a pass of the vision tower for each sample and one of the decoder for all samples; the latter is
    skipped if the embeddings equal those of a run, whose scores are known. The source's outputs of every layer that a
    cell restores are held in memory. Raises `TraceError` if image tokens have no counterparts in the tower.
    """
    parts = {cell: _parts(vlm, cell) for cell in cells if is_before_decoder(cell)}
    modules = list(dict.fromkeys(part for each in parts.values() for part in each))
    sources = [_written(vlm, inputs.prompt, each, modules) for each in inputs.source]
    masks = {
        cell: {part: restored_tokens(inputs.prompt, cell, sources[0][part].shape[:-1]) for part in each}
        for cell, each in parts.items()
    }
    others, scores, passes = iter(measured.scores), [], 0
    for cell in cells:
        if cell not in parts:
            scores.append(next(others))
            continue
        entering = _entering(vlm, inputs, runs, sources, masks[cell])
        known = _known(entering, runs, measured)
        scores.append(run_scores(vlm, entering, runs, measure) if known is None else known)
        passes += known is None
        if bar is not None:
            bar.update()
    tokens = (measured.report.token_layers or 0) + passes * runs.samples * runs.length * vlm.layers
    report = replace(measured.report, cells=len(cells), token_layers=tokens)
    free = torch.zeros(len(cells), dtype=torch.bool)
    free[[number for number, cell in enumerate(cells) if cell not in parts]] = measured.free
    return replace(measured, scores=torch.stack(scores), free=free, report=report)


def is_before_decoder(cell: Cell) -> TypeGuard[StateCell]:
    """Return whether the cell restores states of the vision tower or of the projector."""
    return isinstance(cell, StateCell) and cell.kind in ("vision", "projector")


def restored_tokens(prompt: Prompt, cell: StateCell, shape: Sequence[int]) -> Tensor:
    """Return the cell's image tokens in a part's output: booleans of this shape, usually (picture, token).

    Tokens of the tower that are no patches, such as the class token, come first; they are restored if all of their
    picture is. Raises `TraceError` if the part's tokens are not the image tokens one by one, unless whole
    pictures are restored, and if they are not sorted by picture, unless all pictures are restored.
    """
    image, pictures = prompt.groups["image"], len(prompt.images)
    if set(image) <= set(cell.positions):
        return torch.ones(*shape, dtype=torch.bool)
    each, left_over = divmod(len(image), pictures)
    if left_over or len(shape) != 2 or shape[0] != pictures:
        raise TraceError(
            f"{cell.kind!r} states of shape {tuple(shape)} cannot be told apart by {pictures} pictures of this prompt, "
            "so only all pictures together can be restored there; pass positions='image'"
        )
    chosen = torch.tensor([position in cell.positions for position in image]).view(pictures, each)
    mask = chosen.all(dim=1, keepdim=True).expand(*shape).clone()
    extra = shape[1] - each
    # A tower that merges patches has at least twice as many tokens as there are image tokens.
    is_patchwise = extra == 0 if cell.kind == "projector" else bool(prompt.patches) and 0 <= extra < each
    if is_patchwise:
        mask[:, extra:] |= chosen
    elif bool(chosen.any(dim=1).ne(chosen.all(dim=1)).any()):
        raise TraceError(
            f"the {shape[1]} {cell.kind!r} states of a picture are not its {each} image tokens one by one, so only "
            "whole pictures can be restored there; pass positions='image'"
        )
    return mask


def _parts(vlm: VisionLanguageModel, cell: StateCell) -> list[nn.Module]:
    """Return the modules whose outputs the cell restores."""
    return [vlm.projector] if cell.kind == "projector" else vlm.vision_layers[cell.first : cell.last + 1]


def _written(
    vlm: VisionLanguageModel, prompt: Prompt, inputs: _Inputs, modules: Sequence[nn.Module]
) -> dict[nn.Module, Tensor]:
    """Return these modules' outputs for these inputs. Raises `TraceError` if a module does not run exactly once."""
    recorded: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def recorder(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def record(output: Tensor) -> Tensor:
            recorded[module].append(output.clone())
            return output

        return record

    with patch(vlm, {module: recorder(module) for module in modules}, ahead=True):
        vlm.embed(prompt, inputs)
    for module, outputs in recorded.items():
        if len(outputs) != 1:
            raise TraceError(
                f"{vlm.path(module)!r} of {vlm.name!r} ran {len(outputs)} times for one prompt, not once, so its "
                "states cannot be restored; leave out 'vision' and 'projector'"
            )
    return {module: outputs[0] for module, outputs in recorded.items()}


def _entering(
    vlm: VisionLanguageModel,
    inputs: Shown,
    runs: Runs,
    sources: Sequence[Mapping[nn.Module, Tensor]],
    masks: Mapping[nn.Module, Tensor],
) -> DecoderInput:
    """Return the decoder's input in one row for each sample, with source states patched in; the answer's words stay."""
    rows = []
    for sample in range(runs.samples):
        base = inputs.base[sample % len(inputs.base)]  # a single input serves all samples
        states = sources[sample % len(sources)]
        with patch(vlm, {part: _writer(states[part], mask) for part, mask in masks.items()}, ahead=True):
            rows.append(vlm.embed(inputs.prompt, base))
    changed = DecoderInput.of_runs(rows)
    words = runs.base.embeddings[:, changed.length :].expand(runs.samples, -1, -1)
    embeddings = torch.cat([changed.embeddings, words], dim=1)
    return DecoderInput(embeddings=embeddings, frame=changed.frame.extended(words.shape[1]))


def _writer(values: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a patch that writes the values where the mask is true."""

    def write(output: Tensor) -> Tensor:
        if output.shape != values.shape:
            raise TraceError(
                f"the vision tower writes {tuple(values.shape)} for one picture and {tuple(output.shape)} for the "
                "other, so states cannot be exchanged; give both pictures the same size (SwapImage(..., resize=True))"
            )
        return torch.where(mask.to(output.device).unsqueeze(-1), values.to(output), output)

    return write


def _known(entering: DecoderInput, runs: Runs, measured: CellScores) -> Tensor | None:
    """Return the (metric, sample) scores of the run with exactly this input, or None if neither run has it."""
    for run, scores in ((runs.base, measured.base), (runs.source, measured.source)):
        if entering.equals(run.for_rows(entering.rows)):
            return scores
    return None
