"""Files that belong together change together, whenever a process is killed, a disk is full or a folder goes."""

import os
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from multrace.artefacts import (
    ArtefactError,
    folders,
    one_at_a_time,
    remove_leftovers,
    replacing,
    replacing_files,
    replacing_folder,
    write_tensors,
    write_whole,
)

OLD, NEW = {"edit": "Lisbon", "report": "Lisbon", "extra": "Lisbon"}, {"edit": "Berlin", "report": "Berlin"}


def contents(folder: Path) -> dict[str, str]:
    """Name and text of each file, hidden ones included; a folder counts as empty text."""
    return {path.name: path.read_text() if path.is_file() else "" for path in folder.iterdir()}


def write_set(folder: Path, texts: dict[str, str], **more: Any) -> None:
    with replacing_files(folder, **more) as new:
        for name, text in texts.items():
            (new / name).write_text(text)


def in_child(action: Callable[[], object]) -> int:
    """Return the wait status of a child process that runs the action."""
    child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Run the action in a child that is killed before its n-th step on the file system; return whether it was."""

    def act() -> None:
        count = 0

        def kill(event: str, _: object) -> None:
            nonlocal count
            if event.startswith(("os.", "shutil.", "ctypes.")) or event == "open":
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        action()

    status = in_child(act)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def aged(folder: Path) -> None:
    """Everything in the folder is ten seconds old."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - 10, time.time() - 10), follow_symlinks=False)


def test_files_of_a_set_are_replaced_together_and_others_stay(tmp_path):
    write_set(tmp_path / "deep" / "out", OLD | {"map_1.png": "1", "map_2.png": "2"})
    (tmp_path / "deep" / "out" / "notes.txt").write_text("mine")
    write_set(tmp_path / "deep" / "out", NEW | {"map_2.png": "3"}, stale=["extra", "map_*.png", "absent"])
    assert contents(tmp_path / "deep" / "out") == NEW | {"map_2.png": "3", "notes.txt": "mine"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_folder_with_folders_keeps_them(tmp_path):
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "first").write_text("one")
    write_set(tmp_path, OLD)
    write_set(tmp_path, NEW, stale=["ext*", "quest*"])
    assert contents(tmp_path) == NEW | {"questions": ""} and (tmp_path / "questions" / "first").read_text() == "one"


def test_the_current_folder_stays_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    write_set(Path(), OLD)
    write_set(Path(), NEW, stale=["extra"])
    assert contents(Path()) == NEW and tmp_path.stat().st_ino == before


def test_a_whole_folder_is_replaced_with_all_that_was_in_it(tmp_path):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with replacing_folder(tmp_path / "link") as new:
        (new / "config").write_text("{}")
    assert contents(tmp_path / "model") == {"config": "{}"} and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


