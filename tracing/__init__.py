"""Experiments that only read: where in a model a fact's information travels."""

from .causal import causal_trace
from .corruptions.ablation import MeanAblation, ZeroAblation
from .corruptions.calibration import calibrate
from .corruptions.corruption import Corrupted, Corruption
from .corruptions.noise import ImageNoise, PixelNoise, TextNoise
from .corruptions.parsing import parse_corruption
from .corruptions.pictures import BlankImage, BlurImage, MaskBoxes, SwapImage
from .corruptions.wording import ReplaceText
from .engine import Engine
from .errors import TraceError, WeakCorruption
from .plain import knockout_probability
from .regions import Blocks, Box
from .results.averages import AverageTrace, average
from .results.effects import CausalBlock, EditSite, Peak
from .results.engine_report import EngineReport
from .results.traces import CausalTrace

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
