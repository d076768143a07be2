"""Pictures for prompts, with the errors of the models."""

from collections.abc import Sequence

from PIL import Image

from ..data.errors import DataError
from ..data.pictures import Picture, read_pictures
from .errors import ModelError


def open_images(image: Picture | Sequence[Picture] | None) -> tuple[Image.Image, ...]:
    """Return the pictures as `data.read_pictures` does: RGB, fully read, upright, transparent pixels white.

    Args:
        image: A path, a PIL image, a sequence of these, or None for no picture.

    Returns:
        One image per picture, in the order given.

    Raises:
        ModelError: A picture cannot be read, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million unless
            you set it); the message says what was found and what to do.
    """
    try:
        return read_pictures(image)
    except DataError as error:
        raise ModelError(str(error)) from error
