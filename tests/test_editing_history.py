"""Histories: in order and back bit by bit, any edit dropped, the later ones solved anew, saved whole, refusals."""

import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from multrace.artefacts.files import digest
from multrace.editing import AppliedDelta, Delta, EditError, History, MultEdit, WeightChange, load_edit
from multrace.models import VisionLanguageModel, load
from torch import Tensor

LAYER = 1


def solved(keys: Tensor, residuals: Tensor) -> Tensor:
    """The dense least-squares change at a ridge of one, in plain form and float64."""
    keys, residuals = keys.double(), residuals.double()
    return residuals.T @ torch.linalg.inv(keys @ keys.T + torch.eye(len(keys), dtype=torch.float64)) @ keys


def made(vlm: VisionLanguageModel, seed: int, *, layer: int = LAYER, count: int = 2, size: float = 1.0) -> Delta:
    """A delta for the model's present weights: one key for each request, random residuals, and one preserved key."""
    projection, generator = vlm.down_projection(layer), torch.Generator().manual_seed(seed)
    owners = torch.tensor([*range(count), -1])
    common = torch.randn(projection.width, generator=torch.Generator().manual_seed(99))  # makes edits meet each other
    keys = 0.3 * torch.randn(count + 1, projection.width, generator=generator) + 0.1 * common
    residuals = size * torch.randn(count + 1, projection.hidden, generator=generator) * (owners >= 0)[:, None]
    left = torch.linalg.solve(
        keys.double() @ keys.double().T + torch.eye(count + 1, dtype=torch.float64), residuals.double()
    ).T.float()
    parts = {"keys": keys, "residuals": residuals, "weights": torch.ones(count + 1), "owners": owners}
    return Delta(
        changes={projection.name: WeightChange(left=left, right=keys, **parts)},
        fingerprints=vlm.fingerprint([projection.name]),
        model=vlm.name,
        settings={"editor": "by hand", "seed": str(seed)},
        requests=tuple({"question": f"{seed}.{index}", "target": "red"} for index in range(count)),
    )


def dense(delta: Delta) -> Tensor:
    ((left, right),) = delta.factors.values()
    return left.double() @ right.double()


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


def in_turn(vlm: VisionLanguageModel, count: int = 3) -> History:
    """Edits a, b, c, each made with the ones before in place; the model ends unedited."""
    history = History()
    for seed, name in enumerate("abcdef"[:count]):
        if history.entries:
            with history.applied(vlm):
                history = history.added(name, made(vlm, seed))
        else:
            history = history.added(name, made(vlm, seed))
    return history


