"""Experiments that write: closed-form edits of a model's facts."""

from .delta import AppliedDelta, Delta, WeightChange
from .editors import MultEdit
from .errors import EditError
from .requests import EditRequest

__all__ = ["AppliedDelta", "Delta", "EditError", "EditRequest", "MultEdit", "WeightChange"]
