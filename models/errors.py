"""The error classes of the ground floor, and what other people's errors say in one line."""


class ModelError(ValueError):
    """A model, picture, prompt or address that cannot be used as asked; says what was found and what to do."""


class NotFiniteError(ModelError):
    """Logits that are not finite, so that no token is the likeliest; the model says nothing to this prompt."""


class ReplayError(ModelError):
    """A model whose layers cannot be run again from cached states exactly; the plain way still works for it."""


_LONGEST = 500
"""Characters of another error that ours quote; damaged files can have a hundred thousand in one value."""
_LONGEST_VALUE = 100
"""Characters of a value that ours quote."""


def quoted(value: object) -> str:
    """Return the value as Python would write it, cut short."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def reason(error: Exception) -> str:
    """Return what the error says, as `gist` does, after its class unless that is one whose text speaks for itself."""
    text = gist(error)
    if isinstance(error, OSError | ValueError) or text == type(error).__name__:
        return text
    return f"{type(error).__name__}: {text}"


def gist(error: Exception) -> str:
    """Return what the error says up to its first blank line, on one line and without a final stop; else its class."""
    text = " ".join(str(error).strip().split("\n\n")[0].split()).rstrip(".:")
    return f"{text[:_LONGEST]}..." if len(text) > _LONGEST else text or type(error).__name__
