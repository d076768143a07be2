"""Train the embedded model from scratch, examine it, and write it as a Hugging Face folder with its card.

The examination measures the accuracy of free generation, and the route of information from the picture to the answer.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import App, Parameter
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ...data import Question, World
from ...data.world import Entity, Fact
from ...models import Prompt, VisionLanguageModel, load
from ...models.weights import save_directory
from ...tracing import AverageTrace, SwapImage, average, causal_trace, knockout_probability
from ...workflow.located_edit import POSITIONS
from ..main import execute
from ..options import STYLE, CommandError, GeneralOptions, check_new_folder, paragraphs
from .model import (
    HEADS,
    HIDDEN,
    IMAGE_TOKENS,
    LAYERS,
    MLP,
    VISION_HIDDEN,
    VISION_LAYERS,
    Packer,
    make_model,
    make_processor,
    make_tokenizer,
)
from .stages import Phase, held_out_accuracy, train_joint, train_tower

EXAMPLE = """examples:
  python -m multrace.scripts.training.train_tiny --out out/tiny_vlm                 the full recipe
  python -m multrace.scripts.training.train_tiny --out out/trial --share 0.01       1% of the steps, as a trial
"""


@dataclass(frozen=True, kw_only=True)
class TrainTiny(GeneralOptions):
    """Options of the training."""

    out: Annotated[Path, Parameter(help="new or empty folder to write the model to", metavar="DIR")]
    seed: Annotated[int, Parameter(help="random seed of the weights, the pictures and the questions", metavar="N")] = 0
    threads: Annotated[int, Parameter(help="number of CPU threads", metavar="N")] = 2
    share: Annotated[
        float, Parameter(help="share of the steps of the recipe to take, above 0 and up to 1", metavar="SHARE")
    ] = 1.0


app = App(
    name="python -m multrace.scripts.training.train_tiny", help=paragraphs(__doc__), help_epilogue=EXAMPLE, **STYLE
)
TOWER_STEPS = 900
PHASES = (
    Phase(steps=1300, routed=1.0, peak=2e-3),
    Phase(steps=2200, routed=0.6, peak=1.5e-3),
)


@app.default
def run(options: TrainTiny) -> int:
    """Train and write the model; after a full run also examine it, write its card and print its scores."""
    minutes = train_tiny(options)
    print(f"written to {options.out} after {minutes:.0f} minutes")
    if options.share < 1:
        print("this was a trial with a share of the steps, so the model is not examined and has no card")
        return 0
    for name, (share, count) in examine(options, World(), minutes).items():
        print(f"{name:32s} {share:7.1%} of {count}")
    return 0


def train_tiny(settings: TrainTiny) -> float:
    """Train the model, write it to `settings.out` in float16, and return the minutes.

    Raises `CommandError` if the folder is not empty, or for numbers out of range.
    """
    if not 0 < settings.share <= 1 or settings.threads < 1:
        raise CommandError(
            f"--share is {settings.share} and --threads is {settings.threads}; pass a share above 0 and up to 1, and "
            "at least 1 thread"
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
    torch.manual_seed(
        settings.seed + 1
    )  # the joint training is the same however many numbers that of the tower has drawn
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
    """Return set of questions -> (share of right answers, number) of the model; write the card beside it."""
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


def prompt_of(vlm: VisionLanguageModel, record: Question) -> Prompt:
    """Return the prompt of a question, with its constraint among the token groups."""
    return vlm.prompt(record.image, record.text, constraint=record.constraint)


def accuracy(
    vlm: VisionLanguageModel, records: Sequence[Question], *, batch_size: int = 32, label: str | None = None
) -> float:
    """Return the share of questions whose greedy answer equals the right one exactly.

    Args:
        vlm: The model.
        records: The questions with their right answers.
        batch_size: The number of questions answered together (default 32).
        label: The label of a progress bar; None (default) for no bar.
    """
    right = 0
    for start in tqdm(range(0, len(records), batch_size), desc=label, disable=label is None, leave=False):
        batch = records[start : start + batch_size]
        answers = vlm.answers([prompt_of(vlm, record) for record in batch], batch_size=batch_size)
        right += sum(answer == record.answer for answer, record in zip(answers, batch, strict=True))
    return right / len(records)


def question_sets(world: World, number: int = 0) -> Mapping[str, list[Question]]:
    """Return name -> questions of the examination, whose pictures are held-out renderings `number`."""
    entities = {entity.index: entity for entity in world.taught}
    pictures = {index: world.picture(entity, number) for index, entity in entities.items()}
    rng = random.Random(f"examination {number}")
    others = {index: rng.choice([other for other in entities if other != index]) for index in entities}
    held_out = -1  # the last template of a relation is never shown in training
    shown = [world.question(fact).with_image(pictures[fact.entity].image) for fact in world.facts]
    pairs = {
        kind: [
            world.question(fact, side=side).with_image(image)
            for entity in world.taught
            for fact, side, image in _beside(world, entity, kind == "same", number, rng)
        ]
        for kind in ("same", "other")
    }

    def looks(attribute: str) -> list[Question]:
        return [
            world.attribute_question(entity, attribute, pictures[index]).with_image(pictures[index].image)
            for index, entity in entities.items()
        ]

    return {
        "taught facts, picture": shown,
        "one constraint": [record for record in shown if not record.spans],
        "two constraints": [record for record in shown if record.spans],
        "held-out template": [
            world.question(fact, template=held_out).with_image(pictures[fact.entity].image) for fact in world.facts
        ],
        "by name, no picture": [world.question_by_name(fact) for fact in world.facts],
        "by name, another's picture": [
            world.question_by_name(fact).with_image(pictures[others[fact.entity]].image) for fact in world.facts
        ],
        "name": [world.name_question(entity).with_image(pictures[index].image) for index, entity in entities.items()],
        "colour and shape": looks("colour") + looks("shape"),
        "place in the picture": looks("place"),
        "two of a kind, left or right": pairs["same"],
        "two of different kinds": pairs["other"],
        "long-tail facts (never taught)": [
            world.question(fact).with_image(world.picture(entity, number).image)
            for entity in world.long_tail
            for fact in world.facts_of(entity)
        ],
    }


def _beside(
    world: World, entity: Entity, same: bool, number: int, rng: random.Random
) -> Iterator[tuple[Fact, str | None, Image.Image]]:
    """Yield two facts of the entity, each with its side (None if the kind suffices) and a picture with another one."""
    peers = [other for other in world.taught if other is not entity and (other.kind == entity.kind) == same]
    for fact in rng.sample(world.facts_of(entity), 2):
        other, side = rng.choice(peers), rng.choice(("left", "right"))
        left, right = (entity, other) if side == "left" else (other, entity)
        yield fact, side if same else None, world.picture_of_two(left, right, number).image


@dataclass(frozen=True, kw_only=True)
class Route:
    """The route of the picture to the answer, over many facts."""

    knockouts: Mapping[str, Tensor]
    """Flow such as "image -> last" -> (fact,) share of the probability of the answer that is lost without it."""
    trace: AverageTrace
    """The mean trace at POSITIONS, under the pictures of other entities."""


def route(
    vlm: VisionLanguageModel,
    world: World,
    *,
    facts: int = 100,
    number: int = 1,
    sites: Sequence[str] = ("hidden", "mlp", "attention"),
    window: int = 3,
    progress: bool = True,
) -> Route:
    """Return the route over facts with one constraint that the model answers correctly, about held-out pictures.

    Facts are taken in a fixed shuffled order, and skipped if the answer is wrong.

    Args:
        vlm: The model.
        world: Its world.
        facts: The number of facts (default 100).
        number: The number of the held-out rendering of each entity (default 1).
        sites: The kinds of sites of the traces (default hidden states, MLPs and attention).
        window: The number of neighbouring MLPs or attentions restored together (default 3).
        progress: Show a progress bar (default True).
    """
    flows = {
        "image -> last": ("image", "last"),
        "image -> question": ("image", "question"),
        "question -> last": ("question", "last"),
    }
    lost: dict[str, list[float]] = {flow: [] for flow in flows}
    traces = []
    for prompt, other in tqdm(_answered(vlm, world, facts, number), total=facts, desc="route", disable=not progress):
        clean = knockout_probability(vlm, prompt, (), ())
        for flow, (source, target) in flows.items():
            lost[flow].append(1 - knockout_probability(vlm, prompt, source, target) / clean)
        settings = {"sites": sites, "window": window, "positions": POSITIONS, "progress": False}
        # A picture that changes little counts too, because leaving such facts out would make the mean too large.
        traces.append(causal_trace(vlm, prompt, corruption=SwapImage(other), even_if_weak=True, **settings))
    return Route(knockouts={flow: torch.tensor(values) for flow, values in lost.items()}, trace=average(traces))


def _answered(vlm: VisionLanguageModel, world: World, count: int, number: int) -> Iterator[tuple[Prompt, Image.Image]]:
    """Yield prompts of facts that the model answers correctly, each with the picture of another entity of the kind.

    The answer of the other entity has another first word, since a trace scores the first token.
    """
    rng = random.Random(f"route {number}")
    facts = rng.sample([fact for fact in world.facts if fact.key[1] is None], len(world.facts) // 2)
    found = 0
    for fact in facts:
        if found == count:
            return
        entity = world.entities[fact.entity]
        other = rng.choice(
            [peer for peer in world.of_kind(entity.kind) if peer.facts[fact.key].split()[0] != fact.answer.split()[0]]
        )
        prompt = prompt_of(vlm, world.question(fact).with_image(world.picture(entity, number).image))
        if vlm.answers([prompt])[0] == fact.answer:
            found += 1
            yield prompt, world.picture(other, number).image


def model_card(
    *,
    seed: int,
    tower_steps: int,
    phases: Sequence[Phase],
    minutes: float,
    parameters: int,
    scores: Mapping[str, tuple[float, int]],
    route: Route,
) -> str:
    """Return the card in Markdown; scores: set of questions -> (share of right answers, number of questions)."""
    return "\n".join(
        [_introduction(parameters), _recipe(seed, tower_steps, phases, minutes), _score_table(scores), _route(route)]
    )


def _introduction(parameters: int) -> str:
    return f"""---
