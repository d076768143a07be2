"""Adapters: the best cut to a smaller rank, what it costs each request, how vLLM reads them, and rounding to half."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace import EditRequest, MultEdit, VisionLanguageModel, load
from multrace.data import tiny_vlm_path
from multrace.editing import (
    Delta,
    EditError,
    FineTune,
    History,
    Moments,
    RuntimeEdit,
    WeightChange,
    save_merged,
    second_moments,
    to_peft,
    truncate,
    verify_export,
    with_adapters,
)
from multrace.editing.changes import VLLM_RANKS, leading_directions
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TEXTS = ("What is this?", "Who won the cup?", "Where is it?", "Which colour is the sky?")
KEYS_EACH = 3
OTHERS = 1e-6
"""Weight of directions without keys in the metric, as the docstring says."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change_of(hidden: int, width: int, *, seed: int = 0) -> WeightChange:
    """A ridge solution over anisotropic keys in a metric of its own, as an editor with second moments makes it."""
    count = KEYS_EACH * len(TEXTS)
    keys = (random(count, width, seed=seed) + 2) * torch.logspace(1, -2, width)
    right = keys * torch.logspace(-1, 1, width)
    residuals = random(count, hidden, seed=seed + 1) * torch.logspace(1, -1, count)[:, None]
    gram = (keys @ right.T).double() + torch.eye(count)
    left = torch.linalg.solve(gram, residuals.double()).T.float().contiguous()
    owners = torch.arange(len(TEXTS)).repeat_interleave(KEYS_EACH)
    return WeightChange(
        left=left, right=right, keys=keys, residuals=residuals, weights=torch.ones(count), owners=owners
    )


def delta_of(vlm: VisionLanguageModel, *layers: int) -> Delta:
    projections = [vlm.down_projection(layer) for layer in layers]
    changes = {each.name: change_of(each.hidden, each.width, seed=each.width + n) for n, each in enumerate(projections)}
    requests = tuple({"question": text, "target": "red"} for text in TEXTS)
    return Delta(changes=changes, fingerprints=vlm.fingerprint(changes), model=vlm.name, requests=requests)


def dense(change: WeightChange) -> Tensor:
    return change.left.double() @ change.right.double()


def best_by_brute_force(whole: Tensor, metric: Tensor, rank: int) -> Tensor:
    """The best D' of this rank: the truncated SVD of D M^(1/2), times M^(-1/2), all of them dense."""
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(whole @ root, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank] @ torch.linalg.inv(root)


def metric_of(keys: Tensor, moment: Tensor | None = None) -> Tensor:
    base = keys.double().T @ keys.double() / len(keys)
    base = base if moment is None else base + moment
    return base + OTHERS * base.trace() / len(base) * torch.eye(len(base), dtype=torch.float64)


def error(difference: Tensor, metric: Tensor) -> float:
    return float((difference @ metric @ difference.T).trace())


@pytest.mark.parametrize("with_moment", [False, True])
@pytest.mark.parametrize(("hidden", "rank"), [(20, 1), (20, 4), (8, 5), (20, 11)])
def test_the_cut_is_the_best_one_for_the_keys_and_a_plain_svd_is_worse(hidden, rank, with_moment):
    change = change_of(hidden, 24)
    samples = random(50, 24, seed=9).double()
    moment = samples.T @ samples / 50 if with_moment else None
    metric, whole = metric_of(change.keys, moment), dense(change)
    left, right = leading_directions(change.left, change.right, keys=change.keys, moment=moment).cut(
        change.left, change.right, rank
    )
    assert left.shape == (hidden, rank) and right.shape == (rank, 24)
    best = best_by_brute_force(whole, metric, rank)
    torch.testing.assert_close(left @ right, best, rtol=1e-6, atol=1e-6 * best.abs().max().item())
    least = error(whole - best, metric)
    assert error(whole - left @ right, metric) <= least * (1 + 1e-8)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    assert error(whole - u[:, :rank] * s[:rank] @ v[:rank], metric) > 1.001 * least
    if not with_moment:  # on the keys alone, nothing of this rank can miss less than the singular values left over
        keys = change.keys.double()
        missed = ((whole - left @ right) @ keys.T).square().sum().item()
        floor = torch.linalg.svdvals(whole @ keys.T)[rank:].square().sum().item()
        assert floor <= missed * (1 + 1e-9) and missed <= floor * (1 + 1e-3)
    inputs = random(100, 24, seed=3).double()
    assert ((inputs @ (left @ right).T).norm(dim=1) <= (inputs @ whole.T).norm(dim=1) * (1 + 1e-9)).all()


