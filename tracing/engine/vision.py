"""Cells before the decoder: layers of the vision tower, and the projector. Each takes a separate forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...models import Prompt, VisionLanguageModel, patch
from ..corruptions.corruption import Corrupted
from ..errors import TraceError
from .cells import Cell, CellScores, Measure, Runs, StateCell
from .plain import run_scores

_Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """Model inputs of both runs of one prompt, one for each sample, or one for all of them."""

    prompt: Prompt
    base: tuple[_Inputs, ...]
    source: tuple[_Inputs, ...]


def shown(prompt: Prompt, corrupted: Corrupted, *, restores: bool) -> Shown:
    """Return the model inputs of both runs. If the trace restores, the base run is the corrupted one.

    Raises `TraceError` if the corruption leaves the pixels unchanged.
    """
    if not corrupted.inputs:
        raise TraceError(
            f"the corruption ({corrupted.description}) leaves the pixels as they are, so 'vision' and 'projector' hold "
            "the same states in both runs; pass SwapImage, BlankImage, BlurImage, MaskBoxes or PixelNoise, or leave "
            "these sites out"
        )
    clean, damaged = (prompt.inputs,), corrupted.inputs
    return Shown(prompt=prompt, base=damaged if restores else clean, source=clean if restores else damaged)


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
    lent = [_written(vlm, inputs.prompt, each, modules) for each in inputs.source]
    masks = {
        cell: {part: restored_tokens(inputs.prompt, cell, lent[0][part].shape[:-1]) for part in each}
        for cell, each in parts.items()
    }
    others, scores, passes = iter(measured.scores), [], 0
    for cell in cells:
        if cell not in parts:
            scores.append(next(others))
            continue
        embeddings = _embeddings(vlm, inputs, runs, lent, masks[cell])
        known = _known(embeddings, runs, measured)
        scores.append(run_scores(vlm, embeddings, runs, measure) if known is None else known)
        passes += known is None
        if bar is not None:
            bar.update()
    tokens = (measured.report.token_layers or 0) + passes * runs.samples * runs.length * vlm.layers
    report = replace(measured.report, cells=len(cells), token_layers=tokens)
    free = torch.zeros(len(cells), dtype=torch.bool)
    free[[number for number, cell in enumerate(cells) if cell not in parts]] = measured.free
    return replace(measured, scores=torch.stack(scores), free=free, report=report)


def is_before_decoder(cell: Cell) -> bool:
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
    found: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def recorder(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def record(output: Tensor) -> Tensor:
            found[module].append(output.clone())
            return output

        return record

    with patch(vlm, {module: recorder(module) for module in modules}, ahead=True):
        vlm.embed(prompt, inputs)
    for module, outputs in found.items():
        if len(outputs) != 1:
            raise TraceError(
                f"{vlm.path(module)!r} of {vlm.name!r} ran {len(outputs)} times for one prompt, not once, so its "
                "states cannot be restored; leave out 'vision' and 'projector'"
            )
    return {module: outputs[0] for module, outputs in found.items()}


def _embeddings(
    vlm: VisionLanguageModel,
    inputs: Shown,
    runs: Runs,
    lent: Sequence[Mapping[nn.Module, Tensor]],
    masks: Mapping[nn.Module, Tensor],
) -> Tensor:
    """Return (sample, token, hidden): the decoder's input with source states patched in; the answer's words stay."""
    rows = []
    for sample in range(runs.samples):
        base = inputs.base[sample % len(inputs.base)]  # a single input serves all samples
        states = lent[sample % len(lent)]
        with patch(vlm, {part: _writer(states[part], mask) for part, mask in masks.items()}, ahead=True):
            rows.append(vlm.embed(inputs.prompt, base))
    changed = torch.cat(rows)
    words = runs.base[:, changed.shape[1] :].expand(runs.samples, -1, -1)
    return torch.cat([changed, words], dim=1)


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


def _known(embeddings: Tensor, runs: Runs, measured: CellScores) -> Tensor | None:
    """Return the (metric, sample) scores of the run with exactly these embeddings, or None if neither run has them."""
    for run, scores in ((runs.base, measured.base), (runs.source, measured.source)):
        if torch.equal(embeddings, run.expand_as(embeddings)):
            return scores
    return None
