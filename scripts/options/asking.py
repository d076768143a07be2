"""The options that commands share: which model, which question, and which corruption."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Group, Parameter, Token

from ... import data, models, tracing, workflow
from ..errors import CommandError
from .choices import DATA_FORMATS, ENGINE_CHECKS, ENGINE_MEMORY, ENGINES, SPELLINGS

if TYPE_CHECKING:
    from ...tracing.engine.rows import Item


MODEL, ENGINE, EDITOR, GENERAL = (
    Group(name, sort_key=position) for position, name in enumerate(("Model", "Engine", "Editor", "General"), start=1)
)
"""Headings in the help, after the command's own options."""


def _shown(default: Any) -> str | None:
    """The default as it is typed; None for what is off or left out."""
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
"""How options are spelt and shown: --windows 1 4 for several values, no --no-... flags, no environment variables."""


def paragraphs(text: str) -> str:
    """Return the text with one line per paragraph, so that the terminal's width decides where lines break."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GeneralOptions:
    """What every command takes."""

    debug: Annotated[bool, Parameter(help="show the traceback of an error", group=GENERAL)] = False
    verbose: Annotated[
        bool,
        Parameter(help="log what loading has proven about the model", group=GENERAL, alias="-v", allow_repeating=True),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions(GeneralOptions):
    """Which model is opened, and how."""

    model: Annotated[
        str | None,
        Parameter(
            help="directory or hub id of the model (default: the embedded model)", group=MODEL, metavar="DIR_OR_ID"
        ),
    ] = None
    revision: Annotated[str | None, Parameter(help="branch, tag or commit of a hub id", group=MODEL)] = None
    dtype: Annotated[str, Parameter(help="float32, bfloat16, float16 or auto", group=MODEL)] = "auto"
    device_map: Annotated[
        str | None,
        Parameter(
            help="where the model is placed: cpu, cuda:0, auto, ... (default: the CPU)", group=MODEL, metavar="MAP"
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, Parameter(help="run code that comes with the model (default: never)", group=MODEL)
    ] = False

    def open_model(self) -> "models.VisionLanguageModel":
        """Return the loaded model, its addresses proven."""
        return models.load(self._path, **self._loading)

    def model_to_load(self) -> "workflow.ModelToLoad":
        """Return the model, which is opened only if something has to be computed with it."""
        return workflow.ModelToLoad(self._path, self._loading)

    @property
    def _path(self) -> "str | PathLike[str]":
        return data.tiny_vlm_path() if self.model is None else self.model

    @property
    def _loading(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("dtype", "device_map", "revision", "trust_remote_code")}


@dataclass(frozen=True, kw_only=True)
class FileOptions(GeneralOptions):
    """How a data file is read."""

    format: Annotated[
        str | None, Parameter(help="format of the data file (default: told by its content)", choices=DATA_FORMATS)
    ] = None
    images: Annotated[
        Path | None, Parameter(help="folder of the pictures (default: the data file's own folder)", metavar="DIR")
    ] = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions(GeneralOptions):
    """The options of commands whose cells the tracing engine answers."""

    engine: Annotated[
        str,
        Parameter(
            help="replay: compute only what can have changed; plain: one forward pass per cell; auto: replay if the "
            "model allows it",
            group=ENGINE,
            choices=ENGINES,
        ),
    ] = "auto"
    memory: Annotated[
        int,
        Parameter(
            help="MiB that the replay engine may use beside the model and the recorded runs",
            group=ENGINE,
            metavar="MIB",
        ),
    ] = ENGINE_MEMORY
    checks: Annotated[
        int,
        Parameter(
            help="number of random cells that are computed again by plain forward passes as a check; many questions of "
            "`flow` are checked in the first three only",
            group=ENGINE,
            metavar="N",
        ),
    ] = ENGINE_CHECKS


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(GeneralOptions):
    """What the model is asked."""

    question: Annotated[str, Parameter(help="question to ask")]
    image: Annotated[
        str | None, Parameter(help="picture in front of the question (default: none, a text-only question)")
    ] = None

    def check_question(self) -> None:
        """Raises `ModelError` for a picture that cannot be read, before the model is opened, which can take minutes."""
        models.open_images(self.image)

    def prompt(self, vlm: "models.VisionLanguageModel") -> "models.Prompt":
        """Return the question as a prompt of this model."""
        return vlm.prompt(self.image, self.question)


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions(QuestionOptions):
    """What the model is asked, and which words of the question name the thing asked about."""

    constraint: Annotated[
        str | None, Parameter(help="words of the question that name its subject", metavar="WORDS")
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
    """Return what each token of --positions names, as `parse_position` reads it."""
    return tuple(tracing.parse_position(token.value) for token in tokens)


@dataclass(frozen=True, kw_only=True)
class CorruptionOptions(ConstraintOptions):
    """What a trace corrupts and what it restores."""

    corrupt: Annotated[
        str | None, Parameter(help=f"corruption of the question or its picture: {SPELLINGS}", metavar="HOW")
    ] = None
    window: Annotated[int, Parameter(help="number of MLP or attention layers restored together")] = 3
    positions: Annotated[
        tuple[Any, ...] | None,
        Parameter(
            help="what is restored together: token groups (image, question, constraint, constraint_last, last, ...) or "
            "positions; 'tokens' for each text token on its own; image_rows, image_columns, image_quadrants, patches, "
            "blocks:3 (of 3 x 3 patches) or box:LEFT,TOP,RIGHT,BOTTOM (in pixels of the picture)",
            metavar="GROUP",
            converter=parse_rows,
        ),
    ] = None
    seed: Annotated[int, Parameter(help="random seed of the noise")] = 0

    def corruption(self) -> "tracing.Corruption":
        """Return the corruption that --corrupt spells.

        Raises `CommandError` or `TraceError` if it is missing, misspelt or needs another option.
        """
        if self.corrupt is None:
            raise CommandError(f"tracing needs --corrupt: {SPELLINGS}")
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
        """Return the rows of the map, as `causal_trace` takes them."""
        return default if self.positions is None else self.positions

    def _need(self, value: str | None, flag: str, what: str) -> None:
        if value is None:
            raise CommandError(f"--corrupt {self.corrupt!r} needs {flag}: {what}")


def pictures_of(corruption: "tracing.Corruption") -> tuple[str, ...]:
    """Return the paths of pictures that a corruption from the command line names."""
    if isinstance(corruption, tracing.SwapImage):
        return (cast(str, corruption.image),)
    return cast(tuple[str, ...], tuple(corruption.references)) if isinstance(corruption, tracing.MeanAblation) else ()