def test_without_keys_the_cut_is_the_plain_svd():
    left, right = random(20, 9), random(9, 24, seed=1)
    u, s, v = torch.linalg.svd((left @ right).double(), full_matrices=False)
    first, second = leading_directions(left, right).cut(left, right, 4)
    torch.testing.assert_close(first @ second, u[:, :4] * s[:4] @ v[:4], rtol=1e-5, atol=1e-5)


def test_each_request_is_told_what_the_cut_leaves_of_it(tiny_vlm, tmp_path, caplog):
    delta = delta_of(tiny_vlm, 1, 2)
    with caplog.at_level(logging.WARNING, logger="multrace"):
        adapter = to_peft(tiny_vlm, delta, tmp_path / "adapter", rank=3)
    cut = truncate(tiny_vlm, delta, rank=3)
    for index, share in enumerate(adapter.retained):
        met = asked = 0.0
        for name, change in delta.changes.items():
            for key in change.keys[change.owners == index].double():
                wanted, found = dense(change) @ key, dense(cut.changes[name]) @ key
                met, asked = met + float(found @ wanted), asked + float(wanted @ wanted)
        assert share == pytest.approx(met / asked, rel=1e-5)
    assert adapter.worst == adapter.retained.index(min(adapter.retained)) and min(adapter.retained) < 0.95
    assert adapter.to_dataframe()["retained"].tolist() == list(adapter.retained)
    assert adapter.is_cut and adapter.rank == 3 and adapter.full_rank == 12 and len(repr(adapter).splitlines()) == 2
    assert f"{min(adapter.retained):.1%}" in repr(adapter)
    assert adapter.lines[-2].startswith(f"the cut takes most from {adapter.worst}: ")
    assert sum("kept by the cut" in line for line in adapter.lines) == len(TEXTS)
    (warning,) = caplog.messages
    assert "keep less than 95% of their effect" in warning and repr(TEXTS[adapter.worst]) in warning
    assert f"rank={adapter.sufficient_rank} keeps" in warning
    enough, less = (
        to_peft(tiny_vlm, delta, tmp_path / str(rank), rank=rank).retained
        for rank in (adapter.sufficient_rank, adapter.sufficient_rank - 1)
    )
    assert min(enough) >= 0.95 > min(less)
    caplog.clear()
    whole = to_peft(tiny_vlm, delta, tmp_path / "whole", rank=12)
    assert whole.retained == (1.0,) * len(TEXTS) and not whole.is_cut and not caplog.messages


def test_a_cut_edit_still_answers_and_leaves_kept_prompts_alone(tiny_vlm):
    asked, also, kept = (tiny_vlm.prompt(None, text) for text in ("Who won?", "Who is it?", "Who founded Draivo?"))
    request = EditRequest(question=asked, target="Pruro", rewrite_prompts=[also], preserve_prompts=[kept])
    delta = MultEdit(layer=5, steps=40).edit(tiny_vlm, [request], progress=False)
    ((name, change),) = delta.changes.items()
    before = tiny_vlm.answers([asked, also, kept])
    said = {}
    for rank in (1, 3):
        with truncate(tiny_vlm, delta, rank=rank).applied(tiny_vlm):
            said[rank] = tiny_vlm.answers([asked, also, kept])
    assert change.rank == 4 and said[3] == ["Pruro", "Pruro", before[2]]
    assert said[1][:2] != ["Pruro", "Pruro"] and "Pruro" not in before


