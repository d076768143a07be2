"""The one error class of the ground floor."""


class ModelError(ValueError):
    """A model, picture, prompt or address that cannot be used as asked; says what was found and what to do."""
