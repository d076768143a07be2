"""Restoring layers of the vision tower and the projector: theorems, a slow oracle of its own, and what is refused."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import multrace
import pytest
import torch
from multrace import ModelError, Prompt, VisionLanguageModel
from multrace.data import tiny_vlm_path
from multrace.models import PictureFront
from multrace.models.loading import prove_addresses
from multrace.tracing import (
    BlankImage,
    BlurImage,
    Box,
    CausalTrace,
    Corrupted,
    Corruption,
    ImageNoise,
    MaskBoxes,
    PixelNoise,
    ReplaceText,
    SwapImage,
    TextNoise,
    TraceError,
    causal_trace,
)
from multrace.tracing.engine import Engine, StateCell, restored_tokens
from multrace.tracing.engine.cells import WeakCorruption
from PIL import Image
from torch import Tensor, nn

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
PIXELS = {
    "blank": BlankImage(),
    "blur": BlurImage(radius=4.0),
    "boxes": MaskBoxes(boxes=((0, 0, 24, 24),)),
    "pixel noise": PixelNoise(scale=2.0, samples=2),
}


def ask(vlm: VisionLanguageModel, *images: Image.Image, answer: str | None = None) -> Prompt:
    return vlm.prompt(list(images), QUESTION, constraint=CONSTRAINT, answer=answer)


def trace(vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, **settings: object) -> CausalTrace:
    settings = {"sites": ("vision", "projector"), "positions": "image", "window": 1, "even_if_weak": True} | settings
    return causal_trace(vlm, prompt, corruption=corruption, progress=False, **settings)


def reading_layer(path: Path, layer: int, **settings: object) -> VisionLanguageModel:
    """A copy of the model of its own, whose projector reads what this layer of the tower writes."""
    vlm = multrace.load(path, **settings)
    vlm.model.config.vision_feature_layer = layer
    return vlm


# Theorems.


@pytest.mark.parametrize("direction", ["restore", "corrupt"])
@pytest.mark.parametrize("case", PIXELS)
def test_whole_pictures_at_any_layer_give_the_other_runs_score(random_llava, photo, case, direction):
    found = trace(random_llava, ask(random_llava, photo), PIXELS[case], direction=direction)
    clean, corrupted = found.clean, found.corrupted
    expected = torch.full_like(corrupted, clean) if direction == "restore" else corrupted
    for kind, columns in (("vision", 2), ("projector", 1)):
        scores = found.samples[kind][0, 0]
        assert scores.shape == (columns, len(corrupted))
        assert torch.equal(scores, expected.expand_as(scores))
    assert (corrupted - clean).abs().max() > 1e-6  # otherwise there was nothing to restore


def test_the_class_token_belongs_to_the_whole_picture(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    whole = restored_tokens(prompt, cell(prompt.groups["image"]), (1, 17))
    most = restored_tokens(prompt, cell(prompt.groups["image"][1:]), (1, 17))
    assert whole.all()
    assert most[0].tolist() == [False, False] + 15 * [True]
    lent = trace(random_llava, prompt, SwapImage(other_photo), sites="vision")
    without = slow_runs(random_llava, prompt, SwapImage(other_photo)).score((0, 0), range(1, 17))
    assert float(lent.scores["vision"][0, 0]) == lent.clean
    assert abs(without - lent.clean) > 1e-6  # the class token acts on the patches through the second layer


@pytest.mark.parametrize("direction", ["restore", "corrupt"])
def test_swapping_a_picture_for_itself_changes_nothing(random_llava, photo, other_photo, direction):
    prompt = ask(random_llava, photo)
    same, other = (
        trace(random_llava, prompt, SwapImage(picture), positions="image_rows", direction=direction)
        for picture in (photo, other_photo)
    )
    for kind in same.kinds:
        assert same.total_effect == 0 and not same.indirect_effect(kind).any()
        assert other.indirect_effect(kind).all()


def test_layers_above_the_one_that_is_read_have_no_effect_at_all(llava_llama_path, photo, other_photo):
    last, first = (reading_layer(llava_llama_path, layer) for layer in (-1, -2))
    for engine in ("auto", "plain"):
        settings = {
            "positions": ["image", "image_quadrants"],
            "sites": ("vision", "projector", "mlp"),
            "engine": Engine(name=engine),
        }
        found = trace(first, ask(first, photo), SwapImage(other_photo), **settings)
        effects = found.indirect_effect("vision")
        assert effects[:, 0].all() and not effects[:, 1].any()
        # What the tower's read layer holds at patches, and nothing else, is what the projector turns into their tokens.
        assert torch.allclose(found.scores["vision"][1:, 0], found.scores["projector"][1:, 0], rtol=0, atol=1e-6)
    above = trace(last, ask(last, photo), SwapImage(other_photo), positions=["image", "patches"])
    assert above.indirect_effect("vision").all()


def test_a_damaged_picture_is_restored_by_its_own_tokens_only(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo, other_photo)
    rows = [Box(0, 0, 48, 48, image) for image in (0, 1)]
    for image in (0, 1):
        found = trace(random_llava, prompt, BlankImage(image=image), positions=rows)
        assert found.total_effect != 0
        for kind in found.kinds:
            assert (found.scores[kind][image] == found.clean).all()
            assert not found.indirect_effect(kind)[1 - image].any()


def gridless(prompt):
    """The prompt of a model whose image tokens show no parts of the picture."""
    return replace(prompt, frontend=replace(prompt.frontend, places=False))


def test_nothing_is_left_behind(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    before = random_llava.logits(prompt)
    hooks = [len(part._forward_hooks) for part in (*random_llava.vision_layers, random_llava.projector)]
    trace(random_llava, prompt, SwapImage(other_photo), positions="patches")
    with pytest.raises(TraceError, match="whole pictures"):
        trace(random_llava, gridless(prompt), SwapImage(other_photo), positions=prompt.groups["image"][0])
    assert hooks == [len(part._forward_hooks) for part in (*random_llava.vision_layers, random_llava.projector)]
    assert torch.equal(random_llava.logits(prompt), before)


# Against whole calls of the model, whose layers are replaced by functions instead of hooks.


@contextmanager
def instead(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The module computes and returns something else; nobody, and no hook, ever sees what it used to."""
    compute = module.forward
    module.forward = lambda *given, **named: change(compute(*given, **named))
    try:
        yield
    finally:
        del module.forward  # the class's own comes back


