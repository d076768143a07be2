"""Pictures from paths and PIL images: read as upright eight-bit RGB on white, or inspected without being decoded.

A picture of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89,478,485 unless a program sets it) is refused before
memory is allocated for its pixels. `multrace.data.megapixel_limit(200)` is a `with` block that raises the limit for
larger pictures that you trust; `megapixel_limit(None)` removes it. Pictures below the limit are read in full: a picture
that PIL reduces while it reads it gives the model other pixels.
"""

import ctypes
import logging
import math
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps

from .errors import DataError, gist, quoted, reason

_TIFF_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
"""What libtiff calls with the part of it that has a message, the message's format, and the format's arguments."""
Picture = str | PathLike[str] | Image.Image

_LONGEST_NAME = 255
"""Maximum number of characters in a file name."""
_BRIGHTEST = 2**16 - 1
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
"""Formats whose grey pictures PIL opens as 32-bit integers (mode "I") that hold 0 to 65535."""
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 262, 274  # TIFF and EXIF tags
_BLACK_IS_ZERO = 1
_ON_ITS_SIDE = range(5, 9)
"""Values of the orientation tag that exchange width and height."""
_WHOLE = "is it a whole image file?"
_QUIET = threading.Lock()
"""Held while the ways of warnings and messages are changed, which threads share: they would restore each other's."""


@contextmanager
def megapixel_limit(megapixels: float | None) -> Iterator[None]:
    """Read pictures of up to so many million pixels inside the block; None removes the limit.

    The limit is PIL's own, `PIL.Image.MAX_IMAGE_PIXELS`, which all threads share; it is put back when the block ends.
    Raises `DataError` unless the limit is a number above 0.

    Example:
        >>> from multrace.data import inspect_picture, megapixel_limit
        >>> from PIL import Image
        >>> Image.new("L", (2000, 1000)).save("large.png")
        >>> with megapixel_limit(1.5):
        ...     inspect_picture("large.png").problem
        "cannot read picture 'large.png': it has 2.0 megapixels, more than the limit of 1.5 megapixels; make it \
smaller, or raise the limit (--megapixels, or multrace.data.megapixel_limit) if you trust it"
    """
    is_number = isinstance(megapixels, int | float) and not isinstance(megapixels, bool)
    if megapixels is not None and not (is_number and 0 < megapixels < math.inf):
        raise DataError(f"the limit of megapixels is {megapixels!r}; pass a number above 0, or None for no limit")
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if megapixels is None else max(1, round(megapixels * 1e6))
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """What the header of a picture file says. Made by `inspect_picture`."""

    path: Path
    size: tuple[int, int] | None = None
    """Width and height in pixels, after the turn that the EXIF data ask for; None if unknown."""
    mode: str | None = None
    """PIL's name of the colour mode, such as "RGB"; None if unknown."""
    format: str | None = None
    """PIL's name of the file format, such as "JPEG"; None if unknown."""
    frames: int = 1
    """Number of frames or pages of the file, of which the first one is shown."""
    turned: bool = False
    """True if the EXIF data turn or mirror the picture."""
    transparent: bool = False
    """True if the picture can have transparent pixels, which are shown as white."""
    sixteen_bit: bool = False
    """True for a grey picture of 16 bits, which is scaled to 8 bits."""
    megapixels: float | None = None
    """Number of pixels in millions; None if unknown."""
    problem: str | None = None
    """Why the picture cannot be used, and what to do; None if nothing is wrong with its header."""


def inspect_picture(path: str | PathLike[str]) -> PictureFacts:
    """Return what the header of a picture file says; the pixels are not decoded, so damage in them is not noticed.

    Nor are EXIF data that a PNG stores behind its pixels.

    Example:
        >>> from PIL import Image
        >>> from multrace.data import inspect_picture
        >>> Image.new("LA", (40, 30)).save("photo.png")
        >>> facts = inspect_picture("photo.png")
        >>> facts.size, facts.mode, facts.transparent, facts.problem
        ((40, 30), 'LA', True, None)
        >>> inspect_picture("missing.png").problem
        "no picture at 'missing.png' (No such file or directory); pass the path of an image file"
    """
    try:
        with _opened(path) as (image, name):
            return _facts(Path(path), image, name)
    except DataError as error:
        return PictureFacts(path=Path(path), megapixels=_claimed(error.__cause__), problem=str(error))


