"""Say what works on one model: family, proof, pictures, engine, knockout, lens, edit, undo, second moments and export.

Each line is measured on this very model, with one short question and, if it takes pictures, one picture. The weights
are as before at the end. The exit code is 0 if everything works, 1 if something does not, and 2 if the model cannot be
opened.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import lazy_loader
from cyclopts import App, Parameter
from PIL import Image
from tqdm import tqdm

from .. import data, editing, models, tracing
from ..data.errors import reason
from ..editing import moments as moment_sums
from ..models import families as tables
from .options import NOT_ALL, ModelOptions

EXAMPLE = """examples:
  multrace doctor
  multrace doctor --model Qwen/Qwen2.5-VL-3B-Instruct --dtype bfloat16 --device-map cuda:0
  multrace doctor --model path/to/model --json
"""
app = App(name="doctor", help=__doc__, help_epilogue=EXAMPLE)
_guards: Any = lazy_loader.load("multrace.models.guards", suppress_warning=True)  # imports torch
_QUESTION, _CONSTRAINT, _TARGET = "What is the capital of the country shown here?", "the country", "Paris"
_SIDE = 224
"""Width and height in pixels of the picture."""
_STEPS = 10
"""Steps of the value search of the edit, which only has to move in the right direction."""
_BELIEVED = 0.05
"""Share by which the edited model's probability of the target may differ from the one that the search found."""
_SMALL = 1024
"""MiB up to which the whole edited model is written to a temporary folder and opened again."""
_WIDE = 4096
"""MiB up to which second moments of one layer are collected."""
_QUIET_SECONDS = 2


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(ModelOptions):
    """Options of `multrace doctor`."""

    json: Annotated[bool, Parameter(help="print the findings as JSON instead")] = False


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What one examination found."""

    name: str
    works: bool
    says: str
    """What was measured, or why it does not work and what to do."""
    seconds: float

    def __str__(self) -> str:
        return f"{self.name:15} {'ok ' if self.works else 'NO '} {'' if self.works else 'because '}{self.says}"


class DoesNotWorkError(Exception):
    """An examination came out wrong without an error of the library."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Patient:
    """The model, and the question that it is asked."""

    vlm: models.VisionLanguageModel
    log: tuple[str, ...]
    """What loading has said."""

    @cached_property
    def image(self) -> Image.Image | None:
        """A picture without a meaning; None for a text-only model."""
        if not self.vlm.has_vision:
            return None
        bands = [Image.linear_gradient("L").rotate(turn) for turn in (0, 90)] + [Image.radial_gradient("L")]
        return Image.merge("RGB", bands).resize((_SIDE, _SIDE))

    @cached_property
    def prompt(self) -> models.Prompt:
        """The question as a prompt."""
        return self.vlm.prompt(self.image, _QUESTION, constraint=_CONSTRAINT)

    @property
    def layer(self) -> int:
        """The layer that is edited."""
        return self.vlm.layers // 2

    @property
    def projection(self) -> str:
        """The map that is edited: attention's, where experts leave the MLP none that can be."""
        return "mlp" if self.vlm.has_down_projection(self.layer) or self.expert is not None else "attention"

    @property
    def expert(self) -> int | None:
        """The routed expert whose keys are read, where no single map writes the MLP output; None elsewhere."""
        is_routed = not self.vlm.has_down_projection(self.layer) and self.vlm.expert_count(self.layer)
        return 0 if is_routed else None

    @property
    def edited(self) -> str:
        """What is edited, in words."""
        return f"layer {self.layer}, {self.projection if self.expert is None else 'routed experts'}"

    @property
    def source(self) -> str:
        """The tokens whose flow to the last token is cut."""
        return "image" if self.prompt.groups["image"] else "constraint"

    @property
    def mebibytes(self) -> float:
        """The size of the weights in MiB."""
        return sum(weight.numel() * weight.itemsize for _, weight in self.vlm.named_parameters()) / 2**20

    @cached_property
    def delta(self) -> editing.Delta:
        """A short edit of the middle layer, which is not applied."""
        editor = editing.MultEdit(
            layer=self.layer, token="last", steps=_STEPS, ending="none", projection=self.projection
        )
        request = data.EditRequest(question=self.prompt, target=_TARGET)
        return editor.edit(self.vlm, [request], progress=False)

    def probability(self) -> float:
        """Return the model's own probability of the target."""
        return self.vlm.score(self.image, _QUESTION, _TARGET).probability


