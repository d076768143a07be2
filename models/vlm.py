"""The model under study as experiments see it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..data.facts import Question, Words
from ..data.pictures import Picture
from .errors import ModelError
from .families import Addresses, ExpertProjection, Family, Key, Projection, RoutedExperts, Site
from .frame import PER_LAYER, DecoderInput, Frame, with_positions
from .frontend import Frontend, to_device
from .generation import Continuation, Score, check_room, generate, score_answer
from .guards import ModelLock, evaluating, uninterrupted
from .hooks import capture, first_call, main_tensor
from .layout import pixels_of
from .opening import opening
from .pictures import named_features, projected_features
from .placement import (
    OpenedWeight,
    compute_device,
    has_weight,
    input_device,
    opened,
    processes_of,
    stored_beside,
    stored_weights,
    together,
    values,
    weight_names,
)
from .prompts import Prompt, PromptInputs, build, build_for
from .readout import AfterHead, at_least_float32, measure_readout, run_on_token
from .weights import WeightDigests, digest_weight, save_directory, without_origin

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


Inputs = Prompt | Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionLanguageModel:
    """A loaded vision-language (or text-only) model. Made by `load`.

    Threads may share it: one at a time uses it, and the others wait (`lock`).
    """

    model: PreTrainedModel = field(repr=False)
    """The Hugging Face model, in eval mode, its parameters without gradients."""
    frontend: Frontend = field(repr=False)
    addresses: Addresses = field(repr=False)
    family: Family
    name: str
    """The path or hub id that the model was loaded from."""
    revision: str | None = None
    stored_dtype: torch.dtype | None = None
    """The dtype of the file that the model was loaded from; the default of `save_pretrained`."""
    lock: ModelLock = field(default_factory=ModelLock, repr=False)
    """The lock of the thread that runs the model, hooks it, or changes its weights or its attention function."""

    digests: WeightDigests = field(default_factory=WeightDigests, repr=False)
    """Digests of the weights that `weights_digest` has computed."""

    def __repr__(self) -> str:
        revision = "" if self.revision is None else f" at {self.revision}"
        sizes = f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads, vocab {self.vocab}"
        return (
            f"VisionLanguageModel({self.name!r}{revision},\n"
            f"    {self.family.name}: {sizes}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

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
        return self.config.get_text_config().hidden_size

    @property
    def mlp(self) -> int:
        """Width of the input of the first down projection; the width of one expert where no layer has a single one."""
        return self.addresses.mlp_width

    @property
    def positions(self) -> int | None:
        """Number of tokens that a prompt may have together with its answer; None for a model without a limit."""
        return self.frontend.limit

    @property
    def vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self.config.get_text_config().vocab_size

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.model.config

    @property
    def heads(self) -> int:
        """Number of attention heads per decoder layer."""
        return self.config.get_text_config().num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The device that inputs are moved to."""
        return input_device(self.model)

    @property
    def is_quantised(self) -> bool:
        """True if weights are packed, so that what the model computes is as coarse as in half precision."""
        return getattr(self.model, "hf_quantizer", None) is not None

    @cached_property
    def processes(self) -> int:
        """Number of processes that hold the weights together (`load(..., tp_plan="auto")`); 1 for most models.

        All of them make the same calls in the same order, and each gets all of the result.
        """
        return processes_of(self.model)

    def one_writer(self) -> AbstractContextManager[bool]:
        """Yield whether this process writes the files in a `with` block, as one of those that hold the model does.

        All wait at the end of the block, which must not run the model; an error of one becomes an error of all.
        """
        return together(self.processes)

    @property
    def has_vision(self) -> bool:
        """True if the model takes pictures."""
        return self.family.vision is not None

    @property
    def stores_transposed(self) -> bool:
        """True if projections store their weights as (input, output), as those of GPT-2 do."""
        return self.family.transposed

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer, the most common first; empty for a model without any."""
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
    def output_head(self) -> nn.Linear:
        """The module that turns normed states into logits."""
        return cast(nn.Linear, self.model.get_output_embeddings())

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
        """The module that encodes pictures. Raises `ModelError` for a text-only model."""
        return self._visual("vision")

    @property
    def vision_layers(self) -> list[nn.Module]:
        """The layers of the vision tower, first to last.

        Raises `ModelError` for a text-only model or if the family's row lacks them. A hook that replaces their output
        must run before the hooks by which transformers collects that output for the projector.
        """
        return list(self._visual("vision_layers", f"{self.family.vision}.").children())

    @property
    def projector(self) -> nn.Module:
        """The module that turns vision tower states into image tokens. Raises `ModelError` as `vision_layers` does."""
        return self._visual("projector")

    def prompt(
        self,
        image: Picture | Sequence[Picture] | None,
        question: str,
        *,
        constraint: Words | Mapping[str, Words] | None = None,
        answer: str | None = None,
        template: str | None = None,
    ) -> Prompt:
        """Return the model inputs of one question, with names for its token groups.

        Args:
            image: A path, a PIL image, a sequence of them, or None for a question without a picture.
            question: The question. Text that the tokenizer would read as a special token, such as "</s>" or the image
                token, is refused.
            constraint: Words of the question, or name -> words for several; the one called "constraint", else the
                first, is the constraint itself. Case, the form of accents and quotation marks need not agree. Where the
                question says the words more than once, pass (words, number) with the number of the occurrence from 0,
                or (words, "all").
            answer: Text that follows the prompt (teacher forcing); None for no answer.
            template: None for the model's own, "raw" for the question alone, or a text with {question} once and {image}
                once for all pictures or once for each.

        Returns:
            The prompt: tensors (batch one), tokens, token groups and image patches.

        Raises:
            ModelError: The question or the answer is empty or holds a special token, a picture cannot be read, the
                question does not say the constraint or says it more than once, the template does not fit, or there are
                more tokens than the model has positions.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> prompt = vlm.prompt(None, "Who founded Draivo?", constraint="Draivo")
            >>> [prompt.tokens[position] for position in prompt.positions("constraint")]
            [' Draivo']
        """
        return build(self.frontend, image, question, constraint=constraint, answer=answer, template=template)

    def prompt_for(self, question: Question, *, answer: str | None = None) -> Prompt:
        """Return the prompt of a plain question: its words, pictures, constraint, other spans and template.

        The question's own answers are not put into the prompt.

        Args:
            question: The question, such as a reader of `data` or `Prompt.as_question` gives it.
            answer: Text that follows the prompt (teacher forcing); None for no answer.

        Raises:
            ModelError: As for `prompt`.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import Question, tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> question = Question(text="Who founded Draivo?", constraint="Draivo")
            >>> prompt = vlm.prompt_for(question)
            >>> prompt.as_question() == question
            True
        """
        return build_for(self.frontend, question, answer=answer)

    def opening(self) -> Prompt:
        """Return the prompt before any text, from which a model samples texts of its own (`continuations`).

        It is the token that begins every text or, for a tokenizer without one, a line end; where that would merge with
        the text, it is the word "The". `Prompt.text` is what stands before the text.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> mt.load(tiny_vlm_path()).opening().tokens
            ('<s>',)
        """
        return opening(self.frontend)

    def check_prompt(self, prompt: Inputs) -> None:
        """Raise `ModelError` for a prompt, or its inputs, whose ids or pictures mean something else to this model.

        A model takes the prompts of every model with an equal vocabulary and, for prompts with pictures, an equal image
        processor. Tensors in a plain mapping do not record their origin, so they are accepted.
        """
        if not isinstance(prompt, Prompt | PromptInputs):
            return
        has_pictures = pixels_of(prompt.inputs if isinstance(prompt, Prompt) else prompt) is not None
        if not self.frontend.accepts(prompt.frontend, has_pictures=has_pictures):
            question = f" {prompt.question!r}" if isinstance(prompt, Prompt) else ""
            raise ModelError(
                f"the prompt{question} was made by a model with another vocabulary or image processor "
                f"({prompt.frontend.tokenizer.name_or_path!r}) than {self.name!r}; make it with this model's "
                "prompt(...)"
            )

    def check_room(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raise `ModelError` if the model has too few positions for answers of this length to these prompts."""
        check_room(prompts, self.positions, max_new_tokens)

    def check_words(self, text: str, what: str) -> str:
        """Return the text. Raise `ModelError`, which calls it `what`, if it is not a string or has a special token."""
        return self.frontend.check_words(text, what)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Give this thread exclusive use of the model in eval mode inside the block; restore every mode on exit."""
        with self.lock, evaluating(self.model):
            yield

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Make outputs differentiable in a `with` block, also inside `torch.inference_mode()` or `no_grad()`.

        Everything that is to be differentiated must be computed in the block. The block holds the model as `running`
        does. Raises `ModelError` if the attention implementation has no gradients on this device.
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
        """Return the dotted path (as baukit takes it) of the module of a site, projection or module."""
        return self.addresses.path(key)

    def module(self, key: Key) -> nn.Module:
        """Return the module of a site (decoder layer, MLP or attention), projection, dotted path or module."""
        return self.addresses.module(key)

    def compute_device(self, key: Key) -> torch.device:
        """Return the device on which a module's own weights are while it runs; that of the experts for a view of them.

        key: as in `module`.
        """
        module = self.module(key)
        return compute_device(module.source if isinstance(module, RoutedExperts) else module)

    def attention_module(self, layer: int) -> nn.Module:
        """Return the module that attends in a layer; a norm may stand between it and the site "attention"."""
        return self.addresses.attention_module(layer)

    def layer_around(self, key: Key) -> nn.Module | None:
        """Return the decoder layer around an MLP or attention site or a projection; None for every other key."""
        return self.addresses.layer_around(key)

    def layer_index(self, layer: int) -> int:
        """Return the layer as a number from 0; negative ones count from the end. Raise `ModelError` if it is absent."""
        return self.addresses.index(layer)

    def down_projection(self, layer: int) -> Projection:
        """Return the linear map that writes a layer's MLP output; negative layers count from the end.

        Beside experts it is the shared one's, which writes a part of the output. Raises `ModelError` if none is shared.
        """
        return self.addresses.down_projection(layer)

    def has_down_projection(self, layer: int) -> bool:
        """Return whether a linear map writes the layer's MLP output or, beside experts, a part of it for all tokens."""
        return self.addresses.has_down_projection(layer)

    def expert_projection(self, layer: int, expert: int | None = None) -> ExpertProjection:
        """Return one routed expert of a layer, or all of them (None), as the linear map that writes their output.

        It reads the experts' activations times their routing weights, which are zero for tokens that are routed
        elsewhere. Raises `ModelError` if the layer has no such expert.
        """
        return self.addresses.expert_projection(layer, expert)

    def expert_slice(self, name: str) -> ExpertProjection | None:
        """Return the routed expert whose slice of a weight has this name; None for every other name."""
        return self.addresses.expert_slice(name)

    def expert_count(self, layer: int) -> int:
        """Return the number of routed experts of a layer whose slices can be edited; 0 for none."""
        return self.addresses.expert_count(layer)

    @torch.no_grad()
    def routing(self, inputs: Inputs, layer: int) -> Tensor:
        """Return the weight with which each token is routed to each expert of a layer, (batch, token, expert).

        It is 0 for the experts that a token is not routed to.

        Args:
            inputs: A prompt, or model inputs by name.
            layer: The layer, negative from the end.

        Raises:
            ModelError: The layer has no routed experts whose weights can be read, or the prompt is another model's.
        """
        experts = self.expert_projection(layer).experts
        ready = self._ready(inputs)
        with self.running(), first_call(self, experts.source) as arguments:
            self.model(**ready, use_cache=False)
        states, index, weights = experts.arguments((), arguments)
        spread = weights.new_zeros(len(states), len(experts.numbers)).scatter_add_(1, index, weights)
        return spread.view(*ready["input_ids"].shape, -1)

    def attention_projection(self, layer: int) -> Projection:
        """Return the linear map that writes a layer's attention into the residual stream."""
        return self.addresses.attention_projection(layer)

    def is_transposed(self, name: str) -> bool:
        """Return whether the projection's weight of this name is stored as (width, hidden) instead of (hidden, width).

        Experts may be stored otherwise than the single matrices of the same model.
        """
        expert = self.expert_slice(name)
        return self.stores_transposed if expert is None else expert.transposed

    def weight(self, name: str) -> Tensor:
        """Return a weight by its parameter name: the parameter itself, not a copy, if it is an ordinary one in memory.

        The name of an expert's slice, such as "layers.3.mlp.experts.down_proj[5]", gives a view of the parameter.

        Of a weight that is offloaded, quantised or held by several processes the values are returned, as numbers;
        `open_weight` makes it an ordinary parameter. Raises `ModelError` with the nearest name if the name is unknown,
        or if a quantised weight cannot be read.
        """
        if not has_weight(self.model, name) and self.expert_slice(name) is None:
            nearest = get_close_matches(name, weight_names(self.model), n=1, cutoff=0.0)
            raise ModelError(f"no parameter {name!r} in {self.name!r}; the nearest is {nearest[0]!r}")
        return values(self.model, name, transposed=self.stores_transposed)

    def open_weight(self, name: str) -> OpenedWeight | None:
        """Make a weight that is not one an ordinary parameter, and return the way back; None for an ordinary one.

        Raises `ModelError` as `weight`.
        """
        self.weight(name)
        return opened(self.model, name, transposed=self.stores_transposed)

    @contextmanager
    def opened_weight(self, name: str) -> Iterator[Tensor]:
        """Yield a weight, which is an ordinary parameter in memory until the block ends. Raises as `open_weight`."""
        opened = self.open_weight(name)
        try:
            yield self.weight(name)
        finally:
            if opened is not None:
                uninterrupted(opened.close)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return name and parameter, not a copy, of every weight; a tied one once."""
        return self.model.named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Return name and tensor, not a copy, of every buffer."""
        return self.model.named_buffers()

    def fingerprint(self, names: Iterable[str]) -> dict[str, str]:
        """Return, for each parameter name, a sha256 (hex) of its dtype, shape and bytes."""
        with self.lock:
            return {name: digest_weight(self.weight(name)) for name in names}

    def weights_digest(self, *, progress: bool = True) -> str:
        """Return a SHA-256 (hex) of all that decides the model's answers: its identity as a key of results.

        It covers names, dtypes, shapes and bytes of all parameters and stored buffers as they are in memory now, the
        configuration (without path, version of transformers and dtype, which the weights show), the vocabulary, the
        chat template, the image processor and the tokens that end an answer. So

        - two copies of a folder have one digest, under any path, and a model that is saved and loaded keeps it;
        - an edit changes it while it is applied, and undoing the edit restores it;
        - loading in another dtype changes it, since the model computes other numbers then; the device, the attention
          implementation, and hooks, such as those of a runtime edit, do not count.

        Every weight is read once, at about a second per GB on one core, and again after torch has counted a change of
        it. Torch does not count changes through `weight.data` in place and through memory shared with numpy; change
        weights under `torch.no_grad()` instead.

        Args:
            progress: Show a progress bar if it takes more than two seconds.

        Example:
            >>> import torch
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> digest = vlm.weights_digest()
            >>> with torch.no_grad():
            ...     _ = vlm.weight(vlm.down_projection(0).name).mul_(2)
            >>> vlm.weights_digest() == digest
            False
        """
        with self.lock:
            digests = self.digests.of(stored_weights(self.model) | stored_beside(self.model), progress=progress)
        parts = [
            without_origin(self.config.to_dict()),
            *(self.frontend.vocabulary_digest, self.frontend.picture_digest),
            *(getattr(self.processor, "chat_template", None), self.end_ids, sorted(digests.items())),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def image_features(self, inputs: Inputs) -> Tensor:
        """Return the image features for the text stack, (image token, hidden), in the order of the image positions.

        Args:
            inputs: A prompt with pictures, or model inputs by name.

        Raises:
            ModelError: The prompt belongs to another model.
        """
        ready = self._ready(inputs)
        with self.running():
            features = named_features(self.model, ready)
            if features is not None:
                return features
            return projected_features(self.projector, lambda: self.embeddings(ready))

    def decoder_input(self, inputs: Inputs) -> DecoderInput:
        """Return what the text stack reads: word embeddings with image features inserted, and their frame.

        The vision tower runs, but no decoder layer does.

        Args:
            inputs: A prompt, or model inputs by name: input_ids and attention_mask (batch, token), pictures.

        Raises:
            ModelError: The prompt belongs to another model, or is longer than the model has positions.
        """
        ready = self._ready(inputs)
        with self.running(), first_call(self, self.decoder) as arguments:
            self.model(**ready, use_cache=False)
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:  # the text stack embeds the words itself
            embeddings = self.input_embeddings(arguments["input_ids"])
            arguments[PER_LAYER] = self._per_layer_inputs(arguments["input_ids"], embeddings)
        rows, length = embeddings.shape[:2]
        frame = Frame.of_call(arguments, rows=rows, length=length, config=self.config.get_text_config())
        return DecoderInput(embeddings=embeddings, frame=frame)

    def embeddings(self, inputs: Inputs) -> Tensor:
        """Return the embeddings of `decoder_input` alone, (batch, token, hidden)."""
        return self.decoder_input(inputs).embeddings

    def embed(self, prompt: Prompt, inputs: Mapping[str, Tensor] | None = None) -> DecoderInput:
        """Return what the text stack reads for a prompt, without gradients.

        It ends with the prompt's last token: a later answer cannot affect the score, since attention is causal.

        Args:
            prompt: The prompt.
            inputs: Other inputs of the same length, such as the same words with another picture; default: the prompt's.

        Raises:
            ModelError: The prompt belongs to another model, or is longer than the model has positions.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> prompt = vlm.prompt(None, "Who founded Draivo?")
            >>> vlm.embed(prompt).embeddings.shape == (1, prompt.length, vlm.hidden)
            True
        """
        self.check_prompt(prompt)
        with torch.no_grad():
            return self.decoder_input(dict(inputs or prompt.inputs)).cut(prompt.groups["last"][0] + 1)

    def skipped_layers(self, entering: DecoderInput | Prompt) -> tuple[int, ...]:
        """Return the decoder layers that do not run for an input or a prompt; none in most models.

        These are the layers that attend to pictures (Llama 3.2 Vision), where there is none.
        """
        if not self.family.attended or (isinstance(entering, Prompt) and entering.images):
            return ()
        entering = self.embed(entering) if isinstance(entering, Prompt) else entering
        if entering.frame.has_pictures:
            return ()
        layers = {Site("hidden", layer): layer for layer in range(self.layers)}
        with torch.no_grad(), capture(self, layers) as states:
            self.forward(entering, positions=[-1])
        return tuple(layer for site, layer in layers.items() if site not in states)

    def embed_words(self, ids: Sequence[int]) -> Tensor:
        """Return the embeddings of token ids, (1, token, hidden), without gradients."""
        with torch.no_grad():
            return self.input_embeddings(torch.tensor([list(ids)], dtype=torch.long, device=self.device))

    def extend(self, entering: DecoderInput, ids: Sequence[int]) -> DecoderInput:
        """Return the input of the text stack followed by all these token ids but the last.

        The logits at the last len(ids) positions then predict the ids one by one (teacher forcing).
        """
        if len(ids) == 1:
            return entering
        words = self.embed_words(ids[:-1]).to(entering.embeddings)
        tokens = torch.tensor([list(ids[:-1])], device=words.device)
        frame = entering.frame.extended(len(ids) - 1, per_layer=self._per_layer_inputs(tokens, words))
        embeddings = torch.cat([entering.embeddings, words.expand(entering.rows, -1, -1)], dim=1)
        return DecoderInput(embeddings=embeddings, frame=frame)

    def _per_layer_inputs(self, ids: Tensor, embeddings: Tensor) -> Tensor | None:
        """Return the inputs of single layers for these ids, (row, token, layer, size); None for most text stacks."""
        if not getattr(self.config.get_text_config(), "hidden_size_per_layer_input", None):
            return None
        return cast(Any, self.decoder).get_per_layer_inputs(ids, embeddings)

    @cached_property
    def first_position(self) -> int:
        """The number that the model gives to the position of a prompt's first token: 1 in PaliGemma, 0 in most models.

        It is measured once, when the model is loaded, in the call of the text stack for one token.
        """
        with self.running(), torch.no_grad(), first_call(self, self.decoder) as arguments:
            run_on_token(self.model, self._some_token)
        positions = arguments.get("position_ids")
        return int(positions.min()) if isinstance(positions, Tensor) else 0

    @property
    def _some_token(self) -> int:
        return next(token for token in (1, 0) if token != self.frontend.image_token_id)

    @cached_property
    def after_head(self) -> AfterHead:
        """What the model does between its final norm and its logits, beside the output head: scales, a soft cap.

        It is measured once, when the model is loaded, in one pass over one token. Raises `ModelError` if it is
        something else.
        """
        with self.running():
            return measure_readout(self.model, self.final_norm, self._some_token, self.name)

    def readout(self, states: Tensor) -> Tensor:
        """Return the model's own logits (..., vocab), float32 or wider, of states that have passed the final norm.

        These are the output head's, scaled and capped as the model does it (Cohere, Granite, Gemma 2).

        Args:
            states: The output of the final norm, (..., hidden).

        Raises:
            ModelError: The model does something else to the logits of its output head.
        """
        after = self.after_head
        with self.lock:
            return after(self.output_head(after.entering(states)))

    def next_token_probabilities(
        self, entering: DecoderInput | Tensor, *, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the distribution over the next token, (sample, vocab), in float64 on the CPU.

        Args:
            entering: What the text stack reads, as `forward` takes it.
            attention_mask: As `forward` takes it; None for the model's own.
        """
        length = entering.shape[1] if isinstance(entering, Tensor) else entering.length
        with torch.no_grad():
            logits = self.forward(entering, attention_mask=attention_mask, positions=[length - 1])
        return logits[:, -1].double().softmax(-1).cpu()

    def logits(self, inputs: Inputs) -> Tensor:
        """Return logits (batch, token, vocab), float32 or wider; those at padded positions mean nothing.

        Args:
            inputs: A prompt, or model inputs by name, as `collate` returns them.

        Raises:
            ModelError: The prompt belongs to another model, or is longer than the model has positions.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> prompt = vlm.prompt(None, "Who founded Draivo?")
            >>> vlm.logits(prompt).shape == (1, prompt.length, vlm.vocab)
            True
        """
        with self.running():
            return at_least_float32(self.model(**self._ready(inputs), use_cache=False).logits)

    def forward(
        self,
        entering: DecoderInput | Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Sequence[int] | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Return logits (batch, token, vocab) of the text stack for a given input, as `logits` does for a prompt.

        The text stack is called as the model itself calls it, and its output is read as the model reads it.

        Args:
            entering: What the text stack reads, as `embed` and `extend` return it; or embeddings alone, (batch, token,
                hidden), for tokens that are counted from 0 and see each other causally.
            attention_mask: Another mask than the input's own: (batch, token), 0 for padding, or (batch or 1, 1, token,
                token) boolean, True where a row may attend to a column, which must include the causal triangle.
            position_ids: Other positions than the input's own, (batch, token).
            positions: Only these tokens' logits, in this order, which saves the output head for all others.
            past_key_values: Keys and values of the tokens before these, which the mask covers too; it grows by these.

        Returns:
            Logits (batch, token or position, vocab), float32 or wider; those of padded positions mean nothing.

        Raises:
            ModelError: There are more tokens than the model has positions.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> prompt = vlm.prompt(None, "What colour is this?")
            >>> vlm.forward(vlm.embed(prompt), positions=[-1]).shape == (1, 1, vlm.vocab)
            True
        """
        if isinstance(entering, Tensor):
            entering = DecoderInput(embeddings=entering)
        embeddings = entering.embeddings
        arguments = entering.frame.arguments(entering.rows, entering.length, self._attention_bias)
        if attention_mask is not None:
            is_pairs = attention_mask.ndim == 4
            arguments["attention_mask"] = self._attention_bias(attention_mask) if is_pairs else attention_mask
        if position_ids is not None:
            arguments["position_ids"] = position_ids
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = arguments.get("attention_mask")
        self.frontend.check_width(before + entering.length, mask if isinstance(mask, Tensor) else None)
        embeddings = embeddings.clone()  # some text stacks write into what they are given (CTRL)
        arguments |= {"inputs_embeds": embeddings, "use_cache": past_key_values is not None}
        if past_key_values is not None:
            arguments["past_key_values"] = past_key_values
        with self.running():
            states = main_tensor(
                self.decoder(**with_positions(arguments, lambda: self.first_position)), "the text stack"
            )
            if positions is not None:
                states = states[:, torch.tensor(list(positions), device=states.device)]
            return self.readout(states)

    def decode(self, ids: Any) -> str:
        """Return the text of token ids without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def answer(self, image: Picture | Sequence[Picture] | None, question: str, *, max_new_tokens: int = 16) -> str:
        """Return the model's greedy answer to one question, without surrounding whitespace.

        Args:
            image: The picture or pictures, as `prompt` takes them, or None.
            question: The question.
            max_new_tokens: Maximum length of the answer in tokens.

        Raises:
            ModelError: As for `prompt` and `answers`.
        """
        return self.answers([self.prompt(image, question)], max_new_tokens=max_new_tokens)[0]

    def answers(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 16, batch_size: int = 16, progress: bool = False
    ) -> list[str]:
        """Return the greedy answer to each prompt, in order; answers contained in the prompts are ignored.

        Only the special tokens of the folder's generation settings are used: no sampling, beams,
        penalties, forbidden or forced tokens, or lengths. Rows of a batch are padded on the left and masked, so that a
        batch gives what its prompts give one by one, up to rounding.

        Args:
            prompts: Prompts of this model, with and without pictures.
            max_new_tokens: Maximum length of an answer in tokens.
            batch_size: Number of prompts that are answered together; those whose pictures have other sizes after the
                processor are answered apart.
            progress: Show a progress bar.

        Returns:
            One text per prompt, without special tokens and surrounding whitespace.

        Raises:
            ModelError: A prompt belongs to another model, a number is below 1, or a prompt with its answer is longer
                than the model has positions.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import World, tiny_vlm_path
            >>> vlm, world = mt.load(tiny_vlm_path()), World()
            >>> photo = world.picture(world.entities[0], 0).image
            >>> prompts = [vlm.prompt(photo, "Who founded the company in this photo?")]
            >>> len(vlm.answers(prompts, max_new_tokens=4))
            1
        """
        options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
        return [found.text.strip() for found in self.continuations(prompts, **options)]

    def continuations(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 16,
        seed: int | None = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> list[Continuation]:
        """Return what the model writes after each prompt, as it is, and whether it stopped by itself.

        Otherwise as `answers`, which are the greedy continuations without surrounding whitespace.

        Args:
            prompts: As for `answers`; a prompt that is given several times is continued several times.
            max_new_tokens: Maximum length of a continuation in tokens.
            seed: Random seed with which each token is sampled from the model's whole distribution; None for greedy
                continuations. The same seed gives the same texts for the same prompts and batch size, and the global
                random state is left as it is.
            batch_size: As for `answers`.
            progress: Show a progress bar.

        Returns:
            One continuation per prompt, in the order of the prompts.

        Raises:
            ModelError: As for `answers`.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> vlm = mt.load(tiny_vlm_path())
            >>> first, second = vlm.continuations([vlm.prompt(None, "Who founded Draivo?")] * 2, max_new_tokens=8)
            >>> first == second, first.stopped
            (True, True)
        """
        for prompt in prompts:
            self.check_prompt(prompt)
        sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        with self.running():
            return generate(self.model, self.frontend, prompts, **sizes, progress=progress, seed=seed)

    def score(self, image: Picture | Sequence[Picture] | None, question: str, answer: str) -> Score:
        """Return the model's probability of an answer: teacher-forced, over all its tokens, without end-of-sequence.

        Args:
            image: The picture or pictures, as `prompt` takes them, or None.
            question: The question.
            answer: The answer, in words.

        Raises:
            ModelError: As for `prompt`.

        Example:
            >>> import multrace as mt
            >>> from multrace.data import tiny_vlm_path
            >>> score = mt.load(tiny_vlm_path()).score(None, "Who founded Draivo?", "Raner")
            >>> len(score.tokens) == len(score.token_log_probabilities)
            True
        """
        prompt = self.prompt(image, question, answer=answer)
        with torch.no_grad():
            return score_answer(self.logits(prompt), prompt, self.tokenizer, dtype=self.dtype)

    def save_pretrained(
        self, directory: str | PathLike[str], *, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> None:
        """Write model and processor atomically as an ordinary Hugging Face directory (safetensors).

        Of several processes that hold the model together, all make this call, and the first one writes.

        Args:
            directory: The folder to make.
            dtype: Type of the floating-point weights in the file; None for that of the file that was loaded.
            overwrite: Replace a folder that is not empty; by default that raises `ModelError`.

        Raises:
            ModelError: The folder is not empty, or cannot be written.
        """
        with self.lock:
            dtype = dtype or (None if self.is_quantised else self.stored_dtype)
            save_directory(self.model, self.processor, directory, dtype=dtype, overwrite=overwrite)

    def _visual(self, part: str, above: str = "") -> nn.Module:
        """Return the module named by this field of the family, relative to the base model or to a part of it."""
        if self.family.vision is None:
            raise ModelError(f"{self.name!r} (family {self.family.name}) is a text-only model; it has no vision tower")
        leaf = getattr(self.family, part)
        if leaf is None:
            raise ModelError(
                f"the row of family {self.family.name} does not name the {part.replace('_', ' ')} of {self.name!r}; "
                f"pass load(..., families=...) with a row that has {part}="
            )
        return self.module(self.addresses.vision_path(above + leaf))

    def _ready(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return model inputs on the right device. Raise `ModelError` for another model's or too many tokens."""
        self.check_prompt(inputs)
        ready = to_device(inputs.inputs if isinstance(inputs, Prompt) else inputs, self.device, self.dtype)
        if "input_ids" in ready:
            self.frontend.check_width(ready["input_ids"].shape[1], ready.get("attention_mask"))
        return with_positions(ready, lambda: self.first_position)

    def _attention_bias(self, mask: Tensor) -> Tensor:
        """Return a mask for the attention implementation; only sdpa takes booleans, eager would add True as 1."""
        if mask.dtype != torch.bool or getattr(self.decoder.config, "_attn_implementation", None) == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)
