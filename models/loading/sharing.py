"""Sharing the weights of a model out among processes, by the tensor-parallel plans of transformers, with whole states.

In such a plan a process has a share of the attention heads and of the keys of each MLP, so that traces and edits would
mean something else in each. Here every linear map gives its whole output to every process, and takes its whole input:
only weights are shared out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed, nn
from transformers.distributed import DistributedConfig

from ..errors import ModelError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Plan = Literal["auto"] | Mapping[str, str] | None

_PATIENCE = timedelta(hours=2)
"""How long processes that hold a model together wait for each other, as in transformers."""
_WHOLE_STATES = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}
"""The styles of a plan after which every process has whole states, in place of those after which each has a share."""
_GATHERED = (*_WHOLE_STATES.values(), "embedding_rowwise", "embedding_colwise")
_EXPERTS = "moe_tp_experts"
"""The style of experts, which share their weights out among themselves and return whole states."""


def begin_sharing(tp_plan: Plan, others: Mapping[str, Any], name: str) -> int:
    """Return the number of processes that will hold a model together, and let them know each other; 1 without a plan.

    Raises `ModelError` if there are no such processes, or if one of the other options of `load` speaks against it.
    """
    if tp_plan is None:
        return 1
    if tp_plan != "auto" and not isinstance(tp_plan, Mapping):
        raise ModelError(f"cannot open {name!r} with tp_plan={tp_plan!r}; pass 'auto', or leave it out")
    if conflict := next((option for option, value in others.items() if value), None):
        raise ModelError(
            f"cannot open {name!r} with tp_plan and {conflict}: the plan decides where the weights go, and shares out "
            f"ordinary ones only; leave out tp_plan, or open the model without {conflict}"
        )
    if not distributed.is_available():
        raise ModelError(f"cannot open {name!r} with tp_plan: this build of torch has no torch.distributed")
    is_started = distributed.is_initialized()
    if not is_started and not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise ModelError(
            f"cannot open {name!r} with tp_plan: this process has no others to share the weights with; start the "
            "script with torchrun --nproc-per-node 2 SCRIPT.py, or leave tp_plan out"
        )
    try:
        if torch.accelerator.is_available() and "LOCAL_RANK" in os.environ:
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))  # where the processes exchange messages
        if not is_started:
            distributed.init_process_group(timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"cannot open {name!r} with tp_plan: torch.distributed does not start ({reason(error)}); start one process "
            "for each device with torchrun"
        ) from error
    return distributed.get_world_size()


def sharing_options(
    model: PreTrainedModel, tp_plan: Plan, processes: int, quantiser: str | None, name: str
) -> dict[str, Any]:
    """Return the options of transformers that share out a model of this architecture, which has no values itself.

    tp_plan: "auto" for the model's own plan, or rules that are added to it.
    quantiser: The method by which the weights are packed, or None.

    Raises `ModelError` for a model without a plan, a rule for a module that it lacks, or packed weights.
    """
    if quantiser is not None:
        raise ModelError(
            f"cannot open {name!r} with tp_plan: it is quantised by {quantiser}, and a plan shares out ordinary "
            "weights only; leave out tp_plan"
        )
    return {"distributed_config": DistributedConfig(tp_size=processes, tp_plan=_plan(model, tp_plan, name))}


def _plan(model: PreTrainedModel, tp_plan: Plan, name: str) -> dict[str, str]:
    """Return the plan of a model, with further rules, after which all states are whole.

    Parameters that no linear map, embedding or expert has (attention sinks) stay whole, and so do norms.
    """
    maps = {_pattern(path) for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    names = {_pattern(path) for path, _ in [*model.named_modules(), *model.named_parameters()]}
    rules = dict(model.tp_plan or {}) | (dict(tp_plan) if isinstance(tp_plan, Mapping) else {})
    if unknown := sorted(set(rules) - names - set(model.tp_plan or {})):
        raise ModelError(f"the tp_plan for {name!r} names {unknown[0]!r}, which is no module of it; mend that rule")
    experts = [path for path, style in rules.items() if style == _EXPERTS]
    plan: dict[str, str] = {}
    for path, style in rules.items():
        whole = _WHOLE_STATES.get(style, style)
        is_inside = any(path == each or path.startswith(f"{each}.") for each in experts)
        plan[path] = style if is_inside else whole if path in maps and whole in _GATHERED else "replicate"
    if not set(plan.values()) - {"replicate"}:
        raise ModelError(
            f"{name!r} ({type(model).__name__}) has no tensor-parallel plan in transformers; leave out tp_plan, or "
            "pass rules of one, such as tp_plan={'model.decoder.layers.*.fc1': 'colwise'}"
        )
    return plan


def _pattern(path: str) -> str:
    """Return a module path as the rules of a plan name it, with * in place of numbers."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
