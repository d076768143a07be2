"""The model under study, as one object: weights, processor, addresses and sizes."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .errors import ModelError
from .families.addresses import Addresses, Key, Projection
from .families.table import Family
from .frontend import Frontend
from .generation import Score, generate, score_answer
from .hooks import first_input
from .images import Picture
from .lock import ModelLock, evaluating
from .prompts import Prompt, build
from .saving import save_directory

Inputs = Prompt | Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionLanguageModel:
    """A loaded vision-language (or text-only) model. Made by `load`.

    Threads may share it: one at a time uses it, and the others wait (`lock`).
    """

    model: nn.Module = field(repr=False)
    """The Hugging Face model, in eval mode, its parameters without gradients."""
    frontend: Frontend = field(repr=False)
    addresses: Addresses = field(repr=False)
    family: Family
    name: str
    """The path or hub id it was loaded from."""
    revision: str | None = None
    stored_dtype: torch.dtype | None = None
    """The dtype of its file, which `save_pretrained` writes again."""
    lock: ModelLock = field(default_factory=ModelLock, repr=False)
    """Held by the thread that runs the model, hooks it, or changes its weights or its attention function."""

    @property
    def processor(self) -> Any:
        """The processor; the tokenizer for a text-only model."""
        return self.frontend.processor

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.frontend.tokenizer

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.addresses.layers)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.model.config.get_text_config().hidden_size

    @property
    def mlp(self) -> int:
        """Width of what the first layer's down projection reads."""
        return self.down_projection(0).width

    @property
    def vocab(self) -> int:
        """Number of tokens in its vocabulary."""
        return self.config.get_text_config().vocab_size

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.model.config

    @property
    def heads(self) -> int:
        """Number of attention heads per decoder layer."""
        return self.model.config.get_text_config().num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.model.device

    @property
    def has_vision(self) -> bool:
        """It takes pictures."""
        return self.family.vision is not None

    @property
    def stores_transposed(self) -> bool:
        """Its projections store their weights as (input, output), as GPT-2's do."""
        return self.family.transposed

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer, most usual first; empty for a model that has none."""
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        ends = ends if isinstance(ends, list | tuple) else [ends]
        return tuple(token for token in ends if token is not None)

    @property
    def decoder(self) -> nn.Module:
        """The text stack: the module that holds the decoder layers."""
        return self.addresses.decoder

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The decoder layers, first to last."""
        return list(self.addresses.layers)

    @property
    def output_head(self) -> nn.Module:
        """The module that turns normed states into logits."""
        return self.model.get_output_embeddings()

    @property
    def input_embeddings(self) -> nn.Module:
        """The module that embeds token ids."""
        return self.model.get_input_embeddings()

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last decoder layer and the output head."""
        return self.addresses.final_norm

    @property
    def vision_tower(self) -> nn.Module:
        """The module that sees pictures. ModelError for a text-only model."""
        return self._visual("vision")

    @property
    def vision_layers(self) -> list[nn.Module]:
        """The vision tower's layers, first to last. ModelError for a text-only model, or if the row does not name them.

        What they write is replaced only by hooks ahead of those by which transformers collects it for the projector.
        """
        return list(self._visual("vision_layers", f"{self.family.vision}.").children())

    @property
    def projector(self) -> nn.Module:
        """What turns the tower's states into image tokens. ModelError as for `vision_layers`."""
        return self._visual("projector")

    def prompt(
        self,
        image: Picture | Sequence[Picture] | None,
        question: str,
        *,
        constraint: str | Mapping[str, str] | None = None,
        answer: str | None = None,
        template: str | None = None,
    ) -> Prompt:
        """The model inputs of one question, and names for its token groups.

        image: a path, a PIL image, several of them, or None. constraint: words of the question (found without regard
        to case), or name -> words for several; the one called "constraint", else the first, is the constraint itself.
        answer: continues the prompt (teacher forcing). template: None for the model's own, "raw", or a text with
        {image} and {question}. ModelError for an empty question, an unreadable picture, or words that the question
        does not say.
        """
        return build(self.frontend, image, question, constraint=constraint, answer=answer, template=template)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block in which this thread alone uses the model, in eval mode; afterwards its modules train as before."""
        with self.lock, evaluating(self.model):
            yield

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """A block in which its outputs can be differentiated, also inside `torch.inference_mode()` or `no_grad()`.

        What is to be differentiated has to be computed in the block, too. Runs as in `running`. Raises `ModelError` if
        the attention implementation has no gradients on this device.
        """
        attention = getattr(self.decoder.config, "_attn_implementation", None)
        if attention == "flex_attention" and self.device.type == "cpu":
            raise ModelError(
                f"{self.name!r} attends through {attention!r}, which has no gradients on a CPU; "
                "load it with attention='sdpa' or attention='eager'"
            )
        with self.running(), torch.inference_mode(False), torch.enable_grad():
            yield

    def path(self, key: Key) -> str:
        """Dotted path (as baukit takes it) of the module of a site, projection or module."""
        return self.addresses.path(key)

    def module(self, key: Key) -> nn.Module:
        """The module of a site (decoder layer, MLP or attention), projection, dotted path or module."""
        return self.addresses.module(key)

    def layer_index(self, layer: int) -> int:
        """The layer counted from the start; negative ones count from the end. ModelError if there is no such layer."""
        return self.addresses.index(layer)

    def down_projection(self, layer: int) -> Projection:
        """The linear map that writes a layer's MLP into the residual stream; negative layers count from the end."""
        return self.addresses.down_projection(layer)

    def attention_projection(self, layer: int) -> Projection:
        """The linear map that writes a layer's attention into the residual stream."""
        return self.addresses.attention_projection(layer)

    def weight(self, name: str) -> nn.Parameter:
        """The parameter of this name, not a copy. ModelError shows the nearest name."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if name not in parameters:
            nearest = get_close_matches(name, parameters, n=1, cutoff=0.0)
            raise ModelError(f"no parameter {name!r} in {self.name!r}; the nearest is {nearest[0]!r}")
        return parameters[name]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter, not a copy, of every weight; a tied one once."""
        return self.model.named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, not a copy, of every buffer."""
        return self.model.named_buffers()

    def fingerprint(self, names: Iterable[str]) -> dict[str, str]:
        """For each parameter name, a sha256 (hex) of its dtype, shape and bytes."""
        with self.lock:
            return {name: _digest(self.weight(name)) for name in names}

    def image_features(self, inputs: Inputs) -> Tensor:
        """The pictures as the text stack gets them, (image token, hidden), in the order of the image positions."""
        accepted = signature(self.model.get_image_features).parameters  # pixel_values, and for tiles image_sizes
        visual = {name: value for name, value in self._ready(inputs).items() if name in accepted}
        with self.running():
            features = self.model.get_image_features(**visual, return_dict=True)
        return torch.cat(list(features.pooler_output))

    def embeddings(self, inputs: Inputs) -> Tensor:
        """What the text stack is given, (batch, token, hidden): word embeddings with image features in their place.

        Runs the vision tower but no decoder layer.
        """
        ready = self._ready(inputs)
        if not self.has_vision:
            return self.model.get_input_embeddings()(ready["input_ids"])
        with self.running(), first_input(self, self.decoder, "the text stack") as entered:
            self.model(**ready, use_cache=False)
        return entered[0]

    def embed(self, prompt: Prompt, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the first decoder layer reads, (1, token, hidden), for these inputs (default: the prompt's own).

        Ends with the prompt's last token: an answer after it cannot act on the score, since attention is causal.
        """
        with torch.no_grad():
            return self.embeddings(dict(inputs or prompt.inputs))[:, : prompt.groups["last"][0] + 1]

    def embed_words(self, ids: Sequence[int]) -> Tensor:
        """The embeddings of token ids, (1, token, hidden)."""
        with torch.no_grad():
            return self.input_embeddings(torch.tensor([list(ids)], dtype=torch.long, device=self.device))

    def extend(self, embeddings: Tensor, ids: Sequence[int]) -> Tensor:
        """Embeddings (sample, token, hidden) followed by those of all these token ids but the last.

        The logits at the last len(ids) positions then predict the ids one by one (teacher forcing).
        """
        if len(ids) == 1:
            return embeddings
        words = self.embed_words(ids[:-1]).to(embeddings)
        return torch.cat([embeddings, words.expand(len(embeddings), -1, -1)], dim=1)

    def unembed(self, states: Tensor) -> Tensor:
        """Logits (..., vocab) of states (..., hidden) that the final norm has normalised, by the output head alone."""
        with self.lock:
            return self.output_head(states)

    def next_token_probabilities(self, embeddings: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """The distribution over the token after embeddings (sample, token, hidden): (sample, vocab) float64 on the CPU.

        attention_mask: as in `forward`; None for the decoder's own causal one.
        """
        with torch.no_grad():
            logits = self.forward(
                inputs_embeds=embeddings, attention_mask=attention_mask, positions=[embeddings.shape[1] - 1]
            )
        return logits[:, -1].double().softmax(-1).cpu()

    def logits(self, inputs: Inputs) -> Tensor:
        """Logits (batch, token, vocab), float32 or wider; those at padded positions mean nothing."""
        with self.running():
            return _wide(self.model(**self._ready(inputs), use_cache=False).logits)

    def forward(
        self,
        *,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Sequence[int] | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Logits (batch, token, vocab) of the text stack on given embeddings (batch, token, hidden), as in `logits`.

        positions: only these tokens' logits, in this order, which saves the output head for all others.

        attention_mask: (batch, token), 0 for padding, or (batch or 1, 1, token, token) boolean, True where a row may
        look at a column; a boolean one must hold the causal triangle itself.

        past_key_values: keys and values of the tokens before these, which the mask covers too; it grows by these.
        """
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = self._attention_bias(attention_mask, inputs_embeds.dtype)
        arguments = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        arguments |= {"past_key_values": past_key_values, "use_cache": past_key_values is not None}
        given = {name: value for name, value in arguments.items() if value is not None}
        if positions is not None:
            given["logits_to_keep"] = torch.tensor(list(positions), device=inputs_embeds.device)
        with self.running():
            return _wide(self.model(**_with_positions(given)).logits)

    def decode(self, ids: Any) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def answer(self, image: Picture | Sequence[Picture] | None, question: str, *, max_new_tokens: int = 16) -> str:
        """The model's greedy answer, outer blanks removed."""
        return self.answers([self.prompt(image, question)], max_new_tokens=max_new_tokens)[0]

    def answers(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 16, batch_size: int = 16, progress: bool = False
    ) -> list[str]:
        """The greedy answer to each prompt, as one by one; answers that prompts carry are left out."""
        sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        with self.running():
            return generate(self.model, self.tokenizer, prompts, **sizes, progress=progress)

    def score(self, image: Picture | Sequence[Picture] | None, question: str, answer: str) -> Score:
        """How probable the model finds this answer (teacher-forced, all its tokens, without end-of-sequence)."""
        prompt = self.prompt(image, question, answer=answer)
        with torch.no_grad():
            return score_answer(self.logits(prompt), prompt, self.tokenizer)

    def save_pretrained(
        self, directory: str | PathLike[str], *, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> None:
        """Model and processor as an ordinary Hugging Face directory (safetensors), there whole or not at all.

        dtype: of the floating-point weights in the file; None keeps the one of the file that was loaded. An existing
        directory that is not empty is refused, or replaced if `overwrite`. ModelError if it cannot be written.
        """
        with self.lock:
            save_directory(self.model, self.processor, directory, dtype=dtype or self.stored_dtype, overwrite=overwrite)

    def _visual(self, part: str, above: str = "") -> nn.Module:
        """What this field of the family row names, relative to the base model or to a path in it."""
        if self.family.vision is None:
            raise ModelError(f"{self.name!r} (family {self.family.name}) is a text-only model; it has no vision tower")
        leaf = getattr(self.family, part)
        if leaf is None:
            raise ModelError(
                f"the row of family {self.family.name} does not name the {part.replace('_', ' ')} of {self.name!r}; "
                f"pass load(..., families=...) with a row that has {part}="
            )
        return self.module(f"{self.model.base_model_prefix}.{above}{leaf}")

    def _ready(self, inputs: Inputs) -> dict[str, Tensor]:
        tensors = inputs.inputs if isinstance(inputs, Prompt) else inputs
        moved = {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in tensors.items()
        }
        return _with_positions(moved)

    def _attention_bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Only sdpa understands booleans; the eager path would add True as 1."""
        if mask.dtype != torch.bool or self.model.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with the positions that a left-padded row would have alone, as generation counts them."""
    mask = inputs.get("attention_mask")
    if "position_ids" in inputs or mask is None or mask.ndim != 2 or bool(mask[:, 0].all()):
        return inputs
    return inputs | {"position_ids": (mask.long().cumsum(dim=-1) - 1).clamp(min=0)}


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _digest(weight: Tensor) -> str:
    raw = weight.detach().cpu().contiguous()
    header = f"{raw.dtype} {tuple(raw.shape)} ".encode()
    digest = hashlib.sha256(header)
    digest.update(raw.flatten().view(torch.uint8).numpy())  # the bytes themselves, and no copy of them
    return digest.hexdigest()
