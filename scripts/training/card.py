"""The embedded model's card: recipe, seed and scores, in the words that its folder is shipped with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...tracing import AverageTrace
from .build import HEADS, HIDDEN, IMAGE_TOKENS, LAYERS, MLP, VISION_HIDDEN, VISION_LAYERS
from .examination import Route
from .joint import Phase


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
    """The card as Markdown; scores: set -> (share right, number of questions)."""
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

`multrace train-tiny --out DIR --seed {seed}`: {minutes:.0f} minutes on two CPU cores, float32.

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
    """Rows by layers as a Markdown table."""
    effects = trace.indirect_effect(kind)
    head = "| restored at | " + " | ".join(f"L{layer}" for layer in range(trace.layers)) + " |"
    rule = "|---" * (trace.layers + 1) + "|"
    rows = [
        f"| {row} | " + " | ".join(f"{value:.3f}" for value in effects[index].tolist()) + " |"
        for index, row in enumerate(trace.rows)
    ]
    return "\n".join([head, rule, *rows])
