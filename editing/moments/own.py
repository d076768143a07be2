"""Second moments of a model's own samples: what editors weigh old keys by unless they are given others.

They cost no corpus: the model itself samples what it is likely to read and write. They are kept in the user's cache.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ...artefacts import ArtefactError, cache_folder, one_at_a_time, read_json, write_json
from ...data.facts import PictureSource, Question
from ...models import VisionLanguageModel
from ..requests import EditError
from .collect import Written, projection_of, second_moments
from .moments import OWN, Moments, hash_of_settings, written_by
from .samples import (
    QUESTIONS,
    QUIET_SECONDS,
    OwnPrompts,
    Row,
    answer_rows,
    mixed,
    pictures_to_ask_about,
    prompt_of,
    text_rows,
)

logger = logging.getLogger("multrace")
LEAST, MOST = 200, 1000
"""Numbers of samples between which the width of the keys decides."""
PER_WIDTH = 4
"""Number of tokens for each entry of a key, which so many samples are to have."""
MOST_BYTES = 20 * 2**30
"""Size of the cache of own moments above which what was not used for longest is removed."""
_LAYOUT = "multrace own samples 1"
_FOLDER = "moments"
_NAMED = 32
"""Maximum number of layers that the name of a file lists."""


class OwnMoments:
    """The second moments of a model's own samples, which are made when layers are first asked for.

    It samples once, however many layers are asked for, and keeps samples and moments in the user's cache. What it gives
    is of the model as it was when it was first asked; later it refuses a model with other weights.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        *,
        pictures: str | Path | Sequence[PictureSource] = (),
        questions: Sequence[str] = (),
        number: int | None = None,
        tokens: int = 48,
        seed: int = 0,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        """Note what to sample; the arguments are those of `own_moments`."""
        if number is not None and number < 1:
            raise EditError(f"own moments of number={number} samples; pass at least 1, or None")
        self.vlm, self.progress = vlm, progress
        self.pictures, self.questions = pictures_to_ask_about(pictures), tuple(questions) or QUESTIONS
        self.number, self.tokens, self.seed = number, tokens, seed
        self._cache = Path(cache).expanduser() if cache is not None else cache_folder() / _FOLDER
        self._is_shared = cache is None
        """Whether the cache is that of the user, which holds nothing else, so that old folders may go."""
        self._weights: str | None = None
        self._found: dict[tuple[tuple[int, ...], str], Moments] = {}

    def __repr__(self) -> str:
        pictures = f", {len(self.pictures)} pictures" if self.pictures else ""
        return f"OwnMoments of {self.vlm.name!r} ({self.tokens} tokens a sample{pictures}, seed {self.seed})"

    def of(
        self, layers: Sequence[int] | None = None, *, projection: Written = "mlp", expert: int | None = None
    ) -> Moments:
        """Return the moments of these layers, from the cache if they are there; the arguments are `own_moments`'s.

        Raises `EditError` if the model's weights are no longer those of the first call, or as `second_moments`.
        """
        layers = range(self.vlm.layers) if layers is None else layers
        wanted = tuple(sorted({self.vlm.layer_index(layer) for layer in layers}))
        read = written_by(projection, expert)
        with self.vlm.lock:
            self._check_weights()
            if (wanted, read) not in self._found:
                self._found[wanted, read] = self._made(wanted, projection, expert)
            return self._found[wanted, read]

    def _made(self, layers: tuple[int, ...], projection: Written, expert: int | None) -> Moments:
        """Moments that are read from the cache, or made and kept there; another process that makes them comes first."""
        names = "-".join(map(str, layers))
        names = names if len(layers) <= _NAMED else hash_of_settings(layers=layers)[:32]
        path = self._folder / f"{written_by(projection, expert)}-{names}.safetensors"
        if (kept := _kept(path)) is not None:
            self._keep(lambda: os.utime(self._folder.parent))
            return kept
        with self._alone():
            if (kept := _kept(path)) is not None:
                return kept
            prompts = OwnPrompts(self.vlm, self._samples(self._wanted(layers, projection, expert)))
            options = {"layers": layers, "projection": projection, "expert": expert, "progress": self.progress}
            moments = second_moments(self.vlm, prompts, **options)
            own = {OWN: f"{len(prompts)} samples of {self.tokens} tokens, seed {self.seed}"}
            moments = replace(moments, settings={**moments.settings, **own})
            if self._keep(lambda: moments.save(path)):
                if self._is_shared:
                    self._keep(lambda: _make_room(self._cache, self._folder.parent))
                return _kept(path) or moments  # the sums in a file are read as they are needed
            return moments

    def _wanted(self, layers: tuple[int, ...], projection: Written, expert: int | None) -> int:
        """The number of tokens that the samples are to have; 0 for a fixed number of samples."""
        if self.number is not None:
            return 0
        read = written_by(projection, expert)
        return PER_WIDTH * max(projection_of(self.vlm, layer, read).width for layer in layers)

    def _samples(self, wanted: int) -> tuple[Row, ...]:
        """Samples of the model: a fixed number, or until there are enough tokens, within limits."""
        rows: list[Row] = []
        tokens, goal = 0, self.number or LEAST
        drawn = mixed(self._texts, self._answers)
        bar = tqdm(desc="sampling texts", total=goal, unit="text", delay=QUIET_SECONDS, leave=False,
                   disable=not self.progress)  # fmt: skip
        with bar:
            while len(rows) < goal:
                rows.append(next(drawn))
                bar.update()
                tokens += prompt_of(self.vlm, rows[-1]).length if wanted else 0
                if len(rows) == goal < MOST and tokens < wanted:
                    bar.total = goal = min(MOST, -(-goal * wanted // tokens))
        for stream in (self._texts, self._answers):
            if stream is not None:
                self._keep(stream.save)
        return tuple(rows)

    def _check_weights(self) -> None:
        digest = self.vlm.weights_digest(progress=self.progress)
        self._weights = self._weights or digest
        if digest != self._weights:
            raise EditError(
                f"the moments of the own samples of '{self.vlm.name}' are of weights {self._weights[:12]}, and the "
                f"model has {digest[:12]} now; take edits out first, or make new ones with own_moments(vlm)"
            )

    @cached_property
    def _texts(self) -> "_Stream":
        """The texts that the model samples, which it samples once for all pictures."""
        texts = {"tokens": self.tokens, "seed": self.seed}
        return _Stream(self._of_samples(()) / "texts.json", (), lambda: text_rows(self.vlm, self.questions, **texts))

    @cached_property
    def _answers(self) -> "_Stream | None":
        """Its answers about the pictures."""
        if not self.pictures:
            return None
        asked = {"tokens": self.tokens, "seed": self.seed}
        rows = lambda: answer_rows(self.vlm, self.pictures, self.questions, **asked)  # noqa: E731
        return _Stream(self._of_samples(self.pictures) / "answers.json", self.pictures, rows)

    @cached_property
    def _folder(self) -> Path:
        """The folder of the moments."""
        return self._of_samples(self.pictures) / (f"of-{self.number}" if self.number is not None else "of-enough")

    def _of_samples(self, pictures: Sequence[PictureSource]) -> Path:
        """The folder of samples about these pictures, named by all that they depend on."""
        settings = {
            "weights": self._weights,
            "pictures": [Question(text=QUESTIONS[0], image=picture).key for picture in pictures],
            "questions": self.questions,
            "tokens": self.tokens,
            "seed": self.seed,
            "device": self.vlm.device.type,
            "attention": self.vlm.config._attn_implementation,
        }
        return self._cache / hash_of_settings(layout=_LAYOUT, **settings)[:32]

    def _alone(self) -> AbstractContextManager[None]:
        """A block that one process at a time enters; those that hold one model together enter it together."""
        if self.vlm.processes > 1 or not self._keep(lambda: self._folder.mkdir(parents=True, exist_ok=True)):
            return nullcontext()
        return one_at_a_time(self._folder / "moments")

    def _keep(self, write: Callable[[], object]) -> bool:
        """Write something to the cache, which only saves time: that it cannot be written is a warning."""
        try:
            write()
        except (ArtefactError, EditError, OSError) as error:
            logger.warning("the moments of own samples are not kept: %s", error)
            return False
        return True


class _Stream:
    """Samples that are read from a file as far as they are there, and drawn after that."""

    def __init__(self, path: Path, pictures: Sequence[PictureSource], draw: Callable[[], Iterator[Row]]) -> None:
        self._path, self._pictures, self._draw = path, pictures, draw
        self._rows = self._read()
        self._kept = len(self._rows)
        self._more: Iterator[Row] | None = None

    def __iter__(self) -> Iterator[Row]:
        place = 0
        while True:
            if place == len(self._rows):
                self._more = self._more or islice(self._draw(), place, None)
                self._rows.append(next(self._more))
            yield self._rows[place]
            place += 1

    def save(self) -> None:
        """Write the samples, if there are new ones. Raises `ArtefactError` if that fails."""
        if len(self._rows) > self._kept:
            write_json(self._path, _LAYOUT, {"samples": list(map(self._plain, self._rows))})
            self._kept = len(self._rows)

    def _read(self) -> list[Row]:
        if not self._path.is_file():
            return []
        try:
            return list(map(self._row, read_json(self._path, _LAYOUT)["samples"]))
        except (ArtefactError, KeyError, TypeError, ValueError, IndexError) as error:
            logger.warning("sampling texts anew: %s", error)
            return []

    def _row(self, kept: Mapping[str, Any]) -> Row:
        image = None if kept["picture"] is None else self._pictures[kept["picture"]]
        return Question(text=kept["text"], template=kept["template"], image=image), kept["answer"]

    def _plain(self, row: Row) -> dict[str, Any]:
        question, answer = row
        picture = self._place(question.images[0]) if question.images else None
        return {"text": question.text, "template": question.template, "picture": picture, "answer": answer}

    def _place(self, image: PictureSource) -> int:
        """The number of a picture; pictures in memory are compared as objects."""
        return next(
            place
            for place, own in enumerate(self._pictures)
            if own is image or (isinstance(own, Path) and own == image)
        )


def _make_room(cache: Path, used: Path) -> None:
    """Remove the folders of samples that were not used for longest, while all together are above the limit."""
    os.utime(used)
    folders = sorted((path for path in cache.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders]
    for folder, size in zip(folders, list(sizes), strict=True):
        if sum(sizes) <= MOST_BYTES or folder == used:
            return
        shutil.rmtree(folder, ignore_errors=True)
        sizes.remove(size)


def own_moments(
    vlm: VisionLanguageModel,
    *,
    layers: Sequence[int] | None = None,
    projection: Written = "mlp",
    expert: int | None = None,
    pictures: str | Path | Sequence[PictureSource] = (),
    questions: Sequence[str] = (),
    number: int | None = None,
    tokens: int = 48,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Moments:
    """Return the second moments of what projections read in the model's own samples (`own_prompts`).

    They are `second_moments` of `own_prompts`, in the same precision: products in float32 (float64 for a float64
    model), sums in float64. Samples and moments are kept in the cache by a hash of the weights, the pictures and all
    settings, so that a second call runs no model.

    Args:
        vlm: The unedited model.
        layers: The layers that an edit changes, negative from the end; None for all, which takes much memory.
        projection: "mlp" or "attention", as in `second_moments`.
        expert: A routed expert, as in `second_moments`.
        pictures: Pictures to ask about, or a folder of them. Without any, no image token is among the keys.
        questions: What to ask about the pictures; by default a few general questions.
        number: The number of samples. None takes at least 200, and up to 1000 as long as they have fewer than four
            tokens for each entry of a key. A moment of fewer tokens than that can lack directions; a thousandth of the
            median square of an entry, as a ridge, lets editors use it all the same (`ClosedFormSettings.cost`).
        tokens: Maximum length of a text or an answer in tokens.
        seed: Random seed of the samples.
        cache: The folder in which samples and moments are kept; None for `moments` in the user's cache
            (`artefacts.cache_folder`). It may be deleted at any time; above 20 GiB, what was not used for longest goes.
        progress: Show progress bars for what takes more than two seconds.

    Returns:
        The moments, apart for image, question and template tokens.

    Raises:
        EditError: A number is out of range, or as `second_moments`.
        ModelError: A layer does not exist, or a picture cannot be read.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> moments = mt.editing.own_moments(vlm, layers=[5], number=8)
        >>> moments.layers, moments.prompts
        ((5,), 8)
    """
    given = {"pictures": pictures, "questions": questions, "number": number, "tokens": tokens, "seed": seed}
    return OwnMoments(vlm, **given, cache=cache, progress=progress).of(layers, projection=projection, expert=expert)


def _kept(path: Path) -> Moments | None:
    if not path.is_file():
        return None
    try:
        return Moments.load(path)
    except EditError as error:
        logger.warning("making the moments of own samples anew: %s", error)
        return None


MomentSource = Moments | OwnMoments | Literal[False] | None
"""What editors weigh old keys by: moments, those of own samples with settings, none at all, or by default (None) those
of own samples about the pictures at hand."""