def test_moments_of_the_edited_layer_count_and_others_are_refused(tiny_vlm, tmp_path):
    delta = delta_of(tiny_vlm, 2)
    ((name, change),) = delta.changes.items()
    moments = second_moments(tiny_vlm, [tiny_vlm.prompt(None, text) for text in TEXTS], layers=[2], progress=False)
    scale = 0.1 * change.keys.square().sum(1).mean().item() / moments.matrix(2).trace().item()
    sums = {kind: scale * part for kind, part in moments.sums[2].items()}
    moments = replace(moments, sums={2: sums})
    cut = truncate(tiny_vlm, delta, rank=3, moments=moments)
    best = best_by_brute_force(dense(change), metric_of(change.keys, moments.matrix(2)), 3)
    torch.testing.assert_close(dense(cut.changes[name]), best, rtol=1e-4, atol=1e-4 * best.abs().max().item())
    assert (dense(truncate(tiny_vlm, delta, rank=3).changes[name]) - best).norm() > 1e-3 * best.norm()
    assert "moments" in to_peft(tiny_vlm, delta, tmp_path / "adapter", rank=3, moments=moments).metric
    other = Moments(**{**vars(moments), "projection": "attention"})
    for wrong in (other, replace(moments, sums={1: moments.sums[2]}, convergence=())):
        with pytest.raises(EditError, match="collect them for the layers that were edited"):
            truncate(tiny_vlm, delta, rank=3, moments=wrong)


# --- vLLM -------------------------------------------------------------------------------------------------------------


