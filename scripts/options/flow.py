"""multrace flow: trace how image information reaches the answer, layer by layer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from ... import tracing
from ..errors import CommandError
from .asking import EngineOptions, ModelOptions
from .option import Words, flag, option

HELP = "follow image information through the layers: knockout, lens, contributions, relevance"
EXAMPLE = """examples:
  multrace flow --world --limit 20 --out out/world
  multrace flow --world --limit 90 --contributions --degrade --out out/failure
  multrace flow --image photo.jpg --question "What colour is the car?" --answer red --box 40,60,210,180
  multrace flow --image photo.jpg --question "What colour is the car?" --answer red --constraint "the car" \\
      --knockout --lens --contributions --relevance --smooth 10 --keep 0 64
  multrace flow --image photo.jpg --question "Is the car red or blue?" --flows "image -> last" "object -> last" \\
      --box 40,60,210,180 --windows 1 9 --heads each
  multrace flow --data questions.jsonl --knockout --lens --out out/all
  multrace flow --data csv/ChooseAttr.csv --images gqa/images --limit 100 --model llava-hf/llava-1.5-7b-hf

For one question the command writes each result to OUT as NAME.safetensors, with its pictures:
  --knockout       knockout.safetensors, .png (all flows in one plot, at most the strongest 12) and .csv
  --lens           lens.safetensors, .png and lens_tokens.png (the likeliest token at each position)
  --contributions  contributions.safetensors and .png (to the last token); image_to_constraint.safetensors and .png
                   (over the picture), image_tokens.png (by index of the image token)
  --relevance      cam, share, saliency and pruning: .safetensors and .png; where the image tokens form a grid,
                   cam_overlay.png, saliency_overlay.png and, if --keep leaves some of them, pruning_overlay.png
For many questions it writes the averages to OUT as .safetensors, .png and .csv: knockout, lens, contributions,
  image_to_constraint (and image_tokens.png), failure (how well failure is predicted), share, saliency (geometric
  means), pruning; and OUT/report.json. The results of each question are in OUT/questions/ID (contributions as means
  over heads); cam has no average and is drawn there. A later call with the same settings continues from them.
  Questions that the model answers wrongly are listed, and count for contributions only, unless --all is given.
