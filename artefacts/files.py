"""Files that are written completely or not at all, with the umask's permissions and equal bytes for equal content."""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ArtefactError

LAYOUT = "layout"
"""The header entry of a safetensors file that says what the file holds, and in which version."""


@contextmanager
def replacing(path: str | Path, *, error: type[ValueError] = ArtefactError) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an error.

    Missing folders are created. A reader never sees half a file, and a failure leaves the previous file intact. The
    temporary file already exists, empty and with the permissions of the umask, when the block starts.

    Args:
        path: the file to write.
        error: the class to raise if the file or its folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"cannot write {str(path)!r}: {reason}; choose a folder that you may write to") from cause
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: bytes, *, error: type[ValueError] = ArtefactError) -> Path:
    """Write the content and return the path. Raises `error` if the file cannot be written."""
    with replacing(path, error=error) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    text: Mapping[str, str],
    *,
    error: type[ValueError] = ArtefactError,
) -> Path:
    """Write a safetensors file and return its path; equal tensors and text give equal bytes.

    Args:
        path: the file to write.
        tensors: the tensors by name; they may share memory or be strided, because copies are written.
        text: the metadata of the header.
        error: the class to raise if the file cannot be written.

    Returns:
        The path of the written file.

    Example:
        >>> import torch
        >>> from multrace.artefacts import read_tensors, write_tensors
        >>> path = write_tensors("numbers.safetensors", {"x": torch.ones(2)}, {"layout": "numbers 1"})
        >>> read_tensors(path)
        ({'x': tensor([1., 1.])}, {'layout': 'numbers 1'})
    """
    own = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    with replacing(path, error=error) as temporary:
        mode = temporary.stat().st_mode
        save_file(own, temporary, metadata=dict(text))
        temporary.chmod(mode)  # safetensors creates files that only their owner may read
        _sort_header(temporary)
    return Path(path)


def read_tensors(
    path: str | Path, *, error: type[ValueError] = ArtefactError
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises `error` if it is missing or damaged."""
    if not Path(path).is_file():
        raise error(f"no file {str(path)!r}; pass a file that `save` has written")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as cause:
        raise error(
            f"{str(path)!r} is not a readable safetensors file ({cause}); make it again, or pass another file"
        ) from cause


def digest(*parts: bytes | str | Tensor) -> str:
    """Return the SHA-256 of bytes, texts and tensors (dtype, shape and values), as hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        content = part.encode() if isinstance(part, str) else part
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()


def _sort_header(path: Path) -> None:
    """Sort the metadata of a safetensors file by name; the library writes it in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        header = ({"__metadata__": metadata} if metadata else {}) | header
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(content) <= length, "the same header is never longer"
        file.seek(8)
        file.write(content.ljust(length))
