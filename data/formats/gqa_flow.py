"""Reader of the six GQA subsets of the cross-modal information-flow study (arXiv 2411.18620): questions with boxes.

The objects asked about are spans of the question: "object" is the first, "object2" the second; "true_option" and
"false_option" are the two offered answers, each as the question writes it. A span is left out where the question does
not say it as whole words (case ignored), or says it more than once: "the picture" may be an object in the picture or
the picture itself. The first object is the constraint, the false option the foil. Boxes are cut to the picture, beyond
which the published ones reach by a pixel here and there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import DataError, quoted
from ..facts import PixelBox, Question
from .rows import DataSource, Outcome, Row, csv_rows, each_row, json_rows, occurrences

_TASKS = {  # by the columns type_semantic and type_structural
    ("attr", "choose"): "ChooseAttr",
    ("cat", "choose"): "ChooseCat",
    ("rel", "choose"): "ChooseRel",
    ("attr", "compare"): "CompareAttr",
    ("obj", "logical"): "LogicalObj",
    ("attr", "query"): "QueryAttr",
}
_REQUIRED = ("question_id", "img_id", "question", "answer", "image_w", "image_h")
_OPTIONS = ("true option", "false option")
_OBJECTS = (("central object",), ("object1", "object2"))
_NOTHING = ("", "-", "nan")


def read_gqa_flow(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the questions of one of the six CSV files, in its order, or of all CSV files of a folder, sorted by name.

    The pictures are IMG_ID.jpg. The task (ChooseAttr, ChooseCat, ChooseRel, CompareAttr, LogicalObj or QueryAttr) and
    the size of the picture are in `extra`. A bad row costs only itself, a bad header its file; the errors name the
    file and the line.
    """
    for file in _files(source.path):
        yield from _read_file(source, file)


def _read_file(source: DataSource, file: Path) -> Iterator[tuple[int, Outcome]]:
    rows = _rows(file) if source.path.is_dir() or file.suffix.lower() == ".csv" else _json_rows(file)
    for line, outcome in each_row(rows, lambda line, row: [_question(source, row, file)]):
        yield line, DataError(f"{file}, line {line}: {outcome}") if isinstance(outcome, DataError) else outcome


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"no file or folder at {str(path)!r}; pass one of the six GQA CSV files or their folder")
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"no *.csv in the folder {str(path)!r}; pass the folder with the six GQA CSV files")
    return files


def _rows(file: Path) -> Iterator[tuple[int, Row | DataError]]:
    """Each row below the header, or what is wrong with it; one error if the whole file is wrong."""
    lines = csv_rows(file)
    line, header = next(lines, (1, DataError("the file is empty; pass a file as published")))
    if isinstance(header, DataError):
        yield line, header
        return
    header = [name.strip() for name in header]
    try:
        _check_header(header)
    except DataError as error:
        yield line, error
        return
    is_bare = True
    for line, cells in lines:
        is_bare = False
        if isinstance(cells, DataError):
            yield line, cells
        elif len(cells) != len(header):
            yield line, DataError(f"{len(cells)} cells instead of {len(header)}; is a comma or quotation mark missing?")
        else:
            yield line, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    if is_bare:
        yield line, DataError("no rows below the header; is the file whole?")


def _json_rows(file: Path) -> Iterator[tuple[int, Row | DataError]]:
    """Each row of the file as a table that was saved as JSON."""
    for number, row in json_rows(DataSource(path=file)):
        if isinstance(row, DataError):
            yield number, row
            continue
        try:
            _check_header(list(row))
        except DataError as error:
            yield number, error
            continue
        yield number, {name: "" if value is None else str(value).strip() for name, value in row.items()}


def _objects(columns: Collection[str]) -> tuple[str, ...]:
    """Return the names of the objects that the columns describe."""
    return next((names for names in _OBJECTS if f"{names[0]} name" in columns), _OBJECTS[0])


