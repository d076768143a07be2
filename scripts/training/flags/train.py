"""The training of the flags model, from the text model's folder to the parts: one folder, and a run may be cut.

    FOLDER/
      training.json          what was asked for, which a run that goes on must ask for again
      work/                  pictures, what the teacher said, the last checkpoint, and the ends of the joinings before
      factors.safetensors    the trained parts, with config.json, processor_config.json and chat_template.jinja
      model/, README.md      the whole model, and the card with its scores, after a full run

A checkpoint is written whole, so that a run that is killed at any moment goes on from the last one, and comes to the
same parts, to the bit, as a run that was never cut (on one machine, with as many threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ....artefacts import read_json, read_tensors, write_json, write_tensors, write_whole
from ....artefacts.files import digest
from ....data.worlds.flags import FlagWorld
from ....models.assembly import assemble, read_parts, write_parts
from ....models.weights import save_directory
from ....workflow import origin_of
from ...options import CommandError, check_files, check_new_folder
from .answering import AnsweringTraining
from .card import Examination, model_card
from .examination import Examine, examine_model
from .keeping import Interference, kept_rows, make_moments
from .original import open_original
from .pictures import make_pool
from .reading import ReadingTraining
from .recipe import AnsweringStage, Recipe, Stage
from .seeing import SeeingTraining
from .spelling import Spelling, SpellingTraining
from .stage import StageTraining, named_parameters, one_cycle
from .student import Student, make_processor, make_student, whole_config
from .teacher import Sentences, make_answers, make_states

_SETTINGS, _LAYOUT = "training.json", "multrace flags training 1"
_CHECKPOINT, _CHECKPOINT_LAYOUT = "checkpoint.safetensors", "multrace flags checkpoint 1"
_FACTORS = "factors.safetensors"
_SECOND = 0.98
"""AdamW's second coefficient."""
_MOMENTUM = 0.95
"""Muon's coefficient."""


@dataclass(frozen=True, kw_only=True)
class FlagsTraining:
    """A training of the flags model."""

    out: Path
    """The folder of the run: a new one, or that of a run with the same settings, which goes on."""
    text_model: Path
    """The folder of the text model."""
    parts: Path | None = None
    """A folder of trained parts to go on from: the stages that their own recipe names are left out."""
    seed: int = 0
    share: float = 1.0
    """The share of the steps and of the pictures to take, above 0 and up to 1."""
    every: int = 100
    """The number of steps between two checkpoints."""
    threads: int = 2
    """The number of CPU threads."""
    recipe: Recipe = field(default_factory=Recipe)

    def check(self) -> None:
        """Raise `CommandError` for numbers out of range and for a folder that cannot be used."""
        if not 0 < self.share <= 1 or self.every < 1 or self.threads < 1 or self.seed < 0:
            raise CommandError(
                f"--share is {self.share}, --every {self.every}, --threads {self.threads} and --seed {self.seed}; pass "
                "a share above 0 and up to 1, at least 1 step between checkpoints and 1 thread, and a seed of 0 or more"
            )
        if not (self.text_model / "config.json").is_file():
            raise CommandError(
                f"no text model in {str(self.text_model)!r}; make it with multrace fetch-smollm2, or pass its folder"
            )
        if self.parts is not None and self.stages_done() >= len(self.recipe.stages):
            raise CommandError(
                f"the parts in {str(self.parts)!r} have gone through {self.stages_done()} stages, and the recipe has "
                "no more; train without --parts, or add stages to the recipe"
            )
        if (self.out / _SETTINGS).is_file():
            check_files(self.out, (_SETTINGS,))
        else:
            check_new_folder(self.out)

    def stages_done(self) -> int:
        """Return the number of stages that the parts have gone through.

        Raises:
            CommandError: They are not the first stages of the recipe.
            ModelError: The parts are damaged.
        """
        if self.parts is None:
            return 0
        done, own = list(read_parts(self.parts).recipe.get("stages", ())), list(self.recipe.stages)
        if done != own[: len(done)]:
            raise CommandError(
                f"the parts in {str(self.parts)!r} have gone through {', '.join(done)}, and the recipe begins with "
                f"{', '.join(own)}; train without --parts"
            )
        return len(done)

    def beginning(self) -> TrainingCheckpoint:
        """Return where the training begins: with nothing, or with the parts."""
        if self.parts is None:
            return TrainingCheckpoint()
        tensors = {name: value.float() for name, value in read_parts(self.parts).tensors.items()}
        return TrainingCheckpoint(stage=self.stages_done(), tensors=tensors)

    @property
    def work(self) -> Path:
        """The folder of pictures, teachings and the checkpoint."""
        return self.out / "work"


