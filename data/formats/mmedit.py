"""Reader of MMEdit's E-VQA and E-IC (arXiv 2310.08475, as EasyEdit ships them): one edit per object of a JSON array.

`src` with `image` is edited to `alt`; `rephrase` and `image_rephrase` ask whether the edit generalises, `loc` (text)
and `m_loc` (picture) whether the rest stays. `pred` is the answer of another model (BLIP-2), so that it is not taken
for the present answer; it stays in `extra`.
"""

from collections.abc import Iterator

from ..facts import (
    OTHER_PICTURE,
    REPHRASE,
    UNRELATED,
    UNRELATED_TEXT,
    EditRecord,
    Probe,
    Question,
)
from .rows import (
    DataSource,
    Outcome,
    Row,
    each_row,
    json_rows,
    probes_of,
    rest_of,
    text_of,
    text_or_none,
    texts_of,
    without_prefix,
)

FIELDS = ("src", "rephrase", "alt", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a")


def read_mmedit(source: DataSource) -> Iterator[tuple[int, Outcome]]:
    """Return the edits of an E-VQA or E-IC file with their row numbers, and a `DataError` for each unreadable row."""
    return each_row(json_rows(source), lambda number, row: [visual_edit(source, row, str(number))])


def visual_edit(source: DataSource, row: Row, id: str, *known: str, more: tuple[Probe, ...] = ()) -> EditRecord:
    """Return the edit of one object with the fields that MMEdit, VLKEB, MMKE-Bench and CCKEB share.

    Of a list of texts the first one is used, and the list stays in `extra`; a list of pictures is shown as a whole.

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
    images = tuple(map(source.picture, texts_of(row, "image")))
    question = Question(text=text_of(row, "src"), image=images if len(images) > 1 else images[0], id=id)
    lists = {name: row[name] for name in FIELDS if name != "image" and isinstance(row.get(name), list)}
    return EditRecord(
        id=id,
        question=question,
        target=text_of(row, "alt"),
        probes=(*common_probes(source, row, question), *more),
        extra=rest_of(row, *FIELDS, *known) | {name: texts for name, texts in lists.items() if len(texts) > 1},
    )


def common_probes(source: DataSource, row: Row, question: Question) -> tuple[Probe, ...]:
    """Return the probes of the fields that all these files share, as far as the row has them."""
    rephrase, other = text_or_none(row, "rephrase"), text_or_none(row, "image_rephrase")
    asked_of_other = text_or_none(row, "image_rephrase_question")
    other_question = question if asked_of_other is None else Question(text=asked_of_other)
    loc, m_loc, m_loc_question = (text_or_none(row, name) for name in ("loc", "m_loc", "m_loc_q"))
    return probes_of(
        None if rephrase is None else Probe(kind=REPHRASE, question=Question(text=rephrase, image=question.image)),
        None
        if other is None
        else Probe(kind=OTHER_PICTURE, question=Question(text=other_question.text, image=source.picture(other))),
        None
        if loc is None
        else Probe(
            kind=UNRELATED_TEXT, question=Question(text=without_prefix(loc)), answer=text_or_none(row, "loc_ans")
        ),
        None
        if m_loc is None or m_loc_question is None
        else Probe(
            kind=UNRELATED,
            question=Question(text=m_loc_question, image=source.picture(m_loc)),
            answer=text_or_none(row, "m_loc_a"),
        ),
    )
