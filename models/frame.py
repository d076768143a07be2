"""The input of the text stack: embeddings, and a frame with everything else that the stack is called with.

The outer model hands the text stack more than embeddings: positions on several axes (mrope), masks in which the tokens
of a picture see each other, features that are added between layers (DeepStack), inputs of single layers, states that
layers attend to. Without them the stack computes another run than the model's own. A frame holds them for one run; it
is cut, extended and repeated together with the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import ModelError

_LEFT_OUT = {
    *("input_ids", "inputs_embeds", "past_key_values", "use_cache", "cache_position", "logits_to_keep", "labels"),
    *("return_dict", "output_attentions", "output_hidden_states"),
}
"""Arguments of the stack that every call gets anew."""
PER_LAYER = "per_layer_inputs"
"""Inputs of single layers, (row, token, layer, size), which depend on the ids of the tokens."""
_BETWEEN_LAYERS, _PLACES = "deepstack_visual_embeds", "visual_pos_masks"
ATTENDED = "cross_attention_states"
"""States of pictures that some layers attend to, (row, state, hidden)."""
_CROSS_MASK = "cross_attention_mask"
"""What each token sees of them, (row, 1, token, state): zeros, and large negative numbers where hidden."""
_OTHERWISE = {
    *("attention_mask", "position_ids", ATTENDED, _CROSS_MASK),
    *("full_text_row_masked_out_mask", _BETWEEN_LAYERS),
}
"""Arguments that are not laid out as (row, token, ...)."""
PER_QUERY = (_CROSS_MASK, "full_text_row_masked_out_mask")
"""Tensors (row, 1, token, ...), of which an appended token gets what the token before it has."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The keys that a text token sees by the rules of one kind of layer, pictures left aside."""

    window: int | None = None
    """Number of keys that a sliding window shows, the token's own included; None for all."""
    chunk: int | None = None
    """Length of the chunks within which tokens see each other; None for one chunk."""

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return booleans (query, key), True where seen, for positions of queries and keys in the sequence."""
        queries, keys = queries[:, None], keys[None, :]
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (queries - keys < self.window)
        if self.chunk is not None:
            seen = seen & (queries // self.chunk == keys // self.chunk)
        return seen


def reaches(config: Any) -> dict[str, Reach]:
    """Return the reach of text tokens by kind of layer, for the text configuration of a model."""
    return {
        "full_attention": Reach(),
        "sliding_attention": Reach(window=getattr(config, "sliding_window", None)),
        "chunked_attention": Reach(chunk=getattr(config, "attention_chunk_size", None)),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """Everything that the text stack is called with beside its embeddings, in one run of one or several rows.

    Masks of pairs of tokens are boolean, True where seen. What a call without it would get as well is left out: a mask
    that hides nothing, and positions that count the tokens from 0.
    """

    keywords: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the text stack by name: tensors, and lists or dictionaries of tensors."""
    per_token: frozenset[str] = frozenset()
    """The arguments that are laid out as (row, token, ...)."""
    reaches: Mapping[str, Reach] = field(default_factory=dict, repr=False)
    """What appended tokens see, by kind of layer."""
    layer_inputs: Tensor | None = field(default=None, repr=False)
    """What the stack makes of `per_layer_inputs` and the embeddings for its layers, (row, token, layer, size), where
    layers are replayed; a call of the stack makes it anew."""

    @classmethod
    def of_call(cls, keywords: Mapping[str, Any], *, rows: int, length: int, config: Any) -> Frame:
        """Return the frame of a call of the text stack.

        Args:
            keywords: All arguments of the call by name.
            rows: Number of rows of the call.
            length: Number of tokens of the call.
            config: The text configuration of the model.
        """
        kept = {name: value for name, value in keywords.items() if name not in _LEFT_OUT and _holds_tensors(value)}
        if "attention_mask" in kept:
            kept["attention_mask"] = _of_masks(_seen, kept["attention_mask"])
        if "position_ids" in kept and kept["position_ids"].ndim == 1:
            kept["position_ids"] = kept["position_ids"][None]
        if ATTENDED in kept:  # the pictures of a row, one after another
            kept[ATTENDED] = kept[ATTENDED].reshape(rows, -1, kept[ATTENDED].shape[-1])
        kept = {name: value for name, value in kept.items() if not _is_default(name, value)}
        per_token = frozenset(
            name
            for name, value in kept.items()
            if name not in _OTHERWISE and isinstance(value, Tensor) and value.shape[:2] == (rows, length)
        )
        return cls(keywords=kept, per_token=per_token, reaches=reaches(config))

    def __bool__(self) -> bool:
        """Return whether the stack gets anything beside its embeddings."""
        return bool(self.keywords)

    @property
    def rows(self) -> int:
        """The number of rows that the frame tells apart; 1 if it serves any number."""
        return max((_rows(name, value) for name, value in self.keywords.items()), default=1)

    def arguments(self, rows: int, length: int, mask: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the arguments of a call of the text stack with this many rows and tokens.

        mask: a function that turns a boolean mask (row, 1, query, key) into the one that the attention takes. Raises
        `ModelError` if the frame belongs to another number of tokens.
        """
        for name, value in self.keywords.items():
            if (own := self._length(name, value)) not in (None, length):
                raise ModelError(f"{name} of the frame is for {own} tokens, and the embeddings have {length}")
        arguments = dict(self.for_rows(rows).keywords)
        if "attention_mask" in arguments:
            arguments["attention_mask"] = _of_masks(
                lambda each: mask(each) if each.ndim == 4 else each, arguments["attention_mask"]
            )
        return arguments

    def cut(self, length: int) -> Frame:
        """Return the frame of the first tokens only."""
        return self.part(0, length, keys=length)

    def part(self, start: int, end: int, *, keys: int) -> Frame:
        """Return the frame of the tokens from start to end (excluded), which attend to the first `keys` tokens."""
        places = self.keywords.get(_PLACES)
        cut = {name: self._cut(name, value, start, end, keys) for name, value in self.keywords.items()}
        if start:
            cut.pop(ATTENDED, None)  # their keys and values are kept with those of the first tokens
        if _BETWEEN_LAYERS in cut and places is not None:
            inside = torch.zeros_like(places)
            inside[:, start:end] = True
            chosen = inside[places]
            cut[_BETWEEN_LAYERS] = [each[chosen.to(each.device)] for each in cut[_BETWEEN_LAYERS]]
        return replace(self, keywords=cut)

    def split_before(self, start: int) -> int:
        """Return the last place up to `start` at which a run can be split: no token before it sees one behind it.

        In a prefix in which everything sees everything (PaliGemma), or in a picture, there is none but its beginning.
        """
        for mask in _masks(self.keywords.get("attention_mask")):
            while mask.ndim == 4 and bool((later := mask[..., :start, start:].any(-1).any(0).any(0)).any()):
                start = int(later.nonzero()[0])
        return start

    def extended(self, count: int, *, per_layer: Tensor | None = None) -> Frame:
        """Return the frame with text tokens after the others: positions go on from the largest of each axis.

        Args:
            count: Number of tokens.
            per_layer: The inputs of single layers that belong to these tokens, (row or 1, token, layer, size).

        Raises:
            ModelError: The frame has inputs of single layers, and none are given for these tokens.
        """
        if not count:
            return self
        continued = {name: self._continued(name, value, count) for name, value in self.keywords.items()}
        own = self.keywords.get(PER_LAYER)
        if own is not None:
            if per_layer is None:
                raise ModelError("the inputs of single layers depend on the ids of the tokens that follow; pass them")
            continued[PER_LAYER] = torch.cat([own, per_layer.expand(len(own), -1, -1, -1)], dim=1)
        return replace(self, keywords=continued)

    def _continued(self, name: str, value: Any, count: int) -> Any:
        if name == "attention_mask":
            if isinstance(value, Mapping):
                return {
                    kind: None if mask is None else self._more_keys(mask, count, kind) for kind, mask in value.items()
                }
            return self._more_keys(value, count, "full_attention")
        if name == "position_ids":
            steps = torch.arange(1, count + 1, device=value.device)
            return torch.cat([value, value.amax(-1, keepdim=True) + steps], dim=-1)
        if name in PER_QUERY:
            return torch.cat([value, value[:, :, -1:].expand(-1, -1, count, -1)], dim=2)
        return pad(value, (*[0, 0] * (value.ndim - 2), 0, count)) if name in self.per_token else value

    def _more_keys(self, mask: Tensor, count: int, kind: str) -> Tensor:
        """Return the mask with this many tokens after the others, which see what text tokens see."""
        if mask.ndim == 2:
            return pad(mask, (0, count), value=1)
        length = mask.shape[-1]
        queries = torch.arange(length, length + count, device=mask.device)
        seen = self.reaches.get(kind, Reach()).mask(queries, torch.arange(length + count, device=mask.device))
        is_token = pad(mask.any(-2), (0, count), value=True)  # padding is seen by itself at most
        return torch.cat([pad(mask, (0, count)), (seen & is_token[..., None, :])], dim=-2)

    def _cut(self, name: str, value: Any, start: int, end: int, keys: int) -> Any:
        if name == "attention_mask":
            return _of_masks(lambda mask: mask[:, :keys] if mask.ndim == 2 else mask[..., start:end, :keys], value)
        if name == "position_ids":
            return value[..., start:end]
        if name in PER_QUERY:
            return value[:, :, start:end]
        return value[:, start:end] if name in self.per_token else value

    def _length(self, name: str, value: Any) -> int | None:
        """Return the number of tokens that the argument is for; None if it does not tell."""
        if name == "attention_mask":
            masks = [mask for mask in _masks(value) if mask.ndim == 4]
            return masks[0].shape[-2] if masks else None
        if name == "position_ids":
            return value.shape[-1]
        if name in PER_QUERY:
            return value.shape[2]
        return value.shape[1] if name in self.per_token else None

    def for_rows(self, rows: int) -> Frame:
        """Return the frame for this many rows, a multiple of those that it has: each row is repeated in place."""
        times = rows // self.rows
        if times * self.rows != rows:
            raise ModelError(f"a frame of {self.rows} rows does not fit {rows} rows")
        return self if rows == self.rows else self.of_rows([row for row in range(self.rows) for _ in range(times)])

    def of_rows(self, rows: Sequence[int]) -> Frame:
        """Return the frame of some rows, in this order; rows may repeat."""
        places, own = self.keywords.get(_PLACES), self.rows
        picked = {name: _pick(name, value, rows, own) for name, value in self.keywords.items()}
        if _BETWEEN_LAYERS in picked and places is not None:
            counts = places.expand(own, -1).sum(-1).tolist()
            picked[_BETWEEN_LAYERS] = [
                torch.cat([each.split(counts)[row] for row in rows]) for each in picked[_BETWEEN_LAYERS]
            ]
        return replace(self, keywords=picked)

    @property
    def has_pictures(self) -> bool:
        """Whether layers attend to the states of pictures, which stand at no position."""
        return self.pictures is not None

    @property
    def pictures(self) -> Tensor | None:
        """The states of pictures that layers attend to, (row, state, hidden); None in most models."""
        return self.keywords.get(ATTENDED)

    def differs(self, other: Frame, *, beside_pictures: bool = False) -> bool:
        """Return whether any argument but what enters single layers differs.

        beside_pictures: whether the states of pictures may differ as well, if there are equally many.
        """
        names = {*self.keywords, *other.keywords} - {_BETWEEN_LAYERS, PER_LAYER}
        mine, theirs = self.pictures, other.pictures
        if beside_pictures and mine is not None and theirs is not None and mine.shape[1:] == theirs.shape[1:]:
            names.discard(ATTENDED)
        return not all(_are_equal(self.keywords.get(name), other.keywords.get(name)) for name in names)

    def difference(self, other: Frame) -> str:
        """Return in words what keeps both runs from one replay: what is neither between layers nor of pictures."""
        if not self.differs(other, beside_pictures=True):
            return ""
        return "such as the sizes of their pictures" if self.has_pictures else "such as the positions of their tokens"

    def seeing_others(self, other: Frame, length: int) -> list[int]:
        """Return the tokens, out of `length`, that attend to states of pictures which differ in the other frame."""
        if self.pictures is None or other.pictures is None:
            return []
        moved, mask = (self.pictures != other.pictures).any(-1).any(0), self.keywords.get(_CROSS_MASK)
        if mask is None:
            return list(range(length)) if bool(moved.any()) else []
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return (seen & moved.to(mask.device)).any(-1).any(0).any(0).nonzero().flatten().tolist()

    def entering_layer(self, number: int) -> list[Tensor]:
        """Return what a layer is given beside the states that the layer before wrote, each (row or 1, token, size)."""
        added = [self.between_layers[number]] if number in self.between_layers else []
        return added if self.layer_inputs is None else [*added, self.layer_inputs[:, :, number]]

    @cached_property
    def between_layers(self) -> Mapping[int, Tensor]:
        """What is added to the states that enter a layer: (row or 1, token, hidden), zeros where nothing is.

        Source: DeepStack, arXiv 2406.04334.
        """
        features, places = self.keywords.get(_BETWEEN_LAYERS), self.keywords.get(_PLACES)
        if features is None or places is None:
            return {}
        dense = {}
        for number, each in enumerate(features, 1):
            added = each.new_zeros(*places.shape, each.shape[-1])
            added[places.to(each.device)] = each
            dense[number] = added
        return dense


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderInput:
    """What the text stack reads in one run of one or several rows: embeddings and their frame."""

    embeddings: Tensor
    """(row, token, hidden)"""
    frame: Frame = field(default_factory=Frame)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.embeddings)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.embeddings.shape[1]

    @torch.no_grad()
    def replayed_frame(self, decoder: Any) -> Frame:
        """Return the frame with what this text stack gives to its single layers beside their states.

        The stack makes it of the embeddings and of inputs that depend on the ids of the tokens (Gemma 4).
        """
        own = self.frame.for_rows(self.rows).keywords.get(PER_LAYER)
        made = None if own is None else decoder.project_per_layer_inputs(self.embeddings, own)
        return replace(self.frame, layer_inputs=made)

    def cut(self, length: int) -> DecoderInput:
        """Return the input of the first tokens only."""
        return DecoderInput(embeddings=self.embeddings[:, :length], frame=self.frame.cut(length))

    def part(self, start: int, end: int) -> DecoderInput:
        """Return the input of the tokens from start to end (excluded), which attend to all tokens up to the end."""
        return DecoderInput(embeddings=self.embeddings[:, start:end], frame=self.frame.part(start, end, keys=end))

    def for_rows(self, rows: int) -> DecoderInput:
        """Return the input with each row repeated in place, so that there are this many."""
        times = rows // self.rows
        if times * self.rows != rows:
            raise ModelError(f"an input of {self.rows} rows does not fit {rows} rows")
        embeddings = self.embeddings if times == 1 else self.embeddings.repeat_interleave(times, 0)
        return replace(self, embeddings=embeddings)

    def of_rows(self, rows: Sequence[int]) -> DecoderInput:
        """Return the input of some rows, in this order."""
        frame = self.frame if self.frame.rows == 1 else self.frame.of_rows(rows)
        return DecoderInput(embeddings=self.embeddings[list(rows)], frame=frame)

    def equals(self, other: DecoderInput) -> bool:
        """Return whether both are the same run."""
        if not torch.equal(self.embeddings, other.embeddings) or self.frame.differs(other.frame):
            return False
        pair = self.frame.between_layers, other.frame.between_layers
        return pair[0].keys() == pair[1].keys() and all(
            bool((pair[0][each] == pair[1][each]).all()) for each in pair[0]
        )

    @classmethod
    def of_runs(cls, inputs: Sequence[DecoderInput]) -> DecoderInput:
        """Return one input with the rows of all of these, which have equally many tokens."""
        embeddings = torch.cat([each.embeddings for each in inputs])
        frames = [each.frame.for_rows(each.rows) for each in inputs]
        names = dict.fromkeys(name for frame in frames for name in frame.keywords)
        if not names:
            return cls(embeddings=embeddings)
        return cls(embeddings=embeddings, frame=_side_by_side(frames, [0] * len(frames), inputs[0].length, inputs))

    @classmethod
    def padded(cls, inputs: Sequence[DecoderInput], shifts: Sequence[int]) -> DecoderInput:
        """Return inputs of one row each as one batch, each moved to the right by its shift.

        Embeddings are zero where padded. Padding sees itself alone and is seen by nothing else.
        """
        width = max(shift + each.length for shift, each in zip(shifts, inputs, strict=True))
        embeddings = inputs[0].embeddings.new_zeros(len(inputs), width, inputs[0].embeddings.shape[-1])
        mask = torch.zeros(len(inputs), width, dtype=torch.long, device=embeddings.device)
        for index, (shift, each) in enumerate(zip(shifts, inputs, strict=True)):
            embeddings[index, shift : shift + each.length] = each.embeddings[0]
            mask[index, shift : shift + each.length] = 1
        frame = _side_by_side([each.frame for each in inputs], shifts, width, inputs)
        keywords = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} | dict(frame.keywords)
        frame = replace(frame, keywords=keywords)
        return cls(embeddings=embeddings, frame=frame)

    def with_embeddings(self, embeddings: Tensor) -> DecoderInput:
        """Return the input with other embeddings (row, token, hidden) in the same frame."""
        return replace(self, embeddings=embeddings)


def _side_by_side(frames: Sequence[Frame], shifts: Sequence[int], width: int, inputs: Sequence[DecoderInput]) -> Frame:
    """Return one frame for the rows of all of these, each moved to the right by its shift in a batch of this width.

    Each frame has as many rows as its input. An argument that only some of them have gets its default in the others.
    """
    names = dict.fromkeys(name for frame in frames for name in frame.keywords)
    merged: dict[str, Any] = {}
    lengths = [each.length for each in inputs]
    for name in names:
        values = [frame.keywords.get(name) for frame in frames]
        present = [value for value in values if value is not None]
        if name == "attention_mask":
            merged[name] = _merged_masks(frames, values, shifts, width, inputs)
        elif name == "position_ids":
            merged[name] = _merged_positions(values, shifts, width, inputs)
        elif name == _BETWEEN_LAYERS:
            merged[name] = [torch.cat(parts) for parts in zip(*present, strict=True)]
        elif len(present) < len(values) and name not in _MAY_LACK:
            raise ModelError(f"only some prompts of the batch have {name}; use prompts of one kind together")
        elif name in PER_QUERY:
            sides = zip(present, shifts, lengths, strict=True)
            merged[name] = torch.cat([pad(value, (0, 0, shift, width - shift - own)) for value, shift, own in sides])
        elif any(name in frame.per_token for frame in frames):
            parts = []
            for value, shift, own, each in zip(values, shifts, lengths, inputs, strict=True):
                part = present[0].new_zeros(each.rows, own, *present[0].shape[2:]) if value is None else value
                parts.append(pad(part, (*[0, 0] * (part.ndim - 2), shift, width - shift - own)))
            merged[name] = torch.cat(parts)
        else:
            merged[name] = torch.cat(present) if isinstance(present[0], Tensor) else present[0]
    per_token = frozenset().union(*(frame.per_token for frame in frames))
    return Frame(keywords=merged, per_token=per_token, reaches=next((f.reaches for f in frames if f.reaches), {}))


_MAY_LACK = (_PLACES, "token_type_ids", "mm_token_type_ids")
"""Arguments of which zeros mean that nothing is marked."""


def _merged_positions(
    values: Sequence[Tensor | None], shifts: Sequence[int], width: int, inputs: Sequence[DecoderInput]
) -> Tensor:
    """Return positions (..., row, token) of all rows; where padded they are 0."""
    axes = max((value.shape[:-2] for value in values if value is not None), key=len)
    device = inputs[0].embeddings.device
    rows = []
    for value, shift, each in zip(values, shifts, inputs, strict=True):
        own = torch.arange(each.length, device=device).expand(each.rows, -1) if value is None else value
        own = own.expand(*axes, each.rows, -1)
        rows.append(pad(own, (shift, width - shift - each.length)))
    return torch.cat(rows, dim=-2)


def _merged_masks(
    frames: Sequence[Frame],
    values: Sequence[Any],
    shifts: Sequence[int],
    width: int,
    inputs: Sequence[DecoderInput],
) -> Any:
    """Return masks of all rows, one or one for each kind of layer."""
    kinds = list(dict.fromkeys(kind for value in values if isinstance(value, Mapping) for kind in value))
    if not kinds:
        return _merged_mask(frames, values, shifts, width, inputs, "full_attention")
    return {
        kind: _merged_mask(
            frames,
            [value.get(kind) if isinstance(value, Mapping) else value for value in values],
            *(shifts, width, inputs, kind),
        )
        for kind in kinds
    }


def _merged_mask(
    frames: Sequence[Frame],
    masks: Sequence[Tensor | None],
    shifts: Sequence[int],
    width: int,
    inputs: Sequence[DecoderInput],
    kind: str,
) -> Tensor:
    """Return one mask (row, 1, query, key); padding sees itself alone, so that nothing is undefined there."""
    device = inputs[0].embeddings.device
    reach = next((frame.reaches[kind] for frame in frames if kind in frame.reaches), Reach())
    merged = []
    for mask, shift, each in zip(masks, shifts, inputs, strict=True):
        places = torch.arange(each.length, device=device)
        if mask is None:
            mask = reach.mask(places, places)[None, None]
        elif mask.ndim != 4:
            raise ModelError(
                "some prompts of the batch are padded and others have masks of pairs; use one prompt at a time"
            )
        whole = torch.eye(width, dtype=torch.bool, device=device).repeat(each.rows, 1, 1, 1)
        inside = slice(shift, shift + each.length)
        whole[:, :, inside, inside] = mask
        merged.append(whole)
    return torch.cat(merged)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(part, Tensor) for part in value.values())
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(part, Tensor) for part in value)
    return isinstance(value, Tensor)


def _masks(value: Any) -> Iterator[Tensor]:
    """Yield the masks in an argument."""
    for each in value.values() if isinstance(value, Mapping) else (value,):
        if isinstance(each, Tensor):
            yield each


def _of_masks(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return the argument with a function applied to each of its masks."""
    if isinstance(value, Mapping):
        return {kind: function(mask) if isinstance(mask, Tensor) else mask for kind, mask in value.items()}
    return function(value)


def _seen(mask: Tensor) -> Tensor:
    """Return a mask of pairs of tokens as booleans, True where seen; a mask of tokens is unchanged."""
    if mask.ndim != 4 or mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(((mask != 0) & ~hidden).any()):
        raise ModelError("the outer model adds a bias to attention scores, which a frame cannot hold")
    return ~hidden


def _is_default(name: str, value: Any) -> bool:
    """Return whether a call without the argument is the same."""
    if name == "attention_mask" and isinstance(value, Tensor):
        return value.ndim == 2 and bool(value.all())
    if name == "position_ids":
        return torch.equal(value, torch.arange(value.shape[-1], device=value.device).expand_as(value))
    return False


def _rows(name: str, value: Any) -> int:
    if name == "position_ids":
        return value.shape[-2] if value.ndim > 1 else 1
    if name == "attention_mask":
        return max(len(mask) for mask in _masks(value))
    return len(value) if isinstance(value, Tensor) else 1


def _pick(name: str, value: Any, rows: Sequence[int], own: int) -> Any:
    """Return an argument for some rows; one that serves all rows alike is repeated as a view."""
    if name == _BETWEEN_LAYERS or not isinstance(value, Tensor | Mapping):
        return value
    if isinstance(value, Mapping):
        return {kind: _pick(name, part, rows, own) for kind, part in value.items()}
    axis = value.ndim - 2 if name == "position_ids" else 0
    if value.shape[axis] == 1:
        sizes = [-1] * value.ndim
        sizes[axis] = len(rows)
        return value.expand(*sizes)
    return value.index_select(axis, torch.tensor(list(rows), device=value.device))


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape[1:] == second.shape[1:] and bool((first == second).all())
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_are_equal(first[kind], second[kind]) for kind in first)
    return first is second


_OWN_POSITIONS = {"position_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw"}
"""Inputs from which a model makes positions on several axes itself, padding left out."""


def with_positions(inputs: dict[str, Any], first: Callable[[], int]) -> dict[str, Any]:
    """Return inputs with the positions that each left-padded row would have on its own; `first` gives the first one."""
    mask = inputs.get("attention_mask")
    if _OWN_POSITIONS & inputs.keys() or not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, 0].all()):
        return inputs
    return inputs | {"position_ids": (mask.long().cumsum(dim=-1) - 1).clamp(min=0) + first()}
