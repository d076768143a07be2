from .asking import Baseline as Baseline, baseline as baseline
from .augment import Augmentation as Augmentation
from .changes import AppliedDelta as AppliedDelta, WeightChange as WeightChange
from .closed_form import ClosedFormEditor as ClosedFormEditor
from .delta import Delta as Delta, compose as compose
from .editors import EMMET as EMMET, MEMIT as MEMIT, ROME as ROME, AlphaEdit as AlphaEdit, MultEdit as MultEdit
from .errors import EditError as EditError
from .evaluation import evaluate as evaluate
from .exports import (
    save_merged as save_merged,
    to_peft as to_peft,
    verify_export as verify_export,
    with_adapters as with_adapters,
)
from .fine_tuning import FineTune as FineTune
from .in_context import InContext as InContext
from .ledger import Ledger as Ledger, load_edit as load_edit
from .lora import Lora as Lora
from .moments import Moments as Moments, second_moments as second_moments
from .probes import Probe as Probe, Record as Record
from .reports import EditCurve as EditCurve, EditReport as EditReport
from .requests import EditRequest as EditRequest
from .responses import EvaluationSettings as EvaluationSettings
from .runtime import RuntimeEdit as RuntimeEdit
from .sequences import NormBound as NormBound
