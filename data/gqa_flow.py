"""Reader of the six GQA subsets of the cross-modal information-flow study (arXiv 2411.18620): questions with boxes."""

import csv
import io
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path

from .errors import DataError
from .records import FlowRecord, PixelBox, occurrences

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
_UNDECODED = re.compile("[\ud800-\udfff]")  # what "surrogateescape" makes of bytes that are not UTF-8

Row = dict[str, str]


def read_gqa_flow(
    path: str | PathLike[str], *, images: str | PathLike[str] | None = None, problems: list[str] | None = None
) -> tuple[FlowRecord, ...]:
    """The records of one of the six CSV files, in its order, or of all CSV files of a folder, sorted by name.

    images: the folder of GQA's pictures, IMG_ID.jpg; nothing is opened, so that a missing picture is noticed where it
    is asked for. Without it the records have no picture. The object in the question (see `FlowRecord.spans`) is the
    record's constraint. Boxes are cut to the picture, beyond which the published ones reach by a pixel here and there.

    DataError with file and line for a row or file that is not as published. With `problems`, a list, these messages
    are appended to it instead, and the good rows come back: a bad row costs itself, a bad header its file.
    """
    folder = None if images is None else Path(images)
    records = []
    for file in _files(Path(path)):
        for found in _read(file, folder):
            if isinstance(found, FlowRecord):
                records.append(found)
            elif problems is None:
                raise found
            else:
                problems.append(str(found))
    return tuple(records)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"no file or folder at {str(path)!r}; pass one of the six GQA CSV files or their folder")
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"no *.csv in the folder {str(path)!r}; pass the folder with the six GQA CSV files")
    return files


def _read(file: Path, images: Path | None) -> Iterator[FlowRecord | DataError]:
    """Each row's record, or what is wrong with the row; one complaint if it is the whole file."""
    lines = _lines(file)
    line, header = next(lines, (1, csv.Error("it is empty")))
    try:
        names = _readable(header)
        objects = _check_header(names)
    except DataError as error:
        yield DataError(f"{file}, line {line}: {error}")
        return
    is_bare = True
    for line, cells in lines:
        is_bare = False
        try:
            yield _record(_row(names, _readable(cells)), file, objects, images)
        except DataError as error:
            yield DataError(f"{file}, line {line}: {error}")
    if is_bare:
        yield DataError(f"{file}, line {line}: no rows below the header; is the file whole?")


def _lines(file: Path) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The cells of each row, or why there are none, and the line where the row starts: captions run over several."""
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, error
            continue
        if cells:
            yield line, cells


def _readable(cells: list[str] | csv.Error) -> list[str]:
    if isinstance(cells, csv.Error):
        raise DataError(f"no CSV: {cells}; compare it with the published file")
    for cell in cells:
        if _UNDECODED.search(cell):
            raise DataError(f"{cell.encode('ascii', 'backslashreplace').decode()[:80]!r} is not UTF-8; save it as such")
    return cells


def _check_header(header: list[str]) -> tuple[str, ...]:
    """Names of the objects that the file's columns describe."""
    objects = next((names for names in _OBJECTS if f"{names[0]} name" in header), _OBJECTS[0])
    wanted = [*_REQUIRED, *(f"{name} {part}" for name in objects for part in ("name", "x", "y", "w", "h"))]
    if any(option in header for option in _OPTIONS):
        wanted += _OPTIONS
    missing = [name for name in wanted if name not in header]
    if missing:
        found = ", ".join(header)
        raise DataError(
            f"no column {', '.join(map(repr, missing))} in the header {found[:200]!r}; "
            "pass a file as published, with 'central object' columns or with those of 'object1' and 'object2'"
        )
    return objects


def _row(header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        raise DataError(f"{len(cells)} cells instead of {len(header)}; is a comma or a quotation mark missing?")
    return {name: cell.strip() for name, cell in zip(header, cells, strict=True)}


def _record(row: Row, file: Path, objects: tuple[str, ...], images: Path | None) -> FlowRecord:
    task, size = _task(row, file), (_length(row, "image_w"), _length(row, "image_h"))
    boxes = [_box(row, name, size) for name in objects]
    names = [row[f"{name} name"] for name in objects]
    places = [occurrences(row["question"], name) if name not in _NOTHING else [] for name in names]
    image = f"{_text(row, 'img_id')}.jpg"
    record = FlowRecord(
        id=_text(row, "question_id"),
        question=_text(row, "question"),
        answer=_text(row, "answer"),
        image=None if images is None else images / image,
        task=task,
        true_option=_option(row, "true option", task),
        false_option=_option(row, "false option", task),
        objects=tuple(found[0] if found else None for found in places),
        boxes=tuple(box for box in boxes if box is not None),
        image_size=size,
    )
    return replace(record, constraint=record.spans.get("object"))


def _task(row: Row, file: Path) -> str:
    """By the row's type; by the file's name where the row does not say it."""
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
        raise DataError(f"{name} is {row[name]!r}; it should be a number of pixels, 1 or more")
    return int(number)


def _number(row: Row, name: str) -> float:
    try:
        number = float(row[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{name} is {row[name]!r}; it should be a number of pixels")
    return number
