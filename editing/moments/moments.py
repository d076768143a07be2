"""Second moments as a value: how far they have converged, the hashes they depend on, their file and their cache."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from tqdm import tqdm

from ...artefacts import files, plain_fields
from ...data import parse_json
from ...data.facts import counted
from ...models import Prompt, VisionLanguageModel
from ..requests import EditError

logger = logging.getLogger("multrace")
KINDS = ("image", "question", "template")
"""Types of tokens that are counted apart."""


def hash_of_weights(vlm: VisionLanguageModel, highest: int, *, progress: bool = False) -> str:
    """Return a SHA-256 (hex) of all that decides what the layers up to `highest` read, that layer included.

    It covers every parameter and buffer (dtype, shape, bytes) except those of later layers, of the final norm and of an
    output head that is not also the input embedding; the configuration without names and versions; and the attention
    implementation. All bytes are read, which takes about a second per GB.
    """
    later = [*vlm.decoder_layers[highest + 1 :], vlm.final_norm, vlm.output_head]
    embedding = {id(weight) for weight in vlm.input_embeddings.parameters()}
    unused = {
        id(tensor)
        for module in later
        if module is not None
        for tensor in (*module.parameters(), *module.buffers())
        if id(tensor) not in embedding
    }
    names = [name for name, weight in vlm.named_parameters() if id(weight) not in unused]
    whole = hashlib.sha256(_setup(vlm).encode())
    for name in tqdm(names, desc="hashing weights", unit="weight", disable=not progress, leave=False):
        whole.update(f"{name} {vlm.fingerprint([name])[name]} ".encode())
    for name, buffer in vlm.named_buffers():
        if id(buffer) not in unused:
            _add(whole, name, buffer)
    return whole.hexdigest()


def hash_of_corpus(prompts: Sequence[Prompt], *, progress: bool = False) -> tuple[tuple[str, ...], str]:
    """Return the types of token that occur, and a SHA-256 (hex) of the prompts in their order.

    It covers names, dtypes, shapes and bytes of all inputs and the type of every token, and so everything that the
    processor does. Each prompt is read once.
    """
    whole, present = hashlib.sha256(), set()
    for index in tqdm(range(len(prompts)), desc="hashing prompts", unit="prompt", disable=not progress, leave=False):
        prompt = prompts[index]
        types = token_types(prompt)
        for name, value in sorted(prompt.inputs.items()):
            _add(whole, name, value)
        _add(whole, "types", types)
        present |= set(types.tolist())
    return tuple(kind for number, kind in enumerate(KINDS, start=1) if number in present), whole.hexdigest()


def token_types(prompt: Prompt) -> Tensor:
    """Return the type of each token as its number in KINDS, counted from 1, (token,) uint8."""
    types = torch.full((prompt.length,), 1 + KINDS.index("template"), dtype=torch.uint8)
    for kind in ("question", "image"):
        types[list(prompt.groups[kind])] = 1 + KINDS.index(kind)
    return types


def hash_of_settings(**settings: str | float | Sequence[object] | None) -> str:
    """Return a SHA-256 (hex) of settings; their order does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _setup(vlm: VisionLanguageModel) -> str:
    left_out = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in vlm.config.to_dict().items() if name not in left_out}
    return json.dumps([config, vlm.config._attn_implementation], sort_keys=True, default=str)


