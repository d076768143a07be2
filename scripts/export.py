"""Run `multrace export`: write a saved edit, open it again and compare."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..editing import Delta
from ..editing.changes import Change, Ledger, RuntimeEdit, load_edit, save_merged, to_peft, verify_export, with_adapters
from ..models import Prompt, VisionLanguageModel, load
from .errors import CommandError
from .options.export import QUESTIONS, Export


def run(settings: Export) -> int:
    """Write the export, open it again and print how it compares with the edited model."""
    settings.check()
    edit = load_edit(settings.edit)
    delta = edit.composed() if isinstance(edit, Ledger) else edit
    vlm = settings.open_model()
    delta.check_fits(vlm)
    prompts = _prompts(vlm, delta, settings)
    print(*delta.report(delta.retained(vlm)), sep="\n")
    if settings.peft is not None:
        to_peft(vlm, delta, settings.peft)
        # in half precision an adapter keeps what the weights round away: it stands for the edit beside the weights
        change = delta if torch.finfo(vlm.dtype).bits >= 32 else RuntimeEdit(delta=delta)
        _compare(change, vlm, with_adapters(settings.open_model(), settings.peft), prompts, settings.peft)
    if settings.merged is not None:
        save_merged(vlm, delta, settings.merged, dtype=vlm.dtype)
        reopened = load(
            settings.merged,
            dtype=vlm.dtype,
            device_map=settings.device_map,
            trust_remote_code=settings.trust_remote_code,
        )
        _compare(delta, vlm, reopened, prompts, settings.merged)
    return 0


def _prompts(vlm: VisionLanguageModel, delta: Delta, settings: Export) -> list[Prompt]:
    if settings.question is not None:
        return [vlm.prompt(settings.image, settings.question)]
    questions = dict.fromkeys(request["question"] for request in delta.requests if request.get("question"))
    if not questions:
        raise CommandError(f"{str(settings.edit)!r} names no question to compare answers to; say --question")
    return [vlm.prompt(None, question) for question in list(questions)[:QUESTIONS]]


def _compare(
    change: Change, vlm: VisionLanguageModel, reopened: VisionLanguageModel, prompts: Sequence[Prompt], folder: Path
) -> None:
    """Print the comparison. Raises `CommandError` if the export does not do what the edit does."""
    found = verify_export(vlm, change, reopened, prompts)
    if not found.holds:
        raise CommandError(
            f"{str(folder)!r} was written, but does not do what the edit does: {found}; "
            "do not use it; in half precision the rounding of activations can be the reason: try --dtype float32"
        )
    print(f"written: {folder}", f"verified: {found}", sep="\n")
