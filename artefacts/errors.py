"""The one error class of files, averages and plots."""


class ArtefactError(ValueError):
    """A file, an average or a plot that cannot be made or read as asked; says what was found and what to do."""
