"""What benchmarks measure on which machine: memory, the work that was done, and rows of two ways side by side."""

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
    """The device that torch calls so, and the versions and threads that compute."""
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
    """Lines that say what is measured on what."""
    shape = facts["shape"]
    return [
        f"machine   {facts['device']}, {facts['threads']} threads, torch {facts['torch']}",
        f"model     {shape['layers']} layers, width {shape['width']}, MLP {shape['mlp']}, {shape['heads']} heads, "
        f"random weights in {shape['dtype']}; {shape['before']} text tokens, a picture, {shape['after']} text tokens",
    ]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of as many entries each, their columns below one another."""
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
    """work(*arguments), computed in a new process. CommandError if that process is killed.

    The work must be a module's function; its arguments and result must survive being sent between processes.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise CommandError(
                "the process that measures was killed, likely for want of memory; choose a smaller shape or fewer "
                "samples"
            ) from error


def peak_mb(device: torch.device) -> float:
    """MiB that this process has held at most: on a CUDA device what tensors took since `forget_peak`; else resident
    memory since the process started, Python, torch and the model included.

    Linux's own count for the running program comes first: getrusage also counts what the parent held when it started
    this process, until the new program took over.
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
    """Lets the peak of a CUDA device start anew; that of a process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


_CLEAR = Path("/proc/self/clear_refs")


def extra_mb(work: Callable[[], object], device: torch.device) -> float:
    """MiB by which the peak during work() is above what was held when it began; its result counts as long as it lives.

    On a CUDA device it is the tensors' memory. Else it is resident memory, libraries' workspaces included, which Linux
    starts to count anew at each call. Where the system cannot do that, the highest peak of the process so far is taken,
    so that the figure may be too large; where it does not tell what is held, it is nan. Memory that was freed but not
    given back is used again unseen: do it in a fresh process, whose first large allocation this is.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device) / _MIB
    else:
        with suppress(OSError):
            _CLEAR.write_text("5")  # sets the peak to what is resident now
        held = _resident_mb()
    work()
    return peak_mb(device) - held


def _resident_mb() -> float:
    """MiB of this process that are in memory; nan where the system does not say."""
    if not _STATUS.is_file():
        return float("nan")
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 1024 if "VmRSS" in lines else float("nan")


_ROWS = 4096
_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Floating-point operations of one decoder layer (the first), of its keys and values, and of the output head."""

    token: float
    """Per token, its linear maps; attention is counted apart."""
    key_values: float
    """Per token of which only keys and values are computed."""
    pair: float
    """Per query-key pair, over all heads: scores and weighted values."""
    read: float
    """Per token that goes through the output head."""


def layer_cost(vlm: VisionLanguageModel) -> LayerCost:
    """Two operations per weight and token."""
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
    """Floating-point operations of what was counted: linear maps, attention and output head."""
    cost = layer_cost(vlm)
    return (
        cost.token * work.token_layers
        + cost.key_values * work.key_value_tokens
        + cost.pair * work.pairs
        + cost.read * work.read_tokens
    )


