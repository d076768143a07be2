"""Requests to edit as a model sees them: prompts, answers, headers and variants of a picture; the error of this room.

Variants of a request's own picture make an edit key on what is seen and not on one rendering of it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from PIL import Image, ImageChops, ImageEnhance, ImageStat
from tqdm import tqdm

from ..data.facts import EditRequest, Question
from ..models import Continuation, NotFiniteError, Prompt, VisionLanguageModel, open_images

EDITED = "edited"
"""What became of a request: its edit was made, and the model answers its question with the target."""
NOT_GENERATED = "not generated"
"""Its edit was made, but the model does not answer its question with the target."""
NOTHING_TO_DO = "nothing to do"
FAILED = "failed"
"""Followed by the reason."""
MARKS = ".,;:!?\n"
"""Characters that end an answer."""
SENTENCE_ENDS = ".!?"
"""Those of them after which a text goes on with a new sentence."""
_PARTS = ("contexts", "rewrite_prompts", "preserve_prompts", "essence")
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class EditError(ValueError):
    """An edit that cannot be made, applied, undone, saved or loaded: what was asked, what was found, what to do."""


def request_text(request: EditRequest) -> dict[str, str]:
    """Return the request as text, for the header of a saved edit: how often there is a picture, and where it lies."""
    counts = {part: str(len(getattr(request, part))) for part in _PARTS}
    question = request.question
    paths = [_shown_path(str(image)) for image in question.images if not isinstance(image, Image.Image)]
    asked = {"template": question.template} if question.template is not None else {}
    if question.images:
        asked["pictures"] = str(len(question.images))
        asked |= {"image": paths[0]} if len(paths) == len(question.images) == 1 else {}
    return {"name": request.id, "question": question.text, "target": request.target, **counts, **asked}


def _shown_path(path: str) -> str:
    """Return a path as text that any file can hold: a name that is not in UTF-8 gets a mark for each foreign byte."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


def edited_questions(request: EditRequest) -> tuple[Question, ...]:
    """Return all questions that must get the target: the request's own, its contexts and its rewrite prompts."""
    return (request.question, *request.contexts, *request.rewrite_prompts)


def listed_requests(requests: Sequence[EditRequest]) -> tuple[EditRequest, ...]:
    """Return the requests as a tuple. Raises `EditError` if there are none, or if something else stands among them."""
    if isinstance(requests, EditRequest) or not isinstance(requests, Iterable):
        raise EditError(f"the requests are of type {type(requests).__name__}; pass a list of EditRequest")
    listed = tuple(requests)
    if not listed:
        raise EditError("no requests to edit; pass at least one EditRequest")
    if foreign := [request for request in listed if not isinstance(request, EditRequest)]:
        raise EditError(f"among the requests is one of type {type(foreign[0]).__name__}; pass a list of EditRequest")
    return listed


def room_for_targets(vlm: VisionLanguageModel, requests: Sequence[EditRequest]) -> int:
    """Return a length in tokens for answers that leaves room for every target and a little more.

    A target that the model goes on after is then seen to go on.
    """
    return 4 + max(len(vlm.prompt_for(request.question).answer_tokens(request.target)) for request in requests)


def answers_where_finite(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    transform: Callable[[Prompt], Prompt] | None = None,
    progress: bool = False,
) -> list[str | None]:
    """Return the model's answers, None for questions whose logits are not finite.

    Prompts are made batch by batch. max_new_tokens: the maximum length of an answer, which is shorter where the model
    has no more positions. transform: what turns each prompt into the one that the model is given.
    """
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    found = continuations_where_finite(vlm, questions, **sizes, transform=transform, progress=progress)
    return [_answer_of(each) for each in found]


