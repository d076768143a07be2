"""The error classes of the models, and checks of texts and numbers that a caller passes."""

import operator
from typing import Any

from ..data.errors import gist as gist, quoted as quoted, reason as reason


class ModelError(ValueError):
    """A model, picture, prompt or address is unusable as requested; the message says what was found and what to do."""


class AddressError(ModelError):
    """A module is not where the family's names say, or does something else than they say; another row may serve."""


class NotFiniteError(ModelError):
    """The logits are not finite, so no token is the most likely one and the model has no answer to this prompt."""


class ReplayError(ModelError):
    """The model's layers cannot be rerun exactly from cached states; ordinary forward passes still work."""


def check_text(text: Any, what: str) -> str:
    """Return the text. Raise `ModelError`, which calls it `what`, if it is not a string or not valid UTF-8."""
    if not isinstance(text, str):
        raise ModelError(f"the {what} is of type {type(text).__name__}, not a string; pass its words as a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(
            f"the {what} {text!r} is not valid UTF-8: character {error.start} is the lone surrogate "
            f"{text[error.start]!r}; decode its bytes with the encoding they were written in"
        ) from error
    return text


def plain_number(value: Any) -> Any:
    """Return an `int` for one whole number, such as numpy's and torch's, and any other value as it is."""
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # torch raises RuntimeError for a tensor of several numbers
        return value


def whole_number(value: Any, what: str, *, least: int | None = None) -> int:
    """Return the value as an `int`, also from numpy and torch. Raise `ModelError`, which calls it `what`."""
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError) as error:  # torch raises RuntimeError for a tensor of several numbers
        raise ModelError(f"{what} is {value!r}, of type {type(value).__name__}; pass a whole number") from error
    if least is not None and number < least:
        raise ModelError(f"{what} is {number}; it must be at least {least}")
    return number
