"""What the original text model teaches: its states at a country's name, its answers by name, and texts of its own.

All of it is computed once and kept in a folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ....artefacts import read_tensors, write_tensors
from .original import Sentence, ids_of, own_texts, padded
from .recipe import Recipe
from .student import Student, line_end_id

_LEAST = 1e-6
"""What the other tokens have at least together, so that its logarithm is finite."""
_ROWS = 40
"""Sentences that are computed together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Distributions:
    """The most probable next tokens at some places."""

    ids: Tensor
    """(place, candidate)."""
    logs: Tensor
    """(place, candidate): natural logarithms of their probabilities."""

    @classmethod
    def certain(cls, ids: Sequence[int], candidates: int) -> Distributions:
        """Return distributions that give these tokens the probability 1."""
        all_ids = torch.zeros(len(ids), candidates, dtype=torch.long)
        all_ids[:, 0] = torch.tensor(ids)
        logs = torch.full((len(ids), candidates), -50.0)
        logs[:, 0] = 0
        return cls(ids=all_ids, logs=logs)

    @classmethod
    def joined(cls, parts: Sequence[Distributions]) -> Distributions:
        """Return the places of all parts, in order."""
        return cls(ids=torch.cat([part.ids for part in parts]), logs=torch.cat([part.logs for part in parts]))

    def divergence(self, logits: Tensor) -> Tensor:
        """Return (place,) the Kullback-Leibler divergence of a model's logits from these.

        All tokens besides the candidates count as one, or else the model would learn that they never come.
        """
        own = logits.log_softmax(-1).gather(-1, self.ids)
        among = (self.logs.exp() * (self.logs - own)).sum(-1)
        rest = (1 - self.logs.exp().sum(-1)).clamp_min(0)
        own_rest = (1 - own.exp().sum(-1)).clamp_min(_LEAST)
        return among + torch.special.xlogy(rest, rest) - rest * own_rest.log()


class Sentences:
    """The sentences of the training, as tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], recipe: Recipe) -> None:
        self.tokenizer, self.names, self.templates = tokenizer, names, recipe.sentences
        self._of = cache(lambda template, constraint: Sentence.of(tokenizer, template, constraint))

    def by_name(self, template: str, country: int) -> Sentence:
        """Return the sentence about a country by its name."""
        return self._of(template, self.names[country])

    def by_picture(self, template: str, words: str) -> Sentence:
        """Return the sentence about a flag that these words refer to."""
        return self._of(template, words)

    def name(self, country: int, most: int) -> tuple[int, ...]:
        """Return the first tokens of a country's name and of the full stop behind it."""
        return tuple(ids_of(self.tokenizer, f" {self.names[country]}."))[:most]


class NameStates:
    """The original's states at all tokens of sentences by name, at some depths."""

    def __init__(self, sentences: Sentences, depths: Sequence[int], states: Tensor) -> None:
        """Take states (token, depth, hidden) of all sentences, one after another."""
        self.sentences, self.depths = sentences, depths
        self._places: dict[tuple[str, int], slice] = {}
        at = 0
        for template, country in _questions(sentences):
            end = at + len(sentences.by_name(template, country).ids)
            self._places[template, country] = slice(at, end)
            at = end
        self._states = states
        last = {template: self._last(template) for template in sentences.templates.read}
        self.means = {template: states.mean(0) for template, states in last.items()}
        spread = torch.stack([(last[name] - mean).pow(2).mean(0) for name, mean in self.means.items()])
        self.last_deviation = spread.mean(0).sqrt() + 1e-3
        """(depth, hidden): how much the last token's states differ between countries."""
        self.countries = {name: (last[name] - mean) / self.last_deviation for name, mean in self.means.items()}
        """Template -> (country, depth, hidden): what the last token's states say of the country, standardised."""
        self.deviation = torch.cat([self._name(*key) for key in self._places]).std(0) + 1e-3
        """(depth, hidden): the deviation over all tokens of names."""

    def of(self, template: str, country: int) -> Tensor:
        """Return (token, depth, hidden) of a sentence."""
        return self._states[self._places[template, country]].float()

    def _name(self, template: str, country: int) -> Tensor:
        sentence = self.sentences.by_name(template, country)
        return self.of(template, country)[sentence.start : sentence.stop]

    def _last(self, template: str) -> Tensor:
        return torch.stack([self._name(template, country)[-1] for country in range(len(self.sentences.names))])


def _questions(sentences: Sentences) -> Iterator[tuple[str, int]]:
    for template in sentences.templates.read:
        yield from ((template, country) for country in range(len(sentences.names)))


