"""The result of the logit lens for one prompt: probabilities and ranks of tokens after every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ...artefacts.files import load, save
from ...artefacts.frames import long_frame
from ..errors import TraceError
from .plot import Curve, LinePanel, TokenTable, draw_lines, draw_tokens, token_text


@dataclass(frozen=True, kw_only=True)
class FollowedTokens:
    """Tokens, each once, with the words that begin with it and the roles that it plays."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """What each token says, blanks included."""
    words: tuple[tuple[str, ...], ...]
    """Per token the words of which it is the first token; empty for one that was given as an id."""
    roles: tuple[tuple[str, ...], ...]
    """Per token what it stands for, named alike in every prompt: "answer, lower case", "word red", ..."""

    @property
    def labels(self) -> tuple[str, ...]:
        """For pictures: what each token says and stands for."""
        return tuple(
            f"{token_text(text)} ({'; '.join(roles)})" for text, roles in zip(self.texts, self.roles, strict=True)
        )

    def index(self, word: str | int) -> int:
        """Which token a word (as spelled when asked), a role or a token id means. TraceError lists what is followed."""
        names = (self.ids,) if isinstance(word, int) else (self.words, self.roles)
        for members in names:
            for index, each in enumerate(members):
                if word == each or (isinstance(each, tuple) and word in each):
                    return index
        words = [name for each in self.words for name in each]
        roles = [name for each in self.roles for name in each]
        raise TraceError(
            f"{word!r} was not followed; followed are the words {', '.join(words)} as {', '.join(roles)} "
            f"(tokens {', '.join(map(str, self.ids))}); read the model again with words=[{word!r}]"
        )


_LAYOUT = "multrace logit lens 1"
NORMS = (True, False)
"""The first axis of all tensors: with the model's final norm before the output head, and without it."""
NORM_NAMES = ("with the final norm", "without the final norm")


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitLens:
    """What the output head makes of one prompt's states after the embedding and every layer.

    Made by `logit_lens`. Layers count from -1, the embedding; norm=True is comparable with the model's own
    probabilities, norm=False is what the published script computes (arXiv 2411.18620).
    """

    model: str
    revision: str | None
    question: str
    tokens: tuple[str, ...]
    """All tokens of the prompt, one readable string per position."""
    positions: tuple[int, ...]
    """The positions that were read; each predicts the token after it."""
    position_roles: tuple[str, ...]
    """What each read position is, named alike in every prompt: "last", "question 2", ..."""
    answer: str
    is_own_answer: bool
    """The answer is the one that the model gave by itself."""
    foil: str | None
    followed: FollowedTokens
    probabilities: Tensor
    """(norm, position, state, followed token) float64; see `NORMS`."""
    ranks: Tensor
    """(norm, position, state, followed token) int64: 1 for the likeliest; equal logits share the best rank."""
    top_ids: Tensor
    """(norm, position, state, top) int64: the likeliest tokens, in order."""
    top_probabilities: Tensor
    """(norm, position, state, top) float64: theirs."""
    texts: Mapping[str, str]
    """What each followed or likeliest token says, by its id in decimal digits."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer that each state comes out of; -1 for the embedding."""
        return tuple(range(-1, self.probabilities.shape[2] - 1))

    def probability(self, word: str | int, *, position: int | str = 0, norm: bool = True) -> Tensor:
        """(state,) float64: the probability of a followed word, role or token id at a read position.

        position: which of the read ones, by number or role. TraceError if word or position were not read.
        """
        return self._at(self.probabilities, position, norm)[:, self.followed.index(word)]

    def rank(self, word: str | int, *, position: int | str = 0, norm: bool = True) -> Tensor:
        """(state,) int64: its rank among all tokens, 1 for the likeliest; arguments as in `probability`."""
        return self._at(self.ranks, position, norm)[:, self.followed.index(word)]

    def first_layer(self, word: str | int, *, position: int | str = 0, norm: bool = True) -> int | None:
        """The layer after which it is the likeliest token and stays it to the end; -1 for the embedding, None if none.

        Arguments as in `probability`.
        """
        leads = (self.rank(word, position=position, norm=norm) == 1).tolist()
        if not leads[-1]:
            return None
        state = len(leads) - 1
        while state and leads[state - 1]:
            state -= 1
        return self.layers[state]

    def top(self, layer: int, *, position: int | str = 0, norm: bool = True) -> tuple[tuple[int, str, float], ...]:
        """(token id, text, probability) of the likeliest tokens after a layer (-1: the embedding), in order."""
        if layer not in self.layers:
            raise TraceError(f"no layer {layer}; layers were read from -1 (the embedding) to {self.layers[-1]}")
        ids = self._at(self.top_ids, position, norm)[layer + 1].tolist()
        values = self._at(self.top_probabilities, position, norm)[layer + 1].tolist()
        return tuple((token, self.texts[str(token)], value) for token, value in zip(ids, values, strict=True))

    def save(self, path: str | Path) -> Path:
        """The written file: safetensors with the settings as text. TraceError if it cannot be written."""
        return save(path, _LAYOUT, self)

    @classmethod
    def load(cls, path: str | Path) -> "LogitLens":
        """The lens that `save` wrote. TraceError if the file is missing, corrupt or something else."""
        return load(path, _LAYOUT, cls, check=_problem, nested={"followed": FollowedTokens})

    def to_dataframe(self) -> pd.DataFrame:
        """One line per norm, read position, state and followed token: its probability and rank.

        layer is -1 for the embedding; token_id, text, words and roles (joined by "; ") tell the followed token.
        """
        frame = self._frame(range(len(self.followed.ids)), {"probability": self.probabilities, "rank": self.ranks})
        members = frame.pop("number").tolist()
        frame.insert(6, "token_id", [self.followed.ids[index] for index in members])
        frame.insert(7, "text", [self.followed.texts[index] for index in members])
        frame.insert(8, "words", ["; ".join(self.followed.words[index]) for index in members])
        frame.insert(9, "roles", ["; ".join(self.followed.roles[index]) for index in members])
        return frame

    def top_dataframe(self) -> pd.DataFrame:
        """One line per norm, read position, state and place (from 1) among the likeliest tokens: token, probability."""
        places = range(1, self.top_ids.shape[-1] + 1)
        frame = self._frame(places, {"token_id": self.top_ids, "probability": self.top_probabilities})
        frame = frame.rename(columns={"number": "place"})
        frame.insert(7, "text", [self.texts[str(token)] for token in frame["token_id"]])
        return frame

    def plot(self, path: str | Path, *, position: int | str = 0) -> Path:
        """The written picture: probability and rank of each followed token over the layers at one read position.

        Upper row with the model's final norm, lower row without. The suffix names the format (png, pdf or svg).
        """
        index = self._position(position)
        rows = {name: self._panels(index, norm) for name, norm in zip(NORM_NAMES, NORMS, strict=True)}
        place = f"{self.position_roles[index]} ({self.tokens[self.positions[index]].strip()!r})"
        whose = "the model's own answer" if self.is_own_answer else "answer"
        subtitle = f"{whose} {self.answer!r}, read at {place}"
        return draw_lines(path, rows, layers=self.layers, titles=(self.question, subtitle))

    def plot_tokens(self, path: str | Path, *, norm: bool = True, positions: Sequence[int | str] | None = None) -> Path:
        """The written picture: the likeliest token at each read position (column) after each layer (row, last on top).

        Coloured by its probability; framed where it is one of the answer's spellings. positions: some of the read ones,
        by number or role. TraceError for more than fit into a picture.
        """
        chosen = [self._position(each) for each in (range(len(self.positions)) if positions is None else positions)]
        norm_index = NORMS.index(norm)
        ids = self.top_ids[norm_index, chosen, :, 0].T
        roles = zip(self.followed.ids, self.followed.roles, strict=True)
        answers = [token for token, members in roles if any(role.startswith("answer") for role in members)]
        table = TokenTable(
            texts=tuple(tuple(self.texts[str(token)] for token in row) for row in ids.tolist()),
            probabilities=self.top_probabilities[norm_index, chosen, :, 0].T,
            framed=torch.isin(ids, torch.tensor(answers)),
            states=tuple(state_name(layer) for layer in self.layers),
            columns=tuple((self.tokens[self.positions[each]], self.position_roles[each]) for each in chosen),
        )
        subtitle = f"likeliest token after each layer, {NORM_NAMES[norm_index]}; framed: the answer {self.answer!r}"
        return draw_tokens(path, table, titles=(self.question, subtitle))

    def _panels(self, position: int, norm: bool) -> tuple[LinePanel, LinePanel]:
        """Probabilities, and ranks beside them."""
        values, ranks = (self._at(each, position, norm) for each in (self.probabilities, self.ranks.double()))
        return (
            LinePanel(caption="probability", curves=self._curves(values)),
            LinePanel(caption="rank", curves=self._curves(ranks), is_rank=True),
        )

    def _curves(self, values: Tensor) -> tuple[Curve, ...]:
        """A curve for each followed token from (state, followed token)."""
        named = zip(self.followed.labels, self.followed.roles, strict=True)
        return tuple(
            Curve(label=label, roles=roles, values=values[:, index]) for index, (label, roles) in enumerate(named)
        )

    def _frame(self, numbers: Sequence[int], values: dict[str, Tensor]) -> pd.DataFrame:
        """Lines with norm, role, position, layer, state and the number on the last axis."""
        places = range(len(self.positions))
        frame = long_frame([("norm", NORMS), ("place", places), ("layer", self.layers), ("number", numbers)], values)
        read = frame.pop("place").tolist()
        frame.insert(1, "position_role", [self.position_roles[place] for place in read])
        frame.insert(2, "position", [self.positions[place] for place in read])
        frame.insert(3, "token", [self.tokens[position] for position in frame["position"]])
        frame.insert(5, "state", [state_name(layer) for layer in frame["layer"]])
        return frame

    def _at(self, values: Tensor, position: int | str, norm: bool) -> Tensor:
        """(state, ...): one norm and position of (norm, position, state, ...)."""
        return values[NORMS.index(norm), self._position(position)]

    def _position(self, position: int | str) -> int:
        """Which of the read positions is meant, by number or role."""
        if isinstance(position, str) and position in self.position_roles:
            return self.position_roles.index(position)
        if isinstance(position, int) and -len(self.positions) <= position < len(self.positions):
            return position % len(self.positions)
        raise TraceError(
            f"position {position!r} was not read; pass a number from 0 to {len(self.positions) - 1} or one of "
            f"{', '.join(self.position_roles)}"
        )


def state_name(layer: int) -> str:
    """What a state is called: "embedding" for -1, else "layer 0" and so on."""
    return "embedding" if layer < 0 else f"layer {layer}"


def _problem(lens: LogitLens) -> str | None:
    """What does not fit together in a lens that was read from a file."""
    followed, top, states = len(lens.followed.ids), lens.top_ids.shape[-1], lens.probabilities.shape[2]
    leading = (len(NORMS), len(lens.positions), states)
    fits = [each.shape == (*leading, followed) for each in (lens.probabilities, lens.ranks)]
    fits += [each.shape == (*leading, top) for each in (lens.top_ids, lens.top_probabilities)]
    fits += [len(lens.position_roles) == len(lens.positions), states > 1]
    fits += [max(lens.positions) < len(lens.tokens)]
    fits += [len(each) == followed for each in (lens.followed.words, lens.followed.roles)]
    fits += [str(token) in lens.texts for token in lens.top_ids.unique().tolist()]
    return None if all(fits) else "its tensors are of other shapes than its positions and followed tokens"
