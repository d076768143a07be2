"""Words from the caller, checked before a tokenizer sees them."""

from typing import Any

from .errors import ModelError


def check_text(text: Any, what: str) -> str:
    """The text itself. ModelError, which calls it `what`, if it is no string or cannot be written as UTF-8."""
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