def _check_header(header: list[str]) -> None:
    objects = _objects(header)
    needed = [*_REQUIRED, *(f"{name} {part}" for name in objects for part in ("name", "x", "y", "w", "h"))]
    if any(option in header for option in _OPTIONS):
        needed += _OPTIONS
    missing = [name for name in needed if name not in header]
    if missing:
        names = ", ".join(header)
        raise DataError(
            f"no column {', '.join(map(repr, missing))} in the header {names[:200]!r}; "
            "pass a file as published, with 'central object' columns or with those of 'object1' and 'object2'"
        )


def _question(source: DataSource, row: Row, file: Path) -> Question:
    task, size = _task(row, file), (_length(row, "image_w"), _length(row, "image_h"))
    boxes = [_box(row, name, size) for name in _objects(row)]
    question = _text(row, "question")
    names = {
        f"object{number}" if number > 1 else "object": row[f"{name} name"]
        for number, name in enumerate(_objects(row), 1)
    }
    options = {name.replace(" ", "_"): _option(row, name, task) for name in _OPTIONS}
    places = {
        name: occurrences(question, words)
        for name, words in (names | options).items()
        if words is not None and words.lower() not in _NOTHING
    }
    spans = {name: said[0] for name, said in places.items() if len(said) == 1}
    return Question(
        id=_text(row, "question_id"),
        text=question,
        answer=_text(row, "answer"),
        foil=options["false_option"],
        image=source.picture(f"{_text(row, 'img_id').removesuffix('.0').removesuffix('.jpg')}.jpg"),
        constraint=spans.get("object"),
        spans=spans,
        boxes=tuple(box for box in boxes if box is not None),
        extra={"task": task, "image_size": list(size)} | {name: words for name, words in options.items() if words},
    )


def _task(row: Row, file: Path) -> str:
    """The task by the row's type, or by the file's name where the row does not say it."""
    kind = (row.get("type_semantic", ""), row.get("type_structural", ""))
    named = [task for task in _TASKS.values() if task.lower() in file.stem.lower()]
    if kind not in _TASKS and len(named) != 1:
        known = ", ".join(f"{semantic} {structural}" for semantic, structural in _TASKS)
        raise DataError(
            f"no task: type_semantic and type_structural say {' '.join(kind)!r}, looked for {known}; "
            f"and the file's name has {' and '.join(named) or 'none'} of {', '.join(_TASKS.values())}"
        )
    return _TASKS.get(kind) or named[0]


def _text(row: Row, name: str) -> str:
    if not row[name]:
        raise DataError(f"no {name}; fill it in or drop the row")
    return row[name]


def _option(row: Row, name: str, task: str) -> str | None:
    words = row.get(name, "")
    if words.lower() not in _NOTHING:
        return words
    if task.startswith("Choose"):
        raise DataError(f"no {name} in a question of {task}, which offers two answers; fill it in or drop the row")
    return None


def _box(row: Row, name: str, size: tuple[int, int]) -> PixelBox | None:
    """The part of the object's box that is inside the picture; None where the file gives none."""
    if all(row[f"{name} {side}"].lower() in _NOTHING for side in "xywh"):
        return None
    x, y, width, height = (_number(row, f"{name} {side}") for side in "xywh")
    left, top = max(math.floor(x), 0), max(math.floor(y), 0)
    right, bottom = min(math.ceil(x + width), size[0]), min(math.ceil(y + height), size[1])
    if width <= 0 or height <= 0 or left >= right or top >= bottom:
        raise DataError(
            f"the box of the {name} (x {x:g}, y {y:g}, w {width:g}, h {height:g}) is empty or outside the picture "
            f"of {size[0]} x {size[1]} pixels; mend it, or write - into its cells for no box"
        )
    return left, top, right, bottom


def _length(row: Row, name: str) -> int:
    number = _number(row, name)
    if number < 1 or number != int(number):
        raise DataError(f"{name} is {quoted(row[name])}; it should be a number of pixels, 1 or more")
    return int(number)


def _number(row: Row, name: str) -> float:
    try:
        number = float(row[name])
    except ValueError as error:
        raise DataError(f"{name} is {quoted(row[name])}; it should be a number") from error
    if not math.isfinite(number):
        raise DataError(f"{name} is {quoted(row[name])}; it should be a finite number")
    return number
