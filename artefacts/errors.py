"""The one error class of files, averages and plots."""


class ArtefactError(ValueError):
    """Raised when a file, an average or a figure cannot be made or read; the message says what to do next."""
