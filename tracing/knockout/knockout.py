"""Attention knockout: the answer's probability if a token group cannot attend to another in a window of layers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import Prompt, ReplayError, VisionLanguageModel
from ...models.frame import DecoderInput
from ...models.replay.observe import masking
from ...models.replay.recording import Cut
from ..engine.cells import CellScores, EdgeCell, Engine, Runs, TraceError
from ..engine.measure import measure
from ..engine.positions import Box, box_positions, window_layers
from ..engine.scoring import Scoring, scored_ids
from .result import AttentionKnockout

PAPER_FLOWS = ("question -> last", "image -> last", "image -> question", "last -> last")
"""The flows of arXiv 2411.18620 that every question about a picture has."""
CONSTRAINT_FLOWS = ("constraint -> last",)
"""The flow from the words that name the subject (arXiv 2406.04236), which prompts with a constraint have."""
OBJECT_FLOWS = ("object -> question", "other patches -> question")
"""The flows of arXiv 2411.18620 for pictures with boxes around the object of the question."""
OPTION_FLOWS = ("true option -> last", "false option -> last", "question without options -> last")
"""The flows of arXiv 2411.18620 for questions with two options, whose words are the constraints "true_option" and
"false_option"."""
_OPTIONS = ("true_option", "false_option")
Group = str | int | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Attention edges from one token group to another.

    Example:
        >>> from multrace.tracing import Flow
        >>> Flow(source="image", target="last").name
        'image -> last'
    """

    source: Group
    """The group that is attended to: a name, a position or several of these."""
    target: Group
    """The group that attends."""

    @property
    def name(self) -> str:
        """The name of the flow in results."""
        return f"{_named(self.source)} -> {_named(self.target)}"


@dataclass(frozen=True, kw_only=True)
class FlowEdges:
    """The attention edges of a flow in one prompt."""

    name: str
    sources: tuple[int, ...]
    targets: tuple[int, ...]


def parse_flow(text: str) -> Flow:
    """Return the flow of a text such as "image -> last" or "5 -> last" (a position).

    Raises `TraceError` if the text has no arrow between two groups.
    """
    source, arrow, target = (part.strip() for part in text.partition("->"))
    if not (source and arrow and target):
        raise TraceError(f'no flow {text!r}; write "source -> target" with two token groups, such as "image -> last"')
    return Flow(source=_number(source), target=_number(target))


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """The token groups of a prompt, as defined in arXiv 2411.18620."""

    vlm: VisionLanguageModel
    prompt: Prompt
    boxes: tuple[Box, ...] = ()
    """Rectangles of the picture that contain the object of the question."""
    predicting: tuple[int, ...]
    """Positions that predict the answer's scored tokens, which form the group "last"."""

    def edges(self, flow: Flow | str) -> FlowEdges:
        """Return the flow's positions. Raises `TraceError`, which lists the groups, if one is unknown or empty."""
        flow = parse_flow(flow) if isinstance(flow, str) else flow
        sources, targets = (self.positions(each) for each in (flow.source, flow.target))
        return FlowEdges(name=flow.name, sources=sources, targets=targets)

    def positions(self, group: Group) -> tuple[int, ...]:
        """Return the ascending positions of a group.

        Valid names are those of `Prompt.groups` and the following: "question", the raw question without separators and
        template; "last", every position that predicts a scored token of the answer; "separators", between the last
        picture and the question; "system", before the first picture; "template", after the question; "object" and
        "other patches", image tokens that show a box and those that show none; "object words", the constraint named
        "object"; "true option", "false option" and any other named constraint by its name, with a blank for each
        underscore; "options"; "question without options".
        """
        places = self._named(group) if isinstance(group, str) else self.prompt.positions(group)
        if not places:
            reason = (
                "; layers attend to its pictures, which stand at no position" if self.prompt.attends_to_pictures else ""
            )
            raise TraceError(
                f"no tokens in the group {group!r} of this prompt{reason}; groups with tokens: {self._known()}"
            )
        if group != "last" and max(places) > self.prompt.groups["last"][0]:
            raise TraceError(
                f"{group!r} reaches beyond the prompt's last token (position {self.prompt.groups['last'][0]}) into the "
                "answer; ask for groups of the prompt"
            )
        return tuple(sorted(places))

    def _named(self, name: str) -> tuple[int, ...]:
        groups = self.prompt.groups
        raw, image = groups["question_only"], groups["image"]
        options = {place for each in _OPTIONS for place in groups.get(f"constraint:{each}", ())}
        prompt_end = groups["last"][0]
        derived = {
            "question": raw,
            "last": self.predicting,
            "object words": groups.get("constraint:object", ()),
            "separators": tuple(place for place in groups["question"] if place not in set(raw)),
            "system": tuple(range(min(image, default=0))),
            "template": tuple(range(max(raw) + 1, prompt_end)),
            "options": tuple(options) if options else (),
            "question without options": tuple(place for place in raw if place not in options) if options else (),
        }
        if name in ("object", "other patches"):
            return self._patches(name)
        if name in derived:
            return derived[name]
        if (constraint := f"constraint:{name.replace(' ', '_')}") in groups:
            return groups[constraint]
        if name in groups:
            return groups[name]
        raise TraceError(f"no token group {name!r} in this prompt; groups with tokens: {self._known()}")

    def _patches(self, name: str) -> tuple[int, ...]:
        if not self.boxes:
            raise TraceError(f"the group {name!r} needs boxes=: rectangles of the picture that hold the object")
        inside = {place for box in self.boxes for place in box_positions(self.vlm, self.prompt, box)}
        if name == "object":
            return tuple(inside)
        return tuple(place for place in self.prompt.groups["image"] if place not in inside)

    def _known(self) -> str:
        names = ["separators", "system", "template", "object words", "options", "question without options"]
        derived = [name for name in names if self._named(name)]
        others = [
            name.removeprefix("constraint:").replace("_", " ")
            for name, members in self.prompt.groups.items()
            if members
        ]
        return ", ".join([*others, *derived, *(("object", "other patches") if self.boxes else ())])


