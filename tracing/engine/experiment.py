"""One prompt, clean and corrupted, and what is scored there: the input that all cells of a trace share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, VisionLanguageModel
from ..corruptions.corruption import Corrupted
from .cells import Cell, Runs
from .measure import branch_file, measure_cells
from .report import EngineReport
from .scoring import Scoring
from .settings import Engine
from .vision import is_before_decoder, measure_runs, shown, with_pictures


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What an experiment's cells score."""

    scores: Tensor
    """(cell, metric, sample) float64 on the CPU."""
    clean: Tensor
    """(metric, sample)"""
    corrupted: Tensor
    """(metric, sample)"""
    report: EngineReport


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """Two runs of a prompt, and which of them is changed."""

    prompt: Prompt
    clean: Tensor
    """Embeddings (1, token, hidden) up to and including the prompt's last token."""
    corrupted: Corrupted
    scoring: Scoring
    restores: bool
    """Clean states go into the corrupted run; else corrupted states into the clean one."""

    def runs(self, vlm: VisionLanguageModel, ids: Sequence[int]) -> Runs:
        """The runs in which these tokens follow the prompt."""
        clean, corrupted = (vlm.extend(each, ids) for each in (self.clean, self.corrupted.embeddings))
        first = self.clean.shape[1] - 1
        return Runs(
            base=corrupted if self.restores else clean,
            source=clean if self.restores else corrupted,
            scored=tuple(range(first, first + len(ids))),
            frozen=self.prompt.groups["image"],
        )

    def measure(
        self,
        vlm: VisionLanguageModel,
        cells: Sequence[Cell],
        *,
        engine: Engine,
        accept: Callable[[float, float], None] | None = None,
        bar: tqdm | None = None,
    ) -> Found:
        """The cells' scores. accept: is shown the answer's probability, clean and corrupted, first, and may raise."""

        def look(base: Tensor, source: Tensor) -> None:
            if accept is not None:  # the last column is always the answer's probability
                clean, corrupted = (source, base) if self.restores else (base, source)
                accept(float(clean[-1].mean()), float(corrupted[-1].mean()))

        others = [cell for cell in cells if not is_before_decoder(cell)]
        inputs = shown(self.prompt, self.corrupted, restores=self.restores) if len(others) < len(cells) else None
        parts = []
        for number, (ids, measure) in enumerate(self.scoring.branches):
            settings = replace(engine, checkpoint=branch_file(engine.checkpoint, number))
            if parts and parts[0].report.engine == "plain":  # for a reason that one warning has told
                settings = replace(settings, name="plain")
            judge = look if number == 0 else _nothing
            runs = self.runs(vlm, ids)
            if others:
                part = measure_cells(vlm, runs, others, measure, engine=settings, accept=judge, bar=bar)
            else:
                part = measure_runs(vlm, runs, measure, accept=judge)
            if inputs is not None:
                part = with_pictures(vlm, inputs, runs, cells, measure, measured=part, bar=bar)
            parts.append(part)
        base, source = (self.scoring.joined([getattr(part, name) for part in parts]) for name in ("base", "source"))
        return Found(
            scores=self.scoring.joined([part.scores for part in parts]),
            clean=source if self.restores else base,
            corrupted=base if self.restores else source,
            report=_together([part.report for part in parts]),
        )


def _nothing(base: Tensor, source: Tensor) -> None:
    """Accepts any runs."""


def _together(reports: Sequence[EngineReport]) -> EngineReport:
    """One report of all branches: counts added, the worst differences."""
    first = reports[0]
    counts = {
        name: sum(getattr(each, name) or 0 for each in reports)
        for name in ("cells", "free_cells", "token_layers", "halvings", "checked_cells")
    }
    worst = {
        name: max((value for each in reports if (value := getattr(each, name)) is not None), default=None)
        for name in ("largest_difference", "plain_noise")
    }
    return replace(first, **counts, **worst)
