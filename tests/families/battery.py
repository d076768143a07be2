"""One battery for every family, through the front door only. Each check takes a subject, and asks something that shares
no code with what it judges: transformers itself on the folder, or hooks by hand."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import multrace as mt
import peft
import pytest
import torch
from model_fixtures import draw_photo
from multrace.editing import save_merged
from multrace.models import batches, collate
from multrace.tracing import CausalTrace, box_positions
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from .folders import Recipe, write
from .table import KNOWN, RECIPES, Known

QUESTION, CONSTRAINT, SHORT = "Who founded the company in this photo?", "the company", "Who?"
TARGET = "Paris"
SIZE, WIDE = (64, 64), (96, 40)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Between two ways to compute a probability, where every norm computes in the model's own dtype."""
ROUNDED = {torch.float64: 1e-9, torch.float32: 1e-3}
"""The same between logits."""
SHIFTED = 1e-4
"""Between logits of a prompt at other positions: rotary angles are float32 everywhere, and shift with the padding."""


def photo(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    return draw_photo(seed).resize(size)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One family's model, opened once for all of its checks."""

    name: str
    known: Known
    recipe: Recipe
    folder: Path
    work: Path
    """An empty folder."""
    vlm: mt.VisionLanguageModel

    def ask(
        self, question: str = QUESTION, *, seed: int = 1, size: tuple[int, int] = SIZE, **options: Any
    ) -> mt.Prompt:
        """A question, about a picture if the model sees."""
        return self.vlm.prompt(photo(seed, size) if self.recipe.sees else None, question, **options)

    @cached_property
    def prompt(self) -> mt.Prompt:
        return self.ask(constraint=CONSTRAINT)

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The folder's model as transformers opens it, without multrace."""
        return reopened(self, self.folder)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.vlm.dtype]

    @property
    def source(self) -> str:
        """The group whose states are restored and whose edges are cut."""
        return "image" if self.prompt.groups["image"] else "constraint"

    @property
    def last(self) -> int:
        return self.prompt.groups["last"][0]


def open_subject(name: str, work: Path) -> Subject:
    """The family's model, built and proven."""
    known, recipe = KNOWN[name], RECIPES[name]
    folder = write(recipe, work / name)
    vlm = mt.load(folder, dtype=known.dtype)
    return Subject(name=name, known=known, recipe=recipe, folder=folder, work=work, vlm=vlm)


def reopened(subject: Subject, folder: Path) -> PreTrainedModel:
    """The model of a folder as transformers opens it."""
    sees = type(subject.vlm.config) in AutoModelForImageTextToText._model_mapping
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=subject.vlm.dtype).eval()


def processed(subject: Subject, prompt: mt.Prompt) -> dict[str, Tensor]:
    """Everything that the family's own processor returns for this prompt's text and pictures."""
    options = {"return_tensors": "pt", "add_special_tokens": not prompt.text.startswith("<s>")}
    if not subject.recipe.sees:
        encoded = subject.vlm.tokenizer(prompt.text, return_token_type_ids=False, **options)
    else:
        encoded = subject.vlm.processor(images=list(prompt.images), text=prompt.text, **options)
    return {
        name: value.to(subject.vlm.dtype) if value.is_floating_point() else value
        for name, value in encoded.items()
        if isinstance(value, Tensor) and name != "labels"
    }


def generated(subject: Subject, model: PreTrainedModel, prompt: mt.Prompt, **options: Any) -> Any:
    """What transformers' own generation makes of the processor's outputs."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(**processed(subject, prompt), **{**settings, **options})


def own_probability(subject: Subject, model: PreTrainedModel, prompt: mt.Prompt, target: str) -> float:
    """The probability of a target in transformers' own generation, each token after the ones before it."""
    ids, before = prompt.answer_tokens(target), prompt.groups["last"][0] + 1
    force = lambda _row, seen: [ids[len(seen) - before]]  # noqa: E731
    out = generated(subject, model, prompt, max_new_tokens=len(ids), prefix_allowed_tokens_fn=force)
    steps = [logits[0].double().log_softmax(-1)[token] for logits, token in zip(out.logits, ids, strict=True)]
    return float(sum(steps).exp())


