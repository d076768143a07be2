"""multrace export: a saved edit as a PEFT adapter or as a whole model, opened again and compared."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..editing import Delta
from ..editing.exports import Change, save_merged, to_peft, verify_export, with_adapters
from ..editing.ledger import Ledger, load_edit
from ..editing.runtime import RuntimeEdit
from ..models import Prompt, VisionLanguageModel, load
from ..models.images import open_images
from .errors import CommandError
from .options import ModelOptions, add_options, option, read
from .outputs import check_new_folder

HELP = "write a saved edit as a PEFT adapter or as a whole model, and check it"
EXAMPLE = """examples:
  multrace export --edit out/edit/edit.safetensors --peft out/adapter
  multrace export --model llava-hf/llava-1.5-7b-hf --edit out/ledger.safetensors --merged out/edited_model

The model must be the one that was edited, unedited and in the same dtype, in which a merged model is written. One in
half precision has lost what its weights round away; an adapter keeps it.
"""
_MOST = 8  # questions that are compared when none is given


@dataclass(frozen=True, kw_only=True)
class Export(ModelOptions):
    """Options of `multrace export`."""

    edit: Path = option("the saved edit or ledger; a ledger is written as one edit", type=Path, metavar="FILE")
    peft: Path | None = option("new folder for a PEFT LoRA adapter", default=None, type=Path, metavar="DIR")
    merged: Path | None = option("new folder for the edited model, whole", default=None, type=Path, metavar="DIR")
    question: str | None = option(
        f"what to compare the answers to (default: the first {_MOST} questions of the edit, without a picture)",
        default=None,
    )
    image: str | None = option("picture in front of --question", default=None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Export`."""
    add_options(parser, Export)


def run(options: argparse.Namespace) -> int:
    """Writes what was asked for, opens it again and prints how it compares with the edited model."""
    settings = read(Export, options)
    _check(settings)
    edit = load_edit(settings.edit)
    delta = edit.composed() if isinstance(edit, Ledger) else edit
    vlm = settings.open_model()
    delta.check_fits(vlm)
    prompts = _prompts(vlm, delta, settings)
    print(*delta.report(delta.realised(vlm)), sep="\n")
    if settings.peft is not None:
        to_peft(delta, vlm, settings.peft)
        # in half precision an adapter keeps what the weights round away: it stands for the edit beside the weights
        change = delta if torch.finfo(vlm.dtype).bits >= 32 else RuntimeEdit(delta=delta)
        _compare(change, vlm, with_adapters(settings.open_model(), settings.peft), prompts, settings.peft)
    if settings.merged is not None:
        save_merged(delta, vlm, settings.merged, dtype=vlm.dtype)
        reopened = load(
            settings.merged,
            dtype=vlm.dtype,
            device_map=settings.device_map,
            trust_remote_code=settings.trust_remote_code,
        )
        _compare(delta, vlm, reopened, prompts, settings.merged)
    return 0


def _check(settings: Export) -> None:
    """Every error that needs no model."""
    folders = [folder for folder in (settings.peft, settings.merged) if folder is not None]
    if not folders:
        raise CommandError("nothing to write; say --peft DIR, --merged DIR or both")
    if len({folder.absolute() for folder in folders}) < len(folders):
        raise CommandError(f"--peft and --merged are both {str(settings.peft)!r}; choose two folders")
    for folder in folders:
        check_new_folder(folder)
    if settings.peft is not None and settings.peft.exists():
        raise CommandError(f"the folder {str(settings.peft)!r} is there already; choose a new one")
    if settings.image is not None and settings.question is None:
        raise CommandError(f"--image {settings.image!r} needs --question: what to ask about it")
    open_images(settings.image)


def _prompts(vlm: VisionLanguageModel, delta: Delta, settings: Export) -> list[Prompt]:
    if settings.question is not None:
        return [vlm.prompt(settings.image, settings.question)]
    questions = dict.fromkeys(request["question"] for request in delta.requests if request.get("question"))
    if not questions:
        raise CommandError(f"{str(settings.edit)!r} names no question to compare answers to; say --question")
    return [vlm.prompt(None, question) for question in list(questions)[:_MOST]]


def _compare(
    change: Change, vlm: VisionLanguageModel, reopened: VisionLanguageModel, prompts: Sequence[Prompt], folder: Path
) -> None:
    """Prints the comparison. CommandError if the export does not do what the edit does."""
    found = verify_export(change, vlm, reopened, prompts)
    if not found.holds:
        raise CommandError(
            f"{str(folder)!r} was written, but does not do what the edit does: {found}; "
            "do not use it; in half precision the rounding of activations can be the reason: try --dtype float32"
        )
    print(f"written: {folder}", f"verified: {found}", sep="\n")
