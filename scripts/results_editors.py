"""The rows of the results: editors, baselines and controls, one edit at a time, all at once, in sequence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ..editing.baselines import FineTune, InContext, Lora
from ..editing.evaluation import (
    BATCH,
    BY_NAME,
    EDITED,
    EFFICACY,
    EXACT,
    GENERALITY,
    LOCALITY,
    OTHER_PICTURE,
    OTHER_QUESTION_SAME_PICTURE,
    REPHRASE,
    REPHRASE_OTHER_PICTURE,
    SAME_QUESTION_OTHER_PICTURE,
    SEQUENCE,
    SINGLE,
    UNCHANGED,
    UNRELATED,
    EditCurve,
    EditFunction,
    EditReport,
    Record,
    edit_function,
    evaluate,
)
from ..editing.requests import EditRequest
from ..editing.solve import EMMET, MEMIT, ROME, AlphaEdit, MultEdit
from ..models import VisionLanguageModel
from ..tracing import EditSite
from .results_world import Bench, site_by_request

SPLITS = ("outdated", "long_tail")
AT = (1, 10, 20, 30, 60, 100, 160)
COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "efficacy": (EFFICACY, EXACT, EDITED),
    "other pictures": (GENERALITY, EXACT, OTHER_PICTURE),
    "other wordings": (GENERALITY, EXACT, REPHRASE),
    "both": (GENERALITY, EXACT, REPHRASE_OTHER_PICTURE),
    "by name": (GENERALITY, EXACT, BY_NAME),
    "other entities": (LOCALITY, UNCHANGED, SAME_QUESTION_OTHER_PICTURE),
    "other relations": (LOCALITY, UNCHANGED, OTHER_QUESTION_SAME_PICTURE),
    "unrelated": (LOCALITY, UNCHANGED, UNRELATED),
}
"""Column -> the score it shows."""


@dataclass(frozen=True, kw_only=True)
class EditorRow:
    """One line of the tables."""

    name: str
    text: str
    """Description for the table."""
    edit: Callable[[VisionLanguageModel, Bench, Sequence[EditRequest], Sequence[Any]], Any]
    """(model, bench, requests, earlier changes) -> change."""
    shown: Callable[[Bench, EditRequest], EditRequest] = lambda _bench, request: request
    """Function that changes a request before the editor gets it."""
    batches: bool = True
    sequences: bool = False


def editor_rows() -> tuple[EditorRow, ...]:
    """Return every line, the default first."""
    return (
        EditorRow(
            name="multedit-trace",
            text="MultEdit, layer and token of each request by its trace (default settings)",
            edit=_traced,
            sequences=True,
        ),
        EditorRow(
            name="multedit-moments",
            text="the same, old keys weighed by their second moments (`moment_weight=10`, `ridge_fraction=0.002`, "
            "`stop_loss=0.02`)",
            edit=_with_moments,
            sequences=True,
        ),
        EditorRow(
            name="multedit-named",
            text="the same, told the question by name too (`rewrite_prompts`)",
            edit=_traced,
            shown=_named,
        ),
        EditorRow(name="multedit-bare", text="the same without other pictures (`contexts`)", edit=_traced, shown=_bare),
        _row("multedit-5", "MultEdit at layer 5, last token", MultEdit(layer=5), sequences=True),
        _row("multedit-attention", "the same on the attention output", MultEdit(layer=5, projection="attention")),
        _row("multedit-early", "control: layer 0, last token, no kept keys", MultEdit(layer=0), batches=False),
        _row(
            "multedit-published-place",
            "control: layer 2, last constraint token, values converged",
            MultEdit(layer=2, token="constraint_last"),
            batches=False,
        ),
        _row("multedit-paper", "MultEdit.paper(), as published", MultEdit.paper(), batches=False),
        _row("rome", "ROME at layer 5", ROME(layer=5), batches=False),
        _row("memit", "MEMIT, layers 4 to 6", MEMIT(layer=6), sequences=True),
        _row("emmet", "EMMET at layer 5", EMMET(layer=5), sequences=True),
        _row("alphaedit", "AlphaEdit, layers 4 to 6", AlphaEdit(layer=6), sequences=True),
        _baseline("ft", "fine-tuning of layer 5's down projection", FineTune(layer=5, learning_rate=5e-3)),
        _baseline(
            "ft-l",
            "the same, no weight moved by more than 0.02",
            FineTune(layer=5, learning_rate=5e-3, entry_bound=2e-2),
        ),
        _baseline("lora", "LoRA of rank 8 through PEFT, all layers", Lora()),
        _baseline("in-context", "the fact told before the question", InContext()),
    )


def measure_editor(vlm: VisionLanguageModel, bench: Bench, row: EditorRow, *, together: bool) -> Mapping[str, Any]:
    """The scores of one editor, each edit alone or all in one batch: {column: [unedited, low, edited, high]}."""
    records = _records(bench, row)

    def edit(model: VisionLanguageModel, requests: Sequence[EditRequest], earlier: Sequence[Any]) -> Any:
        return row.edit(model, bench, requests, earlier)

    mode = BATCH if together else SINGLE
    return _found(row, evaluate(vlm, records, edit, mode=mode, baseline=bench.baseline, batch_size=64))


def measure_sequence(vlm: VisionLanguageModel, bench: Bench, row: EditorRow) -> Mapping[str, Any]:
    """The curve of one editor over a sequence, and its scores after the last edit."""

    def edit(model: VisionLanguageModel, requests: Sequence[EditRequest], earlier: Sequence[Any]) -> Any:
        return row.edit(model, bench, requests, earlier)

    options = {"mode": SEQUENCE, "baseline": bench.baseline, "batch_size": 64, "at": AT}
    report = evaluate(vlm, _records(bench, row), edit, **options)
    return {
        **_found(row, report),
        "curve": json_ready(cast(EditCurve, report.curve).to_dataframe().to_dict(orient="records")),
    }


def json_ready(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of numbers as plain Python types."""
    return [{key: None if value is None else float(value) for key, value in row.items()} for row in rows]