def last_logits(
    vlm: VisionLanguageModel, inputs: Mapping[str, Tensor], changes: Mapping[nn.Module, Callable]
) -> Tensor:
    with torch.no_grad(), ExitStack() as stack:
        for module, change in changes.items():
            stack.enter_context(instead(module, change))
        return vlm.model(**inputs, use_cache=False).logits[0, -1].double()


@dataclass(frozen=True, kw_only=True)
class SlowRuns:
    """The inputs of the run that is changed, what modules write in the other run, and the clean answer."""

    vlm: VisionLanguageModel
    base: Mapping[str, Tensor]
    lent: Mapping[nn.Module, Tensor]
    answer: int

    def score(self, span: tuple[int, int] | None, tokens: Sequence[int], *, image: int = 0) -> float:
        """The answer's probability with tokens of one picture put in, in tower layers or (no span) the projector."""
        modules = [self.vlm.projector] if span is None else self.vlm.vision_layers[span[0] : span[1] + 1]

        def put(module: nn.Module) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                for token in tokens:
                    lent = self.lent[module][image, token]
                    output = output.index_put((torch.tensor(image), torch.tensor(token)), lent)
                return output

            return change

        logits = last_logits(self.vlm, self.base, {module: put(module) for module in modules})
        return float(logits.softmax(-1)[self.answer])


def slow_runs(
    vlm: VisionLanguageModel, prompt: Prompt, corruption: Corruption, *, direction: str = "restore"
) -> SlowRuns:
    """Both runs of a prompt in whole calls of the model."""
    clean, damaged = prompt.inputs, corruption.corrupt(vlm, prompt).inputs[0]
    base, source = (damaged, clean) if direction == "restore" else (clean, damaged)
    lent: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda output: lent.setdefault(module, output)

    last_logits(vlm, source, {module: keep(module) for module in (*vlm.vision_layers, vlm.projector)})
    return SlowRuns(vlm=vlm, base=base, lent=lent, answer=int(last_logits(vlm, clean, {}).argmax()))