@torch.no_grad()
def make_states(folder: Path, student: Student, sentences: Sentences, depths: Sequence[int]) -> NameStates:
    """Return the states by name of a student whose factors are still zero, which is the original in its precision."""
    path = folder / "states.safetensors"
    if not path.is_file():
        line_end, parts = line_end_id(sentences.tokenizer), []
        questions = list(_questions(sentences))
        for start in tqdm(range(0, len(questions), _ROWS), desc="states by name", mininterval=2):
            rows = [sentences.by_name(*question).ids for question in questions[start : start + _ROWS]]
            width = 1 + max(map(len, rows))
            ids = torch.full((len(rows), width), line_end)
            for number, row in enumerate(rows):
                ids[number, 1 : 1 + len(row)] = torch.tensor(row)
            mask = torch.ones(width, width, dtype=torch.bool).tril().expand(len(rows), 1, -1, -1)
            positions = torch.arange(width).expand(len(rows), -1)
            states = student.through(student.text.model.embed_tokens(ids), positions, [mask, mask], depths)
            stacked = torch.stack([states[depth] for depth in depths], 2)
            parts += [stacked[number, 1 : 1 + len(row)].half() for number, row in enumerate(rows)]
        write_tensors(path, {"states": torch.cat(parts)}, {"layout": "multrace flags states 1"})
    tensors, _ = read_tensors(path)
    return NameStates(sentences, depths, tensors["states"])


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The original's greedy continuations of sentences by name, and the texts that it writes itself."""

    templates: tuple[str, ...]
    tokens: Tensor
    """(template, country, token)."""
    ids: Tensor
    """(template, country, token, candidate)."""
    logs: Tensor
    """(template, country, token, candidate)."""
    texts: Tensor
    """(text, token)."""
    text_ids: Tensor
    """(text, token, candidate): what follows each token."""
    text_logs: Tensor

    def answer(self, template: str, country: int, most: int) -> tuple[tuple[int, ...], Distributions]:
        """Return the first tokens of the answer to a sentence, and the distributions that they are taken from."""
        place = self.templates.index(template), country
        tokens = tuple(self.tokens[place][:most].tolist())
        return tokens, Distributions(ids=self.ids[place][:most].long(), logs=self.logs[place][:most].float())

    def text(self, number: int) -> tuple[tuple[int, ...], Distributions]:
        """Return a text without its line end, and the distributions of what follows each of its tokens."""
        tokens = tuple(self.texts[number][1:].tolist())
        return tokens, Distributions(ids=self.text_ids[number][1:].long(), logs=self.text_logs[number][1:].float())


@torch.no_grad()
def make_answers(
    folder: Path, original: LlamaForCausalLM, sentences: Sentences, recipe: Recipe, *, seed: int
) -> Answers:
    """Return the original's answers and texts, which are computed unless they lie in the folder already."""
    path, templates, teaching = folder / "answers.safetensors", recipe.sentences.answered, recipe.teaching
    if not path.is_file():
        parts: dict[str, list[Tensor]] = {
            "tokens": [],
            "ids": [],
            "logs": [],
            "texts": [],
            "text_ids": [],
            "text_logs": [],
        }
        for template in tqdm(templates, desc="answers by name", mininterval=2):
            for name, value in _continued(original, sentences, template, recipe).items():
                parts[name].append(value[None])
        texts = own_texts(
            original, sentences.tokenizer, seed=seed, rounds=teaching.text_rounds, tokens=teaching.text_tokens
        )
        for batch in tqdm(texts, desc="texts", total=teaching.text_rounds, mininterval=2):
            top = original(batch).logits.log_softmax(-1).topk(_candidates(original, recipe), -1)
            parts["texts"].append(batch.int())
            parts["text_ids"].append(top.indices.int())
            parts["text_logs"].append(top.values.half())
        whole = {name: torch.cat(values) for name, values in parts.items()}
        write_tensors(path, whole, {"layout": "multrace flags answers 1"})
    tensors, _ = read_tensors(path)
    return Answers(templates=templates, **tensors)


def _candidates(original: LlamaForCausalLM, recipe: Recipe) -> int:
    return min(recipe.teaching.candidates, original.config.vocab_size)


def _continued(original: LlamaForCausalLM, sentences: Sentences, template: str, recipe: Recipe) -> dict[str, Tensor]:
    """The continuations of a sentence about every country: tokens, and ids and logs of the candidates."""
    count, teaching, line_end = len(sentences.names), recipe.teaching, line_end_id(sentences.tokenizer)
    rows = [(line_end, *sentences.by_name(template, country).ids) for country in range(count)]
    order = sorted(range(count), key=lambda country: len(rows[country]))
    filler = sentences.tokenizer.pad_token_id or 0
    pieces: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for start in range(0, count, _ROWS):
        some = order[start : start + _ROWS]
        ids, mask = padded([rows[country] for country in some], filler)
        output: Any = original.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=teaching.tokens,
            min_new_tokens=teaching.tokens,
            do_sample=False,
            pad_token_id=filler,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.stack(output.logits, 1).float().log_softmax(-1).topk(_candidates(original, recipe), -1)
        tokens = output.sequences[:, -teaching.tokens :].int()
        pieces |= dict(zip(some, zip(tokens, top.indices.int(), top.values.half(), strict=True), strict=True))
    stacked = [torch.stack(values) for values in zip(*(pieces[country] for country in range(count)), strict=True)]
    return dict(zip(("tokens", "ids", "logs"), stacked, strict=True))
