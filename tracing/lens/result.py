"""The logit lens of one prompt as a value, and the figures of lenses and of their averages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...artefacts import drawing
from ...artefacts.drawing.styles import GREY, INK, name_of_model
from ...artefacts.results import Result, long_frame
from ..engine.cells import TraceError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_WIDTH, _HEIGHT = 3.7, 2.2  # size in inches of a panel of curves, labels included
_ANSWER, _FOIL = "#0072b2", "#d55e00"
_OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#7a4fbf")
_MOST_COLUMNS = 60
_CELL_WIDTH, _CELL_HEIGHT = 0.82, 0.25  # inches
_LETTERS = 11  # number of letters that fit into a cell
_FRAME = "#d55e00"
_Style = tuple[str, Any]  # colour, and dashes as matplotlib spells them
NORMS = (True, False)
"""The first axis of all tensors: with the model's final norm before the output head, and without it."""
NORM_NAMES = ("with the final norm", "without the final norm")


@dataclass(frozen=True, kw_only=True, eq=False)
class LensCurve:
    """The curve of one token or role over the states."""

    label: str
    roles: tuple[str, ...]
    """The roles of the token, which decide its colour and dashes."""
    values: Tensor
    """(state,) float64: probability or share in [0, 1], or rank from 1."""
    low: Tensor | None = None
    """(state,): lower end of a band; None without a band."""
    high: Tensor | None = None
    """(state,): upper end of the band."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinePanel:
    """The curves of one quantity."""

    caption: str
    curves: tuple[LensCurve, ...]
    is_rank: bool = False
    """True if the values are ranks, which are drawn on a logarithmic axis with 1 on top."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """The cells of a table and their labels."""

    texts: tuple[tuple[str, ...], ...]
    """The token of each state and column."""
    probabilities: Tensor
    """(state, column) float64: the probability of each token."""
    framed: Tensor
    """(state, column) booleans: the cells with a frame."""
    states: tuple[str, ...]
    """The name of each state, the embedding first; drawn from the bottom up."""
    columns: tuple[tuple[str, str], ...]
    """The token at the position of each column, and its role."""


@dataclass(frozen=True, kw_only=True)
class FollowedTokens:
    """The followed tokens without duplicates, with the words that begin with each token and the roles it plays."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """The text of each token, blanks included."""
    words: tuple[tuple[str, ...], ...]
    """The words that begin with each token; empty for a token that was given as an id."""
    roles: tuple[tuple[str, ...], ...]
    """The roles of each token, which have the same names in every prompt: "answer, lower case", "word red", ..."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each token in figures: its text and its roles."""
        pairs = zip(self.texts, self.roles, strict=True)
        return tuple(f"{token_text(text)} ({'; '.join(roles)})" for text, roles in pairs)

    def index(self, word: str | int) -> int:
        """Return the index of the token that a word (as spelled in the request), a role or a token id names.

        Raises `TraceError`, which lists the followed tokens, for any other word.
        """
        for names in (self.ids,) if isinstance(word, int) else (self.words, self.roles):
            for index, own in enumerate(names):
                if word == own or (isinstance(own, tuple) and word in own):
                    return index
        words = [name for own in self.words for name in own]
        roles = [name for own in self.roles for name in own]
        raise TraceError(
            f"{word!r} was not followed; followed are the words {', '.join(words)} as {', '.join(roles)} "
            f"(tokens {', '.join(map(str, self.ids))}); read the model again with words=[{word!r}]"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LogitLens(Result):
    """The predictions of the output head from one prompt's states after the embedding and every layer.

    `logit_lens` returns it. Layers count from -1, the embedding. Values with norm=True are comparable with the model's
    own probabilities; values with norm=False are those of the published script (arXiv 2411.18620).
    """

    layout: ClassVar[str] = "multrace logit lens 2"

    model: str
    """Name or path of the model."""
    revision: str | None
    question: str
    tokens: tuple[str, ...]
    """All tokens of the prompt, one readable string per position."""
    positions: tuple[int, ...]
    """The positions that were read; each predicts the token after it."""
    position_roles: tuple[str, ...]
    """The role of each read position, which has the same name in every prompt: "last", "question 2", ..."""
    answer: str
    is_own_answer: bool
    """True if the model itself generated the answer."""
    foil: str | None
    followed: FollowedTokens
    probabilities: Tensor
    """(norm, position, state, followed token) float64; see `NORMS`."""
    ranks: Tensor
    """(norm, position, state, followed token) int64: 1 for the likeliest token; equal logits share the best rank."""
    top_ids: Tensor
    """(norm, position, state, top) int64: ids of the likeliest tokens, in descending order of probability."""
    top_probabilities: Tensor
    """(norm, position, state, top) float64: probabilities of these tokens."""
    texts: Mapping[str, str]
    """The text of each followed or likeliest token by its id in decimal digits."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer whose output each state is; -1 for the embedding."""
        return tuple(range(-1, self.probabilities.shape[2] - 1))

    @property
    def position_role(self) -> str:
        """The role of the first read position, at which `average` averages over prompts."""
        return self.position_roles[0]

    def probability(self, word: str | int, *, position: int | str = 0, norm: bool = True) -> Tensor:
        """Return the probability (state,) float64 of a followed token at a read position.

        Args:
            word: A followed word, a role or a token id.
            position: A read position by its number or role.
            norm: Whether the model's final norm is applied before the output head.

        Raises:
            TraceError: If the word was not followed or the position was not read.
        """
        return self._at(self.probabilities, position, norm)[:, self.followed.index(word)]

    def rank(self, word: str | int, *, position: int | str = 0, norm: bool = True) -> Tensor:
        """Return the rank (state,) int64 among all tokens, 1 for the likeliest.

        The arguments and errors are those of `probability`.
        """
        return self._at(self.ranks, position, norm)[:, self.followed.index(word)]

    def first_layer(self, word: str | int, *, position: int | str = 0, norm: bool = True) -> int | None:
        """Return the first layer from which the token stays the likeliest up to the last layer.

        It is -1 for the embedding, and None if the token is not the likeliest after the last layer. The arguments and
        errors are those of `probability`.
        """
        leads = (self.rank(word, position=position, norm=norm) == 1).tolist()
        if not leads[-1]:
            return None
        state = len(leads) - 1
        while state and leads[state - 1]:
            state -= 1
        return self.layers[state]

    def top(self, layer: int, *, position: int | str = 0, norm: bool = True) -> tuple[tuple[int, str, float], ...]:
        """Return (token id, text, probability) of the likeliest tokens after a layer (-1: the embedding), in order."""
        if layer not in self.layers:
            raise TraceError(f"no layer {layer}; layers were read from -1 (the embedding) to {self.layers[-1]}")
        ids = self._at(self.top_ids, position, norm)[layer + 1].tolist()
        values = self._at(self.top_probabilities, position, norm)[layer + 1].tolist()
        return tuple((token, self.texts[str(token)], value) for token, value in zip(ids, values, strict=True))

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per norm, read position, state and followed token: its probability and rank.

        The layer of the embedding is -1. The columns token_id, text, words and roles (joined by "; ") describe the
        followed token.
        """
        frame = self._frame(range(len(self.followed.ids)), {"probability": self.probabilities, "rank": self.ranks})
        members = frame.pop("number").tolist()
        frame.insert(6, "token_id", [self.followed.ids[index] for index in members])
        frame.insert(7, "text", [self.followed.texts[index] for index in members])
        frame.insert(8, "words", ["; ".join(self.followed.words[index]) for index in members])
        frame.insert(9, "roles", ["; ".join(self.followed.roles[index]) for index in members])
        return frame

    def top_dataframe(self) -> "pd.DataFrame":
        """Return a table with one row per norm, read position, state and place among the likeliest tokens, from 1."""
        places = range(1, self.top_ids.shape[-1] + 1)
        frame = self._frame(places, {"token_id": self.top_ids, "probability": self.top_probabilities})
        frame = frame.rename(columns={"number": "place"})
        frame.insert(7, "text", [self.texts[str(token)] for token in frame["token_id"]])
        return frame

    def plot(self, path: str | Path | None = None, *, position: int | str = 0) -> "Figure":
        """Return a figure with the probability and the rank of each followed token over the layers.

        The upper row uses the model's final norm, and the lower row does not.

        Args:
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            position: A read position by its number or role.

        Raises:
            TraceError: If the position was not read.
            ArtefactError: If the file cannot be written.
        """
        index = self._position(position)
        rows = {name: self._panels(index, norm) for name, norm in zip(NORM_NAMES, NORMS, strict=True)}
        place = f"{self.position_roles[index]} ({self.tokens[self.positions[index]].strip()!r})"
        titles = self.question, f"{self._answer_name} {self.answer!r}, read at {place}"
        return drawing.finished(lines_figure(rows, layers=self.layers, titles=titles), path)

    def plot_tokens(
        self,
        path: str | Path | None = None,
        *,
        norm: bool = True,
        positions: Sequence[int | str] | None = None,
    ) -> "Figure":
        """Return a figure with a table of the likeliest token at each read position after each layer.

        Columns are positions, and rows are layers with the last layer on top. The colour of a cell shows the token's
        probability. A frame marks tokens that begin a spelling of the answer.

        Args:
            path: File to which the figure is also written (png, pdf or svg by suffix); None writes no file.
            norm: Whether the model's final norm is applied before the output head.
            positions: Read positions to draw, by number or role; None draws all.

        Raises:
            TraceError: If a position was not read, or if there are more positions than fit into a figure.
            ArtefactError: If the file cannot be written.
        """
        chosen = [self._position(item) for item in (range(len(self.positions)) if positions is None else positions)]
        norm_index = NORMS.index(norm)
        ids = self.top_ids[norm_index, chosen, :, 0].T
        roles = zip(self.followed.ids, self.followed.roles, strict=True)
        answers = [token for token, members in roles if any(role.startswith("answer") for role in members)]
        table = TokenTable(
            texts=tuple(tuple(self.texts[str(token)] for token in row) for row in ids.tolist()),
            probabilities=self.top_probabilities[norm_index, chosen, :, 0].T,
            framed=torch.isin(ids, torch.tensor(answers)),
            states=tuple(state_name(layer) for layer in self.layers),
            columns=tuple((self.tokens[self.positions[index]], self.position_roles[index]) for index in chosen),
        )
        subtitle = f"likeliest token after each layer, {NORM_NAMES[norm_index]}; framed: the answer {self.answer!r}"
        return drawing.finished(tokens_figure(table, titles=(self.question, subtitle)), path)

    @property
    def _answer_name(self) -> str:
        return "the model's own answer" if self.is_own_answer else "answer"

    def _panels(self, position: int, norm: bool) -> tuple[LinePanel, LinePanel]:
        """Return the panel of probabilities and the panel of ranks."""
        values, ranks = (self._at(part, position, norm) for part in (self.probabilities, self.ranks.double()))
        return (
            LinePanel(caption="probability", curves=self._curves(values)),
            LinePanel(caption="rank", curves=self._curves(ranks), is_rank=True),
        )

    def _curves(self, values: Tensor) -> tuple[LensCurve, ...]:
        """Return a curve for each followed token from values (state, followed token)."""
        names = enumerate(zip(self.followed.labels, self.followed.roles, strict=True))
        return tuple(LensCurve(label=label, roles=roles, values=values[:, index]) for index, (label, roles) in names)

    def _frame(self, numbers: Sequence[int], values: Mapping[str, Tensor]) -> "pd.DataFrame":
        """Return rows with norm, role, position, layer, state and the number on the last axis."""
        places = range(len(self.positions))
        frame = long_frame({"norm": NORMS, "place": places, "layer": self.layers, "number": numbers}, values)
        read = frame.pop("place").tolist()
        frame.insert(1, "position_role", [self.position_roles[place] for place in read])
        frame.insert(2, "position", [self.positions[place] for place in read])
        frame.insert(3, "token", [self.tokens[position] for position in frame["position"]])
        frame.insert(5, "state", [state_name(layer) for layer in frame["layer"]])
        return frame

    def _at(self, values: Tensor, position: int | str, norm: bool) -> Tensor:
        """Return (state, ...) for one norm and position of values (norm, position, state, ...)."""
        return values[NORMS.index(norm), self._position(position)]

    def _position(self, position: int | str) -> int:
        """Return the index of a read position that is given by number or role."""
        if isinstance(position, str) and position in self.position_roles:
            return self.position_roles.index(position)
        if isinstance(position, int) and -len(self.positions) <= position < len(self.positions):
            return position % len(self.positions)
        raise TraceError(
            f"position {position!r} was not read; pass a number from 0 to {len(self.positions) - 1} or one of "
            f"{', '.join(self.position_roles)}"
        )

    def _lines(self) -> tuple[str, str]:
        token = self.followed.ids[0]
        layer, last = self.first_layer(token), float(self.probability(token)[-1])
        when = "not the likeliest in the end" if layer is None else f"the likeliest from {state_name(layer)} on"
        return (
            f"LogitLens of {name_of_model(self.model)}: {self.question!r} -> {self.answer!r}, "
            f"read at {self.position_role}",
            f"{self.followed.labels[0]}: {when}, probability {last:.3g} in the end",
        )

    def _problem(self) -> str | None:
        followed, top, states = len(self.followed.ids), self.top_ids.shape[-1], self.probabilities.shape[2]
        leading = (len(NORMS), len(self.positions), states)
        fits = [part.shape == (*leading, followed) for part in (self.probabilities, self.ranks)]
        fits += [part.shape == (*leading, top) for part in (self.top_ids, self.top_probabilities)]
        fits += [len(self.position_roles) == len(self.positions), states > 1]
        fits += [max(self.positions) < len(self.tokens)]
        fits += [len(getattr(self.followed, name)) == followed for name in ("texts", "words", "roles")]
        fits += [str(token) in self.texts for token in self.top_ids.unique().tolist()]
        return None if all(fits) else "its tensors are of other shapes than its positions and followed tokens"


def state_name(layer: int) -> str:
    """Return the name of a state: "embedding" for -1, otherwise "layer 0", "layer 1" and so on."""
    return "embedding" if layer < 0 else f"layer {layer}"


def lines_figure(
    rows: Mapping[str, Sequence[LinePanel]], *, layers: Sequence[int], titles: tuple[str, str]
) -> "Figure":
    """Return a figure with one row of panels per name, equal quantities below each other, and one legend.

    Args:
        rows: The panels of each row by the row's name.
        layers: The layer of each state; -1 is the embedding.
        titles: Title and subtitle of the figure.
    """
    columns = max(len(panels) for panels in rows.values())
    samples = {curve.label: _sample(style) for curve, style in _styled(next(iter(rows.values()))[0].curves)}
    legend = 0.7 + 0.066 * max(map(len, samples))
    figure, body = drawing.titled_figure(columns * _WIDTH + legend, len(rows) * _HEIGHT, titles)
    grid = body.subplots(len(rows), columns, squeeze=False, sharex=True)
    for row, (name, panels) in enumerate(rows.items()):
        for column, panel in enumerate(panels):
            axes, is_last = grid[row, column], row == len(rows) - 1
            titles_of = {"title": "" if column else name, "x_label": "layer (E: embedding)" if is_last else ""}
            drawing.dress(axes, y_label=panel.caption, **titles_of)
            _fill(axes, panel, layers)
    drawing.add_legend(grid[0, -1], samples)
    return figure


def _fill(axes: "Axes", panel: LinePanel, layers: Sequence[int]) -> None:
    """Draw the curves of one panel with their bands, if any; the answer is drawn on top."""
    from matplotlib.ticker import FuncFormatter

    marker = "o" if len(layers) <= 16 else ""
    for index, (curve, style) in enumerate(_styled(panel.curves)):
        line = _sample(style, marker=marker, zorder=4 - index / len(panel.curves))
        line.set_data(list(layers), curve.values.numpy())
        axes.add_line(line)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(layers, curve.low, curve.high, color=style[0], alpha=0.14, linewidth=0)
    if panel.is_rank:  # rank 1 on top, labels at whole powers of ten
        axes.set_yscale("log")
        axes.set_ylim(max(_largest(panel.curves), 10) * 1.5, 0.8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.minorticks_off()
    else:
        highest = _largest(panel.curves) or 1.0
        axes.set_ylim(-0.04 * highest, 1.06 * highest)
    _mark_layers(axes, layers)


def _mark_layers(axes: "Axes", layers: Sequence[int]) -> None:
    """Label the lower axis with layer numbers, and with E for the embedding."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(min(9, len(layers)), integer=True, steps=[1, 2, 4, 5, 10])
    first = 0 if len(layers) <= 20 else 1  # with many layers, a label 0 would touch the E
    ticks = [int(tick) for tick in locator.tick_values(layers[0], layers[-1]) if first <= tick <= layers[-1]]
    axes.set_xticks([-1, *ticks], ["E", *map(str, ticks)])
    axes.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)


