"""Experiments that only read: where in a model a fact's information travels."""

from .ablation import MeanAblation, ZeroAblation
from .averages import AverageTrace, average
from .calibration import calibrate
from .causal import causal_trace
from .corruption import Corrupted, Corruption
from .effects import CausalBlock, EditSite, Peak
from .engine import Engine
from .engine_report import EngineReport
from .errors import TraceError, WeakCorruption
from .noise import ImageNoise, PixelNoise, TextNoise
from .parsing import parse_corruption
from .pictures import BlankImage, BlurImage, MaskBoxes, SwapImage
from .plain import knockout_probability
from .regions import Blocks, Box
from .results import CausalTrace
from .wording import ReplaceText

__all__ = [
    "AverageTrace",
    "BlankImage",
    "Blocks",
    "BlurImage",
    "Box",
    "CausalBlock",
    "CausalTrace",
    "Corrupted",
    "Corruption",
    "EditSite",
    "Engine",
    "EngineReport",
    "ImageNoise",
    "MaskBoxes",
    "MeanAblation",
    "Peak",
    "PixelNoise",
    "ReplaceText",
    "SwapImage",
    "TextNoise",
    "TraceError",
    "WeakCorruption",
    "ZeroAblation",
    "average",
    "calibrate",
    "causal_trace",
    "knockout_probability",
    "parse_corruption",
]
