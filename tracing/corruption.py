"""What a trace destroys before it looks for the states that bring the answer back: words or the picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..models import Prompt, VisionLanguageModel
from ..models.images import Picture, open_images
from .errors import TraceError


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrupted:
    """A prompt after the damage: as many tokens as before, perhaps several random versions."""

    embeddings: Tensor
    """(sample, token, hidden): what the first decoder layer reads, up to and including the prompt's last token."""
    description: str
    """The damage in words, with what was really put in place."""
    seed: int | None = None


class Corruption(Protocol):
    """A way to destroy part of a prompt and keep its length."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """The damaged prompt; neither the model nor the prompt changes."""


@dataclass(frozen=True, kw_only=True)
class ReplaceText:
    """Another phrase in the place of a group's words ("the company in this photo" becomes "Paris city").

    The replacement gets exactly as many tokens as the group: a longer one is cut, a shorter one starts over. With
    `repeat_first_token`, its first token fills the whole group, as the code that goes with arXiv 2406.04236 does.
    """

    replacement: str
    group: str = "constraint"
    repeat_first_token: bool = False

    def __post_init__(self) -> None:
        if not self.replacement.strip():
            raise TraceError(
                "the replacement is empty; pass the words to put in place of the constraint, such as 'Paris city'"
            )

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """One sample. TraceError if the group is absent or empty, or if it holds image tokens."""
        positions = group_positions(prompt, self.group)
        if set(positions) & set(prompt.groups["image"]):
            raise TraceError(
                f"group {self.group!r} holds image tokens, which words cannot replace; use SwapImage instead"
            )
        ids = prompt.inputs["input_ids"].clone()
        new = _replacement_ids(prompt, positions, self.replacement.strip())
        new = new[:1] * len(positions) if self.repeat_first_token else new[: len(positions)]
        original = vlm.decode(ids[0, list(positions)].tolist()).strip()
        ids[0, list(positions)] = torch.tensor(new, device=ids.device)
        return Corrupted(
            embeddings=embed(vlm, prompt, {**prompt.inputs, "input_ids": ids}),
            description=f"replace {original!r} by {vlm.decode(new).strip()!r}",
        )


@dataclass(frozen=True, kw_only=True)
class TextNoise:
    """Gaussian noise on the embeddings of a group's tokens, several samples; ROME's corruption (arXiv 2202.05262)."""

    scale: float = 3.0
    """Standard deviation of the noise, in standard deviations of the group's embedding entries."""
    group: str = "constraint"
    samples: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        _check_noise(self.scale, self.samples)

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """`samples` samples, the same for the same seed. TraceError if the group is absent or empty."""
        description = f"noise of {self.scale:g} standard deviations on the {self.group} tokens"
        return _noised(vlm, prompt, self.group, (self.scale, self.samples, self.seed), description)


@dataclass(frozen=True, kw_only=True)
class ImageNoise:
    """Gaussian noise on the image's embeddings, after vision tower and projector, several samples."""

    scale: float = 3.0
    """Standard deviation of the noise, in standard deviations of the image's embedding entries."""
    samples: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        _check_noise(self.scale, self.samples)

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """`samples` samples, the same for the same seed. TraceError if the prompt has no picture."""
        description = f"noise of {self.scale:g} standard deviations on the image"
        return _noised(vlm, prompt, "image", (self.scale, self.samples, self.seed), description)


@dataclass(frozen=True)
class SwapImage:
    """Another picture in front of the same words; the cleanest way to ask where the picture's information goes."""

    image: Picture | Sequence[Picture]
    """A path or a PIL picture; a sequence for a prompt with several pictures."""

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        """One sample. ModelError if the picture cannot be read; TraceError if it takes another number of tokens."""
        group_positions(prompt, "image")
        images = open_images(self.image)
        if len(images) != len(prompt.images):
            raise TraceError(
                f"the prompt has {len(prompt.images)} pictures, {len(images)} were given to swap; pass as many"
            )
        inputs = prompt.frontend.encode(prompt.text, images)
        clean = prompt.inputs["input_ids"][:, : prompt.groups["last"][0] + 1]
        if not torch.equal(inputs["input_ids"], clean):
            raise TraceError(
                f"the other picture turns {clean.shape[1]} tokens into {inputs['input_ids'].shape[1]}; "
                "pass a picture of the same size as the prompt's"
            )
        return Corrupted(
            embeddings=embed(vlm, prompt, inputs), description=f"swap the image for {_image_name(self.image)}"
        )


