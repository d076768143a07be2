"""The one error that users of this package see."""


class TraceError(ValueError):
    """A trace that cannot be made, read or written; the message says what was asked, what was found and what to do."""
