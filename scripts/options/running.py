"""The options of commands that take many records, and how their runs are shown."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from ... import data, workflow
from ..errors import CommandError
from .asking import FileOptions, ModelOptions

if TYPE_CHECKING:
    from ...workflow.analysis import Rows

RUN = Group("Many records", sort_key=1)
"""The heading of these options in the help."""
NOT_ALL = 1
"""Exit code if a record failed, was unreadable, or has another outcome than was asked for."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions, FileOptions):
    """Which records a run is over, and which of them this process computes."""

    data: Annotated[
        Path | None,
        Parameter(
            help="do this for every record of a file: our own JSON lines, or a public data set, told by its content",
            group=RUN,
            metavar="FILE",
        ),
    ] = None
    limit: Annotated[int | None, Parameter(help="take only the first N records", group=RUN, metavar="N")] = None
    shard: Annotated[
        str | None,
        Parameter(
            help="compute the i-th of n parts of the records, such as 1/8, in a job array; the parts may share --out, "
            "or have folders of their own, which multrace merge joins",
            group=RUN,
            metavar="I/N",
        ),
    ] = None
    retry_failed: Annotated[bool, Parameter(help="try the records again that failed in an earlier call", group=RUN)] = (
        False
    )

    def check_run(self) -> None:
        """Raises `CommandError` or `RunError` for options of a run that do not fit together."""
        if self.limit is not None and self.limit < 1:
            raise CommandError(f"--limit {self.limit}: take at least one record")
        if self.shard is not None:
            workflow.Shard.parse(self.shard)

    def records(self) -> "Rows":
        """Return the first records of --data. Raises `DataError` if the file cannot be read."""
        assert self.data is not None, "a check before says that there is a file"
        return islice(data.read_data(self.data, format=self.format, images=self.images), self.limit)

    def run(self, analysis: "workflow.Analysis", records: "Rows", out: Path) -> int:
        """Analyse the records and print what was done; the exit code."""
        options = {"shard": self.shard, "retry_failed": self.retry_failed}
        report = workflow.run(self.model_to_load(), analysis, records, out, **options)
        print(*report.summary(), sep="\n")
        print(f"in {out}: {', '.join(('records/', *(f'summary/{name}' for name in report.files)))}")
        return 0 if report.is_clean else NOT_ALL

    def given(self, names: Iterable[str]) -> list[str]:
        """Return those of the options that have another value than their default, as they are spelt."""
        defaults: dict[str, Any] = {row.name: row.default for row in fields(self)}
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != defaults[name]]
