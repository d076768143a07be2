"""ImagePruning: what a model still answers when image tokens are gone from one layer on, as FastV drops them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, VisionLanguageModel
from ..engine.cells import CellScores, EdgeCell, Runs
from ..engine.measure import measure
from ..engine.scoring import FIRST, WHOLE, Scoring
from ..engine.settings import Engine
from ..errors import TraceError
from ..groups import group_positions
from .dropping import Drop, drop_others, kept_tokens
from .greedy import Ids, Limits, greedy_ids, own_ids
from .result import ImagePruning

SCORES = (FIRST, WHOLE)


def prune_image_tokens(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    keep: int | str | Sequence[int | str] = (0,),
    layers: Sequence[int] | None = None,
    answer: str | None = None,
    gold: str | None = None,
    generated: str | None = None,
    max_new_tokens: int = 16,
    engine: Engine | None = None,
    progress: bool = True,
) -> ImagePruning:
    """The answer's probability, and the model's free answer, with most image tokens gone from each of the layers on.

    keep: how many image tokens stay, 0 or more, or "all". They are those that the prompt's last token attends to most,
    mean over heads, in the layer before the first that lacks the others (in layer 0 for layer 0, which has none before
    it), as FastV ranks them. No token attends to the others from that layer up to the last, the answer's tokens
    included. layers: the first layers without them; None for each layer in turn. Nothing dropped (the baseline) and
    every image token dropped from layer 0 on (the floor, which knows only the words) are always there.
    answer: the one whose probability is told, of its first token and of all its tokens, teacher-forced; None for the
    model's own greedy one. gold: the right answer, with which every free answer is compared. generated: the model's own
    answer, if it is known, which saves asking for it. Free answers are greedy and of at most max_new_tokens.
    engine: settings; by default the exact fast sweep where the model allows it. TraceError for a prompt without a
    picture and for what does not fit the model. Zhang et al., arXiv 2406.06579, with K = keep; FastV, arXiv 2403.06764.
    """
    image = group_positions(prompt, "image")
    keeps, chosen = _checked_keep(keep), _checked_layers(vlm, layers)
    embeddings, limits = vlm.embed(prompt), _checked_limits(vlm, max_new_tokens)
    kept = kept_tokens(vlm, embeddings, image, keep=keeps, layers=chosen)
    own = _own_ids(vlm, prompt, embeddings, generated, limits)
    ids = _scored_ids(prompt, answer, limits.without_end(own))
    drops = [Drop(tokens=frozenset(image), first=0)]  # the floor
    drops += [drop_others(image, row, layer) for rows in kept for row, layer in zip(rows, chosen, strict=True)]
    found, said = _measured(vlm, embeddings, drops, (ids, own, limits), engine or Engine(), progress)
    asked = {"keep": keeps, "layers": chosen, "kept": kept, "gold": gold, "answer_ids": ids}
    return _result(vlm, prompt, found, [vlm.decode(each).strip() for each in (own, *said)], asked)


def _measured(
    vlm: VisionLanguageModel,
    embeddings: Tensor,
    drops: Sequence[Drop],
    answer: tuple[Ids, Ids, Limits],
    engine: Engine,
    progress: bool,
) -> tuple[CellScores, list[Ids]]:
    """Scores (drop, score) of the answer's tokens, and what the model says, guessed to be its own; equal drops once."""
    ids, own, limits = answer
    distinct = tuple(dict.fromkeys(drops))
    where = [distinct.index(drop) for drop in drops]

    def cells(length: int) -> list[EdgeCell]:
        return [drop.cell(length, vlm.layers) for drop in distinct]

    scoring, last = Scoring.of_answer(ids, whole=True), embeddings.shape[1] - 1
    runs = Runs.of_one(embeddings, scored=(last,))
    with tqdm(total=len(distinct), desc="truncating", unit="cell", disable=not progress) as bar:
        found = measure(vlm, runs, cells(last + len(ids)), scoring, engine=engine, bar=bar)
        if found.report.engine == "plain":  # as it has said by now
            engine = replace(engine, name="plain")
        said = greedy_ids(vlm, embeddings, cells, guess=limits.without_end(own), limits=limits, engine=engine, bar=bar)
    return replace(found, scores=found.scores[where], free=found.free[where]), [said[each] for each in where]


