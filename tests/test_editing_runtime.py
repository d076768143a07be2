"""Side-cars: what rounding takes from an edit in half precision is there beside the weights, and gone afterwards."""

from dataclasses import replace

import pytest
import torch
from multrace.editing import Delta, EditError, WeightChange
from multrace.editing.changes import RuntimeEdit
from multrace.models import VisionLanguageModel, load
from torch import Tensor

LAYER = 1
SMALL = {"bfloat16": 1.2e-2, "float16": 1.5e-3}  # of the output: a few steps of it, but not one step of the weights


def made(vlm: VisionLanguageModel, *, size: float) -> Delta:
    """A delta that adds residuals of `size` times the present outputs at three keys, exactly."""
    projection, generator = vlm.down_projection(LAYER), torch.Generator().manual_seed(0)
    keys = torch.randn(3, projection.width, generator=generator).to(vlm.dtype).float()
    weight = projection.weight.detach().float()
    outputs = keys @ (weight if projection.transposed else weight.T)
    residuals = size * outputs.abs() * torch.randn(outputs.shape, generator=generator).sign()
    left = torch.linalg.solve(keys @ keys.T, residuals).T
    change = WeightChange(left=left, right=keys, keys=keys, residuals=residuals)
    return Delta(changes={projection.name: change}, fingerprints=vlm.fingerprint([projection.name]), model=vlm.name)


def logits(vlm: VisionLanguageModel) -> Tensor:
    with torch.no_grad():
        return vlm.logits(vlm.prompt(None, "What is this?"))


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


@pytest.mark.parametrize("dtype", SMALL)
def test_a_side_car_realises_what_rounding_the_weights_loses(dtype, tiny_vlm):
    vlm = load(tiny_vlm.name, dtype=dtype, verify=False)
    weights, delta = bits(vlm), made(vlm, size=SMALL[dtype])
    (rounded,), (beside,) = delta.retained(vlm).values(), RuntimeEdit(delta=delta).retained(vlm).values()
    torch.testing.assert_close(beside, torch.ones(3), rtol=0, atol=0.1)
    assert (rounded < 0.5).all()
    assert bits(vlm) == weights


def test_in_float32_beside_the_weights_is_as_in_them(random_vlm):
    vlm = random_vlm
    delta, before, weights = made(vlm, size=0.5), logits(vlm), bits(vlm)
    with delta.applied(vlm):
        wanted = logits(vlm)
    with RuntimeEdit(delta=delta).applied(vlm) as edited:
        assert edited is vlm and bits(vlm) == weights
        found = logits(vlm)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - before).abs().max() > 0.01
    assert torch.equal(logits(vlm), before)
    (share,) = RuntimeEdit(delta=delta).retained(vlm).values()
    torch.testing.assert_close(share, torch.ones(3), rtol=0, atol=1e-4)


def test_refusals_leave_no_hook(random_llama, random_gpt2):
    delta = made(random_llama, size=0.5)
    stranger = load(random_llama.name, verify=False)
    with torch.no_grad():
        stranger.weight(stranger.down_projection(LAYER).name)[0, 0] += 1
    for other, message in ((random_gpt2, "does not fit"), (stranger, "another model, precision or quantisation")):
        before = logits(other)
        with pytest.raises(EditError, match=message), RuntimeEdit(delta=delta).applied(other):
            pass
        assert torch.equal(logits(other), before)
    before = logits(random_llama)
    with pytest.raises(RuntimeError, match="on purpose"), RuntimeEdit(delta=delta).applied(random_llama):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(random_llama), before)
    assert not random_llama.down_projection(LAYER).module._forward_hooks
    with RuntimeEdit(delta=replace(delta, model="other name")).applied(stranger, on_other_weights=True):
        assert not torch.equal(logits(stranger), before)
