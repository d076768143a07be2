"""Verification at load time: processor and model agree on image tokens, and the model does what its family row says."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import AddressError, ModelError, reason
from ..families import Projection, Site
from ..frame import DecoderInput
from ..hooks import capture, first_call, patch
from ..placement import Elsewhere, is_plain, packed_parts, stored_beside, stored_weights
from ..prompts import Prompt, batches, collate
from ..replay.upper import PaddedBatch
from ..vlm import VisionLanguageModel
from .processors import answer_gap, image_token_error, probe_prompt, rounding
from .sources import out_of_memory

_HALF = (torch.float16, torch.bfloat16)
_BATCH_ROUNDING = {torch.float64: 2e-5, torch.float32: 1e-3}
"""Differences of logits, in shares of the largest, that rounding in batches of another size can explain; 5 % in half
precision. Norms and running states are computed in float32 in a float64 model, too."""
_SMALLEST = 2
"""Size in bytes of the narrowest dtype that a model computes in."""
_REGROUPING = 32
"""Rounding errors of the largest entry by which states may move where experts compute a token among other tokens."""
_LEAST_SCALE = 1e-4
"""A part that a layer adds at a smaller scale than this is none of its parts."""


def prove_addresses(vlm: VisionLanguageModel) -> str:
    """Return one line that summarises the verification, or raise `ModelError` with the site that contradicts the row.

    Every weight is finite (one pass over them). The rest takes ten forward passes on one picture and two questions:

    - Every site of every layer runs and has the right shape. Attention and MLP, each at some scale, add up to what the
      layer writes. Projections write what their modules write, or what the norm behind them reads, and read their
      weights in the row's orientation. Experts have no single projection.
    - Patches at all sites that change nothing leave the logits bit-equal. A patch at one position of each kind of site
      leaves earlier positions and earlier layers bit-equal and changes later ones. Experts, which compute a token
      together with others, may round otherwise; where the row says prefix=True, earlier positions do change.
    - A padded batch of two prompts, whole and as a value search runs it, gives what they give one by one.
    - Image positions, and no others, hold the image features. The layers of the vision tower and the projector, where
      the row names them, feed each other in that order.

    Not proven: patches at other layers, prompts of other lengths, and the orientation of quantised weights.
    """
    with torch.no_grad():
        prompt = probe_prompt(vlm)
        position = prompt.groups["question_only"][len(prompt.groups["question_only"]) // 2]
        probe = _Probe(vlm=vlm, prompt=prompt, position=position)
        _prove_weights(vlm)
        if vlm.has_vision and not vlm.family.attended:
            with proving("image", vlm):
                positions, features = len(prompt.groups["image"]), len(probe.features)
            if positions != features:
                raise image_token_error(vlm, positions, features)
        clean, states = _prove_identity(probe)
        for layer in range(vlm.layers):
            _prove_layer(probe, states, layer)
        with proving("hidden 0", vlm):
            _prove_text_stack(probe, clean)
            _prove_batch(probe, clean)
        _prove_experts(probe)
        layer = _patched_layer(vlm)
        for kind in ("hidden", "mlp", "attention"):
            _prove_patch(probe, Site(kind, layer), clean, states)
        _prove_inputs(probe, clean)
        with proving("image", vlm):
            images = _prove_images(probe) if vlm.has_vision else "no pictures"
    return f"addresses proven ({3 * vlm.layers} sites, patches at layer {layer} act forward, {images})"


@contextmanager
def proving(site: str, vlm: VisionLanguageModel) -> Iterator[None]:
    """Turn an error of the libraries inside the block into an `AddressError` that names the site."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, ModelError) or out_of_memory(error):
            raise
        raise AddressError(
            f"site '{site}' of {vlm.name!r} fails its proof: {reason(error)}; pass another row in families=, or fetch "
            "configuration, processor and weights again from one place"
        ) from error


@dataclass(frozen=True)
class _Side:
    """The input or output of a module, as a key of recorded states."""

    key: Site | Projection | nn.Module
    inputs: bool
    """True for the input, False for the output."""


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """The state at one side of a module in a forward pass."""

    shape: tuple[int, ...]
    """The shape of the whole state."""
    tail: Tensor
    """The state from the probed position on, (1, token, width); copies of whole states would fill the memory."""


