"""The error classes of the models."""

from ..data.errors import gist as gist, quoted as quoted, reason as reason


class ModelError(ValueError):
    """A model, picture, prompt or address is unusable as requested; the message says what was found and what to do."""


class NotFiniteError(ModelError):
    """The logits are not finite, so no token is the most likely one and the model has no answer to this prompt."""


class ReplayError(ModelError):
    """The model's layers cannot be rerun exactly from cached states; ordinary forward passes still work."""