def default_flows(prompt: Prompt, boxes: Sequence[Box]) -> tuple[str, ...]:
    """Return the published flows whose groups this prompt has. Raises `TraceError` for a prompt without a picture."""
    if not prompt.groups["image"]:
        raise TraceError('this prompt has no picture; pass flows=, such as ["question -> last"]')
    offers = {f"constraint:{name}" for name in _OPTIONS} <= set(prompt.groups)
    return (
        *PAPER_FLOWS,
        *(CONSTRAINT_FLOWS if prompt.groups.get("constraint") else ()),
        *(OBJECT_FLOWS if boxes else ()),
        *(OPTION_FLOWS if offers else ()),
    )


def _number(text: str) -> str | int:
    return int(text) if text.removeprefix("-").isdecimal() else text


def _named(group: Group) -> str:
    if isinstance(group, str):
        return group
    if isinstance(group, int):
        return f"token {group}"
    return f"tokens {', '.join(map(str, group))}" if len(group) <= 4 else f"{len(group)} tokens"


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
    """Return the answer's probability with each flow cut in each window of layers, and without any cut.

    In the layers of a window no target token attends to a source token. The window around a layer l has the
    layers max(0, l - window // 2) up to but excluding min(layers, l + ceil(window / 2)). This is attention knockout as
    in Geva et al., arXiv 2304.14767, applied to pictures as in Zhang et al., arXiv 2411.18620, sections 3 and 4.

    Args:
        vlm: The model.
        prompt: The question.
        flows: Flows such as "image -> last", by the names of token groups (see `Groups.positions`) or by positions, or
            `Flow`s; by default the published flows whose groups the prompt has. If the groups overlap, a token does
            not attend to itself either, as in "last -> last".
        windows: Numbers of layers that are cut together; by default single layers, and the same share of the decoder as
            in arXiv 2411.18620 (9 of 40 layers).
        heads: Query heads that lose the edges; "each" for every head separately; by default all heads together.
        boxes: Rectangles of the picture that contain the object of the question, for the groups "object" and "other
            patches".
        answer: The answer whose first token is scored; by default the model's own.
        whole_answer: Also score the product over all tokens of the answer; "last" then means every position that
            predicts one of them.
        gold: The right answer, with which the model's free answer is compared.
        generated: The model's free answer if it is known; by default it is generated when needed.
        engine: Settings; by default the exact fast sweep if the model allows it, else one forward pass per cell.
        progress: Show a progress bar over cells.

    Returns:
        Probabilities by score, flow, window and layer, with the settings.

    Raises:
        TraceError: A group, window or head does not exist, a token would see nothing, or a score is not finite.
        ModelError: The prompt has no such position, or a picture cannot be used.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who founded Draivo?")
        >>> knockout = mt.attention_knockout(vlm, prompt, flows="question -> last", windows=(1, 3), progress=False)
        >>> knockout.probabilities.shape  # score, flow, window, layer
        torch.Size([1, 1, 2, 8])
    """
    chosen = _checked_windows(vlm, windows)
    if generated is None and (gold is not None or (whole_answer and answer is None)):
        generated = vlm.answers([prompt])[0]
    entering = vlm.embed(prompt)
    scoring = _scoring(vlm, prompt, entering, generated if answer is None and whole_answer else answer, whole_answer)
    first = entering.length - 1
    scored = tuple(range(first, first + len(scoring.answer_ids)))
    groups = Groups(vlm=vlm, prompt=prompt, boxes=tuple(boxes), predicting=scored)
    if flows is None:
        flows = default_flows(prompt, boxes)
    elif isinstance(flows, str | Flow):
        flows = [flows]
    named = _by_head(vlm, [groups.edges(flow) for flow in flows], heads)
    spans = torch.tensor([[_ends(vlm, layer, window) for layer in range(vlm.layers)] for window in chosen])
    cells = [
        EdgeCell(cut=cut, first=start, last=end) for _, cut in named for start, end in spans.flatten(0, 1).tolist()
    ]
    runs = Runs.of_one(entering, scored=(first,))
    with tqdm(total=len(cells), desc="cutting", unit="cell", disable=not progress) as bar:
        scores = measure(vlm, runs, cells, scoring, engine=engine or Engine(), bar=bar)
    return _result(vlm, prompt, named, (chosen, spans), (scoring, scores), {"gold": gold, "generated": generated})


