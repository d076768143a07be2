"""The error of the command line."""


class CommandError(ValueError):
    """Options that do not fit together, or an output that cannot be written; the message says what to do."""
