"""Attention knockout: what the answer loses when one group of tokens no longer hears another, in a window of layers."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, VisionLanguageModel
from ...models.replay.cuts import Cut
from ..engine.cells import CellScores, EdgeCell, Runs
from ..engine.measure import measure
from ..engine.regions import Box
from ..engine.rows import window_layers
from ..engine.scoring import Scoring, scored_ids
from ..engine.settings import Engine
from ..errors import TraceError
from .groups import Edges, Flow, Groups, default_flows
from .result import AttentionKnockout


def attention_knockout(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    flows: Sequence[Flow | str] | None = None,
    windows: Sequence[int] | None = None,
    heads: str | Sequence[int] | None = None,
    boxes: Sequence[Box] = (),
    answer: str | None = None,
    whole_answer: bool = False,
    gold: str | None = None,
    generated: str | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> AttentionKnockout:
    """The answer's probability with each flow cut in each window of layers, and without any cut.

    flows: "source -> target" with names of token groups (see `Groups.positions`) or positions, or `Flow`s; None: those
    of the studies that the prompt has the groups for. In the layers of a window no target token attends to a source
    token; where the groups overlap, a token does not attend to itself either, as in "last -> last". windows: numbers
    of layers cut together; around a layer l these are max(0, l - window // 2) up to but excluding
    min(layers, l + ceil(window / 2)); None: single layers, and as large a share of the decoder as the study cut (9 of
    40). heads: only these query heads lose the edges; "each": every head on its own. boxes: rectangles of the picture
    that hold the object asked about, for the groups "object" and "other patches".
    answer: the scored one; None for the model's own. Scored is its first token; whole_answer: also the product over all
    its tokens, with "last" then standing for every position that predicts one. gold: the right answer, with which the
    model's free answer is compared (generated, if it is not passed).
    engine: settings; by default the exact fast sweep where the model allows it. TraceError or ModelError for what does
    not fit the model or prompt. Zhang et al., arXiv 2411.18620, sections 3 and 4.
    """
    chosen = _checked_windows(vlm, windows)
    if generated is None and (gold is not None or (whole_answer and answer is None)):
        generated = vlm.answers([prompt])[0]
    embeddings = vlm.embed(prompt)
    scoring = _scoring(vlm, prompt, embeddings, generated if answer is None and whole_answer else answer, whole_answer)
    first = embeddings.shape[1] - 1
    scored = tuple(range(first, first + len(scoring.answer_ids)))
    groups = Groups(vlm=vlm, prompt=prompt, boxes=tuple(boxes), predicting=scored)
    asked = default_flows(prompt, boxes) if flows is None else ([flows] if isinstance(flows, str | Flow) else flows)
    named = _by_head(vlm, [groups.edges(flow) for flow in asked], heads)
    spans = torch.tensor([[_ends(vlm, layer, window) for layer in range(vlm.layers)] for window in chosen])
    cells = [
        EdgeCell(cut=cut, first=start, last=end) for _, cut in named for start, end in spans.flatten(0, 1).tolist()
    ]
    runs = Runs.of_one(embeddings, scored=(first,))
    with tqdm(total=len(cells), desc="cutting", unit="cell", disable=not progress) as bar:
        found = measure(vlm, runs, cells, scoring, engine=engine or Engine(), bar=bar)
    return _result(vlm, prompt, named, (chosen, spans), (scoring, found), {"gold": gold, "generated": generated})


def _scoring(vlm: VisionLanguageModel, prompt: Prompt, embeddings: Tensor, answer: str | None, whole: bool) -> Scoring:
    """The scoring of this answer, or of the token that the model predicts if there is none."""
    if answer is None and not whole:
        return Scoring.of_answer([int(vlm.next_token_probabilities(embeddings)[0].argmax())], whole=False)
    return Scoring.of_answer(scored_ids(prompt, answer, whole=whole), whole=whole)


def _checked_windows(vlm: VisionLanguageModel, windows: Sequence[int] | None) -> tuple[int, ...]:
    found = (1, max(1, round(vlm.layers * 9 / 40))) if windows is None else windows
    found = tuple(dict.fromkeys((found,) if isinstance(found, int) else found))
    wrong = [window for window in found if not 1 <= window <= vlm.layers]
    if wrong or not found:
        raise TraceError(
            f"no window of {wrong[0] if wrong else 'no'} layers: the decoder has {vlm.layers}; pass some of 1 to "
            f"{vlm.layers}"
        )
    return found


def _ends(vlm: VisionLanguageModel, layer: int, window: int) -> tuple[int, int]:
    layers = window_layers(layer, window, vlm.layers)
    return layers[0], layers[-1]


def _by_head(
    vlm: VisionLanguageModel, flows: Sequence[Edges], heads: str | Sequence[int] | None
) -> list[tuple[str, Cut]]:
    """The flows' names and cuts, one for each head if that was asked."""
    if not flows:
        raise TraceError('no flows to cut; pass some, such as ["image -> last"], or None for those of the study')
    if heads is None:
        wanted: list[tuple[str, tuple[int, ...]]] = [("", ())]
    elif isinstance(heads, str):
        if heads != "each":
            raise TraceError(f"no heads {heads!r}; pass 'each', numbers from 0 to {vlm.heads - 1}, or None for all")
        wanted = [(f", head {head}", (head,)) for head in range(vlm.heads)]
    else:
        numbers = tuple(dict.fromkeys(heads))
        if not numbers or not all(0 <= head < vlm.heads for head in numbers):
            raise TraceError(f"no heads {list(numbers)}; this model has heads 0 to {vlm.heads - 1}")
        wanted = [(f", heads {', '.join(map(str, numbers))}", numbers)]
    return [
        (edges.name + label, Cut(sources=frozenset(edges.sources), targets=frozenset(edges.targets), heads=numbers))
        for edges in flows
        for label, numbers in wanted
    ]


def _result(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    named: Sequence[tuple[str, Cut]],
    layers: tuple[tuple[int, ...], Tensor],
    measured: tuple[Scoring, CellScores],
    answers: dict[str, str | None],
) -> AttentionKnockout:
    windows, spans = layers
    scoring, found = measured
    shape = (len(named), len(windows), vlm.layers)
    return AttentionKnockout(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens[: prompt.groups["last"][0] + 1],
        flows=tuple(name for name, _ in named),
        flow_sources=tuple(tuple(sorted(cut.sources)) for _, cut in named),
        flow_targets=tuple(tuple(sorted(cut.targets)) for _, cut in named),
        flow_heads=tuple(cut.heads for _, cut in named),
        windows=windows,
        spans=spans,
        layers=vlm.layers,
        scores=scoring.names,
        answer=vlm.tokenizer.decode(list(scoring.answer_ids)).strip(),
        answer_ids=scoring.answer_ids,
        clean=found.base[:, 0],
        probabilities=found.scores[..., 0].T.reshape(-1, *shape).contiguous(),
        free=found.free.reshape(shape),
        engine=found.report,
        **answers,
    )


def knockout_probability(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    sources: str | int | Iterable[int],
    targets: str | int | Iterable[int],
    *,
    answer_id: int | None = None,
) -> float:
    """The answer's probability when no target token may attend to a source token, in any layer.

    sources, targets: group names or positions; a token always sees itself, so overlapping groups are fine.
    answer_id: the scored token; None for the one that the untouched model finds likeliest. Compare with no sources.
    Attention knockout as in arXiv 2411.18620, over all layers at once.
    """
    embeddings = vlm.embed(prompt)
    if answer_id is None:
        answer_id = int(vlm.next_token_probabilities(embeddings).argmax())
    length = embeddings.shape[1]
    sources = torch.zeros(length, dtype=torch.bool).index_fill(0, _indices(prompt, sources, length), True)
    targets = torch.zeros(length, dtype=torch.bool).index_fill(0, _indices(prompt, targets, length), True)
    cut = targets[:, None] & sources[None, :] & ~torch.eye(length, dtype=torch.bool)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & ~cut
    probabilities = vlm.next_token_probabilities(embeddings, attention_mask=mask[None, None].to(vlm.device))
    return float(probabilities[0, answer_id])


def _indices(prompt: Prompt, group: str | int | Iterable[int], length: int) -> Tensor:
    """Positions of the group among the prompt's first `length`; those of an answer after it play no part."""
    group = group if isinstance(group, (str, int)) else tuple(group)
    return torch.tensor([position for position in prompt.positions(group) if position < length], dtype=torch.long)
