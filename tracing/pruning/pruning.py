"""Image token pruning: the model's answer without some image tokens from one layer on, as in FastV.

Greedy answers are found by guess and verification: with a right guess, all tokens of all answers cost a single sweep.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, ReplayError, VisionLanguageModel
from ...models.errors import plain_number
from ...models.frame import DecoderInput
from ...models.replay.attending import attending
from ...models.replay.observe import layers_without_attention
from ...models.replay.recording import Cut
from ..engine.cells import CellScores, EdgeCell, Engine, Runs, TraceError
from ..engine.measure import measure, measure_once
from ..engine.positions import group_positions
from ..engine.scoring import FIRST, WHOLE, Scoring
from .result import ImagePruning

Ids = tuple[int, ...]
Cells = Callable[[int], Sequence[EdgeCell]]
"""The cells of a run with this number of tokens, always equally many and in the same order. Cuts also apply to the
answer's tokens."""
Likeliest = Callable[[Ids, int, Sequence[int]], Tensor]
"""The likeliest token ids (cell, token) int64 of some cells at the places of these ids, from a start on; each id is
predicted from the ids before it."""
_UNKNOWN = 0  # placeholder for a token without a guess; the last id of a line is never read
SCORES = (FIRST, WHOLE)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Tokens to which no other token attends from a layer on."""

    tokens: frozenset[int]
    """Positions of the tokens; empty for the run without changes."""
    first: int
    """The first layer without the tokens, which are also absent from all later layers."""

    def cell(self, length: int, layers: int) -> EdgeCell:
        """Return the edges that are missing in a run of this length and a decoder with this number of layers."""
        rest = frozenset(range(length)) - self.tokens
        return EdgeCell(cut=Cut(sources=self.tokens, targets=rest), first=self.first, last=layers - 1, is_dropped=True)


def drop_others(image: Sequence[int], kept: Tensor, first: int) -> Drop:
    """Return the `Drop`, from this layer on, of all image positions except those in `kept` (image token,) booleans."""
    tokens = frozenset(place for place, stays in zip(image, kept.tolist(), strict=True) if not stays)
    return Drop(tokens=tokens, first=first if tokens else 0)


def kept_tokens(
    vlm: VisionLanguageModel,
    entering: DecoderInput,
    image: Sequence[int],
    *,
    keep: Sequence[int | str],
    layers: Sequence[int],
) -> Tensor:
    """Return the tokens that stay, booleans (keep, layer, image token), if the top-ranked ones stay from each layer on.

    The input of one row ends with the prompt's last token, whose attention ranks the others; "all" keeps
    every token. Raises `TraceError` if tokens have to be ranked and this model's attention cannot be read.
    """
    counts = [len(image) if number == "all" else min(int(number), len(image)) for number in keep]
    stays = torch.zeros(len(counts), len(layers), len(image), dtype=torch.bool)
    ranks = None
    for row, count in enumerate(counts):
        if count in (0, len(image)):
            stays[row] = count > 0
            continue
        ranks = image_ranks(vlm, entering, image) if ranks is None else ranks
        stays[row] = ranks[list(layers)] < count
    return stays


def image_ranks(vlm: VisionLanguageModel, entering: DecoderInput, image: Sequence[int]) -> Tensor:
    """Return the rank (layer, image token) int64 of each image token for each first pruned layer, 0 for the best.

    Tokens are ranked by the last token's attention to them, mean over heads, in the layer before, which still has all
    tokens; for layer 0, in layer 0 itself. Ties go to the earlier token. The ranking is that of FastV (arXiv
    2403.06764) as released.
    """
    try:
        with torch.no_grad(), attending(vlm, (entering.length - 1,)) as attention:
            vlm.forward(entering, positions=[entering.length - 1])
    except ReplayError as error:
        # Where a running state would carry dropped tokens on, no order helps.
        way = "" if layers_without_attention(vlm) else "; pass keep=(0,), which needs no order"
        raise TraceError(f"image tokens of {vlm.name!r} cannot be ranked by attention: {error}{way}") from error
    attended = torch.stack([each.weights[0, :, 0].mean(0)[list(image)] for each in attention]).cpu()
    order = attended.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(len(image)).expand_as(order))
    return torch.cat([ranks[:1], ranks[:-1]])


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of an answer."""

    ends: tuple[int, ...]
    """Ids of the end-of-sequence tokens."""
    tokens: int
    """Largest number of tokens of an answer, including its end-of-sequence token."""

    @classmethod
    def of(cls, vlm: VisionLanguageModel, max_new_tokens: int) -> "Limits":
        """Return limits with the end-of-sequence tokens at which this model's own generation stops."""
        return cls(ends=vlm.end_ids, tokens=max_new_tokens)

    def ended(self, ids: Sequence[int]) -> Ids:
        """Return these ids as a complete answer: at most `tokens` ids, with an end token if there is room."""
        return (*ids, *self.ends[:1])[: self.tokens]

    def is_over(self, ids: Ids) -> bool:
        """Return whether the answer is complete with these ids."""
        return len(ids) >= self.tokens or (len(ids) > 0 and ids[-1] in self.ends)

    def without_end(self, ids: Ids) -> Ids:
        """Return the ids without a final end-of-sequence token."""
        return ids[:-1] if ids and ids[-1] in self.ends else ids


