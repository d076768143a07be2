"""How much the changes of attention alter where there is no picture, from the second moments of what they take in.

Texts and sentences by name that are taught beside the pictures stay as they are, but there are few of them, and others
change. For a map W with the change D, the share E|D x|^2 / E|W x|^2 = tr(D C D') / tr(W C W') over all tokens needs
nothing but their second moments C = E[x x'], which few texts determine well. It is the term that keeps other facts in
closed-form edits (Meng et al., arXiv 2210.07229, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from ....artefacts import read_tensors, write_tensors
from .student import MAPS, LowRankMap, Student, line_end_id
from .teacher import Answers, Sentences

SOURCES = {name: "o_proj" if name == "o_proj" else "q_proj" for name in MAPS}
"""The map whose inputs each map takes in: queries, keys and values come from the same states."""
_TOGETHER = 40
"""Texts that run together."""
_SOME = 4
"""Of so many sentences by name, one counts."""
_LAYOUT = "multrace flags moments 1"


def kept_rows(answers: Answers, sentences: Sentences) -> list[Sequence[int]]:
    """Return the ids of what is to stay as it is: the original's own texts, and every fourth sentence by name."""
    asked = [(template, country) for template in answers.templates for country in range(len(sentences.names))]
    line_end = line_end_id(sentences.tokenizer)
    return [*answers.texts.tolist(), *((line_end, *sentences.by_name(*each).ids) for each in asked[::_SOME])]


@torch.no_grad()
def make_moments(folder: Path, original: LlamaForCausalLM, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return LAYER.MAP -> second moments (inputs, inputs), computed unless they lie in the folder already.

    Args:
        folder: The folder in which they are kept.
        original: The text model.
        rows: The ids of sentences or texts.
    """
    path = folder / "moments.safetensors"
    if not path.is_file():
        sums: dict[str, Tensor] = {}
        ordered = sorted(rows, key=len)
        for start in tqdm(range(0, len(rows), _TOGETHER), desc="second moments", mininterval=2):
            some = ordered[start : start + _TOGETHER]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in some], batch_first=True)
            places = torch.tensor([[place < len(row) for place in range(ids.shape[1])] for row in some])
            with recorded_moments(original, [places]) as recorded:
                original(ids)  # a token sees only those before it, so what fills a row does not count
            sums = {name: sums.get(name, 0) + value[0] for name, value in recorded.items()}
        count = sum(map(len, rows))
        write_tensors(path, {name: value / count for name, value in sums.items()}, {"layout": _LAYOUT})
    return read_tensors(path)[0]


@contextmanager
def recorded_moments(model: LlamaForCausalLM, groups: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield LAYER.MAP -> (group, inputs, inputs), filled when the model runs in the block, once.

    They are the sums of x x' over the inputs x of the maps in SOURCES.

    Args:
        model: The text model, with or without changes.
        groups: Masks (row, token), True at the tokens of a group.
    """
    recorded: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.layers):
            for name in dict.fromkeys(SOURCES.values()):
                hook = partial(_record, recorded, f"{number}.{name}", groups)
                hooks.callback(getattr(layer.self_attn, name).register_forward_pre_hook(hook).remove)
        yield recorded


def _record(
    recorded: dict[str, Tensor], name: str, groups: Sequence[Tensor], module: nn.Module, inputs: tuple[Tensor]
) -> None:
    states = [inputs[0][group] for group in groups]
    recorded[name] = torch.stack([each.T @ each for each in states])


class Interference:
    """The share of what changed maps write that is due to the change, over texts without a picture."""

    def __init__(self, student: Student, moments: dict[str, Tensor]) -> None:
        """Take the second moments that `make_moments` returns."""
        self.moments = moments
        self.maps: list[tuple[LowRankMap, Tensor, Tensor]] = []
        for number, name, change in student.changes():
            own, weight = moments[f"{number}.{SOURCES[name]}"], change.weight.float()
            self.maps.append((change, own, (weight @ own * weight).sum()))

    def mean(self) -> Tensor:
        """Return the mean over all changed maps."""
        shares = []
        for change, moments, whole in self.maps:
            low = change.lora_A @ moments @ change.lora_A.T
            shares.append((change.lora_B @ low * change.lora_B).sum() / whole)
        return torch.stack(shares).mean()
