"""Causal traces of the study of a real model: which clean states bring an answer back, in the rows of ROME's figure.

Meng et al., arXiv 2202.05262, section 2, corrupt the tokens of the subject with noise, put one clean state back at a
time, and average over known facts. The same is done with the words that point at the country in a picture, and with
the picture itself, which another country's flag replaces.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...artefacts import Result
from ...data import Question
from ...models import Prompt, VisionLanguageModel
from ...tracing import CausalTrace, Corruption, Engine, TextNoise, TraceError, causal_trace, parse_corruption
from ...tracing.corruptions.kinds import corruption_pictures
from ...tracing.engine.cells import KINDS
from ...workflow import Analysis, Outcome, RunningAverage, Summary, Task, question_of_record

ROME_WINDOW, ROME_LAYERS = 10, 48
"""The windows of ROME's figure, and the layers of its model, GPT-2 XL."""


class SavedAverage(RunningAverage):
    """An average without a figure and a table of its own, since the page of the study has them."""

    def __init__(self, name: str, kind: type[Result]) -> None:
        super().__init__(name, kind, stem="average")

    def _files(self, value: Any) -> dict[str, Callable[[Path], Any]]:
        return {"average.safetensors": value.save}


def scaled_window(layers: int) -> int:
    """Return the number of layers that is the same share of a decoder as ROME's window."""
    return max(1, round(layers * ROME_WINDOW / ROME_LAYERS))


def seed_of(question: Question) -> int:
    """Return a random seed that is the question's own."""
    return int(question.key[:8], 16)


def token_places(prompt: Prompt) -> tuple[int, ...]:
    """Return one position for each of ROME's rows: the subject's first, middle and last token, and those after it.

    After the subject there are the first token, one in the middle of the further ones, and the last. The subject is the
    prompt's constraint.
    """
    subject, last = prompt.groups["constraint"], prompt.groups["last"][0]
    first, end = subject[0], subject[-1]
    middle, further = range(first + 1, end), range(end + 2, last)
    chosen = [first, *_middle(middle), end, min(end + 1, last), *_middle(further), last]
    return tuple(dict.fromkeys(chosen))


def _middle(places: range) -> Iterator[int]:
    """Yield the position in the middle of some, if there are any."""
    if places:
        yield places[len(places) // 2]


@dataclass(frozen=True, kw_only=True)
class SubjectTrace(Analysis):
    """A causal trace of each fact under noise on the tokens that name its subject.

    Groups of several tokens are represented by the one in their middle, and each fact has noise of its own. The mean
    over facts is the same in expectation as with every token and ten samples, as ROME takes them, and costs a tenth;
    the intervals contain the noise.
    """

    name: ClassVar[str] = "subject trace"

    window: int
    """Number of MLP or attention layers that are restored together."""
    scale: float = 3.0
    """Noise in standard deviations of the embeddings of a corpus of subjects."""
    samples: int = 1
    """Number of noise samples of each fact."""
    checks: int = 0
    """Number of cells of each trace that the engine computes again as a check."""

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the trace of one fact."""
        question = question_of_record(task.record)
        noise = TextNoise(scale=self.scale, samples=self.samples, seed=seed_of(question))
        return _traced(vlm, question, noise, window=self.window, checks=self.checks)

    def summary(self) -> Summary:
        """Return the average of all traces."""
        return SavedAverage("trace", CausalTrace)


@dataclass(frozen=True, kw_only=True)
class SwapTrace(Analysis):
    """A causal trace of each fact under the picture that the question names as its corruption (`swap:PATH`)."""

    name: ClassVar[str] = "swap trace"

    window: int
    """Number of MLP or attention layers that are restored together."""
    groups: tuple[str, ...] = ("constraint",)
    """Token groups that are restored as a whole."""
    tokens: bool = True
    """Whether there are ROME's rows of single tokens, too."""
    sites: tuple[str, ...] = KINDS
    """Kinds of sites."""
    checks: int = 0
    """Number of cells of each trace that the engine computes again as a check."""

    def check(self, record: Any) -> None:
        """Raise `TraceError` for a question without another picture."""
        if not (question_of_record(record).corrupt or "").startswith("swap:"):
            raise TraceError("the question names no other picture; write 'corrupt': 'swap:PATH' into it")

    def sources(self, record: Any) -> Sequence[Any]:
        """Return the other picture, which counts by its content."""
        return [Path(path) for path in corruption_pictures(_swap(question_of_record(record)))]

    def compute(self, vlm: VisionLanguageModel, task: Task) -> Outcome:
        """Return the trace of one fact."""
        question = question_of_record(task.record)
        places = {"groups": self.groups, "tokens": self.tokens, "sites": self.sites}
        return _traced(vlm, question, _swap(question), window=self.window, checks=self.checks, **places)

    def summary(self) -> Summary:
        """Return the average of all traces."""
        return SavedAverage("trace", CausalTrace)


def _swap(question: Question) -> Corruption:
    return parse_corruption(question.corrupt or "")


def _traced(
    vlm: VisionLanguageModel,
    question: Question,
    corruption: Corruption,
    *,
    window: int,
    checks: int,
    groups: Sequence[str] = (),
    tokens: bool = True,
    sites: Sequence[str] = KINDS,
) -> Outcome:
    """Return the trace of one question in these groups and ROME's rows, scored by the model's own first token."""
    prompt = vlm.prompt_for(question)
    trace = causal_trace(
        vlm,
        prompt,
        corruption=corruption,
        sites=sites,
        window=window,
        positions=(*groups, *(token_places(prompt) if tokens else ())),
        even_if_weak=True,
        engine=Engine(checks=checks),
        progress=False,
    )
    row = {"question": question.text, "answer": trace.answer, "clean": trace.clean}
    return Outcome(row={**row, "corrupted": float(trace.corrupted.mean())}, results={"trace": trace})
