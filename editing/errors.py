"""The one error class of the editing room."""


class EditError(ValueError):
    """An edit that cannot be made, applied, undone, saved or loaded: what was asked, what was found, what to do."""
