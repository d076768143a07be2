from .applying import AppliedDelta as AppliedDelta
from .augment import Augmentation as Augmentation
from .baselines import FineTune as FineTune, InContext as InContext, Lora as Lora
from .changes import WeightChange as WeightChange
from .closed_form import ClosedFormEditor as ClosedFormEditor
from .curves import EditCurve as EditCurve
from .delta import Delta as Delta, compose as compose
from .editors import EMMET as EMMET, MEMIT as MEMIT, ROME as ROME, AlphaEdit as AlphaEdit, MultEdit as MultEdit
from .errors import EditError as EditError
from .evaluate import (
    evaluate as evaluate,
    evaluate_singly as evaluate_singly,
    unedited as unedited,
    with_history as with_history,
    without_history as without_history,
)
from .exports import (
    save_merged as save_merged,
    to_peft as to_peft,
    verify_export as verify_export,
    with_adapters as with_adapters,
)
from .ledger import Ledger as Ledger, load_edit as load_edit
from .measuring import EvaluationSettings as EvaluationSettings
from .moments import Moments as Moments, second_moments as second_moments
from .probes import Probe as Probe, Record as Record
from .reports import EditReport as EditReport
from .requests import EditRequest as EditRequest
from .runtime import RuntimeEdit as RuntimeEdit
from .sequences import Governor as Governor, evaluate_sequentially as evaluate_sequentially