@app.default
def run(options: DoctorOptions = DoctorOptions()) -> int:
    """Open the model, examine it, and print a line for each examination."""
    with _guards.quiet_transformers():  # some processors and models log advice at every call
        with _logged(shown=True) as log:
            vlm = options.open_model()
        patient = Patient(vlm=vlm, log=tuple(log))
        checks = tqdm(EXAMINATIONS.items(), desc="examining", delay=_QUIET_SECONDS, leave=False)
        findings = [_finding(name, examine, patient) for name, examine in checks]
    works = all(finding.works for finding in findings)
    if options.json:
        print(json.dumps({"model": vlm.name, "works": works, "findings": [*map(asdict, findings)]}, indent=1))
    else:
        print(*findings, sep="\n")
    return 0 if works else NOT_ALL


def _finding(name: str, examine: Callable[[Patient], str], patient: Patient) -> Examined:
    started, works = time.monotonic(), True
    with warnings.catch_warnings(record=True) as caught, _logged(shown=False):
        warnings.simplefilter("always")
        try:
            says = examine(patient)
        except DoesNotWorkError as error:
            works, says = False, str(error)
        except Exception as error:  # whatever a model's own code raises is what this command is to report
            works, says = False, _one_line(error)
    told = dict.fromkeys(str(each.message).splitlines()[0] for each in caught if each.category is UserWarning)
    says = "; ".join((says, *(f"warning: {line}" for line in told if line.rpartition(": ")[2] not in says)))
    return Examined(name=name, works=works, says=says, seconds=round(time.monotonic() - started, 2))


def _one_line(error: Exception) -> str:
    """Return an error of ours as it is, and another one with its class."""
    rooms = (models.ModelError, tracing.TraceError, editing.EditError)
    return " ".join(str(error).split()) if isinstance(error, rooms) else reason(error)


class _Listener(logging.Handler):
    """Adds every message to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


@contextmanager
def _logged(*, shown: bool) -> Iterator[list[str]]:
    """Yield a list that fills with what the library logs; it is shown as ever, or not at all."""
    lines: list[str] = []
    logger, listener = logging.getLogger("multrace"), _Listener(lines)
    level, others = logger.level, [(handler, handler.level) for handler in logger.handlers]
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    for handler, own in others:
        handler.setLevel(max(own, level) if shown else logging.CRITICAL + 1)
    try:
        yield lines
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        for handler, own in others:
            handler.setLevel(own)


def family(patient: Patient) -> str:
    """The configuration's types and sizes, and where the names of modules come from."""
    config = patient.vlm.config
    text = config.get_text_config().model_type
    discovered = [line.partition("discovered, ")[2] for line in patient.log if ": discovered, " in line]
    names = "rows of the tables" if tables.has_rows(config) else "the usual names of modules"
    kind = config.model_type if text == config.model_type else f"{config.model_type} over {text}"
    sizes = f"{patient.vlm.layers} layers, hidden {patient.vlm.hidden}, {patient.vlm.heads} heads"
    return f"{kind}: {sizes}; {f'discovered, {discovered[0]}' if discovered else names}"


def proof(patient: Patient) -> str:
    """What loading has proven."""
    return patient.log[-1].rpartition("; ")[2]


def placement(patient: Patient) -> str:
    """The dtype, the devices and the memory."""
    vlm = patient.vlm
    weights = [weight for _, weight in vlm.named_parameters()]
    devices = dict.fromkeys(str(weight.device) for weight in weights if not weight.is_meta)
    elsewhere = ", partly offloaded" if any(weight.is_meta for weight in weights) else ""
    stored = "" if vlm.stored_dtype in (None, vlm.dtype) else f" (stored as {_plain(vlm.stored_dtype)})"
    packed = ", quantised" if vlm.is_quantised else ""
    engine = tracing.Engine().memory
    return (
        f"{_plain(vlm.dtype)}{stored}{packed} on {', '.join(devices)}{elsewhere}; weights "
        f"{patient.mebibytes:,.0f} MiB; tracing adds up to {engine} MiB, second moments of one layer "
        f"{_moments_memory(patient):,.0f} MiB"
    )


def pictures(patient: Patient) -> str:
    """The processor, and what a picture becomes."""
    torchvision = "torchvision is " + ("installed" if find_spec("torchvision") else "not installed and not needed")
    if patient.image is None:
        return "text-only model"
    prompt, processor = patient.prompt, f"{type(patient.vlm.processor).__name__} ({torchvision})"
    if prompt.attends_to_pictures:
        return f"{processor}; pictures stand at no position, since layers attend to their states"
    tokens, places = len(prompt.groups["image"]), len(prompt.patches)
    where = f"{places} of them with a place" if places else "without places in the picture"
    return f"{processor}; {_SIDE} x {_SIDE} pixels are {tokens} tokens, {where}"


def answer(patient: Patient) -> str:
    """A greedy answer."""
    return f"{patient.vlm.answers([patient.prompt], max_new_tokens=4)[0]!r} (four tokens, greedy)"


