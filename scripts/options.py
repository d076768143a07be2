"""Options as frozen dataclasses: a field is an option, its help stands beside it; and the options commands share."""

import argparse
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar

from ..data import tiny_vlm_path
from ..models import Prompt, VisionLanguageModel, load
from ..models.images import open_images
from ..models.spans import find_span
from ..tracing import Blocks, Box, Corruption, MeanAblation, SwapImage, parse_corruption
from ..tracing.corruptions.parsing import SPELLINGS
from ..tracing.engine.rows import Item
from .errors import CommandError

_Options = TypeVar("_Options")


def option(help: str, *, default: Any = MISSING, is_about_model: bool = False, **words: Any) -> Any:
    """A dataclass field that is an option, required if it has no default; words go to argparse's add_argument."""
    return field(default=default, metadata={"is_about_model": is_about_model, "words": {"help": help, **words}})


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds every field of a dataclass made of `option`s; max_new_tokens becomes --max-new-tokens."""
    model = parser.add_argument_group("model")
    for each in fields(kind):
        group = model if each.metadata["is_about_model"] else parser
        needed = {"required": True} if each.default is MISSING else {"default": each.default}
        group.add_argument(f"--{each.name.replace('_', '-')}", dest=each.name, **needed, **each.metadata["words"])


def read(kind: type[_Options], options: argparse.Namespace) -> _Options:
    """The dataclass that `add_options` asked for, filled from what argparse found."""
    found = {each.name: getattr(options, each.name) for each in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def _row(text: str) -> Item:
    """A position, blocks of patches, a box of the picture, or the name of a token group or of image regions."""
    if text.removeprefix("-").isdecimal():
        return int(text)
    kind, _, sizes = text.partition(":")
    numbers = [int(each) for each in sizes.split(",") if each.strip().isdecimal()]
    for name, make, count in (("blocks", Blocks, 1), ("box", Box, 4)):
        if kind == name:
            if len(numbers) != count or len(sizes.split(",")) != count:
                raise argparse.ArgumentTypeError(f"{text!r}: write blocks:3 or box:0,0,50,50")
            return make(*numbers)
    return text


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is opened."""

    model: str | None = option(
        "directory or hub id (default: the embedded model)", default=None, metavar="DIR_OR_ID", is_about_model=True
    )
    revision: str | None = option("branch, tag or commit of a hub id", default=None, is_about_model=True)
    dtype: str = option(
        "float32, bfloat16, float16 or auto (default auto: as in the file, but float32 for half precision on the CPU)",
        default="auto",
        is_about_model=True,
    )
    device_map: str | None = option(
        "cpu, cuda:0, auto, ... (default: the CPU)", default=None, metavar="MAP", is_about_model=True
    )
    trust_remote_code: bool = option(
        "run code that comes with the model (default: never)",
        default=False,
        action="store_true",
        is_about_model=True,
    )

    def open_model(self) -> VisionLanguageModel:
        """The loaded model, its addresses proven."""
        return load(
            tiny_vlm_path() if self.model is None else self.model,
            dtype=self.dtype,
            device_map=self.device_map,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """What the model is asked."""

    question: str = option("what to ask")
    image: str | None = option("picture in front of the question; none for a text-only question", default=None)

    def check_question(self) -> None:
        """ModelError for a picture that cannot be read; found before the model is opened, which may take minutes."""
        open_images(self.image)

    def prompt(self, vlm: VisionLanguageModel) -> Prompt:
        """The question as this model sees it."""
        return vlm.prompt(self.image, self.question)


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions(QuestionOptions):
    """What the model is asked, and which words of it name the thing asked about."""

    constraint: str | None = option("the words of the question that name its subject", default=None, metavar="WORDS")

    def check_question(self) -> None:
        """Also a ModelError for words that the question does not say."""
        super().check_question()
        if self.constraint is not None and self.question.strip():  # an empty question has an error of its own
            find_span(self.question, self.constraint)

    def prompt(self, vlm: VisionLanguageModel) -> Prompt:
        """The question as this model sees it, with the constraint among its token groups."""
        return vlm.prompt(self.image, self.question, constraint=self.constraint)


@dataclass(frozen=True, kw_only=True)
class CorruptionOptions(ConstraintOptions):
    """What a trace destroys and what it restores."""

    corrupt: str | None = option(f"what is destroyed: {SPELLINGS}", default=None, metavar="HOW")
    window: int = option("MLPs or attentions restored together (default 3)", default=3, type=int)
    groups: tuple[Item, ...] | None = option(
        "what is restored together: token groups (image, question, constraint, constraint_last, last, ...) or "
        "positions; 'tokens' for each text token on its own; image_rows, image_columns, image_quadrants, patches, "
        "blocks:3 (of 3 x 3 patches) or box:LEFT,TOP,RIGHT,BOTTOM (in pixels of the picture)",
        default=None,
        nargs="+",
        type=_row,
        metavar="GROUP",
    )
    seed: int | None = option("of the noise (default 1)", default=None, type=int)

    def corruption(self) -> Corruption:
        """What --corrupt asks for. CommandError or TraceError if it is missing, misspelt or lacks another option."""
        if self.corrupt is None:
            raise CommandError(f"tracing needs --corrupt: {SPELLINGS}")
        corruption = parse_corruption(self.corrupt)
        group = getattr(corruption, "group", "image")
        if group == "image":
            self._need(self.image, "--image", "the picture to destroy")
        if group.startswith("constraint"):
            self._need(self.constraint, "--constraint", "the words of the question to destroy")
        for path in pictures_of(corruption):
            open_images(path)
        has_seed = any(each.name == "seed" for each in fields(corruption))
        return replace(corruption, seed=self.seed) if has_seed and self.seed is not None else corruption

    def positions(self, default: str | tuple[Item, ...]) -> str | tuple[Item, ...]:
        """The rows of the map, as `causal_trace` takes them."""
        return default if self.groups is None else self.groups

    def _need(self, value: str | None, flag: str, what: str) -> None:
        if value is None:
            raise CommandError(f"--corrupt {self.corrupt!r} needs {flag}: {what}")


def pictures_of(corruption: Corruption) -> tuple[str, ...]:
    """The paths of pictures that a corruption from the command line names."""
    if isinstance(corruption, SwapImage):
        return (corruption.image,)
    return tuple(corruption.references) if isinstance(corruption, MeanAblation) else ()
