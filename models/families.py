"""The differences between architectures: a table with one frozen row each, and the module addresses that follow.

A row locates attention and MLP in the decoder layers. From it follow the modules and weights behind the sites of a
decoder (hidden state, MLP or attention of a layer). Loading verifies the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .errors import ModelError
from .placement import compute_device, fetched, map_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """The module names and properties of one architecture, as its classes in transformers have them.

    Names are dotted module paths, relative to a decoder layer unless a field says otherwise. The defaults are Llama's.
    Loading verifies a row on the model itself and raises `ModelError` with the site where a name or property is wrong.

    Example:
        >>> import multrace as mt
        >>> from multrace.models import FAMILIES, Family
        >>> row = Family(name="qwen2", model_types=("qwen2",), text_types=("qwen2",))
        >>> families = (*FAMILIES, row)  # for mt.load(..., families=families)
    """

    name: str
    """The name of the row in log lines and errors."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json that the row serves."""
    text_types: tuple[str, ...]
    """Values of `model_type` of the text configuration that the row serves; for a text-only model, the same values."""
    layers: str = "layers"
    """The list of decoder layers, relative to `model.get_decoder()`."""
    attention: str = "self_attn"
    """The attention module, whose output is the site "attention"."""
    attention_out: str = "self_attn.o_proj"
    """The linear map by which attention writes into the residual stream."""
    mlp: str = "mlp"
    """The MLP, whose output is the site "mlp"."""
    down: str = "mlp.down_proj"
    """The linear map by which the MLP writes into the residual stream."""
    final_norm: str = "norm"
    """The norm between the last decoder layer and the output head, relative to `model.get_decoder()`."""
    transposed: bool = False
    """True if the two linear maps store their weights as (input, output), as GPT-2's Conv1D does."""
    parallel: bool = False
    """True if attention and MLP read the same input, so that a layer's MLP does not see that layer's attention."""
    vision: str | None = None
    """The vision tower, relative to the base model; None for a text-only family."""
    vision_layers: str | None = None
    """The list of the vision tower's layers, relative to the tower; None if unknown."""
    projector: str | None = None
    """The module that turns the tower's states into image tokens, relative to the base model; None where unknown."""
    dropped_inputs: tuple[str, ...] = ("token_type_ids",)
    """Outputs of the tokenizer that must not reach the model: GPT-2 would add a word embedding for each of them."""


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llava_llama",
        model_types=("llava",),
        text_types=("llama",),
        vision="vision_tower",
        vision_layers="encoder.layers",
        projector="multi_modal_projector",
    ),
    Family(
        name="llava_phi",
        model_types=("llava",),
        text_types=("phi",),
        attention_out="self_attn.dense",
        down="mlp.fc2",
        final_norm="final_layernorm",
        parallel=True,
        vision="vision_tower",
        vision_layers="encoder.layers",
        projector="multi_modal_projector",
    ),
    Family(name="llama", model_types=("llama",), text_types=("llama",)),
    Family(
        name="gpt2",
        model_types=("gpt2",),
        text_types=("gpt2",),
        layers="h",
        attention="attn",
        attention_out="attn.c_proj",
        down="mlp.c_proj",
        final_norm="ln_f",
        transposed=True,
    ),
)


def family_of(config: PretrainedConfig, families: Sequence[Family] = FAMILIES) -> Family:
    """Return the first row that serves this configuration. Raises `ModelError`, which lists the rows, if none does."""
    text_type = config.get_text_config().model_type
    for family in families:
        if config.model_type in family.model_types and text_type in family.text_types:
            return family
    known = ", ".join(family.name for family in families) or "none"
    raise ModelError(
        f"no family row for model type {config.model_type!r} with text type {text_type!r} (rows: {known}); "
        "pass load(..., families=(*FAMILIES, Family(...))) with a row for it"
    )


Kind = Literal["hidden", "mlp", "attention"]


@dataclass(frozen=True, order=True)
class Site:
    """One output of a decoder layer: its hidden state ("hidden"), or what its MLP or attention adds to it."""

    kind: Kind
    """"hidden", "mlp" or "attention"."""
    layer: int
    """Layer number from 0; negative numbers count from the last layer."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ModelError(f"no kind of site {self.kind!r}; kinds are {', '.join(get_args(Kind))}")

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear map that writes into the residual stream: an MLP's down projection or attention's output projection."""

    module: nn.Module
    """The linear module itself."""
    path: str
    """The dotted path of the module in the model."""
    transposed: bool
    """True if the weight is stored as (width, hidden) instead of (hidden, width)."""

    @property
    def name(self) -> str:
        """The name of the weight in `model.named_parameters()`."""
        return f"{self.path}.weight"

    @property
    def weight(self) -> Tensor:
        """The weight: (hidden, width), or (width, hidden) if transposed, or packed; the parameter itself, not a copy.

        Of an offloaded weight these are the values that are fetched for each call.
        """
        return cast(Tensor, fetched(self.module, "weight"))

    @property
    def bias(self) -> Tensor | None:
        """The bias, (hidden,); None for a map without one."""
        return fetched(self.module, "bias")

    @property
    def hidden(self) -> int:
        """The length of the vectors that the map writes."""
        return map_shape(self.module, transposed=self.transposed)[0]

    @property
    def width(self) -> int:
        """The length of the vectors that the map reads; for a down projection, the width of the MLP."""
        return map_shape(self.module, transposed=self.transposed)[1]

    @property
    def device(self) -> torch.device:
        """The device on which the map is computed; an offloaded weight is there only while it is."""
        return compute_device(self.module)

    def __str__(self) -> str:
        return self.path


