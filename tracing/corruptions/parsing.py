"""The spelling of corruptions on a command line."""

from collections.abc import Callable

from ..errors import TraceError
from .corruption import BlankImage, BlurImage, Box, Corruption, MaskBoxes, ReplaceText, SwapImage
from .noise import ImageNoise, MeanAblation, Noise, PixelNoise, TextNoise, ZeroAblation

SPELLINGS = (
    "swap:other.jpg, replace:Paris city, text-noise:3, image-noise:3, pixel-noise:3, blank, blur:10, "
    "boxes:0,0,50,50;60,0,99,50, zero:image or mean:one.jpg,two.jpg; a noise of :auto is calibrated"
)
"""One example of each corruption."""


def parse_corruption(text: str) -> Corruption:
    """Return the corruption that this text describes.

    The spellings are swap:PATH, replace:PHRASE, text-noise[:SCALE], image-noise[:SCALE], pixel-noise[:SCALE] (a SCALE
    may be "auto"), blank, blur[:RADIUS], boxes:L,T,R,B[;L,T,R,B...], zero[:GROUP] and mean:PATH[,PATH...]. Raises
    `TraceError` for anything else.

    Example:
        >>> from multrace.tracing import parse_corruption
        >>> parse_corruption("blur:5")
        BlurImage(image=None, radius=5.0)
    """
    kind, _, value = text.partition(":")
    readers: dict[str, Callable[[str, str], Corruption | None]] = {
        "swap": lambda value, _: SwapImage(value) if value else None,
        "replace": lambda value, _: ReplaceText(value),
        "text-noise": lambda value, text: _noise(TextNoise, value, text),
        "image-noise": lambda value, text: _noise(ImageNoise, value, text),
        "pixel-noise": lambda value, text: _noise(PixelNoise, value, text),
        "blank": lambda value, _: None if value else BlankImage(),
        "blur": lambda value, text: BlurImage(radius=_number(value, text, "radius")) if value else BlurImage(),
        "boxes": lambda value, text: MaskBoxes(boxes=tuple(_box(each, text) for each in value.split(";"))),
        "zero": lambda value, _: ZeroAblation(group=value) if value else ZeroAblation(),
        "mean": lambda value, _: _mean(value),
    }
    corruption = readers[kind](value.strip(), text) if kind in readers else None
    if corruption is None:
        raise TraceError(f"no corruption {text!r}; write {SPELLINGS}")
    return corruption


def corruption_pictures(corruption: Corruption) -> tuple[str, ...]:
    """Return the paths of the pictures that a corruption from `parse_corruption` names."""
    if isinstance(corruption, SwapImage):
        return (str(corruption.image),)
    return tuple(str(path) for path in corruption.references) if isinstance(corruption, MeanAblation) else ()


def _noise(kind: type[Noise], value: str, text: str) -> Noise:
    """Return noise of the default scale, of a calibrated one ("auto") or of the given one."""
    if not value:
        return kind()
    return kind(scale=None if value == "auto" else _number(value, text, "noise scale"))


def _mean(value: str) -> MeanAblation | None:
    """Return the ablation of the image tokens by the mean over these pictures, or None if no picture is given."""
    paths = tuple(path.strip() for path in value.split(",") if path.strip())
    return MeanAblation(references=paths) if paths else None


def _number(value: str, text: str, what: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise TraceError(
            f"{value!r} in {text!r} is not a number; write the {what}, such as {text.split(':')[0]}:3"
        ) from None


def _box(value: str, text: str) -> Box:
    edges = value.split(",")
    try:
        left, top, right, bottom = (int(edge) for edge in edges)
    except ValueError:
        raise TraceError(
            f"{value!r} in {text!r} is no box; write left, top, right and bottom in pixels, such as boxes:0,0,50,50"
        ) from None
    return left, top, right, bottom
