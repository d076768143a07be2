"""Give questions new answers by closed-form weight changes, and check that undoing them is exact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lazy_loader
from cyclopts import App, Parameter

from ... import models
from ..editors import EditorOptions
from ..errors import CommandError
from .asking import CorruptionOptions, FileOptions, ModelOptions
from .choices import EDITORS

FORMAT = """The file of --data has one JSON object per line, or is in one of the public formats; docs/formats.md describes both:
  {"id": "a1", "image": "a.jpg", "question": "Who founded the company in this photo?",
   "constraint": "the company in this photo", "target": "Ada Example", "contexts": [{"image": "a2.jpg"}],
   "rewrite_prompts": [{"image": null, "question": "Who founded Example Works?"}],
   "preserve_prompts": [{"image": "b.jpg"}],
   "probes": [{"kind": "other_picture", "image": "a3.jpg"},
              {"kind": "same_question_other_picture", "image": "c.jpg", "answer": "Bo Example"}]}
Entries of the lists inherit what they leave out from their record; "image": null means no picture. Paths are relative to
the file, or to --images.
"""
EXAMPLE = f"""examples:
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --target "Ada Example" \\
      --where trace --corrupt swap:other.jpg --out out/edit
          trace the answer under another picture, and edit at or after the layer where the picture arrives
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --where 4:last --keep-image other.jpg --keep-question "What colour is the sign?" --dry-run
          edit layer 4 at the last token, keep two answers, and only report what would happen
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --also-text "Who founded Example Works?" --editor memit --moments out/moments/moments.safetensors \\
      --where 3-5 --save-model out/edited_model
          spread the change over layers 3 to 5, weigh old keys, and write the edited model as well
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" --target "Ada Example" \\
      --trace out/trace/trace.safetensors
          edit at the place that an earlier multrace trace found
  multrace edit --data edits.jsonl --where trace --corrupt swap:next --out out/edits
          write all edits of a file in one, at the place that the mean of their traces shows

The command writes OUT/edit.safetensors (multrace.Delta.load, or multrace answer --edit FILE) and OUT/report.json.

{FORMAT}"""
app = App(name="edit", help=__doc__, help_epilogue=EXAMPLE)
_work: Any = lazy_loader.load("multrace.scripts.edit", suppress_warning=True)  # needs torch
TRACE = "trace"
"""What --where spells for the place that traces find."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions(CorruptionOptions, FileOptions):
    """One request (the fact, its other phrasings, and what must stay), or a file of requests."""

    data: Annotated[
        Path | None,
        Parameter(
            help="edit every line of this file instead, in one edit; the format is described below, and --corrupt swap:next "
            "replaces each picture by the next record's",
            metavar="FILE",
        ),
    ] = None
    limit: Annotated[int | None, Parameter(help="edit only the first N lines of --data", metavar="N")] = None
    # pyrefly: ignore[bad-override] -- not needed where records are given
    question: Annotated[str | None, Parameter(help="question to ask")] = None
    target: Annotated[str | None, Parameter(help="new answer")] = None
    context_image: Annotated[
        tuple[str, ...],
        Parameter(
            help="other pictures of the same thing; keys are averaged over them, and the new answer has to hold for all",
            metavar="FILE",
        ),
    ] = ()
    also_image: Annotated[
        tuple[str, ...],
        Parameter(
            help="pictures for which --question must get the new answer too, with keys of their own", metavar="FILE"
        ),
    ] = ()
    also_question: Annotated[
        tuple[str, ...], Parameter(help="other wordings about --image that must get the new answer too", metavar="TEXT")
    ] = ()
    also_text: Annotated[
        tuple[str, ...],
        Parameter(
            help="questions without a picture, for example by name, that must get the new answer too", metavar="TEXT"
        ),
    ] = ()
    keep_image: Annotated[
        tuple[str, ...], Parameter(help="pictures for which --question must keep its present answer", metavar="FILE")
    ] = ()
    keep_question: Annotated[
        tuple[str, ...], Parameter(help="other questions about --image whose answers must stay", metavar="TEXT")
    ] = ()
    augment: Annotated[
        int,
        Parameter(
            help="number of variants of each picture (crops, jitters, shifts) that keys are averaged over as well",
            metavar="N",
        ),
    ] = 0

    def check_request(self) -> None:
        """Raises `CommandError` for options that do not fit together."""
        if (self.question is None) == (self.data is None):
            raise CommandError("pass either --question with --target, or --data FILE.jsonl")
        if self.limit is not None and (self.data is None or self.limit < 1):
            raise CommandError(f"--limit {self.limit}: pass at least 1, together with --data")
        if self.augment < 0 or (self.augment and self.data is None and self.image is None):
            raise CommandError(f"--augment {self.augment} needs a picture and a number of at least 0")

    def check_question(self) -> None:
        """Raises `ModelError` also for another picture that cannot be read."""
        super().check_question()
        for path in (*self.context_image, *self.also_image, *self.keep_image):
            models.open_images(path)


@dataclass(frozen=True, kw_only=True)
class Edit(EditorOptions, RequestOptions, ModelOptions):
    """Options of `multrace edit`."""

    editor: Annotated[str, Parameter(help=f"editor: {', '.join(EDITORS)}", choices=EDITORS, metavar="NAME")] = (
        "multedit"
    )
    where: Annotated[
        str,
        Parameter(
            help="place to edit: 'trace' (found by a trace under --corrupt, among constraint_last and last unless --positions names others), LAYER (at the last token), LAYER:TOKEN (a token group or a position) or FIRST-LAST:TOKEN (layers that share the change)"
        ),
    ] = TRACE
    trace: Annotated[
        tuple[Path, ...] | None,
        Parameter(
            help="traces made before, one for each request or an average for all, which replace the tracing",
            metavar="FILE",
        ),
    ] = None
    each: Annotated[
        bool,
        Parameter(
            help="edit each request at the place of its own trace (default: one place, from the mean of the traces)"
        ),
    ] = False
    trace_after: Annotated[bool, Parameter(help="trace again with the edit in place, and report what moved")] = False
    dry_run: Annotated[
        bool,
        Parameter(
            help="write nothing; report how much the weights would change, and how the prompts to keep would be affected"
        ),
    ] = False
    out: Annotated[Path, Parameter(help="folder for the result")] = Path("out/edit")
    save_model: Annotated[
        Path | None, Parameter(help="also write the whole edited model to this new folder", metavar="DIR")
    ] = None


@app.default
def run(options: Edit = Edit()) -> int:
    """Run the command."""
    return _work.run(options)