def _found(row: EditorRow, report: EditReport) -> dict[str, Any]:
    kinds = {each.kind for each in report.rows}
    scores = {}
    for column, (aspect, protocol, kind) in COLUMNS.items():
        if kind in kinds:
            score = report.score(aspect, protocol, kind)
            scores[column] = [score.before.mean, score.after.low, score.after.mean, score.after.high]
    return {
        "text": row.text,
        "scores": scores,
        "splits": dict(report.split_shares()),
        "statuses": dict(report.statuses),
        "left_out": report.left_out,
        "requests": len(report.statuses),
    }


def _records(bench: Bench, row: EditorRow) -> list[Record]:
    return [replace(record, request=row.shown(bench, record.request)) for record in bench.records]


def _row(name: str, text: str, editor: Any, **options: Any) -> EditorRow:
    functions: list[EditFunction] = []  # made by the first edit, since its costs depend on no keys

    def edit(vlm: VisionLanguageModel, bench: Bench, requests: Sequence[EditRequest], earlier: Sequence[Any]) -> Any:
        if not functions:
            functions.append(edit_function(vlm, editor, bench.moments if editor.needs_moments else None))
        return functions[0](vlm, requests, earlier)

    return EditorRow(name=name, text=text, edit=edit, **options)


def _baseline(name: str, text: str, editor: Any) -> EditorRow:
    def edit(vlm: VisionLanguageModel, _bench: Bench, requests: Sequence[EditRequest], _earlier: Sequence[Any]) -> Any:
        return editor.edit(vlm, requests, progress=False)

    return EditorRow(name=name, text=text, edit=edit)


def _traced(vlm: VisionLanguageModel, bench: Bench, requests: Sequence[EditRequest], earlier: Sequence[Any]) -> Any:
    """Each request at its own site; several at once at the site that most of their traces choose."""
    return MultEdit(where=_site(bench, requests)).edit(vlm, requests, earlier=tuple(earlier), progress=False)


def _with_moments(
    vlm: VisionLanguageModel, bench: Bench, requests: Sequence[EditRequest], earlier: Sequence[Any]
) -> Any:
    """The same for many edits: what other questions look up counts too, and values go no further than they must."""
    editor = MultEdit(where=_site(bench, requests), moment_weight=10.0, ridge_fraction=0.002, stop_loss=0.02)
    return editor.edit(vlm, requests, earlier=tuple(earlier), moments=bench.moments, progress=False)


def _site(bench: Bench, requests: Sequence[EditRequest]) -> EditSite:
    sites = site_by_request(bench)
    votes = [sites[request.name] for request in requests]
    return max(votes, key=lambda each: sum((each.layer, each.token) == (one.layer, one.token) for one in votes))


def _named(bench: Bench, request: EditRequest) -> EditRequest:
    """The request with the question by name, in a wording that no probe uses."""
    return replace(request, rewrite_prompts=(bench.named[request.name],))


def _bare(_bench: Bench, request: EditRequest) -> EditRequest:
    return replace(request, contexts=())
