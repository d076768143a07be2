"""Damaged input of any kind: an error of ours in one line, or the same content; no traceback, hang or false content."""

import json
import random
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import multrace as mt
import pytest
import torch
from fuzz import BOMBS, RAW, Damage, entries_changed, flipped, other_header, other_json, other_line, otherwise, sections
from model_fixtures import draw_photo
from multrace.artefacts import LAYOUT, ArtefactError, Result, write_json, write_tensors
from multrace.data import DataError, EditRecord, Question, read_data, write_lines
from multrace.editing import Delta, EditCurve, EditReport, History, Moments, WeightChange, second_moments
from multrace.editing.evaluation.curves import SequencePoint
from multrace.editing.evaluation.metrics import Interval
from multrace.editing.evaluation.reports import ProbeRow
from multrace.models import ModelError
from multrace.tracing import (
    attention_saliency,
    attention_share,
    average,
    llava_cam,
)
from PIL import Image
from small_traces import ask, trace

OURS = (ArtefactError, DataError, mt.EditError, ModelError, mt.TraceError)
LONGEST, SLOWEST, LARGEST = 3000, 20.0, 400
"""Characters of an error, CPU seconds of a case, and MiB that the process may grow by in a test."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A good file of one kind."""

    path: Path
    load: Callable[[Path], object]
    use: Callable[[Any], object] = lambda value: None
    """What is done with content that was accepted."""


class Hang(BaseException):
    """A case took too long."""


@contextmanager
def limited() -> Iterator[None]:
    """A block that must end soon, with warnings off."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], object]) -> str:
    """Return "accepted" or "refused", once it is clear that the error is one of ours and one short line."""
    started = time.process_time()
    with limited():
        try:
            call()
            result = "accepted"
        except OURS as error:
            text = str(error)
            assert text and "\n" not in text.strip() and len(text) < LONGEST, text[:300]
            result = "refused"
    assert time.process_time() - started < SLOWEST
    return result


@contextmanager
def no_memory_taken() -> Iterator[None]:
    """A block after which the largest size that the process ever had is about what it was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST * 1024


def looked_at(result: Result) -> None:
    """Everything that a result shows of itself."""
    repr(result), result.to_dataframe(), result.plot()


def used(vlm: mt.VisionLanguageModel, delta: Delta) -> None:
    """An edit in use."""
    repr(delta), delta.report(delta.retained(vlm))
    with delta.applied(vlm):
        pass
    delta.without(0)


def edit_by_hand(vlm: mt.VisionLanguageModel) -> Delta:
    """An edit of two requests with random factors."""
    projection, generator = vlm.down_projection(1), torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((projection.hidden, 2), (2, projection.width)))
    owners = torch.arange(2)
    change = WeightChange(left=0.1 * left, right=right, keys=right, residuals=left.T.contiguous(), owners=owners)
    requests = tuple({"question": "Who won?", "target": name, "status": "edited"} for name in ("Ünï", "Bo"))
    return Delta(
        changes={projection.name: change},
        fingerprints=vlm.fingerprint([projection.name]),
        model=vlm.name,
        settings={"editor": "by hand"},
        requests=requests,
    )


@pytest.fixture(scope="module")
def artefacts(random_llava_llama, random_llama, tmp_path_factory) -> dict[str, Base]:
    """A file of each kind that carries a digest."""
    vlm, folder = random_llava_llama, tmp_path_factory.mktemp("bases")
    prompts = [ask(vlm, draw_photo(seed)) for seed in (1, 2)]
    traces = [trace(vlm, prompt, mt.BlankImage()) for prompt in prompts]
    results = {
        "trace": traces[0],
        "average": average(traces),
        "knockout": mt.attention_knockout(vlm, prompts[0], windows=(1,), progress=False),
        "lens": mt.logit_lens(vlm, prompts[0], positions="last"),
        "contributions": mt.attention_contributions(vlm, prompts[0]),
        "cam": llava_cam(vlm, prompts[0]),
        "share": attention_share(vlm, prompts[0]),
        "saliency": attention_saliency(vlm, prompts[0]),
        "pruning": mt.prune_image_tokens(vlm, prompts[0], progress=False),
    }
    bases = {
        name: Base(path=result.save(folder / name), load=type(result).load, use=looked_at)
        for name, result in results.items()
    }
    delta, moments = edit_by_hand(random_llama), second_moments(vlm, prompts, layers=[1], every=1)
    bases["edit"] = Base(path=delta.save(folder / "edit"), load=Delta.load, use=lambda each: used(random_llama, each))
    bases["moments"] = Base(path=moments.save(folder / "moments"), load=Moments.load, use=lambda each: each.matrix(1))
    return bases


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Base]:
    """A report and a curve, with a digest in JSON."""
    folder, band = tmp_path_factory.mktemp("reports"), Interval(mean=0.5, low=0.25, high=0.75, number=2, records=2)
    point = SequencePoint(
        edits=1, efficacy=band, generality=band, locality=band, first_holds=True, retention=1.0, growth=0.1
    )
    shared = {"model": "m", "revision": None, "statuses": {"a": "edited", "b": "failed: no"}}
    curve = EditCurve(points=(point, point), bound=0.1, exceeded_at=None, **shared)
    told = {"question": "Who?", "pictures": [], "new": "Bo", "old": "Al", "before": "Al", "after": "Bo"}
    rows = [
        ProbeRow(record=name, kind=kind, hops=None, numbers={"free generation, exact match": (0.0, 1.0)}, **told)
        for name in "ab"
        for kind in ("edited", "rephrase")
    ]
    report = EditReport(mode="sequence", settings={"seed": "0"}, rows=tuple(rows), curve=curve, **shared)
    return {
        "report": Base(path=report.save(folder / "report"), load=EditReport.load, use=lambda each: each.summary()),
        "curve": Base(path=curve.save(folder / "curve"), load=EditCurve.load, use=lambda each: each.summary()),
    }


