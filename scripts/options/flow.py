"""Trace how image information reaches the answer, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import lazy_loader
from cyclopts import App, Parameter, Token

from ... import tracing
from ..errors import CommandError
from .asking import EngineOptions, ModelOptions

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
app = App(name="flow", help=__doc__, help_epilogue=EXAMPLE)
_work: Any = lazy_loader.load("multrace.scripts.flow", suppress_warning=True)  # needs torch
ANALYSES = ("knockout", "lens", "contributions", "relevance")
_OF_ONE = ("image", "constraint", "answer", "foil", "box")
_OF_MANY = ("images", "limit", "degrade", "all")
_OF_ANALYSIS = {
    "knockout": ("flows", "windows", "heads", "whole_answer"),
    "lens": ("positions", "foil"),
    "contributions": ("degrade",),
    "relevance": ("smooth", "keep"),
}


def _boxes(_type: Any, tokens: Sequence[Token]) -> tuple[tracing.Box, ...]:
    return tuple(_box(token.value) for token in tokens)


def _box(text: str) -> tracing.Box:
    """A rectangle of the picture."""
    edges = [int(edge) for edge in text.split(",") if edge.strip().isdecimal()]
    if len(edges) != 4 or text.count(",") != 3:
        raise ValueError(f"{text!r}: write LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,50,50")
    return tracing.Box(*edges)


@dataclass(frozen=True, kw_only=True)
class FlowOptions(ModelOptions, EngineOptions):
    """Options of `multrace flow`."""

    question: Annotated[str | None, Parameter(help="question to ask")] = None
    image: Annotated[Path | None, Parameter(help="picture in front of the question")] = None
    constraint: Annotated[
        str | None, Parameter(help="words of the question that name its subject", metavar="WORDS")
    ] = None
    answer: Annotated[str | None, Parameter(help="right answer, if it is known")] = None
    foil: Annotated[str | None, Parameter(help="wrong answer that the lens follows too", metavar="ANSWER")] = None
    box: Annotated[
        tuple[Any, ...] | None,
        Parameter(
            help="where the object asked about is, in pixels of the picture; once for each rectangle",
            metavar="LEFT,TOP,RIGHT,BOTTOM",
            converter=_boxes,
        ),
    ] = None
    data: Annotated[
        Path | None,
        Parameter(
            help="ask every question of a file: a JSON object per line with question and, as needed, id, image, constraint, "
            "answer, boxes, object, true_option, false_option; or GQA subsets of arXiv 2411.18620, a CSV file or a folder",
            metavar="FILE_OR_FOLDER",
        ),
    ] = None
    images: Annotated[Path | None, Parameter(help="folder of the pictures that --data names", metavar="DIR")] = None
    world: Annotated[
        bool,
        Parameter(
            help="ask questions about the world of the embedded model, with held-out pictures (for that model and edited copies "
            "of it); --limit says how many"
        ),
    ] = False
    limit: Annotated[
        int | None, Parameter(help="maximum number of questions (default: all of --data)", metavar="N")
    ] = None
    degrade: Annotated[
        bool,
        Parameter(
            help="contributions: add noise to all pictures until a third of the answers is wrong, so that there is failure to "
            "predict"
        ),
    ] = False
    all: Annotated[bool, Parameter(help="keep the questions that the model answers wrongly")] = False
    seed: Annotated[int, Parameter(help="random seed of the noise and of the order of --world")] = 0
    knockout: Annotated[
        bool, Parameter(help="cut attention from one group of tokens to another, layer by layer (the default)")
    ] = False
    lens: Annotated[bool, Parameter(help="read what the output head would say after every layer")] = False
    contributions: Annotated[
        bool,
        Parameter(
            help="measure what attention carries from the picture to the constraint and on to the answer; with many questions, "
            "also whether that tells right answers from wrong ones"
        ),
    ] = False
    relevance: Annotated[
        bool,
        Parameter(
            help="compute LLaVA-CAM, attention shares, attention x gradient, and drop image tokens from each layer on"
        ),
    ] = False
    flows: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help='knockout: "source -> target" by token groups (image, question, last, constraint, object, other patches, '
            "separators, system, template, ...) or positions (default: the flows of the study that fit the question)",
            metavar="FLOW",
        ),
    ] = None
    windows: Annotated[
        tuple[int, ...] | None,
        Parameter(
            help="knockout: numbers of layers that are cut together (default: 1, and the same share of all layers as 9 of 40)",
            metavar="N",
        ),
    ] = None
    heads: Annotated[
        tuple[int | str, ...] | None,
        Parameter(
            help="knockout: cut the edges of these heads only, or of each head on its own (default: of all heads together)",
            metavar="each|HEAD",
        ),
    ] = None
    whole_answer: Annotated[bool, Parameter(help="knockout: score all tokens of the answer besides its first")] = False
    positions: Annotated[
        tuple[int | str, ...] | None,
        Parameter(
            help="lens: token groups or positions to read; averages use the first (default: last; for one question also "
            "question)",
            metavar="GROUP",
        ),
    ] = None
    smooth: Annotated[
        int, Parameter(help="relevance: number of noisy copies that LLaVA-CAM is averaged over", metavar="N")
    ] = 0
    keep: Annotated[
        tuple[int | str, ...],
        Parameter(help="relevance: numbers of image tokens that stay, those with most attention, or all", metavar="N"),
    ] = (0,)
    out: Annotated[Path, Parameter(help="folder for the results")] = Path("out/flow")

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
        self._check_words("heads", self.heads or (), "each")
        self._check_words("keep", self.keep, "all")
        if self.heads and "each" in self.heads and len(self.heads) > 1:
            raise CommandError("--heads takes 'each' or numbers of heads, not both")
        self.engine_settings(checked=True)

    def engine_settings(self, *, checked: bool) -> tracing.Engine:
        """Return the engine, with its check or without. Raises `TraceError` for settings that it does not have."""
        return tracing.Engine(name=self.engine, memory=self.memory, checks=self.checks if checked else 0)

    def _check_words(self, name: str, values: tuple[int | str, ...], word: str) -> None:
        if wrong := [value for value in values if isinstance(value, str) and value != word]:
            raise CommandError(f"--{name} {wrong[0]}: pass {word!r} or numbers")

    def _check_belongings(self, source: str) -> None:
        """CommandError for an option that belongs to another source, or to an analysis that is not computed."""
        others = {
            "question": dict.fromkeys(_OF_MANY, "many questions (--data or --world)"),
            "data": dict.fromkeys(_OF_ONE, "one question; write it into each record"),
            "world": dict.fromkeys(_OF_ONE, "one question") | {"images": "--data"},
        }
        if wrong := [name for name in others[source] if self._is_given(name)]:
            raise CommandError(f"--{_spelt(wrong[0])} cannot go with --{source}: it is for {others[source][wrong[0]]}")
        for analysis, names in _OF_ANALYSIS.items():
            if analysis not in self.analyses and (wrong := [name for name in names if self._is_given(name)]):
                raise CommandError(f"--{_spelt(wrong[0])} belongs to --{analysis}, which is not asked for; add it")

    def _is_given(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        default = next(row.default for row in fields(self) if row.name == name)
        return getattr(self, name) != default


@app.default
def run(options: FlowOptions = FlowOptions()) -> int:
    """Run the command."""
    return _work.run(options)


def _spelt(name: str) -> str:
    return name.replace("_", "-")