def _add(whole: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    raw = tensor.detach().cpu().contiguous()
    whole.update(f"{name} {raw.dtype} {tuple(raw.shape)} ".encode())
    whole.update(raw.flatten().view(torch.uint8).numpy().tobytes())


PROBES = 64
"""Number of random directions per layer; a reading is exact for layers that are not wider than this."""


@dataclass(frozen=True, kw_only=True)
class ConvergencePoint:
    """How far the moments still moved after so many prompts, as relative Frobenius norms per layer; 0 is converged.

    The norms are estimated from 64 random directions, and exact for layers that are not wider than that.
    """

    prompts: int
    """Number of prompts read so far."""
    change: tuple[float, ...]
    """Change of the mean since the reading before, as a share of the mean; infinite in the first reading."""
    halves: tuple[float, ...]
    """Difference between the means of two halves of the prompts so far, as a share of the mean. It is about twice the
    error of the mean."""

    @property
    def worst(self) -> float:
        """The largest of all these numbers."""
        return max(*self.change, *self.halves)


class Watch:
    """Measures how much the means still move, from products with random signs that are small enough for all layers.

    With p columns S of random signs / sqrt(p), |D S|^2 is on average the squared Frobenius norm |D|^2 of a difference D
    of moments, and |D S| is rarely off by more than a tenth for p = 64. S is the identity where a layer is that narrow.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.readings: list[ConvergencePoint] = []
        self._tokens = torch.zeros(2, dtype=torch.long)
        """Number of tokens in each half."""
        self._halves: dict[int, Tensor] = {}
        """(half, width, probe) float64 sums of k (k^T S) per layer."""
        self._before: dict[int, Tensor] = {}
        """(width, probe) float64 mean at the last reading, per layer."""
        self._probes: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def add(self, layer: int, states: Tensor, types: Tensor, half: int) -> None:
        """Add all tokens of states (batch, token, width) to a half."""
        rows = wide(states[types.to(states.device) > 0])
        probes = self._probes_for(rows)
        if layer not in self._halves:
            self._halves[layer] = rows.new_zeros(2, *probes.shape, dtype=torch.float64)
        self._halves[layer] = self._halves[layer].to(rows.device)
        self._halves[layer][half] += rows.T @ (rows @ probes)
        if layer == self.layers[-1]:
            self._tokens[half] += len(rows)

    def read(self, prompts: int) -> None:
        """Append a reading. Raises `EditError` if a layer reads numbers that are not finite."""
        change, halves = [], []
        for layer in self.layers:
            first, second = self._halves[layer]
            mean = (first + second) / int(self._tokens.sum())
            scale = mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
            apart = first / int(self._tokens[0]) - second / int(self._tokens[1])
            halves.append((apart.norm() / scale).item())
            before = self._before.get(layer)
            change.append(inf if before is None else ((mean - before.to(mean.device)).norm() / scale).item())
            self._before[layer] = mean
            if not isfinite(halves[-1]):
                raise EditError(
                    f"what the projection of layer {layer} reads holds numbers that are not finite, among the first "
                    f"{prompts} prompts; load a float16 model in float32 or bfloat16, or fetch damaged weights again"
                )
        self.readings.append(ConvergencePoint(prompts=prompts, change=tuple(change), halves=tuple(halves)))

    def is_calm(self, tolerance: float | None) -> bool:
        """Return whether all numbers of the last reading are below the tolerance."""
        return bool(tolerance and self.readings) and self.readings[-1].worst < tolerance

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state, for `restore`."""
        kept = {f"halves:{layer}": each for layer, each in self._halves.items()}
        kept |= {f"before:{layer}": each for layer, each in self._before.items()}
        return kept | {"tokens": self._tokens} | curve_tensors(self.readings)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a state that `tensors` returned."""
        for layer in self.layers:
            self._halves[layer] = tensors[f"halves:{layer}"].clone()
            if f"before:{layer}" in tensors:
                self._before[layer] = tensors[f"before:{layer}"]
        self._tokens = tensors["tokens"].clone()
        self.readings = list(curve_of(tensors))

    def _probes_for(self, rows: Tensor) -> Tensor:
        key = rows.shape[1], rows.device, rows.dtype
        if key not in self._probes:
            width = rows.shape[1]
            generator = torch.Generator().manual_seed(width)
            signs = torch.randint(0, 2, (width, PROBES), generator=generator).mul(2).sub(1)
            probes = torch.eye(width) if width <= PROBES else signs / PROBES**0.5
            self._probes[key] = probes.to(rows)
        return self._probes[key]


def curve_tensors(readings: Sequence[ConvergencePoint]) -> dict[str, Tensor]:
    """Return readings as tensors: prompts (reading,) int64, change and halves (reading, layer) float64."""
    if not readings:
        return {}
    numbers = {
        name: torch.tensor([getattr(each, name) for each in readings], dtype=torch.float64)
        for name in ("change", "halves")
    }
    return {"curve:prompts": torch.tensor([each.prompts for each in readings])} | {
        f"curve:{name}": values for name, values in numbers.items()
    }


def curve_of(tensors: Mapping[str, Tensor]) -> tuple[ConvergencePoint, ...]:
    """Return the readings that `curve_tensors` wrote. Raises `KeyError` or `ValueError` if a part is missing."""
    if "curve:prompts" not in tensors:
        return ()
    rows = (tensors[f"curve:{name}"].tolist() for name in ("prompts", "change", "halves"))
    return tuple(
        ConvergencePoint(prompts=int(prompts), change=tuple(change), halves=tuple(halves))
        for prompts, change, halves in zip(*rows, strict=True)
    )


def wide(states: Tensor) -> Tensor:
    """Return the states in float32, or in their own dtype if that is wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


OWN = "own samples"
"""The entry of `Moments.settings` that says what the model itself sampled."""
FORMAT, STATE, PART = "multrace moments 1", "multrace moments state 1", "multrace moments part 1"
UNIONS = {"all": KINDS, "text": ("question", "template")}
"""Types that are sums of others."""
_TEXTS = ("projection", "model", "revision", "weights", "corpus")


def written_by(projection: str, expert: int | None) -> str:
    """Return `Moments.projection` for a projection, or for a routed expert of its layers.

    Raises `EditError` for an expert that is counted from the end, or one beside attention.
    """
    if expert is None:
        return projection
    if expert < 0 or projection != "mlp":
        raise EditError(
            f"second moments of expert={expert} with projection={projection!r}; pass the number of an expert from 0, "
            "with projection='mlp'"
        )
    return f"expert {expert}"


Sums = Mapping[int, Mapping[str, Tensor]]
"""The sum of k k^T over the tokens, (width, width) float64, by layer and type of token."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Moments:
    """Uncentred second moments of what projections read, by layer and type of token.

    Image tokens are those of the prompt's group "image", question tokens those of its group "question", and every
    other token that is no padding (also of an answer) counts as template. Raises `EditError` if its parts disagree.
    """

    sums: Sums = field(repr=False)
    """Sums by layer (from 0) and type of token, (width, width) float64; a type without tokens is left out."""
    counts: Mapping[str, int]
    """Number of tokens by type: image, question, template."""
    prompts: int
    """Number of prompts that were read."""
    projection: str
    """"mlp" for the inputs of down projections, "attention" for those of attention's output maps, or "expert 5"."""
    model: str
    revision: str | None = None
    weights: str
    """Hash of every weight that the numbers depend on, as `hash_of_weights` gives it."""
    corpus: str
    """Hash of all prompts that were given, as `hash_of_corpus` gives it."""
    settings: Mapping[str, str] = field(default_factory=dict)
    convergence: tuple[ConvergencePoint, ...] = ()

    def __post_init__(self) -> None:
        present = {kind for kind in KINDS if self.counts.get(kind)}
        if not self.sums or not present or set(self.counts) - set(KINDS):
            raise EditError(f"moments need layers and tokens of {KINDS}; found {[*self.sums]} and {dict(self.counts)}")
        for layer, parts in self.sums.items():
            shapes = {kind: tuple(part.shape) for kind, part in parts.items()}
            sides = {side for shape in shapes.values() for side in shape}
            is_square = len(sides) == 1 and all(len(shape) == 2 for shape in shapes.values())
            if not parts:
                raise EditError(
                    f"layer {layer} did not run for these prompts, so it has no moments: it attends to pictures; "
                    "collect them over prompts with pictures, or of other layers"
                )
            if set(parts) != present or not is_square or any(part.dtype != torch.float64 for part in parts.values()):
                raise EditError(
                    f"the moments of layer {layer} must be one square float64 matrix for each of {sorted(present)}, "
                    f"all of one size; found {shapes}; compute them again with second_moments"
                )
            if not all(torch.isfinite(part.diagonal()).all() for part in parts.values()):
                raise EditError(
                    f"what the {self.projection} projection of layer {layer} reads holds numbers that are not finite; "
                    "load a float16 model in float32 or bfloat16, or fetch damaged weights again"
                )
        if any(len(each.change) != len(self.sums) or len(each.halves) != len(self.sums) for each in self.convergence):
            raise EditError(f"readings of convergence need one number for each of the layers {[*self.sums]}")

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers[:8])) + (", ..." if len(self.layers) > 8 else "")
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        moved = f"; halves differ by {max(self.convergence[-1].halves):.2g}" if self.convergence else ""
        return (
            f"Moments of {self.model!r}, {self.projection} projections of layers {layers}\n"
            f"{counted(self.prompts, 'prompt')} with {self.count()} tokens ({kinds}){moved}"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers from 0, in ascending order."""
        return tuple(sorted(self.sums))

    @property
    def is_own(self) -> bool:
        """Whether they are of the model's own samples (`own_moments`)."""
        return OWN in self.settings

    def width(self, layer: int) -> int:
        """Return the length of what the layer's projection reads. Raises `EditError` for a layer that is not there."""
        return len(next(iter(self._of(layer).values())))

    def count(self, kind: str = "all") -> int:
        """Return the number of tokens of a type: image, question, template, text (the last two) or all.

        Raises `EditError` for another type.
        """
        return sum(self.counts.get(each, 0) for each in _parts(kind))

    def matrix(self, layer: int, kind: str = "all") -> Tensor:
        """Return the mean of k k^T over the tokens of a type, as a new (width, width) float64 on the CPU.

        kind: as in `count`.

        Raises `EditError` for a layer or a type that is not there, or that no token has.
        """
        parts = self._of(layer)
        found = [parts[each] for each in _parts(kind) if each in parts]
        if not found:
            raise EditError(
                f"no {kind} token in the {self.prompts} prompts of these moments ({dict(self.counts)}); "
                "use kind='all', or compute them on prompts that have some"
            )
        total = found[0].clone()
        for part in found[1:]:
            total += part
        return total.div_(self.count(kind))

    def check(self, vlm: VisionLanguageModel) -> None:
        """Raise `EditError` unless these are moments of this model as it is now; its weights are read once."""
        highest = self.layers[-1]
        found = hash_of_weights(vlm, highest) if highest < vlm.layers else f"only {vlm.layers} layers"
        if found != self.weights:
            raise EditError(
                f"these moments belong to '{self.model}' with weights {self.weights[:12]}; '{vlm.name}' ({vlm.dtype}) "
                f"has {found[:12]}: another model, precision or quantisation, or an edited one; compute them for it"
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all, and return its path. Raises `EditError` if that fails."""
        tensors = {name: part for layer in self.layers for name, part in named(layer, self.sums[layer]).items()}
        return files.write_tensors(path, {**tensors, **curve_tensors(self.convergence)}, self._text(), error=EditError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the moments in a file that `save` wrote. Raises `EditError` if it is missing or damaged."""
        tensors, text = files.read_tensors(path, error=EditError)
        if text.get("format") != FORMAT:
            raise EditError(
                f"'{path}' holds no second moments: its header says {text.get('format')!r}, not {FORMAT!r}; "
                "pass a file that Moments.save wrote"
            )
        try:
            sums: dict[int, dict[str, Tensor]] = {}
            for name in sorted(tensors):
                if name.startswith("sum:"):
                    _, layer, kind = name.split(":")
                    sums.setdefault(int(layer), {})[kind] = tensors[name]
            words = {name: text[name] for name in _TEXTS} | {"revision": text["revision"] or None}
            words |= {name: parse_json(text[name]) for name in ("counts", "settings", "prompts")}
            words = plain_fields(cls, words, list(words))
            return cls(sums=dict(sorted(sums.items())), convergence=curve_of(tensors), **words)
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"the second moments in '{path}' are damaged ({error}); compute them again") from error

    def _of(self, layer: int) -> Mapping[str, Tensor]:
        if layer not in self.sums:
            raise EditError(
                f"no second moments of layer {layer} ({self.projection} projection); these are of layers "
                f"{', '.join(map(str, self.layers))} of '{self.model}'; compute them with second_moments(layers=...)"
            )
        return self.sums[layer]

    def _text(self) -> dict[str, str]:
        counted = {"counts": json.dumps(dict(self.counts)), "prompts": str(self.prompts)}
        words = {name: getattr(self, name) or "" for name in _TEXTS}
        return {"format": FORMAT, **words, **counted, "settings": json.dumps(dict(self.settings))}


class MomentCache:
    """The state of one run, in a folder that is named by the hash of everything that the run depends on.

    If there is no state, the run has not begun. A damaged state, or one of another run, is ignored with a warning, and
    its part is computed again: a cache only saves time, so it must never stop a run. Each step first writes the sums of
    the layers, under names that contain the step, and then the state, which makes the step count.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder) / key[:32]
        self._key = key

    def write(self, number: int, done: int, sums: Sums, tensors: Mapping[str, Tensor]) -> None:
        """Write the sums and other tensors of a pass after so many prompts, in place of its earlier ones.

        Raises `EditError` if the folder cannot be written.
        """
        for layer, parts in sums.items():
            files.write_tensors(
                self._part(layer, done), named(layer, parts), {"format": PART, "key": self._key}, error=EditError
            )
        header = {"format": STATE, "key": self._key, "done": str(done), "layers": json.dumps(sorted(sums))}
        files.write_tensors(self._state(number), tensors, header, error=EditError)
        for layer in sums:
            for old in self.folder.glob(f"layer-{layer}-at-*.safetensors"):
                if old != self._part(layer, done):
                    old.unlink(missing_ok=True)

    def read(
        self, number: int, shapes: Mapping[int, Mapping[str, tuple[int, int]]]
    ) -> tuple[int, dict[int, dict[str, Tensor]], dict[str, Tensor]] | None:
        """Return (prompts done, sums, other tensors) of a pass over these layers, or None if there is no such state.

        Sums are read from disk as they are used, so that they take no memory at first.
        """
        if not self._state(number).exists():
            return None
        try:
            tensors, text = self._own(self._state(number), STATE)
            done = int(text["done"])
            sums = {layer: self._sums(layer, done, expected) for layer, expected in shapes.items()}
            return done, sums, tensors
        except (EditError, KeyError, ValueError) as error:
            logger.warning("computing second moments anew: %s", error)
            return None

    def _sums(self, layer: int, done: int, expected: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        path = self._part(layer, done)
        tensors, _ = self._own(path, PART)
        parts = {kind: tensors[name] for kind in KINDS if (name := f"sum:{layer}:{kind}") in tensors}
        shapes = {kind: tuple(part.shape) for kind, part in parts.items()}
        wrong = [kind for kind, shape in shapes.items() if shape != expected.get(kind)]
        if wrong or any(part.dtype != torch.float64 for part in parts.values()):
            raise EditError(f"'{path}' holds {shapes} instead of float64 {dict(expected)}")
        return parts

    def _own(self, path: Path, form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, text = files.read_tensors(path, error=EditError)
        if text.get("format") != form or text.get("key") != self._key:
            raise EditError(f"'{path}' is of another run, or was not written by second_moments")
        return tensors, text

    def _part(self, layer: int, done: int) -> Path:
        return self.folder / f"layer-{layer}-at-{done}.safetensors"

    def _state(self, number: int) -> Path:
        return self.folder / f"pass-{number}.safetensors"


def named(layer: int, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums of a layer under the names that they have in files."""
    return {f"sum:{layer}:{kind}": part for kind, part in parts.items()}


def _parts(kind: str) -> tuple[str, ...]:
    if kind not in KINDS and kind not in UNIONS:
        raise EditError(f"no type of tokens {kind!r}; types are {', '.join((*KINDS, *UNIONS))}")
    return UNIONS.get(kind, (kind,))
