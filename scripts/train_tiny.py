"""Run `multrace train-tiny`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..data import World
from ..models import load
from ..models.saving import save_directory
from .errors import CommandError
from .options.train_tiny import TrainTiny
from .outputs import check_new_folder
from .training.build import HIDDEN, IMAGE_TOKENS, make_model, make_processor, make_tokenizer
from .training.card import model_card
from .training.examination import accuracy, question_sets, route
from .training.joint import Phase, held_out_accuracy, train_joint
from .training.packing import Packer
from .training.tower import train_tower

TOWER_STEPS = 900
PHASES = (
    Phase(steps=1300, routed=1.0, peak=2e-3),
    Phase(steps=2200, routed=0.6, peak=1.5e-3),
)


def run(settings: TrainTiny) -> int:
    """Train and write the model; after a full run also test it, write its card and print its scores."""
    minutes = train_tiny(settings)
    print(f"written to {settings.out} after {minutes:.0f} minutes")
    if settings.share < 1:
        print("a trial run of a share of the steps: not examined, no card written")
        return 0
    for name, (share, count) in examine(settings, World(), minutes).items():
        print(f"{name:32s} {share:7.1%} of {count}")
    return 0


def train_tiny(settings: TrainTiny) -> float:
    """Train, write the model to `settings.out` in float16, and return the minutes. CommandError if that is in use."""
    if not 0 < settings.share <= 1 or settings.threads < 1:
        raise CommandError(
            f"share {settings.share} and threads {settings.threads}: "
            "pass a share above 0 and up to 1, and at least 1 thread"
        )
    check_new_folder(settings.out)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    started = time.monotonic()
    world = World()
    tokenizer = make_tokenizer(world)
    model = make_model(tokenizer)
    steps = _steps(TOWER_STEPS, settings.share)
    seen = train_tower(model.model.vision_tower, world, steps=steps, seed=settings.seed)
    print(f"vision tower: {seen:.1%} of the entities recognised on held-out pictures")
    torch.manual_seed(settings.seed + 1)  # the same joint training however many numbers the tower's training drew
    packer, reader = Packer(tokenizer, IMAGE_TOKENS), nn.Linear(HIDDEN, len(world.entities))
    for number, phase in enumerate(PHASES, 1):

        def watch(step: int, loss: float, number: int = number) -> None:
            routed, free = (held_out_accuracy(model, world, packer, number=0, routed=bar) for bar in (True, False))
            print(f"phase {number}, step {step}: loss {loss:.3f}, held-out facts right: ", end="")
            print(f"{routed:.1%} routed, {free:.1%} open")

        shortened = replace(phase, steps=_steps(phase.steps, settings.share))
        train_joint(
            model,
            world,
            packer,
            shortened,
            seed=settings.seed + number,
            reader=reader,
            watch=watch,
            label=f"stage 2, phase {number}",
        )
    save_directory(model, make_processor(tokenizer), settings.out, dtype=torch.float16, overwrite=False)
    return (time.monotonic() - started) / 60


def _steps(steps: int, share: float) -> int:
    return max(1, round(steps * share))


def examine(settings: TrainTiny, world: World, minutes: float) -> Mapping[str, tuple[float, int]]:
    """Return set of questions -> (share right, number), from the loaded model; writes the card beside the model."""
    vlm = load(settings.out)
    scores = {
        name: (accuracy(vlm, records, label=name), len(records)) for name, records in question_sets(world).items()
    }
    parameters = sum(parameter.numel() for _, parameter in vlm.named_parameters())
    card = model_card(
        seed=settings.seed,
        tower_steps=TOWER_STEPS,
        phases=PHASES,
        minutes=minutes,
        parameters=parameters,
        scores=scores,
        route=route(vlm, world),
    )
    fresh = settings.out / "README.md.new"
    fresh.write_text(card, encoding="utf-8")
    os.replace(fresh, settings.out / "README.md")
    return scores
