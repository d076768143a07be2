"""The trace that options ask for, its files and pictures, and its summary in words."""

from collections.abc import Mapping
from pathlib import Path

from ..models import Prompt, VisionLanguageModel
from ..tracing import CausalTrace, Corruption, Engine, causal_trace
from .options.trace import TraceOptions
from .outputs import new_files

TRACE, MAP, OVERLAY = FILES = ("trace.safetensors", "trace.png", "overlay.png")
_UNFINISHED = "trace.unfinished"
_BLOCKS = 3


def compute_trace(
    settings: TraceOptions, vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption
) -> CausalTrace:
    """Return the trace of one prompt. With --resume, finished cells are kept in the output folder meanwhile."""
    checkpoint = settings.out / _UNFINISHED if settings.resume else None
    engine = Engine(name=settings.engine, memory=settings.memory, checks=settings.checks, checkpoint=checkpoint)
    return causal_trace(
        vlm,
        prompt,
        corruption=corruption,
        sites=settings.sites,
        window=settings.window,
        positions=settings.rows("tokens"),
        answer=settings.answer,
        foil=settings.foil,
        whole_answer=settings.whole_answer,
        metrics=settings.metrics,
        direction=settings.direction,
        effect=settings.effect,
        severed=settings.severed,
        exact_cells=settings.exact_cells,
        even_if_weak=settings.even_if_weak,
        engine=engine,
    )


def forget_cells(folder: Path) -> None:
    """Removes the finished cells that `compute_trace` kept in the folder, once they have become a result."""
    for path in folder.glob(f"{_UNFINISHED}*"):  # one for each sequence of tokens that is scored
        path.unlink()


def write_trace(trace: CausalTrace, prompt: Prompt, out: Path, others: Mapping[str, str] | None = None) -> list[Path]:
    """Write the trace, its map, its overlay if parts of the picture were restored, and others; return the paths.

    All of them or none; an overlay of an earlier trace goes.
    """
    others = others or {}
    names = [TRACE, MAP, *([OVERLAY] if _has_picture_rows(trace) else []), *others]
    with new_files(out, stale=FILES) as folder:
        trace.save(folder / TRACE)
        trace.plot(folder / MAP)
        if OVERLAY in names:
            trace.overlay(prompt, folder / OVERLAY, "hidden" if "hidden" in trace.kinds else trace.kinds[0])
        for name, text in others.items():
            (folder / name).write_text(text, encoding="utf-8")
    return [out / name for name in names]


def summary(trace: CausalTrace) -> list[str]:
    """Return total effect, engine and, for each kind of site, the strongest causal blocks, as lines of text."""
    put_in = "restored" if trace.direction == "restore" else "corrupted"
    rows = [(put_in, "token", "layers", "indirect effect"), *_blocks(trace)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    against = f" against {trace.foil!r}" if trace.foil is not None else ""
    return [
        f"question      {trace.question}",
        f"scored        {trace.answer!r}{against}",
        f"corruption    {trace.corruption}",
        f"total effect  {trace.total_effect:.3f} ({trace.metrics[0].replace('_', ' ')} {trace.clean:.3f} clean, "
        f"{float(trace.corrupted.mean()):.3f} corrupted)",
        f"traced        {trace.variant}",
        f"engine        {trace.engine.summary()}",
        *_estimates(trace),
        "",
        *table,
    ]


def _estimates(trace: CausalTrace) -> list[str]:
    """How many cells are estimated, and how well the estimates rank cells whose exact values are known."""
    count = sum(int(flags.sum()) for flags in trace.estimated.values())
    if not count:
        return []
    ranks = ", ".join(f"{kind} {value:.2f}" for kind, value in trace.agreement.items())
    return [f"estimated     {count} cells; rank agreement with exact ones: {ranks or 'unknown'}"]


def _blocks(trace: CausalTrace) -> list[tuple[str, str, str, str]]:
    rows = []
    for kind in trace.kinds:
        blocks = trace.causal_blocks(kind)[:_BLOCKS]
        rows += [
            (kind, repr(block.row), _layers(block.layers[0], block.layers[-1]), _effect(block.effect, block.spread))
            for block in blocks
        ] or [(kind, "none", "-", "nothing brings the answer back")]
    return rows


def _effect(effect: float, spread: float | None) -> str:
    return f"{effect:.3f}" if spread is None else f"{effect:.3f} (spread over samples {spread:.3f})"


def _layers(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _has_picture_rows(trace: CausalTrace) -> bool:
    """Whether some row is a part of a picture, and not all of it."""
    places = {position for position, *_ in trace.patches}
    return any(set(row) < places for row in trace.row_positions)
