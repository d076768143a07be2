"""Pictures from paths or PIL, opened whole."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from PIL import Image, ImageOps

from .errors import ModelError

Picture = str | PathLike[str] | Image.Image


def open_images(image: Picture | Sequence[Picture] | None) -> tuple[Image.Image, ...]:
    """The pictures in RGB, upright by their EXIF tag and fully read; ModelError for what is none or cannot be read."""
    if image is None:
        return ()
    if isinstance(image, str | PathLike | Image.Image):
        return (_open(image),)
    if not isinstance(image, Sequence) or isinstance(image, bytes | bytearray):
        raise _wrong_type(image)
    return tuple(_open(each) for each in image)


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return _read(image, getattr(image, "filename", "") or "the picture")
    if not isinstance(image, str | PathLike):
        raise _wrong_type(image)
    path = Path(image)
    if not path.is_file():
        raise ModelError(f"no picture at {str(image)!r}; pass the path of an image file")
    try:
        with Image.open(path) as opened:
            return _read(opened, str(path))
    except OSError as error:  # PIL's UnidentifiedImageError is one too
        raise ModelError(f"cannot read picture {str(path)!r}: {error}; is it a whole image file?") from error


def _wrong_type(image: object) -> ModelError:
    return ModelError(
        f"a picture cannot be of type {type(image).__name__}; pass a path, a PIL image (Image.fromarray makes one of "
        "an array), a list of them, or None"
    )


def _read(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ModelError(f"cannot use picture {name!r}: it has no pixels (size {image.size}); pass another one")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError) as error:  # a truncated PNG is a SyntaxError in PIL
        raise ModelError(f"cannot read picture {name!r}: {error}; is it a whole image file?") from error
