"""Write the example pictures and records of the documentation from the built-in world.

Run it with `python -m multrace.scripts.examples`. A test compares docs/examples with what this module makes.
"""

import json
from pathlib import Path

from PIL import Image

from ..data import World
from ..data.world import EditCase, another_picture

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "examples"
_QUESTIONS, _REQUESTS = 6, 3


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
    write_examples(FOLDER)
    print(f"wrote {FOLDER}")
