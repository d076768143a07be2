"""The options that commands share: which model, which question, and which corruption."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from ... import data, models, tracing
from ...data.spans import find_span
from ..errors import CommandError
from .choices import ENGINE_CHECKS, ENGINE_MEMORY, ENGINES, SPELLINGS
from .option import option

if TYPE_CHECKING:
    from ...tracing.engine.rows import Item


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is opened, and how."""

    model: str | None = option(
        "directory or hub id of the model (default: the embedded model)",
        default=None,
        metavar="DIR_OR_ID",
        is_about_model=True,
    )
    revision: str | None = option("branch, tag or commit of a hub id", default=None, is_about_model=True)
    dtype: str = option(
        "float32, bfloat16, float16 or auto (default: auto, the dtype of the file, but float32 instead of half "
        "precision on the CPU)",
        default="auto",
        is_about_model=True,
    )
    device_map: str | None = option(
        "where the model is placed: cpu, cuda:0, auto, ... (default: the CPU)",
        default=None,
        metavar="MAP",
        is_about_model=True,
    )
    trust_remote_code: bool = option(
        "run code that comes with the model (default: never)",
        default=False,
        action="store_true",
        is_about_model=True,
    )

    def open_model(self) -> models.VisionLanguageModel:
        """Return the loaded model, its addresses proven."""
        return models.load(
            data.tiny_vlm_path() if self.model is None else self.model,
            dtype=self.dtype,
            device_map=self.device_map,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of commands whose cells the tracing engine answers."""

    engine: str = option(
        "replay: compute only what can have changed; plain: one forward pass per cell; auto: replay if the model "
        "allows it (default)",
        default="auto",
        choices=ENGINES,
    )
    memory: int = option(
        f"MiB that the replay engine may use beside the model and the recorded runs (default: {ENGINE_MEMORY})",
        default=ENGINE_MEMORY,
        type=int,
        metavar="MIB",
    )
    checks: int = option(
        "number of random cells that are computed again the plain way as a check; many questions of `flow` are checked "
        f"in the first three only (default: {ENGINE_CHECKS})",
        default=ENGINE_CHECKS,
        type=int,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """What the model is asked."""

    question: str = option("question to ask")
    image: str | None = option("picture in front of the question (default: none, a text-only question)", default=None)

    def check_question(self) -> None:
        """Raises `ModelError` for a picture that cannot be read, before the model is opened, which can take minutes."""
        models.open_images(self.image)

    def prompt(self, vlm: models.VisionLanguageModel) -> models.Prompt:
        """Return the question as a prompt of this model."""
        return vlm.prompt(self.image, self.question)


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions(QuestionOptions):
    """What the model is asked, and which words of the question name the thing asked about."""

    constraint: str | None = option("words of the question that name its subject", default=None, metavar="WORDS")

    def check_question(self) -> None:
        """Raises `ModelError` also for words that are not in the question."""
        super().check_question()
        if self.constraint is not None and self.question.strip():  # an empty question has an error of its own
            find_span(self.question, self.constraint)

    def prompt(self, vlm: models.VisionLanguageModel) -> models.Prompt:
        """Return the question as a prompt of this model, with the constraint among its token groups."""
        return vlm.prompt(self.image, self.question, constraint=self.constraint)


def parse_row(text: str) -> Item:
    """Return a position, blocks of patches, a box of the picture, or the name of a token group or of image regions."""
    if text.removeprefix("-").isdecimal():
        return int(text)
    kind, _, sizes = text.partition(":")
    numbers = [int(size) for size in sizes.split(",") if size.strip().isdecimal()]
    for name, count in (("blocks", 1), ("box", 4)):
        if kind == name:
            if len(numbers) != count or len(sizes.split(",")) != count:
                raise argparse.ArgumentTypeError(f"{text!r}: write blocks:3 or box:0,0,50,50")
            return (tracing.Blocks if name == "blocks" else tracing.Box)(*numbers)
    return text


@dataclass(frozen=True, kw_only=True)
class CorruptionOptions(ConstraintOptions):
    """What a trace corrupts and what it restores."""

    corrupt: str | None = option(f"corruption of the question or its picture: {SPELLINGS}", default=None, metavar="HOW")
    window: int = option("number of MLP or attention layers restored together (default: 3)", default=3, type=int)
    positions: tuple[Item, ...] | None = option(
        "what is restored together: token groups (image, question, constraint, constraint_last, last, ...) or "
        "positions; 'tokens' for each text token on its own; image_rows, image_columns, image_quadrants, patches, "
        "blocks:3 (of 3 x 3 patches) or box:LEFT,TOP,RIGHT,BOTTOM (in pixels of the picture)",
        default=None,
        nargs="+",
        type=parse_row,
        metavar="GROUP",
    )
    seed: int = option("random seed of the noise (default: 0)", default=0, type=int)

    def corruption(self) -> tracing.Corruption:
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

    def rows(self, default: str | tuple[Item, ...]) -> str | tuple[Item, ...]:
        """Return the rows of the map, as `causal_trace` takes them."""
        return default if self.positions is None else self.positions

    def _need(self, value: str | None, flag: str, what: str) -> None:
        if value is None:
            raise CommandError(f"--corrupt {self.corrupt!r} needs {flag}: {what}")


def pictures_of(corruption: tracing.Corruption) -> tuple[str, ...]:
    """Return the paths of pictures that a corruption from the command line names."""
    if isinstance(corruption, tracing.SwapImage):
        return (cast(str, corruption.image),)
    return cast(tuple[str, ...], tuple(corruption.references)) if isinstance(corruption, tracing.MeanAblation) else ()
