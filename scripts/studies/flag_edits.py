"""Compare settings of the edits with which `multrace demo --world flags` fixes the errors of the flags model.

The errors of the half "choosing" are traced once. They are edited at the site of the average trace, one at a time, with
each of the settings, which differ from those of the demo in one number each. The best is the one with the highest mean
of its columns; it is then measured on the half "reporting", beside the settings of the demo. An edit keeps facts of
one half of what the model knows, and the probes ask for those of the other one. The model has to be the one that
multrace build-flags makes, because the errors are those of its splits.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated

from cyclopts import App, Parameter
from tqdm import tqdm

from ... import workflow
from ...data import FlagWorld
from ...data.worlds.flags import HALVES
from ...models import VisionLanguageModel
from ...tracing import EditSite
from ..demos import (
    FlagEdits,
    VerifiedQuestion,
    WrongFacts,
    answered_again,
    facts_to_fix,
    summary,
    verified,
)
from ..main import execute
from ..options import STYLE, CommandError, ModelOptions, paragraphs

EXAMPLE = """examples:
  python -m multrace.scripts.studies.flag_edits --model ~/.cache/multrace/flags-vlm
  python -m multrace.scripts.studies.flag_edits --model ~/.cache/multrace/flags-vlm --limit 5      a trial
"""
app = App(
    name="python -m multrace.scripts.studies.flag_edits", help=paragraphs(__doc__), help_epilogue=EXAMPLE, **STYLE
)
CHOOSING, REPORTING = HALVES
DEMO = "the demo's"
"""The name of the settings of the demo."""
TRIED: Mapping[str, FlagEdits] = {
    DEMO: FlagEdits(),
    "kept 0": FlagEdits(kept=0),
    "kept 4": FlagEdits(kept=4),
    "kept 24": FlagEdits(kept=24),
    "contexts 0": FlagEdits(contexts=0),
    "contexts 5": FlagEdits(contexts=5),
    "ridge 0.01": FlagEdits(ridge_fraction=0.01),
    "ridge 0.0001": FlagEdits(ridge_fraction=0.0001),
}
"""Settings by name."""


@dataclass(frozen=True, kw_only=True)
class FlagEditsOptions(ModelOptions):
    """Options of the program."""

    limit: Annotated[int, Parameter(help="number of errors of each half", metavar="N")] = 20
    seed: Annotated[int, Parameter(help="random seed of the choice of the errors", metavar="N")] = 0

    def check(self) -> None:
        """Raise `CommandError` without a model, and for less than one error."""
        if self.model is None:
            raise CommandError("there is no --model; pass the folder that multrace build-flags makes")
        if self.limit < 1:
            raise CommandError(f"--limit is {self.limit}; pass at least 1")


@app.default
def run(options: FlagEditsOptions = FlagEditsOptions()) -> int:
    """Edit with all settings and print two tables."""
    options.check()
    world, vlm = FlagWorld(), options.open_model()
    errors = [Errors(vlm, world, half=half, limit=options.limit, seed=options.seed) for half in (CHOOSING, REPORTING)]
    chosen_on = {name: errors[0].shares(edits) for name, edits in tqdm(TRIED.items(), desc="settings")}
    best = best_of(chosen_on)
    reported = {name: errors[1].shares(TRIED[name]) for name in dict.fromkeys((DEMO, best))}
    print(table(CHOOSING, chosen_on), f"best: {best}", "", table(REPORTING, reported), sep="\n")
    return 0


class Errors:
    """The errors of one half, traced once, and the answers of the unedited model to the probes."""

    def __init__(self, vlm: VisionLanguageModel, world: FlagWorld, *, half: str, limit: int, seed: int) -> None:
        self.vlm, self.world, self.half, self.limit, self.seed = vlm, world, half, limit, seed
        self.asked: list[tuple[VerifiedQuestion, ...]] = []
        facts = self.facts(FlagEdits())
        self.site: EditSite = workflow.locate(vlm, facts.records, corruptions=facts.corruptions).edit_site

    def facts(self, edits: FlagEdits) -> WrongFacts:
        """Return the errors, to be edited with these settings."""
        edits = replace(edits, half=self.half)
        return facts_to_fix(self.vlm, self.world, self.world.splits, limit=self.limit, seed=self.seed, edits=edits)

    def shares(self, edits: FlagEdits) -> Mapping[str, float]:
        """Return the shares of right answers with edits of these settings, as `summary` does."""
        facts = self.facts(edits)
        editor = facts.editor(layer=self.site.layer, token=self.site.token)
        probes: list[VerifiedQuestion] = []
        is_first = not self.asked
        for number, record in enumerate(tqdm(facts.records, desc=f"errors of {self.half!r}", leave=False)):
            delta = editor.edit(self.vlm, [record])
            if is_first:
                self.asked.append(verified(self.vlm, delta, record, facts.marking))
                probes += self.asked[-1]
            else:
                with delta.applied(self.vlm):
                    probes += answered_again(self.vlm, self.asked[number])
        return summary(probes)


def best_of(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Return the name of the settings with the highest mean of the columns; the first of equals."""
    return max(shares, key=lambda name: mean_of(shares[name]))


def mean_of(shares: Mapping[str, float]) -> float:
    """Return the mean of the columns that have questions, which are the same for all settings."""
    return fmean(share for share in shares.values() if not math.isnan(share))


def table(half: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of shares by settings."""
    width = 16
    columns = [*next(iter(rows.values())), "mean"]
    lines = [f"{half:{width}s}" + "".join(f"{column:>{width}s}" for column in columns)]
    for name, shares in rows.items():
        values = [*shares.values(), mean_of(shares)]
        lines.append(f"{name:{width}s}" + "".join(f"{value:>{width}.1%}" for value in values))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(execute(app, sys.argv[1:]))
