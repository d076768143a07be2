from .ability import (
    AbilityTests as AbilityTests,
    ReferenceText as ReferenceText,
    ability_tests as ability_tests,
    cloze_questions as cloze_questions,
    text_perplexities as text_perplexities,
)
from .asking import (
    Baseline as Baseline,
    baseline as baseline,
    measured as measured,
    seen_statuses as seen_statuses,
    statuses_of as statuses_of,
    transform_of as transform_of,
)
from .checks import Check as Check, checks_of as checks_of, names_of as names_of
from .costs import CostMeter as CostMeter, EditCost as EditCost
from .curves import EditCurve as EditCurve, SequencePoint as SequencePoint
from .dry_run import (
    Preview as Preview,
    VerifiedAnswer as VerifiedAnswer,
    preview as preview,
    preview_lines as preview_lines,
    sizes as sizes,
    verify as verify,
)
from .judging import Judge as Judge
from .metrics import (
    BEGINS as BEGINS,
    CONTAINS as CONTAINS,
    EXACT as EXACT,
    FLUENCY as FLUENCY,
    HIGHER as HIGHER,
    JUDGED as JUDGED,
    KL as KL,
    MARGIN as MARGIN,
    NOT_NEW as NOT_NEW,
    PERPLEXITY as PERPLEXITY,
    SAYS_NEW as SAYS_NEW,
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
    begins_with_answer as begins_with_answer,
    bootstrap_interval as bootstrap_interval,
    contains_answer as contains_answer,
    exact_match as exact_match,
    fluency as fluency,
    kl_divergence as kl_divergence,
    ngram_entropy as ngram_entropy,
    normalised_probability as normalised_probability,
    perplexity as perplexity,
    sequence_accuracy as sequence_accuracy,
    split_of as split_of,
    token_accuracy as token_accuracy,
    vqa_accuracy as vqa_accuracy,
    vqa_match as vqa_match,
    vqa_normalised as vqa_normalised,
)
from .modes import (
    AT as AT,
    BATCH as BATCH,
    SINGLE as SINGLE,
    RecordResult as RecordResult,
    batch_checks as batch_checks,
    evaluate as evaluate,
    evaluate_each as evaluate_each,
    measured_edit as measured_edit,
)
from .reports import (
    TEXTS as TEXTS,
    EditReport as EditReport,
    EvaluationSettings as EvaluationSettings,
    LeftOut as LeftOut,
    ProbeRow as ProbeRow,
)
from .sequences import (
    MadeEdit as MadeEdit,
    NormBound as NormBound,
    SequenceState as SequenceState,
    SequenceSteps as SequenceSteps,
)
