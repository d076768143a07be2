"""The logit lens: the predictions of the output head from the residual stream after every layer, and their average."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from ...artefacts import drawing
from ...artefacts.averages import Averager, Mean
from ...artefacts.drawing.styles import name_of_model
from ...artefacts.results import Result, long_frame
from ...models import Prompt, Site, VisionLanguageModel, capture
from ..engine.cells import TraceError, skipped_in_words, warn_caller
from ..engine.positions import Positions, named_positions
from .result import NORM_NAMES, NORMS, FollowedTokens, LensCurve, LinePanel, LogitLens, lines_figure, state_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BATCH = 64
"""Number of positions whose logits over the whole vocabulary are held at the same time."""
_WIDE_ROUNDING, _NARROW_ROUNDING = 1000, 4
"""Number of rounding steps of the largest logit by which products of different sizes may differ: in float32 or wider,
and in half precision."""
QUANTITIES = ("probability", "share", "log_rank")
"""The probability, the share of prompts in which the token is the likeliest, and log10 of its rank."""
_CAPTIONS = ("mean probability", "share of prompts, likeliest", "rank (geometric mean)")
_AXES = ("norm", "state", "role")


def logit_lens(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    *,
    positions: Positions = "last",
    answer: str | None = None,
    foil: str | None = None,
    words: str | int | Sequence[str | int] = (),
    top: int = 10,
    progress: bool = True,
) -> LogitLens:
    """Return how likely the answer's first token is at each position after the embedding and after every layer.

    One forward pass records the layers + 1 states of the residual stream. Each of them goes through the output head
    twice: with the model's final norm before the head, which makes the probabilities comparable with the model's own,
    and without it, as in the published script (arXiv 2411.18620). The last state is the one before the final norm,
    whereas the `hidden_states` of transformers end with the normed one. The softmax is computed in float64.

    Args:
        vlm: The model.
        prompt: The prompt. It may carry an answer, whose positions can be read as well.
        positions: Groups, positions or both that are read (default: the last token of the prompt).
        answer: The answer to follow; None generates the model's own greedy answer first.
        foil: The false option to follow as well; None follows no false option.
        words: Further words, each represented by its first token as a continuation of this prompt, or token ids.
        top: Number of likeliest tokens to store for each state (the published script stores 50).
        progress: Show a progress bar.

    Returns:
        A `LogitLens`. Answer and foil are followed as they are spelled and in the other case of their first letter
        (lower case or capitalised). The other case is left out if its first token spells less of the word than the
        first token of the given spelling does: a tokenizer that has "Rome" but splits "rome" into letters would
        otherwise add the token "r", which does not stand for the answer. Some tokenizers begin a rare spelling with a
        lone blank, which is then the followed token; `result.followed.texts` shows it.

    Raises:
        TraceError: If norm and readout do not reproduce the model's own logits, if logits overflow the dtype of the
            model, or if an argument does not fit the prompt.
        ModelError: If the model changes the logits of its output head by more than a scale and a soft cap.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); for images arXiv 2411.18620, section 6.

    Example:
        >>> import multrace as mt
        >>> from multrace.data import tiny_vlm_path
        >>> from PIL import Image
        >>> vlm = mt.load(tiny_vlm_path())
        >>> prompt = vlm.prompt(Image.new("RGB", (64, 64), "red"), "What colour is this?")
        >>> lens = mt.logit_lens(vlm, prompt, answer="red", progress=False)
        >>> lens.probability("red").shape  # the embedding and eight layers
        torch.Size([9])
    """
    roles = named_positions(prompt, positions)
    is_own = answer is None
    if answer is None and not (answer := vlm.answers([prompt])[0]):
        raise TraceError(f"the model's own answer to {prompt.question!r} is empty; pass answer= to follow another")
    followed = _follow(vlm, prompt, answer=answer, foil=foil, words=words)
    _check_top(vlm, top)
    states, logits = _residual_stream(vlm, prompt, list(roles))
    _check_head(vlm, states[-1], logits)
    bar = tqdm(states, desc="reading layers", unit="state", disable=not progress)
    read = [_read_state(vlm, state, followed, top) for state in bar]
    probabilities, ranks, top_ids, top_probabilities = (torch.stack(part, 2).cpu() for part in zip(*read, strict=True))
    tokens = sorted({*followed.ids, *top_ids.flatten().tolist()})
    return LogitLens(
        model=vlm.name,
        revision=vlm.revision,
        question=prompt.question,
        tokens=prompt.tokens,
        positions=tuple(roles),
        position_roles=tuple(roles.values()),
        answer=answer,
        is_own_answer=is_own,
        foil=foil,
        followed=followed,
        probabilities=probabilities,
        ranks=ranks,
        top_ids=top_ids,
        top_probabilities=top_probabilities,
        texts={str(token): vlm.tokenizer.decode([token]) for token in tokens},
    )


def _residual_stream(vlm: VisionLanguageModel, prompt: Prompt, positions: list[int]) -> tuple[list[Tensor], Tensor]:
    """Return states (position, hidden) after the embedding and each layer, and the model's logits (position, vocab).

    The state after a layer that does not run for this prompt is the one before it.
    """
    skipped = vlm.skipped_layers(prompt)
    if skipped:
        warn_caller(f"{skipped_in_words(vlm, skipped)}; the states there are those of the layer before")
    sites = [Site("hidden", layer) for layer in range(vlm.layers)]
    first = next(site for site in sites if site.layer not in skipped)
    with torch.no_grad(), capture(vlm, sites, clone=True) as outputs:
        with capture(vlm, [first], inputs=True, clone=True) as inputs:
            logits = vlm.logits(prompt)
    states = [inputs[first]]
    for site in sites:
        states.append(outputs.get(site, states[-1]))
    return [state[0, positions] for state in states], logits[0, positions]


def _head(vlm: VisionLanguageModel, states: Tensor) -> Tensor:
    """Return the logits (position, vocab) float64 of states (position, hidden), scaled and capped as the model does."""
    return vlm.readout(states).double()


def _lens(vlm: VisionLanguageModel, states: Tensor) -> Tensor:
    """Return logits (norm, position, vocab) float64 of states (position, hidden), first with the final norm."""
    with torch.no_grad():
        return torch.stack([_head(vlm, vlm.final_norm(states)), _head(vlm, states)])


def _read_state(
    vlm: VisionLanguageModel, states: Tensor, followed: FollowedTokens, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return probabilities and ranks of followed tokens, and ids and probabilities of the likeliest tokens.

    All tensors are (norm, position, token).
    """
    parts = [_read_logits(vlm, _lens(vlm, part), list(followed.ids), top) for part in states.split(_BATCH)]
    probabilities, ranks, top_ids, top_probabilities = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return probabilities, ranks, top_ids, top_probabilities