def _result(
    vlm: VisionLanguageModel, prompt: Prompt, found: CellScores, said: Sequence[str], asked: Mapping[str, Any]
) -> ImagePruning:
    """The measured scores (floor, then keep by layer) and answers (baseline, floor, then keep by layer) in order."""
    rows, columns = len(asked["keep"]), len(asked["layers"])
    baseline, floor, *answers = said
    return ImagePruning(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        input_ids=tuple(prompt.inputs["input_ids"][0, : prompt.groups["last"][0] + 1].tolist()),
        image_positions=prompt.groups["image"],
        patches=tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches),
        depth=vlm.layers,
        scores=SCORES,
        answer=vlm.decode(asked["answer_ids"]).strip(),
        baseline=found.base[:, 0],
        floor=found.scores[0, :, 0],
        probabilities=found.scores[1:, :, 0].T.reshape(-1, rows, columns).contiguous(),
        baseline_answer=baseline,
        floor_answer=floor,
        answers=tuple(tuple(answers[row * columns : (row + 1) * columns]) for row in range(rows)),
        token_operations=_token_operations(vlm),
        pair_operations=4 * vlm.attention_projection(0).width,
        engine=found.report,
        **asked,
    )


def _own_ids(
    vlm: VisionLanguageModel, prompt: Prompt, embeddings: Tensor, generated: str | None, limits: Limits
) -> Ids:
    """What the model says with all image tokens, by the tokens of its answer if that is known."""
    if generated is None:
        generated = vlm.answers([prompt], max_new_tokens=limits.tokens)[0]
    guess = prompt.with_answer(generated).answer_ids if generated.strip() else ()
    return own_ids(vlm, embeddings, guess, limits)


def _scored_ids(prompt: Prompt, answer: str | None, own: Ids) -> Ids:
    if answer is not None and answer.strip():
        return prompt.with_answer(answer).answer_ids
    if answer is not None or not own:
        which = "the given answer" if answer is not None else f"the model's own answer to {prompt.question!r}"
        raise TraceError(f"{which} is empty; pass answer= with the one whose probability is asked for")
    return own


def _checked_keep(keep: int | str | Sequence[int | str]) -> tuple[int | str, ...]:
    found = tuple(dict.fromkeys((keep,) if isinstance(keep, int | str) else keep))
    wrong = [each for each in found if each != "all" and (not isinstance(each, int) or each < 0)]
    if wrong or not found:
        raise TraceError(
            f"cannot keep {wrong[0] if wrong else 'no number of'!r} image tokens; pass numbers from 0 on, or 'all', "
            "such as keep=(0, 64)"
        )
    return found


def _checked_layers(vlm: VisionLanguageModel, layers: Sequence[int] | None) -> Ids:
    found = tuple(range(vlm.layers)) if layers is None else tuple(sorted(set(layers)))
    wrong = [layer for layer in found if not 0 <= layer < vlm.layers]
    if wrong or not found:
        raise TraceError(
            f"cannot drop image tokens from {f'layer {wrong[0]}' if wrong else 'no layer'} on: {vlm.name!r} has layers "
            f"0 to {vlm.layers - 1}; pass some of these, or None for all"
        )
    return found


def _checked_limits(vlm: VisionLanguageModel, max_new_tokens: int) -> Limits:
    if max_new_tokens < 1:
        raise TraceError(f"max_new_tokens={max_new_tokens} leaves no room for an answer; pass at least 1")
    return Limits.of(vlm, max_new_tokens)


def _token_operations(vlm: VisionLanguageModel) -> tuple[int, ...]:
    """Per layer, floating-point operations of its matrices for one token: a product and a sum for each weight."""
    return tuple(2 * sum(each.numel() for each in layer.parameters() if each.ndim == 2) for layer in vlm.decoder_layers)
