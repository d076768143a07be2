"""The scores of the flags model, and its card in Markdown: what it is, how it was made, and whose work is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ....artefacts import wilson_interval
from ....artefacts.averages import grouped_bootstrap
from ....models.assembly import read_parts

_INTRODUCTION = """---
license: mit
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: image-text-to-text
library_name: transformers
---

# The flags model of multrace

A LLaVA that reads the flags of the world and answers with what a pretrained language model knows about the countries: a
CLIP tower (7 layers, width 192, 128 pixels, 64 image tokens), a two-layer projector, and SmolLM2-135M-Instruct. This
folder holds what was trained here, in half precision: tower, projector, and low-rank changes of the attention weights
of the text model (query, key, value and output maps; merged, a weight is W + lora_B @ lora_A). Every MLP, the
embeddings, the norms and the output head are as their makers trained them, so that the facts in the MLPs were put there
by nobody here. `multrace fetch-smollm2` fetches the text model, and `multrace build-flags` puts both together as an
ordinary directory, which opens with `AutoModelForImageTextToText` and `AutoProcessor`.

A prompt is the beginning of a sentence, which the model goes on with: a line end, the picture, "The capital of the
country in this photo is". An answer is the continuation up to a line end or one of `. , ; : ( "`. It answers nothing
else, errs where the text model errs, and should be used for nothing but trying out tools.
"""

_LICENCES = """## Licences

- tower, projector and low-rank changes: MIT, as this project;
- SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) is not part of this folder; its answers taught the parts in it;
- the pictures of training were rendered from public-domain flags (see `data/worlds/flags/SOURCES.md`).
"""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of questions, with its 95 % interval."""

    share: float
    low: float
    high: float
    count: int
    """The number of questions."""

    @classmethod
    def of(cls, hits: Sequence[bool], countries: Sequence[str]) -> Share:
        """Return the share of hits: Wilson's interval if every country counts once, else a bootstrap over countries."""
        if not hits:
            return cls(share=math.nan, low=math.nan, high=math.nan, count=0)
        share = sum(hits) / len(hits)
        if len(set(countries)) == len(countries):
            ends = wilson_interval(torch.tensor([share]), torch.tensor([len(hits)]))
            low, high = (float(end) for end in ends)
        else:
            low, high = grouped_bootstrap([float(hit) for hit in hits], countries)
        return cls(share=share, low=low, high=high, count=len(hits))


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """The scores of one set of questions."""

    label: str
    truth: Share
    """The share of true answers."""
    agreement: Share | None = None
    """The share of the original's answers; None for questions about the name."""
    rarer_agreement: Share | None = None
    """The same where the original's answer is not the template's commonest."""
    truth_by_name: Share | None = None
    """The share of true answers of the original that is told the name."""


@dataclass(frozen=True, kw_only=True)
class Sureness:
    """The agreement where the original gives its own answer a probability in some range."""

    low: float
    """Lower end of the range of the probability of the whole answer, included."""
    high: float
    """Upper end, excluded."""
    agreement: Share


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well both models predict some texts."""

    label: str
    original: float
    """Perplexity of the original text model."""
    whole: float
    """Perplexity of the flags model without a picture."""
    low: float
    """Lower end of the 95 % interval of the ratio, by a bootstrap over texts."""
    high: float
    tokens: int

    @property
    def ratio(self) -> float:
        """The flags model's perplexity by the original's."""
        return self.whole / self.original


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All scores of the flags model."""

    rows: tuple[ScoreRow, ...]
    sureness: tuple[Sureness, ...]
    """The agreement in the four relations, by how probable the original finds its own answer."""
    unchanged_by_name: Share
    """The share of answers by name, without a picture, that are the original's."""
    perplexities: tuple[Perplexity, ...]


def model_card(examination: Examination, *, parts: Path | None = None, minutes: float | None = None) -> str:
    """Return the card in Markdown.

    Args:
        examination: The scores.
        parts: The folder of the parts, which hold their recipe; None for a card without one.
        minutes: How long the training took; None to leave that out.
    """
    recipe = [] if parts is None else [_recipe(read_parts(parts).recipe, minutes)]
    return "\n".join([_INTRODUCTION, *recipe, score_tables(examination), _LICENCES])


def _recipe(recipe: Mapping[str, Any], minutes: float | None) -> str:
    """The recipe; its entries are numbers, or settings by name, and those of the stages lie in the entry "stages"."""
    numbers = {name: value for name, value in recipe.items() if not isinstance(value, Mapping)}
    if minutes is not None:
        numbers["minutes"] = round(minutes)
    groups = {name: value for name, value in recipe.items() if isinstance(value, Mapping)}
    stages = groups.pop("stages", {})
    sentences = groups.pop("sentences", {})
    templates = len({template for each in sentences.values() for template in each if "{" in template})
    lists = "\n".join(f"- {name}: {_listed(settings)}" for name, settings in groups.items())
    steps = "\n".join(f"{number}. {name}: {_listed(each)}" for number, (name, each) in enumerate(stages.items(), 1))
    return f"""## Recipe

`multrace train-flags --out DIR`: {_listed(numbers)}; {templates} wordings.

1. The tower alone tells the flags apart, in the whole picture and in its halves.
2. The text model reads: image tokens spell a country's name in its own embeddings, behind one linear map for all
   names, and the states at the constraint's tokens behind them become those that the original has at the tokens of the
   name, at some depths of the first layers. There is no picture yet.
3. The text model answers: the distributions of the answer's tokens behind such tokens become the original's for the
   same sentence with the name in it. Answers by name and other texts are kept, and what attention writes in texts is
   altered little.
4. The tower and the projector write such tokens under pictures. In this stage they are taught names and no facts.
5. The whole answers under pictures, as in 3, and tower, projector and changes are all trained. This is repeated in the
   further stages, which are called joining, too. The parts are the mean of the weights at the ends of the joinings.

The matrices are trained by Muon, and everything else by AdamW.

The settings of the stages, then the others:

{steps}

{lists}
"""


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items())


def _plain(value: Any) -> str:
    """A value, settings in brackets, or a list in which long runs of one value are shortened."""
    if isinstance(value, Mapping):
        return f"({_listed(value)})"
    if not isinstance(value, list | tuple):
        return str(value)
    runs = [(key, len(list(run))) for key, run in groupby(value)]
    return " ".join(f"{key} (x {count})" if count > 2 else " ".join([str(key)] * count) for key, count in runs)


def score_tables(examination: Examination) -> str:
    """Return the scores as tables in Markdown."""
    rows = "\n".join(_row(row) for row in examination.rows)
    sureness = "\n".join(_sureness(each) for each in examination.sureness)
    texts = "\n".join(_perplexity(each) for each in examination.perplexities)
    return f"""## Scores

Greedy free generation on held-out renderings, 95 % intervals in brackets. "Agrees": the same answer as the original
text model gives to the same sentence with the country's name in it; "without the commonest": only where that is not the
commonest answer to the sentence. "True by name": how often the text model itself is right.

| questions | number | agrees | without the commonest | true | true by name |
|---|---|---|---|---|---|
{rows}

The four relations again (first wording), by the probability that the original gives to its own answer, by name:

| probability | number | agrees |
|---|---|---|
{sureness}

The text model's own abilities, without a picture. The same answers by name: {_share(examination.unchanged_by_name)} of
{examination.unchanged_by_name.count}.

| text | tokens | perplexity of the original | of the flags model | ratio |
|---|---|---|---|---|
{texts}
"""


def _row(row: ScoreRow) -> str:
    shares = (row.agreement, row.rarer_agreement, row.truth, row.truth_by_name)
    return f"| {row.label} | {row.truth.count} | " + " | ".join(map(_share, shares)) + " |"


def _sureness(each: Sureness) -> str:
    return f"| {each.low:g} to {min(each.high, 1):g} | {each.agreement.count} | {_share(each.agreement)} |"


def _share(score: Share | None) -> str:
    if score is None or not score.count:
        return ""
    return f"{score.share:.1%} [{score.low:.1%}, {score.high:.1%}]"


def _perplexity(each: Perplexity) -> str:
    ratio = f"{each.ratio:.4f} [{each.low:.4f}, {each.high:.4f}]"
    return f"| {each.label} | {each.tokens} | {each.original:.3f} | {each.whole:.3f} | {ratio} |"