def parse_corruption(text: str) -> Corruption:
    """The corruption that a command line spells: swap:PATH, replace:PHRASE, text-noise[:SCALE] or image-noise[:SCALE].

    TraceError for anything else.
    """
    kind, _, value = text.partition(":")
    if kind == "swap" and value.strip():
        return SwapImage(value.strip())
    if kind == "replace":
        return ReplaceText(replacement=value)
    noises: Mapping[str, type[TextNoise] | type[ImageNoise]] = {"text-noise": TextNoise, "image-noise": ImageNoise}
    if kind in noises:
        return noises[kind](scale=_scale(value, text)) if value else noises[kind]()
    raise TraceError(f"no corruption {text!r}; write swap:other.jpg, replace:Paris city, text-noise:3 or image-noise:3")


def embed(vlm: VisionLanguageModel, prompt: Prompt, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """(1, token, hidden): what the first decoder layer reads for these inputs (default: the prompt's own).

    Ends with the prompt's last token: an answer after it cannot act on the score, since attention is causal.
    """
    with torch.no_grad():
        return vlm.embeddings(dict(inputs or prompt.inputs))[:, : prompt.groups["last"][0] + 1]


def group_positions(prompt: Prompt, group: str) -> tuple[int, ...]:
    """Positions of a group that must hold something. TraceError lists the groups that do."""
    positions = prompt.groups.get(group, ())
    if not positions:
        found = ", ".join(name for name, members in prompt.groups.items() if members)
        hints = {"image": "; pass an image to the prompt", "constraint": "; pass constraint= to the prompt"}
        hint = hints.get(group, "; ask for one of these")
        raise TraceError(f"no tokens in group {group!r} of this prompt; groups with tokens are {found}{hint}")
    return positions


def _noised(
    vlm: VisionLanguageModel, prompt: Prompt, group: str, noise: tuple[float, int, int], description: str
) -> Corrupted:
    """The prompt with noise (scale, samples, seed) on one group; drawn in float64 on the CPU, so alike everywhere."""
    (scale, samples, seed), positions = noise, list(group_positions(prompt, group))
    clean = embed(vlm, prompt)
    deviation = clean[0, positions].double().std().item()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, len(positions), clean.shape[-1], generator=generator, dtype=torch.float64)
    embeddings = clean.repeat(samples, 1, 1)
    embeddings[:, positions] += (scale * deviation * drawn).to(clean)
    return Corrupted(embeddings=embeddings, description=f"{description}, {samples} samples", seed=seed)


def _replacement_ids(prompt: Prompt, positions: tuple[int, ...], replacement: str) -> list[int]:
    """Tokens of the replacement, over and over, as in running text: after a blank if the original is."""
    tokenizer, ids = prompt.frontend.tokenizer, prompt.inputs["input_ids"][0].tolist()
    before = ids[max(0, positions[0] - 1) : positions[0]]
    original = tokenizer.decode([*before, ids[positions[0]]])[len(tokenizer.decode(before)) :]
    start = "a " if original[:1].isspace() else "\n"
    text = start + " ".join([replacement] * len(positions))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (_, end) in pairs if end > len(start)]


def _check_noise(scale: float, samples: int) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise TraceError(f"noise scale {scale} destroys nothing; pass a positive number, such as 3")
    if samples < 1:
        raise TraceError(f"{samples} noise samples; pass at least 1, such as 10")


def _scale(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise TraceError(
            f"{value!r} in {text!r} is not a number; write the noise scale, such as {text.split(':')[0]}:3"
        ) from None


def _image_name(image: Picture | Sequence[Picture]) -> str:
    if isinstance(image, Image.Image):
        return f"a picture of {image.width} x {image.height} pixels"
    if isinstance(image, (str, PathLike)):
        return Path(image).name
    return ", ".join(map(_image_name, image))