def continuations_where_finite(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    transform: Callable[[Prompt], Prompt] | None = None,
    progress: bool = False,
) -> list[Continuation | None]:
    """Return what the model says, as `answers_where_finite` does, with how it goes on and whether it stops."""
    found: list[Continuation | None] = []
    bar = tqdm(total=len(questions), desc="answering", unit="question", disable=not progress, leave=False)
    with bar:
        for prompts in prompt_batches(vlm, questions, batch_size):
            prompts = prompts if transform is None else [transform(prompt) for prompt in prompts]
            found += _with_room(vlm, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
            bar.update(len(prompts))
    return found


def _with_room(
    vlm: VisionLanguageModel, prompts: Sequence[Prompt], *, max_new_tokens: int, **options: Any
) -> list[Continuation | None]:
    """As `_continuations`; a prompt after which the model has fewer positions left is asked alone, for that many."""
    rooms = [max_new_tokens if vlm.positions is None else max(1, vlm.positions - prompt.length) for prompt in prompts]
    together = [prompt for prompt, room in zip(prompts, rooms, strict=True) if room >= max_new_tokens]
    found = iter(_continuations(vlm, together, max_new_tokens=max_new_tokens, **options) if together else [])
    return [
        next(found) if room >= max_new_tokens else _continuations(vlm, [prompt], max_new_tokens=room)[0]
        for prompt, room in zip(prompts, rooms, strict=True)
    ]


def prompt_batches(vlm: VisionLanguageModel, questions: Sequence[Question], batch_size: int) -> Iterator[list[Prompt]]:
    """Yield the prompts of the questions, as many at a time as are run together."""
    for start in range(0, len(questions), batch_size):
        yield [vlm.prompt_for(question) for question in questions[start : start + batch_size]]


def prompt_answers(vlm: VisionLanguageModel, prompts: Sequence[Prompt], **options: Any) -> list[str | None]:
    """Return the model's answers, None for prompts whose logits are not finite; the options are those of `answers`.

    One prompt that overflows costs only itself: the others are asked again, one by one.
    """
    return [_answer_of(each) for each in _continuations(vlm, prompts, **options)]


def _continuations(vlm: VisionLanguageModel, prompts: Sequence[Prompt], **options: Any) -> list[Continuation | None]:
    try:
        return list(vlm.continuations(prompts, **options))
    except NotFiniteError:
        if len(prompts) == 1:
            return [None]
        return [found for prompt in prompts for found in _continuations(vlm, [prompt], **options)]


def _answer_of(found: Continuation | None) -> str | None:
    return None if found is None else found.text.strip()


def end_of_answer(text: str, start: int = 1) -> int:
    """Return the place of the first mark from a place on that ends an answer, or the length of the text for none.

    A mark inside a number or a name, as in 1,000 or 10:30, ends nothing.
    """
    return next(
        (
            place
            for place in range(start, len(text))
            if text[place] in MARKS and (text[place] == "\n" or not text[place + 1 : place + 2].isalnum())
        ),
        len(text),
    )


def says_target(said: str, target: str) -> bool:
    """Return whether an answer is the target, or goes on after the target with a mark that ends it.

    A model that continues texts says "Canberra. It is" where a model that answers questions says "Canberra".

    Example:
        >>> from multrace.editing.requests import says_target
        >>> says_target("Canberra. It is", "Canberra"), says_target("Canberra Island", "Canberra")
        (True, False)
    """
    said, target = said.strip(), target.strip()
    if said == target or not said.startswith(target):
        return said == target
    is_sentence = target[-1:] in SENTENCE_ENDS and said[len(target)].isspace()
    return is_sentence or end_of_answer(said, len(target)) == len(target)


def with_answers_seen(vlm: VisionLanguageModel, change: Any, requests: Sequence[EditRequest]) -> Any:
    """Return the change with what its requests' own questions show: one that is not answered with its target is not
    "edited" but "not generated", with what the model `says` instead and the `probability` of the target.

    vlm: The model without the change, which it has for the length of the questions.
    """
    edited = [index for index, report in enumerate(change.requests) if report.get("status") == EDITED]
    if not edited or len(change.requests) != len(requests):
        return change
    reports = [dict(report) for report in change.requests]
    own, transform = [requests[index] for index in edited], getattr(change, "prompt_transform", None)
    with change.applied(vlm):
        for index, request, prompt in zip(edited, own, _asked_prompts(vlm, own, transform), strict=True):
            longest = 4 + len(prompt.answer_tokens(request.target))
            said = _answer_of(_with_room(vlm, [prompt], max_new_tokens=longest)[0])
            if said is None or not says_target(said, request.target):
                probability = target_probability(vlm, prompt.with_answer(request.target))
                probability = probability if isfinite(probability) else 0.0  # a model that overflows says nothing
                reports[index] |= {"status": NOT_GENERATED, "says": said or "", "probability": probability}
    return replace(change, requests=tuple(reports))


@torch.no_grad()
def target_probability(vlm: VisionLanguageModel, prompt: Prompt) -> float:
    """Return the probability of all tokens of the prompt's answer, without the end of the answer."""
    first = prompt.groups["answer"][0]
    logits = vlm.logits(prompt)[0, first - 1 : first - 1 + len(prompt.answer_ids)].double().log_softmax(-1)
    ids = torch.tensor(prompt.answer_ids, device=logits.device)
    return logits.gather(-1, ids[:, None]).sum().exp().item()


def _asked_prompts(
    vlm: VisionLanguageModel, requests: Sequence[EditRequest], transform: Callable[[Prompt], Prompt] | None
) -> Iterator[Prompt]:
    """Yield the prompt of each request's question, as the edited model is asked."""
    for request in requests:
        prompt = vlm.prompt_for(request.question)
        yield prompt if transform is None else transform(prompt)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How many variants of a picture are made, and how far they differ from it.

    Every variant has the size of its picture. The same seed gives the same variants. On the embedded model crops and
    shifts carry an edit to other renderings, and jitters alone do nothing. Raises `EditError` for a setting out of
    range.
    """

    crops: int = 2
    """Number of random cutouts with the shape of the picture, enlarged to its size again."""
    jitters: int = 1
    """Number of variants in brightness, contrast and colour."""
    shifts: int = 2
    """Number of variants moved sideways and up or down, with the gap filled with the mean colour of the picture."""
    smallest: float = 0.8
    """Side of the smallest crop as a share of the side of the picture, above 0 and at most 1."""
    strength: float = 0.15
    """Brightness, contrast and colour are multiplied by a factor between 1 - strength and 1 + strength."""
    reach: float = 0.12
    """Longest shift in each direction as a share of the side of the picture, at least 0 and below 1."""
    seed: int = 0
    """Random seed of the variants."""

    def __post_init__(self) -> None:
        ranges = {
            "crops of at least 0": self.crops >= 0,
            "jitters of at least 0": self.jitters >= 0,
            "shifts of at least 0": self.shifts >= 0,
            "smallest above 0 and at most 1": 0 < self.smallest <= 1,
            "strength of at least 0 and below 1": 0 <= self.strength < 1,
            "reach of at least 0 and below 1": 0 <= self.reach < 1,
        }
        for wanted, holds in ranges.items():
            if not holds:
                name = wanted.split()[0]
                raise EditError(f"Augmentation got {name}={getattr(self, name)}; pass {wanted}")

    def pictures(self, image: Image.Image) -> tuple[Image.Image, ...]:
        """Return the variants of an RGB picture: crops, then jitters, then shifts. The picture is not changed."""
        draw = _Draw(self.seed)
        found = [_cropped(image, draw.between(self.smallest, 1), draw) for _ in range(self.crops)]
        found += [_jittered(image, self.strength, draw) for _ in range(self.jitters)]
        found += [_shifted(image, self.reach, draw) for _ in range(self.shifts)]
        return tuple(found)

    def questions(self, question: Question) -> Iterator[Question]:
        """Yield the question with each variant of its picture in turn (of all its pictures, if it has several)."""
        variants = [self.pictures(image) for image in open_images(question.images)]
        yield from (question.with_image(images) for images in zip(*variants, strict=True))

    def of(self, request: EditRequest) -> EditRequest:
        """Return the request with variants of its question after its other contexts: keys are averaged over them.

        Raises `EditError` if the question has no picture, and `ModelError` if the picture cannot be read.
        """
        if not request.question.images:
            raise EditError(
                f"{request.question.text!r} has no picture to make variants of; pass a question with one, "
                "or leave the augmentation out"
            )
        return replace(request, contexts=(*request.contexts, *self.questions(request.question)))


class _Draw:
    """Random numbers from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()


def _cropped(image: Image.Image, share: float, draw: _Draw) -> Image.Image:
    width, height = (share * side for side in image.size)
    left, top = draw.between(0, image.width - width), draw.between(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _jittered(image: Image.Image, strength: float, draw: _Draw) -> Image.Image:
    for enhancer in _ENHANCERS:
        image = enhancer(image).enhance(draw.between(1 - strength, 1 + strength))
    return image


def _shifted(image: Image.Image, reach: float, draw: _Draw) -> Image.Image:
    right, down = (round(draw.between(-reach, reach) * side) for side in image.size)
    moved = ImageChops.offset(image, right, down)
    mean = tuple(round(channel) for channel in ImageStat.Stat(image).mean)
    if right:
        moved.paste(mean, (0, 0, right, image.height) if right > 0 else (image.width + right, 0, *image.size))
    if down:
        moved.paste(mean, (0, 0, image.width, down) if down > 0 else (0, image.height + down, *image.size))
    return moved
