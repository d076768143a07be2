"""What second moments of own samples are worth in a real text model, beside those of real text and of task prompts.

Nothing is edited. A change that ROME makes at the key k of a fact moves the output at another key k' by the share
k' N k / (k N k) of what is asked for, where N is the inverse of the moment: as "leak" it is measured at the same
question about other countries, as "reach" at other wordings of the fact. Both are known from a few forward passes.
The page docs/moments.md is written from the numbers.
"""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
from cyclopts import App, Parameter
from torch import Tensor
from tqdm import tqdm

from ...artefacts import write_whole
from ...data import FlagWorld, Question
from ...data.worlds.flags import generator_of
from ...editing import Moments, own_moments, second_moments
from ...editing.solve.settings import OWN_RIDGE
from ...models import VisionLanguageModel, capture, collate
from ..main import execute
from ..options import STYLE, CommandError, ModelOptions, paragraphs
from .real_facts import TEMPLATE

EXAMPLE = """examples:
  python -m multrace.scripts.studies.moments --model ~/.cache/multrace/smollm2-135m-instruct
  python -m multrace.scripts.studies.moments --model DIR --text book.txt notes.txt --relation language --docs out
"""
app = App(name="python -m multrace.scripts.studies.moments", help=paragraphs(__doc__), help_epilogue=EXAMPLE, **STYLE)
ROOT = Path(__file__).resolve().parents[2]
NAME = "moments.md"
TOKENS = ("constraint_last", "last")
"""The tokens that are edited."""
RIDGE, OWN, TEXT, TASK, BOTH = (
    "none (ridge alone)",
    "own samples",
    "real text",
    "task prompts",
    "own and task, half each",
)
_WORDS = 40
"""Number of words of a piece of real text."""
_PIECES = 200
"""Number of pieces of real text: as many as own samples."""
_TOGETHER = 32


@dataclass(frozen=True, kw_only=True)
class StudyOptions(ModelOptions):
    """Options of the program."""

    text: Annotated[
        tuple[Path, ...],
        Parameter(help="files of real text (default: the pages in docs/)", metavar="FILE", negative_iterable=()),
    ] = ()
    relation: Annotated[str, Parameter(help="relation of the questions", metavar="NAME")] = "capital"
    layers: Annotated[
        tuple[int, ...],
        Parameter(help="layers to measure (default: seven over all)", metavar="N", negative_iterable=()),
    ] = ()
    limit: Annotated[int, Parameter(help="number of edited facts; as many others are scored", metavar="N")] = 20
    docs: Annotated[Path, Parameter(help="folder for the page", metavar="DIR")] = ROOT / "docs"

    def check(self) -> None:
        """Raise `CommandError` without a model, and for less than two facts."""
        if self.model is None:
            raise CommandError("there is no --model; pass the folder of a text model, as multrace fetch-smollm2 makes")
        if self.limit < 2:
            raise CommandError(f"--limit is {self.limit}; pass at least 2")


@dataclass(frozen=True, kw_only=True, eq=False)
class Keys:
    """What one layer reads at one token, in float64."""

    own: Tensor
    """(fact, width) for the edited facts."""
    wordings: Tensor
    """(fact, wording, width) for other wordings of each."""
    others: Tensor
    """(fact, width) for the same question about other countries."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one price of a change gives, on average over the edited facts."""

    leak: float
    """Size of the share of the change that reaches the same question about others, on average over these."""
    worst: float
    """The largest of these shares, over the others."""
    reach: float
    """The share that reaches other wordings of the fact."""
    size: float
    """Norm of the change, as a multiple of that of the smallest one that does what is asked."""


def figures(keys: Keys, inverse: Tensor) -> Figures:
    """Return what a change at each key alone does, at the price whose inverse is N (width, width).

    The change is D = r (N k)^T / (k N k), so that D k = r and D k' = r (k' N k) / (k N k).

    Example:
        >>> import torch
        >>> from multrace.scripts.studies.moments import Keys, figures
        >>> own, other = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[1.0, 1.0]]).double()
        >>> figures(Keys(own=own, wordings=own[:, None], others=other), torch.eye(2).double())
        Figures(leak=0.5, worst=0.5, reach=1.0, size=1.0)
    """
    directions = keys.own @ inverse
    met = (directions * keys.own).sum(-1)
    leaks = (keys.others @ directions.T / met).abs()
    reached = (keys.wordings @ directions[..., None])[..., 0] / met[:, None]
    sizes = directions.norm(dim=-1) * keys.own.norm(dim=-1) / met
    return Figures(
        leak=leaks.mean().item(),
        worst=leaks.amax(0).mean().item(),
        reach=reached.mean().item(),
        size=sizes.mean().item(),
    )


@dataclass(frozen=True, kw_only=True)
class Countries:
    """The questions about three groups of countries, none of which is in two."""

    edited: Sequence[Sequence[Question]]
    """The questions about each edited fact: first the one that is edited, then the other wordings."""
    scored: Sequence[Question]
    """The same question about countries on which the leak is measured."""
    task: Sequence[Question]
    """The same question about the countries of the task prompts."""


