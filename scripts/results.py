"""multrace results: every editor and baseline on the embedded model's own facts, and whether locating helps.

Settings were chosen on the "choose" halves of the world's edit splits; everything here is measured on the "report"
halves. Each measured row is kept in OUT, so a run that was interrupted goes on where it was.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data import World, tiny_vlm_path
from ..editing.errors import EditError
from ..editing.report_files import write_whole
from ..models import VisionLanguageModel, load
from .errors import CommandError
from .options import add_options, option, read
from .outputs import check_files
from .results_editors import SPLITS, EditorRow, editor_rows, measure_editor, measure_sequence
from .results_locating import measure_grid, sites_of
from .results_tables import document
from .results_world import Bench, make_bench

HELP = "measure every editor and baseline on the embedded model (the tables of docs/results.md)"
EXAMPLE = """examples:
  multrace results --out out/results                        everything, some hours on one core
  multrace results --out out/results --number 10            a quick look
  multrace results --out out/results --parts editors --splits outdated

writes OUT/rows/*.json (one per measured row, reused on the next run) and OUT/results.md
"""
PARTS = ("editors", "batch", "sequence", "locating")


@dataclass(frozen=True, kw_only=True)
class Results:
    """Options of `multrace results`."""

    out: Path = option("folder for the rows and the tables", type=Path)
    number: int = option("requests of each split (default 100)", default=100, type=int)
    together: int = option(
        "edits of a sequence and of the largest batch (default 160, all of one half of the outdated split)",
        default=160,
        type=int,
    )
    probes: int = option("probes of each kind per request (default 4)", default=4, type=int)
    parts: tuple[str, ...] = option(
        f"which parts to measure: {', '.join(PARTS)} (default: all)", default=PARTS, nargs="+", metavar="PART"
    )
    splits: tuple[str, ...] = option(
        f"which splits: {', '.join(SPLITS)} (default: both)", default=SPLITS, nargs="+", metavar="SPLIT"
    )

    def check(self) -> None:
        """CommandError for unknown parts or splits, or numbers below 1."""
        unknown = [name for name in (*self.parts, *self.splits) if name not in (*PARTS, *SPLITS)]
        if unknown or self.number < 1 or self.probes < 1 or self.together < 1:
            raise CommandError(
                f"cannot measure {', '.join(unknown) or 'so few'}; parts are {', '.join(PARTS)}, splits "
                f"{', '.join(SPLITS)}, --number, --together and --probes at least 1"
            )
        check_files(self.out, ("results.md",))

    def most(self, split: str) -> int:
        """The most requests of a split that any row takes: more than `number` only where its half has them."""
        if not {"batch", "sequence"} & {*self.parts}:
            return self.number
        return max(self.number, min(self.together, len(World().edit_cases(split, "report"))))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Results`."""
    add_options(parser, Results)


def run(options: argparse.Namespace) -> int:
    """EvaluationSettings what is not measured yet, and writes the tables of all that is."""
    settings = read(Results, options)
    settings.check()
    vlm = load(tiny_vlm_path())
    for split in settings.splits:
        bench: Bench | None = None
        todo = [(name, make) for name, make in _work(settings, split) if not _file(settings, split, name).is_file()]
        for name, measure in tqdm(todo, desc=f"{split}: rows", unit="row"):
            bench = bench or make_bench(vlm, split, "report", settings.most(split), settings.probes)
            try:
                found = measure(vlm, bench)
            except EditError as error:  # one row that cannot be made, such as a batch that contradicts itself
                tqdm.write(f"{split} {name}: left out, {error}")
                continue
            write_whole(_file(settings, split, name), json.dumps(found, indent=1).encode())
    rows = {split: _measured(settings, split) for split in SPLITS}
    text = document(rows, number=settings.number, probes=settings.probes)
    target = write_whole(settings.out / "results.md", text.encode())
    print(f"written: {target}")
    return 0


Measure = Callable[[VisionLanguageModel, Bench], Mapping[str, Any]]


def _work(settings: Results, split: str) -> Iterator[tuple[str, Measure]]:
    """Name and measurement of every row that is asked for."""
    few, parts = settings.number, settings.parts
    if "editors" in parts or "batch" in parts:
        yield "sites", lambda vlm, bench: sites_of(vlm, bench.first(few))
    for row in editor_rows():
        if "editors" in parts:
            yield f"single {row.name}", _editor(row, few, together=False)
        if "batch" in parts and row.batches:
            yield f"batch {row.name}", _editor(row, few, together=True)
        if "batch" in parts and row.sequences and settings.most(split) > few:
            yield f"whole {row.name}", _editor(row, settings.most(split), together=True)
        if "sequence" in parts and row.sequences:
            yield f"sequence {row.name}", lambda vlm, bench, row=row: measure_sequence(vlm, bench, row)
    if "locating" in parts and split == "outdated":
        for token in ("last", "constraint_last"):
            for layer in range(8):
                yield (
                    f"grid {layer} {token}",
                    lambda vlm, bench, at=(layer, token): measure_grid(vlm, bench.first(few), *at),
                )


def _editor(row: EditorRow, number: int, *, together: bool) -> Measure:
    return lambda vlm, bench: measure_editor(vlm, bench.first(number), row, together=together)


def _file(settings: Results, split: str, name: str) -> Path:
    return settings.out / "rows" / f"{split} {name}.json"


def _measured(settings: Results, split: str) -> dict[str, Any]:
    """Every row of a split that is measured, by name."""
    files = sorted((settings.out / "rows").glob(f"{split} *.json"))
    return {file.stem.removeprefix(f"{split} "): json.loads(file.read_text(encoding="utf-8")) for file in files}