def _read_logits(
    vlm: VisionLanguageModel, logits: Tensor, ids: list[int], top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_read_state` returns, from logits (norm, position, vocab).

    Ranks compare logits, since the softmax may round to ties.
    """
    if not logits.isfinite().all():
        raise TraceError(
            f"states of {vlm.name!r} overflow {vlm.dtype} at its output head; "
            "load it with dtype='float32' or 'bfloat16'"
        )
    probabilities = logits.softmax(-1)
    ranks = torch.stack([(logits > logits[..., token, None]).sum(-1) + 1 for token in ids], -1)
    likeliest = logits.topk(top).indices
    return probabilities[..., ids], ranks, likeliest, probabilities.gather(-1, likeliest)


def _follow(
    vlm: VisionLanguageModel, prompt: Prompt, *, answer: str, foil: str | None, words: str | int | Sequence[str | int]
) -> FollowedTokens:
    """Return the first tokens of answer, foil and words as continuations of the prompt; equal tokens are merged."""
    sides = {"answer": answer} | ({} if foil is None else {"false option": foil})
    _check_told_apart(vlm, prompt, answer, foil)
    items: list[tuple[str, str | int]] = [
        item for side, text in sides.items() for item in _spellings(vlm, prompt, side, text)
    ]
    further = (words,) if isinstance(words, str | int) else tuple(words)
    items += [(f"token {word}" if isinstance(word, int) else f"word {word}", word) for word in further]
    members: dict[int, tuple[list[str], list[str]]] = {}
    for role, word in items:
        own_words, roles = members.setdefault(_first_token(vlm, prompt, word), ([], []))
        own_words += [word] if isinstance(word, str) and word not in own_words else []
        roles += [role] if role not in roles else []
    return FollowedTokens(
        ids=tuple(members),
        texts=tuple(vlm.tokenizer.decode([token]) for token in members),
        words=tuple(tuple(own_words) for own_words, _ in members.values()),
        roles=tuple(tuple(roles) for _, roles in members.values()),
    )


def _spellings(vlm: VisionLanguageModel, prompt: Prompt, side: str, text: str) -> list[tuple[str, str]]:
    """Return (role, spelling) in lower case and capitalised.

    The case that was not given is left out if its first token spells less of the word.
    """
    lower, capitalised = _cases(text)
    given = capitalised if text.strip()[:1].isupper() else lower
    length = _first_length(vlm, prompt, given)
    named = {f"{side}, lower case": lower, f"{side}, capitalised": capitalised}
    return [(role, word) for role, word in named.items() if word == given or _first_length(vlm, prompt, word) >= length]


def _cases(text: str) -> tuple[str, str]:
    """Return the text in lower case, and the text with a capital first letter and all other letters unchanged."""
    text = text.strip()
    return text.lower(), text[:1].upper() + text[1:]


def _first_length(vlm: VisionLanguageModel, prompt: Prompt, word: str) -> int:
    """Return the number of letters of a word that its first token spells."""
    return len(vlm.tokenizer.decode([_first_token(vlm, prompt, word)]).strip())


def _first_token(vlm: VisionLanguageModel, prompt: Prompt, word: str | int) -> int:
    if isinstance(word, str):
        return prompt.answer_tokens(word)[0]
    size = vlm.vocab
    if isinstance(word, bool) or not 0 <= word < size:
        raise TraceError(f"no token {word} in {vlm.name!r}: its vocabulary has {size} (0 to {size - 1})")
    return word


def _check_told_apart(vlm: VisionLanguageModel, prompt: Prompt, answer: str, foil: str | None) -> None:
    """Raise `TraceError` if every spelling of the foil begins with a token that begins a spelling of the answer."""
    if foil is None:
        return
    tokens = [{_first_token(vlm, prompt, word) for word in _cases(text)} for text in (answer, foil)]
    if tokens[1] <= tokens[0]:
        raise TraceError(
            f"the foil {foil!r} begins with the same tokens as the answer {answer!r}, so the two cannot be told apart "
            "by their first tokens; pass another foil"
        )


def _check_top(vlm: VisionLanguageModel, top: int) -> None:
    size = vlm.vocab
    if not 1 <= top <= size:
        raise TraceError(f"cannot keep the {top} likeliest of {size} tokens; pass top from 1 to {size}")


def _check_head(vlm: VisionLanguageModel, states: Tensor, logits: Tensor) -> None:
    """Raise `TraceError` unless final norm and readout turn the last states (position, hidden) into these logits."""
    steps = _WIDE_ROUNDING if vlm.dtype in (torch.float32, torch.float64) else _NARROW_ROUNDING
    own = logits.double()
    with torch.no_grad():
        through_head = torch.cat([_head(vlm, vlm.final_norm(part)) for part in states.split(_BATCH)]).to(own.device)
    difference, largest = float((through_head - own).abs().max()), float(own.abs().max())
    if not difference <= steps * torch.finfo(vlm.dtype).eps * largest:
        raise TraceError(
            f"final norm and output head of {vlm.name!r}, scaled and capped as it does, do not give its own logits "
            f"(off by {difference:.3g}, the largest being {largest:.3g}), so what they say in earlier layers would not "
            "be comparable with its answers; remove whatever changes its last states or its logits, such as a hook"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageLogitLens(Result):
    """The logit lens averaged over prompts, at the first read position of each. `average` returns it."""

    layout: ClassVar[str] = "multrace average logit lens 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    position_role: str
    """The role of the position that was averaged."""
    roles: tuple[str, ...]
    """The roles of the followed tokens: "answer, lower case", "answer, capitalised", "word red", ..."""
    count: int
    """Number of prompts."""
    probability: Mean
    """(norm, state, role): the probability, averaged over the prompts that follow a token in this role."""
    share: Mean
    """(norm, state, role): 1 where the token is the likeliest, else 0."""
    log_rank: Mean
    """(norm, state, role): log10 of the rank."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer whose output each state is; -1 for the embedding."""
        return tuple(range(-1, self.probability.shape[1] - 1))

    def mean(self, role: str, quantity: str = "probability", *, norm: bool = True) -> Tensor:
        """Return the mean (state,) float64 of one of `QUANTITIES` over the prompts that have the role.

        Raises `TraceError` for an unknown role or quantity.
        """
        place = self._place(role, quantity, norm)
        return getattr(self, quantity).mean[place]

    def interval(self, role: str, quantity: str = "probability", *, norm: bool = True) -> tuple[Tensor, Tensor]:
        """Return (low, high), each (state,): the 95 % interval of `mean` over prompts by Student's t.

        NaN if only one prompt has the role. Raises `ArtefactError` for an average of one prompt.
        """
        place = self._place(role, quantity, norm)
        mean = getattr(self, quantity)
        low, high = mean.band() if self.count > 1 else mean.interval()
        return low[place], high[place]

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per norm, state, role and quantity: mean, low and high of its interval, and n.

        The column n holds the number of prompts that have the role; low and high are NaN where n is 1. The layer of the
        embedding is -1.
        """
        means = [getattr(self, quantity) for quantity in QUANTITIES]
        low, high = (torch.stack(ends, -1) for ends in zip(*(mean.band() for mean in means), strict=True))
        columns = {"mean": torch.stack([mean.mean for mean in means], -1), "low": low, "high": high}
        axes = {"norm": NORMS, "layer": self.layers, "role": self.roles, "quantity": QUANTITIES}
        frame = long_frame(axes, columns | {"n": torch.stack([mean.count for mean in means], -1)})
        frame.insert(2, "state", [state_name(layer) for layer in frame["layer"]])
        return frame

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure with the mean probability, top-1 share and geometric mean rank of each role.

        The top-1 share is the share of prompts in which the token is the likeliest. Bands are 95 % intervals over
        prompts. The upper row uses the model's final norm, and the lower row does not. The figure is also written to
        the path if one is given (png, pdf or svg by suffix).
        """
        rows = {name: self._panels(norm) for name, norm in zip(NORM_NAMES, NORMS, strict=True)}
        bands = ", bands: 95% intervals of the mean" if self.count > 1 else ""
        titles = f"Logit lens over {self.count} prompts", f"read at {self.position_role}{bands}"
        return drawing.finished(lines_figure(rows, layers=self.layers, titles=titles), path)

    def _panels(self, norm: bool) -> tuple[LinePanel, ...]:
        """Return a panel for each quantity."""
        return tuple(
            LinePanel(
                caption=caption,
                curves=tuple(self._curve(role, quantity, norm) for role in self.roles),
                is_rank=quantity == "log_rank",
            )
            for quantity, caption in zip(QUANTITIES, _CAPTIONS, strict=True)
        )

    def _curve(self, role: str, quantity: str, norm: bool) -> LensCurve:
        """Return the mean of a role with its band; log ranks are converted back to ranks."""
        is_rank, place = quantity == "log_rank", self._place(role, quantity, norm)
        mean = getattr(self, quantity)
        low, high = (end[place].clamp(0.0, None if is_rank else 1.0) for end in mean.band())
        values, low, high = (10**part if is_rank else part for part in (mean.mean[place], low, high))
        return LensCurve(label=role, roles=(role,), values=values, low=low, high=high)

    def _place(self, role: str, quantity: str, norm: bool) -> tuple[int, slice, int]:
        """Return the index in a mean that selects the values (state,) of a role."""
        if quantity not in QUANTITIES:
            raise TraceError(f"no quantity {quantity!r} in this average; it has {', '.join(QUANTITIES)}")
        if role not in self.roles:
            raise TraceError(f"no role {role!r} in this average; it has {', '.join(self.roles)}")
        return NORMS.index(norm), slice(None), self.roles.index(role)

    def _lines(self) -> tuple[str, str]:
        role = self.roles[0]
        return (
            f"AverageLogitLens of {name_of_model(self.model)} over {self.count} prompts, read at {self.position_role}",
            f"{role}: the likeliest in {float(self.mean(role, 'share')[-1]):.0%} of prompts in the end, mean "
            f"probability {float(self.mean(role)[-1]):.3g}",
        )

    def _problem(self) -> str | None:
        states = self.probability.shape[1]
        fits = [getattr(self, name).fits(len(NORMS), states, len(self.roles)) for name in QUANTITIES]
        return None if all(fits) and states > 1 else "its tensors are of other shapes than its layers and roles"


class LogitLensAverager(Averager[LogitLens, AverageLogitLens]):
    """Average the logit lens by role over prompts, at the first read position of each prompt.

    A token that plays two roles in a prompt counts in both. A prompt that lacks a role (for example the foil) does not
    count towards the average of that role.
    """

    alike = ("model", "revision", "layers", "position_role")

    def _take(self, result: LogitLens) -> None:
        own = {role: index for index, members in enumerate(result.followed.roles) for role in members}
        axes = dict(zip(_AXES, (NORMS, result.layers, tuple(own)), strict=True))
        probabilities, ranks = (part[:, 0][..., list(own.values())] for part in (result.probabilities, result.ranks))
        self._add("probability", probabilities, axes)
        self._add("share", ranks == 1, axes)
        self._add("log_rank", ranks.double().log10(), axes)

    def _average(self) -> AverageLogitLens:
        names = self._labels("probability", "role")
        order = sorted(range(len(names)), key=lambda index: _order(names[index]))
        return AverageLogitLens(
            model=self.first.model,
            revision=self.first.revision,
            position_role=self.first.position_role,
            roles=tuple(names[index] for index in order),
            count=self.count,
            **{name: self._mean(name)[:, :, order] for name in QUANTITIES},
        )


def _order(role: str) -> int:
    """Return a sort key that puts the answer first, then the false option, then all others in their given order."""
    return next((place for place, side in enumerate(("answer", "false option")) if role.startswith(f"{side}, ")), 2)
