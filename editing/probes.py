"""The questions about an edit besides the edited one, and whether their answers should change or stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..models import Prompt
from .errors import EditError
from .requests import EditRequest, counted

EDITED, PORTABILITY, GENERAL = "edited", "portability", "general"
REPHRASE, OTHER_PICTURE, REPHRASE_OTHER_PICTURE = "rephrase", "other_picture", "rephrase_other_picture"
BY_NAME = "by_name"
SAME_QUESTION_OTHER_PICTURE = "same_question_other_picture"
OTHER_QUESTION_SAME_PICTURE = "other_question_same_picture"
NO_PICTURE, UNRELATED = "no_picture", "unrelated"

EFFICACY, GENERALITY, LOCALITY, ABILITY = "efficacy", "generality", "locality", "general ability"
ASPECTS = (EFFICACY, GENERALITY, PORTABILITY, LOCALITY, ABILITY)
KINDS: Mapping[str, tuple[str, str]] = {
    EDITED: (EFFICACY, "the edited question and picture"),
    REPHRASE: (GENERALITY, "other wordings"),
    OTHER_PICTURE: (GENERALITY, "other pictures of the same thing"),
    REPHRASE_OTHER_PICTURE: (GENERALITY, "other wordings, other pictures"),
    BY_NAME: (GENERALITY, "asked by name"),
    PORTABILITY: (PORTABILITY, "questions that need the new fact"),
    SAME_QUESTION_OTHER_PICTURE: (LOCALITY, "same question, pictures of other things"),
    OTHER_QUESTION_SAME_PICTURE: (LOCALITY, "other questions, same picture"),
    NO_PICTURE: (LOCALITY, "same question, no picture"),
    UNRELATED: (LOCALITY, "unrelated questions"),
    GENERAL: (ABILITY, "held-out questions"),
}
"""Kind of question -> (what it measures, its name for people)."""
PROBE_KINDS = tuple(kind for kind in KINDS if kind not in (EDITED, GENERAL))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One question about an edit. Raises `EditError` for an unknown kind, or for portability without an answer."""

    kind: str
    """One of PROBE_KINDS."""
    prompt: Prompt
    answer: str | None = None
    """If it moves: the answer after the edit, by default the target. If it stays: the right answer, where known."""
    moves: bool | None = None
    """The answer should become the target (or `answer`) with the edit; by default as the kind says."""
    hops: int | None = None
    """Of portability: how many facts away from the edited one."""

    def __post_init__(self) -> None:
        if self.kind not in PROBE_KINDS:
            raise EditError(f"no kind of probe {self.kind!r}; pass one of {', '.join(PROBE_KINDS)}")
        if self.moves is None:
            object.__setattr__(self, "moves", self.aspect != LOCALITY)
        if self.moves != (self.aspect != LOCALITY):
            raise EditError(
                f"a probe of kind {self.kind!r} measures {self.aspect}; moves={self.moves} does not fit, leave it out"
            )
        if self.kind == PORTABILITY and self.answer is None:
            raise EditError(
                f"the portability probe {self.prompt.question!r} has no answer; pass the answer that follows from the "
                "new fact"
            )

    @property
    def aspect(self) -> str:
        """What it measures: generality, portability or locality."""
        return KINDS[self.kind][0]


@dataclass(frozen=True, kw_only=True, repr=False)
class Record:
    """One edit to make, and the questions about it."""

    request: EditRequest
    probes: tuple[Probe, ...] = ()
    old: str | None = None
    """The present answer, which the target is compared with; None: what the unedited model says."""
    name: str = ""
    """Short and its own; by default the request's name, or else the record's place in the list."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", tuple(self.probes))

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {self.request}, {counted(len(self.probes), 'probe')})"


def names_of(records: Sequence[Record]) -> tuple[str, ...]:
    """The records' names, in order. EditError for no records, or for a name that two of them have."""
    if not records:
        raise EditError("no records to evaluate; pass at least one Record")
    names = tuple(record.name or record.request.name or str(index) for index, record in enumerate(records))
    for name in names:
        if names.count(name) > 1:
            raise EditError(
                f"{names.count(name)} records have the name {name!r}; give each one its own, or none a name"
            )
    return names