def read_pictures(image: Picture | Sequence[Picture] | None) -> tuple[Image.Image, ...]:
    """Return the pictures as RGB images, fully read and turned upright by their EXIF tag.

    - A file with several frames or pages (GIF, WebP, TIFF) gives the first one; an open PIL image gives its current
      frame.
    - Transparent pixels become white, however the mode encodes transparency (an alpha channel, a palette, one colour).
    - Grey pictures of 16 bits are scaled to 8 bits. Modes of integers and floating-point numbers without a fixed range
      ("I" and "F") raise `DataError`, since their value for white is unknown.
    - CMYK and other colour modes are converted by PIL; colour profiles are not applied.

    Args:
        image: A path, a PIL image, a sequence of these, or None for no picture.

    Returns:
        One image per picture, in the order given.

    Raises:
        DataError: A picture is of another type (bytes, arrays, open files), a URL or base64 text, a file that is
            missing, damaged or not a picture, or a PIL image whose file was closed before it was read; or it has no
            pixels, or more than `PIL.Image.MAX_IMAGE_PIXELS` (89 million, or what `megapixel_limit` sets).
    """
    if image is None:
        return ()
    if isinstance(image, str | PathLike | Image.Image):
        return (_read(image),)
    if not isinstance(image, Sequence) or isinstance(image, bytes | bytearray | memoryview):
        raise _wrong_type(image)
    return tuple(_read(item) for item in image)


def _read(picture: Picture) -> Image.Image:
    if not isinstance(picture, Image.Image):
        with _opened(picture) as (image, name):
            return _converted(image, name)
    name = repr(str(getattr(picture, "filename", "") or "the picture"))
    with _reading(name, "was its file closed before it was read? Pass the path, or call load() while it is open"):
        return _converted(picture, name)


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[tuple[Image.Image, str]]:
    """Yield the image of a file, not yet decoded, and its name for messages."""
    if not isinstance(path, str | PathLike):
        raise _wrong_type(path)
    try:
        file = _existing(os.fsdecode(path))
    except TypeError as error:  # its __fspath__ does not return text
        raise _wrong_type(path) from error
    name = repr(str(file))
    with _reading(name, _WHOLE), _header(file) as image:
        yield image, name


def _header(file: Path) -> Image.Image:
    """Return a file's image, not yet decoded. PIL warns above its limit and raises above twice that; both raise."""
    with _quiet():
        return Image.open(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Raise PIL's warning of too many pixels, and drop its other warnings and log records, which are about damage."""
    logger = logging.getLogger("PIL.TiffImagePlugin")
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        was_disabled, logger.disabled = logger.disabled, True
        try:
            yield
        finally:
            logger.disabled = was_disabled


def _existing(text: str) -> Path:
    """Return the path of a file; raise `DataError`, which says what the text is, if it is not one."""
    try:
        mode = os.stat(text).st_mode
    except (OSError, ValueError) as error:  # a null character is a ValueError
        raise DataError(_not_a_path(text, error)) from error
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise DataError(f"no picture at {text!r}: it is {found}; pass the path of an image file")
    return Path(text)


def _not_a_path(text: str, error: Exception) -> str:
    if text.startswith("data:") or len(text) > _LONGEST_NAME:
        return (
            f"a picture cannot be {quoted(text)}, a text of {len(text)} characters; decode base64 text and pass "
            "Image.open(io.BytesIO(base64.b64decode(text)))"
        )
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text):
        strokes = "///" if match[1].lower() == "file" else "//"  # of which a path keeps one
        address = f"{match[1]}:{strokes}{text[match.end() :]}"
        return f"a picture cannot be the URL {quoted(address)}; fetch it and pass the path of the file"
    found = getattr(error, "strerror", None) or gist(error)
    near = next((each for each in _near(text) if os.path.exists(each)), None)
    hint = "" if near is None else f", but one at {near!r}"
    return f"no picture at {quoted(text)} ({found}){hint}; pass the path of an image file"


def _near(text: str) -> Iterator[str]:
    """Yield names that are often meant by this one: its suffix in the other case, %20 decoded, a home folder named."""
    stem, suffix = os.path.splitext(text)
    yield from (stem + each for each in (suffix.lower(), suffix.upper()) if each != suffix)
    yield from (each for each in (unquote(text), os.path.expanduser(text)) if each != text and "\0" not in each)


def _wrong_type(image: object) -> DataError:
    return DataError(
        f"a picture cannot be of type {type(image).__name__}; pass a path, a PIL image (Image.fromarray makes one of "
        "an array, Image.open of an open file or of io.BytesIO(encoded bytes)), a list of them, or None"
    )


