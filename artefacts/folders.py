"""Files and folders that are replaced whole or not at all, with the permissions of the umask."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


class ArtefactError(ValueError):
    """Raised when a file, an average or a figure cannot be made or read; the message says what to do next."""


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
    except (OSError, SafetensorError, UnicodeEncodeError) as cause:
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
