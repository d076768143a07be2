"""Experiments that write: closed-form edits of a model's facts, their files, and what they did."""

from .applying import AppliedDelta
from .augment import Augmentation
from .baselines import FineTune, InContext, Lora
from .changes import WeightChange
from .closed_form import ClosedFormEditor
from .curves import EditCurve
from .delta import Delta, compose
from .editors import EMMET, MEMIT, ROME, AlphaEdit, MultEdit
from .errors import EditError
from .evaluate import evaluate, evaluate_singly, unedited, with_history, without_history
from .exports import save_merged, to_peft, verify_export, with_adapters
from .ledger import Ledger, load_edit
from .measuring import EvaluationSettings
from .moments import Moments, second_moments
from .probes import Probe, Record
from .reports import EditReport
from .requests import EditRequest
from .runtime import RuntimeEdit
from .sequences import Governor, evaluate_sequentially

__all__ = [
    "AlphaEdit",
    "Augmentation",
    "AppliedDelta",
    "ClosedFormEditor",
    "Delta",
    "EMMET",
    "EditCurve",
    "EditError",
    "EditReport",
    "EditRequest",
    "FineTune",
    "Governor",
    "InContext",
    "Ledger",
    "Lora",
    "MEMIT",
    "EvaluationSettings",
    "Moments",
    "MultEdit",
    "Probe",
    "ROME",
    "Record",
    "RuntimeEdit",
    "WeightChange",
    "compose",
    "evaluate",
    "evaluate_sequentially",
    "evaluate_singly",
    "load_edit",
    "save_merged",
    "second_moments",
    "to_peft",
    "unedited",
    "verify_export",
    "with_adapters",
    "with_history",
    "without_history",
]