@contextmanager
def _reading(name: str, advice: str) -> Iterator[None]:
    """Turn every error that PIL raises inside the block, while it reads this picture, into a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, _claimed(error)) from error
    except Exception as error:  # decoders raise ValueError, SyntaxError, struct.error, AssertionError, ... on damage
        raise DataError(f"cannot read picture {name}: {reason(error)}; {advice}") from error


def _claimed(error: BaseException | None) -> float | None:
    """Return the megapixels that an error or warning of PIL about too many pixels names, else None."""
    if not isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return None
    number = re.search(r"(\d+) pixels", str(error))
    return int(number[1]) / 1e6 if number else None


def _too_large(name: str, megapixels: float | None) -> DataError:
    size = "more" if megapixels is None else f"{megapixels:.1f} megapixels, more"
    limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.1f}"
    return DataError(
        f"cannot read picture {name}: it has {size} than the limit of {limit} megapixels; make it smaller, or raise "
        "the limit (--megapixels, or multrace.data.megapixel_limit) if you trust it"
    )


def _check_size(image: Image.Image, name: str) -> None:
    if 0 in image.size:
        raise DataError(f"cannot use picture {name}: it has no pixels (size {image.size}); pass another one")
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise _too_large(name, pixels / 1e6)


def _check_range(image: Image.Image, name: str) -> None:
    """Raise `DataError` if the value for white is unknown."""
    if _is_sixteen_bit(image):
        tags = getattr(image, "tag_v2", {})
        if tags.get(_BITS, (16,)) != (16,) or tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO) != _BLACK_IS_ZERO:
            raise DataError(
                f"cannot use picture {name}: a grey TIFF must have 8 or 16 bits and store black as 0; save it as PNG"
            )
    elif image.mode in ("I", "F"):
        raise DataError(
            f"cannot use picture {name}: its mode {image.mode!r} has numbers without a fixed range; scale them to 0 "
            "for black and 255 for white, and pass Image.fromarray(array.astype('uint8'))"
        )


def _is_sixteen_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS


def _facts(path: Path, image: Image.Image, name: str) -> PictureFacts:
    turn = _orientation(image)
    width, height = image.size
    if tags := getattr(image, "tag_v2", None):  # newer versions of PIL swap the two when they open a turned TIFF
        width, height = tags[_WIDTH], tags[_HEIGHT]
    problem = None
    try:
        _check_size(image, name)
        _check_range(image, name)
    except DataError as error:
        problem = str(error)
    return PictureFacts(
        path=path,
        size=(height, width) if turn in _ON_ITS_SIDE else (width, height),
        mode=image.mode,
        format=image.format,
        frames=_frames(image),
        turned=turn != 1,
        transparent=image.has_transparency_data,
        sixteen_bit=_is_sixteen_bit(image),
        megapixels=width * height / 1e6,
        problem=problem,
    )


def _frames(image: Image.Image) -> int:
    """Return the number of frames; 1 if the file is too damaged to count them."""
    try:
        with _quiet():
            return getattr(image, "n_frames", 1)
    except Exception:  # as many kinds of errors as in reading; the first frame may still be whole
        return 1


def _orientation(image: Image.Image) -> int:
    """Return the orientation tag; 1 for upright if there is none or, as in picture viewers, if the EXIF are damaged."""
    try:
        with _quiet():
            # A PNG's own getexif decodes the whole picture first, to look for data behind it.
            turn = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error):
        return 1
    return turn if turn in range(1, 9) else 1


def _converted(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    with _tiff_damage(name) if image.format == "TIFF" else nullcontext():
        image.load()
    _check_size(image, name)  # a file of icons decodes one of another size than its header names
    _check_range(image, name)
    upright = _upright(image)
    if _is_sixteen_bit(image):
        return _eight_bits(image, upright).convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


@contextmanager
def _tiff_damage(name: str) -> Iterator[None]:
    """Raise `DataError` if libtiff finds damage inside the block.

    libtiff goes on after some kinds of damage and writes its messages to the standard error stream of the process.
    """
    parts: list[str] = []
    note = _TIFF_HANDLER(lambda part, *_: parts.append((part or b"").decode("ascii", "replace")))
    ignore = _TIFF_HANDLER(lambda *_: None)
    library = ctypes.CDLL(Image.core.__file__)
    with _quiet(), ExitStack() as stack:
        for setter, handler in (("TIFFSetErrorHandler", note), ("TIFFSetWarningHandler", ignore)):
            if hasattr(library, setter):  # it is absent where PIL is built with a libtiff of its own inside
                replace = getattr(library, setter)
                replace.argtypes, replace.restype = [ctypes.c_void_p], ctypes.c_void_p
                before = replace(ctypes.cast(handler, ctypes.c_void_p))
                stack.callback(replace, before)
        yield
    if parts:
        raise DataError(f"cannot read picture {name}: libtiff finds it damaged ({parts[0][:40]}); {_WHOLE}")


def _upright(image: Image.Image) -> Image.Image:
    """Return the picture turned by its EXIF tag; the same object if there is nothing to turn."""
    try:
        if _orientation(image) == 1:
            return image
        with _quiet():
            return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, struct.error):
        return image


def _eight_bits(image: Image.Image, upright: Image.Image) -> Image.Image:
    """Return the 16-bit grey picture rounded to 8 bits."""
    values = np.asarray(upright).astype(np.uint32)
    transparent = image.info.get("transparency")
    if transparent is not None:
        values = np.where(values == transparent, _BRIGHTEST, values)
    return Image.fromarray(((values * 255 + _BRIGHTEST // 2) // _BRIGHTEST).astype(np.uint8))
