"""Several runs together: the shards of one run merged, and two runs on the same records compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artefacts import replacing_folder
from .analysis import Analysis, Ending, RunReport, read_rows, records_digest, refuse_difference, run_report
from .edit_run import EditRun, EditTrace
from .evaluate_run import EvaluateBatchRun, EvaluateRun
from .evaluate_sequence import EvaluateSequenceRun
from .flow_run import FlowRun
from .run_folder import CALIBRATION, RECORDS, REMADE, REPORT, SETTINGS, TRACES, RunError, RunFolder, Shard, differences
from .trace_run import PlaceTrace, TraceRun

if TYPE_CHECKING:
    import pandas as pd

ANALYSES: tuple[type[Analysis], ...] = (
    TraceRun,
    FlowRun,
    EvaluateRun,
    EditRun,
    EditTrace,
    PlaceTrace,
    EvaluateBatchRun,
    EvaluateSequenceRun,
)
"""The analyses of multrace."""
_SHARED = ("analysis", "version", "settings", "model")
"""What the shards of one run have in common."""

_BATCH = 100
"""Bootstrap samples that are in memory together."""


def merge(
    folders: Sequence[str | Path], out: str | Path, *, analyses: Sequence[type[Analysis]] | None = None
) -> RunReport:
    """Join the shards of one run that were computed in several folders, and return the report of the whole.

    The records are linked or copied, and the averages are computed anew in the order of the records, so that the
    result equals that of a single run bit for bit. The last step of an edit, the solve, needs the model: start the
    command of the run once more with the new folder.

    Args:
        folders: The folders of the shards.
        out: A new or empty folder, or one that an interrupted merge of the same shards left.
        analyses: Classes of the analyses that the run may be of (default: those of multrace).

    Returns:
        The counts, errors, averages in words and files of the whole run.

    Raises:
        RunError: The folders differ in settings, model or records, together lack records, or hold damaged files.
    """
    if not folders:
        raise RunError("there is nothing to merge; pass the folders of the shards")
    shards = [RunFolder(folder) for folder in folders]
    heads = [_head(shard) for shard in shards]
    for shard, head in zip(shards, heads, strict=True):
        refuse_difference(head, heads[0], f"{str(shard.path)!r} is no shard of the run in {str(shards[0].path)!r}")
    names = heads[0][RECORDS]["names"]
    homes = _homes(shards, names)
    if absent := [name for name in names if name not in homes]:
        raise RunError(
            f"{len(absent)} of {len(names)} records are in none of the folders, such as {absent[0]!r}; run the missing "
            "shards first"
        )
    target, analysis = RunFolder(out), _analysis_of(heads[0], analyses)
    target.prepare()
    with target.working(Shard()):
        _check_target(target, heads[0])
        for file in (SETTINGS, RECORDS, CALIBRATION):
            if (content := shards[0].read(file)) is not None:
                target.write(file, content)
        for name in names:
            if target.stored(name) is None:
                homes[name].stored_or_refuse(name)
                with target.new_records(Shard()) as part:
                    (part / name).mkdir()
                    _copy(homes[name].records / name, part / name)
        if (shards[0].path / TRACES).is_dir():
            merge([shard.path / TRACES for shard in shards], target.path / TRACES)
        _merge_shared([shard for shard in shards if shard.shared.is_dir()], target)
        if (ending := Ending.of(target, analysis)) is not None:
            with ending.writing() as files:
                for path, write in files.items():
                    write(path)
    return run_report(target, analysis)


def compare(one: str | Path, other: str | Path, *, seed: int = 0) -> pd.DataFrame:
    """Return how the numbers of two runs differ on the records that both have.

    Each numeric column of the tables is compared by a paired bootstrap over the records (`scipy.stats.bootstrap`).

    Args:
        one: Folder of a finished run.
        other: Folder of another finished run on some of the same records.
        seed: Random seed of the bootstrap (default 0).

    Returns:
        One row for each numeric column that both tables have: the number of records with a value in both, both means,
        their `difference` (`other` minus `one`) and the ends `low` and `high` of its 95 % interval, which are NaN for
        fewer than two records. `.attrs["settings"]` lists the settings that differ.

    Raises:
        RunError: One of the runs is not finished or is damaged, or they have no record in common.
    """
    import pandas as pd

    for folder in (one, other):
        _check_undamaged(RunFolder(folder))

    tables = [read_rows(folder).drop_duplicates("content").set_index("content") for folder in (one, other)]
    common = tables[0].index.intersection(tables[1].index, sort=False)
    if not len(common):
        raise RunError(f"{str(one)!r} and {str(other)!r} have no record in common; compare runs on the same data")
    left, right = (table.loc[common] for table in tables)
    columns = [name for name in left.columns if name in right.columns and _is_number(left[name], right[name])]
    rows = [_compared(name, left[name], right[name], seed) for name in columns]
    names = ["column", "records", "one", "other", "difference", "low", "high"]
    table = pd.DataFrame(rows, columns=names)
    heads = [_head(RunFolder(folder)) for folder in (other, one)]
    table.attrs["settings"] = differences(*({name: head[name] for name in _SHARED} for head in heads))
    return table


def _compared(name: str, left: pd.Series, right: pd.Series, seed: int) -> dict[str, Any]:
    """The paired comparison of one column."""
    from scipy.stats import bootstrap

    one, other = left.astype(float).to_numpy(), right.astype(float).to_numpy()
    both = ~(np.isnan(one) | np.isnan(other))
    one, other = one[both], other[both]
    difference, (low, high) = other - one, (np.nan, np.nan)
    if len(difference) > 1:
        ends = bootstrap((difference,), np.mean, rng=np.random.default_rng(seed), method="percentile", batch=_BATCH)
        low, high = ends.confidence_interval
    means = {"one": one.mean(), "other": other.mean(), "difference": difference.mean()} if len(one) else {}
    return {"column": name, "records": len(difference), **means, "low": low, "high": high}


def _is_number(*columns: pd.Series) -> bool:
    """Whether the columns hold numbers or truth values, and gaps."""
    values = [column.dropna() for column in columns]
    return all(len(each) and each.map(lambda value: isinstance(value, bool | int | float)).all() for each in values)


def _head(folder: RunFolder) -> dict[str, Any]:
    """What identifies a run: settings, model, version, records and calibration. Raises `RunError` for no run."""
    settings, records = folder.read(SETTINGS), folder.read(RECORDS)
    if settings is None or records is None:
        raise RunError(f"{str(folder.path)!r} holds no run; pass a folder that a command with --data --out has written")
    shared = {name: settings[name] for name in _SHARED}
    return {**shared, RECORDS: records, CALIBRATION: folder.read(CALIBRATION)}


def _check_target(target: RunFolder, head: Mapping[str, Any]) -> None:
    """Raise `RunError` if the folder holds another run than the one to merge."""
    known = target.read(SETTINGS), target.read(RECORDS)
    if None in known and target.names():
        raise RunError(f"{str(target.path)!r} holds records without their settings; choose a new or empty folder")
    if None not in known:
        refuse_difference(head, _head(target), f"{str(target.path)!r} holds another run")


def _analysis_of(head: Mapping[str, Any], analyses: Sequence[type[Analysis]] | None) -> Analysis:
    """The analysis that the settings of a run describe."""
    kinds = {kind.name: kind for kind in (ANALYSES if analyses is None else analyses)}
    if head["analysis"] not in kinds:
        raise RunError(f"there is no analysis {head['analysis']!r} here; merge where the run was made")
    return kinds[head["analysis"]].from_settings(head["settings"])


def _homes(shards: Sequence[RunFolder], names: Sequence[str]) -> dict[str, RunFolder]:
    """The first shard that has each record undamaged, or else one that has it at all."""
    homes: dict[str, RunFolder] = {}
    for shard in shards:
        shard.others(names)  # refuses what is no record
        for name in shard.names():
            if name not in homes or homes[name].stored(name) is None:
                homes[name] = shard
    return homes


def _merge_shared(shards: Sequence[RunFolder], target: RunFolder) -> None:
    """Copy what is made once for all records from the first shard in which it is undamaged."""
    damaged = [shard.path / name for shard in shards for name in shard.damaged_shared()]
    whole = [shard for shard in shards if not shard.damaged_shared()]
    if damaged and not whole:
        raise RunError(f"{str(damaged[0])!r} is damaged; {REMADE.format('that file')}")
    if whole and target.shared_files() != whole[0].shared_files():
        with replacing_folder(target.shared, error=RunError) as part:
            _copy(whole[0].shared, part)


def _check_undamaged(folder: RunFolder) -> None:
    """Raise `RunError` if a finished run is not as it was written."""
    report, records = folder.report(), folder.read(RECORDS)
    if report is None or records is None:
        return  # it is not finished
    stored = [folder.stored_or_refuse(name) for name in records["names"]]
    files = folder.shared_files()
    changed = [name for name, value in report["shared"].items() if files.get(name) != value]
    if report["records"] != records_digest(records, stored):
        changed = [f"summary/{REPORT}"]
    if changed:
        raise RunError(f"{str(folder.path / changed[0])!r} is damaged or missing; start the run again, which mends it")


def _copy(source: Path, part: Path) -> None:
    """Link the files of a record into a new folder, or copy them if that is on another file system."""
    for path in sorted(source.iterdir()):
        try:
            os.link(path, part / path.name)
        except OSError:
            shutil.copy2(path, part / path.name)