def countries(world: FlagWorld, relation: str, limit: int) -> Countries:
    """Return the questions: `limit` facts to edit, `limit` others that are scored, and the rest as task prompts."""
    facts = [fact for fact in world.facts if fact.relation.name == relation]
    order = generator_of("moments", relation).permutation(len(facts))
    facts = [facts[place] for place in order]
    if len(facts) <= 2 * limit:
        raise CommandError(f"{len(facts)} facts of the relation {relation!r} are too few for --limit {limit}")

    def asked(fact, template: int = 0) -> Question:  # noqa: ANN001 -- a fact of the world
        return replace(world.question_by_name(fact, template=template), template=TEMPLATE)

    wordings = range(len(facts[0].relation.wordings))
    return Countries(
        edited=[[asked(fact, template) for template in wordings] for fact in facts[:limit]],
        scored=[asked(fact) for fact in facts[limit : 2 * limit]],
        task=[asked(fact) for fact in facts[2 * limit :]],
    )


def read_text(paths: Iterable[Path], vlm: VisionLanguageModel) -> list[Question]:
    """Return 200 evenly spread pieces of real text of forty words; what a tokenizer takes for markup is left out."""
    found = []
    for path in paths:
        words = path.read_text(encoding="utf-8", errors="replace").split()
        for start in range(0, len(words) - _WORDS + 1, _WORDS):
            found.append(Question(text=" ".join(words[start : start + _WORDS]), template=TEMPLATE))
    fit = [question for question in found if _is_text(vlm, question)]
    return fit[:: max(1, len(fit) // _PIECES)][:_PIECES]


def _is_text(vlm: VisionLanguageModel, question: Question) -> bool:
    return not any(token in question.text for token in vlm.tokenizer.all_special_tokens)


@torch.no_grad()
def keys_of(vlm: VisionLanguageModel, questions: Sequence[Question], layers: Sequence[int]) -> dict[str, list[Tensor]]:
    """Return (question, width) float64 of what each layer's down projection reads, by token."""
    projections = [vlm.down_projection(layer) for layer in layers]
    rows: dict[str, list[list[Tensor]]] = {token: [[] for _ in layers] for token in TOKENS}
    for start in range(0, len(questions), _TOGETHER):
        prompts = [vlm.prompt_for(question) for question in questions[start : start + _TOGETHER]]
        inputs, offsets = collate(prompts, vlm.tokenizer)
        with capture(vlm, projections, inputs=True) as states:
            vlm.logits(inputs)
        for token in TOKENS:
            places = [prompt.positions(token)[-1] + offset for prompt, offset in zip(prompts, offsets, strict=True)]
            for number, projection in enumerate(projections):
                rows[token][number].append(states[projection][range(len(prompts)), places].double().cpu())
    return {token: [torch.cat(parts) for parts in each] for token, each in rows.items()}


def prices(moments: Mapping[str, Moments], layer: int) -> dict[str, Tensor]:
    """Return the inverse of what each price of a change is, by name; all moments get the ridge of own samples."""
    matrices = {name: each.matrix(layer) for name, each in moments.items()}
    matrices[BOTH] = (matrices[OWN] + matrices[TASK]) / 2
    found = {RIDGE: torch.eye(len(matrices[OWN]), dtype=torch.float64)}
    for name, matrix in matrices.items():
        matrix.diagonal().add_(OWN_RIDGE * matrix.diagonal().median())
        found[name] = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return found


@dataclass(frozen=True, kw_only=True)
class Study:
    """All numbers of the page."""

    model: str
    relation: str
    layers: tuple[int, ...]
    facts: int
    """Number of edited facts, and of others that are scored."""
    wordings: int
    """Number of other wordings of each fact."""
    corpora: Mapping[str, tuple[int, int, float]]
    """Name -> prompts, tokens and seconds of the moments."""
    width: int
    """Length of a key."""
    cells: Mapping[tuple[str, int, str], Figures]
    """(token, layer, price) -> figures."""


def measure(vlm: VisionLanguageModel, options: StudyOptions) -> Study:
    """Return the numbers for a model."""
    world, layers = FlagWorld(), options.layers or spaced(vlm.layers)
    layers = tuple(vlm.layer_index(layer) for layer in layers)
    asked = countries(world, options.relation, options.limit)
    paths = options.text or tuple(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != NAME)
    moments, corpora = {}, {}
    for name, questions in ((OWN, None), (TEXT, read_text(paths, vlm)), (TASK, asked.task)):
        started = time.monotonic()
        if questions is None:
            moments[name] = own_moments(vlm, layers=layers)
        else:
            moments[name] = second_moments(vlm, [vlm.prompt_for(each) for each in questions], layers=layers)
        seconds = time.monotonic() - started
        corpora[name] = (moments[name].prompts, moments[name].count(), seconds)
    flat = [question for each in asked.edited for question in each]
    facts, others = keys_of(vlm, flat, layers), keys_of(vlm, asked.scored, layers)
    cells: dict[tuple[str, int, str], Figures] = {}
    for number, layer in enumerate(tqdm(layers, desc="layers", unit="layer")):
        inverses = prices(moments, layer)
        for token in TOKENS:
            own = facts[token][number].unflatten(0, (len(asked.edited), -1))
            keys = Keys(own=own[:, 0], wordings=own[:, 1:], others=others[token][number])
            cells |= {(token, layer, name): figures(keys, inverse) for name, inverse in inverses.items()}
    return Study(
        model=Path(str(vlm.name)).name,
        relation=options.relation,
        layers=layers,
        facts=len(asked.edited),
        wordings=len(asked.edited[0]) - 1,
        corpora=corpora,
        width=vlm.down_projection(layers[0]).width,
        cells=cells,
    )


def spaced(count: int) -> tuple[int, ...]:
    """Return up to seven layers from the lower part of a model to its end, of which more are low than high.

    Example:
        >>> from multrace.scripts.studies.moments import spaced
        >>> spaced(30)
        (2, 4, 6, 8, 12, 18, 24)
    """
    shares = (2, 4, 6, 8, 12, 18, 24)
    return tuple(dict.fromkeys(count * share // 30 for share in shares))


def page(study: Study) -> str:
    """Return the page with the numbers."""
    names = [RIDGE, OWN, TEXT, TASK, BOTH]
    lines = [*_HEAD.format(**vars(study), command=app.name[0]).splitlines(), ""]
    lines += ["| moments of | prompts | tokens | tokens for each entry of a key |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {prompts} | {tokens:,} | {tokens / study.width:.1f} |"
        for name, (prompts, tokens, _) in study.corpora.items()
    ]
    for token in TOKENS:
        lines += ["", f"## At {_TITLES[token]}", "", *_verdict(study, token), ""]
        lines += ["| moments of | " + " | ".join(f"layer {layer}" for layer in study.layers) + " |"]
        lines += ["|---" * (1 + len(study.layers)) + "|"]
        for name in names:
            cells = (study.cells[token, layer, name] for layer in study.layers)
            lines.append(f"| {name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join([*lines, "", *_TAIL.splitlines(), ""])


def _cell(figures: Figures) -> str:
    return f"{figures.leak:.2f} ({figures.worst:.2f}); {figures.reach:.2f}; {figures.size:.1f}"


def _verdict(study: Study, token: str) -> list[str]:
    """What the means over the layers say."""
    means = {
        name: [fmean(getattr(study.cells[token, layer, name], part) for layer in study.layers) for part in _PARTS]
        for name in (RIDGE, OWN, TEXT, TASK, BOTH)
    }
    told = [f"{name} {leak:.2f} / {reach:.2f} / {size:.1f}" for name, (leak, reach, size) in means.items()]
    return [f"Leak / reach / size on average over these layers: {', '.join(told)}."]


_PARTS = ("leak", "reach", "size")
_TITLES = {"constraint_last": "the last token of the country's name", "last": "the last token of the question"}
_HEAD = """# Whose old keys an edit should weigh

Made by `{command}` on {model} (relation "{relation}"; {facts} facts
are edited, {facts} other countries scored, {wordings} other wordings of each fact). Editors such as ROME weigh old keys
by their second moment C. Where none is given, they take that of texts which the model itself samples (`own_moments`).
This page says what that is worth beside real text (this project's pages) and beside task prompts: the same question
about countries that are neither edited nor scored.

The numbers are geometry, known before any edit. A change of ROME at the key k reaches another key k' by the share
k' N k / (k N k), where N is the inverse of C with a small ridge. Each cell holds

- the *leak*: the size of that share at the same question about other countries, on average, and in brackets the largest
  over them; 0 leaves them alone, 1 gives them all of the change;
- the *reach*: the share at other wordings of the fact; 1 is what one wants;
- the *size*: the norm of the change, as a multiple of that of the smallest change that does what is asked."""
_TAIL = """## What follows

- Leak is what moments are for, and size is what they cost: a change that avoids many directions is longer.
- Moments of ordinary text, sampled or real, know the directions that all texts share, and less of those that
  questions of one kind share. Where the answers to the same question about other things matter, pass moments of such
  questions (`second_moments(vlm, prompts)`, `multrace moments --data`), or keep some of them (`preserve_prompts`).
- Task prompts must leave out the edited thing itself: with its own key among the old ones, an edit avoids its own
  wordings.
- A small leak is no measured locality: a confident answer survives a large leak, and a narrow one falls to a small
  one."""


@app.default
def run(options: StudyOptions = StudyOptions()) -> int:
    """Measure, and write the page."""
    options.check()
    study = measure(options.open_model(), options)
    path = write_whole(options.docs / NAME, page(study).encode())
    print(*(f"{name}: {seconds:.0f} s" for name, (_, _, seconds) in study.corpora.items()), sep="\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(execute(app, sys.argv[1:]))
