"""The sites of a decoder (hidden state, MLP or attention of a layer), and the modules and weights behind them.

They follow from the family's names. A site is what is added to the residual stream: behind a norm, that norm's output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from torch import nn

from ..errors import AddressError, ModelError
from ..placement import is_packed
from .projections import ExpertProjection, Projection, RoutedExperts, is_stack, slice_name
from .table import Family, Names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


Key = Site | Projection | nn.Module | str


@dataclass(frozen=True, kw_only=True, eq=False)
class Addresses:
    """The sites of one loaded model, found through `get_decoder()` and the family's names."""

    model: PreTrainedModel
    family: Family
    name: str
    """The name of the model in error messages."""

    @cached_property
    def decoder(self) -> nn.Module:
        """The text stack: what `get_decoder()` returns, or the module inside it that holds the decoder layers."""
        outer = self.model.get_decoder()
        for path, module in outer.named_modules():  # BLIP-2 and Llama 4 return a model with an output head
            if isinstance(_child(module, self.family.layers), nn.ModuleList) and "vision" not in path:
                return module
        return outer

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

    def layer_path(self, layer: int) -> str:
        """Return the dotted path of a decoder layer. Raises `ModelError` if the decoder has no such layer."""
        return f"{self.decoder_path}.{self.family.layers}.{self.index(layer)}"

    def path(self, key: Key) -> str:
        """Return the dotted module path of a site, projection or module; a path is returned unchecked."""
        if isinstance(key, Site):
            names = {
                "mlp": self.family.mlp_norm or self.family.mlp,
                "attention": self.family.attention_norm or self.family.attention,
            }
            layer = self.layer_path(key.layer)
            return layer if key.kind == "hidden" else f"{layer}.{self._chosen(key.layer, names[key.kind])}"
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
        """Return the module of a site (decoder layer, MLP or attention), projection, path or module of this model.

        The module of routed experts, and of a path that names a slice of them, is a `RoutedExperts`.
        """
        if isinstance(key, ExpertProjection):
            return key.module
        if isinstance(key, str) and (projection := self.expert_slice(key)) is not None:
            return projection.module
        return self._at(self.path(key), f"site {str(key)!r}" if isinstance(key, Site) else "module")

    def attention_module(self, layer: int) -> nn.Module:
        """Return the module that attends in a layer; a norm may stand between it and the site "attention"."""
        path = f"{self.layer_path(layer)}.{self._chosen(layer, self.family.attention)}"
        return self._at(path, f"attention of layer {self.index(layer)}")

    def beside(self, layer: int) -> nn.Module | None:
        """Return the module beside attention and MLP whose output the layer adds as well; None for most models."""
        name = self.family.beside
        return None if name is None else _child(self.layers[self.index(layer)], name)

    def layer_around(self, key: Key) -> nn.Module | None:
        """Return the decoder layer around an MLP or attention site or a projection; None for every other key."""
        if isinstance(key, Site):
            return None if key.kind == "hidden" else self.layers[self.index(key.layer)]
        if not isinstance(key, Projection):
            return None
        above = f"{self.decoder_path}.{self.family.layers}."
        number = key.path.removeprefix(above).partition(".")[0]
        return self.layers[int(number)] if key.path.startswith(above) and number.isdigit() else None

    def has_experts(self, layer: int) -> bool:
        """Return whether the layer has experts, so that no single linear map writes all of its MLP output."""
        return self.family.down is None or _child(self.layers[self.index(layer)], self.family.experts) is not None

    def has_down_projection(self, layer: int) -> bool:
        """Return whether a linear map writes the layer's MLP output or, beside experts, a part of it for all tokens."""
        return not self.has_experts(layer) or self._shared(layer) is not None

    def _shared(self, layer: int) -> str | None:
        """Return the name of the map by which the shared expert of a layer writes; None for a layer without one."""
        name = self._chosen(layer, self.family.shared)
        return None if _child(self.layers[self.index(layer)], name) is None else name

    @property
    def mlp_width(self) -> int:
        """Width of the input of the first down projection; the width of one expert where no layer has a single one."""
        for layer in range(len(self.layers)):
            if self.has_down_projection(layer):
                return self.down_projection(layer).width
        text = self.model.config.get_text_config()
        sizes = (getattr(text, name, None) for name in ("moe_intermediate_size", "intermediate_size"))
        return next((size for size in sizes if size), 4 * text.hidden_size)  # of other names; it only sizes batches

    def down_projection(self, layer: int) -> Projection:
        """Return the linear map by which the layer's MLP writes into the residual stream; its input is the keys.

        Beside experts it is that of the shared expert, which writes a part of the output for every token. Raises
        `ModelError` if the layer has experts and none is shared.
        """
        site = Site("mlp", self.index(layer))
        name = self._shared(layer) if self.has_experts(layer) else self.family.down
        if name is None:
            raise ModelError(
                f"layer {site.layer} of {self.name!r} has experts, so no single matrix writes its MLP output; trace "
                f"and patch the site '{site}' as usual, and edit {self._instead(layer)}"
            )
        return self._projection(site, name)

    def _instead(self, layer: int) -> str:
        """What to edit in a layer of experts none of which is shared."""
        attention = "attention (projection='attention')"
        return f"the experts (expert_projection) or {attention}" if self.expert_count(layer) else f"{attention} instead"

    def expert_count(self, layer: int) -> int:
        """Return the number of routed experts of a layer whose slices can be edited; 0 for none."""
        experts = _child(self.layers[self.index(layer)], self.family.experts)
        return len(cast(Any, experts).down_proj) if experts is not None and is_stack(experts) else 0

    def expert_projection(self, layer: int, expert: int | None = None) -> ExpertProjection:
        """Return one routed expert of a layer, or all of them (None), as the linear map that writes their output.

        Raises `ModelError` if the layer has no such expert, or none whose weights can be read.
        """
        count, number = self.expert_count(layer), self.index(layer)
        if not count:
            has = "experts that are not one ordinary weight here" if self.has_experts(layer) else "no experts"
            raise ModelError(f"layer {number} of {self.name!r} has {has}; edit attention (projection='attention')")
        if expert is not None and not -count <= expert < count:
            raise ModelError(
                f"no expert {expert} in layer {number} of {self.name!r}: it has {count} experts (0 to {count - 1})"
            )
        stem = f"{self.layer_path(layer)}.{self.family.experts}"
        path = f"{stem}.down_proj" if expert is None else slice_name(f"{stem}.down_proj", expert % count)
        if path not in self._stacks:
            numbers = range(count) if expert is None else (expert % count,)
            self._stacks[path] = RoutedExperts(self._at(stem, f"experts of layer {number}"), numbers)
        module = self._stacks[path]
        return ExpertProjection(module=module, path=path, transposed=module.transposed)

    @cached_property
    def _stacks(self) -> dict[str, RoutedExperts]:
        """The views of experts by path, each of which is one object, as a module is."""
        return {}

    def expert_slice(self, name: str) -> ExpertProjection | None:
        """Return the expert whose slice has this name; None for every other name."""
        above, tail = f"{self.decoder_path}.{self.family.layers}.", f".{self.family.experts}.down_proj["
        layer, found, number = name.removeprefix(above).removesuffix("]").partition(tail)
        if not (found and name.startswith(above) and name.endswith("]") and layer.isdigit() and number.isdigit()):
            return None
        return self.expert_projection(int(layer), int(number))

    def attention_projection(self, layer: int) -> Projection:
        """Return the linear map by which the layer's attention writes into the residual stream."""
        return self._projection(Site("attention", self.index(layer)), self.family.attention_out)

    def vision_path(self, name: str) -> str:
        """Return the dotted path, in the model, of a part that sees; its name is relative to the base model if any."""
        inner = f"{self.model.base_model_prefix}.{name}"
        has_base = isinstance(getattr(self.model, self.model.base_model_prefix, None), nn.Module)
        is_inner = _child(self.model, inner) is not None or _child(self.model, name) is None
        return inner if has_base and is_inner else name

    def _projection(self, site: Site, names: Names) -> Projection:
        path = f"{self.layer_path(site.layer)}.{self._chosen(site.layer, names)}"
        module = self._at(path, f"projection of site {str(site)!r}")
        weight = getattr(module, "weight", None)
        if not is_packed(module) and (not isinstance(weight, nn.Parameter) or weight.ndim != 2):
            raise AddressError(
                f"the projection of site {str(site)!r} at {path!r} in {self.name!r} is a {type(module).__name__} "
                f"without a weight matrix; mend the row of family {self.family.name}"
            )
        return Projection(module=module, path=path, transposed=self.family.transposed)

    def _chosen(self, layer: int, names: Names) -> str:
        """Return the first of the names that this layer has; the first of all if it has none."""
        choices = (names,) if isinstance(names, str) else names
        module = self.layers[self.index(layer)]
        return next((name for name in choices if _child(module, name) is not None), choices[0])

    def _at(self, path: str, asked: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            names = [name for name, _ in self.model.named_modules()]
            nearest = get_close_matches(path, names, n=1, cutoff=0.0)
            raise AddressError(
                f"no {asked} at {path!r} in {self.name!r} (family {self.family.name}); "
                f"the nearest module is {nearest[0]!r}"
            ) from None

    def _below(self, parent: nn.Module, leaf: str, parent_path: str) -> nn.Module:
        try:
            return parent.get_submodule(leaf)
        except AttributeError:
            children = ", ".join(name for name, _ in parent.named_children())
            raise AddressError(
                f"no {leaf!r} in {parent_path!r} of {self.name!r} (family {self.family.name}): found {children}"
            ) from None


def resolved(model: PreTrainedModel, family: Family, name: str) -> Family:
    """Return the family with one name for each part that sees: of several, the first that the model has, else None.

    Raises `AddressError`, which calls the model `name`, if it has no vision tower under any of several names.
    """
    addresses = Addresses(model=model, family=family, name=name)

    def first(names: Names | None, above: str = "") -> str | None:
        if not isinstance(names, tuple):
            return names
        return next((leaf for leaf in names if _child(model, addresses.vision_path(above + leaf)) is not None), None)

    vision = first(family.vision)
    if family.vision is not None and vision is None:
        raise AddressError(
            f"{name!r} (family {family.name}) has none of the vision towers {', '.join(family.vision)}; pass "
            "load(..., families=(PictureFront(...),)) with a row that names its own"
        )
    layers, projector = first(family.vision_layers, f"{vision}."), first(family.projector)
    if (vision, layers, projector) == (family.vision, family.vision_layers, family.projector):
        return family
    return replace(family, vision=vision, vision_layers=layers, projector=projector)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path below this one; None if there is none."""
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module
