"""Study a real model: where it keeps the facts that nobody here taught it, and how a picture reaches them.

The model is a LLaVA over SmolLM2 that reads the flags of the world (`multrace build-flags`). It is asked cloze
questions about countries, by picture and by name. What it knows is then traced: under another country's flag, and with
noise on the words, by attention knockout, through the logit lens, by the image tokens that it needs, and by the layers
in which it needs them. Its own errors show whether failure can be predicted. ROME's figure is made on the text model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from ... import __version__
from ...artefacts import read_json, write_json
from ...data import Question
from ...data.worlds.flags import FlagWorld
from ...models import VisionLanguageModel, load
from ...workflow import Analysis, read_rows, run as run_analysis
from ..main import execute
from ..options import STYLE, CommandError, GeneralOptions, paragraphs
from . import real_facts as facts, real_numbers as numbers
from .real_facts import CHOOSING, REPORTING, Answers
from .real_page import write_page
from .real_readings import Cliff, Emergence, Failure, Flows, ImageTokens
from .real_traces import SubjectTrace, SwapTrace, scaled_window

EXAMPLE = """examples:
  python -m multrace.scripts.studies.real_model --model flags-vlm --text smollm2 --out out/real
  python -m multrace.scripts.studies.real_model --text smollm2 --counterfact edit.json --out out/real --parts rome
  python -m multrace.scripts.studies.real_model --model flags-vlm --out out/real --parts swap flows --docs docs

The program keeps each record in OUT/runs as soon as it is there, and goes on where it was stopped. It writes
OUT/results.json, and the page with its figures.
"""
LAYOUT = "multrace real model 1"
PARTS = ("rome", "swap", "picture", "noise", "noise by name", "flows", "emergence", "tokens", "cliff", "failure")
"""The parts of the study in their order, by the names of their folders."""
LONGEST = 11
"""Longest prompt of a CounterFact statement in tokens, its line end included; the cost grows with the square."""
WINDOW = 3
"""Layers that are restored together in traces of the vision-language model, as in arXiv 2406.04236."""
CUT, CUT_LAYERS = 9, 40
"""The windows of arXiv 2411.18620, and the layers of its model."""
app = App(
    name="python -m multrace.scripts.studies.real_model", help=paragraphs(__doc__), help_epilogue=EXAMPLE, **STYLE
)


@dataclass(frozen=True, kw_only=True)
class RealModel(GeneralOptions):
    """Options of the study of a real model."""

    out: Annotated[Path, Parameter(help="folder for the runs and the results", metavar="DIR")]
    model: Annotated[Path | None, Parameter(help="the vision-language model that reads flags", metavar="DIR")] = None
    text: Annotated[Path | None, Parameter(help="the text model inside it, for ROME's figure", metavar="DIR")] = None
    counterfact: Annotated[
        Path | None, Parameter(help="statements of CounterFact besides the capitals, for ROME's figure", metavar="FILE")
    ] = None
    parts: Annotated[
        tuple[str, ...], Parameter(help=f"parts to measure: {', '.join(PARTS)}", metavar="PART", negative_iterable=())
    ] = PARTS
    asked: Annotated[int, Parameter(help="number of questions that the model is asked about flags", metavar="N")] = 640
    choosing: Annotated[int, Parameter(help="number of known facts on which settings are chosen", metavar="N")] = 30
    reporting: Annotated[int, Parameter(help="number of known facts that are reported", metavar="N")] = 100
    docs: Annotated[
        Path | None, Parameter(help="folder for the page and its figures (default: OUT)", metavar="DIR")
    ] = None

    def check(self) -> None:
        """Raises `CommandError` for unknown parts, numbers below 2, or a missing model."""
        if unknown := [name for name in self.parts if name not in PARTS]:
            raise CommandError(f"cannot measure --parts {unknown[0]!r}; pass some of {', '.join(map(repr, PARTS))}")
        for name in ("asked", "choosing", "reporting"):
            if getattr(self, name) < 2:
                raise CommandError(f"--{name} is {getattr(self, name)}; pass at least 2")
        if self.text is None and "rome" in self.parts:
            raise CommandError("ROME's figure needs the text model; pass --text DIR, or other --parts")
        if self.model is None and {*self.parts} - {"rome"}:
            raise CommandError("no model to study; pass --model DIR, such as the one that multrace build-flags makes")


@app.default
def run(options: RealModel) -> int:
    """Measure the parts that are missing, and write the results and the page."""
    options.check()
    results = _known_results(options.out)
    if "rome" in options.parts:
        results |= measure_rome(options)
        _keep(options.out, results)
    if others := [name for name in PARTS if name in options.parts and name != "rome"]:
        study = ask_about_flags(load(options.model), FlagWorld(), options)
        results |= study.about()
        for number, name in enumerate(others, 1):
            print(f"part {number} of {len(others)}: {name}", flush=True)
            results[name] = study.measure(name)
            _keep(options.out, results)
    print(f"written: {write_page(results, options.docs or options.out)}")
    return 0


def _known_results(out: Path) -> dict[str, Any]:
    path = out / "results.json"
    return dict(read_json(path, LAYOUT)["results"]) if path.is_file() else {}


def _keep(out: Path, results: Mapping[str, Any]) -> None:
    write_json(out / "results.json", LAYOUT, {"results": dict(results)})


def measure_rome(options: RealModel) -> dict[str, Any]:
    """Return the average trace over all facts that the text model knows, after ROME's figure."""
    vlm, runs = load(options.text), options.out / "runs"
    sources = {"capitals": list(facts.capital_questions(FlagWorld()))}
    if options.counterfact is not None:
        sources = {"counterfact": list(facts.counterfact_questions(options.counterfact, vlm, LONGEST)), **sources}
    known: dict[str, list[Question]] = {}
    for name, questions in sources.items():
        answers = _answers(vlm, Answers(max_new_tokens=4), questions, runs / f"answers {name}")
        known[name] = facts.known_questions(questions, answers)
    records = [question for members in known.values() for question in members]
    run_analysis(vlm, SubjectTrace(window=scaled_window(vlm.layers)), enumerate(records, 1), runs / "rome")
    asked = {name: [len(known[name]), len(questions)] for name, questions in sources.items()}
    return {"rome": {**numbers.trace_numbers(runs / "rome"), "known": asked, "version": __version__}}