def trace(patient: Patient) -> str:
    """A row of cells by the engine, with one computed again by plain passes."""
    corruption = tracing.BlankImage() if patient.image is not None else tracing.TextNoise(samples=1, scale=1.0)
    result = tracing.causal_trace(
        patient.vlm,
        patient.prompt,
        corruption=corruption,
        sites="hidden",
        positions="last",
        even_if_weak=True,
        engine=tracing.Engine(checks=1),
        progress=False,
    )
    report = result.engine
    engine = "fast engine" if report.engine == "replay" else f"plain passes, since {report.reason}"
    if report.largest_difference is None:
        return engine
    return f"{engine}; a cell differs from plain passes by {report.largest_difference:.1g}"


def knockout(patient: Patient) -> str:
    """The flow from the picture, or the constraint, to the last token, cut in single layers."""
    result = tracing.attention_knockout(
        patient.vlm, patient.prompt, flows=[f"{patient.source} -> last"], windows=(1,), progress=False
    )
    moved = float((result.probabilities - result.clean[0]).abs().max())
    return f"{patient.source} -> last in each layer; the answer's probability moves by up to {moved:.1g}"


def lens(patient: Patient) -> str:
    """Whether the last state says what the model says."""
    result = tracing.logit_lens(patient.vlm, patient.prompt, answer=_TARGET, progress=False)
    token = patient.prompt.answer_tokens(_TARGET)[0]
    read = float(result.probability(token)[-1])
    own = float(patient.vlm.next_token_probabilities(patient.vlm.embed(patient.prompt))[0, token])
    if abs(read - own) > 1e-2 * own + 1e-6:
        raise DoesNotWorkError(f"the last state gives the target {read:.3g}, and the model {own:.3g}")
    return f"{patient.vlm.layers + 1} states read; the last one agrees with the model"


def edit(patient: Patient) -> str:
    """A short edit: whether the model's own probability rises, is the one of the search, and is undone bit by bit."""
    vlm, delta, names = patient.vlm, patient.delta, [*patient.delta.changes]
    weights, before = vlm.fingerprint(names), patient.probability()
    with delta.applied(vlm):
        after = patient.probability()
    if vlm.fingerprint(names) != weights:
        raise DoesNotWorkError(f"undoing the edit has not restored {names[0]}; load the model again")
    says = f"{patient.edited}: P({_TARGET!r}) {before:.2g} -> {after:.2g} in {_STEPS} steps"
    if after <= before:
        raise DoesNotWorkError(f"{says}: it does not rise; try another layer, or more steps")
    believed = float(delta.requests[0]["probability"])
    if abs(believed - after) > _BELIEVED * after:
        raise DoesNotWorkError(f"{says}, and the search believed in {believed:.2g}; pass dtype='float32'")
    return f"{says}; undo is bit-exact"


def moments(patient: Patient) -> str:
    """Second moments of what one map reads."""
    needed = _moments_memory(patient)
    if needed > _WIDE:
        return f"not tried: those of layer {patient.layer} need {needed:,.0f} MiB"
    place = {"layers": [patient.layer], "projection": patient.projection, "expert": patient.expert}
    result = editing.second_moments(patient.vlm, [patient.prompt], **place, progress=False)
    return f"layer {patient.layer}, {result.projection}: {result.count()} tokens"


def export(patient: Patient) -> str:
    """The edit as a PEFT adapter, and in a small model as a whole folder that is opened again."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = editing.to_peft(patient.vlm, patient.delta, Path(folder) / "adapter").folder
        config: Mapping[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        says = f"PEFT ({', '.join(chain(_listed(config, 'target_modules'), _listed(config, 'target_parameters')))})"
        if patient.mebibytes > _SMALL:
            return f"{says}; a merged folder was not tried, it has {patient.mebibytes:,.0f} MiB"
        merged = editing.save_merged(patient.vlm, patient.delta, Path(folder) / "merged", dtype=patient.vlm.dtype)
        reopened = models.load(merged, dtype=patient.vlm.dtype, verify=False)  # its weights count, and are compared
        with patient.delta.applied(patient.vlm):
            edited = patient.vlm.fingerprint(patient.delta.changes)
        if reopened.fingerprint(patient.delta.changes) != edited:
            raise DoesNotWorkError("the merged folder, opened again, has other weights than the edited model")
    return f"{says}; the merged folder has the edited weights"


EXAMINATIONS: Mapping[str, Callable[[Patient], str]] = {
    "family": family,
    "proof": proof,
    "placement": placement,
    "pictures": pictures,
    "answer": answer,
    "trace": trace,
    "knockout": knockout,
    "lens": lens,
    "edit": edit,
    "second moments": moments,
    "export": export,
}
"""Name -> the examination, in the order in which they are made."""


def _moments_memory(patient: Patient) -> float:
    return moment_sums.memory_of_moments(
        patient.vlm, [patient.layer], projection=patient.projection, expert=patient.expert
    )


def _listed(config: Mapping[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    return [value] if isinstance(value, str) else list(value)


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