# ---- true float64 ----


class _OwnDtype(TorchFunctionMode):
    """Inside, float64 tensors are not turned into float32: such a cast gives them back as they are."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        keywords = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to and torch.float32 in (*args[1:], keywords.get("dtype")):
                return args[0]
            if keywords.get("dtype") is torch.float32:
                keywords["dtype"] = torch.float64
        return func(*args, **keywords)


@contextmanager
def true_float64(vlm: mt.VisionLanguageModel) -> Iterator[None]:
    """Inside, norms and attention compute in float64 all the way.

    Most norms of transformers, and some attention functions, cast to float32 whatever the model's dtype, which would
    round small mistakes away. Writing each norm anew for each family is no way to judge families, so that the forward
    of every norm's and attention's class is run under a mode in which torch does not make those casts.
    """
    kinds = {type(module) for module in vlm.decoder.modules() if "Norm" in type(module).__name__}
    kinds |= {type(module) for module in vlm.decoder.modules() if type(module).__name__.endswith("Attention")}
    kinds |= {type(vlm.attention_module(layer)) for layer in range(vlm.layers)}  # linear attention as well
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "forward", _uncast(kind.forward))
        yield


def _uncast(forward: Callable) -> Callable:
    @wraps(forward)  # callers look up which keywords a layer takes, and what it calls
    def inside(self: nn.Module, *args: Any, **keywords: Any) -> Any:
        with _OwnDtype():
            return forward(self, *args, **keywords)

    return inside


# ---- the checks ----


def check_prompt(subject: Subject) -> None:
    """The constraint's positions hold its words, and the prompt holds all that the processor returns."""
    prompt, words = subject.prompt, subject.prompt.groups["constraint"]
    ids = prompt.inputs["input_ids"][0]
    assert subject.vlm.tokenizer.decode(ids[list(words)]).strip() == CONSTRAINT
    assert bool(prompt.groups["image"]) == (subject.recipe.sees and not subject.known.crosses)
    given = processed(subject, prompt)
    accepted = signature(subject.plain.forward).parameters
    assert all(torch.equal(prompt.inputs[name], value) for name, value in given.items() if name in accepted)
    with torch.no_grad():
        own = subject.plain(**given, use_cache=False).logits
    assert (subject.vlm.logits(prompt) - own).abs().max() <= ROUNDED[subject.vlm.dtype]


def check_pictures(subject: Subject) -> None:
    """Image positions hold the image features, of any shape, and another picture moves nothing else."""
    if not subject.recipe.sees or subject.known.crosses:
        return
    vlm = subject.vlm
    pair = [photo(1), photo(2, WIDE if subject.known.pictures == "unequal" else SIZE)]
    for pictures in (photo(1), photo(1, WIDE), *([] if subject.known.pictures == "one" else [pair])):
        prompt = vlm.prompt(pictures, QUESTION)
        image, embeddings = list(prompt.groups["image"]), vlm.embeddings(prompt)[0]
        gap = embeddings[image] - vlm.image_features(prompt).to(embeddings)
        assert image and gap.abs().max() <= ROUNDED[vlm.dtype], pictures
    if subject.known.pictures == "equal":
        with pytest.raises(
            mt.ModelError, match="takes no pictures of unequal sizes \\(64 x 64, 96 x 40 pixels\\) in one"
        ):
            vlm.prompt([photo(1), photo(2, WIDE)], QUESTION)
    other = vlm.embeddings(subject.ask(seed=2))[0]
    clean = vlm.embeddings(subject.prompt)[0]
    moved = set((other != clean).any(-1).nonzero().flatten().tolist())
    assert moved and moved <= set(subject.prompt.groups["image"])


