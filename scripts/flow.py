"""Follow how image information reaches the answer, layer by layer: knockout, lens, contributions, relevance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter, Token

from .. import data, workflow
from ..data.errors import gist
from .options import CommandError, EngineOptions, RunOptions, print_report

EXAMPLE = """examples:
  multrace flow --world --limit 20 --out out/world
  multrace flow --world --limit 90 --contributions --degrade --out out/failure
  multrace flow --image photo.jpg --question "What colour is the car?" --answer red --box 40,60,210,180
  multrace flow --image photo.jpg --question "What colour is the car?" --answer red --constraint "the car" \\
      --knockout --lens --contributions --relevance --smooth 10 --keep 0 64
  multrace flow --image photo.jpg --question "Is the car red or blue?" --flows "image -> last" "object -> last" \\
      --box 40,60,210,180 --windows 1 3 --heads each
  multrace flow --data questions.jsonl --knockout --lens --out out/flows
  multrace flow --data csv/ChooseAttr.csv --images gqa/images --limit 100 --out out/gqa \\
      --model llava-hf/llava-1.5-7b-hf

For one question the command writes each result to OUT as NAME.safetensors, with its pictures:
  --knockout       knockout.safetensors, .png (all flows in one plot, at most the strongest 12) and .csv
  --lens           lens.safetensors, .png and lens_tokens.png (the likeliest token at each position)
  --contributions  contributions.safetensors and .png (to the last token); image_to_constraint.safetensors and .png
                   (over the picture), image_tokens.png (by index of the image token)
  --relevance      cam, share, saliency and pruning: .safetensors and .png; where the image tokens form a grid,
                   cam_overlay.png, saliency_overlay.png and, if --keep leaves some of them, pruning_overlay.png
For many questions it writes the averages to OUT/summary/ as .safetensors, .png and .csv: knockout, lens, contributions,
  image_to_constraint (and image_tokens.png), failure (how well wrong answers are predicted), share, saliency (geometric
  means), pruning; and rows.parquet with one row per question. The results of each question are in OUT/records/ID-...
  (contributions as means over heads); cam has no average and is drawn there. The same command again continues an
  interrupted run. Questions that the model answers wrongly count for contributions only, unless --all is given.
