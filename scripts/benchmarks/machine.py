"""What benchmarks measure: the machine, time, memory, the work that was done, and rows that show two ways together."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from ...models import Projection, Site, VisionLanguageModel
from ...models.hooks import main_keyword, main_tensor
from ...models.replay.replay import Work
from ..options import CommandError

_CPU = Path("/proc/cpuinfo")


def machine_facts(name: str) -> dict[str, Any]:
    """Return the facts of a device, given its name in torch, with versions and the number of threads."""
    device = torch.device(name)
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and _CPU.is_file():
        for line in _CPU.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() if device.type == "cpu" else str(device)


def describe_machine(facts: Mapping[str, Any]) -> list[str]:
    """Return lines that describe the machine and the model."""
    shape = facts["shape"]
    return [
        f"machine   {facts['device']}, {facts['threads']} threads, torch {facts['torch']}",
        f"model     {shape['architecture']}, {shape['layers']} layers, width {shape['width']}, MLP {shape['mlp']}, "
        f"{shape['heads']} heads on {shape['heads'] // shape['heads_per_key']} of keys and values, "
        f"random weights in {shape['dtype']}; {shape['before']} text tokens, a picture, {shape['after']} text tokens",
    ]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines, which have the same number of entries, with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip() for line in lines]


try:
    import resource
except ImportError:  # not on Windows
    resource = None

_Result = TypeVar("_Result")
_MIB = 2**20
_STATUS = Path("/proc/self/status")


def in_new_process(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Return work(*arguments), computed in a new process. Raises `CommandError` if that process is killed.

    `work` must be a function of a module, and its arguments and its result must be picklable.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise CommandError(
                "the process that measures was killed, likely for want of memory; choose a smaller --shape or fewer "
                "samples"
            ) from error


def peak_mb(device: torch.device) -> float:
    """Return the peak memory of this process in MiB.

    On a CUDA device that is the memory of tensors since `forget_peak`; else it is the resident memory since the process
    started, with Python, torch and the model. The count of Linux for the running program is preferred, because that of
    getrusage includes what the parent held while it started this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    if _STATUS.is_file():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) / 1024
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def forget_peak(device: torch.device) -> None:
    """Reset the peak of a CUDA device; that of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


_CLEAR = Path("/proc/self/clear_refs")


def extra_mb(work: Callable[[], object], device: torch.device) -> float:
    """Return how far memory rises during work() above what was held before it, in MiB, with the result of work().

    On a CUDA device this is the memory of tensors. Else it is resident memory, with the workspaces of libraries; Linux
    counts its peak anew at each call. Other systems give the highest peak of the process so far, so that the figure may
    be too large, or nan if they do not say what is held. Memory that was freed but not returned to the system is used
    again without being counted, so this should be the first large allocation of a fresh process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device) / _MIB
    else:
        with suppress(OSError):
            _CLEAR.write_text("5")  # resets the peak to what is resident now
        held = _resident_mb()
    work()
    return peak_mb(device) - held


def _resident_mb() -> float:
    """Return the resident memory of this process in MiB; nan if the system does not say."""
    if not _STATUS.is_file():
        return float("nan")
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 1024 if "VmRSS" in lines else float("nan")


