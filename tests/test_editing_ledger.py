"""Ledgers: in order and back bit by bit, any edit dropped, the later ones solved anew, saved whole, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multrace.editing import Delta, EditError, WeightChange
from multrace.editing.changes import Ledger, load_edit
from multrace.models import VisionLanguageModel, load
from safetensors.torch import save_file
from torch import Tensor

LAYER = 1


def solved(keys: Tensor, residuals: Tensor) -> Tensor:
    """The dense least-squares change at a ridge of one, in plain form and float64."""
    keys, residuals = keys.double(), residuals.double()
    return residuals.T @ torch.linalg.inv(keys @ keys.T + torch.eye(len(keys), dtype=torch.float64)) @ keys


def made(vlm: VisionLanguageModel, seed: int, *, layer: int = LAYER, count: int = 2, size: float = 1.0) -> Delta:
    """A delta for the model's present weights: one key for each request, random residuals, and one preserved key."""
    projection, generator = vlm.down_projection(layer), torch.Generator().manual_seed(seed)
    owners = torch.tensor([*range(count), -1])
    common = torch.randn(projection.width, generator=torch.Generator().manual_seed(99))  # makes edits meet each other
    keys = 0.3 * torch.randn(count + 1, projection.width, generator=generator) + 0.1 * common
    residuals = size * torch.randn(count + 1, projection.hidden, generator=generator) * (owners >= 0)[:, None]
    left = torch.linalg.solve(
        keys.double() @ keys.double().T + torch.eye(count + 1, dtype=torch.float64), residuals.double()
    ).T.float()
    parts = {"keys": keys, "residuals": residuals, "weights": torch.ones(count + 1), "owners": owners}
    return Delta(
        changes={projection.name: WeightChange(left=left, right=keys, **parts)},
        fingerprints=vlm.fingerprint([projection.name]),
        model=vlm.name,
        settings={"editor": "by hand", "seed": str(seed)},
        requests=tuple({"question": f"{seed}.{index}", "target": "red"} for index in range(count)),
    )


def dense(delta: Delta) -> Tensor:
    ((left, right),) = delta.factors.values()
    return left.double() @ right.double()


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


def in_turn(vlm: VisionLanguageModel, count: int = 3) -> Ledger:
    """Edits a, b, c, each made with the ones before in place; the model ends unedited."""
    ledger = Ledger()
    for seed, name in enumerate("abcdef"[:count]):
        if ledger.entries:
            with ledger.applied(vlm):
                ledger = ledger.added(name, made(vlm, seed))
        else:
            ledger = ledger.added(name, made(vlm, seed))
    return ledger