States = dict[_Side, _Recorded]


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """The model, the prompt used to verify it, and the position of that prompt at which patches are placed."""

    vlm: VisionLanguageModel
    prompt: Prompt
    position: int

    def error(self, site: Site | str, failure: str) -> AddressError:
        """Return the error that says how one site fails."""
        return AddressError(
            f"site '{site}' of {self.vlm.name!r} fails its proof: {failure}; "
            f"mend the row of family {self.vlm.family.name!r}, or pass another one in families="
        )

    def run(self, edits: dict[Site, Callable[[Tensor], Tensor]] | None = None) -> tuple[Tensor, States]:
        """Return the logits (1, token, vocab) under these edits, and the states that identity patches recorded."""
        states: States = {}

        def record(side: _Side) -> Callable[[Tensor], Tensor]:
            def keep(value: Tensor) -> Tensor:
                states[side] = _Recorded(shape=tuple(value.shape), tail=value[:, self.position :].clone())
                return value

            return keep

        layers = range(self.vlm.layers)
        hidden = [Site("hidden", layer) for layer in layers]
        parts = [Site(kind, layer) for kind in ("mlp", "attention") for layer in layers]
        normed = [site for site in parts if self.norm(site) is not None]
        projections = [projection for site in parts if (projection := self.projection(site)) is not None]
        beside = [module for layer in layers if (module := self.vlm.addresses.beside(layer)) is not None]
        with ExitStack() as stack:
            if edits:
                stack.enter_context(patch(self.vlm, edits))  # first, so that the recorder sees the patched states
            for keys, inputs in ((hidden + parts + projections + beside, False), (hidden + normed + projections, True)):
                stack.enter_context(patch(self.vlm, {key: record(_Side(key, inputs)) for key in keys}, inputs=inputs))
            return self.vlm.forward(self.entering) if edits else self.vlm.logits(self.prompt), states

    @cached_property
    def entering(self) -> DecoderInput:
        """What the text stack reads, from which it runs again without the vision tower."""
        return self.vlm.decoder_input(self.prompt)

    @cached_property
    def features(self) -> Tensor:
        """The image features of the picture, (image token, hidden)."""
        return self.vlm.image_features(self.prompt)

    def projection(self, site: Site) -> Projection | None:
        """Return the linear map that writes the output of an MLP or attention site; None for experts."""
        if site.kind == "attention":
            return self.vlm.attention_projection(site.layer)
        return self.vlm.down_projection(site.layer) if self.vlm.has_down_projection(site.layer) else None

    def norm(self, site: Site) -> str | None:
        """Return the row's name of the norm between the projection of an MLP or attention site and the site."""
        return self.vlm.family.mlp_norm if site.kind == "mlp" else self.vlm.family.attention_norm

    @cached_property
    def has_experts(self) -> bool:
        """Whether a token's states depend, by rounding, on which other tokens its experts compute with it."""
        return any(self.vlm.addresses.has_experts(layer) for layer in range(self.vlm.layers))

    def same(self, patched: Tensor, clean: Tensor) -> bool:
        """Return whether two states or logits are bit-equal, or equal up to the rounding of regrouped experts."""
        if torch.equal(patched, clean) or not self.has_experts:
            return torch.equal(patched, clean)
        rounding = _REGROUPING * torch.finfo(self.vlm.dtype).eps * float(clean.abs().max())
        return float((patched - clean).abs().max()) <= rounding

    def unmoved(self, patched: Tensor, clean: Tensor) -> bool:
        """Return whether logits are the same, of a quantised model up to the rounding of its activations.

        The 8-bit kernels of bitsandbytes keep a column of all tokens in half precision if one token is large there.
        """
        if not self.vlm.is_quantised:
            return self.same(patched, clean)
        return bool((patched - clean).norm() <= rounding(self.vlm) * clean.norm())


def _prove_identity(probe: _Probe) -> tuple[Tensor, States]:
    """Return the unchanged logits and states. Raise `ModelError` unless identity patches leave the logits bit-equal."""
    vlm = probe.vlm
    clean = vlm.logits(probe.prompt)
    if not clean.isfinite().all():
        advice = "pass dtype='float32'" if vlm.dtype in _HALF else "its weights are damaged, so fetch it again"
        raise ModelError(
            f"{vlm.name!r} gives logits that are not finite in {vlm.dtype}, and its weights are all finite; {advice}"
        )
    patched, states = probe.run()
    if not torch.equal(patched, clean):
        raise ModelError(
            f"patches that change nothing change the logits of {probe.vlm.name!r}; its modules are not plain"
        )
    return clean, states


