"""Attention merged over segments is one softmax over all their keys, whatever kernel computes the parts."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from multrace.models.replay import (
    Kernels,
    Segment,
    Softmax,
    attention,
    merged_attention,
    portable,
    probe_kernels,
    whole_attention,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROWS, HEADS, QUERIES, SIZE = 6, 4, 5, 8
SCALE = 0.3
PORTABLE = Kernels(plain=portable, masked=portable, name="portable")
KEY_HEADS = pytest.mark.parametrize("key_heads", [4, 2, 1])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_query() -> Tensor:
    return draw(ROWS, HEADS, QUERIES, SIZE, seed=0)


def make_segments(key_heads: int = 2) -> list[Segment]:
    """Keys shared by all rows, keys of three samples of two rows each, and each row's own causal keys."""
    shapes = ((1, 7, False), (3, 4, False), (ROWS, QUERIES, True))
    return [
        Segment(
            keys=draw(sets, key_heads, count, SIZE, seed=2 * index + 1),
            values=draw(sets, key_heads, count, SIZE, seed=2 * index + 2),
            causal=causal,
        )
        for index, (sets, count, causal) in enumerate(shapes)
    ]


def one_softmax(query: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The same by torch, with every row's keys of every segment side by side and one mask."""
    keys, values, mask = side_by_side(segments)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=SCALE)