def own_ids(vlm: VisionLanguageModel, entering: DecoderInput, guess: Sequence[int], limits: Limits) -> Ids:
    """Return the model's greedy answer to a prompt, given its input in one row, without any cut."""

    def likeliest(ids: Ids, start: int, _cells: Sequence[int]) -> Tensor:
        last = entering.length - 1
        with torch.no_grad():
            logits = vlm.forward(vlm.extend(entering, ids), positions=range(last + start, last + len(ids)))
        return logits.argmax(-1)

    return verified(likeliest, 1, limits.ended(guess), limits)[0]


def greedy_ids(
    vlm: VisionLanguageModel,
    entering: DecoderInput,
    cells: Cells,
    *,
    guess: Sequence[int],
    limits: Limits,
    engine: Engine,
    bar: tqdm | None = None,
) -> list[Ids]:
    """Return the greedy answer of each cell to a prompt, given its input in one row.

    Each step of an answer takes the likeliest token, up to and including an end-of-sequence token or up to the largest
    length. The guess is a likely answer; a wrong guess only costs time. The engine's checks and checkpoint are not
    used.
    """
    last, engine = entering.length - 1, replace(engine, checks=0, checkpoint=None)

    def likeliest(ids: Ids, start: int, numbers: Sequence[int]) -> Tensor:
        runs = Runs.of_one(vlm.extend(entering, ids), scored=range(last + start, last + len(ids)))
        if bar is not None:
            bar.total += len(numbers)
        candidates = cells(runs.length)
        result = measure_once(vlm, runs, [candidates[each] for each in numbers], _argmax, engine=engine, bar=bar)
        return result.scores[..., 0].long()

    return verified(likeliest, len(cells(last + 1)), limits.ended(guess), limits)


def verified(likeliest: Likeliest, count: int, guess: Ids, limits: Limits) -> list[Ids]:
    """Return the greedy answers of `count` cells.

    All cells first follow the guess. Cells that depart from it with the same ids continue together, along the known
    answer of another cell with the same beginning if there is one, otherwise by a single token.
    """
    answers: dict[int, Ids] = {}
    known = {guess}
    waiting: dict[Ids, list[int]] = {(): list(range(count))}
    while waiting:
        prefix = min(waiting, key=len)
        numbers, line = waiting.pop(prefix), _line(prefix, known)
        for number, tokens in zip(numbers, likeliest(line, len(prefix), numbers).tolist(), strict=True):
            answer = _follow(line, len(prefix), tokens, limits)
            if limits.is_over(answer):
                answers[number] = answer
                known.add(answer)
            else:
                waiting.setdefault(answer, []).append(number)
    return [answers[number] for number in range(count)]


def _line(prefix: Ids, known: Collection[Ids]) -> Ids:
    """Return the longest known answer that begins with these ids, otherwise these ids and one placeholder."""
    longer = (each for each in known if len(each) > len(prefix) and each[: len(prefix)] == prefix)
    return max(longer, key=len, default=(*prefix, _UNKNOWN))


def _follow(line: Ids, start: int, tokens: Sequence[int], limits: Limits) -> Ids:
    """Return the line's ids up to the first one with which the cell disagrees, and then the cell's own id."""
    ids = line[:start]
    for place, token in enumerate(tokens, start):
        ids = (*line[:place], token)
        if token != line[place] or limits.is_over(ids):
            break
    return ids