def _prove_weights(vlm: VisionLanguageModel) -> None:
    """Check that every weight is finite, used by the probe or not, in one pass without a copy."""
    for name, weight in _floating_parts(vlm):
        low, high = (float(value) for value in torch.aminmax(weight))  # nan if any value is
        if math.isfinite(low) and math.isfinite(high):
            continue
        if not math.isnan(low) and vlm.dtype == torch.float16 != vlm.stored_dtype:
            raise ModelError(
                f"the weight {name!r} of {vlm.name!r} is infinite in float16, because it is too large for that or "
                "damaged; pass dtype='bfloat16' or 'float32', which tells the two apart"
            )
        raise ModelError(
            f"the weight {name!r} of {vlm.name!r} holds values that are not finite in its file; fetch the model again"
        )


def _floating_parts(vlm: VisionLanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of each weight that could hold values that are not finite: of a packed one, its scales."""
    beside = stored_beside(vlm.model) if vlm.is_quantised else {}
    for name, stored in (stored_weights(vlm.model) | beside).items():
        for part in packed_parts(stored.read() if isinstance(stored, Elsewhere) else stored).values():
            if part.is_floating_point() and part.itemsize >= _SMALLEST and part.numel():
                yield name, part


def _prove_layer(probe: _Probe, states: States, layer: int) -> None:
    """Check the shapes of one layer, its residual sum and its two projections."""
    sites = {kind: Site(kind, layer) for kind in ("hidden", "mlp", "attention")}
    expected = (1, probe.prompt.length, probe.vlm.hidden)
    for site in sites.values():
        recorded = _state(probe, states, site)
        if recorded.shape != expected:
            raise probe.error(site, f"its output has shape {recorded.shape} instead of {expected}")
    into = states[_Side(sites["hidden"], True)].tail
    parts = [into, *(_state(probe, states, sites[kind]).tail.to(into.device) for kind in ("attention", "mlp"))]
    beside = probe.vlm.addresses.beside(layer)
    if beside is not None:
        parts.append(states[_Side(beside, False)].tail.to(into.device))
    written = states[_Side(sites["hidden"], False)].tail.to(into.device)
    if not (
        _close(sum(parts[1:], into), written, sum((part.norm() for part in parts[1:]), into.norm()))
        or _close_at_scales(parts, written)
    ):
        raise probe.error(
            f"{sites['attention']}' and '{sites['mlp']}",
            "what they write does not add up to what the layer writes, at any scale",
        )
    for kind in ("mlp", "attention"):
        _prove_projection(probe, states, sites[kind])


def _close_at_scales(parts: Sequence[Tensor], written: Tensor) -> bool:
    """Return whether the sum of these parts, each at some scale (Granite, gates), is what the layer writes."""
    columns, target = torch.stack([part.double().flatten() for part in parts], 1), written.double().flatten()
    scales = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    if not scales.isfinite().all() or scales.abs().min() < _LEAST_SCALE:
        return False
    size = (columns * scales).norm(dim=0).sum()
    return _close((columns @ scales), target, size, eps=4 * torch.finfo(written.dtype).eps)


def _prove_projection(probe: _Probe, states: States, site: Site) -> None:
    """Check that the projection writes the site's output and uses its weight in the row's orientation."""
    projection = probe.projection(site)
    if projection is None:
        return
    read, written = states.get(_Side(projection, True)), states.get(_Side(projection, False))
    if read is None or written is None:
        raise probe.error(site, f"its projection {projection.path!r} does not run")
    norm, is_part = probe.norm(site), site.kind == "mlp" and probe.vlm.addresses.has_experts(site.layer)
    passed_on = _state(probe, states, site) if norm is None else states[_Side(site, True)]
    if not is_part and not torch.equal(written.tail, passed_on.tail):  # a shared expert writes a part only
        reader = "write what the site writes" if norm is None else f"write what its norm {norm!r} reads"
        raise probe.error(site, f"its projection {projection.path!r} does not {reader}")
    if not is_plain(projection.weight):
        return  # quantised weights are packed; only their module knows their orientation
    weight = projection.weight.T if projection.transposed else projection.weight
    shape = tuple(weight.shape)
    if shape != (probe.vlm.hidden, read.shape[-1]):
        raise probe.error(
            site, f"its projection {projection.path!r} is (hidden, width) {shape}, but reads width {read.shape[-1]}"
        )
    bias = projection.bias
    computed = read.tail.double() @ weight.double().T + (0 if bias is None else bias.double())
    scale = read.tail.double().norm() * weight.double().norm() + (0 if bias is None else bias.double().norm())
    if not _close(computed, written.tail.double(), scale, eps=torch.finfo(written.tail.dtype).eps):
        raise probe.error(site, f"its projection {projection.path!r} is stored the other way round (transposed)")


def _prove_experts(probe: _Probe) -> None:
    """Check in one layer that routed experts write what their weights make of the keys that an edit reads."""
    vlm = probe.vlm
    layers = [layer for layer in range(vlm.layers) if vlm.expert_count(layer)]
    if not layers:
        return
    site = Site("mlp", layers[len(layers) // 2])
    experts = vlm.expert_projection(site.layer).experts
    with proving(str(site), vlm):
        with first_call(vlm, experts.source) as call:
            vlm.logits(probe.prompt)
        states, index, weights = experts.arguments((), call)
        keys, written = experts.keys(states, index, weights), experts.source(*call.values())
        computed = experts(keys) + experts.biases(index, weights)
    scale = 4 * written.double().norm()  # of the output alone: keys may be far larger, and half precision is coarse
    if not _close(computed.double(), written.double().view_as(computed), scale, eps=torch.finfo(written.dtype).eps):
        raise probe.error(site, f"its experts do not write what the slices of {experts.source.__class__.__name__} say")


def _prove_batch(probe: _Probe, clean: Tensor) -> None:
    """Check that a left-padded batch gives what its prompts give one by one, also when its prefix is run by itself."""
    vlm = probe.vlm
    pair = (probe.prompt, probe.prompt.asked_anew("Which?"))
    if len(batches(pair, len(pair))) > 1:
        return  # prompts of this model have to be run one by one
    alone = torch.cat([clean[:, -1], vlm.logits(pair[1])[:, -1]])
    inputs, shifts = collate(pair, vlm.tokenizer)
    entering = DecoderInput.padded([probe.entering, vlm.decoder_input(pair[1])], shifts)
    last = entering.length - 1
    start = entering.frame.split_before(last)
    columns = torch.full((len(pair), 1), last - start)
    searched = PaddedBatch.after_prefix(vlm, entering, start).logits(vlm, columns)
    for form, logits in (("", vlm.logits(inputs)[:, -1]), (" whose prefix is run by itself", searched[:, 0])):
        difference, size = float((logits - alone).abs().max()), float(alone.abs().max())
        if math.isnan(difference) and vlm.dtype == torch.float64:
            return  # where attention is not fused, transformers itself has no padded batches in float64
        share = rounding(vlm) if vlm.is_quantised else _BATCH_ROUNDING.get(vlm.dtype, 5e-2)
        if not difference <= share * size:
            raise probe.error(
                "hidden 0",
                f"a padded batch{form} gives logits that are off by {difference:.2g} from those of its prompts alone, "
                f"the largest of which is {size:.2g}",
            )


def _prove_text_stack(probe: _Probe, clean: Tensor) -> None:
    """Check that the text stack alone gives the logits, and that they are read from the last layer after the norm."""
    vlm, last = probe.vlm, Site("hidden", probe.vlm.layers - 1)
    norm, entering, _ = vlm.final_norm, probe.entering, vlm.after_head  # both run the model, so before hooks are placed
    with capture(vlm, [last, norm]) as written, capture(vlm, [norm], inputs=True) as read:
        alone = vlm.forward(entering)
    if not torch.equal(alone, clean):
        raise probe.error(
            "hidden 0", "running the text stack on the captured embeddings gives other logits than the model"
        )
    if norm not in read or not torch.equal(read[norm], written[last].to(read[norm].device)):
        raise probe.error(last, f"the final norm {vlm.path(norm)!r} does not read what this last layer writes")
    logits = vlm.readout(written[norm])
    if not torch.equal(logits, clean.to(logits.device)):
        raise probe.error(
            last, f"the output head and its scale or cap do not turn the output of {vlm.path(norm)!r} into the logits"
        )


def _patched_layer(vlm: VisionLanguageModel) -> int:
    """Return the middle layer, or a lower one that another layer follows which makes keys of its own.

    Layers that attend to the keys of a lower layer (Gemma 4) pass nothing on to later positions.
    """
    return max(0, min(vlm.layers // 2, _own_keys(vlm) - 2))


def _prove_patch(probe: _Probe, site: Site, clean: Tensor, states: States) -> None:
    """Check that a patch at one position changes this and later positions and layers, and nothing else."""
    at = probe.position

    def move(value: Tensor) -> Tensor:
        moved = value.clone()
        moved[:, at] = 1 - value[:, at]  # neither a scale nor a shift, which norms would take back
        return moved

    patched, after = probe.run({site: move})
    if not probe.vlm.family.prefix and not probe.unmoved(patched[:, :at], clean[:, :at]):
        raise probe.error(site, f"a patch at position {at} changes the logits of earlier positions")
    if probe.vlm.family.prefix and probe.same(patched[:, :at], clean[:, :at]):
        raise probe.error(site, f"a patch at position {at} changes no earlier logits, and the row says prefix=True")
    if torch.equal(patched[:, at], clean[:, at]):
        raise probe.error(site, f"a patch at position {at} has no effect on the logits there")
    if site.layer + 1 < _own_keys(probe.vlm) and torch.equal(patched[:, at + 1 :], clean[:, at + 1 :]):
        raise probe.error(site, f"a patch at position {at} has no effect on the logits of later positions")
    for layer in range(probe.vlm.layers):
        side = _Side(Site("hidden", layer), False)
        moved, before = after[side].tail, states[side].tail
        if layer < site.layer and not probe.same(moved, before):
            raise probe.error(site, f"a patch here leaves the hidden state of layer {layer} moved")
        if layer >= site.layer and torch.equal(moved[:, 0], before[:, 0]):
            raise probe.error(site, f"a patch here leaves the hidden state of layer {layer} unmoved")
    if site.kind == "attention":
        side, is_parallel = _Side(Site("mlp", site.layer), False), probe.vlm.family.parallel
        unmoved = probe.same if is_parallel else torch.equal  # regrouped experts round more than some patches do
        if unmoved(after[side].tail, states[side].tail) != is_parallel:
            relation = "sees" if is_parallel else "does not see"
            raise probe.error(site, f"the MLP of its layer {relation} it, and the row says parallel={is_parallel}")


def _own_keys(vlm: VisionLanguageModel) -> int:
    """Return how many layers compute keys and values of their own; those above may share them (Gemma 4), so that no
    token reads there what others have become."""
    return vlm.layers - (getattr(vlm.config.get_text_config(), "num_kv_shared_layers", 0) or 0)


def _prove_inputs(probe: _Probe, clean: Tensor) -> None:
    """Check that no input is missing that the processor makes, and that an answer does not change what precedes it."""
    vlm, prompt = probe.vlm, probe.prompt
    gap = answer_gap(vlm, prompt, clean)
    if not gap <= rounding(vlm):
        raise probe.error("answer", f"an answer moves the logits before it by {gap:.1e} of their size")
    outputs = vlm.frontend.outputs(prompt.text, prompt.images)
    missing = {name: value for name, value in outputs.items() if name not in prompt.inputs}
    for name in missing.keys() - {"labels", *vlm.family.dropped_inputs}:
        try:
            logits = vlm.logits({**prompt.inputs, name: missing[name]})
        except TypeError:
            continue  # the model does not take it
        if not torch.equal(logits, clean):
            raise probe.error("inputs", f"the processor's {name!r} changes the logits, and no prompt passes it on")


def _prove_images(probe: _Probe) -> str:
    """Check that image positions hold this picture's features and that no other position depends on the picture."""
    vlm, prompt = probe.vlm, probe.prompt
    image = list(prompt.groups["image"])
    entering = _prove_before_decoder(probe)
    embeddings, other = entering.embeddings, vlm.decoder_input(probe_prompt(vlm, inverted=True))
    if vlm.family.attended:
        if not other.frame.differs(entering.frame):
            raise probe.error("image", "another picture gives the same states to attend to")
        if not torch.equal(other.embeddings, embeddings):
            raise probe.error("image", "another picture changes the embeddings of words")
        return "pictures are attended to, at no position"
    features = probe.features.to(embeddings.device)
    if not image or not torch.equal(embeddings[0, image], features):
        raise probe.error("image", f"{len(image)} image positions do not hold the {len(features)} image features")
    words = [position for position in range(prompt.length) if position not in prompt.groups["image"]]
    if torch.equal(other.embeddings[0, image], embeddings[0, image]):
        raise probe.error("image", "another picture gives the same image features")
    if not torch.equal(other.embeddings[0, words], embeddings[0, words]):
        raise probe.error("image", "another picture changes the embeddings of words")
    return f"{len(image)} image tokens hold image features"


def _prove_before_decoder(probe: _Probe) -> DecoderInput:
    """Return what the text stack reads, from one pass that shows what happens in front of it.

    The vision tower runs, each of its layers reads what the previous one wrote, and the projector writes the image
    features. Of a picture that is attended to, only the tower is proven.
    """
    vlm, row = probe.vlm, probe.vlm.family
    layers_name, projector_name = (None, None) if row.attended else (row.vision_layers, row.projector)
    layers = vlm.vision_layers if layers_name else []
    if layers_name and not layers:
        raise probe.error("vision", f"its {layers_name!r} is no list of layers")
    parts = [*layers, vlm.projector] if projector_name else layers
    with capture(vlm, [vlm.vision_tower, *parts]) as written, capture(vlm, layers, inputs=True) as read:
        entering = vlm.decoder_input(probe.prompt)
    if vlm.vision_tower not in written:
        raise probe.error("image", "the vision tower did not run")
    silent = [vlm.path(part) for part in parts if part not in written]
    if silent:
        raise probe.error("vision", f"its module {silent[0]!r} does not run")
    for before, after in pairwise(layers):
        if not torch.equal(written[before].to(read[after].device), read[after]):
            raise probe.error("vision", f"its layer {vlm.path(after)!r} does not read what {vlm.path(before)!r} wrote")
    if projector_name and not _writes_features(probe, written[vlm.projector]):
        raise probe.error("projector", f"image features are not what {vlm.path(vlm.projector)!r} writes")
    return entering


def _writes_features(probe: _Probe, written: Tensor) -> bool:
    """Return whether image features are the projector's output, as it is or in the model's packing, or means of it."""
    vlm, prompt, features = probe.vlm, probe.prompt, probe.features
    return (
        torch.equal(written.flatten(0, -2).to(features.device), features)
        or torch.equal(_packed(vlm, prompt, written), features)
        or _are_means(vlm, prompt, features)
    )


def _packed(vlm: VisionLanguageModel, prompt: Prompt, written: Tensor) -> Tensor:
    """Return the projector's output in the model's packing, (image token, hidden); line ends are left as they are."""
    rows, places = written.flatten(0, -2), torch.arange(min(written.shape[-1], 31), device=written.device)
    numbers = torch.zeros_like(rows)  # as binary digits, which every dtype represents exactly
    numbers[:, places] = (torch.arange(1, len(rows) + 1, device=rows.device)[:, None] >> places & 1).to(rows)
    with patch(vlm, {vlm.projector: torch.zeros_like}):
        bare = vlm.image_features(prompt)
    with patch(vlm, {vlm.projector: lambda value: numbers.view_as(value)}):
        numbered = vlm.image_features(prompt)
    index = ((numbered != bare)[:, places].long() << places.to(bare.device)).sum(1)
    index = index.where(index <= len(rows), 0)  # the caller's comparison shows what is no packing of these rows
    return torch.where(index[:, None] > 0, rows.to(bare.device)[index - 1], bare)


def _are_means(vlm: VisionLanguageModel, prompt: Prompt, features: Tensor) -> bool:
    """Return whether image features are weighted means of the projector's rows, as where a model shrinks many tiles."""
    answers: list[Tensor] = []
    for written in (torch.zeros_like, torch.ones_like, lambda value: value / 2):
        with patch(vlm, {vlm.projector: written}):
            answers.append(vlm.image_features(prompt))
    zeros, ones, halves = answers
    shown = (ones != zeros).any(-1)  # the others are line ends
    is_mean = torch.allclose(ones[shown], torch.ones_like(ones[shown])) and not zeros[shown].any()
    return (
        is_mean and torch.allclose(halves[shown], features[shown] / 2) and torch.equal(zeros[~shown], features[~shown])
    )


def _state(probe: _Probe, states: States, site: Site) -> _Recorded:
    recorded = states.get(_Side(site, False))
    if recorded is None:
        raise probe.error(site, f"its module {probe.vlm.path(site)!r} does not run")
    return recorded


def _close(computed: Tensor, expected: Tensor, scale: Tensor, *, eps: float | None = None) -> bool:
    """Return whether the two are equal up to a few rounding errors of terms of this size."""
    return bool((computed - expected).norm() <= 8 * (eps or torch.finfo(expected.dtype).eps) * scale)