def train_flags(training: FlagsTraining) -> float:
    """Train the model, or go on with its training, write its parts, and return the minutes of all steps.

    The minutes count the steps of earlier calls too. A run that is done already is left as it is.

    Raises:
        CommandError: The numbers are out of range, the folder holds something else or a run with other settings,
            another process works in it, a file of the run is damaged, or the loss is not finite.
        ModelError: The parts to go on from are damaged or missing.
    """
    training.check()
    torch.set_num_threads(training.threads)
    with _only_run(training.out):
        origin = _text_model_digest(training.text_model)
        _check_settings(training, origin)
        if not (training.out / _FACTORS).is_file():
            recipe = training.recipe.shortened(training.share)
            student, tokenizer = _trained(training, recipe)
            write_parts(
                training.out,
                student.trained(),
                whole_config(student),
                make_processor(tokenizer, recipe.shape),
                text_model=origin,
                recipe={"seed": training.seed, **recipe.plain()},
            )
    return TrainingCheckpoint.read(training.work / _CHECKPOINT).minutes


def examine_run(training: FlagsTraining) -> Examination:
    """Put the whole model of a finished run together, examine it, write its card, and return its scores."""
    whole = training.out / "model"
    model, processor = assemble(training.text_model, training.out)
    save_directory(model, processor, whole, dtype=torch.float32, overwrite=True)
    del model
    examination = examine_model(Examine(model=whole, text_model=training.text_model))
    minutes = TrainingCheckpoint.read(training.work / _CHECKPOINT).minutes
    card = model_card(examination, parts=training.out, minutes=minutes if training.parts is None else None)
    write_whole(training.out / "README.md", card.encode(), error=CommandError)
    return examination


@contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder of a run, and forget the lock when the block or the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise CommandError(
            f"another process trains in {str(folder)!r}; wait until it is done, or choose another folder"
        ) from error


def _check_settings(training: FlagsTraining, text_model: str) -> None:
    """Write down what is asked for, or raise `CommandError` if the folder holds a run that asked for something else."""
    settings = {
        "seed": training.seed,
        "share": training.share,
        "text_model": text_model,
        "recipe": digest(repr(training.recipe)),
        "parts": digest((training.parts / _FACTORS).read_bytes()) if training.parts is not None else "",
    }
    path = training.out / _SETTINGS
    if not path.is_file():
        write_json(path, _LAYOUT, settings, error=CommandError)
        return
    before = read_json(path, _LAYOUT, error=CommandError)
    if other := [f"{name} {before.get(name)}" for name, value in settings.items() if before.get(name) != value]:
        raise CommandError(
            f"the folder {str(training.out)!r} holds a training with {', '.join(other)}; ask for the same, or choose a "
            "new folder"
        )


def _text_model_digest(folder: Path) -> str:
    """The SHA-256 of the file that the text model was made from, or of its weights if it was made by something else."""
    if gguf := origin_of(folder).get("gguf"):
        return gguf
    return digest(*(path.read_bytes() for path in sorted(folder.glob("*.safetensors"))))