def _largest(curves: Sequence[LensCurve]) -> float:
    """Return the largest value of all curves and bands."""
    parts = [part for curve in curves for part in (curve.values, curve.high) if part is not None]
    return float(torch.cat(parts).nan_to_num(0).max())


def _styled(curves: Sequence[LensCurve]) -> Iterator[tuple[LensCurve, _Style]]:
    """Yield each curve with its colour and dashes.

    The answer is blue, the false option is orange, and capitalised spellings are dashed.
    """
    others = iter(_OTHERS * len(curves))
    for curve in curves:
        sides = ((_ANSWER, "answer"), (_FOIL, "false option"))
        colours = [colour for colour, side in sides if any(role.startswith(side) for role in curve.roles)]
        only_capital = all(role.endswith("capitalised") for role in curve.roles)
        yield curve, (colours[0] if colours else next(others), (0, (3, 1.5)) if only_capital else "-")


def _sample(style: _Style, marker: str = "o", **more: Any) -> "Line2D":
    """Return a line of this style without points."""
    from matplotlib.lines import Line2D

    colour, dashes = style
    return Line2D([], [], color=colour, linestyle=dashes, linewidth=1.5, marker=marker, markersize=2.6, **more)


def tokens_figure(table: TokenTable, *, titles: tuple[str, str]) -> "Figure":
    """Return a figure with a table of tokens, coloured by their probability.

    Raises `TraceError` if there are no columns or more than 60.
    """
    count = len(table.columns)
    if not 1 <= count <= _MOST_COLUMNS:
        raise TraceError(f"cannot draw {count} positions in one table; pass positions= with 1 to {_MOST_COLUMNS}")
    height = _CELL_HEIGHT * len(table.states)
    figure, body = drawing.titled_figure(max(5.2, count * _CELL_WIDTH + 2.0), height + 0.7, titles)
    axes = body.subplots()
    colours = {"cmap": "Blues", "vmin": 0, "vmax": 1, "edgecolors": "white", "linewidth": 0.8}
    mesh = axes.pcolormesh(table.probabilities.numpy(), **colours)
    _write_cells(axes, table)
    _label(axes, table)
    drawing.add_colour_bar(mesh, axes, "probability", height)
    return figure