@pytest.fixture
def vlm(random_vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Each family in turn."""
    return random_vlm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_edits_go_on_in_order_and_come_off_bit_by_bit_in_every_dtype(dtype, random_llava_llama):
    vlm = load(random_llava_llama.name)
    vlm.model.to(dtype)
    weights, ledger = bits(vlm), in_turn(vlm)
    a, b, c = (entry.delta for entry in ledger.entries)
    with a.applied(vlm), b.applied(vlm), c.applied(vlm):
        wanted = bits(vlm)
    handle = ledger.apply(vlm)
    assert bits(vlm) == wanted != weights
    handle.undo()
    with ledger.applied(vlm):
        assert bits(vlm) == wanted
    assert bits(vlm) == weights


def test_dropping_one_of_many_equals_applying_the_others(vlm):
    weights, ledger = bits(vlm), in_turn(vlm)
    less = ledger.without("b")
    assert ledger.names == ("a", "b", "c") and less.names == ("a", "c")
    a, _b, c = (entry.delta for entry in ledger.entries)
    with a.applied(vlm), c.applied(vlm, on_other_weights=True):
        wanted = bits(vlm)
    with less.applied(vlm):
        assert bits(vlm) == wanted
    with ledger.applied(vlm):
        assert bits(vlm) != wanted
    some = ledger.without("b", request=1)
    with a.applied(vlm), ledger.entries[1].delta.without(1).applied(vlm), c.applied(vlm, on_other_weights=True):
        wanted = bits(vlm)
    with some.applied(vlm):
        assert bits(vlm) == wanted
    assert bits(vlm) == weights


def from_the_start(ledger: Ledger, kept: dict[str, list[int]]) -> Tensor:
    """The dense sum of edits solved in order in float64 for these rows only, each to the output it first asked for."""
    total = old = torch.zeros(())
    for entry in ledger.entries:
        (change,) = entry.delta.changes.values()
        rows = kept.get(entry.name, [])
        keys, residuals = change.keys[rows].double(), change.residuals[rows].double()
        asked = residuals.any(-1, keepdim=True)
        # z = (W + old) k + r is what is wanted; W + total is what is there
        wanted = residuals + asked * (keys @ (old - total).T if old.ndim else 0)
        total = total + solved(keys, wanted) if rows else total
        old = old + dense(entry.delta)
    return total


DROPS = {
    "the first": ({"a": None}, {"b": [0, 1, 2], "c": [0, 1, 2]}),
    "the one between": ({"b": None}, {"a": [0, 1, 2], "c": [0, 1, 2]}),
    "a request of the first": ({"a": 0}, {"a": [1, 2], "b": [0, 1, 2], "c": [0, 1, 2]}),
    "two of them": ({"a": None, "b": 1}, {"b": [0, 2], "c": [0, 1, 2]}),
}


@pytest.mark.parametrize(("dropped", "kept"), DROPS.values(), ids=DROPS)
def test_resolving_equals_solving_the_remaining_from_the_start(dropped, kept, random_llava_llama):
    vlm = random_llava_llama
    ledger = less = in_turn(vlm)
    for name, request in dropped.items():
        less = less.without(name, request=request)
    wanted, anew = from_the_start(ledger, kept), less.resolved()
    scale = wanted.abs().max()
    assert (dense(anew.composed()) - wanted).abs().max() < 2e-6 * scale
    assert (dense(less.composed()) - wanted).abs().max() > 1e-2 * scale
    assert anew.names == less.names and not any(entry.withdrawn or entry.dropped for entry in anew.entries)
    before, whole = vlm.weight(vlm.down_projection(LAYER).name).detach().clone(), bits(vlm)
    with anew.applied(vlm):
        torch.testing.assert_close(
            (vlm.weight(vlm.down_projection(LAYER).name) - before).double(), wanted, rtol=0, atol=1e-6
        )
    assert bits(vlm) == whole
    assert dense(anew.resolved().composed()).equal(dense(anew.composed()))


def test_an_edit_made_while_part_of_another_was_out_is_solved_anew_for_that(random_llava_llama):
    vlm = random_llava_llama
    ledger = Ledger().added("a", made(vlm, 0)).without("a", request=0)
    with ledger.applied(vlm):
        ledger = ledger.added("b", made(vlm, 1))
    a, b = (entry.delta for entry in ledger.entries)
    (rest, last) = (next(iter(each.changes.values())) for each in (a.without(0), b))
    anew = ledger.resolved()
    first = solved(rest.keys, rest.residuals)
    asked = last.residuals.any(-1, keepdim=True)
    wanted = first + solved(last.keys, last.residuals + asked * (last.keys.double() @ (dense(a.without(0)) - first).T))
    assert (dense(anew.composed()) - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_edits_made_side_by_side_are_left_as_they_are_by_resolving(random_llama):
    ledger = Ledger().added("a", made(random_llama, 0)).added("b", made(random_llama, 1))
    anew = ledger.without("a").resolved()
    assert anew.entries == ledger.entries[1:]


def test_resolving_over_several_weights_is_refused(random_llama):
    vlm = random_llama
    ledger = Ledger().added("a", made(vlm, 0))
    with ledger.applied(vlm):
        both = Ledger().added("low", made(vlm, 2, layer=0)).composed()
        wide = replace(
            both,
            changes=dict(both.changes) | dict(made(vlm, 1).changes),
            fingerprints=dict(both.fingerprints) | dict(made(vlm, 1).fingerprints),
        )
    two = ledger.added("b", wide).without("a")
    with pytest.raises(EditError, match="edit again from the requests"):
        two.resolved()
    assert two.composed().changes.keys() == wide.changes.keys()


def test_verifying_says_which_edits_are_as_made_and_what_they_achieve(random_llava_llama):
    vlm = random_llava_llama
    weights, ledger = bits(vlm), in_turn(vlm)
    found = ledger.verify(vlm)
    assert [each.name for each in found] == ["a", "b", "c"] and all(each.as_made for each in found)
    ((_, share),) = found[0].retained.items()
    assert share.shape == (3,) and (share > 0.5).all()
    assert [each.as_made for each in ledger.without("a").verify(vlm)] == [False, False]
    assert bits(vlm) == weights


def test_a_ledger_in_a_file_is_the_same_ledger(vlm, tmp_path):
    ledger = in_turn(vlm).without("c").without("b", request=1)
    path = ledger.save(tmp_path / "new" / "ledger.safetensors")
    again = load_edit(path)
    assert isinstance(again, Ledger) and again.listing == ledger.listing and again.base == ledger.base
    for one, other in zip(ledger.entries, again.entries, strict=True):
        assert (one.name, one.after, one.withdrawn, one.dropped) == (
            other.name,
            other.after,
            other.withdrawn,
            other.dropped,
        )
        assert one.delta.words() == other.delta.words()
        assert all(torch.equal(value, other.delta.tensors()[name]) for name, value in one.delta.tensors().items())
    assert [file.name for file in path.parent.iterdir()] == ["ledger.safetensors"]
    weights = vlm.down_projection(LAYER).name
    assert ledger.listing.splitlines() == [
        f"a  2 requests  {weights}  whole",
        f"b  1 requests  {weights}  without 1",
        f"c  2 requests  {weights}  taken out",
    ]
    assert isinstance(load_edit(ledger.composed().save(tmp_path / "delta.safetensors")), Delta)


@pytest.mark.parametrize("kind", ["truncated", "a part is missing", "a field is missing", "a delta", "no entries"])
def test_a_file_that_is_no_ledger_is_one_error_that_names_it(kind, random_llama, tmp_path):
    good, bad = in_turn(random_llama, 2).save(tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    write_bad(kind, good, bad, random_llama)
    with pytest.raises(EditError, match="bad.safetensors"):
        Ledger.load(bad)


def write_bad(kind: str, good: Path, bad: Path, vlm: VisionLanguageModel) -> None:
    header = {"format": "multrace ledger 1", "base": "{}"}
    words = '[{"name": "a", "after": {}, "withdrawn": [], "dropped": false, "delta": {"fingerprints": {"w": "0"}}}]'
    if kind == "truncated":
        bad.write_bytes(good.read_bytes()[:-100])
    elif kind == "a part is missing":
        save_file({"0:left:w": torch.ones(2, 1)}, bad, metadata=header | {"entries": words})
    elif kind == "a field is missing":
        save_file({}, bad, metadata=header | {"entries": words.replace('"dropped": false, ', "")})
    elif kind == "a delta":
        made(vlm, 0).save(bad)
    else:
        save_file({}, bad, metadata=header)


def test_refusals_change_nothing(random_llama, random_gpt2, random_llava_llama):
    vlm, ledger = random_llama, in_turn(random_llama, 2)
    for other in (random_gpt2, random_llava_llama):
        weights = bits(other)
        with pytest.raises(EditError, match="does not fit"):
            ledger.apply(other)
        assert bits(other) == weights
    stranger = load(vlm.name)
    with torch.no_grad():
        stranger.weight(stranger.down_projection(LAYER).name)[0, 0] += 1
    weights = bits(stranger)
    for use in (ledger.apply, ledger.verify):
        with pytest.raises(EditError, match="another model or precision"):
            use(stranger)
    with pytest.raises(EditError, match="keep a ledger for each model"):
        ledger.added("c", replace(made(stranger, 3), model="another"))
    assert bits(stranger) == weights
    huge = ledger.added("c", made(vlm, 3, size=1e37)).added("d", made(vlm, 4, size=1e37))
    changes = {name: replace(each, right=each.right * 1e3) for name, each in huge.entries[2].delta.changes.items()}
    overflowing = ledger.added("c", replace(huge.entries[2].delta, changes=changes))
    weights = bits(vlm)
    with pytest.raises(EditError, match="overflows"):
        overflowing.apply(vlm)
    assert bits(vlm) == weights


BAD_USES = {
    "a name twice": (lambda ledger: ledger.added("a", ledger.entries[0].delta), "have one name"),
    "a name that is not there": (lambda ledger: ledger.without("z"), "there are: a, b"),
    "dropped twice": (lambda ledger: ledger.without("a").without("a"), "there are: b"),
    "a request out of range": (lambda ledger: ledger.without("a", request=5), "it has 2 requests"),
    "a request twice": (lambda ledger: ledger.without("a", request=0).without("a", request=0), "already taken out"),
    "nothing left to compose": (lambda ledger: ledger.without("a").without("b").composed(), "no edit is in effect"),
}


@pytest.mark.parametrize(("use", "message"), BAD_USES.values(), ids=BAD_USES)
def test_what_cannot_be_done_with_a_ledger_is_an_error(use, message, random_llama):
    with pytest.raises(EditError, match=message):
        use(in_turn(random_llama, 2))