Key = Site | Projection | nn.Module | str


@dataclass(frozen=True, kw_only=True, eq=False)
class Addresses:
    """The sites of one loaded model, found through `get_decoder()` and the family row."""

    model: PreTrainedModel
    family: Family
    name: str
    """The name of the model in error messages."""

    @cached_property
    def decoder(self) -> nn.Module:
        """The text stack of the model."""
        return self.model.get_decoder()

    @cached_property
    def decoder_path(self) -> str:
        """The dotted path of the text stack in the model."""
        return next(path for path, module in self.model.named_modules() if module is self.decoder)

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The decoder layers. Raises `ModelError` if the row names no such list."""
        layers = self._below(self.decoder, self.family.layers, self.decoder_path)
        return cast(nn.ModuleList, layers)

    @cached_property
    def final_norm(self) -> nn.Module:
        """The norm between the last decoder layer and the output head. Raises `ModelError` if the row names none."""
        return self._below(self.decoder, self.family.final_norm, self.decoder_path)

    def index(self, layer: int) -> int:
        """Return the layer as a number from 0. Raises `ModelError` if the decoder has no such layer."""
        count = len(self.layers)
        if not -count <= layer < count:
            raise ModelError(
                f"no layer {layer} in {self.name!r}: its decoder has {count} layers (0 to {count - 1}); "
                "pass layer=-1 for the last one"
            )
        return layer % count

    def path(self, key: Key) -> str:
        """Return the dotted module path of a site, projection or module; a path is returned unchecked."""
        if isinstance(key, Site):
            layer = f"{self.decoder_path}.{self.family.layers}.{self.index(key.layer)}"
            return {
                "hidden": layer,
                "mlp": f"{layer}.{self.family.mlp}",
                "attention": f"{layer}.{self.family.attention}",
            }[key.kind]
        if isinstance(key, Projection):
            return key.path
        if isinstance(key, nn.Module):
            for path, module in self.model.named_modules():
                if module is key:
                    return path
            raise ModelError(
                f"{type(key).__name__} is not a module of {self.name!r}; pass a site, a path or one of its modules"
            )
        return key

    def module(self, key: Key) -> nn.Module:
        """Return the module of a site (decoder layer, MLP or attention), projection, path or module of this model."""
        return self._at(self.path(key), f"site {str(key)!r}" if isinstance(key, Site) else "module")

    def down_projection(self, layer: int) -> Projection:
        """Return the linear map by which the layer's MLP writes into the residual stream; its input is the keys."""
        return self._projection(Site("mlp", self.index(layer)), self.family.down)

    def attention_projection(self, layer: int) -> Projection:
        """Return the linear map by which the layer's attention writes into the residual stream."""
        return self._projection(Site("attention", self.index(layer)), self.family.attention_out)

    def _projection(self, site: Site, leaf: str) -> Projection:
        path = f"{self.path(Site('hidden', site.layer))}.{leaf}"
        module = self._at(path, f"projection of site {str(site)!r}")
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            raise ModelError(
                f"the projection of site {str(site)!r} at {path!r} in {self.name!r} is a {type(module).__name__} "
                f"without a weight matrix; mend the row of family {self.family.name}"
            )
        return Projection(module=module, path=path, transposed=self.family.transposed)

    def _at(self, path: str, asked: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            names = [name for name, _ in self.model.named_modules()]
            nearest = get_close_matches(path, names, n=1, cutoff=0.0)
            raise ModelError(
                f"no {asked} at {path!r} in {self.name!r} (family {self.family.name}); "
                f"the nearest module is {nearest[0]!r}"
            ) from None

    def _below(self, parent: nn.Module, leaf: str, parent_path: str) -> nn.Module:
        try:
            return parent.get_submodule(leaf)
        except AttributeError:
            children = ", ".join(name for name, _ in parent.named_children())
            raise ModelError(
                f"no {leaf!r} in {parent_path!r} of {self.name!r} (family {self.family.name}): found {children}"
            ) from None