def _trained(training: FlagsTraining, recipe: Recipe) -> tuple[Student, PreTrainedTokenizerBase]:
    """Return the trained student and its tokenizer."""
    world, work, seed = FlagWorld(), training.work, training.seed
    original, tokenizer = open_original(training.text_model)
    countries = world.pictured[: recipe.pictures.countries]
    sentences = Sentences(tokenizer, [country.name for country in countries], recipe)
    answers = make_answers(work, original, sentences, recipe, seed=seed)
    pool = make_pool(work / "pictures", world, countries, recipe.pictures, seed=seed)
    moments = make_moments(work, original, kept_rows(answers, sentences))
    student = make_student(original, recipe.shape, seed=seed)
    interference = Interference(student, moments)
    originals = make_states(work, student, sentences, recipe.reading.loss.depths)

    spelling = Spelling(student, sentences, recipe.spelt, seed=seed)
    taught = (student, pool, spelling, originals, interference)

    def answering(settings: AnsweringStage) -> Callable[[], StageTraining]:
        return lambda: AnsweringTraining(settings, *taught, answers)

    stages: tuple[Callable[[], StageTraining], ...] = (
        lambda: SeeingTraining(recipe.tower, student, pool, seed=seed),
        lambda: ReadingTraining(recipe.reading, *taught),
        answering(recipe.answering),
        lambda: SpellingTraining(recipe.spelling, student, pool, spelling),
        *map(answering, recipe.joining),
    )
    trained = {**student.trained(), **named_parameters("spelling", spelling)}
    path, joined = work / _CHECKPOINT, len(stages) - len(recipe.joining)
    checkpoint = TrainingCheckpoint.read(path) if path.is_file() else training.beginning()
    for number, make in enumerate(stages):
        if number >= checkpoint.stage:
            if number > joined and checkpoint.step == 0:  # a joining has ended: the last checkpoint is its end
                checkpoint.write(work / f"joining {number - joined}.safetensors")
            checkpoint.restore(trained)
            _run_stage(make(), trained, path, checkpoint, number=number, training=training)
            checkpoint = TrainingCheckpoint.read(path)
    ends = [TrainingCheckpoint.read(end) for end in sorted(work.glob("joining *.safetensors"))]
    mean_checkpoint([*ends, checkpoint]).restore(trained)
    return student, tokenizer


def mean_checkpoint(checkpoints: Sequence[TrainingCheckpoint]) -> TrainingCheckpoint:
    """Return the last checkpoint with the mean of the weights of all (Wortsman et al., arXiv 2203.05482).

    The mean of models that were trained from one another is often as good as the best of them in what each does best.
    A checkpoint that parts began with lacks what only serves the training, and does not count there.
    """
    last = checkpoints[-1]
    found = {name: [each.tensors[name] for each in checkpoints if name in each.tensors] for name in last.tensors}
    return replace(last, tensors={name: torch.stack(values).mean(dim=0) for name, values in found.items()})


def _run_stage(
    stage: StageTraining,
    trained: Mapping[str, nn.Parameter],
    path: Path,
    checkpoint: TrainingCheckpoint,
    *,
    number: int,
    training: FlagsTraining,
) -> None:
    """Train one stage from a checkpoint to its end, and write checkpoints with all that is `trained` in any stage."""
    groups, settings = stage.groups(), stage.settings
    named = {name: value for group in groups for name, value in group.items()}
    if checkpoint.step == 0:
        stage.begin()
    checkpoint.restore({name: value for name, value in named.items() if name not in trained})
    optimizers = _optimizers(groups, settings)
    checkpoint.restore_moments(optimizers, named)
    began = time.monotonic()
    progress = tqdm(
        range(checkpoint.step, settings.steps),
        desc=f"stage {number + 1}: {stage.name}",
        initial=checkpoint.step,
        total=settings.steps,
        mininterval=5,
    )
    for step in progress:
        rate, momentum = one_cycle(step, settings.steps, settings)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * rate
            if "betas" in group:
                group["betas"] = (momentum, _SECOND)
        loss, numbers = stage.loss(np.random.default_rng([training.seed, number, step]))
        if not math.isfinite(loss.item()):
            raise CommandError(f"the loss of step {step} of the stage {stage.name!r} is not finite; take another seed")
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        progress.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()}, refresh=False)
        minutes = checkpoint.minutes + (time.monotonic() - began) / 60
        if step + 1 == settings.steps:
            TrainingCheckpoint(stage=number + 1, minutes=minutes, tensors=trained).write(path)
        elif (step + 1) % training.every == 0:
            tensors = {**trained, **named, **_moments(optimizers, named)}
            TrainingCheckpoint(stage=number, step=step + 1, minutes=minutes, tensors=tensors).write(path)


