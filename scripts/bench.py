"""multrace bench: how fast tracing is, measured side by side in one run, in seconds and in token-layers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm

from ..data import World, tiny_vlm_path
from ..models import Prompt, Site, VisionLanguageModel, capture, load, patch
from ..tracing import SwapImage, causal_trace
from .errors import CommandError
from .options import add_options, option, read

HELP = "time tracing against one whole model call per cell"
EXAMPLE = """example:
  multrace bench --repeats 5      medians of five runs of each way, on the embedded model
"""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Options of `multrace bench`."""

    repeats: int = option("runs of each way; the median is shown (default 3)", default=3, type=int)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Bench`."""
    add_options(parser, Bench)


def run(options: argparse.Namespace) -> int:
    """Prints the table; the ways alternate, so that a busy machine slows both."""
    settings = read(Bench, options)
    if settings.repeats < 1:
        raise CommandError(f"--repeats {settings.repeats}: pass at least 1")
    vlm, world = load(tiny_vlm_path()), World()
    picture, other = (world.picture(entity, 0).image for entity in world.taught[:2])
    prompt = vlm.prompt(picture, world.question(world.facts[0]).question)
    swapped = vlm.prompt(other, prompt.question)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "a whole model call per cell": lambda: whole_calls(vlm, prompt, swapped),
        "multrace, plain path": lambda: causal_trace(
            vlm, prompt, corruption=SwapImage(other), sites="hidden", positions=list(_positions(prompt)), progress=False
        ).scores["hidden"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    maps: dict[str, torch.Tensor] = {}
    for _ in tqdm(range(settings.repeats), desc="bench"):
        for name, way in ways.items():
            started = time.perf_counter()
            maps[name] = way()
            seconds[name].append(time.perf_counter() - started)
    cells = len(_positions(prompt)) * vlm.layers
    tower_passes = dict(zip(ways, (cells + 1, 2), strict=True))
    slowest = median(next(iter(seconds.values())))
    print(
        f"{cells} cells (hidden, {vlm.layers} layers x {len(_positions(prompt))} text tokens), "
        f"{prompt.length} tokens, picture swapped\n"
    )
    print(f"{'way':30s}  seconds   ratio  vision tower passes  decoder token-layers per cell")
    for name, times in seconds.items():
        print(
            f"{name:30s}  {median(times):7.2f}  {slowest / median(times):5.1f}x  {tower_passes[name]:>19d}"
            f"  {prompt.length * vlm.layers:>29d}"
        )
    first, second = maps.values()
    print(f"\nlargest difference between the two maps: {(first - second).abs().max():.2g} (probability)")
    return 0


def _positions(prompt: Prompt) -> tuple[int, ...]:
    return prompt.groups["question"] + prompt.groups["last"]


def whole_calls(vlm: VisionLanguageModel, prompt: Prompt, swapped: Prompt) -> torch.Tensor:
    """(position, layer) float64: restored probabilities the way that scripts of the field do it, one model call per
    cell.
    """
    sites = [Site("hidden", layer) for layer in range(vlm.layers)]
    with torch.no_grad(), capture(vlm, sites, clone=True) as clean:
        answer = int(vlm.logits(prompt)[0, -1].argmax())
    states = dict(clean)
    positions = _positions(prompt)
    scores = torch.zeros(len(positions), vlm.layers, dtype=torch.float64)
    for row, position in enumerate(positions):
        for layer, site in enumerate(sites):

            def restore(output: torch.Tensor, site: Site = site, position: int = position) -> torch.Tensor:
                restored = output.clone()
                restored[:, position] = states[site][:, position]
                return restored

            with torch.no_grad(), patch(vlm, {site: restore}):
                scores[row, layer] = vlm.logits(swapped)[0, -1].double().softmax(-1)[answer]
    return scores
