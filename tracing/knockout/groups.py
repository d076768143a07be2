"""Flows such as "image -> last", and the token groups that they name."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...models import Prompt, VisionLanguageModel
from ..engine.positions import Box, box_positions
from ..errors import TraceError

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
        found = self._named(group) if isinstance(group, str) else self.prompt.positions(group)
        if not found:
            raise TraceError(f"no tokens in the group {group!r} of this prompt; groups with tokens: {self._known()}")
        if group != "last" and max(found) > self.prompt.groups["last"][0]:
            raise TraceError(
                f"{group!r} reaches beyond the prompt's last token (position {self.prompt.groups['last'][0]}) into the "
                "answer; ask for groups of the prompt"
            )
        return tuple(sorted(found))

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
            name.removeprefix("constraint:").replace("_", " ") for name, held in self.prompt.groups.items() if held
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
