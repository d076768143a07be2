"""multrace flow --lens: from which layer on the output head would say the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..models import Prompt
from ..tracing.averages import average
from ..tracing.knockout.average import FilteredQuestion
from ..tracing.lens.logit_lens import AverageLogitLens, logit_lens
from ..tracing.lens.result import LogitLens, state_name, token_text
from .errors import CommandError
from .flow_questions import FlowQuestion
from .flow_reading import Answered, Asked, Files, Reading, check_group

_GROUPS = ("last", "question", "question_only", "constraint", "constraint_last", "image", "all")
_COLUMNS = 24
"""Maximum number of positions in a table of tokens."""


@dataclass(frozen=True, kw_only=True)
class Lens(Reading):
    """The logit lens, read at these positions."""

    name = analysis = "lens"
    kind = LogitLens
    drawings = ("lens.png", "lens_tokens.png")
    average_drawings = ("lens.png", "lens.csv")

    positions: tuple[str | int, ...]

    def check_settings(self) -> None:
        """Raises `CommandError` for a group that no prompt has."""
        for group in self.positions:
            if isinstance(group, str):
                check_group(group, _GROUPS)

    def check(self, question: FlowQuestion) -> None:
        """Raises `CommandError` for a question that has no tokens in a group."""
        for group in self.positions:
            if group == "image" and question.image is None:
                raise CommandError("--positions image needs a picture; pass --image, or 'image' in the record")
            if group in ("constraint", "constraint_last") and not question.spans:
                raise CommandError(f"--positions {group} needs --constraint, or 'constraint' in the record")

    def compute(self, asked: Asked) -> LogitLens:
        """Return probability and rank, after every layer, of the right answer or else of the model's own."""
        return logit_lens(
            asked.vlm,
            asked.prompt,
            positions=self.positions,
            answer=asked.question.gold or asked.generated or None,
            foil=asked.question.foil,
            progress=asked.progress,
        )

    def files(self, result: LogitLens, prompt: Prompt) -> Files:
        """Return curves at the first position, and the likeliest tokens at the last few positions."""
        order = sorted(range(len(result.positions)), key=result.positions.__getitem__)[-_COLUMNS:]
        return {"lens.png": result.plot, "lens_tokens.png": lambda path: result.plot_tokens(path, positions=order)}

    def told(self, result: LogitLens) -> list[str]:
        """Return the layer from which each followed token is the likeliest."""
        lines = [f"read at {result.position_roles[0]}, with the model's final norm"]
        names = zip(result.followed.ids, result.followed.texts, result.followed.roles, strict=True)
        for number, text, roles in names:
            layer, last = result.first_layer(number), float(result.probability(number)[-1])
            when = "not the likeliest in the end" if layer is None else f"the likeliest from {_state(layer)} on"
            lines.append(f"  {token_text(text)!r} ({'; '.join(roles)}): {when}, {last:.3g} in the end")
        return lines

    def average(self, found: Sequence[tuple[Answered, Any]], filtered: Sequence[FilteredQuestion]) -> AverageLogitLens:
        """Return the mean curves at the first position."""
        return average(result for _, result in found)

    def average_told(self, average: AverageLogitLens) -> list[str]:
        """Return the layer from which each role is the likeliest token in half of the prompts."""
        lines = [f"read at {average.position_role} in {average.count} prompts, with the model's final norm"]
        for role in average.roles:
            shares, last = average.mean(role, "share").tolist(), float(average.mean(role)[-1])
            layer = next((layer for layer, share in zip(average.layers, shares, strict=True) if share >= 0.5), None)
            when = "never in half of them" if layer is None else f"in half of them from {_state(layer)} on"
            lines.append(f"  {role}: the likeliest token {when}; in the end in {shares[-1]:.0%}, {last:.3g} probable")
        return lines


def _state(layer: int) -> str:
    return f"the {state_name(layer)}" if layer < 0 else state_name(layer)
