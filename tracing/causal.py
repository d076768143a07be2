"""Causal tracing: destroy the constraint or the picture, restore clean states, see which bring the answer back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..models import Prompt, VisionLanguageModel
from .corruption import Corruption, embed, group_positions
from .errors import TraceError
from .plain import answer_probabilities, clean_states, next_token_probabilities, restored_probability
from .results import CausalTrace

KINDS = ("hidden", "mlp", "attention")


def causal_trace(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    corruption: Corruption,
    sites: str | Sequence[str] = KINDS,
    window: int = 3,
    positions: str | Sequence[str | int] = "tokens",
    answer: str | None = None,
    whole_answer: bool = False,
    progress: bool = True,
) -> CausalTrace:
    """How much of the answer's probability comes back for each (site kind, row, layer) restored in the corrupted run.

    The score is the probability of one token: the model's own greedy first token, or the first token of `answer`; with
    whole_answer, of all tokens of `answer` or of the model's own free answer, each after the ones before it. That
    serves where wrong answers begin like the right one; but later tokens are predicted at the answer's own positions,
    so restoring the prompt's last token alone cannot bring a whole answer back.
    A cell restores the clean output of one decoder layer ("hidden"), or of `window` neighbouring MLPs or attentions
    around a layer l, at the positions of one row: layers max(0, l - window // 2) up to but excluding
    min(layers, l + ceil(window / 2)), so cut off at both ends (ROME's convention, arXiv 2202.05262).
    positions: "tokens" gives one row per text token and one for the whole image; group names or positions give one row
    each, and a group is restored as a whole. Positions of a given answer are never restored.
    Scores are means over the corruption's samples. One forward pass per cell; memory holds every layer's clean output
    of one kind, (sample, token, hidden) each. TraceError or ModelError for what does not fit the model or the prompt.
    """
    kinds, window, rows = _check_kinds(sites), _check_window(window, vlm.layers), _rows(prompt, positions)
    corrupted = corruption.corrupt(vlm, prompt)
    clean = embed(vlm, prompt).expand_as(corrupted.embeddings).contiguous()
    answer_ids = _answer_ids(vlm, prompt, clean[:1], answer, whole_answer)
    runs = tuple(_answered(vlm, embeddings, answer_ids) for embeddings in (clean, corrupted.embeddings))
    with tqdm(total=len(kinds) * len(rows) * vlm.layers, desc="tracing", unit="cell", disable=not progress) as bar:
        scores = {kind: _sweep(vlm, runs, kind, rows, (window, answer_ids), bar) for kind in kinds}
    return CausalTrace(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens[: clean.shape[1]],
        rows=tuple(row.label for row in rows),
        row_tokens=tuple(row.token for row in rows),
        row_positions=tuple(row.positions for row in rows),
        grouped=all(row.is_group for row in rows),
        starred=tuple(prompt.groups.get("constraint", ())),
        layers=vlm.layers,
        window=window,
        spans={kind: _spans(kind, window, vlm.layers) for kind in kinds},
        corruption=corrupted.description,
        seed=corrupted.seed,
        answer_ids=answer_ids,
        answer=vlm.tokenizer.decode(list(answer_ids)).strip(),
        clean=float(answer_probabilities(vlm, runs[0], answer_ids).mean()),  # samples differ in rounding only
        corrupted=answer_probabilities(vlm, runs[1], answer_ids),
        scores=scores,
    )


def window_layers(center: int, window: int, layers: int) -> range:
    """The layers restored together around a centre, cut off at both ends of the decoder."""
    return range(max(0, center - window // 2), min(layers, center - (-window // 2)))


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Positions restored together."""

    label: str
    positions: tuple[int, ...]
    token: str | int | None
    is_group: bool


def _sweep(
    vlm: VisionLanguageModel,
    runs: tuple[Tensor, ...],
    kind: str,
    rows: Sequence[_Row],
    scored: tuple[int, tuple[int, ...]],
    bar: tqdm,
) -> Tensor:
    """(row, layer) float64: mean restored probability of every cell of a kind; `scored` is (window, answer tokens)."""
    (clean, corrupted), (window, answer_ids) = runs, scored
    states = list(clean_states(vlm, clean, kind).items())
    spans = _spans(kind, window, vlm.layers).tolist()
    scores = torch.zeros(len(rows), vlm.layers, dtype=torch.float64)
    for index, row in enumerate(rows):
        for layer, (first, last) in enumerate(spans):
            restored = dict(states[first : last + 1])
            probabilities = restored_probability(vlm, corrupted, restored, row.positions, answer=answer_ids)
            scores[index, layer] = probabilities.mean()
            bar.update()
    return scores


def _spans(kind: str, window: int, layers: int) -> Tensor:
    """(layer, 2): first and last layer, both included, that each cell of this kind restores."""
    spans = [window_layers(layer, 1 if kind == "hidden" else window, layers) for layer in range(layers)]
    return torch.tensor([[span[0], span[-1]] for span in spans])


def _rows(prompt: Prompt, positions: str | Sequence[str | int]) -> tuple[_Row, ...]:
    """The rows of the map, top to bottom."""
    if isinstance(positions, str) and positions != "tokens":
        positions = (positions,)
    if positions != "tokens":
        rows = tuple(_row(prompt, item) for item in positions)
        if not rows:
            raise TraceError('no positions to restore; pass positions="tokens", group names or positions')
        return rows
    image = prompt.groups["image"]
    text = [position for position in range(_scored_position(prompt) + 1) if position not in set(image)]
    before = [position for position in text if image and position < image[0]]
    picture = (_row(prompt, "image"),) if image else ()
    after = [position for position in text if not image or position > image[0]]
    return (*(_row(prompt, position) for position in before), *picture, *(_row(prompt, position) for position in after))


def _row(prompt: Prompt, item: str | int) -> _Row:
    """One row for a group name or a position."""
    members = prompt.positions((item,)) if isinstance(item, int) else _group(prompt, item)
    if max(members) > _scored_position(prompt):
        raise TraceError(
            f"{item!r} reaches beyond the prompt's last token (position {_scored_position(prompt)}) into the answer, "
            "which is never restored; ask for positions of the prompt"
        )
    label = item if isinstance(item, str) else prompt.tokens[members[0]]
    return _Row(
        label=label, positions=members, token=_edit_token(prompt, item, members), is_group=isinstance(item, str)
    )


def _group(prompt: Prompt, name: str) -> tuple[int, ...]:
    """Positions of a named group, without those of a given answer."""
    prompt.positions(name)  # an unknown name gets the error that lists what there is
    if name == "answer":
        raise TraceError("positions of the answer are never restored; leave out the group 'answer'")
    return group_positions(prompt, name)


def _edit_token(prompt: Prompt, item: str | int, members: tuple[int, ...]) -> str | int | None:
    """What an edit calls this row: where it can, by a name that holds in other prompts too; None for several tokens."""
    if len(members) > 1 or members[0] in prompt.groups["image"]:
        return None
    names = [name for name in ("last", "constraint_last") if prompt.groups.get(name) == members]
    return names[0] if names else members[0] if isinstance(item, int) else item


def _scored_position(prompt: Prompt) -> int:
    """The position that predicts the answer's first token."""
    return prompt.groups["last"][0]


def _answer_ids(
    vlm: VisionLanguageModel, prompt: Prompt, clean: Tensor, answer: str | None, whole: bool
) -> tuple[int, ...]:
    """The scored tokens: all of the given answer or of the model's own, or only the first."""
    if answer is None and not whole:
        return (int(next_token_probabilities(vlm, clean)[0].argmax()),)
    if answer is None and not (answer := vlm.answers([prompt])[0]):
        raise TraceError(f"the model's own answer to {prompt.question!r} is empty; pass answer= to score another")
    ids = prompt.with_answer(answer).answer_ids
    return ids if whole else ids[:1]


def _answered(vlm: VisionLanguageModel, embeddings: Tensor, answer_ids: tuple[int, ...]) -> Tensor:
    """A run's embeddings (sample, token, hidden), followed by those of all scored tokens but the last."""
    if len(answer_ids) == 1:
        return embeddings
    with torch.no_grad():
        words = vlm.model.get_input_embeddings()(torch.tensor([answer_ids[:-1]], device=embeddings.device))
    return torch.cat([embeddings, words.to(embeddings).expand(len(embeddings), -1, -1)], dim=1)


def _check_kinds(sites: str | Sequence[str]) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys((sites,) if isinstance(sites, str) else sites))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise TraceError(
            f"no kind of site {unknown[0] if unknown else '(none given)'!r}; pass some of {', '.join(KINDS)}"
        )
    return kinds


def _check_window(window: int, layers: int) -> int:
    if not 1 <= window <= layers:
        raise TraceError(
            f"no window of {window} layers: the decoder has {layers}; pass window=1 to {layers}, such as 3"
        )
    return window
