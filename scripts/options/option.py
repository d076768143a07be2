"""Options as frozen dataclasses: each field is an option, and its help text stands beside it."""

import argparse
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

_Options = TypeVar("_Options")


@dataclass(frozen=True)
class Words:
    """Turns text into a number, or leaves it as it is if it is one of these words (any word if there are none)."""

    words: tuple[str, ...] = ()

    def __call__(self, text: str) -> int | str:
        """Return the number or the word. Raises ArgumentTypeError for any other word."""
        if text.removeprefix("-").isdecimal():
            return int(text)
        if self.words and text not in self.words:
            raise argparse.ArgumentTypeError(f"{text!r}: write {' or '.join(self.words)}, or numbers")
        return text


def option(help: str, *, default: Any = MISSING, is_about_model: bool = False, **keywords: Any) -> Any:
    """Return a dataclass field that is an option, required if it has no default.

    Args:
        help: The help text, a sentence without its final stop.
        default: The value if the option is not given.
        is_about_model: Whether the help lists the option in the group of options about the model.
        keywords: Further arguments of argparse's `add_argument`.
    """
    return field(default=default, metadata={"is_about_model": is_about_model, "keywords": {"help": help, **keywords}})


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds every field of a dataclass made of `option`s; the field max_new_tokens becomes --max-new-tokens."""
    model = parser.add_argument_group("model")
    for row in fields(kind):
        group = model if row.metadata["is_about_model"] else parser
        needed = {"required": True} if row.default is MISSING else {"default": row.default}
        group.add_argument(flag(row.name), dest=row.name, **needed, **row.metadata["keywords"])


def read(kind: type[_Options], namespace: argparse.Namespace) -> _Options:
    """Return the dataclass whose fields `add_options` added, filled with what argparse parsed."""
    values = {row.name: getattr(namespace, row.name) for row in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def flag(name: str) -> str:
    """Return the spelling of a field on the command line."""
    return f"--{name.replace('_', '-')}"
