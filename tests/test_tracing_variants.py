"""Both directions, severed modules, direct effects, single heads and regions of the picture, against slow hooks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from multrace import Prompt, VisionLanguageModel
from multrace.tracing import (
    Blocks,
    Box,
    CausalTrace,
    Corruption,
    ImageNoise,
    ReplaceText,
    SwapImage,
    TextNoise,
    TraceError,
    causal_trace,
)
from multrace.tracing.engine import Engine
from PIL import Image
from torch import Tensor, nn

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
ENGINES = {"plain": Engine(name="plain"), "replay": Engine(name="replay", checks=0)}
ROWS = ("image", "question", "constraint_last", "last", 0, 7)
"""Positions 0 and 7 are the first word and a patch."""


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn."""
    return ENGINES[request.param]


def ask(vlm: VisionLanguageModel, image: Image.Image) -> Prompt:
    return vlm.prompt(image, QUESTION, constraint=CONSTRAINT)


def trace(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, **settings: object) -> CausalTrace:
    settings = {"positions": ROWS, "even_if_weak": True, "progress": False} | settings
    return causal_trace(vlm, prompt, corruption=corruption, **settings)


# Against hooks of our own on whole calls of the model, pixels in, in true float64.


@dataclass(frozen=True, kw_only=True)
class Put:
    """Values (token, width) of another run that replace a module's output, or what it reads, at some positions."""

    module: nn.Module
    values: Tensor
    positions: Sequence[int]
    columns: slice | None = None
    """Some of the width, or all of it."""
    is_read: bool = False


