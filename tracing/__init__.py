"""Experiments that only read: where in a model a fact's information travels, and which way."""

from .attention.cam import llava_cam
from .attention.cam_result import RelevanceMap
from .attention.contributions import attention_contributions
from .attention.contributions_average import AverageContributions, average_contributions
from .attention.contributions_result import AttentionContributions
from .attention.saliency import attention_saliency
from .attention.saliency_average import AverageSaliency, average_saliencies
from .attention.saliency_result import AttentionSaliency
from .attention.shares import attention_share
from .attention.shares_result import AttentionShare, AverageShare, average_shares
from .causal.average import AverageTrace, average
from .causal.result import CausalTrace
from .causal.sites import CausalBlock, EditSite, Peak
from .causal.trace import causal_trace
from .corruptions.ablation import MeanAblation, ZeroAblation
from .corruptions.calibration import calibrate
from .corruptions.corruption import Corrupted, Corruption
from .corruptions.noise import ImageNoise, PixelNoise, TextNoise
from .corruptions.parsing import parse_corruption
from .corruptions.pictures import BlankImage, BlurImage, MaskBoxes, SwapImage
from .corruptions.wording import ReplaceText
from .engine.plain import knockout_probability
from .engine.regions import Blocks, Box, box_positions
from .engine.report import EngineReport
from .engine.settings import Engine
from .errors import TraceError, WeakCorruption
from .failure.failure import failure_features, predict_failure
from .failure.result import FailureFeatures, FailurePrediction
from .knockout.average import AverageKnockout, FilteredQuestion, average_knockouts
from .knockout.groups import Flow
from .knockout.knockout import attention_knockout
from .knockout.result import AttentionKnockout, same_answer
from .lens.average import AverageLogitLens, average_lenses
from .lens.logit_lens import logit_lens
from .lens.result import LogitLens
from .pruning.average import AveragePruning, average_prunings
from .pruning.pruning import prune_image_tokens
from .pruning.result import ImagePruning

__all__ = [
    "LogitLens",
    "AttentionContributions",
    "AttentionSaliency",
    "AttentionShare",
    "AverageContributions",
    "AverageLogitLens",
    "AverageKnockout",
    "AverageSaliency",
    "AverageShare",
    "AverageTrace",
    "AveragePruning",
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
    "AttentionKnockout",
    "MaskBoxes",
    "MeanAblation",
    "Peak",
    "PixelNoise",
    "RelevanceMap",
    "ReplaceText",
    "SwapImage",
    "TextNoise",
    "TraceError",
    "ImagePruning",
    "WeakCorruption",
    "ZeroAblation",
    "logit_lens",
    "attention_contributions",
    "attention_saliency",
    "attention_share",
    "average",
    "average_contributions",
    "average_lenses",
    "average_knockouts",
    "average_saliencies",
    "average_shares",
    "average_prunings",
    "box_positions",
    "calibrate",
    "causal_trace",
    "failure_features",
    "attention_knockout",
    "knockout_probability",
    "llava_cam",
    "parse_corruption",
    "predict_failure",
    "same_answer",
    "prune_image_tokens",
]
