"""Options that several commands share, the error of the command line, and the checks of folders to write to.

Nothing here imports torch, so that help texts and misspelt options are answered at once: rooms are imported whole and
used by attribute (`models.load`), because their faces import nothing until a name is used.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Group, Parameter, Token

from .. import artefacts, data, models, tracing, workflow

if TYPE_CHECKING:
    from ..tracing.engine.positions import Item
    from ..workflow.analysis import Rows


class CommandError(ValueError):
    """Options that do not fit together, or an output that cannot be written; the message says what to do next."""


# The choices of options. The library has the same lists beside its code, which needs torch; a test compares them.
ENGINES = ("auto", "replay", "plain")
ENGINE_MEMORY = 2048
"""MiB that the replay engine may use by default."""
ENGINE_CHECKS = 2
"""Cells that an engine checks by default."""
KINDS = ("hidden", "mlp", "attention")
"""Kinds of sites that a trace restores by default."""
SITES = (*KINDS, "heads", "vision", "projector")
METRICS = ("probability", "log_probability", "logit_difference")
DIRECTIONS = ("restore", "corrupt")
EFFECTS = ("total", "direct")
SPELLINGS = (
    "swap:other.jpg, replace:Paris city, text-noise:3, image-noise:3, pixel-noise:3, blank, blur:10, "
    "boxes:0,0,50,50;60,0,99,50, zero:image or mean:one.jpg,two.jpg; a noise whose scale is auto, as in "
    "text-noise:auto, is calibrated"
)
"""One example of each corruption."""
QUANTIZATIONS = ("8bit", "4bit", "int8", "none")
PROJECTIONS = ("mlp", "attention")
MOMENT_KINDS = ("all", "image", "question", "template", "text")
EDITORS = ("multedit", "rome", "memit", "emmet", "alphaedit")
"""Closed-form editors."""
GRADIENT_EDITORS = ("ultraedit", "stableedit")
"""Editors by one gradient step."""
BASELINES = ("ft", "ft-l", "ft-bf", "lora", "lora-bf", "in-context")
SEQUENCE_LENGTHS = (1, 10, 20, 30, 100, 200, 300, 500, 1000)
"""Numbers of edits after which a sequence is measured by default."""
SPLITS = ("outdated", "long_tail")
"""Edits of the built-in world."""
SHAPES = ("base", "small", "qwen2.5-vl-tiny", "qwen3-vl-tiny", "llava-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")
"""Sizes of the random models that benchmarks run on."""
SOLVE_WIDTH = 11008
"""Width of the weight that the benchmark of the solve uses by default."""
DATA_FORMATS = (
    "lines",
    "vqa-constraints",
    "mmedit",
    "vlkeb",
    "mmke",
    "cckeb",
    "counterfact",
    "zsre",
    "okvqa",
    "gqa-flow",
)
"""Formats of data files that are read."""
DATA_FORMS = ("lines", "mmedit", "counterfact", "zsre")
"""Forms in which data files are written."""


MODEL, ENGINE, EDITOR, GENERAL = (
    Group(name, sort_key=position) for position, name in enumerate(("Model", "Engine", "Editor", "General"), start=1)
)
RUN = Group("Data file", sort_key=1)
"""Headings in the help, after the command's own options."""
NOT_ALL = 1
"""Exit code if a record failed, could not be read, or did not get the outcome that was requested."""


def _shown(default: Any) -> str | None:
    """Return the default as a user would type it, or None for an option that is off or left out by default."""
    if default is None or default is False or default == ():
        return None
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


STYLE: Mapping[str, Any] = {
    "group_parameters": Group("Options", sort_key=0),
    "help_format": "plaintext",
    "default_parameter": Parameter(
        consume_multiple=1, negative=(), show_default=_shown, show_env_var=False, allow_leading_hyphen=False
    ),
}
"""How options are spelt and shown: several values as in --windows 1 4, no --no-... flags, no environment variables."""


