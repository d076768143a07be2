"""multrace export: write a saved edit as a PEFT adapter or as a whole model, open that again and compare."""

from dataclasses import dataclass
from pathlib import Path

from ... import models
from ..errors import CommandError
from ..outputs import check_new_folder
from .asking import ModelOptions
from .option import option

HELP = "write a saved edit as a PEFT adapter or as a whole model, and check it"
EXAMPLE = """examples:
  multrace export --edit out/edit/edit.safetensors --peft out/adapter
  multrace export --model llava-hf/llava-1.5-7b-hf --edit out/ledger.safetensors --merged out/edited_model

The model must be the unedited model that the edit was made for, in the same dtype; a merged model is written in that
dtype. In half precision a merged model loses what its weights round away; an adapter keeps it.
"""
QUESTIONS = 8
"""How many questions of the edit are compared by default."""


@dataclass(frozen=True, kw_only=True)
class Export(ModelOptions):
    """Options of `multrace export`."""

    edit: Path = option("saved edit or ledger; a ledger is written as one edit", type=Path, metavar="FILE")
    peft: Path | None = option("new folder for a PEFT LoRA adapter", default=None, type=Path, metavar="DIR")
    merged: Path | None = option("new folder for the whole edited model", default=None, type=Path, metavar="DIR")
    question: str | None = option(
        f"question whose answers are compared (default: the first {QUESTIONS} questions of the edit, without picture)",
        default=None,
    )
    image: str | None = option("picture in front of --question", default=None)

    def check(self) -> None:
        """Raises `CommandError` or `ModelError` for every mistake that can be found without the model."""
        folders = [folder for folder in (self.peft, self.merged) if folder is not None]
        if not folders:
            raise CommandError("nothing to write; pass --peft DIR, --merged DIR or both")
        if len({folder.absolute() for folder in folders}) < len(folders):
            raise CommandError(f"--peft and --merged are both {str(self.peft)!r}; choose two folders")
        for folder in folders:
            check_new_folder(folder)
        if self.peft is not None and self.peft.exists():
            raise CommandError(f"the folder {str(self.peft)!r} is there already; choose a new one")
        if self.image is not None and self.question is None:
            raise CommandError(f"--image {self.image!r} needs --question: what to ask about it")
        models.open_images(self.image)


OPTIONS = Export
