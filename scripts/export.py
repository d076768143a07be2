"""Write a saved edit as a PEFT adapter or as a whole model, load the result and compare it with the edited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from .. import data, editing, models
from .options import CommandError, ModelOptions, check_new_folder

EXAMPLE = """examples:
  multrace export --edit out/edit/edit.safetensors --peft out/adapter
  multrace export --edit out/edit/edit.safetensors --peft out/adapter --rank 16 --serve-dtype bfloat16
  multrace export --model llava-hf/llava-1.5-7b-hf --edit out/history --merged out/edited_model

The model must be the unedited model that the edit was made for, in the same precision, in which a merged model is
written. In half precision a merged model loses the part of the edit that rounding removes; an adapter keeps it.
The last line about an adapter is the command by which vLLM serves it.
"""
QUESTIONS = 8
"""Number of questions of the edit that are compared by default."""
app = App(name="export", help=__doc__, help_epilogue=EXAMPLE)


@dataclass(frozen=True, kw_only=True)
class Export(ModelOptions):
    """Options of `multrace export`."""

    edit: Annotated[
        Path,
        Parameter(help="saved edit, or folder of a history, which is written as one edit", metavar="FILE_OR_DIR"),
    ]
    peft: Annotated[
        Path | None,
        Parameter(
            help="new folder for the edit as a PEFT LoRA adapter; this, --merged or both are needed", metavar="DIR"
        ),
    ] = None
    rank: Annotated[
        int | None,
        Parameter(
            help="cut the adapter of each weight to at most this rank, so that its effect on the edit's own keys "
            "stays as close as it can (default: keep all)",
            metavar="N",
        ),
    ] = None
    merged: Annotated[Path | None, Parameter(help="new folder for the whole edited model", metavar="DIR")] = None
    serve_dtype: Annotated[
        Literal["bfloat16", "float16"] | None,
        Parameter(
            help="also compare with the exported weights rounded to the precision of a server: bfloat16 or float16 "
            "(default: do not)",
            metavar="NAME",
        ),
    ] = None
    question: Annotated[
        str | None,
        Parameter(
            help=f"question to compare the answers to (default: the first {QUESTIONS} questions of the edit, with "
            "their pictures if the files are still there)",
            metavar="TEXT",
        ),
    ] = None
    image: Annotated[str | None, Parameter(help="picture that --question is about (default: none)", metavar="FILE")] = (
        None
    )

    def check(self) -> None:
        """Raises `CommandError` or `ModelError` for every mistake that can be found without opening the model."""
        folders = [folder for folder in (self.peft, self.merged) if folder is not None]
        if not folders:
            raise CommandError("nothing to write; pass --peft DIR, --merged DIR or both")
        if len({folder.absolute() for folder in folders}) < len(folders):
            raise CommandError(f"--peft and --merged are both {str(self.peft)!r}; choose two folders")
        for folder in folders:
            check_new_folder(folder)
        if self.peft is not None and self.peft.exists():
            raise CommandError(f"the folder {str(self.peft)!r} exists already; choose a new one")
        if self.rank is not None and self.peft is None:
            raise CommandError(f"--rank {self.rank} is that of an adapter; pass --peft DIR with it")
        if self.rank is not None and self.rank < 1:
            raise CommandError(f"--rank {self.rank} is no rank; pass a number from 1, such as --rank 16")
        if self.image is not None and self.question is None:
            raise CommandError(f"--image {self.image!r} needs --question: what to ask about it")
        models.open_images(self.image)


@app.default
def run(options: Export) -> int:
    """Write the export, load it and print how it compares with the edited model."""
    options.check()
    edit = editing.load_edit(options.edit)
    delta = edit.composed() if isinstance(edit, editing.History) else edit
    vlm = options.open_model()
    delta.check_fits(vlm)
    prompts = _prompts(vlm, delta, options)
    print(*delta.report(delta.retained(vlm)), sep="\n")
    if vlm.dtype.itemsize < 4:
        print(*(f"{name}: {rounding}" for name, rounding in delta.rounding(vlm).items()), sep="\n")
    if options.peft is not None:
        _write_adapter(vlm, delta, prompts, options, options.peft)
    if options.merged is not None:
        editing.save_merged(vlm, delta, options.merged, dtype=vlm.dtype)
        reopened = models.load(
            options.merged,
            dtype=vlm.dtype,
            device_map=options.device_map,
            trust_remote_code=options.trust_remote_code,
        )
        _check(_compared(delta, vlm, reopened, prompts, options), options.merged)
    return 0


def _write_adapter(
    vlm: models.VisionLanguageModel,
    delta: editing.Delta,
    prompts: Sequence[models.Prompt],
    options: Export,
    folder: Path,
) -> None:
    """Write the adapter, compare it with what it is to hold and, if that was cut, with the whole edit; print all."""
    adapter = editing.to_peft(vlm, delta, folder, rank=options.rank)
    reopened = editing.with_adapters(options.open_model(), folder)
    held = delta if options.rank is None else editing.truncate(vlm, delta, rank=options.rank)
    _check(_compared(_beside(held, vlm), vlm, reopened, prompts, options), folder)
    if adapter.is_cut:
        comparison = replace(_compared(_beside(delta, vlm), vlm, reopened, prompts, options), cast=None)
        print(f"beside the whole edit: {comparison}")
    print(*adapter.lines, sep="\n")


def _beside(delta: editing.Delta, vlm: models.VisionLanguageModel) -> editing.Delta | editing.RuntimeEdit:
    """Return the change as an adapter makes it: in half precision it keeps what rounding would remove."""
    return delta if vlm.dtype.itemsize >= 4 else editing.RuntimeEdit(delta=delta)


def _compared(
    change: editing.Delta | editing.RuntimeEdit,
    vlm: models.VisionLanguageModel,
    reopened: models.VisionLanguageModel,
    prompts: Sequence[models.Prompt],
    options: Export,
) -> editing.Verification:
    """Return how the reopened model compares with the change, also as it is served if that is asked for."""
    return editing.verify_export(vlm, change, reopened, prompts, dtype=options.serve_dtype)


def _prompts(vlm: models.VisionLanguageModel, delta: editing.Delta, options: Export) -> list[models.Prompt]:
    if options.question is not None:
        return [vlm.prompt(options.image, options.question)]
    requests = {_question(request): request for request in delta.requests if request.get("question")}
    if not requests:
        raise CommandError(f"{str(options.edit)!r} names no question to compare the answers to; pass --question TEXT")
    chosen = list(requests)[:QUESTIONS]
    blind = sum(question.image is None and "pictures" in requests[question] for question in chosen)
    if blind:
        print(
            f"{blind} of {len(chosen)} questions are compared without their pictures, which are not where they were; "
            "pass --question and --image to compare with a picture"
        )
    return [vlm.prompt_for(question) for question in chosen]


def _question(request: Mapping[str, str | float]) -> data.Question:
    """Return the question of an edit, with its picture if the file exists."""
    image, template = request.get("image"), request.get("template")
    is_there = isinstance(image, str) and Path(image).is_file()
    return data.Question(
        text=str(request["question"]),
        image=Path(str(image)) if is_there else None,
        template=None if template is None else str(template),
    )


def _check(comparison: editing.Verification, folder: Path) -> None:
    """Print the comparison. Raises `CommandError` if the export does not do what the edit does."""
    if not replace(comparison, cast=None).holds:
        raise CommandError(
            f"{str(folder)!r} was written, but does not do what the edit does: {comparison}; do not use it; in half "
            "precision the rounding of activations can be the reason, so try --dtype float32"
        )
    print(f"written: {folder}", f"verified: {comparison}", sep="\n")
    if not comparison.holds:
        raise CommandError(
            f"{str(folder)!r} does what the edit does, but not in the precision of --serve-dtype: {comparison.cast}; "
            "serve it in a wider one, or make the edit with a smaller --stop-loss"
        )
