"""Experiments that only read: where in a model a fact's information travels."""

from .causal import causal_trace
from .corruption import Corrupted, Corruption, ImageNoise, ReplaceText, SwapImage, TextNoise, parse_corruption
from .effects import CausalBlock, Cell, EditSite
from .errors import TraceError
from .plain import knockout_probability
from .results import AverageTrace, CausalTrace, average

__all__ = [
    "AverageTrace",
    "CausalBlock",
    "CausalTrace",
    "Cell",
    "Corrupted",
    "Corruption",
    "EditSite",
    "ImageNoise",
    "ReplaceText",
    "SwapImage",
    "TextNoise",
    "TraceError",
    "average",
    "causal_trace",
    "knockout_probability",
    "parse_corruption",
]