def _argmax(logits: Tensor) -> Tensor:
    """Return the likeliest ids (row, scored position) as float64, from logits (row, scored position, vocab)."""
    return logits.argmax(-1).double()


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
    """Return the answer's probability and the model's free answer with image tokens pruned from a layer on.

    From the first pruned layer up to the last one, no token attends to the pruned image tokens, including the answer's
    tokens. The tokens that stay are those to which the prompt's last token attends most, mean over heads, in the
    layer before (in layer 0 for layer 0, which has none before it), as in FastV (arXiv 2403.06764). The experiment
    is that of Zhang et al., arXiv 2406.06579, with K = keep. The result always includes the baseline, without pruning,
    and the floor, with all image tokens pruned from layer 0 on, which leaves only the words.

    Args:
        vlm: The model.
        prompt: The question about a picture.
        keep: Numbers of image tokens that stay, 0 or more, or "all".
        layers: First pruned layers; by default each layer in turn.
        answer: The answer whose probability is computed, both for its first token and for all its tokens (teacher
            forcing); by default the model's own greedy answer.
        gold: The right answer, with which every free answer is compared.
        generated: The model's own answer, if it is known; otherwise it is generated.
        max_new_tokens: Longest free answer, in tokens.
        engine: Settings; by default the exact fast sweep if the model allows it, otherwise one forward pass per cell.
        progress: Show a progress bar over cells.

    Returns:
        Probabilities by score, keep and layer, and answers by keep and layer, with the settings.

    Raises:
        TraceError: If the prompt has no picture, a setting does not fit the model, the answer is empty, or tokens have
            to be ranked and this model's attention cannot be read.

    Example:
        >>> import multrace as mt
        >>> from PIL import Image
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(Image.new("RGB", (64, 64)), "Who founded the company in this photo?")
        >>> pruned = mt.prune_image_tokens(vlm, prompt, keep=(0, 16), layers=(0, 4), progress=False)
        >>> pruned.probabilities.shape  # score, keep, layer
        torch.Size([2, 2, 2])
    """
    image = group_positions(prompt, "image")
    keeps, chosen = _checked_keep(keep), _checked_layers(vlm, layers)
    entering, limits = vlm.embed(prompt), _checked_limits(vlm, max_new_tokens)
    kept = kept_tokens(vlm, entering, image, keep=keeps, layers=chosen)
    own = _own_ids(vlm, prompt, entering, generated, limits)
    ids = _scored_ids(prompt, answer, limits.without_end(own))
    drops = [Drop(tokens=frozenset(image), first=0)]  # the floor
    drops += [drop_others(image, row, layer) for rows in kept for row, layer in zip(rows, chosen, strict=True)]
    scores, answers = _measured(vlm, entering, drops, (ids, own, limits), engine or Engine(), progress)
    settings = {"keep": keeps, "layers": chosen, "kept": kept, "gold": gold, "answer_ids": ids}
    return _result(vlm, prompt, scores, [vlm.decode(each).strip() for each in (own, *answers)], settings)


def _measured(
    vlm: VisionLanguageModel,
    entering: DecoderInput,
    drops: Sequence[Drop],
    answer: tuple[Ids, Ids, Limits],
    engine: Engine,
    progress: bool,
) -> tuple[CellScores, list[Ids]]:
    """Return scores (drop, score) of the answer's tokens, and the free answers; equal drops are computed once."""
    ids, own, limits = answer
    distinct = tuple(dict.fromkeys(drops))
    where = [distinct.index(drop) for drop in drops]

    def cells(length: int) -> list[EdgeCell]:
        return [drop.cell(length, vlm.layers) for drop in distinct]

    scoring, last = Scoring.of_answer(ids, whole=True), entering.length - 1
    runs = Runs.of_one(entering, scored=(last,))
    with tqdm(total=len(distinct), desc="pruning", unit="cell", disable=not progress) as bar:
        scores = measure(vlm, runs, cells(last + len(ids)), scoring, engine=engine, bar=bar)
        if scores.report.engine == "plain":  # a warning has already reported it
            engine = replace(engine, name="plain")
        guess = limits.without_end(own)
        answers = greedy_ids(vlm, entering, cells, guess=guess, limits=limits, engine=engine, bar=bar)
    scores = replace(scores, scores=scores.scores[where], free=scores.free[where])
    return scores, [answers[number] for number in where]


