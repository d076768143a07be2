"""Print the architectures that multrace knows: text stacks, and the parts that see; no model is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from .. import models
from .options import GeneralOptions

if TYPE_CHECKING:
    from ..models.families import Row

EXAMPLE = """examples:
  multrace families
  multrace families --json

A type is the model_type in a config.json; of a vision-language model the text stack has a type of its own, in
text_config. An architecture that is not in the table may be opened as well: with the usual names of modules, or with
what loading measures on the model.
"""
app = App(name="families", help=__doc__, help_epilogue=EXAMPLE)
USUAL = (
    *("llama", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text", "mistral", "gemma", "phi3"),
    *("smollm3", "granite", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe", "qwen3_vl_moe_text", "aria_text"),
)
"""Text types that have been tried and need no row, since their modules have the usual names."""
PLAIN: Mapping[str, str] = {
    **dict.fromkeys(("jamba", "recurrent_gemma"), "plain: a state between tokens"),
    **dict.fromkeys(("falcon", "mpt", "xglm"), "plain: attention is computed by its own code"),
    "beam": "plain: attention is scaled by position",
}
"""Text types that are traced by plain passes, and why; the other ones run on the fast engine as far as is known."""
_WIDTH, _COLUMNS, _GAP = 100, (32, 46, 18), 2
"""Characters in a line, and in the columns of the tables."""


@dataclass(frozen=True, kw_only=True)
class FamilyOptions(GeneralOptions):
    """Options of `multrace families`."""

    json: Annotated[bool, Parameter(help="print every field of every row as JSON instead")] = False


@app.default
def run(options: FamilyOptions = FamilyOptions()) -> int:
    """Print the tables."""
    stacks, fronts = ([*map(_record, rows)] for rows in (models.TEXT_STACKS, models.PICTURE_FRONTS))
    usual = [{"text_types": [name], "special": [], "engine": _engine((name,))} for name in USUAL]
    if options.json:
        tables = {"text_stacks": stacks, "usual_text_stacks": usual, "picture_fronts": fronts}
        print(json.dumps(tables, indent=1))
        return 0
    print(*_text(stacks, fronts), sep="\n")
    return 0


def _record(row: Row) -> dict[str, Any]:
    """Return the fields of a row that differ from the defaults, what is special about it, and its engine."""
    own = {part.name: getattr(row, part.name) for part in fields(row) if getattr(row, part.name) != _default(part)}
    if isinstance(row, models.TextStack):
        return own | {"special": _special(own), "engine": _engine(row.text_types)}
    return own | {"special": ["the prompt sees all of itself"] if row.prefix else []}


def _default(part: Any) -> Any:
    return None if part.default is MISSING else part.default


def _special(own: Mapping[str, Any]) -> list[str]:
    """Return phrases on what a text stack has that most have not."""
    kinds = own.get("attention")
    phrases = {
        "a norm behind attention and MLP": "attention_norm" in own,
        "attention and MLP side by side": "parallel" in own,
        f"layers of two kinds ({', '.join(kinds)})" if isinstance(kinds, tuple) else "": isinstance(kinds, tuple),
        "experts": "down" in own and own["down"] is None,
        "experts in some layers": own.get("down") is not None and "experts" in own,
        "weights stored as (input, output)": "transposed" in own,
        "token_type_ids kept from the model": "dropped_inputs" in own,
    }
    names = {name for name in own if name not in ("text_types", "parallel", "transposed", "dropped_inputs", "experts")}
    special = [phrase for phrase, holds in phrases.items() if holds]
    return special + ["own names of modules"] * bool(names - {"attention_norm", "mlp_norm"})


def _engine(types: Sequence[str]) -> str:
    slow = {name: PLAIN[name] for name in types if name in PLAIN}
    if len(slow) == len(types):
        return "; ".join(dict.fromkeys(slow.values()))
    return "; ".join(["fast", *(f"{name} {reason}" for name, reason in slow.items())])


def _text(stacks: Sequence[Mapping[str, Any]], fronts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of both tables, none longer than a hundred characters."""
    yield "Text stacks"
    yield from _lines("text types", "special", "engine")
    for row in stacks:
        yield from _lines(", ".join(row["text_types"]), "; ".join(row["special"]) or "-", row["engine"])
    yield from _lines(", ".join(USUAL), "the usual names, no row needed", "fast")
    yield ""
    yield "Parts that see (vision tower; its layers; projector)"
    yield from _lines("model types", "names of modules", "special")
    for row in fronts:
        names = (row.get(part, None) for part in ("vision", "vision_layers", "projector"))
        shown = "; ".join(", ".join((name,) if isinstance(name, str) else name) if name else "-" for name in names)
        yield from _lines(", ".join(row["model_types"]), shown, "; ".join(row["special"]) or "-")
    yield ""
    yield from wrap(
        "Other architectures: the usual names are tried first, and then what loading measures on the model. Whatever "
        "is found is proven on the model itself before it is used.",
        _WIDTH,
    )


def _lines(*cells: str) -> Iterator[str]:
    """Yield the lines of one row of a table, each cell wrapped in its column."""
    columns = [wrap(cell, width) for cell, width in zip(cells, _COLUMNS, strict=True)]
    for parts in zip_longest(*columns, fillvalue=""):
        row = (part.ljust(width) for part, width in zip(parts, _COLUMNS, strict=True))
        yield (" " * _GAP).join(row).rstrip()
