"""docs/families.md, from the table that the battery checks: `python -m families.page FILE`."""

import sys
from collections.abc import Iterable
from pathlib import Path

from multrace.models.families.table import PICTURE_FRONTS, TEXT_STACKS

from .table import KNOWN, RECIPES, Known

HEAD = """# Families

What works on which family of models, checked on a tiny model of each with random weights: `make families` builds
the models offline, runs one battery on each, and writes this page. A family that is not here may work as well:
`mt.load` proves every model that it opens, and refuses one that it cannot prove.

The battery opens the model through `mt.load` and its proof, and then checks, against transformers alone or hooks
by hand: the prompt holds everything that the processor returns; image positions hold the image features, of
pictures of several shapes and numbers; a causal trace of the expected engine equals plain passes in true float64,
and these equal hooks on the whole model; a knockout equals masks put in by hand; the lens ends with the model's
own probabilities; a padded batch, and pictures of unequal sizes, are answered as one by one; an edit raises the
model's own probability of the target, which is the one that the search believed in, and undo is bit-exact; PEFT
adapter and merged folder, opened by transformers, have the edited model's logits; second moments are those that a
hook sees.
"""
LEGEND = """
- Engine: "fast" computes only what can have changed; "plain" is one forward pass per cell, with the reason.
- Edited: the output maps that the battery edits: the MLP's down projection (a shared expert's, where there is one), or
  the routed experts that the edited tokens go to. Attention's can be edited in every family.
- Checked in: float64, in which equal means equal to nine digits, or float32 where transformers has no float64
  products of experts.
- Found by: "row" where a table of multrace has a row for the text stack or for the parts that see; "usual names"
  where the defaults fit. What neither fits is measured (`multrace families`).
- Needs: packages besides `pip install multrace`. `pip install 'multrace[vision]'` brings torchvision.
- An asterisk marks the families whose battery is part of `make test`.
"""


def page() -> str:
    """The whole page."""
    works = {name: known for name, known in KNOWN.items() if not known.refused}
    refused = [f"- {known.title} (`{model_type(name)}`): {known.why}" for name, known in KNOWN.items() if known.refused]
    fast = sum(not known.plain for known in works.values())
    count = f"\n**{len(works)} of {len(KNOWN)} families work, {fast} of them on the fast engine.**\n"
    sees = [name for name in works if RECIPES[name].sees]
    parts = [
        HEAD, count, LEGEND,
        "\n## Vision-language models\n\n", *table(sees),
        "\n## Text-only models\n\n", *table([name for name in works if name not in sees]),
        "\n## What does not work\n\n`mt.load` refuses these by name, with the reason.\n\n", "\n".join(refused), "\n",
    ]  # fmt: skip
    return "".join(parts)


COLUMNS = (
    "family",
    "`model_type`",
    "text stack",
    "engine",
    "edited",
    "export",
    "checked in",
    "found by",
    "needs",
    "notes",
)


def table(names: Iterable[str]) -> list[str]:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(name, KNOWN[name]) for name in names)]
    return [f"| {' | '.join(cells)} |\n" for cells in rows]


def row(name: str, known: Known) -> tuple[str, ...]:
    text = RECIPES[name].config.get("text_config", {}).get("model_type")
    return (
        known.title + (" *" if known.core else ""), f"`{model_type(name)}`", f"`{text}`" if text else "its own",
        f"plain: {known.why}" if known.plain else "fast",
        "routed experts" if known.experts else "MLP", "PEFT, merged", known.dtype, found_by(name),
        ", ".join(known.needs) or "-", "; ".join(notes(known)) or "-",
    )  # fmt: skip


def notes(known: Known) -> list[str]:
    """What does not hold of this family."""
    every = {
        "one picture per prompt": known.pictures == "one",
        "several pictures of one size only": known.pictures == "equal",
        "no places for boxes: queries read the whole picture": bool(known.placeless) and not known.crosses,
        "pictures stand at no position of the prompt": known.crosses,
        known.why: bool(known.partly),
    }
    return [note for note, holds in every.items() if holds]


def found_by(name: str) -> str:
    """Whether a table of multrace has a row for this family."""
    config = RECIPES[name].config
    text = config.get("text_config", config).get("model_type", config["model_type"])
    has_row = any(text in row.text_types for row in TEXT_STACKS)
    has_row |= any(config["model_type"] in row.model_types for row in PICTURE_FRONTS)
    return "row" if has_row else "usual names"


def model_type(name: str) -> str:
    return RECIPES[name].config["model_type"]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