@pytest.fixture
def vlm(random_vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Each family in turn."""
    return random_vlm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_edits_go_on_in_order_and_come_off_bit_by_bit_in_every_dtype(dtype, random_llava_llama):
    vlm = load(random_llava_llama.name, verify=False)
    vlm.model.to(dtype)
    weights, history = bits(vlm), in_turn(vlm)
    a, b, c = (entry.delta for entry in history.entries)
    with a.applied(vlm), b.applied(vlm), c.applied(vlm):
        wanted = bits(vlm)
    handle = history.apply(vlm)
    assert bits(vlm) == wanted != weights
    handle.undo()
    with history.applied(vlm):
        assert bits(vlm) == wanted
    assert bits(vlm) == weights


def test_dropping_one_of_many_equals_applying_the_others(vlm):
    weights, history = bits(vlm), in_turn(vlm)
    less = history.without("b")
    assert history.names == ("a", "b", "c") and less.names == ("a", "c")
    a, _b, c = (entry.delta for entry in history.entries)
    with a.applied(vlm), c.applied(vlm, on_other_weights=True):
        wanted = bits(vlm)
    with less.applied(vlm):
        assert bits(vlm) == wanted
    with history.applied(vlm):
        assert bits(vlm) != wanted
    some = history.without("b", request=1)
    with a.applied(vlm), history.entries[1].delta.without(1).applied(vlm), c.applied(vlm, on_other_weights=True):
        wanted = bits(vlm)
    with some.applied(vlm):
        assert bits(vlm) == wanted
    assert bits(vlm) == weights


def from_the_start(history: History, kept: dict[str, list[int]]) -> Tensor:
    """The dense sum of edits solved in order in float64 for these rows only, each to the output it first asked for."""
    total = old = torch.zeros(())
    for entry in history.entries:
        (change,) = entry.delta.changes.values()
        rows = kept.get(entry.name, [])
        keys, residuals = change.keys[rows].double(), change.residuals[rows].double()
        asked = residuals.any(-1, keepdim=True)
        # z = (W + old) k + r is what is wanted; W + total is what is there
        wanted = residuals + asked * (keys @ (old - total).T if old.ndim else 0)
        total = total + solved(keys, wanted) if rows else total
        old = old + dense(entry.delta)
    return total


DROPS = {
    "the first": ({"a": None}, {"b": [0, 1, 2], "c": [0, 1, 2]}),
    "the one between": ({"b": None}, {"a": [0, 1, 2], "c": [0, 1, 2]}),
    "a request of the first": ({"a": 0}, {"a": [1, 2], "b": [0, 1, 2], "c": [0, 1, 2]}),
    "two of them": ({"a": None, "b": 1}, {"b": [0, 2], "c": [0, 1, 2]}),
}


@pytest.mark.parametrize(("dropped", "kept"), DROPS.values(), ids=DROPS)
def test_resolving_equals_solving_the_remaining_from_the_start(dropped, kept, random_llava_llama):
    vlm = random_llava_llama
    history = less = in_turn(vlm)
    for name, request in dropped.items():
        less = less.without(name, request=request)
    wanted, anew = from_the_start(history, kept), less.resolved()
    scale = wanted.abs().max()
    assert (dense(anew.composed()) - wanted).abs().max() < 2e-6 * scale
    assert (dense(less.composed()) - wanted).abs().max() > 1e-2 * scale
    assert anew.names == less.names and not any(entry.withdrawn or entry.dropped is not None for entry in anew.entries)
    before, whole = vlm.weight(vlm.down_projection(LAYER).name).detach().clone(), bits(vlm)
    with anew.applied(vlm):
        torch.testing.assert_close(
            (vlm.weight(vlm.down_projection(LAYER).name) - before).double(), wanted, rtol=0, atol=1e-6
        )
    assert bits(vlm) == whole
    assert dense(anew.resolved().composed()).equal(dense(anew.composed()))


def of_many(vlm: VisionLanguageModel, count: int) -> History:
    """Edits of one key each, every one made with all earlier ones in the weight; the model ends unedited."""
    history, handle = History(), AppliedDelta(vlm)
    handle.keep([vlm.down_projection(LAYER).name])
    try:
        for number in range(count):
            edit = made(vlm, number, count=1, size=0.1)
            history = history.added(f"edit {number}", edit)
            edit.write(vlm)
    finally:
        handle.restore()
    return history


def sum_in_order(weight: Tensor, history: History, gone: int) -> Tensor:
    """The weight with every edit but one added by hand, each in float64 and rounded once."""
    for number, entry in enumerate(history.entries):
        if number != gone:
            weight = (weight.double() + dense(entry.delta)).to(weight.dtype)
    return weight


SIZES = [pytest.param(50, (0, 17, 49), id="50"), pytest.param(1000, (500, 950), id="1000", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("count", "dropped"), SIZES)
def test_any_edit_of_a_long_ledger_can_be_dropped_exactly(count, dropped, random_llama):
    """Its own factors go bit by bit, and solved anew the rest is the ledger that was never told of it."""
    vlm, name = random_llama, random_llama.down_projection(LAYER).name
    weights = bits(vlm)
    history = of_many(vlm, count)
    assert bits(vlm) == weights and len(history.names) == count
    handle = history.apply(vlm)
    assert bits(vlm) != weights
    handle.undo()
    assert bits(vlm) == weights
    before = vlm.weight(name).detach().clone()
    rows = {entry.name: [0, 1] for entry in history.entries}  # the edited key and the preserved one
    for number in dropped:
        less = history.without(f"edit {number}")
        with less.applied(vlm):
            assert vlm.weight(name).equal(sum_in_order(before, history, number))
        anew = less.resolved()
        wanted = from_the_start(history, {each: kept for each, kept in rows.items() if each != f"edit {number}"})
        found = sum(dense(entry.delta) for entry in anew.entries)
        scale = wanted.abs().max()
        assert (found - wanted).abs().max() < 1e-5 * scale and len(anew.names) == count - 1
        with anew.applied(vlm):
            torch.testing.assert_close((vlm.weight(name) - before).double(), wanted, rtol=0, atol=2e-5 * scale.item())
        unlike = sum(dense(entry.delta) for entry in less.entries if entry.dropped is None)
        assert number == count - 1 or (unlike - wanted).abs().max() > 1e-3 * scale
    assert bits(vlm) == weights


def test_an_edit_made_while_part_of_another_was_out_is_solved_anew_for_that(random_llava_llama):
    vlm = random_llava_llama
    history = History().added("a", made(vlm, 0)).without("a", request=0)
    with history.applied(vlm):
        history = history.added("b", made(vlm, 1))
    a, b = (entry.delta for entry in history.entries)
    (rest, last) = (next(iter(each.changes.values())) for each in (a.without(0), b))
    anew = history.resolved()
    first = solved(rest.keys, rest.residuals)
    asked = last.residuals.any(-1, keepdim=True)
    wanted = first + solved(last.keys, last.residuals + asked * (last.keys.double() @ (dense(a.without(0)) - first).T))
    assert (dense(anew.composed()) - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_an_edit_that_was_out_is_not_below_what_was_made_later(random_llama):
    vlm, history = random_llama, in_turn(random_llama, 2).without("a")
    with history.applied(vlm):
        history = history.added("c", made(vlm, 2))
    assert [history.below(entry) for entry in history.entries] == [{}, {"a": ()}, {"b": ()}]


def test_edits_made_side_by_side_are_left_as_they_are_by_resolving(random_llama):
    history = History().added("a", made(random_llama, 0)).added("b", made(random_llama, 1))
    anew = history.without("a").resolved()
    assert anew.entries == history.entries[1:]


def test_resolving_over_several_weights_is_refused(random_llama):
    vlm = random_llama
    history = History().added("a", made(vlm, 0))
    with history.applied(vlm):
        both = History().added("low", made(vlm, 2, layer=0)).composed()
        wide = replace(
            both,
            changes=dict(both.changes) | dict(made(vlm, 1).changes),
            fingerprints=dict(both.fingerprints) | dict(made(vlm, 1).fingerprints),
        )
    two = history.added("b", wide).without("a")
    with pytest.raises(EditError, match="edit again from the requests"):
        two.resolved()
    assert two.composed().changes.keys() == wide.changes.keys()


def test_verifying_says_which_edits_are_as_made_and_what_they_achieve(random_llava_llama):
    vlm = random_llava_llama
    weights, history = bits(vlm), in_turn(vlm)
    found = history.verify(vlm)
    assert [each.name for each in found] == ["a", "b", "c"] and all(each.as_made for each in found)
    ((_, share),) = found[0].retained.items()
    assert share.shape == (3,) and (share > 0.5).all()
    assert [each.as_made for each in history.without("a").verify(vlm)] == [False, False]
    assert bits(vlm) == weights


def assert_same(one: History, other: History) -> None:
    assert other.listing == one.listing and other.base == one.base and other.step == one.step
    for first, second in zip(one.entries, other.entries, strict=True):
        parts = ("name", "withdrawn", "dropped", "on_top", "step", "fingerprints")
        assert [getattr(first, part) for part in parts] == [getattr(second, part) for part in parts]
        assert one.below(first) == other.below(second)
        assert first.delta.words() == second.delta.words()
        assert all(torch.equal(value, second.delta.tensors()[name]) for name, value in first.delta.tensors().items())


def test_a_history_in_a_folder_is_the_same_history(vlm, tmp_path):
    history = in_turn(vlm).without("c").without("b", request=1)
    folder = tmp_path / "new" / "history"
    saved = history.saved(folder)
    for again in (saved, load_edit(folder), load_edit(folder / "index.jsonl")):
        assert_same(history, again)
    weights = vlm.down_projection(LAYER).name
    assert history.listing.splitlines() == [
        f"a  2 requests  {weights}  whole",
        f"b  1 requests  {weights}  without 1",
        f"c  2 requests  {weights}  taken out",
    ]
    assert isinstance(load_edit(history.composed().save(tmp_path / "delta.safetensors")), Delta)
    with pytest.raises(EditError, match="there already"):
        history.saved(folder)


def test_each_change_of_a_history_in_a_folder_is_one_more_line(random_llama, tmp_path):
    """Lines that are there stay byte for byte, and files of edits are never written again."""
    vlm, folder = random_llama, tmp_path / "history"
    kept, memory = History.open(folder), History()
    steps = [lambda history, seed=seed: history.added("abc"[seed], made(vlm, seed)) for seed in range(3)]
    steps += [lambda history: history.without("b"), lambda history: history.without("c", request=0)]
    steps += [lambda history: history.resolved()]
    before, files = b"", {}
    for count, change in enumerate(steps, start=1):
        kept, memory = change(kept), change(memory)
        index = (folder / "index.jsonl").read_bytes()
        assert index.startswith(before) and index.count(b"\n") == count + 1
        assert all((folder / name).read_bytes() == content for name, content in files.items())
        before = index
        files = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        assert_same(memory, kept)
        assert_same(memory, History.open(folder))
    assert len(files) == 4, "three edits, and one that was solved again"


def test_a_line_that_was_cut_short_is_left_out_with_a_warning_and_replaced(random_llama, tmp_path, caplog):
    """Whatever is left of the last line: the edits before it are there, and the next one can be added."""
    vlm, folder = random_llama, tmp_path / "history"
    two = History.open(folder).added("a", made(vlm, 0)).added("b", made(vlm, 1))
    whole, index = (folder / "index.jsonl").read_bytes(), folder / "index.jsonl"
    start = whole[:-1].rfind(b"\n") + 1
    for length in range(start, len(whole), 97):
        index.write_bytes(whole[:length])
        caplog.clear()
        one = History.open(folder)
        assert one.names == ("a",) and ("left out" in caplog.text) == (length > start)
        one.added("b", made(vlm, 1))
        assert index.read_bytes() == whole
    assert_same(two, History.open(folder))


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Whether a copy of this process was killed at the file operation of this number, before it was done with it."""
    child = os.fork()
    if child == 0:
        calls = iter(range(10**6))

        def watch(name: str, _arguments: Any) -> None:
            if name in ("open", "os.rename", "os.truncate") and next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        action()
        os._exit(7)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 7
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_file_operation_loses_at_most_the_edit_that_was_being_made(random_llama, tmp_path):
    vlm, folder = random_llama, tmp_path / "history"
    two, edit = History.open(folder).added("a", made(vlm, 0)).added("b", made(vlm, 1)), made(vlm, 2)
    for number in range(40):
        copy = shutil.copytree(folder, tmp_path / str(number))
        killed = killed_at(number, lambda copy=copy: History.open(copy).added("c", edit))
        left = History.open(copy)
        assert left.names == ("a", "b") if killed else ("a", "b", "c")
        if killed:
            assert_same(two, left)
            left = left.added("c", edit)
        assert left.names == History.open(copy).names == ("a", "b", "c")
        if not killed:
            break
    assert 4 < number < 39


def test_a_kill_while_the_first_edit_is_added_leaves_a_folder_that_can_be_used(random_llama, tmp_path, caplog):
    edit, files = made(random_llama, 0), 0
    for number in range(40):
        folder = tmp_path / str(number)
        killed = killed_at(number, lambda folder=folder: History.open(folder).added("a", edit))
        caplog.clear()
        left = History.open(folder)
        assert left.names == (() if killed else ("a",))
        if not killed:
            break
        stray = sorted(path.name for path in folder.glob("*.safetensors")) if folder.exists() else []
        files += len(stray)
        assert all(name in caplog.text for name in stray) and ("in no line of the index" in caplog.text) == bool(stray)
        assert_same(left.added("a", edit), History.open(folder))
    assert 4 < number < 39 and files > 0


def test_the_file_of_an_edit_without_a_line_is_named_until_its_edit_is_added_or_the_file_deleted(
    random_llama, tmp_path, caplog
):
    History.open(tmp_path).added("a", made(random_llama, 0)).added("b", made(random_llama, 1))
    cut_line(tmp_path / "index.jsonl", 2)
    (stray,) = tmp_path.glob("000001-*.safetensors")
    one = History.open(tmp_path)
    assert one.names == ("a",) and f"'{stray.name}'" in caplog.text and "in no line of the index" in caplog.text
    caplog.clear()
    assert_same(one.added("b", load_edit(stray)), History.open(tmp_path))
    assert not caplog.text and len(list(tmp_path.glob("*.safetensors"))) == 2
    cut_line(tmp_path / "index.jsonl", 2)
    other = History.open(tmp_path).added("c", made(random_llama, 2))
    caplog.clear()
    assert_same(other, History.open(tmp_path))
    assert f"'{stray.name}'" in caplog.text, "also after the next change"
    stray.unlink()
    caplog.clear()
    assert_same(other, History.open(tmp_path))
    assert not caplog.text


def test_a_history_without_the_file_of_an_edit_is_refused(random_llama, tmp_path):
    History.open(tmp_path).added("a", made(random_llama, 0)).added("b", made(random_llama, 1)).without("a")
    for name, pattern in (("a", "000000-*"), ("b", "000001-*")):
        (path,) = tmp_path.glob(pattern)
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(EditError, match=f"'{path.name}' of the edit '{name}' is missing in '.*'; restore it"):
            History.open(tmp_path)
        path.write_bytes(content)
    assert History.open(tmp_path).names == ("b",)


def test_an_old_value_of_a_history_in_a_folder_cannot_be_continued(random_llama, tmp_path):
    old = History.open(tmp_path / "history").added("a", made(random_llama, 0))
    new = old.added("b", made(random_llama, 1))
    with pytest.raises(EditError, match="open it again"):
        old.added("c", made(random_llama, 2))
    assert_same(new, History.open(tmp_path / "history"))
    assert old.in_memory().added("c", made(random_llama, 2)).names == ("a", "c")


DAMAGES = {
    "a bit of the index": lambda folder: flip(folder / "index.jsonl", 300),
    "a line taken out": lambda folder: cut_line(folder / "index.jsonl", 1),
    "no header": lambda folder: cut_line(folder / "index.jsonl", 0),
    "another version": lambda folder: relabel(folder / "index.jsonl"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_one_error_that_names_it(damage, random_llama, tmp_path):
    History.open(tmp_path).added("a", made(random_llama, 0)).added("b", made(random_llama, 1)).without("a")
    damage(tmp_path)
    with pytest.raises(EditError, match=r"line \d of .*index.jsonl.* is damaged"):
        History.open(tmp_path)


def test_an_index_that_lost_its_end_is_refused(random_llama, tmp_path):
    """One edit may be there without its line, since a crash can come between them; a second one cannot."""
    history, index = History.open(tmp_path), tmp_path / "index.jsonl"
    for number, name in enumerate("abc"):
        history = history.added(name, made(random_llama, number))
    whole = index.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for end, names in ((ends[3], "abc"), (ends[2], "ab")):
        index.write_bytes(whole[:end])
        assert History.open(tmp_path).names == tuple(names)
    for end in (0, ends[0] - 5, ends[0], ends[1] - 5, ends[1], ends[2] - 5):
        index.write_bytes(whole[:end])
        with pytest.raises(EditError, match="index.jsonl' has lost its end: it tells of . change"):
            History.open(tmp_path)
    index.write_bytes(whole[:-1] + b"\x0b")
    with pytest.raises(EditError, match="the last line of .* is damaged"):
        History.open(tmp_path)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def cut_line(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))


def relabel(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], *lines[1:]]))