def _result(
    vlm: VisionLanguageModel, prompt: Prompt, scores: CellScores, answers: Sequence[str], settings: Mapping[str, Any]
) -> ImagePruning:
    """Return the result from scores (floor, then keep by layer) and answers (baseline, floor, then keep by layer)."""
    rows, columns = len(settings["keep"]), len(settings["layers"])
    baseline, floor, *pruned = answers
    return ImagePruning(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        input_ids=tuple(prompt.inputs["input_ids"][0, : prompt.groups["last"][0] + 1].tolist()),
        image_positions=prompt.groups["image"],
        patches=tuple((patch.position, patch.row, patch.column, patch.image) for patch in prompt.patches),
        depth=vlm.layers,
        scores=SCORES,
        answer=vlm.decode(settings["answer_ids"]).strip(),
        baseline=scores.base[:, 0],
        floor=scores.scores[0, :, 0],
        probabilities=scores.scores[1:, :, 0].T.reshape(-1, rows, columns).contiguous(),
        baseline_answer=baseline,
        floor_answer=floor,
        answers=tuple(tuple(pruned[row * columns : (row + 1) * columns]) for row in range(rows)),
        token_operations=_token_operations(vlm),
        pair_operations=4 * vlm.attention_projection(0).width,
        engine=scores.report,
        **settings,
    )


def _own_ids(
    vlm: VisionLanguageModel, prompt: Prompt, entering: DecoderInput, generated: str | None, limits: Limits
) -> Ids:
    """Return the tokens of the model's answer with all image tokens; a known answer is verified."""
    if generated is None:
        generated = vlm.answers([prompt], max_new_tokens=limits.tokens)[0]
    guess = prompt.with_answer(generated).answer_ids if generated.strip() else ()
    return own_ids(vlm, entering, guess, limits)


def _scored_ids(prompt: Prompt, answer: str | None, own: Ids) -> Ids:
    if answer is not None and answer.strip():
        return prompt.with_answer(answer).answer_ids
    if answer is not None or not own:
        which = "the given answer" if answer is not None else f"the model's own answer to {prompt.question!r}"
        raise TraceError(f"{which} is empty; pass answer= with the one whose probability is asked for")
    return own


def _checked_keep(keep: int | str | Sequence[int | str]) -> tuple[int | str, ...]:
    keep = plain_number(keep)
    counts = tuple(dict.fromkeys(map(plain_number, (keep,) if isinstance(keep, int | str) else keep)))
    wrong = [each for each in counts if each != "all" and (not isinstance(each, int) or each < 0)]
    if wrong or not counts:
        raise TraceError(
            f"cannot keep {wrong[0] if wrong else 'no number of'!r} image tokens; pass numbers from 0 on, or 'all', "
            "such as keep=(0, 64)"
        )
    return counts


def _checked_layers(vlm: VisionLanguageModel, layers: Sequence[int] | None) -> Ids:
    chosen = tuple(range(vlm.layers)) if layers is None else tuple(sorted(set(layers)))
    wrong = [layer for layer in chosen if not 0 <= layer < vlm.layers]
    if wrong or not chosen:
        raise TraceError(
            f"cannot drop image tokens from {f'layer {wrong[0]}' if wrong else 'no layer'} on: {vlm.name!r} has layers "
            f"0 to {vlm.layers - 1}; pass some of these, or None for all"
        )
    return chosen


def _checked_limits(vlm: VisionLanguageModel, max_new_tokens: int) -> Limits:
    if max_new_tokens < 1:
        raise TraceError(f"max_new_tokens={max_new_tokens} leaves no room for an answer; pass at least 1")
    return Limits.of(vlm, max_new_tokens)


def _token_operations(vlm: VisionLanguageModel) -> tuple[int, ...]:
    """Return the floating-point operations of each layer's matrices for one token: a product and a sum per weight."""
    return tuple(2 * sum(each.numel() for each in layer.parameters() if each.ndim == 2) for layer in vlm.decoder_layers)
