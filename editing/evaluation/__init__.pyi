from .asking import Baseline as Baseline, baseline as baseline
from .metrics import (
    EXACT as EXACT,
    FLUENCY as FLUENCY,
    HIGHER as HIGHER,
    KL as KL,
    MARGIN as MARGIN,
    SEQUENCE as SEQUENCE,
    SPLITS as SPLITS,
    TOKENS as TOKENS,
    TOP1_ANSWER as TOP1_ANSWER,
    TOP1_WHOLE as TOP1_WHOLE,
    TOP10_WHOLE as TOP10_WHOLE,
    UNCHANGED as UNCHANGED,
    UNCHANGED_RIGHT as UNCHANGED_RIGHT,
    VQA as VQA,
    agreement as agreement,
    bootstrap_interval as bootstrap_interval,
    exact_match as exact_match,
    fluency as fluency,
    kl_divergence as kl_divergence,
    ngram_entropy as ngram_entropy,
    normalised_probability as normalised_probability,
    sequence_accuracy as sequence_accuracy,
    split_of as split_of,
    token_accuracy as token_accuracy,
    vqa_accuracy as vqa_accuracy,
    vqa_match as vqa_match,
    vqa_normalised as vqa_normalised,
)
from .modes import (
    BATCH as BATCH,
    SINGLE as SINGLE,
    RecordResult as RecordResult,
    evaluate as evaluate,
    evaluate_each as evaluate_each,
)
from .preview import (
    Preview as Preview,
    VerifiedAnswer as VerifiedAnswer,
    preview as preview,
    preview_lines as preview_lines,
    sizes as sizes,
    verify as verify,
)
from .questions import (
    Check as Check,
    EvaluationSettings as EvaluationSettings,
    LeftOut as LeftOut,
    checks_of as checks_of,
    names_of as names_of,
)
from .reports import EditCurve as EditCurve, EditReport as EditReport, ProbeRow as ProbeRow
from .sequences import AT as AT, NormBound as NormBound, SequenceState as SequenceState
