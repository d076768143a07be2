"""The errors of this package."""


class TraceError(ValueError):
    """A trace that cannot be made, read or written as asked; says what was found and what to do."""


class WeakCorruption(TraceError):
    """A corruption that does not lower the answer's probability, so there is nothing to bring back."""
