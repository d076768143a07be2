"""The error of the command line."""


class CommandError(ValueError):
    """Options that do not fit together or a place that cannot be written; says what was found and what to do."""