The exit code is 0 if every record is done, 1 if a record failed or could not be read, and 2 for bad input.
The classes of multrace.tracing read the .safetensors: AttentionKnockout.load(path), AverageKnockout.load(path), ...
"""
app = App(name="flow", help=__doc__, help_epilogue=EXAMPLE)
_OF_ONE = ("image", "constraint", "answer", "foil", "box")
_OF_DATA = ("format", "images")
_OF_MANY = (*_OF_DATA, "limit", "shard", "retry_failed", "degrade", "all", "draw")
_OF_ANALYSIS = {
    "knockout": ("flows", "windows", "heads", "whole_answer"),
    "lens": ("positions", "foil"),
    "contributions": ("degrade",),
    "relevance": ("smooth", "keep"),
}


def _boxes(_type: Any, tokens: Sequence[Token]) -> tuple[tuple[int, int, int, int], ...]:
    return tuple(_box(token.value) for token in tokens)


def _box(text: str) -> tuple[int, int, int, int]:
    """Return the rectangle (left, top, right, bottom) that the text describes, in pixels."""
    edges = [int(edge) for edge in text.split(",") if edge.strip().isdecimal()]
    if len(edges) != 4 or text.count(",") != 3:
        raise ValueError(f"{text!r} is not a box; write LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,50,50")
    left, top, right, bottom = edges
    return left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class FlowOptions(RunOptions, EngineOptions):
    """Options of `multrace flow`."""

    question: Annotated[
        str | None, Parameter(help="question to ask; either this, --data or --world is needed", metavar="TEXT")
    ] = None
    image: Annotated[
        Path | None,
        Parameter(
            help="picture that the question is about (default: none, for a question without a picture)", metavar="FILE"
        ),
    ] = None
    constraint: Annotated[
        str | None,
        Parameter(
            help="words of the question that name its subject, such as 'the car' (default: none)", metavar="WORDS"
        ),
    ] = None
    answer: Annotated[str | None, Parameter(help="right answer (default: unknown)", metavar="ANSWER")] = None
    foil: Annotated[
        str | None, Parameter(help="lens: wrong answer to follow as well (default: none)", metavar="ANSWER")
    ] = None
    box: Annotated[
        tuple[Any, ...] | None,
        Parameter(
            help="where the object in question is, in pixels of the picture; repeat it for several rectangles "
            "(default: unknown)",
            metavar="LEFT,TOP,RIGHT,BOTTOM",
            converter=_boxes,
        ),
    ] = None
    world: Annotated[
        bool,
        Parameter(
            help="ask questions about the built-in world, with held-out pictures, instead of those of a file (for the "
            "embedded model and edited copies of it); --limit says how many"
        ),
    ] = False
    degrade: Annotated[
        bool,
        Parameter(
            help="contributions: add noise to all pictures until a third of the answers is wrong, so that there are "
            "wrong answers to predict"
        ),
    ] = False
    all: Annotated[
        bool,
        Parameter(help="also analyse the questions that the model answers wrongly (default: only for --contributions)"),
    ] = False
    seed: Annotated[int, Parameter(help="random seed of the noise and of the order of --world", metavar="N")] = 0
    knockout: Annotated[
        bool,
        Parameter(
            help="attention knockout: cut the attention from one group of tokens to another, in one window of layers "
            "at a time (the default if no analysis is named)"
        ),
    ] = False
    lens: Annotated[bool, Parameter(help="logit lens: apply the output head to the hidden states after each layer")] = (
        False
    )
    contributions: Annotated[
        bool,
        Parameter(
            help="attention contributions: measure what attention carries from the picture to the constraint and on "
            "to the answer; with many questions, also how well that predicts wrong answers"
        ),
    ] = False
    relevance: Annotated[
        bool,
        Parameter(
            help="relevance of image tokens: LLaVA-CAM, shares of attention, saliency (attention x gradient), and "
            "pruning of image tokens from each layer on"
        ),
    ] = False
    flows: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help='knockout: "source -> target" by token groups (image, question, last, constraint, object, other '
            "patches, separators, system, template, ...) or positions (default: the flows of the study that fit the "
            "question)",
            metavar="FLOW",
        ),
    ] = None
    windows: Annotated[
        tuple[int, ...] | None,
        Parameter(
            help="knockout: numbers of neighbouring layers that are cut together (default: 1, and the same share of "
            "all layers as 9 of 40)",
            metavar="N",
        ),
    ] = None
    heads: Annotated[
        tuple[int | str, ...] | None,
        Parameter(
            help="knockout: heads whose attention is cut, by number, or 'each' for one head at a time (default: all "
            "heads together)",
            metavar="each|HEAD",
        ),
    ] = None
    whole_answer: Annotated[bool, Parameter(help="knockout: score all tokens of the answer as well as its first")] = (
        False
    )
    positions: Annotated[
        tuple[int | str, ...] | None,
        Parameter(
            help="lens: token groups or positions to read, the first of which is averaged over questions (default: "
            "last; for one question also question)",
            metavar="GROUP",
        ),
    ] = None
    smooth: Annotated[
        int,
        Parameter(
            help="relevance: number of noisy copies of the picture that LLaVA-CAM is averaged over; 0 takes the "
            "picture itself",
            metavar="N",
        ),
    ] = 0
    keep: Annotated[
        tuple[int | str, ...],
        Parameter(
            help="relevance: numbers of image tokens that pruning keeps, those with the most attention; 'all' prunes "
            "none",
            metavar="N",
        ),
    ] = (0,)
    draw: Annotated[bool, Parameter(help="also draw the results of each of many questions")] = False
    out: Annotated[Path, Parameter(help="folder for the results", metavar="DIR")] = Path("out/flow")

    @property
    def analyses(self) -> tuple[str, ...]:
        """The analyses to compute."""
        return tuple(name for name in _OF_ANALYSIS if getattr(self, name)) or ("knockout",)

    def check(self) -> None:
        """Raises `CommandError` for options that do not fit together."""
        self._check_words("heads", self.heads or (), "each")
        self._check_words("keep", self.keep, "all")
        sources = self.given(("question", "data", "world"))
        if len(sources) != 1:
            found = " and ".join(sources) or "nothing to ask"
            raise CommandError(f"found {found}; pass one of --question, --data FILE and --world")
        others = {
            "--question": [(_OF_MANY, "many questions (--data or --world)")],
            "--data": [(_OF_ONE, "one question; write it into each record")],
            "--world": [(_OF_ONE, "one question"), (_OF_DATA, "--data")],
        }
        for names, meaning in others[sources[0]]:
            if wrong := self.given(names):
                raise CommandError(f"{wrong[0]} cannot go with {sources[0]}: it is for {meaning}")
        for analysis, names in _OF_ANALYSIS.items():
            if analysis not in self.analyses and (wrong := self.given(names)):
                raise CommandError(f"{wrong[0]} belongs to --{analysis}, which is not asked for; add --{analysis}")
        if self.world and self.limit is None:
            raise CommandError("--world has no end; pass the number of questions as --limit N")
        self.check_run()
        if self.heads and "each" in self.heads and len(self.heads) > 1:
            raise CommandError("--heads has both 'each' and numbers; pass 'each', or the numbers of heads")

    def _check_words(self, name: str, values: tuple[int | str, ...], word: str) -> None:
        if wrong := [value for value in values if isinstance(value, str) and value != word]:
            raise CommandError(f"--{name} {wrong[0]}: pass {word!r} or numbers")

    def asked(self) -> data.Question:
        """Return the question of the command line. Raises `DataError` for an empty one."""
        return data.Question(
            text=self.question or "",
            image=self.image,
            constraint=self.constraint,
            answer=self.answer,
            foil=self.foil,
            boxes=self.box or (),
            id="question",
        )

    def settings(self) -> workflow.FlowRun:
        """Return the settings of the analyses. Raises `TraceError` for settings that fit no model."""
        is_one = self.question is not None
        own: dict[str, Any] = {"analyses": self.analyses, "keep_wrong": self.all, "by_head": is_one}
        own["heads"] = "each" if self.heads == ("each",) else self.heads
        own["positions"] = self.positions or (("last", "question") if is_one else ("last",))
        names = {row.name for row in fields(workflow.FlowRun)} - own.keys()
        return workflow.FlowRun(**own, **{name: getattr(self, name) for name in names})


@app.default
def run(options: FlowOptions = FlowOptions()) -> int:
    """Analyse one question or many; write results and pictures, and print a summary."""
    options.check()
    settings = options.settings()
    if options.world:
        questions = data.world_questions(options.limit, seed=options.seed)
        records: Any = enumerate(questions, start=1)
    elif options.data is not None:
        records = options.records()
    else:
        return _one(options, settings)
    return print_report(workflow.run(options.model_to_load(), settings, records, options.out, **options.share))


def _one(options: FlowOptions, settings: workflow.FlowRun) -> int:
    question = options.asked()
    settings.check(question)
    for reading in settings.readings(of_one=True):
        reading.check(question)
    workflow.check_result_folder(options.out)
    vlm = options.open_model()
    prompt = vlm.prompt_for(question)
    answer = settings.answer(vlm, question, prompt, of_one=True, progress=True)
    results, skipped = {}, dict(answer.skipped)
    for reading, experiment in answer.experiments.items():
        try:
            results[reading] = reading.reduced(experiment())
        except workflow.INPUT_ERRORS as error:
            skipped[reading.name] = gist(error)
    problems = "; ".join(f"no {name}: {reason}" for name, reason in skipped.items())
    if not results:
        raise CommandError(problems)
    with workflow.result_folder(options.out) as new:
        for reading, result in results.items():
            result.save(new / f"{reading.name}.safetensors")
            for name, draw in reading.files(result, prompt).items():
                draw(new / name)
    print(f"question  {question.text}\nanswer    {answer.verdict(question)}")
    for reading, result in results.items():
        print(f"\n{reading.name}", *(f"  {line}" for line in reading.lines(result)), sep="\n")
    print(f"\nwritten to {options.out}:", ", ".join(sorted(path.name for path in options.out.iterdir())))
    if problems:
        raise CommandError(problems)
    return 0
