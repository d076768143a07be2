"""multrace flow: by which ways, and in which layers, the picture's information comes to the answer."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..artefacts.errors import ArtefactError
from ..models import ModelError
from ..models.errors import gist
from ..tracing import TraceError
from .errors import CommandError
from .flow_files import result_files, write_files
from .flow_options import Flow
from .flow_reading import Asked, Reading
from .flow_records import flow_records
from .options import add_options, read
from .outputs import check_files

HELP = "follow the picture's information through the layers: knockout, lens, contributions, relevance"
EXAMPLE = """examples:
  multrace flow --world 20 --out out/world
  multrace flow --world 90 --contributions --degrade --out out/failure
  multrace flow --image photo.jpg --question "What colour is the car?" --answer red --box 40,60,210,180
  multrace flow --image photo.jpg --question "What colour is the car?" --answer red --constraint "the car" \\
      --knockout --lens --contributions --relevance --smooth 10 --keep 0 64
  multrace flow --image photo.jpg --question "Is the car red or blue?" --flows "image -> last" "object -> last" \\
      --box 40,60,210,180 --windows 1 9 --heads each
  multrace flow --records questions.jsonl --knockout --lens --out out/all
  multrace flow --records csv/ChooseAttr.csv --images gqa/images --limit 100 --model llava-hf/llava-1.5-7b-hf

One question: files in OUT, each NAME.safetensors with its pictures:
  --knockout       knockout.safetensors, .png (all flows overlaid, at most the strongest 12) and .csv
  --lens           lens.safetensors, .png and lens_tokens.png (the likeliest token at each position)
  --contributions  contributions.safetensors and .png (to the last token); image_to_constraint.safetensors and .png
                   (over the picture), image_tokens.png (by index of the image token)
  --relevance      cam, share, saliency and truncation: .safetensors and .png; where the image tokens form a grid,
                   cam_overlay.png, saliency_overlay.png and, if --keep leaves some of them, truncation_overlay.png
Many questions: the averages in OUT as .safetensors, .png and .csv: knockout, lens, contributions,
  image_to_constraint (and image_tokens.png), failure (how well failure is predicted), share, saliency (geometric
  means), truncation; and OUT/report.json. Each question's own results, of contributions the means over heads, are in
  OUT/questions/ID; cam, which has no average, is drawn there. A later call with the same settings goes on from them.
  Questions that the model answers wrongly are listed, and count for contributions only, unless --all is given.
The .safetensors are read by the classes in multrace.tracing.results: AttentionKnockout.load(path), AverageKnockout.load, ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Flow`."""
    add_options(parser, Flow)


def run(options: argparse.Namespace) -> int:
    """Analyses one question or many; writes results and pictures, prints what was found."""
    settings = read(Flow, options)
    settings.check()
    return _flow_one(settings) if settings.is_one else flow_records(settings)


def _flow_one(settings: Flow) -> int:
    question, readings = settings.one_question(), settings.readings()
    for reading in readings:
        reading.check(question)
    known = [name for reading in readings for name in (reading.file, *reading.drawings)]
    check_files(settings.out, known)
    vlm = settings.open_model()
    prompt = question.prompt(vlm)
    generated = vlm.answers([prompt])[0]
    engine = settings.settings_of_engine(checked=True)
    asked = Asked(vlm=vlm, question=question, prompt=prompt, generated=generated, engine=engine, progress=True)
    results, failed = _results(readings, asked)
    if not results:
        raise _said(failed)
    files = {}
    for reading, result in results.items():
        files |= result_files(reading, result, prompt)
    written = write_files(settings.out, files, stale=known)
    print(f"question  {question.question}\nanswer    {asked.answered.verdict}")
    for reading, result in results.items():
        print(f"\n{reading.name}", *(f"  {line}" for line in reading.told(result)), sep="\n")
    print(f"\nwritten to {settings.out}:", ", ".join(path.name for path in written))
    if failed:
        raise _said(failed)
    return 0


def _results(readings: Sequence[Reading], asked: Asked) -> tuple[dict[Reading, Any], dict[str, str]]:
    """What each reading found, and why the others found nothing: one that fails takes nothing from the others."""
    results, failed = {}, {}
    for reading in readings:
        try:
            results[reading] = reading.compute(asked)
        except (CommandError, ModelError, TraceError, ArtefactError) as error:
            failed[reading.name] = gist(error)
    return results, failed


def _said(failed: Mapping[str, str]) -> CommandError:
    """The readings that found nothing, with their reasons."""
    return CommandError("; ".join(f"no {name}: {reason}" for name, reason in failed.items()))
