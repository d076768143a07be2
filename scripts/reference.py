"""Write docs/reference.md, the reference of every public name, from the docstrings.

Run it with `python -m multrace.scripts.reference`. The sources are read and not imported. A test compares the page
with what this module makes of the present sources.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference.md"
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
        (Path(folder) / "multrace").symlink_to(root)  # griffe takes a package's name from its folder
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
    """The names that a face exports: those that its stub imports under their own name."""
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
    """The parameters, one line each where there are more than three."""
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
    """The docstring as Markdown: prose as it is, arguments as a list, examples as code."""
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
    """The documented fields and properties of a class and of its bases."""
    lines = []
    for name, attribute in member.all_members.items():
        if name.startswith("_") or not attribute.is_attribute or attribute.docstring is None:
            continue
        lines.append(f"- `{name}`: {_flowing(attribute.docstring.value)}")
    if lines:
        yield "\n".join(["**Fields and properties**", "", *lines])


def _methods(member: Any) -> Iterator[str]:
    """The public methods of a class and of its bases, each with its first sentence."""
    lines = []
    for name, method in member.all_members.items():
        if name.startswith("_") or not method.is_function or method.docstring is None:
            continue
        first = re.split(r"(?<=[.:])\s", _flowing(method.docstring.value), maxsplit=1)[0]
        lines.append(f"- `{name}{_short_signature(method)}`: {first}")
    if lines:
        yield "\n".join(["**Methods**", "", *lines])


def _short_signature(function: Any) -> str:
    """Names of the parameters only."""
    names = [parameter.name for parameter in function.parameters if parameter.name not in ("self", "cls")]
    return f"({', '.join(names)})"


def _flowing(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
