"""An evaluation keeps the rows of its report, and of the edits that share a model their factors, and nothing else."""

import copy
import gc
import itertools
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from multrace import EditRecord, MultEdit, Question, VisionLanguageModel
from multrace.data import EditCase, Probe, World, write_lines
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


# ---- with edits that change weights ----

EDITS = {"single": 0, "batch": 700_000, "sequence": 60_000}
"""Bytes of tensors per record that a mode may need: a batch has the keys of all records in one solve (in float32 and
float64, with what is solved for), and a sequence the factors of the edits so far; none for edits made one by one."""


@pytest.mark.slow
@pytest.mark.parametrize("mode", EDITS)
def test_tensors_of_real_edits_grow_by_their_factors_alone(tiny_vlm, mode):
    editor, settings = MultEdit(layer=5, steps=1), EvaluationSettings(max_new_tokens=2, forced=False)
    peaks = []
    for count in (4, 24):
        options = {"mode": mode, "settings": settings, "at": (), "batch_size": 2, "progress": False}
        gc.collect()
        before = live_bytes()
        with peak_of(tiny_vlm, 1) as peak:
            report = evaluate(tiny_vlm, records(count), replace(editor, rows_at_once=2), **options)
        assert set(report.statuses.values()) <= {"edited", "not generated"}
        gc.collect()
        assert live_bytes() == before, "tensors outlive the evaluation"
        peaks.append(peak[0] - before)
    assert peaks[1] - peaks[0] <= 20 * EDITS[mode] + 0.15 * peaks[0]


GROWTH = """
import multrace as mt
from multrace.data import tiny_vlm_path
from multrace.editing.solve import session as module

def anonymous():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

CHANGE
vlm, sizes = mt.load(tiny_vlm_path()), []
with mt.MultEdit(layer=5, steps=1).start(vlm) as session:
    for number in range(24):
        session.edit([mt.EditRequest(question=mt.Question(text=f"Who plays number {number}?"), target="Pruro")])
        sizes.append(anonymous())
print(sizes[-1] - sizes[3])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_process_does_not_grow_by_a_matrix_with_each_edit(is_kept: bool):
    """Without giving back what is freed, it does: a Gram matrix has 8 MiB here."""
    code = GROWTH.replace("CHANGE", "module._give_back_memory = lambda: None" if is_kept else "")
    growth = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert growth > 40 if is_kept else growth < 12


def write_world(folder: Path, count: int) -> Path:
    """Edits of facts of the world, each with a question that has to move and one that has to stay."""
    world, lines = World(), []
    for number in range(count):
        lap, place = divmod(number * 7, len(world.facts))
        fact = world.facts[place]
        targets = sorted({other.answer for other in world.facts if other.key[0] == fact.key[0]} - {fact.answer})
        case = EditCase(fact=fact, target=targets[place % len(targets)])
        near = world.neighbours(case, count=1, first_picture=2 * lap)
        asked = world.pictured_question(fact, 2 * lap)
        moves, stays = near["renderings"][0], near["other_entities"][0]
        questions = []
        for name, question in (("asked", asked), ("moves", moves), ("stays", stays)):
            path = folder / f"{number}-{name}.png"
            question.image.save(path)
            questions.append(replace(question, image=path, boxes=(), answer=None, id=""))
        own, *rest = questions
        kinds = ("other_picture", "same_question_other_picture")
        probes = tuple(Probe(kind=kind, question=each) for kind, each in zip(kinds, rest, strict=True))
        lines.append(EditRecord(id=f"{fact.id}-{lap}", question=own, target=case.target, probes=probes))
    return write_lines(folder / f"{count}.jsonl", lines)


COMMANDS = {
    "single": ("evaluate", 60),
    "batch": ("evaluate", 300),
    "sequence": ("evaluate", 200),
    "edit": ("edit", 300),
}
"""Kind of run -> its command, and the MiB by which the peak of the process at 1,000 records may exceed that at 100: the
report, and in a batch the keys of all records."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_a_process_over_a_thousand_records_needs_little_more_than_over_a_hundred(tmp_path: Path, kind: str):
    command, allowed = COMMANDS[kind]
    own = ["--steps", "2"] if command == "edit" else ["--mode", kind, "--steps", "2", "--free-only"]
    own += [] if command == "edit" else ["--max-new-tokens", "4", "--at", "1000"]
    peaks = {}
    for count in (100, 1000):
        folder = tmp_path / f"data{count}"
        folder.mkdir()
        data = write_world(folder, count)
        words = [sys.executable, "-m", "multrace.scripts.main", command, "--data", str(data), "--where", "5:last"]
        process = subprocess.Popen(
            [*words, *own, "--out", str(tmp_path / f"out{count}")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode in (0, 1)  # 1: a target is not said
        peaks[count] = usage.ru_maxrss / 1024
    assert peaks[1000] - peaks[100] < allowed, peaks
