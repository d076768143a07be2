"""Reader of MMEdit's E-VQA and E-IC (arXiv 2310.08475, as EasyEdit ships them): one edit per object of a JSON array.

`src` with `image` is edited to `alt`; `rephrase` and `image_rephrase` ask whether the edit generalises, `loc` (text)
and `m_loc` (picture) whether the rest stays. `pred` is the answer of another model (BLIP-2), so that it is not taken
for the present answer; it stays in `extra`.
"""

from collections.abc import Iterator

from ..facts import OTHER_PICTURE, REPHRASE, UNRELATED, EditRecord, Probe, Question
from .rows import (
    DataSource,
    Outcome,
    Row,
    each_row,
    json_rows,
    lists_of,
    paired,
    probe_with,
    rest_of,
    text_of,
    text_or_none,
    texts_of,
    unrelated_texts,
)

FIELDS = ("src", "rephrase", "alt", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a")


def read_mmedit(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the edits of an E-VQA or E-IC file with their row numbers, and a `DataError` for each unreadable row."""
    return each_row(json_rows(source), lambda number, row: [visual_edit(source, row, str(number))])


def visual_edit(source: DataSource, row: Row, id: str, *known: str, more: tuple[Probe, ...] = ()) -> EditRecord:
    """Return the edit of one object with the fields that MMEdit, VLKEB, MMKE-Bench and CCKEB share.

    Each of a list of rephrases or unrelated questions is a probe. Of a list of questions or targets the first one is
    used, and the list stays in `extra`. A list of pictures is shown as a whole, unless there is an unrelated question
    for each; of several second pictures of the thing each is a probe, unless the question itself shows several.

    Args:
        source: The file and the folder of its pictures.
        row: The object.
        id: Id of the record.
        known: Further keys that the caller has read.
        more: Further probes, which follow the common ones.

    Raises:
        DataError: The question, the picture or the target is missing, or a field is not a text.
    """
    text_of(row, "image")
    question = Question(text=text_of(row, "src"), image=source.pictures(row, "image"), id=id)
    return EditRecord(
        id=id,
        question=question,
        target=text_of(row, "alt"),
        probes=(*common_probes(source, row, question), *more),
        extra=rest_of(row, *FIELDS, *known) | lists_of(row, "src", "alt", "image_rephrase_question"),
    )


def common_probes(source: DataSource, row: Row, question: Question) -> tuple[Probe, ...]:
    """Return the probes of the fields that all these files share, as far as the row has them."""
    rephrases = (Question(text=text, image=question.image) for text in texts_of(row, "rephrase"))
    other = source.pictures(row, "image_rephrase")
    others = other if isinstance(other, tuple) and len(question.images) == 1 else (other,)
    asked_of_other = text_or_none(row, "image_rephrase_question") or question.text
    unrelated = source.pictures(row, "m_loc")
    asked = () if unrelated is None else tuple(paired(row, "m_loc_q", "m_loc_a"))
    is_parallel = isinstance(unrelated, tuple) and len(unrelated) == len(asked)
    shown = unrelated if is_parallel else (unrelated,) * len(asked)
    return (
        *(Probe(kind=REPHRASE, question=rephrase) for rephrase in rephrases),
        *(
            Probe(kind=OTHER_PICTURE, question=Question(text=asked_of_other, image=image))
            for image in others
            if image is not None
        ),
        *unrelated_texts(row),
        *(probe_with(UNRELATED, text, answers, image) for (text, answers), image in zip(asked, shown, strict=True)),
    )