def history_files(vlm: mt.VisionLanguageModel, folder: Path) -> list[Base]:
    """The index of a history of two edits, and the file of one of them; a damaged copy takes its place."""

    def opened(_: Path) -> History:
        history = History.open(folder)
        assert history.names and [entry.delta for entry in history.entries]
        return history

    first, second = (replace(edit_by_hand(vlm), settings={"editor": name}) for name in "ab")
    History.open(folder).added("a", first).added("b", second).without("a", request=0)
    paths = [folder / "index.jsonl", min(folder.glob("*.safetensors"))]
    return [Base(path=path, load=opened, use=lambda history: history.composed()) for path in paths]


def damage(base: Base, makers: tuple[Damage, ...], count: int, seed: int, *, place: Path | None = None) -> Counter:
    """Return how often a damaged copy of a file was accepted and refused; what was accepted has to be usable."""
    content, rng, counts = base.path.read_bytes(), random.Random(f"{seed} {base.path.name}"), Counter()
    path = place or base.path.with_name(f"damaged_{base.path.name}")
    for _ in range(count):
        changed = rng.choice(makers)(content, rng)
        if changed == content:
            continue
        path.write_bytes(changed)
        counts[outcome(lambda: base.use(base.load(path)))] += 1
        path.write_bytes(content)
    return counts


# Files with a digest


@pytest.mark.parametrize("kind", ["trace", "average", "knockout", "edit", "moments"])
def test_a_damaged_file_is_refused(artefacts, kind):
    with no_memory_taken():
        assert damage(artefacts[kind], (*RAW, other_header), 24, seed=1).keys() == {"refused"}


@pytest.mark.slow
def test_every_damaged_file_is_refused(artefacts, reports):
    with no_memory_taken():
        for base in (*artefacts.values(), *reports.values()):
            assert damage(base, RAW, 200, seed=2).keys() == {"refused"}
        for base in artefacts.values():
            assert damage(base, (other_header,), 100, seed=3).keys() == {"refused"}
        for base in reports.values():
            assert damage(base, (other_json,), 100, seed=4).keys() == {"refused"}


@pytest.mark.slow
def test_two_hundred_flipped_bits_of_each_part_of_each_file_are_refused(artefacts, reports):
    for base in artefacts.values():
        content, rng = base.path.read_bytes(), random.Random(f"bits of {base.path.name}")
        for name, start, end in sections(content):
            for _ in range(64 if name == "length" else 200):
                path = base.path.with_name("bit")
                path.write_bytes(flipped(content, rng, start, end))
                assert outcome(partial(base.load, path)) == "refused", name
    for base in reports.values():
        assert damage(base, (flipped,), 200, seed=5) == {"refused": 200}


def test_a_flipped_bit_in_a_history_is_refused_and_other_damage_is_no_traceback(random_llama, tmp_path):
    """An index that was cut short stands for a history that is shorter; any other damage of it is an error."""
    for base in history_files(random_llama, tmp_path):
        assert damage(base, (flipped,), 40, seed=5, place=base.path) == {"refused": 40}
        makers = (*RAW, other_line) if base.path.suffix == ".jsonl" else (*RAW, other_header)
        damage(base, makers, 60, seed=5, place=base.path)


