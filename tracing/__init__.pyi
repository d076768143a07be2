from .attention.contributions import (
    AverageContributions as AverageContributions,
    attention_contributions as attention_contributions,
)
from .attention.contributions_result import AttentionContributions as AttentionContributions
from .attention.image_tokens import RelevanceMap as RelevanceMap, llava_cam as llava_cam
from .attention.weights import (
    AttentionSaliency as AttentionSaliency,
    AttentionShare as AttentionShare,
    AverageSaliency as AverageSaliency,
    AverageShare as AverageShare,
    attention_saliency as attention_saliency,
    attention_share as attention_share,
)
from .averages import average as average, averager_of as averager_of
from .causal.average import AverageTrace as AverageTrace
from .causal.result import CausalBlock as CausalBlock, CausalTrace as CausalTrace, Peak as Peak
from .causal.sites import EditSite as EditSite, SiteCandidate as SiteCandidate
from .causal.trace import causal_trace as causal_trace
from .corruptions.corruption import Corrupted as Corrupted, Corruption as Corruption
from .corruptions.kinds import (
    BlankImage as BlankImage,
    BlurImage as BlurImage,
    ImageNoise as ImageNoise,
    MaskBoxes as MaskBoxes,
    MeanAblation as MeanAblation,
    PixelNoise as PixelNoise,
    ReplaceText as ReplaceText,
    SwapImage as SwapImage,
    TextNoise as TextNoise,
    ZeroAblation as ZeroAblation,
    calibrate as calibrate,
    parse_corruption as parse_corruption,
)
from .engine.cells import (
    Engine as Engine,
    EngineReport as EngineReport,
    TraceError as TraceError,
    WeakCorruption as WeakCorruption,
)
from .engine.positions import (
    Blocks as Blocks,
    Box as Box,
    box_positions as box_positions,
    parse_position as parse_position,
)
from .engine.scoring import same_answer as same_answer
from .failure import (
    FailureFeatures as FailureFeatures,
    FailurePrediction as FailurePrediction,
    failure_features as failure_features,
    predict_failure as predict_failure,
)
from .knockout.knockout import (
    Flow as Flow,
    attention_knockout as attention_knockout,
    knockout_probability as knockout_probability,
)
from .knockout.result import (
    AttentionKnockout as AttentionKnockout,
    AverageKnockout as AverageKnockout,
    FilteredQuestion as FilteredQuestion,
)
from .lens.logit_lens import AverageLogitLens as AverageLogitLens, logit_lens as logit_lens
from .lens.result import LogitLens as LogitLens
from .pruning.average import AveragePruning as AveragePruning
from .pruning.pruning import prune_image_tokens as prune_image_tokens
from .pruning.result import ImagePruning as ImagePruning
