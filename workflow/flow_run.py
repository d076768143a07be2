"""Information flow of many questions: what `multrace flow` computes of each record, its table and its averages."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data import EditRecord, Question, find_span
from ..data.errors import gist
from ..models import ModelError, Prompt, VisionLanguageModel, open_images
from ..tracing import Engine, TraceError, same_answer
from .analysis import INPUT_ERRORS, Analysis, Outcome, Summary, Task, question_of_record
from .flow_attention import (
    CamReading,
    ConstraintReading,
    FailureReading,
    LastTokenReading,
    PruningReading,
    SaliencyReading,
    ShareReading,
)
from .flow_readings import AskedQuestion, FlowReading, KnockoutReading, LensReading
from .run_folder import RunError, StoredRecord

READINGS = ("knockout", "lens", "contributions", "relevance")
"""The analyses of information flow."""
_CHECKED = 3
"""Number of records, from the first one of the run, in which the engine checks itself."""
_AT_ONCE = 16
"""Number of questions that are answered together while noise is calibrated."""
_STEPS = 7
_STRONGEST = 256.0
"""Grey levels of noise at which nothing of a picture is visible."""
_ENOUGH = 0.02
"""How close the share of errors has to be to the requested one."""


@dataclass(frozen=True, kw_only=True)
class FlowAnswer:
    """The answer to one question, and the experiments that it calls for."""

    generated: str
    """The model's own answer."""
    is_right: bool | None
    """Whether it is right; None if the right answer is not known."""
    left_out: bool
    """Whether readings were left out because the answer is wrong."""
    experiments: Mapping[FlowReading, Callable[[], Any]]
    """Each reading that fits the question, with the call that computes its result."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Name of each reading that does not fit the question, with the reason."""

    def verdict(self, question: Question) -> str:
        """Return the answer, and whether it is right, as text."""
        words = {None: "", True: ", right", False: f", wrong: the right answer is {question.answer!r}"}
        return f"{self.generated!r}{words[self.is_right]}"


