"""Second moments: the naive sum in float64, whatever the batches, groups and interruptions; and when they stop."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import multrace
import pytest
import torch
from multrace.artefacts import read_tensors, write_tensors
from multrace.editing import EditError
from multrace.editing.moments import PROBES, Moments, Watch, memory_of_moments, second_moments
from multrace.models import Prompt, VisionLanguageModel
from PIL import Image
from torch import Tensor

QUESTIONS = (
    "What is the capital of the country whose flag is shown?",
    "Who won?",
    "Which sport does the person in the picture play?",
    "What colour is the emblem, and who founded the company in this photo?",
)
PARTS = ("image", "question", "template")

BYTE = 2**-20
"""One byte in MiB."""


@pytest.fixture
def prompts(random_vlm: VisionLanguageModel, make_photo: Callable[[int], Image.Image]) -> list[Prompt]:
    return corpus(random_vlm, make_photo)


@pytest.fixture
def llava_prompts(random_llava_llama: VisionLanguageModel, make_photo: Callable[[int], Image.Image]) -> list[Prompt]:
    return corpus(random_llava_llama, make_photo)


def corpus(vlm: VisionLanguageModel, make_photo: Callable[[int], Image.Image], count: int = 9) -> list[Prompt]:
    """Prompts of different lengths; for a model that sees, every fourth without a picture, and one with two."""
    found = []
    for number in range(count):
        images = [make_photo(number), make_photo(number + 50)][: 2 if number == 2 else 1]
        sees = vlm.has_vision and number % 4 != 3
        found.append(vlm.prompt(images if sees else None, f"{QUESTIONS[number % 4]} {number}"))
    return found


def naive(vlm: VisionLanguageModel, prompts: Sequence[Prompt], layer: int, projection: str, kind: str) -> Tensor:
    """The mean of k k^T by plain hooks, whole calls of the model and one outer product per token."""
    module = {"mlp": vlm.down_projection, "attention": vlm.attention_projection}[projection](layer).module
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for prompt in prompts:
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda _module, given, _output, seen=seen: seen.append(given[0][0]))
        with torch.no_grad():
            vlm.model(**prompt.inputs)
        handle.remove()
        image, question = set(prompt.groups["image"]), set(prompt.groups["question"])
        text = set(range(prompt.length)) - image
        wanted = {"image": image, "question": question, "template": text - question, "text": text, "all": image | text}
        for position in sorted(wanted[kind]):
            key = seen[0][position].double()
            total, count = total + torch.outer(key, key), count + 1
    return total / count


def same(first: Moments, second: Moments) -> bool:
    """Bit for bit."""
    sums = all(
        torch.equal(first.sums[layer][kind], second.sums[layer][kind]) for layer in first.layers for kind in PARTS
    )
    words = ("layers", "counts", "prompts", "weights", "corpus", "settings", "convergence", "projection", "model")
    return sums and all(getattr(first, name) == getattr(second, name) for name in words)


@pytest.fixture
def calls(random_llava_llama: VisionLanguageModel) -> Callable[[int], list[int]]:
    """Counts how often a decoder layer is entered."""
    handles = []

    def count(layer: int = 0) -> list[int]:
        entered: list[int] = []
        hook = random_llava_llama.addresses.layers[layer].register_forward_pre_hook(lambda *_: entered.append(layer))
        handles.append(hook)
        return entered

    yield count
    for handle in handles:
        handle.remove()


# ---- the numbers ----


@pytest.mark.parametrize("projection", ["mlp", "attention"])
def test_they_are_the_naive_sums_in_float64(exact_vlm, make_photo, projection):
    vlm = exact_vlm
    prompts = corpus(vlm, make_photo, 5)
    moments = second_moments(vlm, prompts, layers=[0, -1], projection=projection, batch_size=3)
    assert moments.layers == (0, vlm.layers - 1)
    for layer in moments.layers:
        for kind in ("all", "text", "question", "template", *(["image"] if vlm.has_vision else [])):
            expected = naive(vlm, prompts, layer, projection, kind)
            assert moments.matrix(layer, kind).dtype == torch.float64
            torch.testing.assert_close(moments.matrix(layer, kind), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(moments.matrix(0, "question"), moments.matrix(0, "template"), rtol=1e-2)


def test_in_float32_batches_change_only_the_rounding(random_vlm, prompts):
    alone = second_moments(random_vlm, prompts, batch_size=1)
    together = second_moments(random_vlm, prompts, batch_size=4)
    assert alone.counts == together.counts
    assert sum(alone.counts.values()) == sum(prompt.length for prompt in prompts) == alone.count()
    for layer in alone.layers:
        expected = naive(random_vlm, prompts, layer, "mlp", "all")
        for moments in (alone, together):
            assert (moments.matrix(layer) - expected).norm() < 1e-5 * expected.norm()


def test_the_parts_add_up(random_llava_llama, llava_prompts):
    moments = second_moments(random_llava_llama, llava_prompts, layers=[1])
    total = sum(moments.matrix(1, kind) * moments.count(kind) for kind in PARTS)
    torch.testing.assert_close(moments.matrix(1) * moments.count(), total)
    words = sum(moments.matrix(1, kind) * moments.count(kind) for kind in ("question", "template"))
    torch.testing.assert_close(moments.matrix(1, "text") * moments.count("text"), words)
    assert moments.width(1) == random_llava_llama.mlp


def test_no_later_layer_and_no_output_head_runs(random_llava_llama, llava_prompts, calls):
    reached, later = calls(2), calls(3)
    heads: list[int] = []
    head = random_llava_llama.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda *_: heads.append(1))
    second_moments(random_llava_llama, llava_prompts, layers=[0, 2], batch_size=3, every=3)
    assert (len(reached), later, heads) == (3, [], [])
    random_llava_llama.logits(llava_prompts[0])
    assert (later, heads) == ([3], [1])
    handle.remove()


def test_groups_under_a_memory_budget_give_the_same_bits(random_llava_llama, llava_prompts, calls):
    vlm, entered = random_llava_llama, calls(0)
    whole = second_moments(vlm, llava_prompts, batch_size=3, every=3)
    passes = len(entered)
    grouped = second_moments(vlm, llava_prompts, batch_size=3, every=3, memory=memory_of_moments(vlm) - BYTE)
    assert len(entered) == 3 * passes
    assert same(whole, grouped)


def test_a_budget_that_holds_no_layer_is_an_error_that_says_what_does(random_llava_llama, llava_prompts):
    with pytest.raises(EditError, match="memory=0.001 MiB .*one layer at a time takes") as caught:
        second_moments(random_llava_llama, llava_prompts, memory=0.001)
    least, whole = (float(number) for number in re.findall(r"(?:takes|one pass) ([\d.]+\d)", str(caught.value)))
    assert 0 <= whole - memory_of_moments(random_llava_llama) < 0.001
    second_moments(random_llava_llama, llava_prompts, memory=least)
    with pytest.raises(EditError, match="one layer"):
        second_moments(random_llava_llama, llava_prompts, memory=least - 0.001)


# ---- convergence ----


def test_readings_are_what_they_say(random_llava_llama, llava_prompts):
    vlm, prompts = random_llava_llama, llava_prompts[:8]
    readings = second_moments(vlm, prompts, layers=[1], batch_size=2, every=2).convergence
    assert [reading.prompts for reading in readings] == [4, 8]
    assert vlm.mlp <= PROBES  # so the readings are exact
    means = {stop: naive(vlm, prompts[:stop], 1, "mlp", "all") for stop in (4, 8)}
    halves = [naive(vlm, [*prompts[start : start + 2], *prompts[start + 4 :][:2]], 1, "mlp", "all") for start in (0, 2)]
    assert readings[1].change[0] == pytest.approx(((means[8] - means[4]).norm() / means[8].norm()).item(), rel=1e-4)
    assert readings[1].halves[0] == pytest.approx(((halves[0] - halves[1]).norm() / means[8].norm()).item(), rel=1e-4)
    assert readings[0].change[0] == float("inf")


def test_in_a_wide_layer_a_reading_is_close_to_the_exact_one():
    torch.manual_seed(0)
    keys = torch.randn(2, 40, 600, dtype=torch.float64)
    watch = Watch([0])
    for half in (0, 1):
        watch.add(0, keys[half][None], torch.ones(1, 40), half)
    watch.read(2)
    first, second = (each.T @ each / 40 for each in keys)
    exact = (first - second).norm() / ((first + second) / 2).norm()
    assert watch.readings[0].halves[0] == pytest.approx(exact.item(), rel=0.1)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_repeated_corpus_stops_early_and_without_a_tolerance_does_not(random_llava_llama, llava_prompts, is_grouped):
    vlm, repeated = random_llava_llama, llava_prompts[:2] * 12
    settings = {"layers": [0, 1], "every": 2, "memory": memory_of_moments(vlm, [0, 1]) - is_grouped * BYTE}
    stopped = second_moments(vlm, repeated, tolerance=1e-6, **settings)
    assert stopped.prompts == 8  # the first reading that has one before it
    assert stopped.convergence[-1].worst < 1e-6
    assert stopped.settings["tolerance"] == "1e-06"
    for tolerance in (0, None):
        assert second_moments(vlm, repeated, tolerance=tolerance, **settings).prompts == 24
    assert second_moments(vlm, llava_prompts[:8], tolerance=1e-6, **settings).prompts == 8


# ---- cache and resume ----


SETTINGS = {"batch_size": 2, "every": 2}


def interrupted(vlm: VisionLanguageModel, prompts: Sequence[Prompt], after: int, **settings: object) -> None:
    """Starts, and is stopped by the keyboard at the batch of this number."""
    seen: list[int] = []

    def stop(*_: object) -> None:
        seen.append(1)
        if len(seen) > after:
            raise KeyboardInterrupt

    handle = vlm.addresses.layers[0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            second_moments(vlm, prompts, **settings)
    finally:
        handle.remove()


@pytest.mark.parametrize(("passes", "after"), [(1, 0), (1, 3), (1, 4), (2, 5), (2, 7)])
def test_an_interrupted_run_goes_on_bit_equal(random_llava_llama, llava_prompts, calls, tmp_path, passes, after):
    vlm, layers = random_llava_llama, [0, 1, 2]
    settings = {**SETTINGS, "memory": memory_of_moments(vlm, layers) - (passes - 1) * BYTE, "layers": layers}
    whole = second_moments(vlm, llava_prompts, **settings)
    interrupted(vlm, llava_prompts, after, cache=tmp_path, **settings)
    entered = calls(0)
    resumed = second_moments(vlm, llava_prompts, cache=tmp_path, **settings)
    assert len(entered) == 5 * passes - after
    assert same(whole, resumed)


def test_a_hit_runs_no_layer_and_anything_else_misses(random_llava_llama, llava_prompts, calls, tmp_path):
    vlm, entered = random_llava_llama, calls(0)

    def again(prompts: Sequence[Prompt] = llava_prompts, **changes: object) -> bool:
        """Whether the model ran."""
        entered.clear()
        second_moments(vlm, prompts, cache=tmp_path, **{**SETTINGS, "layers": [1], **changes})
        return bool(entered)

    assert again()
    assert not again()
    assert again(llava_prompts[:-1])
    assert again(llava_prompts[::-1])
    for changes in ({"layers": [2]}, {"projection": "attention"}, {"batch_size": 1}, {"tolerance": 0.1}, {"every": 4}):
        assert again(**changes), changes
    assert not again()
    with torch.no_grad():
        weight = vlm.down_projection(0).weight
        before = weight[0, 0].item()
        weight[0, 0] += 1
        assert again()
        weight[0, 0] = before
        later = vlm.down_projection(2).weight  # layer 1 does not depend on it
        before = later[0, 0].item()
        later[0, 0] += 1
        assert not again()
        later[0, 0] = before


def test_another_processor_or_dtype_is_another_run(random_llava_llama, llava_llama_path, photo, tmp_path):
    changed = multrace.load(llava_llama_path, verify=False)
    changed.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    half = multrace.load(llava_llama_path, dtype="bfloat16", verify=False)
    for vlm in (random_llava_llama, changed, half):
        second_moments(vlm, [vlm.prompt(photo, QUESTIONS[0])], layers=[0], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    same_again = multrace.load(llava_llama_path, verify=False)
    second_moments(same_again, [same_again.prompt(photo, QUESTIONS[0])], layers=[0], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("harm", ["cut", "foreign", "shape", "missing"])
def test_a_harmed_cache_is_named_and_computed_anew(
    random_llava_llama, llava_prompts, calls, tmp_path, harm, caplog: pytest.LogCaptureFixture
):
    settings = {**SETTINGS, "layers": [1], "cache": tmp_path}
    whole = second_moments(random_llava_llama, llava_prompts, **settings)
    (part,) = tmp_path.glob("*/layer-1-at-9.safetensors")
    tensors, text = read_tensors(part)
    if harm == "cut":
        (short := part.with_suffix(".short")).write_bytes(part.read_bytes()[:-100])
        short.replace(part)  # not in place, since `whole` reads its sums from there
    elif harm == "missing":
        part.unlink()
    elif harm == "foreign":
        write_tensors(part, tensors, text | {"key": "of another run"})
    else:
        write_tensors(part, {name: value[:-1, :-1].clone() for name, value in tensors.items()}, text)
    entered = calls(0)
    with caplog.at_level(logging.WARNING, logger="multrace"):
        assert same(whole, second_moments(random_llava_llama, llava_prompts, **settings))
    assert entered and str(part) in caplog.text
    caplog.clear()
    entered.clear()
    assert same(whole, second_moments(random_llava_llama, llava_prompts, **settings))
    assert not entered and not caplog.text


# ---- the file ----


@pytest.fixture
def moments(random_llava_llama: VisionLanguageModel, llava_prompts: list[Prompt]) -> Moments:
    return second_moments(random_llava_llama, llava_prompts, layers=[1, 3], every=1)


def test_a_file_gives_back_the_same_bits(moments, tmp_path):
    loaded = Moments.load(moments.save(tmp_path / "new" / "moments.safetensors"))
    assert same(moments, loaded) and loaded.revision is None
    assert len(loaded.convergence) == 4
    assert read_tensors(tmp_path / "new" / "moments.safetensors")[1]["format"] == "multrace moments 1"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors, text: tensors.update({"sum:1:image": torch.eye(3, dtype=torch.float64)}), "layer 1"),
        (lambda tensors, text: tensors.update({"sum:1:image": tensors["sum:1:image"].float()}), "float64"),
        (lambda tensors, text: tensors.pop("sum:3:template"), "layer 3"),
        (lambda tensors, text: tensors["sum:1:image"].fill_(torch.nan), "not finite"),
        (lambda tensors, text: tensors.pop("curve:halves"), "damaged"),
        (lambda tensors, text: text.pop("weights"), "damaged"),
        (lambda tensors, text: text.update(counts="{"), "damaged"),
        (lambda tensors, text: text.update(format="multrace delta 1"), "no second moments"),
    ],
    ids=["shape", "dtype", "missing", "nan", "curve", "hash", "counts", "format"],
)
def test_a_damaged_file_is_named(moments, tmp_path, change, match):
    path = moments.save(tmp_path / "moments.safetensors")
    tensors, text = read_tensors(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors, text)
    write_tensors(path, tensors, text)
    with pytest.raises(EditError, match=match) as caught:
        Moments.load(path)
    assert str(path) in str(caught.value)


def test_they_belong_to_the_weights_they_were_made_with(moments, random_llava_llama, random_llama):
    moments.check(random_llava_llama)
    with pytest.raises(EditError, match="another model, precision or quantisation, or an edited one"):
        moments.check(random_llama)
    weight = random_llava_llama.down_projection(0).weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 1
        with pytest.raises(EditError, match="belong to"):
            moments.check(random_llava_llama)
        weight[0, 0] = before
    moments.check(random_llava_llama)


def test_what_is_not_there_is_an_error_that_lists_what_is(moments, random_llama):
    with pytest.raises(EditError, match=r"no second moments of layer 2 .*1, 3"):
        moments.matrix(2)
    with pytest.raises(EditError, match=r"'words'.*image, question, template, all, text"):
        moments.count("words")
    blind = second_moments(random_llama, [random_llama.prompt(None, QUESTIONS[0])], layers=[0])
    assert blind.count("image") == 0
    with pytest.raises(EditError, match="no image token"):
        blind.matrix(0, "image")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"projection": "output"}, "projection='output'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"every": 0}, "every=0"),
        ({"layers": []}, "no layer"),
        ({"prompts": []}, "at least one"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_errors(random_llama, changes, match):
    settings = {"prompts": [random_llama.prompt(None, QUESTIONS[0])]} | changes
    with pytest.raises(EditError, match=match):
        second_moments(random_llama, **settings)


@pytest.mark.parametrize("every", [1, 100])
def test_numbers_that_are_not_finite_are_an_error(random_llama, every, tmp_path: Path):
    prompts = [random_llama.prompt(None, question) for question in QUESTIONS]
    weight = random_llama.model.get_input_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        with pytest.raises(EditError, match=r"layer 1 .*not finite"):
            second_moments(random_llama, prompts, layers=[1], every=every, batch_size=1)
        weight.copy_(before)
    second_moments(random_llama, prompts, layers=[1], every=every, batch_size=1)