@pytest.mark.parametrize(
    ("path", "direction"),
    [
        *((path, way) for path in ("llava_llama_path", "llava_phi_path") for way in ("restore", "corrupt")),
        ("tiny", "restore"),
        pytest.param("tiny", "corrupt", marks=pytest.mark.slow),
    ],
)
def test_single_patches_equal_whole_calls_of_the_model(request, load_double, photo, other_photo, path, direction):
    vlm = load_double(tiny_vlm_path() if path == "tiny" else request.getfixturevalue(path))
    prompt, corruption = ask(vlm, photo), SwapImage(other_photo)
    width = prompt.patches[-1].column + 1
    rows = [prompt.patches[index].position for index in (0, width + 2, len(prompt.patches) - 1)]
    found = trace(vlm, prompt, corruption, positions=rows, window=2, direction=direction)
    slow = slow_runs(vlm, prompt, corruption, direction=direction)
    for row, patch in enumerate((0, width + 2, width * width - 1)):
        for column, (first, last) in enumerate(found.spans["vision"].tolist()):
            expected = slow.score((first, last), [1 + patch])
            assert float(found.scores["vision"][row, column]) == pytest.approx(expected, abs=1e-9)
            other = slow.score((first, last), [patch or 3])
            assert abs(other - expected) > 1e-8  # a token beside it is told apart
        expected = slow.score(None, [patch])
        assert float(found.scores["projector"][row, 0]) == pytest.approx(expected, abs=1e-9)


def test_patches_of_the_second_picture_equal_whole_calls_of_the_model(
    llava_llama_path, load_double, photo, other_photo, make_photo
):
    vlm = load_double(llava_llama_path)
    prompt, corruption = ask(vlm, photo, other_photo), SwapImage((make_photo(5), make_photo(6)))
    position = prompt.groups["image"][16 + 6]
    found, slow = trace(vlm, prompt, corruption, positions=position), slow_runs(vlm, prompt, corruption)
    for layer in (0, 1):
        expected, wrong = (slow.score((layer, layer), [7], image=image) for image in (1, 0))
        assert float(found.scores["vision"][0, layer]) == pytest.approx(expected, abs=1e-9)
        assert abs(wrong - expected) > 1e-6


@dataclass(frozen=True)
class OneSample:
    """One of the samples of a corruption."""

    corruption: Corruption
    sample: int

    def corrupt(self, vlm: VisionLanguageModel, prompt: Prompt) -> Corrupted:
        found = self.corruption.corrupt(vlm, prompt)
        return replace(found, inputs=found.inputs[self.sample :][:1])


def test_each_noise_sample_gets_its_own_states(random_llava, photo):
    prompt, noise = ask(random_llava, photo), PixelNoise(scale=2.0, samples=3)
    for direction in ("restore", "corrupt"):
        found = trace(random_llava, prompt, noise, positions=[prompt.groups["image"][3]], direction=direction)
        for sample in range(3):
            slow = slow_runs(random_llava, prompt, OneSample(noise, sample), direction=direction)
            expected = slow.score((0, 0), [4])
            assert float(found.samples["vision"][0, 0, 0, sample]) == pytest.approx(expected, abs=2e-6)
        assert found.samples["vision"][0, 0, 0].unique().numel() == 3


# With other sites, other scores and other engines.


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_mixed_trace_holds_what_traces_of_each_kind_find(random_llava, photo, other_photo, engine, tmp_path):
    prompt = ask(random_llava, photo)
    settings = {"positions": ["image", "image_quadrants"], "engine": Engine(name=engine)}
    kinds = ("vision", "hidden", "projector")
    mixed = trace(random_llava, prompt, SwapImage(other_photo), sites=kinds, **settings)
    for kind in kinds:
        alone = trace(random_llava, prompt, SwapImage(other_photo), sites=kind, **settings)
        assert torch.allclose(mixed.scores[kind], alone.scores[kind], rtol=0, atol=1e-6)
        assert mixed.indirect_effect(kind).abs().max() > 1e-6
    hidden = trace(random_llava, prompt, SwapImage(other_photo), sites="hidden", **settings)
    seen = trace(random_llava, prompt, SwapImage(other_photo), sites=("vision", "projector"), **settings)
    assert mixed.engine.engine == hidden.engine.engine == {"auto": "replay", "plain": "plain"}[engine]
    assert mixed.engine.cells == hidden.engine.cells + seen.engine.cells == 5 * (2 + 4 + 1)
    assert mixed.engine.token_layers == hidden.engine.token_layers + seen.engine.token_layers
    loaded = CausalTrace.load(mixed.save(tmp_path / "mixed.pt"))
    assert all(torch.equal(loaded.samples[kind], mixed.samples[kind]) for kind in kinds)
    loaded.plot(tmp_path / "mixed.png")
    assert (tmp_path / "mixed.png").stat().st_size > 1000