def matrix_rate(projection: Projection) -> float:
    """Operations per second of a linear map like this one (shape, dtype, device), on 4096 rows; the best of ten."""
    weight = projection.weight
    rows = torch.randn(_ROWS, weight.shape[1], device=weight.device).to(weight.dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(_REPEATS + 1):
            started = now(weight.device)
            nn.functional.linear(rows, weight)
            seconds.append(now(weight.device) - started)
    return 2.0 * _ROWS * weight.numel() / min(seconds[1:])  # the first call also sets things up


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device is done with all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Notes when each of several steps is done. May stand in for a progress bar, which it then passes on."""

    def __init__(self, device: torch.device, bar: tqdm | None = None) -> None:
        self._device, self._bar = device, bar
        self._marks = [now(device)]

    def update(self, count: int = 1) -> None:
        """One more step is done."""
        self._marks.append(now(self._device))
        if self._bar is not None:
            self._bar.update(count)

    def durations(self) -> list[float]:
        """Seconds of each step."""
        return [after - before for before, after in pairwise(self._marks)]


def largest(difference: Tensor) -> float:
    """The largest absolute value."""
    return float(difference.abs().max())


_LAYER = "a decoder layer"


@dataclass(eq=False)
class TokenLayers:
    """Tokens times decoder layers; the tokens of all rows of a batch count, padded ones too."""

    forward: int = 0
    """Of layers that were entered, also if the pass ended inside one of them."""
    backward: int = 0
    """Of layers that a gradient came back to; one that ends inside a layer counts as a whole one."""

    @property
    def total(self) -> int:
        """Both. With frozen weights a layer's backward pass has as many products as its forward pass."""
        return self.forward + self.backward


@contextmanager
def counted_token_layers(vlm: VisionLanguageModel) -> Iterator[TokenLayers]:
    """What the model's decoder layers compute in the block, however they are called."""
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
    """One row of the table; both ways' figures are for the same amount of work."""

    label: str
    seconds: float
    """Ours."""
    seconds_usual: float
    """The usual way's, multiplied where it was timed on a part."""
    unit: str
    """What work is counted in: "token-layers" or "GFLOP"."""
    work: float
    work_usual: float
    difference: float
    """|ours - usual| / |usual| of the results, the worst where there are several."""
    tolerance: float
    """The difference at which the row would have been refused."""
    details: Mapping[str, float | int | str]
    """Figures of this kind of row by name: what was asked, and what else was measured."""

    @property
    def ratio_seconds(self) -> float:
        """The usual way's seconds over ours."""
        return self.seconds_usual / self.seconds

    @property
    def ratio_work(self) -> float:
        """The usual way's work over ours."""
        return self.work_usual / self.work

    def record(self) -> dict[str, Any]:
        """The row with its ratios, as it stands in the JSON."""
        return {**asdict(self), "ratio_seconds": self.ratio_seconds, "ratio_work": self.ratio_work}


def apart(found: Tensor, wanted: Tensor, *, tolerance: float, label: str, scale: Tensor | None = None) -> float:
    """|found - wanted| / |scale| (Frobenius; scale: wanted, if it is not given).

    CommandError if it is above the tolerance or not finite: a ratio of the costs of different results says nothing.
    """
    wanted = wanted.to(found.device, torch.float64)
    size = (wanted if scale is None else scale.double()).norm()
    difference = ((found.double() - wanted).norm() / size).item()
    if not difference <= tolerance:
        raise CommandError(
            f"{label}: ours and the usual way differ by {difference:.1e} of the result, {tolerance:.0e} is allowed; "
            "they did not compute the same, so there is no ratio; try another --seed, or --dtype float32"
        )
    return difference


_HEAD = ("row", "seconds", "usual way", "ratio", "work", "usual way", "ratio", "difference")
_NOTE = (
    "Ratios are the usual way's cost over ours for the same result; the difference is that of the results, as a share "
    "of their size."
)


def describe_edit(row: EditRow) -> list[str]:
    """One row of the table, with everything that was measured."""
    lines = [
        row.label,
        f"  seconds       {_seconds(row.seconds)}; usual {_seconds(row.seconds_usual)}: {row.ratio_seconds:.1f}x",
        f"  {row.unit:<12}  {_work(row.work)}; usual {_work(row.work_usual)}: {row.ratio_work:.1f}x",
        f"  difference    {row.difference:.1e} of the result ({row.tolerance:.0e} would be refused)",
    ]
    return [*lines, *(f"  {name:<24} {_figure(value)}" for name, value in row.details.items())]


def edit_table(rows: Sequence[EditRow]) -> list[str]:
    """All rows, with the figures that count."""
    return [*aligned([_HEAD, *(_entries(row) for row in rows)]), _NOTE]


def edit_markdown(rows: Sequence[EditRow], facts: Mapping[str, Any]) -> str:
    """The table as a Markdown text, with what it was measured on and the figures of each row below it."""
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
