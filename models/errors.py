"""The error classes of the ground floor, and what other people's errors say in one line."""


class ModelError(ValueError):
    """A model, picture, prompt or address that cannot be used as asked; says what was found and what to do."""


class ReplayError(ModelError):
    """A model whose layers cannot be run again from cached states exactly; the plain way still works for it."""


def reason(error: Exception) -> str:
    """Return what the error says, as `gist` does, after its class unless that is one whose text speaks for itself."""
    text = gist(error)
    return (
        text
        if isinstance(error, OSError | ValueError) or text == type(error).__name__
        else f"{type(error).__name__}: {text}"
    )


def gist(error: Exception) -> str:
    """Return what the error says up to its first blank line, on one line and without a final stop; else its class."""
    return " ".join(str(error).strip().split("\n\n")[0].split()).rstrip(".:") or type(error).__name__
