"""What a model does around its output head: nothing, a scale (Cohere, Granite), a soft cap (Gemma 2), or both.

The configuration says it under many names, and the same name means a factor in one architecture and a divisor in
another. So it is measured: the output head's output is replaced by known numbers once, and the model's logits show
which operations it performs. Operations that do not reproduce these logits bit by bit are not accepted. Few models also
divide the states that the head reads (MiniCPM 3), which the same pass shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .errors import ModelError, gist
from .guards import uninterrupted
from .placement import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SATURATING = 1e4
"""A logit that every soft cap turns into the cap itself, and that float16 holds."""


@dataclass(frozen=True, kw_only=True)
class AfterHead:
    """The operations between a model's final norm, its output head and its logits, in this order."""

    before: float | None = None
    """The number by which the states are divided that the output head reads; None for none."""
    factor: float | None = None
    """The number by which logits are multiplied; None for none."""
    divisor: float | None = None
    """The number by which logits are divided; None for none."""
    cap: float | None = None
    """The bound c of c tanh(logits / c); None for no bound."""

    def entering(self, states: Tensor) -> Tensor:
        """Return what the output head reads of the final norm's output, (..., hidden) both."""
        return states if self.before is None else states / self.before

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the model's logits of the output head's, (..., vocab) both, float32 or wider."""
        if self.factor is not None:
            logits = logits * self.factor
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return at_least_float32(logits)


def at_least_float32(logits: Tensor) -> Tensor:
    """Return the logits in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def measure_readout(model: PreTrainedModel, norm: nn.Module, token: int, name: str) -> AfterHead:
    """Return the operations between the final norm and the logits, from one pass of the model over one token.

    Args:
        model: The model.
        norm: Its final norm.
        token: The id of a token that stands for no picture.
        name: The name of the model in error messages.

    Returns:
        The operations, which reproduce the model's logits bit by bit from the output of its head.

    Raises:
        ModelError: If no operations do, or if the output head does not run.
    """
    head, given, normed, read = cast(nn.Module, model.get_output_embeddings()), [], [], []

    def known(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given.append(_known_numbers(output))
        read.extend(arguments[:1])
        return given[-1]

    handles = [
        head.register_forward_hook(known),
        norm.register_forward_hook(lambda *call: normed.append(call[-1])),
    ]
    try:
        with torch.no_grad():
            logits = run_on_token(model, token)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        raise ModelError(f"{name!r} gives no logits of a single word: {gist(error)}") from error
    finally:
        uninterrupted(lambda: [handle.remove() for handle in handles])
    if not given:
        raise ModelError(f"the output head of {name!r} does not run, so its logits are of another origin")
    for after in _candidates(given[0], logits, _numbers(model.config)):
        if torch.equal(after(given[0]), AfterHead()(logits)):
            return replace(after, before=_divisor(normed, read, model.config.get_text_config()))
    raise ModelError(
        f"the logits of {name!r} are neither its output head's nor these with a scale or a soft cap; what else the "
        "model does to them is unknown, so no answers can be read from states"
    )


def _divisor(normed: list[Tensor], read: list[Tensor], config: Any) -> float | None:
    """Return the number by which the final norm's output is divided before the head reads it; None for none."""
    if not normed or not read or not isinstance(normed[-1], Tensor) or normed[-1].shape != read[-1].shape:
        return None  # the proof says what does not fit
    states, entering = normed[-1].to(read[-1]), read[-1]
    if torch.equal(states, entering):
        return None
    ratios = (states.double() / entering.double())[entering != 0]
    measured = round(float(ratios.median()), 6) if ratios.numel() else None
    divisors = (number for number in (getattr(config, "logits_scaling", None), measured) if number)
    return next((number for number in divisors if torch.equal(states / number, entering)), None)


def run_on_token(model: PreTrainedModel, token: int) -> Tensor:
    """Return the logits of one token alone, by the innermost module with an output head: BLIP-2 itself needs pictures.

    token: The id of a token that stands for no picture.
    """
    head = model.get_output_embeddings()
    owners = (module for module in model.modules() if hasattr(module, "get_output_embeddings"))
    owner = [module for module in owners if cast(Any, module).get_output_embeddings() is head][-1]
    ids = torch.tensor([[token]], device=input_device(model))
    return cast(Any, owner)(input_ids=ids, use_cache=False).logits


def _known_numbers(output: Tensor) -> Tensor:
    """Return numbers of the output's shape: 1 first, the largest last, and between them -100 to 100."""
    numbers = torch.linspace(-100, 100, output.shape[-1], dtype=torch.float64)
    numbers[0], numbers[-1] = 1, _SATURATING
    return numbers.to(output).expand_as(output).clone()


def _candidates(given: Tensor, logits: Tensor, configured: list[float]) -> Iterator[AfterHead]:
    """Yield operations with numbers from the configuration, and with those that the logits themselves show."""
    first, last = (float(logits.flatten()[place].double()) for place in (0, -1))
    scales = [number for number in (*configured, first) if number not in (0, 1)]
    caps = [None, *(number for number in (*configured, last) if number > 0)]
    for cap in caps:
        yield AfterHead(cap=cap)
    for scale, cap in product(scales, caps):
        yield AfterHead(factor=scale, cap=cap)
        yield AfterHead(divisor=scale, cap=cap)
    if first:
        yield AfterHead(divisor=round(1 / first, 6))


def _numbers(config: Any) -> list[float]:
    """Return the different numbers of a configuration whose names speak of logits, multipliers or caps."""
    numbers: list[float] = []

    def visit(entries: Mapping[str, Any]) -> None:
        for key, value in entries.items():
            if isinstance(value, Mapping):
                visit(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                if any(word in str(key) for word in ("logit", "multiplier", "cap")) and value not in numbers:
                    numbers.append(value)

    visit(config.to_dict())
    return numbers