def _scoring(
    vlm: VisionLanguageModel, prompt: Prompt, entering: DecoderInput, answer: str | None, whole: bool
) -> Scoring:
    """Return the scoring of this answer, or of the token that the model predicts if there is none."""
    if answer is None and not whole:
        return Scoring.of_answer([int(vlm.next_token_probabilities(entering)[0].argmax())], whole=False)
    return Scoring.of_answer(scored_ids(prompt, answer, whole=whole), whole=whole)


def _checked_windows(vlm: VisionLanguageModel, windows: Sequence[int] | None) -> tuple[int, ...]:
    windows = (1, max(1, round(vlm.layers * 9 / 40))) if windows is None else windows
    windows = tuple(dict.fromkeys((windows,) if isinstance(windows, int) else windows))
    wrong = [window for window in windows if not 1 <= window <= vlm.layers]
    if wrong or not windows:
        raise TraceError(
            f"no window of {wrong[0] if wrong else 'no'} layers: the decoder has {vlm.layers}; pass some of 1 to "
            f"{vlm.layers}"
        )
    return windows


def _ends(vlm: VisionLanguageModel, layer: int, window: int) -> tuple[int, int]:
    layers = window_layers(layer, window, vlm.layers)
    return layers[0], layers[-1]


def _by_head(
    vlm: VisionLanguageModel, flows: Sequence[FlowEdges], heads: str | Sequence[int] | None
) -> list[tuple[str, Cut]]:
    """Return names and cuts of the flows, one for each head if `heads` is "each"."""
    if not flows:
        raise TraceError('no flows to cut; pass some, such as ["image -> last"], or None for those of the study')
    if heads is None:
        variants: list[tuple[str, tuple[int, ...]]] = [("", ())]
    elif isinstance(heads, str):
        if heads != "each":
            raise TraceError(f"no heads {heads!r}; pass 'each', numbers from 0 to {vlm.heads - 1}, or None for all")
        variants = [(f", head {head}", (head,)) for head in range(vlm.heads)]
    else:
        numbers = tuple(dict.fromkeys(heads))
        if not numbers or not all(0 <= head < vlm.heads for head in numbers):
            raise TraceError(f"no heads {list(numbers)}; this model has heads 0 to {vlm.heads - 1}")
        variants = [(f", heads {', '.join(map(str, numbers))}", numbers)]
    return [
        (edges.name + label, Cut(sources=frozenset(edges.sources), targets=frozenset(edges.targets), heads=numbers))
        for edges in flows
        for label, numbers in variants
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
    scoring, scores = measured
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
        clean=scores.base[:, 0],
        probabilities=scores.scores[..., 0].T.reshape(-1, *shape).contiguous(),
        free=scores.free.reshape(shape),
        engine=scores.report,
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
    """Return the answer's probability if no target token can attend to a source token in any layer.

    Compare it with the probability without sources. This is attention knockout as in arXiv 2411.18620, in all layers at
    once, by one forward pass with a mask.

    Args:
        vlm: The model.
        prompt: The question.
        sources: Token group or positions that are attended to.
        targets: Token group or positions that attend. A token always attends to itself, so groups may overlap.
        answer_id: The scored token; by default the likeliest one in the model without any cut.

    Returns:
        The probability of the scored token after the prompt.

    Raises:
        ModelError: The prompt has no such group or position.
        TraceError: The model does not let its attention function be replaced.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from multrace.tracing import knockout_probability
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(None, "Who founded Draivo?")
        >>> knockout_probability(vlm, prompt, "question", "last") < knockout_probability(vlm, prompt, (), ())
        True
    """
    entering = vlm.embed(prompt)
    if answer_id is None:
        answer_id = int(vlm.next_token_probabilities(entering).argmax())
    length = entering.length
    is_source = torch.zeros(length, dtype=torch.bool).index_fill(0, _indices(prompt, sources, length), True)
    is_target = torch.zeros(length, dtype=torch.bool).index_fill(0, _indices(prompt, targets, length), True)
    cut = is_target[:, None] & is_source[None, :] & ~torch.eye(length, dtype=torch.bool)
    try:
        with masking(vlm, dict.fromkeys(range(vlm.layers), cut[None])):
            probabilities = vlm.next_token_probabilities(entering)
    except ReplayError as error:
        raise TraceError(f"the attention of {vlm.name!r} cannot be cut: {error}") from error
    return float(probabilities[0, answer_id])


def _indices(prompt: Prompt, group: str | int | Iterable[int], length: int) -> Tensor:
    """Return the positions of the group among the first `length` of the prompt, without those of an answer."""
    group = group if isinstance(group, (str, int)) else tuple(group)
    return torch.tensor([position for position in prompt.positions(group) if position < length], dtype=torch.long)
