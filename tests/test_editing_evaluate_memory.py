"""An evaluation keeps the rows of its report and nothing else: no tensors, however many records there are."""

import copy
import gc
import itertools
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from multrace import EditRecord, Question, VisionLanguageModel
from multrace.data import Probe, World
from multrace.editing import EditReport, EditSession, EvaluationSettings, evaluate

BYTES_PER_RECORD = 20_000
"""The rows of one record with three questions: texts, and about fifteen numbers per question."""
SETTINGS = EvaluationSettings(max_new_tokens=1)


class Nothing:
    """A change that changes nothing."""

    fingerprints: ClassVar[dict[str, str]] = {}
    requests = ()

    @contextmanager
    def applied(self, vlm: VisionLanguageModel) -> Iterator[VisionLanguageModel]:
        yield vlm

    def write(self, vlm: VisionLanguageModel) -> None:
        """Nothing to write."""


class NoEditor:
    """An editor that changes nothing."""

    def start(self, vlm: VisionLanguageModel, *, moments: Any = None, history: Any = None) -> EditSession:
        return EditSession(vlm, lambda _requests, _progress: Nothing())


@contextmanager
def peak_of(vlm: VisionLanguageModel, every: int) -> Iterator[list[int]]:
    """Yield a list whose only entry becomes the largest number of bytes of tensors alive before a run of the model.

    every: one in so many runs is looked at.
    """
    peak, runs = [0], itertools.count()

    def look(*_: Any) -> None:
        if next(runs) % every == 0:
            gc.collect()  # what only a cycle holds is not alive
            peak[0] = max(peak[0], live_bytes())

    handle = vlm.model.register_forward_pre_hook(look)
    try:
        yield peak
    finally:
        handle.remove()


def live_bytes() -> int:
    """Bytes of all storages that a tensor in memory holds, each counted once."""
    tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def records(count: int) -> list[EditRecord]:
    """Different questions about one picture, each with a probe that should move and one that should stay."""
    world = World()
    photo = world.picture(world.entities[0], 0).image
    return [
        EditRecord(
            question=Question(text=f"Who founded company {number}?", image=photo),
            target="Pruro",
            probes=[
                Probe(kind="rephrase", question=Question(text=f"Who is the founder of company {number}?", image=photo)),
                Probe(kind="unrelated", question=Question(text=f"Who leads company {number}?", image=photo)),
            ],
        )
        for number in range(count)
    ]


def evaluated(vlm: VisionLanguageModel, mode: str, count: int, every: int) -> tuple[int, EditReport]:
    """The peak of live tensor bytes above those that were there before, and the report."""
    asked, editor = records(count), Nothing() if mode == "batch" else NoEditor()
    gc.collect()
    before = live_bytes()
    with peak_of(vlm, every) as peak:
        report = evaluate(vlm, asked, editor, mode=mode, settings=SETTINGS, at=(), batch_size=2, progress=False)
    gc.collect()
    assert live_bytes() == before, "tensors outlive the evaluation"
    assert len(report.rows) == 3 * count
    return peak[0] - before, report


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "batch", "sequence"])
def test_tensors_do_not_grow_with_the_records(tiny_vlm, mode):
    small, large = (evaluated(tiny_vlm, mode, count, every=7)[0] for count in (4, 12))
    assert 0 < large <= 1.15 * small


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "batch", "sequence"])
def test_memory_of_a_thousand_records(tiny_vlm, mode):
    small, _ = evaluated(tiny_vlm, mode, 100, every=101)
    large, report = evaluated(tiny_vlm, mode, 1000, every=101)
    assert 0 < large <= 1.15 * small
    tracemalloc.start()
    copied = copy.deepcopy(report)  # what the report holds, which is all that is left of the evaluation
    assert tracemalloc.get_traced_memory()[0] / len(copied.statuses) < BYTES_PER_RECORD
    tracemalloc.stop()