def _write_cells(axes: "Axes", table: TokenTable) -> None:
    """Write the token into each cell, and draw the frames."""
    from matplotlib.patches import Rectangle

    for state, row in enumerate(table.texts):
        for column, text in enumerate(row):
            colour = "white" if table.probabilities[state, column] > 0.55 else INK
            place = {"ha": "center", "va": "center", "fontsize": 7.5, "color": colour}
            axes.text(column + 0.5, state + 0.5, _cut(text), parse_math=False, **place)
            if table.framed[state, column]:
                corner = (column + 0.03, state + 0.06)
                axes.add_patch(Rectangle(corner, 0.94, 0.88, fill=False, edgecolor=_FRAME, linewidth=1.2))


def _label(axes: "Axes", table: TokenTable) -> None:
    """Write the states at the left, and the token and role of each position above."""
    axes.set_yticks([state + 0.5 for state in range(len(table.states))], table.states)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for column, (token, role) in enumerate(table.columns):
        place = {"textcoords": "offset points", "ha": "center", "va": "bottom", "parse_math": False}
        above = (column + 0.5, len(table.states))
        axes.annotate(_cut(token), above, (0, 14), fontsize=8, weight="bold", color=INK, **place)
        axes.annotate(_cut(role, 13), above, (0, 4), fontsize=6.5, color=GREY, **place)


def _cut(text: str, letters: int = _LETTERS) -> str:
    """Return the text, shortened to fit into a cell."""
    text = token_text(text)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def token_text(text: str) -> str:
    """Return the text of a token for figures: no outer blanks, and a sign for a line break and for a lone blank."""
    return text.replace("\n", "↵").strip() or "␣"
