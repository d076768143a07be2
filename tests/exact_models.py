"""Tiny models of real transformers classes that compute in true float64, and how far the fast sweep is from plain."""

import sys
from collections.abc import Sequence
from inspect import getsource
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from multrace.models import VisionLanguageModel, load
from multrace.models.families import Addresses, Family
from multrace.models.frame import DecoderInput, Frame
from multrace.models.frontend import Frontend
from multrace.models.replay import Recording, Replay, Source, Span
from multrace.tracing.engine import Runs, StateCell, plain_scores
from multrace.tracing.engine.measure import sweep
from torch import Tensor, nn
from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
"""Sizes that most text configurations take."""

LENGTH, CHANGED, FROZEN = 14, (2, 3, 4, 5, 6, 7), (3, 4, 5, 6)


def true_norm(self: nn.Module, states: Tensor) -> Tensor:
    """A norm of Llama's kind without its cast to float32, which would round small differences away."""
    return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def true_gemma_norm(self: nn.Module, states: Tensor) -> Tensor:
    """Gemma's norm without its cast to float32."""
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def lift_casts(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the model's norms and softmaxes compute in the dtype that they are given."""
    for kind in {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}:
        norm = next(module for module in model.modules() if type(module) is kind)
        if kind.__name__ == "Gemma4RMSNorm":  # with a weight or without, and with the weight alone as its factor
            lift_every_cast(monkeypatch)
            continue
        monkeypatch.setattr(kind, "forward", true_norm if hasattr(norm, "variance_epsilon") else true_gemma_norm)
    for kind in {type(module) for module in model.modules() if hasattr(module, "_attn")}:
        source = dedent(getsource(kind._attn)).replace(".to(torch.float32)", "")
        defined: dict[str, Any] = {}
        exec(source, vars(sys.modules[kind.__module__]), defined)
        monkeypatch.setattr(kind, "_attn", defined["_attn"])
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda states, dim, **_dtype: softmax(states, dim))


def lift_every_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on float64 is never cast to float32, not even inside functions of transformers."""
    to = torch.Tensor.to

    def kept(value: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if value.dtype == torch.float64:
            arguments = tuple(torch.float64 if each is torch.float32 else each for each in arguments)
            keywords |= {"dtype": torch.float64} if keywords.get("dtype") is torch.float32 else {}
        return to(value, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "to", kept)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda value: value if value.dtype == torch.float64 else to(value, torch.float32)
    )


def load_exact(path: Path, monkeypatch: pytest.MonkeyPatch, **options: str) -> VisionLanguageModel:
    """The model of a folder, really computing in float64 (or as the options say)."""
    vlm = load(path, verify=False, **{"dtype": "float64", **options})
    lift_casts(vlm.model, monkeypatch)
    return vlm


def assemble(model: PreTrainedModel, family: Family) -> VisionLanguageModel:
    """The model under study, without a tokenizer: it is given embeddings only."""
    model.eval().requires_grad_(False)
    frontend = Frontend(
        processor=None, tokenizer=None, image_token_id=None, patch_size=None, dropped_inputs=(),
        device=model.device, dtype=model.dtype,
    )  # fmt: skip
    addresses = Addresses(model=model, family=family, name=family.name)
    vlm = VisionLanguageModel(model=model, frontend=frontend, addresses=addresses, family=family, name=family.name)
    assert vlm.after_head is not None  # measured now, as `load` does, and not in the first pass that a test watches
    return vlm


def make_runs(vlm: VisionLanguageModel, *, restores: bool = True, samples: int = 2, **keywords: Tensor) -> Runs:
    """Random embeddings, and samples of them with noise at some positions; two positions are scored."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(1, LENGTH, vlm.hidden, generator=generator, dtype=torch.float64).to(vlm.dtype)
    noise = torch.randn(samples, len(CHANGED), vlm.hidden, generator=generator, dtype=torch.float64).to(vlm.dtype)
    corrupted = clean.repeat(samples, 1, 1)
    corrupted[:, list(CHANGED)] += noise
    frame = Frame(keywords=keywords)
    pair = [
        DecoderInput(embeddings=corrupted, frame=frame),
        DecoderInput(embeddings=clean, frame=frame.of_rows([0]) if frame.rows > 1 else frame),
    ]
    base, source = pair if restores else pair[::-1]
    return Runs(base=base, source=source, scored=(LENGTH - 2, LENGTH - 1), frozen=FROZEN)


def mixed_cells(vlm: VisionLanguageModel) -> list[StateCell]:
    """Every kind of site, windows, groups, severed and direct ones, in every layer."""
    cells = []
    rows = ((2,), (5,), (LENGTH - 1,), (LENGTH - 4,), (3, 6), (2, 3, 4), CHANGED, (4, LENGTH - 2, LENGTH - 1))
    for positions in rows:
        for first in range(vlm.layers):
            span = {"first": first, "positions": positions}
            wide = min(vlm.layers - 1, first + 2)
            cells += [
                StateCell(kind="hidden", last=first, **span),
                StateCell(kind="mlp", last=wide, **span),
                StateCell(kind="attention", last=wide, **span),
                StateCell(kind="head", last=first, head=vlm.heads - 1, **span),
                StateCell(kind="hidden", last=first, severed="mlp", **span),
                StateCell(kind="mlp", last=first, severed="attention", **span),
                StateCell(kind="attention", last=first, is_direct=True, **span),
                StateCell(kind="hidden", last=wide, is_direct=True, **span),
            ]
    return cells


def measure(logits: Tensor) -> Tensor:
    """The probability of a token at the last scored position, and a difference of logits at the first."""
    probability = logits.double().softmax(-1)[:, -1, 7]
    return torch.stack([probability, (logits[:, 0, 5] - logits[:, 0, 9]).double()], dim=-1)


def largest_difference(
    vlm: VisionLanguageModel, runs: Runs, cells: Sequence[StateCell], slow: Tensor | None = None
) -> tuple[float, float]:
    """How far sweep and plain way are apart at most (nan if either is), and the share of cells that move a score.

    slow: the scores of the plain way, where they are known.
    """
    found = sweep(vlm, runs, cells, measure)
    slow = plain_scores(vlm, runs, cells, measure) if slow is None else slow
    moves = (slow - found.base).abs().amax((1, 2)) > 1e-7
    return float((found.scores - slow).abs().max()), float(moves.double().mean())


def noisy(embeddings: Tensor, positions: Sequence[int], rows: int = 2) -> Tensor:
    """Rows of these embeddings, each with other noise at these positions."""
    changed = embeddings.repeat(rows, 1, 1)
    noise = torch.randn(rows, len(positions), embeddings.shape[-1], generator=torch.Generator().manual_seed(3))
    changed[:, list(positions)] += noise.to(embeddings)
    return changed


def whole(replay: Replay, embeddings: Tensor, **settings) -> Recording:
    """A recording of all states; the last two positions are read. Masks and positions form the frame."""
    length = embeddings.shape[1]
    keywords = {name: settings.pop(name) for name in ("attention_mask", "position_ids") if name in settings}
    entering = DecoderInput(embeddings=embeddings, frame=Frame(keywords=keywords))
    return replay.record(entering, kept=range(length), read=(length - 2, length - 1), **settings)


def span_after(replay: Replay, run: Recording, positions: Sequence[int]) -> Span:
    """The positions to compute, all others being those of one run."""
    rest = tuple(place for place in run.positions if place not in set(positions))
    return replay.span(positions, [Source(run=run, positions=rest)])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    """Everywhere, and in absolute numbers."""
    return torch.allclose(found, expected, rtol=0, atol=tolerance)
