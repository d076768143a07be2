"""One factual question about a picture, with the spans that select its answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .errors import DataError


@dataclass(frozen=True, kw_only=True)
class VQARecord:
    """A question, its answer and its constraint spans (Basu et al., arXiv 2406.04236, section 3).

    DataError if a text is empty or a constraint is not part of the question.
    """

    id: str
    question: str
    answer: str
    constraint: str | None = None
    """The span that points at something: in the picture (visual constraint) or, by name, in the world."""
    text_constraint: str | None = None
    """The span with the extra condition of a two-constraint question."""
    replacement: str | None = None
    """A phrase that names something else of the kind, to take the constraint's place in text corruption."""
    image: Image.Image | Path | None = None

    def __post_init__(self) -> None:
        for field in ("question", "answer"):
            if not getattr(self, field).strip():
                raise DataError(f"record {self.id!r} has an empty {field}; give it one or drop the record")
        for field in ("constraint", "text_constraint"):
            span = getattr(self, field)
            if span is not None and (not span.strip() or span.lower() not in self.question.lower()):
                raise DataError(
                    f"record {self.id!r}: the {field} {span!r} does not occur in the question {self.question!r}"
                )
        if self.replacement is not None and self.constraint is None:
            raise DataError(f"record {self.id!r} has a replacement {self.replacement!r} but no constraint to replace")

    @property
    def constraints(self) -> dict[str, str]:
        """The spans by name: "visual" for the constraint and "text" for the textual one, where there are any."""
        spans = {"visual": self.constraint, "text": self.text_constraint}
        return {name: span for name, span in spans.items() if span is not None}

    def with_image(self, image: Image.Image | Path | None) -> VQARecord:
        """The same question in front of another picture."""
        return replace(self, image=image)

    def with_answer(self, answer: str) -> VQARecord:
        """The same question with another answer."""
        return replace(self, answer=answer)