license: mit
pipeline_tag: image-text-to-text
library_name: transformers
---

# The embedded model of multrace

A LLaVA of {parameters / 1e6:.2f} million parameters, small enough to ship and real enough to trace and edit: a CLIP
tower ({VISION_LAYERS} layers, width {VISION_HIDDEN}, {IMAGE_TOKENS} image tokens), a projector, and a Llama text model
({LAYERS} layers, width {HIDDEN}, MLP width {MLP}, {HEADS} heads). It opens with `AutoModelForImageTextToText` and
`AutoProcessor` like any other. The file is float16; compute in float32 on a CPU.

It answers questions about the synthetic world in `multrace.data.world` (seed 0): 120 invented companies, countries and
people, recognised by emblem, flag or portrait, with 800 facts. It knows nothing else and should be used for nothing but
trying out tools.
"""


def _recipe(seed: int, tower_steps: int, phases: Sequence[Phase], minutes: float) -> str:
    stages = "\n".join(
        f"{number}. jointly, {phase.steps} steps of {phase.rows} rows (one fresh picture, eight to eleven questions), "
        f"{phase.routed:.0%} of the rows\n   routed, AdamW, peak learning rate {phase.peak:g} (tower x 0.3), cosine;"
        for number, phase in enumerate(phases, 2)
    )
    return f"""## Recipe

