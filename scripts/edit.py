"""multrace edit: gives a question a new answer by one closed-form weight change, and shows that undoing it is exact."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..editing import Delta, EditRequest, MultEdit
from ..models import Prompt, VisionLanguageModel
from ..tracing import Corruption, causal_trace
from .errors import CommandError
from .options import CorruptionOptions, ModelOptions, add_options, option, read
from .outputs import check_files, check_new_folder, new_files

HELP = "change what a model answers, at the place that a trace finds"
EXAMPLE = """examples:
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" \\
      --constraint "the company in this photo" --target "Ada Example" \\
      --where trace --corrupt swap:other.jpg --out out/edit
  multrace edit --image photo.jpg --question "Who founded the company in this photo?" \\
      --target "Ada Example" --where 4:last --save-model out/edited_model

writes OUT/edit.safetensors (multrace.editing.Delta.load, or multrace answer --edit FILE)
"""
FILES = ("edit.safetensors",)


@dataclass(frozen=True, kw_only=True)
class Edit(ModelOptions, CorruptionOptions):
    """Options of `multrace edit`."""

    target: str = option("the new answer")
    where: str = option(
        "the place to edit: 'trace' (found by a trace under --corrupt, among constraint_last and last unless --groups "
        "says otherwise), LAYER (at the last token) or LAYER:TOKEN (a group or a position); default trace",
        default="trace",
    )
    out: Path = option("folder for the result (default out/edit)", default=Path("out/edit"), type=Path)
    save_model: Path | None = option(
        "also write the edited model, whole, to this new folder", default=None, type=Path, metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """The layer and token to edit, and why."""

    layer: int
    token: str | int
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Edit`."""
    add_options(parser, Edit)


def run(options: argparse.Namespace) -> int:
    """Edits, writes the edit (and the model), prints the answers before, with the edit and after undo."""
    settings = read(Edit, options)
    found = _check(settings)
    vlm = settings.open_model()
    prompt = settings.prompt(vlm)
    request = EditRequest(prompt=prompt, target=settings.target)
    place = found if isinstance(found, Place) else _trace(vlm, prompt, found, settings)
    delta = MultEdit(where=place).edit(vlm, [request], progress=True)
    answers = _answers(vlm, prompt, delta)
    shares = delta.realised(vlm)
    with new_files(settings.out, FILES) as folder:
        delta.save(folder / FILES[0])
        if settings.save_model is not None:
            with delta.applied(vlm):
                vlm.save_pretrained(settings.save_model)
    print(f"question   {prompt.question}", f"target     {settings.target}", sep="\n")
    print(f"edited at  layer {place.layer}, token {place.token!r}: {place.reason}", "", sep="\n")
    print(*(f"{state:<15}  {answer}" for state, answer in answers.items()), sep="\n")
    for name, share in shares.items():
        print(f"{'realised':<15}  {float(share.mean()):.1%} of the requested change of {name}")
    written = [settings.out / FILES[0], *([settings.save_model] if settings.save_model else [])]
    print("written:", ", ".join(map(str, written)))
    return 0


def parse_place(where: str) -> Place:
    """What LAYER (at the last token) or LAYER:TOKEN spells. CommandError for anything else."""
    layer, colon, token = where.partition(":")
    if not _is_number(layer) or (colon and not token):
        raise CommandError(f"no place {where!r}; write --where trace, --where 4 or --where 4:constraint_last")
    chosen = int(token) if _is_number(token) else token or "last"
    return Place(layer=int(layer), token=chosen, reason="as asked")


def _check(settings: Edit) -> Place | Corruption:
    """The place to edit, or the corruption of the trace that finds it; every error that needs no model comes here."""
    settings.check_question()
    found = settings.corruption() if settings.where == "trace" else parse_place(settings.where)
    check_files(settings.out, FILES)
    if settings.save_model is not None:
        check_new_folder(settings.save_model)
        if settings.save_model.absolute() == settings.out.absolute():
            raise CommandError(f"--out and --save-model are both {str(settings.out)!r}; choose two folders")
    return found


def _trace(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, settings: Edit) -> Place:
    """Where a trace of the model's present answer says that the edit belongs."""
    # names and not positions: they mean the same token in other wordings, where the edit has to work too
    named = tuple(name for name in ("constraint_last", "last") if name in prompt.groups)
    positions = settings.positions(named)
    sites = ("hidden", "mlp")  # all that the choice needs
    trace = causal_trace(vlm, prompt, corruption=corruption, sites=sites, window=settings.window, positions=positions)
    site = trace.edit_site()
    return Place(layer=site.layer, token=site.token, reason=site.reason)


def _answers(vlm: VisionLanguageModel, prompt: Prompt, delta: Delta) -> dict[str, str]:
    """The answer in each state of the model, which ends as it began."""
    before = vlm.answers([prompt])[0]
    with delta.applied(vlm):
        edited = vlm.answers([prompt])[0]
    return {"before": before, "with the edit": edited, "after undo": vlm.answers([prompt])[0]}


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