@contextmanager
def served(vlm: VisionLanguageModel, folder: Path) -> Iterator[None]:
    """The model with an adapter as vLLM applies it.

    It reads `r`, `lora_alpha` and `target_modules` and nothing else; one scale is used for all modules; a module is
    accepted by the last part of its name; factors go into buffers of the adapter's rank; only the language model has
    adapters.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    rank, scale, targets = config["r"], config["lora_alpha"] / config["r"], config["target_modules"]
    assert rank <= max(VLLM_RANKS) and not config.get("modules_to_save") and config.get("bias", "none") == "none"
    modules = {name: each for name, each in vlm.model.named_modules() if isinstance(each, nn.Linear | Conv1D)}
    supported = {name.rsplit(".", 1)[-1] for name in modules}
    assert {target.rsplit(".", 1)[-1] for target in targets} <= supported
    tensors, hooks, decoder = load_file(folder / "adapter_model.safetensors"), [], vlm.path(vlm.decoder)
    for name in {key.removeprefix("base_model.model.").rsplit(".", 2)[0] for key in tensors}:
        assert name.rsplit(".", 1)[-1] in supported
        down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        below, above = torch.zeros(rank, down.shape[1]).double(), torch.zeros(up.shape[0], rank).double()
        below[: len(down)], above[:, : up.shape[1]] = down, up * scale

        def add(module, args, output, below=below, above=above):
            return output + args[0] @ below.T @ above.T

        if name.startswith(decoder):
            hooks.append(modules[name].register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("rank", [None, 3])
def test_by_the_rules_of_vllm_the_adapter_is_the_edit(exact_vlm, photo, tmp_path, rank):
    vlm, delta = exact_vlm, delta_of(exact_vlm, 1, 2)
    first, second = delta.changes
    few = delta.changes[second].only(torch.arange(12) < 2)  # modules of unequal ranks, and one scale for both
    delta = replace(delta, changes={**delta.changes, second: few})
    prompt = vlm.prompt(photo if vlm.has_vision else None, "What is this?")
    plain = vlm.logits(prompt)
    held = delta if rank is None else truncate(vlm, delta, rank=rank)
    with held.applied(vlm):
        wanted = vlm.logits(prompt)
    adapter = to_peft(vlm, delta, tmp_path / "adapter", rank=rank)
    with served(vlm, adapter.folder):
        found = vlm.logits(prompt)
    torch.testing.assert_close(found, wanted, rtol=0, atol=(1e-9 if rank is None else 1e-4))
    assert (wanted - plain).abs().max() > 0.1
    config = adapter.folder / "adapter_config.json"
    words = json.loads(config.read_text())
    assert words["r"] == adapter.rank == (rank or 12) and len(set(words["rank_pattern"].values())) == 2
    config.write_text(json.dumps({**words, "lora_alpha": 2 * words["r"]}))
    with served(vlm, adapter.folder):
        assert (vlm.logits(prompt) - wanted).abs().max() > 0.01
    if rank is not None:
        with delta.applied(vlm):
            assert (vlm.logits(prompt) - wanted).abs().max() > 0.01
    assert first != second and torch.equal(vlm.logits(prompt), plain)


def test_the_flags_to_serve_with_hold_the_rank(tiny_vlm, tmp_path):
    adapter = to_peft(tiny_vlm, delta_of(tiny_vlm, 2), tmp_path / "my adapter")
    assert adapter.max_lora_rank == 16
    assert adapter.serving.endswith(f"--enable-lora --max-lora-rank 16 --lora-modules 'my adapter={adapter.folder}'")
    sizes = {1: 1, 2: 8, 8: 8, 9: 16, 17: 32, 65: 128, 129: 256, 257: 320, 321: 512, 512: 512, 513: None}
    assert {rank: replace(adapter, rank=rank).max_lora_rank for rank in sizes} == sizes
    for lossless, sufficient, said in (
        (37, 20, "rank=37, which loses nothing"),
        (900, 400, "rank=512, or with rank=400, which keeps 95%"),
        (900, 600, "rank=512, which takes more than 5% from some requests"),
    ):
        large = replace(adapter, rank=900, lossless_rank=lossless, sufficient_rank=sufficient)
        assert "vLLM takes adapters of rank 512 at most, and this one has rank 900" in large.serving
        assert said in large.serving and large.lines[-1] == large.serving and "too large for vLLM" in repr(large)


def test_an_adapter_that_is_too_large_is_written_and_says_how_to_make_it_smaller(tiny_vlm, tmp_path):
    delta = delta_of(tiny_vlm, 2)
    ((name, change),) = delta.changes.items()
    large = replace(delta, changes={name: WeightChange.stacked([change] * 50)})
    adapter = to_peft(tiny_vlm, large, tmp_path / "large")
    assert adapter.rank == 600 and adapter.lossless_rank == 12
    assert "write it again with rank=12, which loses nothing" in adapter.serving
    assert to_peft(tiny_vlm, large, tmp_path / "small", rank=12).max_lora_rank == 16


def test_what_vllm_may_leave_out_is_pointed_out(random_llava_llama, tmp_path, caplog):
    vlm = random_llava_llama
    name = next(name for name, weight in vlm.named_parameters() if "projector" in name and weight.ndim == 2)
    change = change_of(*vlm.weight(name).shape)
    delta = Delta(
        changes={name: change},
        fingerprints=vlm.fingerprint([name]),
        model=vlm.name,
        requests=tuple({"question": text, "target": "red"} for text in TEXTS),
    )
    assert to_peft(vlm, delta, tmp_path / "projector").outside == (name,)
    (warning,) = caplog.messages
    assert name in warning and "outside the language model" in warning
    caplog.clear()
    assert to_peft(vlm, delta_of(vlm, 1), tmp_path / "text").outside == () and not caplog.messages


# --- other changes, and half precision --------------------------------------------------------------------------------


def test_a_fine_tuned_matrix_has_an_adapter_of_a_given_rank(tiny_vlm, tmp_path):
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    prompt = tiny_vlm.prompt(None, "Who won?")
    change = FineTune(layer=5, steps=8).edit(tiny_vlm, [EditRequest(question=prompt, target="Pruro")], progress=False)
    with pytest.raises(EditError, match="pass rank="):
        to_peft(tiny_vlm, change, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    adapter = to_peft(tiny_vlm, change, tmp_path / "adapter", rank=6)
    ((name, found),) = ((each, change.difference(each).double()) for each in change.fingerprints)
    u, s, v = torch.linalg.svd(found, full_matrices=False)
    tensors = load_file(adapter.folder / "adapter_model.safetensors")
    down, up = (
        tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"].double() for part in "AB"
    )
    torch.testing.assert_close(up @ down, u[:, :6] * s[:6] @ v[:6], rtol=1e-4, atol=1e-5 * float(s[0]))
    assert adapter.metric == "a plain SVD" and adapter.retained == () and adapter.worst is None
    assert adapter.shares[name] == pytest.approx(float(s[:6].square().sum() / s.square().sum()))
    assert "of the change is kept" in repr(adapter)
    whole = to_peft(tiny_vlm, change, tmp_path / "whole", rank=1000)
    adapted = with_adapters(load(tiny_vlm_path(), verify=False), whole)
    assert verify_export(tiny_vlm, change, adapted, [prompt]).holds


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_a_rank_that_is_none_is_refused_before_anything_is_written(tiny_vlm, tmp_path, rank):
    with pytest.raises(EditError, match="a whole number from 1"):
        to_peft(tiny_vlm, delta_of(tiny_vlm, 2), tmp_path / "adapter", rank=rank)
    assert not list(tmp_path.iterdir())


def test_a_history_is_composed_first(tiny_vlm, tmp_path):
    history = History().added("first", delta_of(tiny_vlm, 1))
    with pytest.raises(EditError, match=r"history\.composed\(\)"):
        to_peft(tiny_vlm, history, tmp_path / "adapter", rank=2)
    assert to_peft(tiny_vlm, history.composed(), tmp_path / "adapter", rank=2).rank == 2


def test_an_adapter_is_a_path_and_half_precision_holds_its_factors(tiny_vlm, tmp_path):
    delta = delta_of(tiny_vlm, 2)
    ((name, change),) = delta.changes.items()
    tiny = replace(change, left=change.left * 2**-30, right=change.right * 2**30)  # as a small ridge makes them
    adapter = to_peft(tiny_vlm, replace(delta, changes={name: tiny}), tmp_path / "adapter")
    assert os.fspath(adapter) == str(tmp_path / "adapter") and Path(adapter) == adapter.folder
    down, up = load_file(adapter.folder / "adapter_model.safetensors").values()
    assert torch.equal(up @ down, (tiny.left @ tiny.right))
    assert torch.isfinite(down.half()).all() and not torch.isfinite(tiny.right.half()).all()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_cast_to_the_serving_dtype_is_measured_and_undone(tiny_vlm, tmp_path, kind):
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    prompts = [tiny_vlm.prompt(None, text) for text in ("Who won?", "Who lost?")]
    request = EditRequest(question=prompts[0], target="Pruro")
    delta = MultEdit(layer=5, steps=40).edit(tiny_vlm, [request], progress=False)
    ((name, change),) = delta.changes.items()
    if kind == "adapter":
        adapter = to_peft(tiny_vlm, delta, tmp_path / "out")
        reopened = with_adapters(load(tiny_vlm_path(), verify=False), adapter)
        down, up = (
            each.bfloat16().float() for each in load_file(adapter.folder / "adapter_model.safetensors").values()
        )
        rounded = tiny_vlm.weight(name).detach() + up @ down
    else:
        reopened = load(save_merged(tiny_vlm, delta, tmp_path / "out"), verify=False)
        rounded = reopened.weight(name).detach().bfloat16().float()
    before = {each: weight.clone() for each, weight in reopened.named_parameters()}
    found = verify_export(tiny_vlm, delta, reopened, prompts, dtype="bfloat16")
    assert all(torch.equal(before[each], weight) for each, weight in reopened.named_parameters())
    plain, exported = tiny_vlm.weight(name).detach().clone(), [reopened.logits(each) for each in prompts]
    with torch.no_grad():
        tiny_vlm.weight(name).copy_(rounded)
        wanted = max((tiny_vlm.logits(a) - b).abs().max().item() for a, b in zip(prompts, exported, strict=True))
        tiny_vlm.weight(name).copy_(plain)
    assert found.cast.difference == pytest.approx(wanted, rel=1e-2) and found.cast.difference > 5 * found.difference
    assert found.cast.dtype == "bfloat16" and found.cast.stay == 2 and found.holds
    assert "rounded to bfloat16, logits move by at most" in str(found) and "2 of 2 answers stay" in str(found)
    lost = replace(found, cast=replace(found.cast, answers=(("red", "red"), ("red", "blue"))))
    assert not lost.holds and "1 of 2 answers stay" in str(lost)
    assert verify_export(tiny_vlm, delta, reopened, prompts).cast is None
    with pytest.raises(EditError, match="no dtype to serve in"):
        verify_export(tiny_vlm, delta, reopened, prompts, dtype="int8")


def test_a_cast_needs_weights_that_the_export_changed(tiny_vlm, tmp_path):
    delta, prompt = delta_of(tiny_vlm, 2), tiny_vlm.prompt(None, "Who won?")
    merged = load(save_merged(tiny_vlm, delta, tmp_path / "merged"), verify=False)
    assert verify_export(tiny_vlm, RuntimeEdit(delta=delta), merged, [prompt], dtype=torch.bfloat16).cast.difference > 0

    class Anonymous:
        applied = delta.applied

    with pytest.raises(EditError, match="names no weights"):
        verify_export(tiny_vlm, Anonymous(), merged, [prompt], dtype="bfloat16")
