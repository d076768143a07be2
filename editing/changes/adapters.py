"""Edits as PEFT LoRA adapters, at full rank or cut to a smaller one, with what the cut costs and how to serve them."""

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...artefacts import ArtefactError, replacing_folder, write_tensors
from ...data.facts import counted, shortened
from ...models import ModelError, VisionLanguageModel
from ...models.placement import parameter_of
from ..moments import Moments
from ..requests import EditError
from .delta import Delta
from .truncation import Directions, check_rank, effects_of_requests, leading_directions, moment_of

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("multrace")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; its default is 16, and an adapter of a larger rank is refused."""
_WELL_KEPT = 0.95
"""A request that keeps less of its effect is pointed out."""


@runtime_checkable
class LowRank(Protocol):
    """A change that is known by its factors, as a Delta is."""

    model: str
    revision: str | None

    @property
    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """(left, right) per parameter name, float32, (hidden, rank) and (rank, width), oriented as in y = W x."""


@runtime_checkable
class Dense(Protocol):
    """A change of whole matrices, as `FineTune` makes it, which has an adapter only where it is cut to a rank."""

    model: str
    revision: str | None
    fingerprints: Mapping[str, str]

    def difference(self, name: str) -> Tensor:
        """Return what is added to the parameter of this name, in the layout of the model."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExportedAdapter:
    """An adapter that `to_peft` wrote, what its rank keeps of the edit, and how to serve it; it is a path, too.

    Whatever takes a path (`with_adapters`, `open`, `Path`) takes this for its folder.
    """

    folder: Path
    """The folder of the adapter."""
    model: str
    """Name or path of the model that was edited."""
    rank: int
    """Rank of the adapter: the largest of its weights, `r` in its configuration."""
    full_rank: int
    """Rank before the cut: for an edit, the number of its keys."""
    lossless_rank: int
    """Smallest rank at which nothing is lost but rounding; below `full_rank` where keys ask for the same changes, or
    where there are more keys than the output has numbers."""
    sufficient_rank: int
    """Smallest rank at which every request keeps 95 % of its effect; `lossless_rank` for a change without keys."""
    metric: str
    """In what the cut is the best one: in the edit's keys, in the moments, or plain (the Frobenius norm)."""
    shares: Mapping[str, float]
    """For each weight, the share of its change's squared size in that metric that is kept."""
    requests: tuple[Mapping[str, str | float], ...] = ()
    """As `Delta.requests`."""
    retained: tuple[float | None, ...] = ()
    """For each request, the share of its effect that is kept: the sum of (D' k) (D k) over that of |D k|^2, over its
    own keys k in all weights, with D the change and D' what the adapter holds. None for a request without an effect."""
    outside: tuple[str, ...] = field(default=())
    """Weights outside the language model, to which vLLM may not apply an adapter."""

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        cut = f"rank {self.rank}" + (f" of {self.full_rank}" if self.is_cut else "")
        line = f"ExportedAdapter of {shortened(self.model)} in {str(self.folder)!r}: {cut}, "
        line += counted(len(self.shares), "weight")
        served = f"vLLM: --max-lora-rank {size}" if (size := self.max_lora_rank) else "too large for vLLM"
        if (worst := self.worst) is None:
            return f"{line}\n{min(self.shares.values()):.1%} of the change is kept; {served}"
        return f"{line}\nevery request keeps at least {self.retained[worst]:.1%} of its effect; {served}"

    @property
    def is_cut(self) -> bool:
        """Whether the rank is smaller than that of the edit."""
        return self.rank < self.full_rank

    @property
    def worst(self) -> int | None:
        """Index of the request that keeps least of its effect; None where no request has keys."""
        known = [index for index, share in enumerate(self.retained) if share is not None]
        return min(known, key=lambda index: self.retained[index] or 0.0, default=None)

    @property
    def max_lora_rank(self) -> int | None:
        """The smallest --max-lora-rank of vLLM that holds the adapter; None if it is larger than all of them."""
        return next((size for size in VLLM_RANKS if size >= self.rank), None)

    @property
    def serving(self) -> str:
        """The command that serves the model with the adapter, or why vLLM does not take it and what to do."""
        if self.max_lora_rank is None:
            return (
                f"vLLM takes adapters of rank {VLLM_RANKS[-1]} at most, and this one has rank {self.rank}; "
                f"write it again with {self._advice()}"
            )
        module = shlex.quote(f"{self.folder.name}={self.folder}")
        return (
            f"vllm serve {shlex.quote(self.model)} --enable-lora --max-lora-rank {self.max_lora_rank} "
            f"--lora-modules {module}"
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """What the cut keeps, in lines: in all, for each request, and which one loses most; then how to serve it."""
        lines = [f"rank {self.rank} of {self.full_rank}; rank {self.lossless_rank} would lose nothing"]
        if self.is_cut:
            lines[0] += f"; cut in the metric of {self.metric}"
            lines += [
                f"{self._asked(index)}: {'no effect of its own' if share is None else f'{share:.1%} kept by the cut'}"
                for index, share in enumerate(self.retained)
            ]
            if (worst := self.worst) is not None and len(self.retained) > 1:
                lines.append(f"the cut takes most from {self._asked(worst)}")
        return (*lines, f"serve: {self.serving}" if self.max_lora_rank else self.serving)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per request: its number, question, target and the share that is retained."""
        import pandas as pd

        return pd.DataFrame(
            {
                "request": index,
                "question": request.get("question", ""),
                "target": request.get("target", ""),
                "retained": share,
            }
            for index, (request, share) in enumerate(zip(self.requests, self.retained, strict=True))
        )

    def warn(self) -> None:
        """Log what a server may not do with the adapter, and which requests keep too little of their effect."""
        weak = [index for index, share in enumerate(self.retained) if share is not None and share < _WELL_KEPT]
        if weak and (worst := self.worst) is not None:
            logger.warning(
                "%s: at rank %d, %d of %d requests keep less than %.0f%% of their effect; least is left of %s: %.1f%%; "
                "rank=%d keeps as much of all, and rank=%d loses nothing",
                *(self.folder, self.rank, len(weak), len(self.retained), 100 * _WELL_KEPT, self._asked(worst)),
                *(100 * (self.retained[worst] or 0.0), self.sufficient_rank, self.lossless_rank),
            )
        if self.outside:
            logger.warning(
                "%s: %s is outside the language model, and vLLM may leave its adapter out; serve the whole model "
                "(save_merged)",
                *(self.folder, ", ".join(self.outside)),
            )
        if any(parameter_of(name)[1] is not None for name in self.shares):
            logger.warning(
                "%s: slices of experts are `target_parameters` of PEFT, which vLLM does not read; serve the whole "
                "model (save_merged)",
                self.folder,
            )

    def _asked(self, index: int) -> str:
        request = self.requests[index]
        question, target = (shortened(str(request.get(part, ""))) for part in ("question", "target"))
        return f"{index}: {question} -> {target}"

    def _advice(self) -> str:
        largest = VLLM_RANKS[-1]
        if self.lossless_rank <= largest:
            return f"rank={self.lossless_rank}, which loses nothing"
        if self.sufficient_rank <= largest:
            return f"rank={largest}, or with rank={self.sufficient_rank}, which keeps 95% of every request's effect"
        return f"rank={largest}, which takes more than 5% from some requests, or serve the whole model (save_merged)"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Exported:
    """The change of one weight as it goes into an adapter."""

    left: Tensor
    """(hidden, rank) float32."""
    right: Tensor
    """(rank, width) float32."""
    full_rank: int
    directions: Directions


def to_peft(
    vlm: VisionLanguageModel,
    change: LowRank | Dense,
    folder: str | Path,
    *,
    rank: int | None = None,
    moments: Moments | None = None,
) -> ExportedAdapter:
    """Write the change as a PEFT LoRA adapter for `PeftModel.from_pretrained` or vLLM, and return where and how well.

    Each weight's adapter has the rank of its change, or at most `rank`, and the scale 1, by PEFT's rules (patterns per
    module) and by those of vLLM (one `lora_alpha / r` for all). The cut of a `Delta` is the best one for its own keys:
    with keys K and the metric M = K^T K / n + C + a millionth of its mean times the identity (C: see `moments`), D' of
    that rank minimises tr((D - D') M (D - D')^T), as in `truncate`. The changes of `FineTune` and `Lora` have no keys;
    they are cut by the SVD in the metric of the moments, or the plain one (M = I). A request that keeps less
    than 95 % of its effect is pointed out by a warning, as are weights that vLLM may leave out.

    Slices of experts are `target_parameters` of the adapter, of which PEFT takes one adapter for a model. Adapters are
    float32 whatever the model's dtype, so nothing is rounded away. Write several edits as several adapters, or as one
    by `compose`. PEFT itself is not needed for writing. There is a whole folder afterwards, or none.

    Args:
        vlm: The model that was edited.
        change: A `Delta`, or the change that `Lora` made; with `rank`, also that of `FineTune`.
        folder: A new folder.
        rank: The largest rank of a weight's adapter; None keeps all. vLLM takes 16 unless told otherwise, 512 at most.
        moments: Second moments C of keys, whose mean then counts as much as the mean over the edit's own keys.

    Returns:
        The folder, what is kept of each request, and the flags to serve the adapter with; it can be used as a path.

    Raises:
        EditError: The model has no such weight, the change is empty, or dense with no rank given; the folder exists or
            cannot be written; the rank is no number from 1; the moments are of other weights.

    Example:
        >>> import tempfile
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> request = mt.EditRequest(question=vlm.prompt(None, "Who won?"), target="Pruro")
        >>> delta = mt.MultEdit(layer=5, steps=5).edit(vlm, [request], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapter = mt.to_peft(vlm, delta, f"{folder}/adapter")
        ...     sorted(path.name for path in adapter.folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
        >>> adapter.rank, adapter.max_lora_rank, adapter.retained
        (2, 8, (1.0,))
    """
    folder = Path(folder)
    if rank is not None:
        check_rank(rank)
    with vlm.one_writer() as is_writing:
        if is_writing and folder.exists():
            raise EditError(f"cannot write the adapter to '{folder}': it exists; pass a new folder")
    weights = _weights(change, vlm, rank, moments)
    tensors, config = _adapter(change, vlm, {name: (each.left, each.right) for name, each in weights.items()})
    exported = _described(change, vlm, folder, weights, moments)
    text = json.dumps(config, indent=2) + "\n"
    try:
        with vlm.one_writer() as is_writing:
            if is_writing:
                with replacing_folder(folder) as new:
                    write_tensors(new / "adapter_model.safetensors", tensors, {"format": "pt"})
                    (new / "adapter_config.json").write_text(text, encoding="utf-8")
    except ArtefactError as error:
        raise EditError(f"cannot write the adapter to '{folder}': {error}") from error
    exported.warn()
    return exported


def _weights(
    change: LowRank | Dense, vlm: VisionLanguageModel, rank: int | None, moments: Moments | None
) -> dict[str, _Exported]:
    """Return what the adapter has for each weight, cut to the rank."""
    weights = {}
    for name, (left, right) in _factors(change, vlm, rank).items():
        keys = change.changes[name].keys if isinstance(change, Delta) else None
        moment = None if moments is None else moment_of(vlm, name, moments)
        directions, full = leading_directions(left, right, keys=keys, moment=moment), right.shape[0]
        if rank is not None and rank < full:
            left, right = directions.cut(left, right, rank)
        left, right = _balanced(left, right)
        weights[name] = _Exported(left=left.float(), right=right.float(), full_rank=full, directions=directions)
    return weights


def _factors(change: LowRank | Dense, vlm: VisionLanguageModel, rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return factors (left, right) of the change of each weight, those of rank 0 left out, once they fit the model."""
    if isinstance(change, LowRank):
        found = change.factors
    elif not isinstance(change, Dense):
        raise EditError(
            f"a {type(change).__name__} has no adapter; pass a Delta (of a history: history.composed()), or a change "
            "that FineTune or Lora made"
        )
    elif rank is None:
        raise EditError(
            f"this change of '{change.model}' has whole matrices and no factors; pass rank=, such as rank=64, to write "
            "the best adapter of that rank, or write the whole model with save_merged"
        )
    else:
        found = {name: _dense_factors(change, vlm, name) for name in change.fingerprints}
    found = {name: factors for name, factors in found.items() if factors[1].shape[0]}
    if not found:
        raise EditError(f"this edit of '{change.model}' changes nothing, and PEFT has no adapters of rank 0")
    for name, (left, right) in found.items():
        _check_fits(change, vlm, name, (left.shape[0], right.shape[1]))
    return found


def _dense_factors(change: Dense, vlm: VisionLanguageModel, name: str) -> tuple[Tensor, Tensor]:
    """Return a whole matrix as a product with the identity on its shorter side."""
    whole = change.difference(name)
    whole = whole.T if vlm.is_transposed(name) else whole
    hidden, width = whole.shape
    return (torch.eye(hidden), whole) if hidden <= width else (whole, torch.eye(width))


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors with each column and its row of about one size, so that half precision holds both.

    They are scaled by powers of two, so that their product stays what it is, to the bit.
    """
    sizes = right.double().norm(dim=1) / left.double().norm(dim=0)
    scales = torch.where(torch.isfinite(sizes) & (sizes > 0), sizes, 1.0).log2().div(2).round().exp2().to(left)
    return left * scales, right / scales[:, None]


def _described(
    change: LowRank | Dense,
    vlm: VisionLanguageModel,
    folder: Path,
    weights: Mapping[str, _Exported],
    moments: Moments | None,
) -> ExportedAdapter:
    """Return what the adapter keeps of the change, and where it is to be written."""
    rank = max(each.right.shape[0] for each in weights.values())
    lossless = max(each.directions.lossless for each in weights.values())
    names = {"the edit's keys": isinstance(change, Delta), "the moments": moments is not None}
    retained, sufficient, requests = (), lossless, ()
    if isinstance(change, Delta):
        requests = change.requests
        retained, sufficient = _kept(change, weights, rank)
    decoder = f"{vlm.path(vlm.decoder)}."
    return ExportedAdapter(
        folder=folder,
        model=change.model,
        rank=rank,
        full_rank=max(each.full_rank for each in weights.values()),
        lossless_rank=lossless,
        sufficient_rank=min(sufficient, lossless),
        metric=" and ".join(name for name, given in names.items() if given) or "a plain SVD",
        shares={name: each.directions.retained(each.right.shape[0]) for name, each in weights.items()},
        requests=requests,
        retained=retained,
        outside=tuple(name for name in weights if not name.startswith(decoder.lstrip("."))),
    )


def _kept(delta: Delta, weights: Mapping[str, _Exported], rank: int) -> tuple[tuple[float | None, ...], int]:
    """Return the share of its effect that each request keeps, and the smallest rank at which all keep enough."""
    longest = max(each.directions.effects.numel() for each in weights.values())
    along = torch.zeros(len(delta.requests), longest, dtype=torch.float64)
    for name, each in weights.items():
        found = effects_of_requests(delta.changes[name], each.directions, len(delta.requests))
        along[:, : found.shape[1]] += found
    asked = along.sum(1)
    shares = along.cumsum(1) / asked.clamp(min=torch.finfo(asked.dtype).tiny)[:, None]
    kept = shares[:, min(rank, longest) - 1].tolist()
    is_cut = any(each.right.shape[0] < each.full_rank for each in weights.values())
    retained = tuple(
        (min(share, 1.0) if is_cut else 1.0) if whole else None
        for share, whole in zip(kept, asked.tolist(), strict=True)
    )
    return retained, 1 + int((shares[asked > 0] < _WELL_KEPT).any(0).sum())


def _check_fits(change: LowRank | Dense, vlm: VisionLanguageModel, name: str, shape: tuple[int, int]) -> None:
    wanted = shape[::-1] if vlm.is_transposed(name) else shape
    try:
        found = tuple(vlm.weight(name).shape)
    except ModelError as error:
        raise EditError(f"an edit of '{change.model}' does not fit '{vlm.name}': {error}") from error
    if found != wanted:
        raise EditError(
            f"an edit of '{change.model}' changes {name} of shape {wanted}; in '{vlm.name}' it is {found}; "
            "load the model that was edited"
        )


def _adapter(
    change: LowRank | Dense, vlm: VisionLanguageModel, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the configuration of PEFT's adapter with these factors (left, right) by weight."""
    slices: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (left, right) in factors.items():
        parameter, number = parameter_of(name)
        if number is None:
            pairs[name.removesuffix(".weight")] = right, left
        else:
            stored = (right.T, left.T) if vlm.is_transposed(name) else (left, right)
            slices.setdefault(parameter, {})[number] = stored
    stacks = {name: _stacked(vlm.weight(name), each) for name, each in slices.items()}
    modules = pairs | {name.rpartition(".")[0]: stack for name, stack in stacks.items()}
    tensors = {
        f"base_model.model.{path}.lora_{part}.weight": factor
        for path, pair in modules.items()
        for part, factor in zip("AB", pair, strict=True)
    }
    ranks = {path: len(pair[0]) for path, pair in pairs.items()}
    stacked = {name: len(stack[0]) // len(vlm.weight(name)) for name, stack in stacks.items()}
    return tensors, _config(change, vlm, ranks, stacked)


def _stacked(weight: Tensor, slices: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """PEFT's factors for a weight (expert, row, column); some slices change by P (row, rank) @ Q (rank, column).

    They have one rank for all experts, A (expert x rank, row) with the ranks of an expert together and B (column,
    rank x expert) with the experts of a rank together.
    """
    count, rows, columns = weight.shape
    rank = max(left.shape[1] for left, _ in slices.values())
    down, up = torch.zeros(count, rank, rows), torch.zeros(columns, rank, count)
    for number, (left, right) in slices.items():
        down[number, : left.shape[1]], up[:, : left.shape[1], number] = left.T, right.T
    return down.flatten(0, 1), up.flatten(1)


def _config(
    change: LowRank | Dense, vlm: VisionLanguageModel, modules: Mapping[str, int], parameters: Mapping[str, int]
) -> dict[str, Any]:
    """PEFT's adapter_config.json for the ranks of modules and of three-dimensional parameters.

    Whatever is left out has PEFT's default.
    """
    ranks = {**modules, **parameters}
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": change.model,
        "revision": change.revision,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": vlm.stores_transposed and bool(modules),
        "target_modules": sorted(modules),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "inference_mode": True,
    }