def _answers(
    vlm: VisionLanguageModel, analysis: Analysis, questions: Sequence[Question], folder: Path
) -> dict[str, str]:
    """Return the answer to each question by its id."""
    run_analysis(vlm, analysis, enumerate(questions, 1), folder)
    rows = read_rows(folder)
    return dict(zip(rows["id"], rows["answer"], strict=True))


def ask_about_flags(vlm: VisionLanguageModel, world: FlagWorld, options: RealModel) -> PictureStudy:
    """Return the study of what the model answers about flags, which it is asked by picture and by name."""
    pictures, runs = options.out / "pictures", options.out / "runs"
    questions = facts.pictured_questions(world, pictures, options.asked)
    answers = _answers(vlm, Answers(), questions, runs / "answers by picture")
    asked = facts.with_answers(questions, answers, world)
    by_name = [facts.named_question(world, question) for question in asked]
    named = facts.with_answers(by_name, _answers(vlm, Answers(), by_name, runs / "answers by name"), world)
    known = facts.with_other_pictures(vlm, [each for each in asked if each.extra["right"]], world, pictures)
    limits = {CHOOSING: options.choosing, REPORTING: options.reporting}
    return PictureStudy(vlm=vlm, runs=runs, asked=asked, named=named, known=known, limits=limits)


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureStudy:
    """The parts of the study of a vision-language model that answers questions about pictures.

    The `extra` of each question has the model's "answer", whether it is "right", "country", "relation" and "half".
    """

    vlm: VisionLanguageModel
    runs: Path
    """The folder of all runs."""
    asked: Sequence[Question]
    """Questions about pictures."""
    named: Sequence[Question]
    """The same questions by name."""
    known: Sequence[Question]
    """The questions about pictures with a right answer, each with another picture to swap for (`swap:PATH`)."""
    limits: Mapping[str, int]
    """The largest number of known facts of each half."""

    def about(self) -> dict[str, Any]:
        """Return the model, the version and the shares of right answers."""
        names = {question.id: question.extra for question in self.named}
        rows = [
            {
                "relation": question.extra["relation"],
                "picture": question.extra["right"],
                "name": names[question.id]["right"],
                "agrees": question.extra["answer"] == names[question.id]["answer"],
            }
            for question in self.asked
            if question.id in names
        ]
        weights = self.vlm.weights_digest()[:12]
        model = {"layers": self.vlm.layers, "weights": weights, "version": __version__}
        return {"model": model, "answers": numbers.answer_numbers(rows)}

    def measure(self, part: str) -> dict[str, Any]:
        """Return the numbers of a part, whose runs on both halves go on where they were stopped.

        Raises `CommandError` if the model knows nothing in one half.
        """
        source = {"noise by name": self.named, "failure": self.asked}.get(part, self.known)
        right = None if part == "failure" else True  # errors are needed where failure is predicted
        folders = {}
        for half, limit in self.limits.items():
            records = facts.of_half(source, half, limit if right else sum(self.limits.values()), right=right)
            if not records:
                raise CommandError(
                    f"the model knows none of the {len(source)} facts that it was asked about in the {half} half; ask "
                    "more of them (--asked), or study another model"
                )
            folders[half] = self.runs / part / half
            run_analysis(self.vlm, self._analysis(part), enumerate(records, 1), folders[half])
        return self._numbers(part, folders)

    def _analysis(self, part: str) -> Analysis:
        cut = max(1, round(self.vlm.layers * CUT / CUT_LAYERS))
        return {
            "swap": SwapTrace(window=WINDOW),
            "picture": SwapTrace(window=WINDOW, groups=("image",), tokens=False, sites=("hidden",)),
            "noise": SubjectTrace(window=WINDOW),
            "noise by name": SubjectTrace(window=WINDOW),
            "flows": Flows(windows=tuple(dict.fromkeys((1, cut)))),
            "emergence": Emergence(),
            "tokens": ImageTokens(),
            "cliff": Cliff(),
            "failure": Failure(),
        }[part]

    def _numbers(self, part: str, folders: numbers.Halves) -> dict[str, Any]:
        if part in ("swap", "picture", "noise", "noise by name"):
            return numbers.trace_numbers(folders[REPORTING], folders[CHOOSING])
        if part == "flows":
            return numbers.flow_numbers(folders)
        if part == "emergence":
            return numbers.emergence_numbers(folders[REPORTING])
        if part == "tokens":
            return numbers.token_numbers(
                folders, {each.id: (each.extra["country"], each.extra["relation"]) for each in self.asked}
            )
        if part == "cliff":
            return numbers.cliff_numbers(folders)
        return numbers.failure_numbers(folders, {each.id: each.extra["relation"] for each in self.asked})


if __name__ == "__main__":
    sys.exit(execute(app, sys.argv[1:]))