def paragraphs(text: str) -> str:
    """Return the text with one line per paragraph, so that the width of the terminal decides where lines break."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GeneralOptions:
    """Options of every command."""

    debug: Annotated[bool, Parameter(help="print the traceback of an error", group=GENERAL)] = False
    verbose: Annotated[
        bool,
        Parameter(
            help="also log notes, such as what loading has verified about the model",
            group=GENERAL,
            alias="-v",
            allow_repeating=True,
        ),
    ] = False

    def given(self, names: Iterable[str]) -> list[str]:
        """Return those of the options whose values differ from their defaults, spelt as on the command line."""
        defaults: dict[str, Any] = {row.name: row.default for row in fields(self)}
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != defaults[name]]

    def limits(self) -> AbstractContextManager[None]:
        """Return the context in which the command runs and its limits hold; most commands have no limits."""
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class PictureOptions(GeneralOptions):
    """The limit on the size of pictures."""

    megapixels: Annotated[
        float | None,
        Parameter(
            help="largest picture to read, in millions of pixels (default: 89); larger ones are refused, since they "
            "may be made to exhaust the memory",
            group=GENERAL,
            metavar="N",
        ),
    ] = None

    def limits(self) -> AbstractContextManager[None]:
        """Return a context in which pictures of this size are read. Raises `DataError` for 0 or less."""
        return nullcontext() if self.megapixels is None else data.megapixel_limit(self.megapixels)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PictureOptions):
    """Which model to open, and how."""

    model: Annotated[
        str | None,
        Parameter(
            help="folder, GGUF file (of a text model) or Hugging Face id of the model (default: the embedded model)",
            group=MODEL,
            metavar="DIR_OR_ID",
        ),
    ] = None
    revision: Annotated[
        str | None,
        Parameter(
            help="branch, tag or commit of a model on the hub (default: its newest)", group=MODEL, metavar="NAME"
        ),
    ] = None
    dtype: Annotated[
        str,
        Parameter(
            help="precision to compute in: float32, bfloat16, float16, or auto: that of the files, but float32 for "
            "half-precision files on the CPU",
            group=MODEL,
            metavar="NAME",
        ),
    ] = "auto"
    device_map: Annotated[
        str | None,
        Parameter(
            help="where to place the weights: cpu, cuda:0, auto (accelerators first, then memory, then disk), or a "
            'JSON file that places modules one by one, such as {"model": "disk", "lm_head": "cpu"} (default: the CPU)',
            group=MODEL,
            metavar="MAP",
        ),
    ] = None
    offload_folder: Annotated[
        Path | None,
        Parameter(
            help="folder for weights on disk that must be written in another form than the model's own files hold "
            "(default: none)",
            group=MODEL,
            metavar="DIR",
        ),
    ] = None
    quantization: Annotated[
        str | None,
        Parameter(
            help="pack the weights as they are read: 8bit or 4bit (bitsandbytes), int8 (torchao), as in --model "
            "Qwen/Qwen2.5-VL-7B-Instruct --quantization 4bit; none: unpack weights that the files hold quantised "
            "(default: as in the files; needs pip install 'multrace[quant]')",
            group=MODEL,
            choices=QUANTIZATIONS,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, Parameter(help="run Python code that comes with the model (default: refuse such models)", group=MODEL)
    ] = False

    def open_model(self) -> "models.VisionLanguageModel":
        """Return the loaded model, with the addresses of its modules verified."""
        return models.load(self._path, **self._loading)

    def model_to_load(self) -> "workflow.ModelToLoad":
        """Return the description of the model, which is opened only if something has to be computed with it."""
        return workflow.ModelToLoad(self._path, self._loading)

    @property
    def _path(self) -> "str | PathLike[str]":
        return data.tiny_vlm_path() if self.model is None else self.model

    @property
    def _loading(self) -> dict[str, Any]:
        names = ("dtype", "device_map", "revision", "trust_remote_code", "offload_folder", "quantization")
        loading = {name: getattr(self, name) for name in names}
        if self.device_map is not None and self.device_map.endswith(".json"):
            loading["device_map"] = placed_modules(Path(self.device_map))
        return loading


def placed_modules(path: Path) -> dict[str, str]:
    """Return the device map in a JSON file. Raises `CommandError` if it has none."""
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise CommandError(f"the device map {str(path)!r} is not JSON: {error}; mend it") from error
    if not isinstance(placed, dict) or not all(isinstance(device, str | int) for device in placed.values()):
        raise CommandError(
            f'the device map {str(path)!r} does not map modules to devices; write {{"model": "disk", "lm_head": "cpu"}}'
        )
    return placed


@dataclass(frozen=True, kw_only=True)
class SourceOptions(PictureOptions):
    """The file of records, which many commands take instead of one question."""

    data: Annotated[
        Path | None,
        Parameter(
            help="file whose records are processed, in JSON lines or in the format of a public data set",
            group=RUN,
            metavar="FILE",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class FileOptions(PictureOptions):
    """How to read a data file."""

    format: Annotated[
        str | None,
        Parameter(help="format of the data file (default: detected from its content)", choices=DATA_FORMATS, group=RUN),
    ] = None
    images: Annotated[
        Path | None,
        Parameter(
            help="folder that the paths of pictures start from (default: the folder of the data file)",
            group=RUN,
            metavar="DIR",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions(GeneralOptions):
    """The engine that computes the cells of a trace or of a knockout."""

    engine: Annotated[
        str,
        Parameter(
            help="replay: compute only the states that an intervention can change; plain: one forward pass of the "
            "whole model per cell; auto: replay if the model allows it",
            group=ENGINE,
            choices=ENGINES,
        ),
    ] = "auto"
    memory: Annotated[
        int,
        Parameter(
            help="memory in MiB that the replay engine may use beside the model and the recorded runs",
            group=ENGINE,
            metavar="MIB",
        ),
    ] = ENGINE_MEMORY
    checks: Annotated[
        int,
        Parameter(
            help="number of random cells that are computed again by plain forward passes, as a check; with --data, "
            "multrace trace does this for each record, and multrace flow for the first three",
            group=ENGINE,
            metavar="N",
        ),
    ] = ENGINE_CHECKS


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(GeneralOptions):
    """The question to the model."""

    question: Annotated[str, Parameter(help="question to ask", metavar="TEXT")]
    image: Annotated[
        str | None,
        Parameter(
            help="picture that the question is about (default: none, for a question without a picture)", metavar="FILE"
        ),
    ] = None

    def check_question(self) -> None:
        """Raises `ModelError` for a picture that cannot be read, before the model is opened, which can take minutes."""
        models.open_images(self.image)

    def prompt(self, vlm: "models.VisionLanguageModel") -> "models.Prompt":
        """Return the question as a prompt of this model."""
        return vlm.prompt(self.image, self.question)


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions(QuestionOptions):
    """The question to the model, and the words in it that name its subject."""

    constraint: Annotated[
        str | None,
        Parameter(
            help="words of the question that name its subject, such as 'the company in this photo' (default: none)",
            metavar="WORDS",
        ),
    ] = None

    def check_question(self) -> None:
        """Raises `ModelError` also for words that are not in the question."""
        super().check_question()
        if self.constraint is not None and self.question.strip():  # an empty question has an error of its own
            data.find_span(self.question, self.constraint)

    def prompt(self, vlm: "models.VisionLanguageModel") -> "models.Prompt":
        """Return the question as a prompt of this model, with the constraint among its token groups."""
        return vlm.prompt(self.image, self.question, constraint=self.constraint)


def parse_rows(_type: Any, tokens: Sequence[Token]) -> "tuple[Item, ...]":
    """Return the positions that the values of --positions name, as `parse_position` reads them."""
    return tuple(tracing.parse_position(token.value) for token in tokens)


@dataclass(frozen=True, kw_only=True)
class CorruptionOptions(ConstraintOptions):
    """What a trace corrupts, and what it restores."""

    corrupt: Annotated[
        str | None,
        Parameter(
            help=f"corruption that a trace needs, unless each record of a file names its own: {SPELLINGS}",
            metavar="HOW",
        ),
    ] = None
    window: Annotated[
        int,
        Parameter(
            help="number of neighbouring layers whose MLP or attention outputs are restored together; hidden states "
            "are always restored one layer at a time",
            metavar="N",
        ),
    ] = 3
    positions: Annotated[
        tuple[Any, ...] | None,
        Parameter(
            help="rows of the map, each of which is restored as a whole: token groups (image, question, constraint, "
            "constraint_last, last, ...) or positions; 'tokens' for each text token on its own (the default of "
            "multrace trace; multrace edit compares constraint_last and last); image_rows, image_columns, "
            "image_quadrants, patches, blocks:3 (of 3 x 3 patches) or box:LEFT,TOP,RIGHT,BOTTOM (in pixels of the "
            "picture)",
            metavar="GROUP",
            converter=parse_rows,
        ),
    ] = None
    seed: Annotated[int, Parameter(help="random seed of the noise", metavar="N")] = 0

    def corruption(self) -> "tracing.Corruption":
        """Return the corruption that --corrupt describes.

        Raises `CommandError` or `TraceError` if it is missing or misspelt, or needs another option.
        """
        if self.corrupt is None:
            raise CommandError(f"tracing needs --corrupt: pass one of {SPELLINGS}")
        corruption = tracing.parse_corruption(self.corrupt)
        group = getattr(corruption, "group", "image")
        if group == "image":
            self._need(self.image, "--image", "the picture to corrupt")
        if group.startswith("constraint"):
            self._need(self.constraint, "--constraint", "the words of the question to corrupt")
        for path in pictures_of(corruption):
            models.open_images(path)
        has_seed = any(row.name == "seed" for row in fields(cast(Any, corruption)))
        return replace(cast(Any, corruption), seed=self.seed) if has_seed else corruption

    def rows(self, default: "str | tuple[Item, ...]") -> "str | tuple[Item, ...]":
        """Return the rows of the map in the form that `causal_trace` takes."""
        return default if self.positions is None else self.positions

    def _need(self, value: str | None, flag: str, what: str) -> None:
        if value is None:
            raise CommandError(f"--corrupt {self.corrupt!r} needs {flag}: {what}")


def pictures_of(corruption: "tracing.Corruption") -> tuple[str, ...]:
    """Return the paths of the pictures that a corruption from the command line names."""
    if isinstance(corruption, tracing.SwapImage):
        return (cast(str, corruption.image),)
    return cast(tuple[str, ...], tuple(corruption.references)) if isinstance(corruption, tracing.MeanAblation) else ()


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions, FileOptions, SourceOptions):
    """The records of a run, and which of them this process computes."""

    limit: Annotated[
        int | None, Parameter(help="take only the first N records (default: all)", group=RUN, metavar="N")
    ] = None
    shard: Annotated[
        str | None,
        Parameter(
            help="compute one part of the records, such as 1/8 for the first of eight in a job array (default: all "
            "records); the parts may share --out, or have folders of their own, which multrace merge joins",
            group=RUN,
            metavar="I/N",
        ),
    ] = None
    retry_failed: Annotated[
        bool,
        Parameter(help="try again the records that failed in an earlier call (default: keep their errors)", group=RUN),
    ] = False

    def check_run(self) -> None:
        """Raises `CommandError` or `RunError` for options of a run that do not fit together."""
        if self.limit is not None and self.limit < 1:
            raise CommandError(f"--limit {self.limit}: take at least one record")
        if self.shard is not None:
            workflow.Shard.parse(self.shard)

    def records(self) -> "Rows":
        """Return the records of --data up to --limit. Raises `DataError` if the file cannot be read."""
        assert self.data is not None, "a check before says that there is a file"
        return islice(data.read_data(self.data, format=self.format, images=self.images), self.limit)

    @property
    def share(self) -> dict[str, Any]:
        """The part of the records that this process computes, as keywords of `workflow.run`."""
        return {"shard": self.shard, "retry_failed": self.retry_failed}


def print_report(report: "workflow.RunReport") -> int:
    """Print the summary of a run, and return the exit code: 0, or `NOT_ALL` if a record failed or could not be read."""
    print(*report.summary(), sep="\n")
    print(f"in {report.folder}: {', '.join(('records/', *(f'summary/{name}' for name in report.files)))}")
    return 0 if report.is_clean else NOT_ALL


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raises `CommandError` unless files of these names can be written to the folder, which need not exist yet.

    The proof is an unnamed temporary file in the nearest existing folder, because permission bits say nothing about
    read-only file systems or the superuser. Nothing is left behind.
    """
    artefacts.remove_leftovers(folder)
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise CommandError(f"cannot write to {str(folder)!r}: {str(nearest)!r} is not a folder; choose another place")
    for name in names:
        if (folder / name).is_dir():
            raise CommandError(f"cannot write {str(folder / name)!r}: a folder has that name; choose another place")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"cannot write to {str(folder)!r}: {reason}; choose another place") from error


def check_new_folder(folder: Path) -> None:
    """Raises `CommandError` unless the folder can be created, or exists and is empty."""
    check_files(folder, ())
    if folder.is_dir() and any(folder.iterdir()):
        raise CommandError(f"the folder {str(folder)!r} is not empty; choose a new one")


def new_files(folder: Path, *, stale: Sequence[str] = ()) -> AbstractContextManager[Path]:
    """Return a context with a temporary folder, whose files all move into `folder` at the end unless there is an error.

    stale: names or patterns of files of earlier results, which are removed unless they are written again; see
    `replacing_files`.
    """
    return artefacts.replacing_files(folder, stale=stale, error=CommandError)


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest parent that exists (a dangling link counts as existing)."""
    path = path.absolute()
    return path if os.path.lexists(path) else _nearest(path.parent)