def check_places(subject: Subject) -> None:
    """What is painted into the picture moves the features at its own place, and those more than any others.

    The tower's attention is silenced, since that of random weights carries a change anywhere.
    """
    if not subject.recipe.sees:
        return
    vlm, picture, generator = subject.vlm, Image.new("RGB", SIZE, "gray"), torch.Generator().manual_seed(0)
    noise = Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy())
    prompt = vlm.prompt(picture, QUESTION)
    boxes = [mt.Box(x, y, x + 16, y + 16) for x in (8, 40) for y in (8, 40)]
    if subject.known.placeless:
        with pytest.raises(mt.TraceError, match=subject.known.placeless):
            box_positions(vlm, prompt, boxes[0])
        return
    places = [list(box_positions(vlm, prompt, box)) for box in boxes]
    if subject.known.mixes:
        assert all(places) and len({tuple(own) for own in places}) == len(boxes)
        return
    with silenced(vlm.vision_tower):
        clean = vlm.image_features(prompt)
        for number, box in enumerate(boxes):
            painted = picture.copy()
            painted.paste(noise, (box.left, box.top))
            moves = torch.zeros(prompt.length, dtype=vlm.dtype)
            moves[list(prompt.groups["image"])] = (vlm.image_features(prompt.with_images(painted)) - clean).norm(dim=-1)
            assert bool((moves[places[number]] > 0).all()), box
            assert max(range(4), key=lambda other: moves[places[other]].mean()) == number, box