@dataclass(frozen=True, kw_only=True)
class Slow:
    """The clean and the corrupted picture as two calls of the whole model, in LLaVA-Llama."""

    vlm: VisionLanguageModel
    prompt: Prompt
    other: Image.Image
    token: int
    restores: bool

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.vlm.model.model.language_model.layers)

    def inputs(self, *, clean: bool) -> dict[str, Tensor]:
        found = dict(self.prompt.inputs)
        if not clean:
            found["pixel_values"] = self.vlm.prompt(self.other, QUESTION).inputs["pixel_values"]
        return found

    def states(self, *, lent: bool) -> dict[nn.Module, Tensor]:
        """(token, width) of every layer, MLP and attention, and what every output projection reads, in one run."""
        found: dict[nn.Module, Tensor] = {}
        handles = []
        for layer in self.layers:
            for module in (layer, layer.mlp, layer.self_attn):
                handles.append(module.register_forward_hook(lambda m, a, out: found.update({m: main(out)[0]})))
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: found.update({m: a[0][0]})))
        self._call(self.inputs(clean=lent == self.restores), handles)
        return found

    def score(self, puts: Sequence[Put]) -> float:
        """The token's probability in the run that is changed."""
        handles = []
        for put in puts:
            place = put.module.register_forward_pre_hook if put.is_read else put.module.register_forward_hook
            handles.append(place(before(put) if put.is_read else after(put)))
        logits = self._call(self.inputs(clean=not self.restores), handles)
        return float(logits[0, -1].softmax(-1)[self.token])

    def _call(self, inputs: Mapping[str, Tensor], handles: Sequence) -> Tensor:
        with torch.no_grad():
            logits = self.vlm.model(**inputs, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return logits


def main(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def written(states: Tensor, put: Put) -> Tensor:
    changed, positions = states.clone(), list(put.positions)
    columns = put.columns or slice(None)
    changed[0, positions, columns] = put.values[positions, columns]
    return changed


def after(put: Put) -> Callable[..., Tensor | tuple]:
    def hook(_module: nn.Module, _arguments: tuple, output: Tensor | tuple) -> Tensor | tuple:
        changed = written(main(output), put)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def before(put: Put) -> Callable[..., tuple]:
    return lambda _module, arguments: (written(arguments[0], put), *arguments[1:])


def part(layer: nn.Module, kind: str) -> nn.Module:
    return {"hidden": layer, "mlp": layer.mlp, "attention": layer.self_attn, "head": layer.self_attn.o_proj}[kind]


VARIANTS = {
    "total": {"sites": ("hidden", "mlp", "attention")},
    "MLPs severed": {"sites": ("hidden", "mlp", "attention"), "severed": "mlp"},
    "attentions severed": {"sites": ("hidden", "mlp", "attention"), "severed": "attention"},
    "direct": {"sites": ("hidden", "mlp", "attention"), "effect": "direct"},
    "direct, MLPs severed": {"sites": ("hidden",), "severed": "mlp", "effect": "direct"},
    "heads": {"sites": ("heads",)},
}


@pytest.mark.parametrize(
    ("variant", "direction"),
    [
        pytest.param(variant, direction, marks=() if (number + turn) % 2 else pytest.mark.slow)
        for number, variant in enumerate(VARIANTS)
        for turn, direction in enumerate(("corrupt", "restore"))
    ],
)
def test_every_cell_of_every_variant_agrees_with_slow_hooks(exact_llava, photo, other_photo, variant, direction):
    vlm, prompt = exact_llava, ask(exact_llava, photo)
    settings = {"window": 2, "direction": direction} | VARIANTS[variant]
    found, plain = (
        trace(vlm, prompt, SwapImage(other_photo), engine=ENGINES[name], **settings) for name in ("replay", "plain")
    )
    assert (found.engine.engine, plain.engine.engine) == ("replay", "plain")
    assert (found.kinds, found.row_positions) == (plain.kinds, plain.row_positions)
    assert (found.direction, found.effect) == (direction, settings.get("effect", "total"))
    assert found.severed == settings.get("severed")
    restores = direction == "restore"
    slow = Slow(vlm=vlm, prompt=prompt, other=other_photo, token=found.answer_ids[0], restores=restores)
    lent, own = (slow.states(lent=each) for each in (True, False))
    base = slow.score([])
    for each in (found, plain):
        assert base == pytest.approx(float(each.corrupted if restores else each.clean), abs=1e-13)
    moved = []
    for kind in found.kinds:
        name, _, head = kind.partition(" ")
        size = vlm.hidden // vlm.heads
        columns = slice(int(head) * size, (int(head) + 1) * size) if head else None
        for row, positions in enumerate(found.row_positions):
            others = sorted(set(prompt.groups["image"]) - set(positions)) if found.effect == "direct" else []
            for column, (first, last) in enumerate(found.spans[kind].tolist()):
                puts = [
                    Put(module=module, values=lent[module], positions=positions, columns=columns, is_read=bool(head))
                    for module in (part(layer, name) for layer in slow.layers[first : last + 1])
                ]
                later = [part(layer, found.severed) for layer in slow.layers[last + 1 :]] if found.severed else []
                puts += [Put(module=module, values=own[module], positions=positions) for module in later]
                puts += [Put(module=layer, values=own[layer], positions=others) for layer in slow.layers if others]
                expected = slow.score(puts)
                for each in (found, plain):
                    score = float(each.scores[kind][row, column])
                    assert score == pytest.approx(expected, abs=1e-12), (each.engine.engine, kind, row, column)
                moved.append(abs(expected - base) > 1e-9)
    assert sum(moved) > 0.4 * len(moved)  # many cells do something, so agreeing about them means something


@pytest.mark.parametrize("variant", ["MLPs severed", "attentions severed", "direct"])
def test_a_variant_is_not_the_total_effect(exact_llava, photo, other_photo, variant, engine):
    settings = {"sites": "hidden", "engine": engine}
    prompt, corruption = ask(exact_llava, photo), SwapImage(other_photo)
    total, other = (trace(exact_llava, prompt, corruption, **settings | each) for each in ({}, VARIANTS[variant]))
    assert ((total.scores["hidden"] - other.scores["hidden"]).abs() > 1e-6).sum() >= 2


def test_a_layers_heads_together_are_its_attention(exact_llava, photo, other_photo, engine):
    vlm, prompt = exact_llava, ask(exact_llava, photo)
    found = trace(vlm, prompt, SwapImage(other_photo), sites=("attention", "heads"), window=1, engine=engine)
    assert found.kinds == ("attention", "head 0", "head 1", "head 2", "head 3")
    slow = Slow(vlm=vlm, prompt=prompt, other=other_photo, token=found.answer_ids[0], restores=True)
    lent = slow.states(lent=True)
    for row, positions in enumerate(found.row_positions):
        for column, layer in enumerate(slow.layers):
            read = layer.self_attn.o_proj
            together = slow.score([Put(module=read, values=lent[read], positions=positions, is_read=True)])
            assert float(found.scores["attention"][row, column]) == pytest.approx(together, abs=1e-12)
    alone = trace(vlm, prompt, SwapImage(other_photo), sites="head 2", window=1, engine=engine)
    assert torch.allclose(alone.scores["head 2"], found.scores["head 2"], rtol=0, atol=1e-12)
    assert not torch.allclose(found.scores["head 1"], found.scores["head 2"], rtol=0, atol=1e-6)


# Theorems.


@pytest.mark.parametrize("corruption", [TextNoise(samples=3), ReplaceText(replacement="Paris city")], ids=str)
def test_corrupting_everything_gives_the_corrupted_scores_and_nothing_the_clean_one(
    exact_vlm, photo, corruption, engine
):
    prompt = exact_vlm.prompt(photo if exact_vlm.has_vision else None, QUESTION, constraint=CONSTRAINT)
    settings = {"direction": "corrupt", "positions": ["all", 0], "engine": engine, "window": 1}
    found = trace(exact_vlm, prompt, corruption, **settings)
    everything, untouched = found.samples["hidden"][0]
    assert torch.allclose(everything, found.corrupted.expand_as(everything), rtol=0, atol=1e-12)
    assert (found.corrupted - found.clean).abs().max() > 1e-6
    assert torch.allclose(untouched, torch.full_like(untouched, found.clean), rtol=0, atol=1e-12)
    effects = found.indirect_effect("hidden")
    assert torch.allclose(effects[0], torch.full_like(effects[0], found.total_effect), rtol=0, atol=1e-12)
    # Before the corruption both runs are the same.
    assert all(found.indirect_effect(kind)[1].abs().max() < 1e-12 for kind in found.kinds)


@pytest.mark.parametrize("direction", ["restore", "corrupt"])
def test_direct_and_total_effects_differ_at_single_patches_only(exact_llava, photo, other_photo, direction, engine):
    settings = {"direction": direction, "sites": ("hidden", "mlp"), "window": 1, "engine": engine}
    rows = ["image", "question", "constraint", "last", "image_quadrants"]
    total, direct = (
        trace(exact_llava, ask(exact_llava, photo), SwapImage(other_photo), effect=effect, positions=rows, **settings)
        for effect in ("total", "direct")
    )
    for kind in total.kinds:
        # Words cannot change what the picture is, and beside the whole picture nothing of it is left to freeze.
        assert torch.allclose(total.scores[kind][1:4], direct.scores[kind][1:4], rtol=0, atol=1e-12)
        assert (total.scores[kind][4:, 0] - direct.scores[kind][4:, 0]).abs().min() > 1e-9
    assert torch.allclose(total.scores["hidden"][0], direct.scores["hidden"][0], rtol=0, atol=1e-12)


def test_above_the_last_layer_nothing_is_left_to_sever(exact_llava, photo, other_photo, engine):
    settings = {"sites": ("hidden", "mlp"), "window": 1, "engine": engine}
    prompt, corruption = ask(exact_llava, photo), SwapImage(other_photo)
    whole, cut = (trace(exact_llava, prompt, corruption, severed=each, **settings) for each in (None, "mlp"))
    for kind in whole.kinds:
        assert torch.allclose(whole.scores[kind][:, -1], cut.scores[kind][:, -1], rtol=0, atol=1e-12)
        assert not torch.allclose(whole.scores[kind][:, 0], cut.scores[kind][:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("effect", ["total", "direct"])
def test_text_corruption_leaves_the_picture_without_any_effect(random_llava, photo, effect, engine):
    regions = ["image", "image_rows", "image_columns", "image_quadrants", Box(0, 0, 12, 12), "last"]
    settings = {"positions": regions, "effect": effect, "engine": engine}
    found = trace(random_llava, ask(random_llava, photo), TextNoise(samples=2), **settings)
    assert found.total_effect != 0
    for kind in found.kinds:
        *image, last = found.indirect_effect(kind)
        assert len(image) == 1 + 4 + 4 + 4 + 1
        assert not any(each.any() for each in image) and last.any()


# Regions of the picture.


def test_regions_are_the_positions_they_cover(exact_llava, photo, engine):
    prompt, settings = ask(exact_llava, photo), {"sites": "hidden", "engine": engine}
    regions = ["image_rows", "image_quadrants", Blocks(3), Box(0, 0, 24, 24), "patches"]
    found = trace(exact_llava, prompt, ImageNoise(samples=2), positions=regions, **settings)
    assert len(found.rows) == 4 + 4 + 4 + 1 + 16
    assert found.grouped and found.row_tokens == (None,) * 29
    grid = {(patch.row, patch.column): patch.position for patch in prompt.patches}
    assert found.row_positions[1] == tuple(grid[1, column] for column in range(4))
    assert set(found.row_positions[4]) == set(found.row_positions[12]) == {grid[r, c] for r in (0, 1) for c in (0, 1)}
    assert torch.allclose(found.scores["hidden"][4], found.scores["hidden"][12], rtol=0, atol=1e-12)
    patches = trace(exact_llava, prompt, ImageNoise(samples=2), positions=sorted(grid.values()), **settings)
    assert torch.allclose(patches.scores["hidden"], found.scores["hidden"][13:], rtol=0, atol=1e-12)
    assert found.patches == tuple((grid[r, c], r, c, 0) for r in range(4) for c in range(4))
    assert len({float(score) for score in found.scores["hidden"][:, 0]}) >= 27  # every region has an effect of its own


# Refusals.


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("direction", {"direction": "both"}, "no direction 'both'; pass direction='restore' or 'corrupt'"),
        ("effect", {"effect": "indirect"}, "no effect 'indirect'; pass effect='total' or 'direct'"),
        ("severed", {"severed": "hidden"}, "cannot sever 'hidden'; pass severed='mlp', 'attention' or None"),
        ("head", {"sites": "head 4"}, r"no kind of site 'head 4'; .* or single heads \('head 0' to 'head 3'\)"),
    ],
)
def test_variants_that_do_not_exist_are_refused(random_llava, photo, name, settings, message):
    with pytest.raises(TraceError, match=message):
        trace(random_llava, ask(random_llava, photo), TextNoise(samples=1), **settings)


def test_direct_effects_need_a_picture(random_llama):
    prompt = random_llama.prompt(None, QUESTION, constraint=CONSTRAINT)
    with pytest.raises(TraceError, match="this prompt has none; pass effect='total'"):
        trace(random_llama, prompt, TextNoise(samples=1), positions="last", effect="direct")
