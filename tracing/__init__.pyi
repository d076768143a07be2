from .attention.cam import RelevanceMap as RelevanceMap, llava_cam as llava_cam
from .attention.contributions import (
    AverageContributions as AverageContributions,
    attention_contributions as attention_contributions,
)
from .attention.contributions_result import AttentionContributions as AttentionContributions
from .attention.saliency import (
    AttentionSaliency as AttentionSaliency,
    AverageSaliency as AverageSaliency,
    attention_saliency as attention_saliency,
)
from .attention.shares import (
    AttentionShare as AttentionShare,
    AverageShare as AverageShare,
    attention_share as attention_share,
)
from .averages import average as average, averager_of as averager_of
from .causal.average import AverageTrace as AverageTrace
from .causal.result import CausalTrace as CausalTrace
from .causal.sites import CausalBlock as CausalBlock, EditSite as EditSite, Peak as Peak
from .causal.trace import causal_trace as causal_trace
from .corruptions.corruption import (
    BlankImage as BlankImage,
    BlurImage as BlurImage,
    Corrupted as Corrupted,
    Corruption as Corruption,
    MaskBoxes as MaskBoxes,
    ReplaceText as ReplaceText,
    SwapImage as SwapImage,
)
from .corruptions.noise import (
    ImageNoise as ImageNoise,
    MeanAblation as MeanAblation,
    PixelNoise as PixelNoise,
    TextNoise as TextNoise,
    ZeroAblation as ZeroAblation,
    calibrate as calibrate,
)
from .corruptions.parsing import parse_corruption as parse_corruption
from .engine.cells import Engine as Engine, EngineReport as EngineReport
from .engine.positions import Blocks as Blocks, Box as Box, box_positions as box_positions
from .engine.rows import parse_position as parse_position
from .engine.scoring import same_answer as same_answer
from .errors import TraceError as TraceError, WeakCorruption as WeakCorruption
from .failure.prediction import (
    FailureFeatures as FailureFeatures,
    failure_features as failure_features,
    predict_failure as predict_failure,
)
from .failure.result import FailurePrediction as FailurePrediction
from .knockout.average import (
    AverageKnockout as AverageKnockout,
    FilteredQuestion as FilteredQuestion,
)
from .knockout.knockout import (
    Flow as Flow,
    attention_knockout as attention_knockout,
    knockout_probability as knockout_probability,
)
from .knockout.result import AttentionKnockout as AttentionKnockout
from .lens.logit_lens import AverageLogitLens as AverageLogitLens, logit_lens as logit_lens
from .lens.result import LogitLens as LogitLens
from .pruning.average import AveragePruning as AveragePruning
from .pruning.pruning import prune_image_tokens as prune_image_tokens
from .pruning.result import ImagePruning as ImagePruning
