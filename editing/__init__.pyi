from .baselines.breadth_first import BreadthFirst as BreadthFirst
from .baselines.fine_tuning import FineTune as FineTune
from .baselines.in_context import InContext as InContext
from .baselines.lora import Lora as Lora
from .changes.adapters import ExportedAdapter as ExportedAdapter, to_peft as to_peft
from .changes.delta import Delta as Delta, RuntimeEdit as RuntimeEdit, compose as compose
from .changes.exports import (
    Verification as Verification,
    save_merged as save_merged,
    verify_export as verify_export,
    with_adapters as with_adapters,
)
from .changes.history import History as History, load_edit as load_edit
from .changes.truncation import truncate as truncate
from .changes.weight_change import (
    AppliedDelta as AppliedDelta,
    EditSession as EditSession,
    WeightChange as WeightChange,
)
from .evaluation.ability import ability_tests as ability_tests, cloze_questions as cloze_questions
from .evaluation.asking import Baseline as Baseline, baseline as baseline
from .evaluation.curves import EditCurve as EditCurve
from .evaluation.dry_run import preview as preview, verify as verify
from .evaluation.modes import evaluate as evaluate, evaluate_each as evaluate_each
from .evaluation.reports import (
    EditReport as EditReport,
    EvaluationSettings as EvaluationSettings,
)
from .evaluation.sequences import NormBound as NormBound
from .moments.collect import second_moments as second_moments
from .moments.moments import Moments as Moments
from .moments.own import MomentSource as MomentSource, OwnMoments as OwnMoments, own_moments as own_moments
from .moments.samples import own_prompts as own_prompts
from .requests import (
    EDITED as EDITED,
    NOT_GENERATED as NOT_GENERATED,
    Augmentation as Augmentation,
    EditError as EditError,
    room_for_targets as room_for_targets,
)
from .siblings.names import other_subjects as other_subjects
from .siblings.siblings import Siblings as Siblings
from .solve.editors import (
    EMMET as EMMET,
    MEMIT as MEMIT,
    ROME as ROME,
    AlphaEdit as AlphaEdit,
    ClosedFormEditor as ClosedFormEditor,
    Editor as Editor,
    EditorByRequest as EditorByRequest,
    MultEdit as MultEdit,
)
from .solve.geometry import Geometry as Geometry, predict_geometry as predict_geometry
from .solve.gradient import (
    GradientEditor as GradientEditor,
    StableEdit as StableEdit,
    UltraEdit as UltraEdit,
)
from .solve.stream import StreamStatistics as StreamStatistics
from .values.search import RequestValues as RequestValues
