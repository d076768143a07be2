"""The memory that a sweep takes beside the model and the two recorded runs stays below the budget that was set."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from multrace import VisionLanguageModel
from multrace.models.replay import Kernels, Segment, Softmax, merged_attention, replay as replay_module
from multrace.tracing import ImageNoise, TextNoise
from multrace.tracing.engine import Engine, Runs, StateCell
from multrace.tracing.engine.measure import sweep
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
MIB = 2**20


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that were made since it was entered and are still held by anyone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self.before = 0
        self._known: dict[int, weakref.ref] = {}

    def start(self) -> None:
        """Starts the peak from here on, beyond what is held now."""
        self.before = self.peak = self.bytes

    @property
    def beyond(self) -> int:
        """The peak, without what was held at the start."""
        return self.peak - self.before

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        """What the operation gives, counted."""
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def release(_reference: weakref.ref) -> None:
            if self._known.pop(key, None) is not None:
                self.bytes -= size

        self._known[key] = weakref.ref(storage, release)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def measure(logits: Tensor) -> Tensor:
    return logits[:, -1, 5:6].double()


def peak(vlm: VisionLanguageModel, runs: Runs, cells: Sequence[StateCell], settings: Engine) -> int:
    """Bytes that the cells take, beside what the two recorded runs hold."""
    with Live() as live:
        sweep(vlm, runs, cells, measure, settings=settings, accept=lambda base, source: live.start())
    return live.beyond


def budget(memory: int) -> Engine:
    return Engine(name="replay", memory=memory, tokens_per_call=2**20)


@pytest.fixture
def patches(random_llava: VisionLanguageModel, photo) -> tuple[Runs, list[StateCell]]:
    """Some patches, every layer and kind under image noise: cells that each compute most of the prompt.

    One cell, with all of its samples, always runs together; it must fit into the smallest budget, and it does.
    """
    prompt = random_llava.prompt(photo, QUESTION, constraint=CONSTRAINT)
    clean = random_llava.embed(prompt)
    base = ImageNoise(samples=3).corrupt(random_llava, prompt).entering(clean)
    runs = Runs(base=base, source=clean, scored=(prompt.length - 1,))
    cells = [
        StateCell(kind=kind, first=first, last=last, positions=positions)
        for kind in ("hidden", "mlp", "attention")
        for positions in [(4,), (5,), (4, 5, 8), (4, 19)]
        for first in range(4)
        for last in range(first, min(first + 3, 4))
    ]
    return runs, cells


def test_the_count_of_bytes_is_right():
    with Live() as live:
        first = torch.ones(MIB, dtype=torch.uint8)
        live.start()
        part, copy = first[:10], first.clone()
        del first, copy
        assert (live.bytes, live.beyond) == (MIB, MIB)  # a part keeps all of it alive
        del part
        assert (live.bytes, live.peak) == (0, 2 * MIB)


def test_the_peak_stays_below_the_budget_and_more_cells_take_no_more_memory(random_llava, patches):
    runs, cells = patches
    peaks = {memory: peak(random_llava, runs, cells, budget(memory)) for memory in (1, 2, 2048)}
    assert peaks[1] <= MIB
    assert peaks[2] <= 2 * MIB < peaks[2048]  # what it would take otherwise
    some, scores = peak(random_llava, runs, cells[::4], budget(1)), len(cells) * runs.samples * 8
    assert peaks[1] <= max(some, 0.75 * MIB) + 4 * scores


def test_more_samples_take_no_more_memory(random_llava, patches):
    runs, cells = patches
    many = replace(runs, base=runs.base.of_rows([0, 1] * 2))
    assert peak(random_llava, many, cells, budget(2)) <= 2 * MIB


# Keys and values of the prefix.


def copied_for_each_row(query: Tensor, segments: Sequence[Segment], *, softmax: Softmax, kernels: Kernels) -> Tensor:
    """Attention as it would be if each row had shared keys and values of its own."""
    own = []
    for segment in segments:
        copies = query.shape[0] // segment.keys.shape[0]
        keys, values = (each.repeat_interleave(copies, 0) for each in (segment.keys, segment.values))
        own.append(replace(segment, keys=keys, values=values))
    return merged_attention(query, own, softmax=softmax, kernels=kernels)


def test_keys_of_the_prefix_are_not_copied_for_each_row(random_llava, make_photo, monkeypatch):
    prompt = random_llava.prompt([make_photo(seed) for seed in range(8)], QUESTION, constraint=CONSTRAINT)
    last, before = prompt.groups["last"][0], prompt.groups["constraint"][0]
    assert before > 128  # a long prefix that all rows share
    clean = random_llava.embed(prompt)
    base = TextNoise(samples=4).corrupt(random_llava, prompt).entering(clean)
    runs = Runs(base=base, source=clean, scored=(last,))
    cells = [
        StateCell(kind=kind, head=head, first=layer, last=layer, positions=(last,))
        for kind, heads in (("mlp", [None]), ("attention", [None]), ("head", range(4)))
        for head in heads
        for layer in range(3)
    ]
    shared = peak(random_llava, runs, cells, budget(1))
    scores = sweep(random_llava, runs, cells, measure, settings=budget(1)).scores
    monkeypatch.setattr(replay_module, "merged_attention", copied_for_each_row)
    copied = peak(random_llava, runs, cells, budget(1))
    assert torch.allclose(sweep(random_llava, runs, cells, measure, settings=budget(1)).scores, scores, atol=1e-4)
    assert shared < copied / 3
    rows, keys = 4 * len(cells) / 2, 2 * before * random_llava.hidden / 2 * 4
    assert shared < rows * keys / 2 < copied
