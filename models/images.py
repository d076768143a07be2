"""Pictures from paths and PIL images, read completely and converted to upright eight-bit RGB on white."""

import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import ModelError, gist, quoted, reason

Picture = str | PathLike[str] | Image.Image

_LONGEST_NAME = 255
"""Maximum number of characters in a file name."""
_BRIGHTEST = 2**16 - 1
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
"""Formats whose grey pictures PIL opens as 32-bit integers (mode "I") that hold 0 to 65535."""
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags
_BLACK_IS_ZERO = 1


def open_images(image: Picture | Sequence[Picture] | None) -> tuple[Image.Image, ...]:
    """Return the pictures as RGB images, fully read and turned upright by their EXIF tag.

    - A file with several frames or pages (GIF, WebP, TIFF) gives the first one; an open PIL image gives its current
      frame.
    - Transparent pixels become white, however the mode encodes transparency (an alpha channel, a palette, one colour).
    - Grey pictures of 16 bits are scaled to 8 bits. Modes of integers and floating-point numbers without a fixed range
      ("I" and "F") raise `ModelError`, since their value for white is unknown.
    - CMYK and other colour modes are converted by PIL; colour profiles are not applied.

    Args:
        image: a path, a PIL image, a sequence of these, or None for no picture.

    Returns:
        One image per picture, in the order given.

    Raises:
        ModelError: for a picture of another type (bytes, arrays, open files), a URL or base64 text, a file that is
            missing, damaged or not a picture, a PIL image whose file was closed before it was read, a picture without
            pixels, and one of more than 179 million pixels, which PIL does not open (its own warning starts at half
            as many).
    """
    if image is None:
        return ()
    if isinstance(image, str | PathLike | Image.Image):
        return (_open(image),)
    if not isinstance(image, Sequence) or isinstance(image, bytes | bytearray | memoryview):
        raise _wrong_type(image)
    return tuple(_open(item) for item in image)


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        name = repr(str(getattr(image, "filename", "") or "the picture"))
        with _reading(name, "was its file closed before it was read? Pass the path, or call load() while it is open"):
            return _read(image, name)
    if not isinstance(image, str | PathLike):
        raise _wrong_type(image)
    try:
        path = _existing(os.fsdecode(image))
    except TypeError as error:  # its __fspath__ does not return text
        raise _wrong_type(image) from error
    name = repr(str(path))
    with _reading(name, "is it a whole image file?"), Image.open(path) as opened:
        return _read(opened, name)


def _existing(text: str) -> Path:
    """Return the path of a file; raise `ModelError`, which says what the text is, if it is not one."""
    try:
        mode = os.stat(text).st_mode
    except (OSError, ValueError) as error:  # a null character is a ValueError
        raise ModelError(_not_a_path(text, error)) from error
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise ModelError(f"no picture at {text!r}: it is {found}; pass the path of an image file")
    return Path(text)


def _not_a_path(text: str, error: Exception) -> str:
    if text.startswith("data:") or len(text) > _LONGEST_NAME:
        return (
            f"a picture cannot be {quoted(text)}, a text of {len(text)} characters; decode base64 text and pass "
            "Image.open(io.BytesIO(base64.b64decode(text)))"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        return f"a picture cannot be the URL {quoted(text)}; fetch it and pass the path of the file"
    found = getattr(error, "strerror", None) or gist(error)
    return f"no picture at {quoted(text)} ({found}); pass the path of an image file"


def _wrong_type(image: object) -> ModelError:
    return ModelError(
        f"a picture cannot be of type {type(image).__name__}; pass a path, a PIL image (Image.fromarray makes one of "
        "an array, Image.open of an open file or of io.BytesIO(encoded bytes)), a list of them, or None"
    )


@contextmanager
def _reading(name: str, advice: str) -> Iterator[None]:
    """Turn every error that PIL raises inside the block, while it reads this picture, into a `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Image.DecompressionBombError as error:
        raise ModelError(
            f"cannot read picture {name}: it has more pixels than PIL opens ({gist(error)}); make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except Exception as error:  # decoders raise ValueError, SyntaxError, struct.error, AssertionError, ... on damage
        raise ModelError(f"cannot read picture {name}: {reason(error)}; {advice}") from error


def _read(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ModelError(f"cannot use picture {name}: it has no pixels (size {image.size}); pass another one")
    image.load()
    upright = _upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        return _eight_bits(image, upright, name).convert("RGB")
    if image.mode in ("I", "F"):
        raise ModelError(
            f"cannot use picture {name}: its mode {image.mode!r} has numbers without a fixed range; scale them to 0 "
            "for black and 255 for white, and pass Image.fromarray(array.astype('uint8'))"
        )
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Return the picture turned by its EXIF tag, or unchanged, as in picture viewers, if its EXIF data are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, struct.error):
        return image


def _eight_bits(image: Image.Image, upright: Image.Image, name: str) -> Image.Image:
    """Return the 16-bit grey picture rounded to 8 bits."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS, (16,)) != (16,) or tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO) != _BLACK_IS_ZERO:
        raise ModelError(
            f"cannot use picture {name}: a grey TIFF must have 8 or 16 bits and store black as 0; save it as PNG"
        )
    values = np.asarray(upright).astype(np.uint32)
    transparent = image.info.get("transparency")
    if transparent is not None:
        values = np.where(values == transparent, _BRIGHTEST, values)
    return Image.fromarray(((values * 255 + _BRIGHTEST // 2) // _BRIGHTEST).astype(np.uint8))
