"""The error of the data rooms, and one-line descriptions of errors raised by libraries."""


class DataError(ValueError):
    """A record, file or choice of records that cannot be used; the message says what was found and can be done."""


_LONGEST = 500
"""Maximum number of characters quoted from another error; a damaged file can have 100,000 in one value."""
_LONGEST_VALUE = 100
"""Maximum number of characters quoted from a value."""


def quoted(value: object) -> str:
    """Return the `repr` of the value, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def reason(error: Exception) -> str:
    """Return the error's message as `gist` does, preceded by its class unless the message is clear without it."""
    text = gist(error)
    if isinstance(error, OSError | ValueError) or text == type(error).__name__:
        return text
    return f"{type(error).__name__}: {text}"


def gist(error: BaseException) -> str:
    """Return the message up to its first blank line, on one line without a final stop, or the class if it is empty."""
    text = " ".join(str(error).strip().split("\n\n")[0].split()).rstrip(".:")
    return f"{text[:_LONGEST]}..." if len(text) > _LONGEST else text or type(error).__name__
