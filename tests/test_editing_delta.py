"""Deltas: bit-exact undo in every way out, stacking, orientation, precision, and refusals."""

import pytest
import torch
from multrace.editing import Delta, EditError, WeightChange
from multrace.models import VisionLanguageModel, load
from torch import Tensor

QUESTION = "What is this?"


def made_by_hand(vlm: VisionLanguageModel, layer: int = 1, *, rank: int = 2, size: float = 0.1, seed: int = 0) -> Delta:
    """A delta with random factors on one down projection."""
    projection, generator = vlm.down_projection(layer), torch.Generator().manual_seed(seed)
    left = size * torch.randn(projection.hidden, rank, generator=generator)
    right = torch.randn(rank, projection.width, generator=generator)
    change = WeightChange(left=left, right=right, keys=right, residuals=(left @ (right @ right.T)).T)
    prints = vlm.fingerprint([projection.name])
    return Delta(changes={projection.name: change}, fingerprints=prints, model=vlm.name, requests=({"target": "Ünï"},))


def logits(vlm: VisionLanguageModel) -> Tensor:
    with torch.no_grad():
        return vlm.logits(vlm.prompt(None, QUESTION))


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    """A hash of every weight of the model."""
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


@pytest.fixture
def vlm(random_vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Each family in turn."""
    return random_vlm


def test_inside_it_changes_the_logits_and_after_it_every_bit_is_back(vlm):
    before, weights, delta = logits(vlm), bits(vlm), made_by_hand(vlm)
    with delta.applied(vlm) as edited:
        assert edited is vlm
        assert not torch.equal(logits(vlm), before)
        changed = {name for name, digest in bits(vlm).items() if digest != weights[name]}
        assert changed == {vlm.down_projection(1).name}
    assert bits(vlm) == weights
    assert torch.equal(logits(vlm), before)


def test_the_change_is_left_times_right_in_the_orientation_of_the_weight(vlm):
    delta, projection = made_by_hand(vlm), vlm.down_projection(1)
    (left, right), key = delta.factors[projection.name], torch.randn(projection.width)
    with torch.no_grad():
        before = projection.module(key[None])[0]
        with delta.applied(vlm):
            after = projection.module(key[None])[0]
    torch.testing.assert_close(after - before, left @ (right @ key), rtol=1e-3, atol=1e-4)


def test_a_square_weight_stored_transposed_is_changed_the_right_way_round(random_gpt2):
    vlm = random_gpt2
    projection = vlm.addresses.attention_projection(0)
    assert projection.transposed and projection.hidden == projection.width
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(projection.hidden, 1, generator=generator),
        torch.randn(1, projection.width, generator=generator),
    )
    change = WeightChange(left=left, right=right, keys=right, residuals=left.T)
    delta = Delta(changes={projection.name: change}, fingerprints=vlm.fingerprint([projection.name]), model=vlm.name)
    with torch.no_grad(), delta.applied(vlm):
        torch.testing.assert_close(
            projection.module(right) - projection.module(0 * right), right @ (projection.weight.detach())
        )
        moved = projection.module(right)
    torch.testing.assert_close(moved - projection.module(right), (left * right.square().sum()).T, rtol=1e-3, atol=1e-3)


def test_one_delta_may_change_several_weights(vlm):
    weights, parts = bits(vlm), [made_by_hand(vlm, layer) for layer in (0, 2)]
    both = Delta(
        changes={name: change for part in parts for name, change in part.changes.items()},
        fingerprints={name: digest for part in parts for name, digest in part.fingerprints.items()},
        model=vlm.name,
    )
    with parts[0].applied(vlm), parts[1].applied(vlm):
        one_by_one = bits(vlm)
    handle = both.apply(vlm)
    assert bits(vlm) == one_by_one != weights
    handle.undo()
    assert bits(vlm) == weights


def test_an_interruption_while_applying_leaves_nothing_behind(random_llama, monkeypatch):
    weights, delta, calls = bits(random_llama), made_by_hand(random_llama), []
    hashing = VisionLanguageModel.fingerprint

    def interrupted(vlm: VisionLanguageModel, names: list[str]) -> dict[str, str]:
        calls.append(hashing(vlm, names))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return calls[0]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(VisionLanguageModel, "fingerprint", interrupted)
        delta.apply(random_llama)
    assert calls[1] != calls[0]  # the weight had been changed by then
    assert bits(random_llama) == weights


def test_an_error_inside_leaves_nothing_behind(random_llava_llama):
    vlm, weights = random_llava_llama, bits(random_llava_llama)
    with pytest.raises(RuntimeError, match="on purpose"), made_by_hand(vlm).applied(vlm):
        assert bits(vlm) != weights
        raise RuntimeError("on purpose")
    assert bits(vlm) == weights


def test_undo_is_bit_exact_in_bfloat16_where_subtracting_is_not(random_llava_llama):
    vlm = load(random_llava_llama.name, dtype="bfloat16")
    assert vlm.dtype is torch.bfloat16
    before, weights, delta, projection = logits(vlm), bits(vlm), made_by_hand(vlm), vlm.down_projection(1)
    with delta.applied(vlm):
        assert not torch.equal(logits(vlm), before)
        left, right = delta.factors[projection.name]
        subtracted = (projection.weight.float() - left @ right).to(torch.bfloat16)
    assert bits(vlm) == weights
    assert torch.equal(logits(vlm), before)
    assert not torch.equal(subtracted, projection.weight)


def test_the_sum_is_rounded_once(random_llava_llama):
    vlm = load(random_llava_llama.name, dtype="bfloat16")
    delta, weight = made_by_hand(vlm, size=1e-3), vlm.down_projection(1).weight
    left, right = delta.factors[vlm.down_projection(1).name]
    wanted = (weight.double() + left.double() @ right.double()).to(torch.bfloat16)
    with delta.applied(vlm):
        assert (weight == wanted).float().mean() > 0.999  # ties between two neighbours may fall either way


def test_handles_on_one_weight_are_undone_in_reverse_order_and_no_other(random_llama):
    vlm, weights = random_llama, bits(random_llama)
    first = made_by_hand(vlm).apply(vlm)
    middle = bits(vlm)
    second = made_by_hand(vlm, seed=1).apply(vlm)  # made on the edited weights, so it fits them
    with pytest.raises(EditError, match="undo the later change first"):
        first.undo()
    second.undo()
    assert bits(vlm) == middle != weights
    first.undo()
    assert bits(vlm) == weights
    with pytest.raises(EditError, match="already undone"):
        first.undo()


def test_handles_on_different_weights_are_undone_in_any_order(random_llama):
    vlm, weights = random_llama, bits(random_llama)
    one, other = made_by_hand(vlm, 0), made_by_hand(vlm, 1)
    with other.applied(vlm):
        alone = bits(vlm)
    first, second = one.apply(vlm), other.apply(vlm)
    first.undo()
    assert bits(vlm) == alone
    second.undo()
    assert bits(vlm) == weights


def test_deltas_made_on_the_same_weights_stack_only_when_asked(random_llama):
    vlm, weights = random_llama, bits(random_llama)
    one, other = made_by_hand(vlm, seed=0), made_by_hand(vlm, seed=1)
    with one.applied(vlm):
        inside = bits(vlm)
        with pytest.raises(EditError, match="on_other_weights=True"):
            other.apply(vlm)
        assert bits(vlm) == inside
        with other.applied(vlm, on_other_weights=True):
            assert bits(vlm) not in (inside, weights)
        assert bits(vlm) == inside
    assert bits(vlm) == weights


def test_a_block_takes_back_what_was_left_applied_inside(random_llama):
    vlm, weights = random_llama, bits(random_llama)
    with made_by_hand(vlm).applied(vlm):
        forgotten = made_by_hand(vlm, seed=1).apply(vlm)
    assert bits(vlm) == weights
    with pytest.raises(EditError, match="undo the later change first"):
        forgotten.undo()


def test_a_change_of_nothing_leaves_the_bits(vlm):
    weights = bits(vlm)
    with made_by_hand(vlm, size=0.0).applied(vlm):
        assert bits(vlm) == weights
    with made_by_hand(vlm, size=1e-3).applied(vlm):
        assert bits(vlm) != weights


def test_realised_share_is_all_in_float32_and_less_in_low_precision(random_llava_llama):
    low = load(random_llava_llama.name, dtype="bfloat16")
    shares = [
        next(iter(made_by_hand(m, rank=1, size=1e-6).realised(m).values())).item() for m in (random_llava_llama, low)
    ]
    assert shares[0] == pytest.approx(1, abs=0.05)
    assert shares[1] < 0.5
    nothing = made_by_hand(low, size=0.0)
    assert torch.equal(next(iter(nothing.realised(low).values())), torch.ones(2))


def test_another_model_is_refused_and_left_alone(random_llava_llama, random_llama, random_gpt2):
    delta = made_by_hand(random_llava_llama)
    name = random_llava_llama.down_projection(1).name
    for other in (random_llama, random_gpt2):
        weights = bits(other)
        with pytest.raises(EditError, match="does not fit"):
            delta.apply(other)
        assert bits(other) == weights
    stranger = load(random_llava_llama.name)
    with torch.no_grad():
        stranger.weight(name)[0, 0] += 1
    weights = bits(stranger)
    for use in (delta.apply, delta.realised):
        with pytest.raises(EditError, match="another model or precision"):
            use(stranger)
    assert bits(stranger) == weights
    delta.apply(stranger, on_other_weights=True).undo()
    assert bits(stranger) == weights


def test_another_shape_is_refused(random_llama):
    delta = made_by_hand(random_llama)
    ((name, change),) = delta.changes.items()
    small = WeightChange(
        left=change.left, right=change.right[:, 1:], keys=change.keys[:, 1:], residuals=change.residuals
    )
    wrong = Delta(changes={name: small}, fingerprints=delta.fingerprints, model="another")
    with pytest.raises(EditError, match="of shape"):
        wrong.apply(random_llama, on_other_weights=True)


def test_an_overflow_is_refused_before_anything_changed(random_llava_llama):
    vlm = load(random_llava_llama.name, dtype="float16")
    weights = bits(vlm)
    with pytest.raises(EditError, match="overflows"):
        made_by_hand(vlm, size=1e6).apply(vlm)
    assert bits(vlm) == weights


def test_parts_that_do_not_fit_together_are_refused():
    parts = {
        "left": torch.ones(4, 1),
        "right": torch.ones(1, 6),
        "keys": torch.ones(1, 6),
        "residuals": torch.ones(1, 4),
    }
    WeightChange(**parts)
    for wrong in ({"left": torch.ones(4, 2)}, {"keys": torch.ones(1, 5)}, {"residuals": torch.ones(2, 4)}):
        with pytest.raises(EditError, match="do not fit together"):
            WeightChange(**(parts | wrong))
    with pytest.raises(EditError, match="float32"):
        WeightChange(**(parts | {"left": torch.ones(4, 1).double()}))
    with pytest.raises(EditError, match="one fingerprint per changed weight"):
        Delta(changes={"w": WeightChange(**parts)}, fingerprints={}, model="m")