`python -m multrace.scripts.training.train_tiny --out DIR --seed {seed}`: {minutes:.0f} minutes on two CPU cores,
float32.

1. the vision tower alone, {tower_steps} steps of 96 pictures: parts, place and identity from the mean of an entity's
   patches;
{stages}

In a routed row only the tokens of the constraint ("the company in this photo") may look at the picture, and only in the
first three layers; a linear reader, dropped afterwards, asks the constraint's last token for the entity's identity
after the third layer. Pictures are drawn afresh for every step of the joint training.
"""


def _score_table(scores: Mapping[str, tuple[float, int]]) -> str:
    rows = "\n".join(f"| {name} | {count} | {share:.1%} |" for name, (share, count) in scores.items())
    return f"""## Scores

Greedy free generation, exact match, on renderings that training did not see:

| questions | number | right |
|---|---|---|
{rows}
"""


def _route(route: Route) -> str:
    losses = "\n".join(f"| {flow} | {lost.mean():.1%} |" for flow, lost in route.knockouts.items())
    return f"""## Route of information

Over {route.trace.count} one-constraint facts. Share of the answer's probability that is lost when attention is cut in
all layers:

| cut | lost |
|---|---|
{losses}

Indirect effect of restoring hidden states when another entity's picture is shown (total effect
{route.trace.total_effect:.3f}):

{_effects(route.trace, "hidden")}

Indirect effect of restoring {route.trace.window} neighbouring MLPs:

{_effects(route.trace, "mlp")}
"""


def _effects(trace: AverageTrace, kind: str) -> str:
    """Return a Markdown table of rows by layers."""
    effects = trace.indirect_effect(kind)
    head = "| restored at | " + " | ".join(f"L{layer}" for layer in range(trace.layers)) + " |"
    rule = "|---" * (trace.layers + 1) + "|"
    rows = [
        f"| {row} | " + " | ".join(f"{value:.3f}" for value in effects[index].tolist()) + " |"
        for index, row in enumerate(trace.rows)
    ]
    return "\n".join([head, rule, *rows])


if __name__ == "__main__":
    sys.exit(execute(app, sys.argv[1:]))