@dataclass(frozen=True, kw_only=True)
class FlowRun(Analysis):
    """Readings of information flow for each record, with these settings.

    A question that the model answers wrongly counts for contributions only, unless `keep_wrong` is set. Raises
    `TraceError` for settings that no model could follow.

    Example:
        >>> from multrace.workflow import FlowRun
        >>> [reading.name for reading in FlowRun(analyses=("lens", "relevance")).readings()]
        ['lens', 'cam', 'share', 'saliency', 'pruning']
    """

    name: ClassVar[str] = "flow"

    analyses: tuple[str, ...] = ("knockout",)
    """Some of READINGS."""
    flows: tuple[str, ...] | None = None
    """Knockout: the flows to cut; None for those of arXiv 2411.18620 that fit the question."""
    windows: tuple[int, ...] | None = None
    """Knockout: numbers of layers that are cut together; None for 1 and the same share of all layers as 9 of 40."""
    heads: str | tuple[int, ...] | None = None
    """Knockout: heads to cut, "each" on its own, or None for all together."""
    whole_answer: bool = False
    """Knockout: score all tokens of the answer besides its first."""
    positions: tuple[int | str, ...] = ("last",)
    """Lens: the token groups or positions to read."""
    smooth: int = 0
    """LLaVA-CAM: number of noisy copies that it is averaged over."""
    keep: tuple[int | str, ...] = (0,)
    """Pruning: numbers of image tokens that stay, or "all"."""
    degrade: bool = False
    """Add noise to all pictures until a third of the answers is wrong, so that there is failure to predict."""
    keep_wrong: bool = False
    """Count the questions that the model answers wrongly, too."""
    seed: int = 0
    """Random seed of noise and folds."""
    by_head: bool = False
    """Contributions: keep the weights of each head."""
    engine: str = "auto"
    checks: int = 2
    """Number of cells that the engine computes again as a check, in the first three records."""
    memory: int = 2048
    """MiB that the replay engine may use; it changes no result and is no part of the settings of a run."""
    draw: bool = False
    """Draw the results of each record, too."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.analyses if name not in READINGS]:
            raise TraceError(f"no analysis {unknown[0]!r}; there are {', '.join(READINGS)}")
        for reading in self.readings():
            reading.check_settings()

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, without those that change no result."""
        return {name: value for name, value in asdict(self).items() if name != "memory"}

    def readings(self, *, of_one: bool = False) -> tuple[FlowReading, ...]:
        """Return what is computed for each question; failure is no reading of a single one."""
        knockout = KnockoutReading(
            flows=self.flows, windows=self.windows, heads=self.heads, whole_answer=self.whole_answer
        )
        failure = () if of_one else (FailureReading(seed=self.seed),)
        contributions = (LastTokenReading(by_head=self.by_head), ConstraintReading(by_head=self.by_head), *failure)
        cam = CamReading(samples=self.smooth, seed=self.seed)
        known: dict[str, tuple[FlowReading, ...]] = {
            "knockout": (knockout,),
            "lens": (LensReading(positions=self.positions),),
            "contributions": contributions,
            "relevance": (cam, ShareReading(), SaliencyReading(), PruningReading(keep=self.keep)),
        }
        return tuple(reading for name in READINGS if name in self.analyses for reading in known[name])

    def check(self, record: Question | EditRecord) -> None:
        """Raise an error for a picture, words or boxes that cannot be used, or if no reading fits the question."""
        question = question_of_record(record)
        pictures = open_images(question.image)
        for words in question.words.values():
            find_span(question.text, words)
        for box in question.boxes:
            _check_box(box, pictures[0] if pictures else None)
        if self.degrade and (not question.images or question.answer is None):
            raise TraceError("noise until answers are wrong needs a picture and the right answer")
        problems = [_problem(reading, question) for reading in self.readings()]
        if all(problems):
            raise TraceError(str(problems[0]))

    def calibrate(
        self,
        vlm: VisionLanguageModel,
        records: Mapping[str, Question | EditRecord],
        *,
        traces: Mapping[str, StoredRecord],
        known: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> Mapping[str, Any] | None:
        """Return how strong the noise has to be, if it is asked for. It stays as it is when records are added."""
        if not self.degrade:
            return None
        questions = [question_of_record(record) for record in records.values()]
        return noise_for_errors(vlm, questions, seed=self.seed, progress=progress)

    def answer(
        self,
        vlm: VisionLanguageModel,
        question: Question,
        prompt: Prompt,
        *,
        of_one: bool = False,
        checked: bool = True,
        progress: bool = False,
    ) -> FlowAnswer:
        """Return the model's answer to a question, and the experiments that are to be made with it.

        Args:
            vlm: The model.
            question: The question; its `answer` is the right one.
            prompt: The question as a prompt of the model.
            of_one: Return the experiments of a single question, even if the answer is wrong.
            checked: Let the engine check itself.
            progress: Show the progress bars of the readings.
        """
        generated = vlm.answers([prompt])[0]
        right = tuple(answer for answer in (question.answer, *question.answers) if answer is not None)
        is_right = any(same_answer(generated, answer) for answer in right) if right else None
        leaves_out = is_right is False and not (self.keep_wrong or of_one)
        engine = Engine(name=self.engine, memory=self.memory, checks=self.checks if checked else 0)
        asked = AskedQuestion(
            vlm=vlm, question=question, prompt=prompt, generated=generated, engine=engine, progress=progress
        )
        experiments: dict[FlowReading, Callable[[], Any]] = {}
        skipped, left_out = {}, False
        for reading in self.readings(of_one=of_one):
            if (problem := _problem(reading, question)) is not None:
                skipped[reading.name] = problem
            elif leaves_out and not reading.counts_wrong:
                left_out = True
            else:
                experiments[reading] = reading.experiment(asked)
        return FlowAnswer(
            generated=generated, is_right=is_right, left_out=left_out, experiments=experiments, skipped=skipped
        )

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the readings of a record, with the model's own answer and the main numbers in the row."""
        question = question_of_record(task.record)
        if task.calibration is not None:
            question = with_noise(question, task.calibration["strength"], self.seed)
        prompt = vlm.prompt_for(question)
        answer = self.answer(vlm, question, prompt, checked=task.number < _CHECKED)
        row = {
            "question": question.text,
            "answer": question.answer,
            "generated": answer.generated,
            "right": answer.is_right,
            "left_out": answer.left_out,
        }
        results: dict[str, Any] = {}
        skipped, drawings = dict(answer.skipped), {}
        for reading, experiment in answer.experiments.items():
            try:
                result = results[reading.name] = reading.reduced(experiment())
            except INPUT_ERRORS as error:
                skipped[reading.name] = gist(error)
                continue
            row |= reading.row(result)
            if self.draw or reading.always_drawn:
                drawings |= reading.files(result, prompt)
        if not results and not answer.left_out:
            raise TraceError("; ".join(f"no {name}: {reason}" for name, reason in skipped.items()))
        return Outcome(row=row, results=results, skipped=skipped, files=drawings)

    def summary(self) -> Summary:
        """Return the averages of the readings, and how many answers are right."""
        return FlowSummary(self)


class FlowSummary(Summary):
    """The averages of all readings that have one."""

    def __init__(self, run: FlowRun) -> None:
        self._averages = [average for reading in run.readings() if (average := reading.average()) is not None]
        self._is_right: list[bool | None] = []
        self._left_out: list[str] = []

    def add(self, record: StoredRecord) -> None:
        """Add the readings of a question."""
        row = record.row
        self._is_right.append(row["right"])
        if row["left_out"]:
            self._left_out.append(
                f"  {row['question']!r}: {row['generated']!r}, wrong: the right answer is {row['answer']!r}"
            )
        for average in self._averages:
            average.add(record)

    def files(self) -> Mapping[str, Callable[[Path], Any]]:
        """Return the files of all averages."""
        return {name: write for average in self._averages for name, write in average.files().items()}

    def lines(self) -> list[str]:
        """Return the averages in words, how many answers are right, and the questions that were left out."""
        lines = [line for average in self._averages for line in average.lines()]
        known = [value for value in self._is_right if value is not None]
        counts = [f"{len(self._is_right)} questions"]
        counts += [f"{sum(known)} of {len(known)} answered rightly"] if known else []
        unknown = len(self._is_right) - len(known)
        counts += [f"{unknown} without a known right answer"] if unknown else []
        counts += [f"{len(self._left_out)} left out for a wrong answer"] if self._left_out else []
        return [*lines, ", ".join(counts), *self._left_out]


def noise_for_errors(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    *,
    share: float = 1 / 3,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Return how strong the noise on all pictures has to be for this share of the answers to be wrong.

    The noise is Gaussian on every pixel (`with_noise`); its deviation is found by bisection.

    Args:
        vlm: The model.
        questions: Questions with a picture and a right answer.
        share: The share of wrong answers to reach (default 1/3).
        seed: Random seed of the noise.
        progress: Show progress bars.

    Returns:
        `strength` in grey levels, the share of `errors` that it gives, and that without noise (`undamaged`).

    Raises:
        RunError: Too many answers are wrong without any noise, or there are no questions.
    """
    if not questions:
        raise RunError("no question has a picture and a right answer, so there is nothing to make harder")
    undamaged = _errors(vlm, questions, progress)
    if undamaged > share:
        raise RunError(f"the model errs on {undamaged:.0%} of these questions as they are; leave out the noise")
    low, high = 0.0, _STRONGEST
    strength, errors = 0.0, undamaged
    for _ in range(_STEPS):
        strength = (low + high) / 2
        errors = _errors(vlm, [with_noise(question, strength, seed) for question in questions], progress)
        if abs(errors - share) <= _ENOUGH:
            break
        low, high = (strength, high) if errors < share else (low, strength)
    return {"strength": strength, "errors": errors, "undamaged": undamaged}


def with_noise(question: Question, strength: float, seed: int = 0) -> Question:
    """Return the question with noise of this deviation, in grey levels, on its picture.

    The deviation is multiplied by a factor between a half and one and a half that is the question's own, so that some
    pictures suffer more than others. The noise of a question is the same at every strength, only scaled.
    """
    (image,) = open_images(question.image)
    own = random.Random(f"noise {seed} {question.id or question.text}")
    noise = np.random.default_rng(own.randrange(2**32)).standard_normal((*image.size[::-1], 3), dtype=np.float32)
    pixels = np.asarray(image, np.float32) + strength * own.uniform(0.5, 1.5) * noise
    noisy = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return replace(question, image=noisy)


def _problem(reading: FlowReading, question: Question) -> str | None:
    """Why a reading does not fit a question, or None."""
    try:
        reading.check(question)
    except TraceError as error:
        return gist(error)
    return None


def _check_box(box: Sequence[int], picture: Image.Image | None) -> None:
    """Raise `ModelError` for a box that is empty or leaves its picture."""
    if picture is None:
        raise ModelError(f"the box {tuple(box)} is of no picture; give the question an image")
    (left, top, right, bottom), (width, height) = box, picture.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ModelError(
            f"the box {tuple(box)} is empty or leaves the picture of {width} x {height} pixels; write "
            f"0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        )


def _errors(vlm: VisionLanguageModel, questions: Sequence[Question], progress: bool) -> float:
    """The share of wrong answers; the prompts of a few questions are in memory at a time."""
    wrong = 0
    with tqdm(total=len(questions), desc="answering", unit="question", leave=False, disable=not progress) as bar:
        for start in range(0, len(questions), _AT_ONCE):
            chunk = questions[start : start + _AT_ONCE]
            prompts = [vlm.prompt_for(question) for question in chunk]
            answers = vlm.answers(prompts, batch_size=_AT_ONCE)
            wrong += sum(not same_answer(text, str(each.answer)) for text, each in zip(answers, chunk, strict=True))
            bar.update(len(chunk))
    return wrong / len(questions)
