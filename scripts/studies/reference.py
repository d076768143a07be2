"""Make the generated parts of docs/: the reference of every public name, and the example pictures and records.

`python -m multrace.scripts.studies.reference` writes docs/reference.md from the docstrings; it reads the sources and
does not import them. With the argument `examples` it writes docs/examples from the built-in world. Tests compare both
with the output of this module for the present sources.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from PIL import Image

from ...data import World
from ...data.world import EditCase, another_picture

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference.md"
EXAMPLES = ROOT / "docs" / "examples"
_QUESTIONS, _REQUESTS = 6, 3
"""Numbers of records in the example files."""
ROOMS = {
    "models": "The model under study",
    "tracing": "Experiments that read",
    "editing": "Edits",
    "workflow": "Tracing and editing together",
    "data": "Questions, records and the built-in world",
    "artefacts": "Files, averages, statistics and plots",
}
HEAD = """# Reference

Every public name, by room, made from the docstrings by `make reference`. `multrace` itself exports the names marked
with a star (`import multrace as mt`; `mt.load`); all others are imported from their room (`from multrace.tracing import
AverageTrace`). `python -c "help('multrace.causal_trace')"` shows the same text.
"""


def reference(root: Path = ROOT) -> str:
    """Return the whole page as Markdown, for the package whose sources are in this folder."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "multrace"  # griffe takes the name of a package from its folder
        own.mkdir()
        for name in (
            "__init__.py",
            "__init__.pyi",
            *ROOMS,
        ):  # else griffe would walk the whole checkout, with its .venv
            (own / name).symlink_to(root / name)
        package = griffe.load("multrace", search_paths=[folder], docstring_parser="google")
        starred = set(_public(package))
        contents = [
            f"- [{title}](#{_anchor(f'{title}: multrace.{room}')})"
            for room, title in ROOMS.items()
            if room in package.members
        ]
        parts = [HEAD, "\n".join(contents)]
        for room, title in ROOMS.items():
            parts.append(f"## {title}: `multrace.{room}`")
            for name in _public(package[room]):
                parts += _entry(package[room][name].final_target, name, is_starred=name in starred)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _public(module: griffe.Module) -> list[str]:
    """Return the names that a face exports, which its stub imports under their own names."""
    names = [
        name
        for name, member in module.members.items()
        if isinstance(member, griffe.Alias) and not name.startswith("_") and member.target_path.startswith("multrace.")
    ]
    return sorted((name for name in names if not module[name].final_target.is_module), key=str.lower)


def _entry(member: Any, name: str, *, is_starred: bool) -> Iterator[str]:
    star = " ★" if is_starred else ""
    yield f"### `{name}`{star}"
    if member.is_function:
        yield _code(f"{name}{_signature(member)}")
        yield from _docstring(member)
    elif member.is_class:
        yield from _docstring(member)
        yield from _fields(member)
        yield from _methods(member)
    else:
        yield from _docstring(member)


def _signature(function: Any) -> str:
    """Return the signature, with a line for each parameter if there are many."""
    parameters = [parameter for parameter in function.parameters if parameter.name not in ("self", "cls")]
    parts, is_keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is griffe.ParameterKind.keyword_only and not is_keyword_only:
            is_keyword_only = True
            parts.append("*")
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(
            parameter.kind, ""
        )
        is_keyword_only = is_keyword_only or stars == "*"
        annotation = f": {parameter.annotation}" if parameter.annotation else ""
        default = (
            ""
            if parameter.default is None or stars
            else f" = {parameter.default}"
            if annotation
            else f"={parameter.default}"
        )
        parts.append(f"{stars}{parameter.name}{annotation}{default}")
    returns = f" -> {function.returns}" if function.returns else ""
    if len(parts) > 4:
        return "(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"
    return f"({', '.join(parts)}){returns}"


def _docstring(member: Any) -> Iterator[str]:
    """Yield the docstring in Markdown: prose as it is, arguments as a list, examples as code."""
    if member.docstring is None:
        return
    for section in member.docstring.parse("google"):
        kind = section.kind.value
        if kind == "text":
            yield section.value
        elif kind in ("parameters", "attributes", "other parameters"):
            lines = [f"- `{item.name}`: {_flowing(item.description)}" for item in section.value]
            yield "\n".join(["**Arguments**" if kind == "parameters" else "**Attributes**", "", *lines])
        elif kind == "returns":
            yield "**Returns** " + " ".join(_flowing(item.description) for item in section.value)
        elif kind == "raises":
            yield "\n".join(
                ["**Raises**", "", *(f"- `{item.annotation}`: {_flowing(item.description)}" for item in section.value)]
            )
        elif kind == "examples":
            yield "\n\n".join(_code(text) if part.value == "examples" else text for part, text in section.value)
        elif kind == "admonition":
            title = section.title or section.value.kind
            is_code = section.value.contents.lstrip().startswith(">>>")
            yield f"**{title}**\n\n" + (_code(section.value.contents) if is_code else section.value.contents)


def _fields(member: Any) -> Iterator[str]:
    """Yield the documented fields and properties of a class and of its bases."""
    lines = []
    for name, attribute in member.all_members.items():
        if name.startswith("_") or not attribute.is_attribute or attribute.docstring is None:
            continue
        lines.append(f"- `{name}`: {_flowing(attribute.docstring.value)}")
    if lines:
        yield "\n".join(["**Fields and properties**", "", *lines])


def _methods(member: Any) -> Iterator[str]:
    """Yield the public methods of a class and of its bases, each with its first sentence."""
    lines = []
    for name, method in member.all_members.items():
        if name.startswith("_") or not method.is_function or method.docstring is None:
            continue
        first = re.split(r"(?<=[.:])\s", _flowing(method.docstring.value), maxsplit=1)[0]
        lines.append(f"- `{name}{_short_signature(method)}`: {first}")
    if lines:
        yield "\n".join(["**Methods**", "", *lines])


def _short_signature(function: Any) -> str:
    """Return the names of the parameters alone."""
    names = [parameter.name for parameter in function.parameters if parameter.name not in ("self", "cls")]
    return f"({', '.join(names)})"


def _flowing(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def write_examples(folder: Path) -> None:
    """Write the pictures of a few outdated facts, and files of questions and of edit requests about them."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World()
    cases = world.edit_cases("outdated", "report")[:_QUESTIONS]
    first = cases[0]
    _picture(world, first, 0).save(folder / "photo.png")
    _picture(world, first, 1).save(folder / "another.png")
    another_picture(world, first).save(folder / "other.png")
    questions, requests = [], []
    for number, case in enumerate(cases):
        name = f"photo_{number}.png"
        _picture(world, case, 0).save(folder / name)
        another_picture(world, case).save(folder / f"other_{number}.png")
        record = world.question(case.fact)
        question = {"image": name, "question": record.text, "constraint": record.constraint}
        questions.append(question | {"corrupt": f"swap:other_{number}.png"})
        requests.append({"id": case.fact.id} | question | {"target": case.target, "old": record.answer})
    _write_lines(folder / "questions.jsonl", questions)
    _write_lines(folder / "requests.jsonl", requests[:_REQUESTS])


def _picture(world: World, case: EditCase, number: int) -> Image.Image:
    return world.picture(world.entities[case.fact.entity], number).image


def _write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["examples"]:
        write_examples(EXAMPLES)
        print(f"wrote {EXAMPLES}")
    else:
        PAGE.write_text(reference(), encoding="utf-8")
        print(f"wrote {PAGE}")