@contextmanager
def silenced(tower: nn.Module) -> Iterator[None]:
    """Inside, the tower's attention writes zeros."""

    def zero(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    attention = [module for module in tower.modules() if type(module).__name__.endswith(("Attention", "AttentionRope"))]
    with hooked(module.register_forward_hook(zero) for module in attention):
        yield


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Takes the hooks away at the end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def check_trace(subject: Subject) -> None:
    """The expected engine runs, gives what plain passes give, and both what hooks by hand on the whole model give."""
    vlm, prompt, sees = subject.vlm, subject.prompt, subject.recipe.sees
    corruption = mt.SwapImage(photo(2)) if sees else mt.TextNoise(samples=2, scale=3.0)
    settings: dict[str, Any] = {
        "corruption": corruption, "positions": [subject.source, "last"], "window": 1,
        "even_if_weak": True, "progress": False,
    }  # fmt: skip
    fast = with_reason(subject.known.plain, lambda: mt.causal_trace(vlm, prompt, **settings))
    slow = mt.causal_trace(vlm, prompt, engine=mt.Engine(name="plain"), **settings)
    oracle = hooked_scores(subject, slow) if sees else None
    assert fast.engine.engine == ("plain" if subject.known.plain else "replay"), fast.engine
    for kind, plain in slow.samples.items():
        assert (fast.samples[kind] - plain).abs().max() <= subject.tolerance, kind
        assert (plain - slow.corrupted_scores.mean()).abs().max() > 10 * subject.tolerance, f"{kind} moves nothing"
    if oracle is not None:
        assert (slow.samples["hidden"][0, :, :, 0] - oracle).abs().max() <= subject.tolerance


def with_reason(reason: str, run: Callable[[], Any]) -> Any:
    """What `run` gives; it has to warn with these words, or not at all if there are none (warnings are errors)."""
    if not reason:
        return run()
    with pytest.warns(UserWarning, match=reason):
        return run()


def hooked_scores(subject: Subject, trace: CausalTrace) -> Tensor:
    """(row, layer): the answer's probability where a layer's output is the clean one at the row's positions.

    The whole model runs on the other picture, from its pixels to its logits, with a hook on one decoder layer.
    """
    vlm, token = subject.vlm, trace.answer_ids[0]
    clean: dict[int, Tensor] = {}
    with hooked(layer.register_forward_hook(_keeping(clean, n)) for n, layer in enumerate(vlm.decoder_layers)):
        score_of(vlm, subject.prompt, token)
    other = subject.prompt.with_images([photo(2)])
    scores = torch.zeros(len(trace.row_positions), vlm.layers, dtype=torch.float64)
    for row, positions in enumerate(trace.row_positions):
        for number, layer in enumerate(vlm.decoder_layers):
            with hooked([layer.register_forward_hook(_replacing(clean[number], positions))]):
                scores[row, number] = score_of(vlm, other, token)
    return scores


def _keeping(states: dict[int, Tensor], number: int) -> Callable:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        states[number] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    return hook


def _replacing(states: Tensor, positions: tuple[int, ...]) -> Callable:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value[:, list(positions)] = states[:, list(positions)]
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return hook


def score_of(vlm: mt.VisionLanguageModel, prompt: mt.Prompt, token: int) -> Tensor:
    with torch.no_grad():
        return vlm.logits(prompt)[0, prompt.groups["last"][0]].double().softmax(-1)[token]


def check_knockout(subject: Subject) -> None:
    """A cut flow gives what masks put in by hand give, on the whole model."""
    vlm, prompt = subject.vlm, subject.prompt
    source = subject.source
    settings: dict[str, Any] = {"flows": [f"{source} -> last"], "windows": (1, 3), "progress": False}
    reason = subject.known.plain or subject.known.partly
    with true_float64(vlm):
        knockout = with_reason(reason, lambda: mt.attention_knockout(vlm, prompt, **settings))
        token, sources = knockout.answer_ids[0], list(prompt.groups[source])
        clean = score_of(vlm, prompt, token)
        for window, spans in enumerate(knockout.spans.tolist()):
            for layer, (first, last) in enumerate(spans):
                with masked(subject, range(first, last + 1), sources):
                    oracle = score_of(vlm, prompt, token)
                score = knockout.probabilities[0, 0, window, layer]
                assert abs(score - oracle) <= subject.tolerance, (window, layer)
        assert abs(knockout.clean[0] - clean) <= subject.tolerance
    assert (knockout.probabilities - clean).abs().max() > 10 * subject.tolerance


@contextmanager
def masked(subject: Subject, layers: range, sources: list[int]) -> Iterator[None]:
    """Inside, the last token of the prompt does not attend to these positions in these layers."""
    target = subject.last

    def cut(module: nn.Module, args: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = signature(module.forward).bind(*args, **keywords).arguments
        given |= given.pop("kwargs", {})
        states, mask = given["hidden_states"], given.get("attention_mask")
        length = states.shape[1]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        mask = mask.expand(*mask.shape[:2], length, mask.shape[-1]).clone()
        mask[..., target, sources] = False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
        return (), {**given, "attention_mask": mask}

    modules = [subject.vlm.attention_module(layer) for layer in layers]
    modules = [module for module in modules if not _without_edges(module)]
    with hooked(module.register_forward_pre_hook(cut, with_kwargs=True) for module in modules):
        yield


def _without_edges(module: nn.Module) -> bool:
    """Whether tokens do not attend to each other in this module: linear attention, or cross-attention to a picture."""
    return hasattr(module, "conv1d") or "Cross" in type(module).__name__


def check_lens(subject: Subject) -> None:
    """What the last state says is what the model says."""
    prompt = subject.prompt
    lens = mt.logit_lens(subject.vlm, prompt, answer=TARGET, progress=False)
    token = prompt.answer_tokens(TARGET)[0]
    assert lens.probability(token)[-1] == pytest.approx(float(score_of(subject.vlm, prompt, token)), rel=1e-6)
    assert lens.probability(token)[-2] != pytest.approx(float(score_of(subject.vlm, prompt, token)), rel=1e-6)


def check_answers(subject: Subject) -> None:
    """A padded batch gives what its prompts give one by one, and what transformers generates; unequal pictures too."""
    vlm, options = subject.vlm, {"max_new_tokens": 4}
    prompts = [subject.prompt, subject.ask(SHORT, seed=2)]
    own = [generated(subject, subject.plain, prompt, **options) for prompt in prompts]
    texts = [vlm.decode(out.sequences[0, -len(out.logits) :]).strip() for out in own]
    assert vlm.answers(prompts, **options) == texts
    for members in batches(prompts, len(prompts)):  # one batch, but for a Q-Former's words
        batch = [prompts[index] for index in members]
        together = vlm.logits(collate(batch, vlm.tokenizer)[0])[:, -1]
        alone = torch.cat([vlm.logits(prompt)[:, -1] for prompt in batch])
        assert (together - alone).abs().max() <= SHIFTED
    if subject.recipe.sees:
        unequal = [subject.prompt, subject.ask(SHORT, seed=2, size=WIDE)]
        assert vlm.answers(unequal, **options) == [vlm.answers([prompt], **options)[0] for prompt in unequal]


def check_edit(subject: Subject) -> None:
    """An edit raises the model's own probability, which is the one that the search believed in; undo is bit-exact; and
    both exports, opened by transformers alone, have the edited model's logits."""
    vlm, prompt = subject.vlm, subject.prompt
    before = {name: weight.clone() for name, weight in vlm.named_parameters()}
    editor = mt.MultEdit(layer=vlm.layers // 2, token="last", steps=10, ending="none")
    delta = editor.edit(vlm, [mt.EditRequest(question=prompt, target=TARGET)], progress=False)
    assert all(("experts.down_proj[" in name) is subject.known.experts for name in delta.changes)
    with delta.applied(vlm):
        edited = vlm.logits(prompt)
    assert all(torch.equal(before[name], weight) for name, weight in vlm.named_parameters())
    assert (edited - vlm.logits(prompt)).abs().max() > 1e-3
    merged = reopened(subject, save_merged(vlm, delta, subject.work / "merged", dtype=vlm.dtype))
    adapted = peft.PeftModel.from_pretrained(
        reopened(subject, subject.folder), mt.to_peft(vlm, delta, subject.work / "peft").folder
    )
    given = processed(subject, prompt)
    with torch.no_grad():
        for model in (merged, adapted):
            gap = (model(**given, use_cache=False).logits - edited).abs().max()
            assert gap <= ROUNDED[vlm.dtype], type(model).__name__
    unedited, own = (own_probability(subject, model, prompt, TARGET) for model in (subject.plain, merged))
    assert own > unedited
    assert delta.requests[0]["probability"] == pytest.approx(own, rel=1e-6 if vlm.dtype is torch.float64 else 1e-2)


def check_moments(subject: Subject) -> None:
    """The second moments of one layer are those of what its output map reads, as a hook sees it."""
    vlm, layer, kind = subject.vlm, subject.vlm.layers // 2, "attention" if subject.known.experts else "mlp"
    prompts = [subject.prompt, subject.ask(SHORT, seed=2)]
    moments = mt.second_moments(vlm, prompts, layers=[layer], projection=kind, progress=False)
    chosen = vlm.down_projection(layer) if kind == "mlp" else vlm.attention_projection(layer)
    keys: list[Tensor] = []
    keep = lambda _module, args: keys.append(args[0].detach().flatten(0, -2))  # noqa: E731
    with hooked([chosen.module.register_forward_pre_hook(keep)]):
        for prompt in prompts:
            score_of(vlm, prompt, 0)
    rows = torch.cat(keys).double()
    assert moments.count() == len(rows)
    assert torch.allclose(moments.matrix(layer), rows.T @ rows / len(rows), rtol=0, atol=SHIFTED)


Check = Callable[[Subject], None]
CHECKS: Mapping[str, Check] = {
    "prompt": check_prompt,
    "pictures": check_pictures,
    "places": check_places,
    "trace": check_trace,
    "knockout": check_knockout,
    "lens": check_lens,
    "answers": check_answers,
    "edit": check_edit,
    "moments": check_moments,
}