def side_by_side(segments: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor]:
    """Every row's keys and values of all segments, and what its queries see of them."""
    keys, values, masks = [], [], []
    for segment in segments:
        for parts, given in ((keys, segment.keys), (values, segment.values)):
            parts.append(given.repeat_interleave(ROWS // len(given), 0).repeat_interleave(HEADS // given.shape[1], 1))
        seen = torch.ones(QUERIES, segment.keys.shape[2], dtype=torch.bool)
        if segment.causal:
            seen = seen.tril()
        if segment.visible is not None:
            seen = seen & (segment.visible if segment.visible.ndim == 2 else segment.visible[:, None])
        masks.append(seen)
    return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, 1)


def merged(
    query: Tensor, segments: Sequence[Segment], kernels: Kernels | None = None, softmax: Softmax | None = None
) -> Tensor:
    kernels = kernels or probed(
        query, *(segments[0].keys.shape[place] for place in (1, 3)), segments[0].values.shape[3]
    )
    return merged_attention(query, segments, softmax=softmax or Softmax(scale=SCALE), kernels=kernels)


def probed(query: Tensor, key_heads: int, size: int = SIZE, value_size: int = SIZE) -> Kernels:
    sizes = {"key_heads": key_heads, "size": size, "value_size": value_size}
    return probe_kernels(device=query.device, dtype=query.dtype, heads=HEADS, **sizes)


@KEY_HEADS
@pytest.mark.parametrize("kernels", [None, PORTABLE], ids=["probed", "portable"])
def test_parts_merge_into_one_softmax(key_heads, kernels):
    query, segments = make_query(), make_segments(key_heads)
    found = merged(query, segments, kernels)
    assert torch.allclose(found, one_softmax(query, segments), rtol=0, atol=1e-13)
    for left_out in range(3):
        rest = [segment for index, segment in enumerate(segments) if index != left_out]
        assert (found - one_softmax(query, rest)).abs().max() > 0.1
    flipped = replace(segments[1], keys=segments[1].keys.flip(0))  # samples in another order than their rows
    assert (found - merged(query, [segments[0], flipped, segments[2]], kernels)).abs().max() > 0.1


@KEY_HEADS
@pytest.mark.parametrize("where", [0, 1, 2], ids=["shared", "samples", "own"])
@pytest.mark.parametrize("kernels", [None, PORTABLE], ids=["probed", "portable"])
def test_single_keys_are_hidden_from_single_queries(key_heads, where, kernels):
    query, segments = make_query(), make_segments(key_heads)
    count = segments[where].keys.shape[2]
    visible = torch.rand(QUERIES, count, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[:, 0], visible[1] = True, False  # one query sees nothing of this segment
    hidden = [*segments]
    hidden[where] = replace(segments[where], visible=visible, causal=False)
    found = merged(query, hidden, kernels)
    assert torch.allclose(found, one_softmax(query, hidden), rtol=0, atol=1e-13)
    assert (found - one_softmax(query, segments)).abs().max() > 0.1


def draw_visible(count: int) -> Tensor:
    visible = torch.rand(QUERIES, count, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[:, 0], visible[1] = True, False  # one query sees nothing of this segment
    return visible


CAP, SINKS = 0.7, draw(HEADS, seed=11)
SOFTMAXES = {
    "capped": Softmax(scale=SCALE, cap=CAP),
    "sinks": Softmax(scale=SCALE, sinks=SINKS),
    "capped, sinks": Softmax(scale=SCALE, cap=CAP, sinks=SINKS),
}


def in_words(query: Tensor, segments: Sequence[Segment], softmax: Softmax) -> Tensor:
    """Capped scores and a column for the sink, whose weight is dropped, all keys side by side."""
    keys, values, mask = side_by_side(segments)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, keys) * SCALE
    if softmax.cap is not None:
        scores = CAP * torch.tanh(scores / CAP)
    scores = scores.masked_fill(~mask, -torch.inf)
    if softmax.sinks is not None:
        scores = torch.cat([scores, SINKS[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1)[..., : keys.shape[2]], values)


@KEY_HEADS
@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("kernels", [None, PORTABLE], ids=["probed", "portable"])
def test_caps_and_sinks_merge_exactly(key_heads, name, kernels):
    query, segments, softmax = 3 * make_query(), make_segments(key_heads), SOFTMAXES[name]
    segments[0] = replace(segments[0], visible=draw_visible(7))
    single = Segment(keys=draw(ROWS, key_heads, 1, SIZE, seed=8), values=draw(ROWS, key_heads, 1, SIZE, seed=9))
    for chosen in (segments, segments[2:], [*segments, single]):
        expected = in_words(query, chosen, softmax)
        assert torch.allclose(merged(query, chosen, kernels, softmax), expected, rtol=0, atol=1e-13)
        assert (merged(query, chosen, kernels) - expected).abs().max() > 0.1
    whole = whole_attention(query, *side_by_side(segments)[:2], softmax=softmax, causal=False,
                            mask=side_by_side(segments)[2])  # fmt: skip
    assert torch.allclose(whole, in_words(query, segments, softmax), rtol=0, atol=1e-13)


def test_a_query_that_sees_nothing_but_a_sink_gets_nothing():
    query, segments, softmax = make_query(), make_segments()[:1], SOFTMAXES["sinks"]
    visible = draw_visible(7)
    segments[0] = replace(segments[0], visible=visible)
    keys, values, _ = side_by_side(segments)
    whole = whole_attention(query, keys, values, softmax=softmax, causal=False, mask=visible)
    for output in (merged(query, segments, softmax=softmax), whole, in_words(query, segments, softmax)):
        assert not output[:, :, 1].any() and bool((output[:, :, 0] != 0).all())
    without = whole_attention(query, keys, values, softmax=Softmax(scale=SCALE), causal=False, mask=visible)
    assert torch.allclose(without[:, :, 1], one_softmax(query, make_segments()[:1])[:, :, 1], rtol=0, atol=1e-13)


@KEY_HEADS
@pytest.mark.parametrize("size", [3, SIZE + 4], ids=["narrower", "wider"])
@pytest.mark.parametrize("kernels", [None, PORTABLE], ids=["probed", "portable"])
def test_values_may_have_another_size_than_keys(key_heads, size, kernels):
    query, segments = make_query(), make_segments(key_heads)
    segments[0] = replace(segments[0], visible=draw_visible(7), rows=(0, 2, 3))
    values = [draw(*each.values.shape[:3], size, seed=20 + number) for number, each in enumerate(segments)]
    segments = [replace(each, values=value) for each, value in zip(segments, values, strict=True)]
    seeing = [replace(segments[0], rows=None), *segments[1:]]
    expected = torch.where(
        torch.tensor([row in (0, 2, 3) for row in range(ROWS)])[:, None, None, None],
        one_softmax(query, seeing),
        one_softmax(query, segments[1:]),
    )
    assert expected.shape[-1] == size
    assert torch.allclose(merged(query, segments, kernels), expected, rtol=0, atol=1e-13)


def test_fused_kernels_also_serve_values_of_another_size():
    alone = probed(make_query(), 2, SIZE, SIZE + 4)
    assert alone.name == probed(make_query(), 2).name != "portable, masked portable"


def two_dead_queries() -> list[Segment]:
    segments = make_segments()
    segments[0] = replace(segments[0], visible=torch.tensor([True, False, True, True, False]))
    segments[1] = replace(segments[1], visible=torch.zeros(QUERIES, dtype=torch.bool))
    return segments


@pytest.mark.parametrize("kernels", [None, PORTABLE], ids=["probed", "portable"])
def test_queries_that_see_nothing_of_a_segment_get_nothing_of_it(kernels):
    query, segments = make_query(), two_dead_queries()
    found = merged(query, segments, kernels)
    assert torch.allclose(found, one_softmax(query, segments), rtol=0, atol=1e-13)
    assert (found - one_softmax(query, make_segments())).abs().max() > 0.1


@pytest.mark.parametrize("total", [0.0, None], ids=["zero, as a fused kernel says", "as if all were seen"])
def test_without_an_infinite_sum_for_them_the_result_is_wrong(monkeypatch, total):
    part = attention._part

    def finite(query: Tensor, segment: Segment, softmax: Softmax, kernels: Kernels) -> tuple[Tensor, Tensor]:
        output, sums = part(query, segment if total is not None else replace(segment, visible=None), softmax, kernels)
        return output, sums if total is None else sums.masked_fill(sums == -torch.inf, total)

    monkeypatch.setattr(attention, "_part", finite)
    query, segments = make_query(), two_dead_queries()
    assert (merged(query, segments) - one_softmax(query, segments)).abs().max() > 0.1


def test_segments_without_keys_are_left_out():
    query, segments = make_query(), make_segments()
    empty = Segment(keys=torch.zeros(1, 2, 0, SIZE).double(), values=torch.zeros(1, 2, 0, SIZE).double())
    assert torch.equal(merged(query, [empty, *segments]), merged(query, segments))
    assert torch.equal(merged(query, [empty, segments[2]]), merged(query, segments[2:]))


def test_large_scores_do_not_overflow():
    query, segments = 1e4 * make_query(), make_segments()
    found = merged(query, segments)
    assert found.isfinite().all()
    assert torch.allclose(found, one_softmax(query, segments), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)])
@pytest.mark.parametrize("kernels", [None, PORTABLE], ids=["probed", "portable"])
def test_half_precision_is_as_good_as_its_roundings(dtype, tolerance, kernels):
    query, segments = make_query().to(dtype), make_segments()
    segments = [replace(each, keys=each.keys.to(dtype), values=each.values.to(dtype)) for each in segments]
    wide = [replace(each, keys=each.keys.double(), values=each.values.double()) for each in segments]
    found = merged(query, segments, kernels)
    assert found.dtype == dtype
    assert (found.double() - one_softmax(query.double(), wide)).abs().max() < tolerance
    assert (found.double() - one_softmax(query.double(), wide[1:])).abs().max() > 5 * tolerance


def off_by_little(*arguments) -> tuple[Tensor, Tensor]:
    output, total = portable(*arguments)
    return output + 1e-3, total


def other_logarithm(*arguments) -> tuple[Tensor, Tensor]:
    output, total = portable(*arguments)
    return output, total / torch.log(torch.tensor(2.0, dtype=torch.float64))


def no_numbers(*arguments) -> tuple[Tensor, Tensor]:
    output, total = portable(*arguments)
    return output * torch.nan, total


def not_there(*_arguments) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("no kernel for this device")


def blind_to_masks(query, keys, values, scale, causal, _mask) -> tuple[Tensor, Tensor]:
    return portable(query, keys, values, scale, causal, None)


def blind_to_causality(query, keys, values, scale, _causal, mask) -> tuple[Tensor, Tensor]:
    return portable(query, keys, values, scale, False, mask)


def as_portable(*arguments) -> tuple[Tensor, Tensor]:
    return portable(*arguments)


@pytest.mark.parametrize(
    ("broken", "plain", "masked"),
    [
        (off_by_little, False, False),
        (other_logarithm, False, False),
        (no_numbers, False, False),
        (not_there, False, False),
        (blind_to_masks, True, False),
        (blind_to_causality, False, True),
        (as_portable, True, True),
    ],
)
def test_a_kernel_is_used_only_for_what_it_computes_rightly(monkeypatch, broken, plain, masked):
    monkeypatch.setitem(attention._FUSED, "cpu", (("first", broken),))
    alone = probed(make_query(), 2)
    assert (alone.plain is broken, alone.masked is broken) == (plain, masked)
    assert (alone.plain is portable, alone.masked is portable) == (not plain, not masked)
    assert alone.name == f"{'first' if plain else 'portable'}, masked {'first' if masked else 'portable'}"
    monkeypatch.setitem(attention._FUSED, "cpu", (("first", broken), ("second", as_portable)))
    assert probed(make_query(), 2).plain is (broken if plain else as_portable)
    segments = make_segments()
    assert torch.allclose(merged(make_query(), segments), one_softmax(make_query(), segments), rtol=0, atol=1e-13)


def test_a_device_without_kernels_gets_the_portable_one(monkeypatch):
    monkeypatch.setattr(attention, "_FUSED", {})
    assert probed(make_query(), 2) == Kernels(plain=portable, masked=portable, name="portable, masked portable")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("at_once", [1, ROWS * HEADS * QUERIES * 2, 2**25], ids=["one query", "two", "all"])
def test_the_portable_kernel_holds_few_scores_at_a_time(monkeypatch, at_once, causal):
    sizes, block = [], attention._portable_block

    def watched(query: Tensor, keys: Tensor, *rest) -> tuple[Tensor, Tensor]:
        sizes.append(query.shape[2])
        return block(query, keys, *rest)

    query, keys, values = make_query(), draw(ROWS, 2, QUERIES, SIZE, seed=1), draw(ROWS, 2, QUERIES, SIZE, seed=2)
    mask = None if causal else torch.rand(QUERIES, QUERIES, generator=torch.Generator().manual_seed(5)) < 0.6
    whole = portable(query, keys, values, SCALE, causal, mask)
    monkeypatch.setattr(attention, "_portable_block", watched)
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", at_once)
    chunked = portable(query, keys, values, SCALE, causal, mask)
    assert sizes == {1: [1] * 5, ROWS * HEADS * QUERIES * 2: [2, 2, 1], 2**25: [5]}[at_once]
    assert all(torch.allclose(each, other, rtol=0, atol=1e-14) for each, other in zip(chunked, whole, strict=True))


def leaves(segments: Sequence[Segment]) -> list[Tensor]:
    return [each for segment in segments for each in (segment.keys, segment.values)]


def with_leaves(segments: Sequence[Segment], tensors: Sequence[Tensor]) -> list[Segment]:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [replace(each, keys=keys, values=values) for each, (keys, values) in zip(segments, pairs, strict=True)]


def gradients(attend, segments: Sequence[Segment]) -> list[Tensor]:
    given = [each.clone().requires_grad_() for each in (make_query(), *leaves(segments))]
    weights = draw(ROWS, HEADS, QUERIES, SIZE, seed=9)
    return list(torch.autograd.grad((weights * attend(given[0], with_leaves(segments, given[1:]))).sum(), given))


@KEY_HEADS
def test_gradients_are_those_of_one_softmax(key_heads):
    segments = make_segments(key_heads)
    visible = torch.rand(QUERIES, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    segments[0] = replace(segments[0], visible=visible)
    expected = gradients(one_softmax, segments)
    for found, wanted in zip(gradients(merged, segments), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
        assert wanted.abs().max() > 0.1


def test_gradients_of_parts_without_their_sums_are_wrong(monkeypatch):
    def detached(*arguments) -> tuple[Tensor, Tensor]:  # as fused kernels give them
        output, total = portable(*arguments)
        return output, total.detach()

    expected = gradients(one_softmax, make_segments())
    monkeypatch.setattr(attention, "portable", detached)
    assert (gradients(merged, make_segments())[0] - expected[0]).abs().max() > 0.1


def test_gradients_agree_with_finite_differences():
    segments = [replace(each, keys=each.keys[..., :2, :], values=each.values[..., :2, :]) for each in make_segments()]
    segments[2] = replace(segments[2], causal=False)
    given = [each.clone().requires_grad_() for each in (make_query()[:, :, :2], *leaves(segments))]
    assert torch.autograd.gradcheck(
        lambda query, *tensors: merged(query, with_leaves(segments, tensors), PORTABLE), given, fast_mode=True
    )


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["query", "keys", "values"])
def test_fused_kernels_are_left_alone_where_gradients_are_wanted(wanted):
    def forbidden(*_arguments) -> tuple[Tensor, Tensor]:
        raise AssertionError("a fused kernel was called")

    segments = make_segments()[:1]
    given = [make_query(), *leaves(segments)]
    given[wanted].requires_grad_()
    kernels = Kernels(plain=forbidden, masked=forbidden, name="forbidden")
    output = merged(given[0], with_leaves(segments, given[1:]), kernels)
    assert torch.autograd.grad(output.sum(), given[wanted])[0].abs().max() > 1e-3
    with torch.no_grad(), pytest.raises(AssertionError, match="a fused kernel"):
        merged(given[0], with_leaves(segments, given[1:]), kernels)
