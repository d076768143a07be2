"""Experiments that only read: where in a model a fact's information travels, and which way."""

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
from .flow.groups import Flow
from .flow.information_flow import information_flow
from .flow.truncation import truncate_image
from .plain import knockout_probability
from .reading.cam import llava_cam
from .reading.contributions import attention_contributions
from .reading.failure import failure_features, predict_failure
from .reading.lens import answer_emergence
from .reading.saliency import attention_saliency
from .reading.shares import attention_share
from .regions import Blocks, Box, box_positions
from .results.averages import AverageTrace, average
from .results.effects import CausalBlock, EditSite, Peak
from .results.engine_report import EngineReport
from .results.flow.average_flows import AverageFlow, FilteredQuestion, average_flows
from .results.flow.average_truncations import AverageTruncation, average_truncations
from .results.flow.flows import InformationFlow, same_answer
from .results.flow.truncations import Truncation
from .results.reading.average_contributions import AverageContributions, average_contributions
from .results.reading.average_emergence import AverageEmergence, average_emergences
from .results.reading.average_saliency import AverageSaliency, average_saliencies
from .results.reading.contributions import AttentionContributions
from .results.reading.emergence import AnswerEmergence
from .results.reading.failures import FailureFeatures, FailurePrediction
from .results.reading.relevance import RelevanceMap
from .results.reading.saliency import AttentionSaliency
from .results.reading.shares import AttentionShare, AverageShare, average_shares
from .results.traces import CausalTrace

__all__ = [
    "AnswerEmergence",
    "AttentionContributions",
    "AttentionSaliency",
    "AttentionShare",
    "AverageContributions",
    "AverageEmergence",
    "AverageFlow",
    "AverageSaliency",
    "AverageShare",
    "AverageTrace",
    "AverageTruncation",
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
    "FailureFeatures",
    "FailurePrediction",
    "FilteredQuestion",
    "Flow",
    "ImageNoise",
    "InformationFlow",
    "MaskBoxes",
    "MeanAblation",
    "Peak",
    "PixelNoise",
    "RelevanceMap",
    "ReplaceText",
    "SwapImage",
    "TextNoise",
    "TraceError",
    "Truncation",
    "WeakCorruption",
    "ZeroAblation",
    "answer_emergence",
    "attention_contributions",
    "attention_saliency",
    "attention_share",
    "average",
    "average_contributions",
    "average_emergences",
    "average_flows",
    "average_saliencies",
    "average_shares",
    "average_truncations",
    "box_positions",
    "calibrate",
    "causal_trace",
    "failure_features",
    "information_flow",
    "knockout_probability",
    "llava_cam",
    "parse_corruption",
    "predict_failure",
    "same_answer",
    "truncate_image",
]