def _optimizers(groups: Sequence[Mapping[str, nn.Parameter]], settings: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else.

    The scale of Muon's steps is that of AdamW's (Liu et al., arXiv 2502.16982), so that one learning rate serves both.
    """
    matrices, others = [], []
    for group, peak in zip(groups, settings.peaks, strict=True):
        chosen = [name for name, value in group.items() if value.ndim == 2 and not _is_table(name)]
        matrices.append({"params": [group[name] for name in chosen], "peak": peak})
        others.append({"params": [value for name, value in group.items() if name not in chosen], "peak": peak})
    muon = torch.optim.Muon(
        [group for group in matrices if group["params"]],
        weight_decay=settings.decay,
        momentum=_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW([group for group in others if group["params"]], weight_decay=settings.decay)
    return [muon, adamw]


def _is_table(name: str) -> bool:
    """Whether a matrix holds a vector for each place or each class, rather than mapping states to states."""
    return "embedding" in name or name.startswith("head.")


def _moments(optimizers: Sequence[torch.optim.Optimizer], named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizers' running means by the names of the parameters."""
    return {
        f"{name}/{moment}": mean
        for optimizer in optimizers
        for name, value in named.items()
        if value in optimizer.state
        for moment, mean in optimizer.state[value].items()
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingCheckpoint:
    """Where a training stands: before this step of this stage."""

    stage: int = 0
    """The number of the stage, from 0."""
    step: int = 0
    minutes: float = 0.0
    """How long all steps before took together."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What is trained, and the optimizers' running means under NAME/MEAN; empty at the beginning."""

    @classmethod
    def read(cls, path: Path) -> TrainingCheckpoint:
        """Return the checkpoint in a file. Raises `CommandError` if the file is damaged or missing."""
        tensors, text = read_tensors(path, error=CommandError)
        return cls(stage=int(text["stage"]), step=int(text["step"]), minutes=float(text["minutes"]), tensors=tensors)

    def write(self, path: Path) -> None:
        """Write the checkpoint whole, in the place of the last one."""
        numbers = {"stage": self.stage, "step": self.step, "minutes": self.minutes}
        text = {"layout": _CHECKPOINT_LAYOUT, **{name: str(value) for name, value in numbers.items()}}
        write_tensors(path, self.tensors, text, error=CommandError)

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the parameters that the checkpoint has its values."""
        for name, value in parameters.items():
            if name in self.tensors:
                value.copy_(self.tensors[name])

    def restore_moments(self, optimizers: Sequence[torch.optim.Optimizer], named: Mapping[str, nn.Parameter]) -> None:
        """Give the optimizers their running means; they have none at the beginning of a stage."""
        for optimizer in optimizers:
            for value in (value for group in optimizer.param_groups for value in group["params"]):
                (name,) = (name for name, each in named.items() if each is value)
                means = {key: mean for key, mean in self.tensors.items() if key.startswith(f"{name}/")}
                if means:
                    optimizer.state[value] = {key.rpartition("/")[2]: mean.clone() for key, mean in means.items()}