def test_the_report_says_that_the_plain_way_ran_and_counts_its_decoder_passes(random_llava, photo, other_photo):
    found = trace(random_llava, ask(random_llava, photo), SwapImage(other_photo), positions=["image", "patches"])
    report = found.engine
    assert (report.engine, report.cells) == ("plain", 17 * 3) and "vision tower" in report.reason
    assert report.token_layers == 16 * 3 * len(found.tokens) * 4  # whole pictures are the clean run, which is known


def test_whole_answers_foils_and_several_metrics(random_llava, photo, other_photo):
    prompt = ask(random_llava, photo)
    settings = {
        "answer": "Ada Example",
        "foil": "the year 1999",
        "whole_answer": True,
        "metrics": ("log_probability", "logit_difference"),
    }
    found = trace(random_llava, prompt, SwapImage(other_photo), positions=["image", "image_quadrants"], **settings)
    assert found.metrics == settings["metrics"] and len(found.foil_ids) > 1
    clean = random_llava.score(photo, QUESTION, "Ada Example")
    assert float(found.clean_scores[0]) == pytest.approx(sum(clean.token_log_probabilities), abs=1e-4)
    for metric in (0, 1):
        scores = found.samples["vision"][metric]
        assert torch.equal(scores[0], found.clean_scores[metric].expand_as(scores[0]))
        assert not torch.isclose(scores[1:], found.clean_scores[metric], rtol=0, atol=1e-9).any()


def test_progress_counts_every_cell(random_llava, photo, other_photo, capsys):
    settings = {"sites": ("vision", "mlp"), "positions": ["image", "patches"], "even_if_weak": True}
    causal_trace(random_llava, ask(random_llava, photo), corruption=SwapImage(other_photo), **settings)
    assert "100%" in (shown := capsys.readouterr().err) and f"{17 * 6}/{17 * 6}" in shown


def test_damage_without_effect_is_not_traced(random_llava, photo):
    with pytest.raises(WeakCorruption, match="does not lower"):
        trace(random_llava, ask(random_llava, photo), SwapImage(photo), even_if_weak=False)


# What is refused.


@pytest.mark.parametrize(
    "corruption", [TextNoise(scale=1.0), ImageNoise(scale=1.0), ReplaceText(replacement="Paris city")], ids=str
)
def test_other_corruptions_than_those_of_pixels_are_refused(random_llava, photo, corruption):
    for sites in ("vision", ("hidden", "projector")):
        with pytest.raises(TraceError, match="leaves the pixels as they are.*SwapImage, BlankImage"):
            trace(random_llava, ask(random_llava, photo), corruption, sites=sites)
    assert trace(random_llava, ask(random_llava, photo), corruption, sites="hidden").kinds == ("hidden",)


