"""The text model as its makers trained it: the teacher of the flags model, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from ....data.worlds.flags.questions import cloze

LINE_END = "\n"
"""What every text begins with: the first position is an attention sink, and nothing that matters may stand there."""
STARTS = (
    "The", "In", "A", "I", "It", "When", "We", "There", "For", "If", "She", "He", "They", "This", "One", "How", "To",
    "What", "Once", "My", "Many", "After", "At", "On", "As", "Most", "You", "Every", "Some", "During", "While",
    "People", "Scientists", "The history of", "The city", "According to", "In the", "The main", "A new", "The country",
)  # fmt: skip
"""The first words of the texts that the model writes itself."""


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """The tokens of a sentence behind a line end."""

    ids: tuple[int, ...]
    start: int = 0
    """Index of the constraint's first token."""
    stop: int = 0
    """Index behind the constraint's last token; that of its first token if there is no constraint."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: str, constraint: str) -> Sentence:
        """Return the sentence that a template gives with a constraint."""
        text, spelt = cloze(template, constraint)
        start = template.index("{")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        covered = [
            number
            for number, (left, right) in enumerate(encoded.offset_mapping)
            if left < start + len(spelt) and right > start
        ]
        return cls(ids=tuple(encoded.input_ids), start=covered[0], stop=covered[-1] + 1)


def open_original(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """Return the text model in a folder, frozen and in float32, and its tokenizer, which pads on the left."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    ).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    return model.requires_grad_(False), tokenizer


def own_texts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int, rounds: int, tokens: int
) -> Iterator[Tensor]:
    """Yield (text, token) ids of texts that the model writes itself, one batch for each round.

    Every text begins with a line end and one of STARTS, and has the same number of tokens.

    Args:
        model: The text model.
        tokenizer: Its tokenizer.
        seed: The random seed of the sampling.
        rounds: The number of texts for each of STARTS.
        tokens: The number of tokens of a text.
    """
    heads = [ids_of(tokenizer, LINE_END + start) for start in STARTS]
    ids, mask = padded(heads, tokenizer.pad_token_id or 0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(rounds):
            with torch.no_grad():
                whole = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=True,
                    temperature=1.0,
                    top_p=0.95,
                    top_k=0,
                    pad_token_id=tokenizer.pad_token_id or 0,
                )
            skipped = [ids.shape[1] - len(head) for head in heads]
            yield torch.stack([row[skip : skip + tokens] for row, skip in zip(whole, skipped, strict=True)])


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text without the special tokens that some tokenizers add."""
    return tokenizer(text, add_special_tokens=False).input_ids


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Return (row, token) ids of rows that are padded on the left, and the mask, 1 where there is a token."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    return ids, mask