def test_a_damaged_edit_of_a_history_is_found_when_it_is_used(random_llama, tmp_path):
    history = History.open(tmp_path).added("a", made(random_llama, 0)).added("b", made(random_llama, 1))
    one, other = sorted(tmp_path.glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(EditError, match="not the file of the edit 'a'"):
        history.composed()
    one.unlink()
    with pytest.raises(EditError, match="no file"):
        history.composed()
    one.write_bytes(content)
    assert history.composed().requests


def test_a_folder_of_something_else_is_no_history(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for use in (History.open, load_edit):
        with pytest.raises(EditError, match="is no history"):
            use(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_refusals_change_nothing(random_llama, random_gpt2, random_llava_llama):
    vlm, history = random_llama, in_turn(random_llama, 2)
    for other in (random_gpt2, random_llava_llama):
        weights = bits(other)
        with pytest.raises(EditError, match="does not fit"):
            history.apply(other)
        assert bits(other) == weights
    stranger = load(vlm.name, verify=False)
    with torch.no_grad():
        stranger.weight(stranger.down_projection(LAYER).name)[0, 0] += 1
    weights = bits(stranger)
    for use in (history.apply, history.verify):
        with pytest.raises(EditError, match="another model, precision or quantisation"):
            use(stranger)
    with pytest.raises(EditError, match="keep a history for each model"):
        history.added("c", replace(made(stranger, 3), model="another"))
    assert bits(stranger) == weights
    huge = history.added("c", made(vlm, 3, size=1e37)).added("d", made(vlm, 4, size=1e37))
    changes = {name: replace(each, right=each.right * 1e3) for name, each in huge.entries[2].delta.changes.items()}
    overflowing = history.added("c", replace(huge.entries[2].delta, changes=changes))
    weights = bits(vlm)
    with pytest.raises(EditError, match="overflows"):
        overflowing.apply(vlm)
    assert bits(vlm) == weights


BAD_USES = {
    "a name twice": (lambda history: history.added("a", history.entries[0].delta), "have one name"),
    "a name that is not there": (lambda history: history.without("z"), "there are: a, b"),
    "dropped twice": (lambda history: history.without("a").without("a"), "there are: b"),
    "a request out of range": (lambda history: history.without("a", request=5), "it has 2 requests"),
    "a request twice": (lambda history: history.without("a", request=0).without("a", request=0), "already taken out"),
    "nothing left to compose": (lambda history: history.without("a").without("b").composed(), "no edit is in effect"),
}


@pytest.mark.parametrize(("use", "message"), BAD_USES.values(), ids=BAD_USES)
def test_what_cannot_be_done_with_a_history_is_an_error(use, message, random_llama):
    with pytest.raises(EditError, match=message):
        use(in_turn(random_llama, 2))


def test_a_change_is_on_the_disk_before_the_history_counts_it(
    random_gpt2: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The file of an edit, the folder that names it, and then the line; a line is never ahead of its file."""
    flushed, fsync, folder = [], os.fsync, tmp_path / "history"

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        state = os.fstat(descriptor)
        paths = [path for path in (folder, *folder.iterdir()) if path.stat().st_ino == state.st_ino]
        flushed.append((paths[0].suffix, 0 if paths[0].is_dir() else state.st_size))

    monkeypatch.setattr(os, "fsync", noted)
    first = History.open(folder).added("a", made(random_gpt2, 0))
    second = first.without("a", request=0)
    size = next(folder.glob("*.safetensors")).stat().st_size
    assert flushed == [
        (".safetensors", size),
        ("", 0),
        ("", 0),
        (".jsonl", first.length),
        (".jsonl", second.length),
    ]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_line_whose_writing_fails_is_taken_back(failure, random_gpt2, tmp_path, monkeypatch):
    """The next change goes on from there, and a history that is opened anew knows nothing of the failed one."""
    first = History.open(tmp_path / "history").added("a", made(random_gpt2, 0))
    index, fsync = tmp_path / "history" / "index.jsonl", os.fsync
    whole, edit = index.read_bytes(), made(random_gpt2, 1)

    def failing(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == index.stat().st_ino:
            raise failure
        fsync(descriptor)

    with monkeypatch.context() as context, pytest.raises((EditError, KeyboardInterrupt)):
        context.setattr(os, "fsync", failing)
        first.added("b", edit)
    assert index.read_bytes() == whole
    assert History.open(tmp_path / "history").names == ("a",)
    assert first.added("b", edit).names == History.open(tmp_path / "history").names == ("a", "b")


def test_a_disk_that_takes_part_of_a_line_keeps_none_of_it(random_gpt2, tmp_path):
    first = History.open(tmp_path / "history").added("a", made(random_gpt2, 0))
    index = tmp_path / "history" / "index.jsonl"
    whole = index.read_bytes()
    limits, blocked = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))
    try:
        with pytest.raises(EditError, match="cannot add to '.*history': No space left"):
            first.without("a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, blocked)
    assert index.read_bytes() == whole and first.without("a").names == ()


def test_two_programs_that_add_at_one_moment_do_not_overwrite_each_other(random_gpt2, tmp_path):
    """The second one waits for the line of the first, and is told that the history is another one now."""
    first, edit = History.open(tmp_path / "history").added("a", made(random_gpt2, 0)), made(random_gpt2, 1)
    index, errors = tmp_path / "history" / "index.jsonl", []

    def add() -> None:
        try:
            first.added("b", edit)
        except EditError as error:
            errors.append(str(error))

    with index.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=add)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        other.write(index.read_bytes().splitlines(keepends=True)[-1])
    thread.join()
    assert len(errors) == 1 and "has changed since it was read" in errors[0]
    assert len(index.read_bytes().splitlines()) == 3


def test_a_history_that_cannot_be_saved_whole_leaves_no_folder(random_gpt2, tmp_path, monkeypatch):
    history, save = in_turn(random_gpt2, 2), Delta.save

    def second_fails(delta: Delta, path: Path) -> Path:
        if list(path.parent.iterdir()):
            raise EditError(f"cannot write {str(path)!r}: No space left on device")
        return save(delta, path)

    with monkeypatch.context() as context, pytest.raises(EditError, match=f"'{tmp_path}/copy/000001-.*No space left"):
        context.setattr(Delta, "save", second_fails)
        history.saved(tmp_path / "copy")
    assert not list(tmp_path.iterdir())
    assert_same(history.saved(tmp_path / "copy").added("c", made(random_gpt2, 3)), History.open(tmp_path / "copy"))


def test_a_history_all_of_whose_edits_were_taken_out_is_still_that_of_its_model(random_llama):
    """Without the refusal, the edit of another model would later go into this one without a word."""
    history = History().added("a", made(random_llama, 0)).without("a")
    other = load(random_llama.name, verify=False)
    with torch.no_grad():
        other.weight(other.down_projection(LAYER).name)[0, 0] += 1
    with (
        pytest.raises(EditError, match="another model, precision or quantisation"),
        MultEdit(layer=LAYER).start(other, history=history),
    ):
        pass
    with pytest.raises(EditError, match="keep a history for each model"):
        history.added("b", made(other, 1), on_top=False)
    with MultEdit(layer=LAYER).start(random_llama, history=history) as session:
        assert session.touched == ()


WORDS = {
    "name": 3,
    "digest": 5,
    "model": None,
    "fingerprints": [1],
    "requests": [3],
    "step": "x",
    "on_top": "yes",
    "dropped": "no",
    "gone": [["1", "z"]],
}


@pytest.mark.parametrize(("entry", "value"), WORDS.items(), ids=WORDS)
def test_a_line_with_values_of_other_types_is_damaged(entry, value, random_gpt2, tmp_path):
    """Also if its digest is right."""
    History.open(tmp_path).added("a", made(random_gpt2, 0))
    first, second = (tmp_path / "index.jsonl").read_bytes().splitlines()
    content = json.loads(json.loads(second)["content"])
    for words, is_refused in ((content | {entry: value}, True), (content, False)):
        body = json.dumps(words, sort_keys=True)
        line = json.dumps({"digest": digest(body), "content": body})
        (tmp_path / "index.jsonl").write_bytes(first + b"\n" + line.encode() + b"\n")
        with pytest.raises(EditError, match=r"line 2 of .* is damaged") if is_refused else nullcontext():
            History.open(tmp_path)