REFUSED = {
    "words": ({"positions": ["image", "last"]}, "'last' holds words"),
    "direct effects": ({"effect": "direct"}, "total effects only"),
    "severed": ({"severed": "mlp"}, "total effects only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, random_llava, photo, other_photo):
    settings, message = REFUSED[case]
    with pytest.raises(TraceError, match=message):
        trace(random_llava, ask(random_llava, photo), SwapImage(other_photo), **settings)


def test_without_a_grid_only_whole_pictures_are_restored_in_the_tower(random_llava, photo, other_photo):
    prompt = gridless(ask(random_llava, photo))
    one = prompt.groups["image"][2]
    with pytest.raises(TraceError, match="17 'vision' states.*16 image tokens.*positions='image'"):
        trace(random_llava, prompt, SwapImage(other_photo), positions=["image", one])
    found = trace(random_llava, prompt, SwapImage(other_photo))
    assert (found.scores["vision"] == found.clean).all()
    # The projector's tokens are those that the decoder reads, whatever the tower's are.
    assert trace(random_llava, prompt, SwapImage(other_photo), positions=one, sites="projector").total_effect != 0


def cell(positions: Sequence[int], kind: str = "vision") -> StateCell:
    return StateCell(kind=kind, first=0, last=0, positions=tuple(positions))


def test_tokens_of_towers_of_every_shape(random_llava, photo, other_photo):
    one, two = ask(random_llava, photo), ask(random_llava, photo, other_photo)
    patch, second = cell(one.groups["image"][:1]), cell(two.groups["image"][16:])
    assert restored_tokens(one, patch, (1, 16)).nonzero().tolist() == [[0, 0]]
    assert restored_tokens(one, patch, (1, 21)).nonzero().tolist() == [[0, 5]]  # class token and four registers
    for shape in ((1, 64), (1, 65), (1, 8)):  # patches merged four to one, the same with a class token, and split
        with pytest.raises(TraceError, match="only whole pictures"):
            restored_tokens(one, patch, shape)
        assert restored_tokens(one, cell(one.groups["image"]), shape).all()
    with pytest.raises(TraceError, match="only whole pictures"):
        restored_tokens(one, cell(patch.positions, "projector"), (1, 17))
    merged = restored_tokens(two, second, (2, 64))
    assert merged[1].all() and not merged[0].any()
    for shape in ((128,), (3, 64), (10, 17)):  # tokens in one row, and pictures cut into tiles
        with pytest.raises(TraceError, match="only all pictures together"):
            restored_tokens(two, second, shape)
        assert restored_tokens(two, cell(two.groups["image"]), shape).all()
    assert not restored_tokens(one, cell(()), (1, 17)).any()


# Addresses.


def test_the_model_says_where_they_are(random_llava, random_llama):
    assert [random_llava.path(layer) for layer in random_llava.vision_layers] == [
        f"model.vision_tower.encoder.layers.{layer}" for layer in (0, 1)
    ]
    assert random_llava.path(random_llava.projector) == "model.multi_modal_projector"
    for name in ("vision_layers", "projector"):
        with pytest.raises(ModelError, match="text-only"):
            getattr(random_llama, name)


ROWS = {
    "no such layers": ({"vision_layers": "layers"}, "no module at 'model.vision_tower.layers'"),
    "one module for the list": ({"vision_layers": "encoder"}, "'model.vision_tower.encoder.layers' does not run"),
    "one layer for the list": ({"vision_layers": "encoder.layers.0"}, "does not read what"),
    "no list": ({"vision_layers": "post_layernorm"}, "no list of layers"),
    "no such projector": ({"projector": "connector"}, "no module at 'model.connector'"),
    "half of the projector": ({"projector": "multi_modal_projector.linear_1"}, "site 'projector'.*linear_1"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_wrong_row_is_refused(case, random_llava_llama):
    changes, message = ROWS[case]
    family = replace(random_llava_llama.family, **changes)
    wrong = replace(random_llava_llama, family=family, addresses=replace(random_llava_llama.addresses, family=family))
    with pytest.raises(ModelError, match=message):
        prove_addresses(wrong)


@pytest.mark.parametrize("field", ["vision_layers", "projector"])
def test_a_row_may_leave_them_out(field, llava_llama_path, photo, other_photo):
    names = {"vision": "vision_tower", "vision_layers": "encoder.layers", "projector": "multi_modal_projector"}
    row = PictureFront(model_types=("llava",), **{**names, field: None})
    vlm = multrace.load(llava_llama_path, families=(row,))
    site, other = {"vision_layers": ("vision", "projector"), "projector": ("projector", "vision")}[field]
    with pytest.raises(ModelError, match=f"does not name the {field.replace('_', ' ')}.*{field}="):
        trace(vlm, ask(vlm, photo), SwapImage(other_photo), sites=site)
    assert trace(vlm, ask(vlm, photo), SwapImage(other_photo), sites=other).total_effect != 0