@pytest.mark.parametrize("write", [replacing_files, replacing_folder])
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_new_folders_have_the_permissions_of_the_umask_and_old_ones_keep_theirs(write, mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        for folder in (tmp_path / "a" / "b", tmp_path / "c"):
            with write(folder) as new:
                write_tensors(new / "t", {"x": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a", tmp_path / "c")] == [mode, mode]
    assert stat.S_IMODE((tmp_path / "c" / "t").stat().st_mode) == mode & 0o666
    (tmp_path / "c").chmod(0o711)
    with write(tmp_path / "c"):
        pass
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o711


@pytest.mark.parametrize("way", ["exchanged", "two renames", "one by one"])
def test_a_kill_at_any_step_leaves_the_old_set_or_the_new_one(way, tmp_path, monkeypatch):
    if way == "two renames":
        monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)
    step, seen = 0, set()
    while True:
        step, out = step + 1, tmp_path / f"{step}" / "out"
        write_set(out, OLD)
        if way == "one by one":
            (out / "folder").mkdir()
        is_killed = killed_at(step, lambda out=out: write_set(out, NEW, stale=["extra"]))
        shown = {name: text for name, text in contents(out).items() if text} if out.exists() else {}
        if way == "exchanged":
            assert shown in (OLD, NEW)
        aged(out.parent)
        remove_leftovers(out)
        left = {name: text for name, text in contents(out).items() if name != "folder"}
        assert left in (OLD, NEW) and [path.name for path in out.parent.iterdir()] == ["out"], step
        seen.add(len(left))
        if not is_killed:
            break
    assert seen == {2, 3} and step > 10 and left == NEW


def test_leftovers_of_a_killed_writer_go_with_the_next_one_and_those_of_a_living_one_stay(tmp_path):
    out = tmp_path / "out"
    for write in (replacing_files, replacing_folder):
        with write(out):
            aged(tmp_path)
            with write(out) as inner:
                (inner / "second").write_text("2")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for write in (lambda: write_set(out, NEW), lambda: write_whole(out / "file", b"x" * 10)):
        killed_at(8, write)
    aged(tmp_path)
    write_set(out, NEW)
    assert contents(out).keys() - {"second", "file"} == NEW.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


STALE = {
    "another folder's": '["../precious", "old"]',
    "cut short": '["old"',
    "a number": "3",
    "numbers": "[3]",
    "no name": '["a\\u0000"]',
}


@pytest.mark.parametrize("text", STALE.values(), ids=STALE)
def test_a_list_of_stale_files_reaches_no_other_folder_and_stops_nobody(text, tmp_path):
    out, work = tmp_path / "out", tmp_path / "out" / ".multrace.abcdefgh.ready"
    (work / "new").mkdir(parents=True)
    (work / "stale.json").write_text(text)
    for path in (tmp_path / "precious", out / "old"):
        path.write_text("kept")
    aged(tmp_path)
    write_set(out, NEW)
    assert (tmp_path / "precious").read_text() == "kept"
    assert contents(out) == NEW | ({} if text.endswith('"old"]') else {"old": "kept"})


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError], ids=str)
def test_an_interrupt_between_two_renames_leaves_the_old_folder(failure, tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    write_set(out, OLD)

    def stopped(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise failure
        return rename(path, target)

    monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises((KeyboardInterrupt, ArtefactError)), replacing_folder(out) as new:
        (new / "edit").write_text("Berlin")
    assert contents(out) == OLD and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b"])
def test_what_names_no_file_is_an_error_that_says_so(name):
    with pytest.raises(ArtefactError, match="this is no name of a file"):
        write_whole(name, b"")


@pytest.mark.parametrize("write", [replacing_files, replacing_folder])
def test_an_error_in_the_block_leaves_everything_as_it_was(write, tmp_path):
    write_set(tmp_path / "out", OLD)
    for folder in (tmp_path / "out", tmp_path / "new" / "deep"):
        with pytest.raises(KeyError), write(folder) as new:
            (new / "edit").write_text("Berlin")
            raise KeyError("interrupted")
    assert contents(tmp_path / "out") == OLD and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("write", [replacing_files, replacing_folder])
@pytest.mark.parametrize("kind", ["tensors", "whole", "text"])
def test_a_full_disk_names_the_folder_that_the_caller_gave(write, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_set(Path("out"), OLD)
    writers = {
        "tensors": lambda folder: write_tensors(folder / "edit", {"x": torch.ones(10**6)}, {}),
        "whole": lambda folder: write_whole(folder / "edit", bytes(10**6)),
        "text": lambda folder: (folder / "edit").write_text("x" * 10**6),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
    try:
        with pytest.raises(ArtefactError, match="cannot write 'out.*File too large.*choose a folder") as caught:
            with write("out") as new:
                writers[kind](new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ".part" not in str(caught.value)
    assert contents(tmp_path / "out") == OLD and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_vanished_with_its_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ArtefactError, match=r"cannot write '[^']*out/report.json': No such file"):
        with replacing(tmp_path / "out" / "report.json") as temporary:
            shutil.rmtree(tmp_path / "out")
            temporary.write_text("text") if temporary.parent.exists() else None
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_vanished_is_made_again_and_one_without_a_place_is_an_error(tmp_path):
    write_set(tmp_path / "run" / "out", OLD)
    with replacing_files(tmp_path / "run" / "out") as new:
        (new / "edit").write_text("Berlin")
        shutil.rmtree(tmp_path / "run" / "out")
    assert contents(tmp_path / "run" / "out") == {"edit": "Berlin"}
    with pytest.raises(ArtefactError, match="cannot write '[^']*run/out': No such file or directory; choose a folder"):
        with replacing_files(tmp_path / "run" / "out") as new:
            shutil.rmtree(tmp_path / "run")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("write", [replacing_files, replacing_folder])
def test_places_that_cannot_hold_a_folder_are_refused_and_kept(write, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(ArtefactError, match=f"cannot write '{folder}': Not a directory; choose a folder"):
            with write(folder):
                pass
        with pytest.raises(LookupError), write(folder, error=LookupErrorOfValue):
            pass
    assert contents(tmp_path) == {"file": "in the way"}


class LookupErrorOfValue(ValueError, LookupError):
    """An error class of another room."""


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_moves(tmp_path):
    write_set(tmp_path / "out", OLD)
    (tmp_path / "out" / "zebra").mkdir()
    with pytest.raises(ArtefactError, match="Is a directory"):
        write_set(tmp_path / "out", NEW | {"zebra": "x"}, stale=["extra"])
    assert contents(tmp_path / "out") == OLD | {"zebra": ""}


def test_a_file_that_the_block_reads_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError), replacing_files(tmp_path / "out"):
        (tmp_path / "picture.png").read_bytes()
    assert not [*tmp_path.iterdir()]


def test_processes_that_make_folders_beside_each_other_take_turns(tmp_path):
    """Only the second entrant waits, and only until the first has left or died; another parent is not locked."""
    (tmp_path / "elsewhere").mkdir()

    def ends(folder: Path, *, within: float = 30.0) -> bool:
        """Whether a process that enters for this folder gets through within these seconds."""
        child = os.fork()
        if not child:
            with one_at_a_time(folder):
                os._exit(0)
        until = time.monotonic() + within
        while time.monotonic() < until:
            if os.waitpid(child, os.WNOHANG)[0]:
                return True
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False

    with one_at_a_time(tmp_path / "one"):
        assert not ends(tmp_path / "two", within=0.5) and ends(tmp_path / "elsewhere" / "two")
    assert ends(tmp_path / "two")
    assert in_child(lambda: one_at_a_time(tmp_path / "one").__enter__() or os.kill(os.getpid(), signal.SIGKILL)) != 0
    assert ends(tmp_path / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