_ROWS = 4096
_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Floating-point operations of a decoder layer (the first), of its keys and values, and of the output head."""

    token: float
    """For each token: the linear maps of the layer, without the products of attention."""
    key_values: float
    """For each token of which only keys and values are computed."""
    pair: float
    """For each pair of a query and a key, over all heads: its score and its weighted value."""
    read: float
    """For each token that passes through the output head."""


def layer_cost(vlm: VisionLanguageModel) -> LayerCost:
    """Return the cost of a layer, at two operations for each weight and token."""
    layer = vlm.module(Site("hidden", 0))
    attention = vlm.module(Site("attention", 0))
    written = vlm.attention_projection(0)
    mixed = sum(each.weight.numel() for each in attention.modules() if isinstance(each, nn.Linear))
    return LayerCost(
        token=2.0 * sum(each.weight.numel() for each in layer.modules() if isinstance(each, nn.Linear)),
        key_values=2.0 * (mixed - written.weight.numel() - written.width * written.hidden),
        pair=4.0 * written.width,
        read=2.0 * vlm.output_head.weight.numel(),
    )


def counted_flops(vlm: VisionLanguageModel, work: Work) -> float:
    """Return the floating-point operations of counted work: linear maps, attention and the output head."""
    cost = layer_cost(vlm)
    return (
        cost.token * work.token_layers
        + cost.key_values * work.key_value_tokens
        + cost.pair * work.pairs
        + cost.read * work.read_tokens
    )


def matrix_rate(projection: Projection) -> float:
    """Return operations per second of a linear map of this shape, dtype and device on 4096 rows: the best of ten."""
    weight = projection.weight
    rows = torch.randn(_ROWS, weight.shape[1], device=weight.device).to(weight.dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(_REPEATS + 1):
            started = now(weight.device)
            nn.functional.linear(rows, weight)
            seconds.append(now(weight.device) - started)
    return 2.0 * _ROWS * weight.numel() / min(seconds[1:])  # the first call also does the set-up


def now(device: torch.device) -> float:
    """Return the time of a clock in seconds, after waiting for all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Notes when each step ends; it can take the place of a progress bar, which it then updates."""

    def __init__(self, device: torch.device, bar: tqdm | None = None) -> None:
        self._device, self._bar = device, bar
        self._marks = [now(device)]

    def update(self, count: int = 1) -> None:
        """Note that one more step has ended."""
        self._marks.append(now(self._device))
        if self._bar is not None:
            self._bar.update(count)

    def durations(self) -> list[float]:
        """Return the seconds of each step."""
        return [after - before for before, after in pairwise(self._marks)]


def largest(difference: Tensor) -> float:
    """Return the largest absolute value."""
    return float(difference.abs().max())


_LAYER = "a decoder layer"


@dataclass(eq=False)
class TokenLayers:
    """Work in tokens times decoder layers, where the tokens of all rows of a batch count, with padding."""

    forward: int = 0
    """For all layers that were entered, even if the pass ended inside one."""
    backward: int = 0
    """For all layers that a gradient reached, even if it ended inside one."""

    @property
    def total(self) -> int:
        """The sum; with frozen weights the backward pass of a layer has as many products as its forward pass."""
        return self.forward + self.backward


@contextmanager
def counted_token_layers(vlm: VisionLanguageModel) -> Iterator[TokenLayers]:
    """Yield a count of what the decoder layers of the model compute in the block, however they are called."""
    count = TokenLayers()

    def enter(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        count.forward += _tokens(arguments[0] if arguments else keywords[main_keyword(keywords, _LAYER)])

    def leave(_layer: nn.Module, _arguments: Any, output: Any) -> None:
        states = main_tensor(output, _LAYER)
        if states.requires_grad:
            states.register_hook(come_back)

    def come_back(gradient: Tensor) -> None:
        count.backward += _tokens(gradient)

    with ExitStack() as stack:
        for layer in vlm.decoder_layers:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        yield count


def _tokens(states: Tensor) -> int:
    return states.shape[0] * states.shape[1]


@dataclass(frozen=True, kw_only=True)
class EditRow:
    """A row of the table of editing; the figures of both ways are for the same task."""

    label: str
    seconds: float
    """The time of multrace."""
    seconds_usual: float
    """The time of the usual way, extrapolated if only a part was timed."""
    unit: str
    """The unit of work: "token-layers" or "GFLOP"."""
    work: float
    work_usual: float
    difference: float
    """|multrace - usual| / |usual| of the results; the largest one if there are several."""
    tolerance: float
    """The difference above which the row is refused."""
    details: Mapping[str, float | int | str]
    """Name -> figure, for this kind of row: the sizes of the task, and what else was measured."""

    @property
    def ratio_seconds(self) -> float:
        """The time of the usual way over that of multrace."""
        return self.seconds_usual / self.seconds

    @property
    def ratio_work(self) -> float:
        """The work of the usual way over that of multrace."""
        return self.work_usual / self.work

    def record(self) -> dict[str, Any]:
        """Return the row with its ratios, for the JSON file."""
        return {**asdict(self), "ratio_seconds": self.ratio_seconds, "ratio_work": self.ratio_work}


def apart(found: Tensor, wanted: Tensor, *, tolerance: float, label: str, scale: Tensor | None = None) -> float:
    """Return |found - wanted| / |scale| in the Frobenius norm; the scale is `wanted` unless one is given.

    Raises `CommandError` if that is above the tolerance or not finite, because the ratio of the costs of two different
    results means nothing.
    """
    wanted = wanted.to(found.device, torch.float64)
    size = (wanted if scale is None else scale.double()).norm()
    difference = ((found.double() - wanted).norm() / size).item()
    if not difference <= tolerance:
        raise CommandError(
            f"{label}: ours and the usual way differ by {difference:.1e} of the result, and at most {tolerance:.0e} is "
            "allowed; they did not compute the same, so there is no ratio; try another --seed, or --dtype float32"
        )
    return difference


_HEAD = ("row", "seconds", "usual way", "ratio", "work", "usual way", "ratio", "difference")
_NOTE = (
    "Ratios are the cost of the usual way over that of multrace for the same result; the difference is that of the "
    "results, as a share of their size."
)


def describe_edit(row: EditRow) -> list[str]:
    """Return lines with everything that was measured for a row."""
    lines = [
        row.label,
        f"  seconds       {_seconds(row.seconds)}; usual {_seconds(row.seconds_usual)}: {row.ratio_seconds:.1f}x",
        f"  {row.unit:<12}  {_work(row.work)}; usual {_work(row.work_usual)}: {row.ratio_work:.1f}x",
        f"  difference    {row.difference:.1e} of the result ({row.tolerance:.0e} would be refused)",
    ]
    return [*lines, *(f"  {name:<24} {_figure(value)}" for name, value in row.details.items())]


def edit_table(rows: Sequence[EditRow]) -> list[str]:
    """Return the lines of the table of all rows, with the main figures."""
    return [*aligned([_HEAD, *(_entries(row) for row in rows)]), _NOTE]


def edit_markdown(rows: Sequence[EditRow], facts: Mapping[str, Any]) -> str:
    """Return the table in Markdown, with the machine above it and the other figures of each row below it."""
    lines = ["# Editing, side by side with the usual way", "", *(f"    {line}" for line in describe_machine(facts)), ""]
    lines += [_markdown_row(_HEAD), _markdown_row(["---"] * len(_HEAD))]
    lines += [_markdown_row(_entries(row)) for row in rows]
    lines += ["", _NOTE, ""]
    for row in rows:
        figures = ", ".join(f"{name.replace('_', ' ')} {_figure(value)}" for name, value in row.details.items())
        lines.append(f"- {row.label}: {figures}")
    return "\n".join(lines) + "\n"


def _markdown_row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _entries(row: EditRow) -> tuple[str, ...]:
    return (
        row.label,
        _seconds(row.seconds),
        _seconds(row.seconds_usual),
        f"{row.ratio_seconds:.1f}x",
        f"{_work(row.work)} {row.unit}",
        _work(row.work_usual),
        f"{row.ratio_work:.1f}x",
        f"{row.difference:.1e}",
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _work(work: float) -> str:
    return f"{work:.0f}" if work >= 100 else f"{work:.3g}"


def _figure(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