def rewritten(base: Base, count: int, seed: int) -> Counter:
    """As `damage`, of files that a program with a bug has written: one entry is another, and the digest is right."""
    rng, counts = random.Random(f"{seed} {base.path.name}"), Counter()
    path = base.path.with_name(f"rewritten_{base.path.name}")
    for _ in range(count):
        if base.path.read_bytes().startswith(b"{"):
            whole = json.loads(base.path.read_text())
            content = otherwise({name: value for name, value in whole.items() if name not in ("digest", LAYOUT)}, rng)
            if "\\ud" not in json.dumps(content):
                write_json(path, whole[LAYOUT], content)
        else:
            write_tensors(path, *entries_changed(base.path, rng))
        counts[outcome(lambda: base.use(base.load(path)))] += 1
    return counts


@pytest.mark.parametrize("kind", ["trace", "edit", "moments"])
def test_a_file_with_wrong_entries_is_refused_or_can_be_used(artefacts, kind):
    assert rewritten(artefacts[kind], 15, seed=6)["refused"] > 5


@pytest.mark.slow
def test_every_file_with_wrong_entries_is_refused_or_can_be_used(artefacts, reports):
    with no_memory_taken():
        for base in (*artefacts.values(), *reports.values()):
            assert rewritten(base, 120, seed=7)["refused"] > 30


# Files of records


def lines(folder: Path) -> Path:
    """A file of our own lines: a question, and edits with probes."""
    for number in range(2):
        Image.new("RGB", (8, 8), (90 * number, 0, 0)).save(folder / f"{number}.png")
    first, second = (folder / f"{number}.png" for number in range(2))
    asked = Question(text="Who founded the company in this photo?", image=first, constraint="the company")
    edit = EditRecord(id="e", question=asked, target="Ada", old="Bo")
    return write_lines(folder / "lines.jsonl", [asked, edit])


ROW = {
    "src": "What animal is on the mat?", "pred": "dog", "rephrase": "Which animal lies on the mat?", "alt": "otter",
    "image": "0.png", "image_rephrase": "1.png", "loc": "nq question: who painted the blue door",
    "loc_ans": "Nobody Known", "m_loc": "1.png", "m_loc_q": "What sport is this?", "m_loc_a": "curling",
}  # fmt: skip
CSV = (
    "semantic,entailed,equivalent,question,imageId,isBalanced,groups,answer,semanticStr,annotations,types,"
    "fullAnswer,object,bbox\n"
)


def record_files(folder: Path) -> dict[str, Base]:
    """Files of records of several forms."""
    (folder / "evqa.json").write_text(json.dumps([ROW, ROW | {"alt": "seal"}]))
    read = lambda path: list(read_data(path, images=folder))  # noqa: E731
    paths = {"lines": lines(folder), "JSON array": folder / "evqa.json"}
    return {name: Base(path=path, load=read) for name, path in paths.items()}


@pytest.mark.parametrize("form", ["lines", "JSON array"])
def test_a_damaged_file_of_records_costs_an_error_or_its_rows(form, tmp_path):
    base, makers = record_files(tmp_path)[form], (*RAW, other_line if form == "lines" else other_json)
    with no_memory_taken():
        damage(base, makers, 40, seed=8)
        damage(base, tuple(lambda *_, bomb=bomb: bomb for bomb in BOMBS), 10, seed=8)


@pytest.mark.slow
def test_damaged_files_of_records_cost_an_error_or_their_rows(tmp_path):
    with no_memory_taken():
        for form, base in record_files(tmp_path).items():
            damage(base, (*RAW, *3 * (other_line if form == "lines" else other_json,)), 700, seed=9)


# Pictures (test_models_mutations.py has the models)


def pictures(folder: Path, photo: Image.Image) -> list[Path]:
    """The picture in each format."""
    formats = ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "ico", "jp2")
    for suffix in formats:
        photo.save(folder / f"photo.{suffix}")
    exif = Image.Exif()
    exif[274], exif[271] = 6, "camera"
    photo.save(folder / "turned.jpg", exif=exif)
    return sorted(folder.iterdir())


def damage_pictures(vlm: mt.VisionLanguageModel, paths: list[Path], folder: Path, count: int, seed: int) -> None:
    for path in paths:
        head = lambda data, rng: flipped(data, rng, 0, min(200, len(data)))  # noqa: E731
        base = Base(path=path, load=lambda each: vlm.prompt(each, "What is this?"))
        damage(base, (*RAW, head, head), count, seed=seed, place=folder / path.name)


def test_a_damaged_picture_is_an_error_of_ours_or_a_picture(random_llava_llama, photo, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "good").mkdir()
    with no_memory_taken():
        damage_pictures(random_llava_llama, pictures(tmp_path / "good", photo), tmp_path / "damaged", 5, seed=10)


@pytest.mark.slow
def test_damaged_pictures_are_errors_of_ours_or_pictures(random_llava_llama, photo, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "good").mkdir()
    with no_memory_taken():
        damage_pictures(random_llava_llama, pictures(tmp_path / "good", photo), tmp_path / "damaged", 120, seed=11)