The classes of multrace.tracing read the .safetensors: AttentionKnockout.load(path), AverageKnockout.load(path), ...
"""
ANALYSES = ("knockout", "lens", "contributions", "relevance")
_OF_ONE = ("image", "constraint", "answer", "foil", "box")
_OF_MANY = ("images", "limit", "degrade", "all")
_OF_ANALYSIS = {
    "knockout": ("flows", "windows", "heads", "whole_answer"),
    "lens": ("positions", "foil"),
    "contributions": ("degrade",),
    "relevance": ("smooth", "keep"),
}


def _box(text: str) -> tracing.Box:
    """A rectangle of the picture."""
    edges = [int(edge) for edge in text.split(",") if edge.strip().isdecimal()]
    if len(edges) != 4 or text.count(",") != 3:
        raise argparse.ArgumentTypeError(f"{text!r}: write LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,50,50")
    return tracing.Box(*edges)


@dataclass(frozen=True, kw_only=True)
class FlowOptions(ModelOptions, EngineOptions):
    """Options of `multrace flow`."""

    question: str | None = option("question to ask", default=None)
    image: Path | None = option("picture in front of the question", default=None, type=Path)
    constraint: str | None = option("words of the question that name its subject", default=None, metavar="WORDS")
    answer: str | None = option("right answer, if it is known", default=None)
    foil: str | None = option("wrong answer that the lens follows too", default=None, metavar="ANSWER")
    box: tuple[tracing.Box, ...] | None = option(
        "where the object asked about is, in pixels of the picture; once for each rectangle",
        default=None,
        action="append",
        type=_box,
        metavar="LEFT,TOP,RIGHT,BOTTOM",
    )
    data: Path | None = option(
        "ask every question of a file: a JSON object per line with question and, as needed, id, image, constraint, "
        "answer, boxes, object, true_option, false_option; or GQA subsets of arXiv 2411.18620, a CSV file or a folder",
        default=None,
        type=Path,
        metavar="FILE_OR_FOLDER",
    )
    images: Path | None = option("folder of the pictures that --data names", default=None, type=Path, metavar="DIR")
    world: bool = option(
        "ask questions about the world of the embedded model, with held-out pictures (for that model and edited copies "
        "of it); --limit says how many",
        default=False,
        action="store_true",
    )
    limit: int | None = option(
        "maximum number of questions (default: all of --data)", default=None, type=int, metavar="N"
    )
    degrade: bool = option(
        "contributions: add noise to all pictures until a third of the answers is wrong, so that there is failure to "
        "predict",
        default=False,
        action="store_true",
    )
    all: bool = option("keep the questions that the model answers wrongly", default=False, action="store_true")
    seed: int = option("random seed of the noise and of the order of --world (default: 0)", default=0, type=int)
    knockout: bool = option(
        "cut attention from one group of tokens to another, layer by layer (the default)",
        default=False,
        action="store_true",
    )
    lens: bool = option("read what the output head would say after every layer", default=False, action="store_true")
    contributions: bool = option(
        "measure what attention carries from the picture to the constraint and on to the answer; with many questions, "
        "also whether that tells right answers from wrong ones",
        default=False,
        action="store_true",
    )
    relevance: bool = option(
        "compute LLaVA-CAM, attention shares, attention x gradient, and drop image tokens from each layer on",
        default=False,
        action="store_true",
    )
    flows: tuple[str, ...] | None = option(
        'knockout: "source -> target" by token groups (image, question, last, constraint, object, other patches, '
        "separators, system, template, ...) or positions (default: the flows of the study that fit the question)",
        default=None,
        nargs="+",
        metavar="FLOW",
    )
    windows: tuple[int, ...] | None = option(
        "knockout: numbers of layers that are cut together (default: 1, and the same share of all layers as 9 of 40)",
        default=None,
        nargs="+",
        type=int,
        metavar="N",
    )
    heads: tuple[int | str, ...] | None = option(
        "knockout: cut the edges of these heads only, or of each head on its own (default: of all heads together)",
        default=None,
        nargs="+",
        type=Words(("each",)),
        metavar="each|HEAD",
    )
    whole_answer: bool = option(
        "knockout: score all tokens of the answer besides its first", default=False, action="store_true"
    )
    positions: tuple[int | str, ...] | None = option(
        "lens: token groups or positions to read; averages use the first (default: last; for one question also "
        "question)",
        default=None,
        nargs="+",
        type=Words(),
        metavar="GROUP",
    )
    smooth: int = option(
        "relevance: number of noisy copies that LLaVA-CAM is averaged over (default: 0, the picture itself)",
        default=0,
        type=int,
        metavar="N",
    )
    keep: tuple[int | str, ...] = option(
        "relevance: numbers of image tokens that stay, those with most attention (default: 0), or all",
        default=(0,),
        nargs="+",
        type=Words(("all",)),
        metavar="N",
    )
    out: Path = option("folder for the results (default: out/flow)", default=Path("out/flow"), type=Path)

    @property
    def is_one(self) -> bool:
        """Whether a single question is asked."""
        return self.question is not None

    @property
    def analyses(self) -> tuple[str, ...]:
        """The analyses that are computed."""
        return tuple(name for name in ANALYSES if getattr(self, name)) or ANALYSES[:1]

    def check(self) -> None:
        """Raises `CommandError` or `TraceError` for options that do not fit together, or that no model could follow."""
        given = [name for name in ("question", "data", "world") if self._is_given(name)]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "nothing to ask"
            raise CommandError(f"found {found}; pass one of --question, --data FILE_OR_FOLDER and --world")
        self._check_belongings(given[0])
        if self.world and self.limit is None:
            raise CommandError("--world has no end; pass the number of questions as --limit N")
        if self.limit is not None and self.limit < 1:
            raise CommandError(f"--limit {self.limit}: ask at least one question")
        if self.smooth < 0:
            raise CommandError(f"--smooth {self.smooth}: average over 0 noisy copies or more")
        if self.heads and "each" in self.heads and len(self.heads) > 1:
            raise CommandError("--heads takes 'each' or numbers of heads, not both")
        self.engine_settings(checked=True)

    def engine_settings(self, *, checked: bool) -> tracing.Engine:
        """Return the engine, with its check or without. Raises `TraceError` for settings that it does not have."""
        return tracing.Engine(name=self.engine, memory=self.memory, checks=self.checks if checked else 0)

    def _check_belongings(self, source: str) -> None:
        """CommandError for an option that belongs to another source, or to an analysis that is not computed."""
        others = {
            "question": dict.fromkeys(_OF_MANY, "many questions (--data or --world)"),
            "data": dict.fromkeys(_OF_ONE, "one question; write it into each record"),
            "world": dict.fromkeys(_OF_ONE, "one question") | {"images": "--data"},
        }
        if wrong := [name for name in others[source] if self._is_given(name)]:
            raise CommandError(f"{flag(wrong[0])} cannot go with --{source}: it is for {others[source][wrong[0]]}")
        for analysis, names in _OF_ANALYSIS.items():
            if analysis not in self.analyses and (wrong := [name for name in names if self._is_given(name)]):
                raise CommandError(f"{flag(wrong[0])} belongs to --{analysis}, which is not asked for; add it")

    def _is_given(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        default = next(row.default for row in fields(self) if row.name == name)
        return getattr(self, name) != default


OPTIONS = FlowOptions
