"""Run `multrace results`."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..artefacts.files import write_whole
from ..data import tiny_vlm_path
from ..editing.errors import EditError
from ..models import VisionLanguageModel, load
from .options.choices import SPLITS
from .options.results import Results
from .results_editors import EditorRow, editor_rows, measure_editor, measure_sequence
from .results_locating import measure_grid, sites_of
from .results_tables import document
from .results_world import Bench, make_bench


def run(settings: Results) -> int:
    """Measure the rows that are missing, and write the tables of all rows."""
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
    text = document(rows, number=settings.limit, probes=settings.probes)
    target = write_whole(settings.out / "results.md", text.encode())
    print(f"written: {target}")
    return 0


Measure = Callable[[VisionLanguageModel, Bench], Mapping[str, Any]]


def _work(settings: Results, split: str) -> Iterator[tuple[str, Measure]]:
    """Yield name and measurement of every chosen row."""
    few, parts = settings.limit, settings.parts
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
    """Every measured row of a split, by name."""
    files = sorted((settings.out / "rows").glob(f"{split} *.json"))
    return {file.stem.removeprefix(f"{split} "): json.loads(file.read_text(encoding="utf-8")) for file in files}
