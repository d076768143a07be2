"""Files of `multrace flow`: results with their pictures, and what is kept of each question for a later call."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..artefacts.files import digest
from ..artefacts.folders import ArtefactError
from ..data import tiny_vlm_path
from ..models import Prompt
from ..tracing import TraceError
from .flow_questions import FlowQuestion
from .flow_reading import Files, Reading
from .options.flow import FlowOptions
from .outputs import new_files

QUESTIONS = "questions"
_ANSWER = "answer.json"


def write_files(folder: Path, files: Files, *, stale: Iterable[str] = ()) -> list[Path]:
    """Write all of the files or none, and return them; older files whose names are in `stale` are removed."""
    with new_files(folder, stale=sorted(stale)) as work:
        for name, write in files.items():
            write(work / name)
    return [folder / name for name in files]


def result_files(reading: Reading, result: Any, prompt: Prompt) -> dict[str, Any]:
    """Return a result's own file and its pictures, as `write_files` takes them."""
    return {reading.file: result.save, **reading.files(result, prompt)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What is kept of one question, and everything that it depends on."""

    folder: Path
    asked: dict[str, Any]
    """Model, question and the content of its picture."""
    engine: str
    """The name of the engine."""

    def answer(self) -> str | None:
        """Return the model's answer, if an earlier call asked the same question."""
        try:
            known = json.loads((self.folder / _ANSWER).read_text(encoding="utf-8"))
            return known["answer"] if known["asked"] == _plain(self.asked) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def keep_answer(self, answer: str) -> None:
        """Write the model's answer."""
        text = _text({"asked": self.asked, "answer": answer})
        write_files(self.folder, {_ANSWER: lambda path: path.write_text(text, encoding="utf-8")})

    def result(self, reading: Reading, generated: str) -> Any:
        """Return the result of an earlier call with these settings if it is complete, else None."""
        try:
            known = (self.folder / _identity_file(reading)).read_text(encoding="utf-8")
            is_same = known == self._identity(reading, generated)
            return reading.kind.load(self.folder / reading.file) if is_same else None
        except (OSError, UnicodeDecodeError, TraceError, ArtefactError):
            return None

    def keep_result(self, reading: Reading, result: Any, prompt: Prompt, generated: str) -> None:
        """Write a result, and its pictures if there will be no average to draw."""
        files = {reading.file: result.save} if reading.has_average else result_files(reading, result, prompt)
        text = self._identity(reading, generated)
        files |= {_identity_file(reading): lambda path: path.write_text(text, encoding="utf-8")}
        write_files(self.folder, files, stale=reading.drawings)

    def _identity(self, reading: Reading, generated: str) -> str:
        """Everything that a result depends on."""
        engine = {"engine": self.engine} if reading.uses_engine else {}
        return _text({**self.asked, "generated": generated, **reading.settings(), **engine})


def kept_questions(
    settings: FlowOptions, questions: Sequence[FlowQuestion], *, folder: Path, engine: str
) -> dict[FlowQuestion, Kept]:
    """Return, for each question, where its results are kept: in its own folder within this one."""
    model, found, taken = _model_identity(settings), {}, set()
    for question in questions:
        name = _folder_name(question.id, taken)
        taken.add(name.lower())
        asked = {**model, **_question_identity(question)}
        found[question] = Kept(folder=folder / QUESTIONS / name, asked=asked, engine=engine)
    return found


def _folder_name(identifier: str, taken: set[str]) -> str:
    """The id as a folder name that is valid everywhere and not yet taken."""
    plain = re.sub(r"[^\w.-]+", "_", identifier).strip("._")[:80] or "question"
    name, number = plain, 1
    while name.lower() in taken:
        number += 1
        name = f"{plain}_{number}"
    return name


def _model_identity(settings: FlowOptions) -> dict[str, Any]:
    """The model and, for a directory, the sizes and dates of its files, since another model may replace it."""
    directory = tiny_vlm_path() if settings.model is None else Path(settings.model)
    files = sorted(path for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []
    states = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    return {"model": settings.model, "revision": settings.revision, "dtype": settings.dtype, "files": states}


def _question_identity(question: FlowQuestion) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "picture": None if question.image is None else _digest(question.image),
        "spans": dict(question.spans),
        "boxes": [[box.left, box.top, box.right, box.bottom, box.image] for box in question.boxes],
        "gold": question.gold,
        "foil": question.foil,
    }


def _digest(image: Image.Image | Path) -> str:
    """A sha256 of the picture's content."""
    if isinstance(image, Path):
        return digest(image.read_bytes())
    return digest(f"{image.mode} {image.size}", image.tobytes())


def _identity_file(reading: Reading) -> str:
    return f"{reading.name}.json"


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(_text(value))


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"
