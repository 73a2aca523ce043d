"""Attention in blocks of queries against PyTorch's own, in float64, and its rounding in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danlu.nn.attention import blocked, document_mask, masked_attention
from danlu.nn.attention.blocked import blocked_attention
from danlu.nn.attention.masks import attention_under


def inputs(
    batch: int, heads: int, groups: int, time: int, size: int, value: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Queries, keys, values and an upstream gradient in the memory order that a projection gives."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((heads, size), (groups, size), (groups, value), (heads, value))
    return tuple(
        torch.randn(batch, time, *shape, generator=draw, dtype=torch.float64).to(dtype).transpose(1, 2)
        for shape in shapes
    )


def with_gradients(attend: object, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = attend(*leaves)  # type: ignore[operator]
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def reference(causal: bool, scale: float) -> object:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


def ours(causal: bool, scale: float) -> object:
    return lambda q, k, v: blocked_attention(q, k, v, causal=causal, scale=scale)


@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    time=st.sampled_from([1, 2, 63, 64, 65, 131, 577]),
    size=st.sampled_from([1, 5, 16]),
    causal=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_output_and_gradients_are_those_of_pytorchs_attention_whatever_the_sizes(
    batch: int, groups: int, repeats: int, time: int, size: int, causal: bool
) -> None:
    given_ = inputs(batch, groups * repeats, groups, time, size, 7)
    found = with_gradients(ours(causal, 0.3), *given_)
    for a, b in zip(found, with_gradients(reference(causal, 0.3), *given_), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("time", [16, 17, 200])
def test_weights_that_are_kept_and_weights_that_are_formed_again_give_the_same_gradients(time: int) -> None:
    # Four times the head size (of one head and its group) is where they begin to be formed again: 8 * 2 = 16.
    given_ = inputs(2, 3, 3, time, 2, 5)
    found = with_gradients(ours(True, 0.7), *given_)
    for a, b in zip(found, with_gradients(reference(True, 0.7), *given_), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_long_sequences_keep_nothing_of_the_size_of_their_square() -> None:
    time, block = 1536, 192
    q, k, v, _ = inputs(1, 1, 1, time, 8, 8, dtype=torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        blocked_attention(q.requires_grad_(), k, v, causal=True, scale=1.0)
    # queries, keys, values, output, one block's own mask, and two numbers a query
    assert sum(kept) == 4 * time * 8 + block**2 + 2 * time


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 2),
    time=st.sampled_from([2, 65, 131]),
    each_head=st.booleans(),
    every_row=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_under_any_mask_output_and_gradients_are_those_of_pytorchs_attention(
    batch: int, groups: int, repeats: int, time: int, each_head: bool, every_row: bool, seed: int
) -> None:
    heads = groups * repeats
    shape = (batch if every_row else 1, heads if each_head else 1, time, time)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    mask = (mask & torch.ones(time, time, dtype=torch.bool).tril(-1)) | torch.eye(time, dtype=torch.bool)
    given_ = inputs(batch, heads, groups, time, 5, 7)
    found = with_gradients(lambda q, k, v: blocked_attention(q, k, v, causal=False, scale=0.3, mask=mask), *given_)
    expected = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True), *given_
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_keys_that_are_padding_are_hidden_from_every_query() -> None:
    q, k, v, _ = inputs(2, 2, 1, 70, 4, 4)
    padding = torch.arange(70) < torch.tensor([[70], [31]])
    y = blocked_attention(q, k, v, causal=False, scale=0.5, mask=padding[:, None, None, :])
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None, :], scale=0.5, enable_gqa=True)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)


def test_packed_documents_cost_no_keys_that_lie_outside_of_them() -> None:
    documents = torch.arange(512)[None] // 256
    assert blocked._spans(512, False, document_mask(documents)) == [
        (0, 128, 0, 128),
        (128, 256, 0, 256),
        (256, 384, 256, 384),
        (384, 512, 256, 512),
    ]


def test_a_query_that_may_see_nothing_goes_through_pytorchs_kernel_and_attends_to_nothing() -> None:
    q, k, v, _ = inputs(1, 1, 1, 4, 4, 4, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2, :] = False
    y = attention_under(q, k, v, mask)
    assert not blocked.applies(q, k, mask)
    assert y.isfinite().all()
    assert not y[0, 0, 2].any()


def test_no_query_sees_a_later_key() -> None:
    q, k, v, _ = inputs(1, 2, 1, 150, 8, 8)
    later = torch.zeros(150, 1, dtype=q.dtype)
    later[100:] = 50
    whole, changed = (blocked_attention(q, k + x, v + x, causal=True, scale=0.3) for x in (0, later))
    assert torch.equal(whole[:, :, :100], changed[:, :, :100])
    assert (whole[:, :, 100:] != changed[:, :, 100:]).all()


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("mean", [1.0, 12.0, 50.0])
def test_large_scores_are_as_exact_as_those_of_pytorchs_kernel(
    mean: float, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever all the scores have in common leaves no trace in the weights, and less than a rounding in the output."""
    monkeypatch.setattr(blocked, "_tiles", lambda: tiles)
    q, k, v, grad = inputs(2, 4, 2, 128, 64, 64)
    common = (mean / 8) ** 0.5  # 64 / 8 of its squares are the mean
    given_ = tuple(t.bfloat16() for t in (q + common, k + common, v, grad))
    exact = with_gradients(reference(True, 1 / 8), *(t.double() for t in given_))
    found, theirs = (with_gradients(f(True, 1 / 8), *given_) for f in (ours, reference))
    for a, b, c in zip(found, theirs, exact, strict=True):
        error, their_error = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert error < 2.5 * max(their_error, 0.002)
    last = given_[0][:, :, -1:]
    one = attention_under(last, given_[1], given_[2], None, scale=1 / 8).double()
    assert (one - exact[0][:, :, -1:]).norm() / exact[0][:, :, -1:].norm() < 0.004


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize(("time", "document", "value"), [(150, 80, 32), (640, 120, 24)])
@pytest.mark.parametrize("mean", [1.0, 50.0])
def test_under_a_mask_of_documents_large_scores_are_as_exact(
    mean: float, time: int, document: int, value: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_tiles", lambda: tiles)
    q, k, v, grad = inputs(2, 4, 2, time, 32, value)
    common = (mean / 32**0.5) ** 0.5
    given_ = tuple(t.bfloat16() for t in (q + common, k + common, v, grad))
    mask = document_mask(torch.stack((torch.arange(time) // document, torch.arange(time) // (document + 9))))

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # their kernel wants values as wide as keys
        wide = F.pad(v, (0, 32 - value))
        return F.scaled_dot_product_attention(q, k, wide, attn_mask=mask, enable_gqa=True)[..., :value]

    exact = with_gradients(theirs, *(t.double() for t in given_))
    found = with_gradients(lambda q, k, v: attention_under(q, k, v, mask), *given_)
    for a, b, c in zip(found, with_gradients(theirs, *given_), exact, strict=True):
        error, their_error = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert error < 2.5 * max(their_error, 0.002)


@pytest.mark.parametrize(("size", "value"), [(64, 64), (96, 64)])
def test_in_bfloat16_the_error_is_that_of_a_few_roundings(size: int, value: int) -> None:
    given_ = inputs(2, 4, 2, 256, size, value, dtype=torch.bfloat16)
    exact = with_gradients(reference(True, size**-0.5), *(t.double() for t in given_))
    rounding = 2.0**-8 / 3**0.5  # root mean square of a rounding to eight bits, relative, at its largest
    for a, b in zip(with_gradients(ours(True, size**-0.5), *given_), exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < 3 * rounding


def test_the_masks_attend_in_blocks_in_bfloat16_on_a_cpu_and_through_pytorchs_kernel_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(
        "danlu.nn.attention.masks.blocked_attention",
        lambda q, k, v, **options: (calls.append(q.dtype), blocked.blocked_attention(q, k, v, **options))[1],
    )
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        q, k, v, _ = inputs(1, 2, 2, 9, 4, 4, dtype=dtype)
        masked_attention(q, k, v, "mixed-heads")
    assert calls == [torch.bfloat16] * 2


def test_compiled_it_gives_what_it_gives_otherwise() -> None:
    given_ = inputs(1, 2, 1, 70, 8, 8, dtype=torch.float32)
    compiled = torch.compile(ours(True, 0.3), fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, *given_), with_gradients(ours(True, 0.3), *given_), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_lie_in_one_piece_give_what_contiguous_ones_give():
    q, k, v = (torch.randn(2, heads, 37, 16, generator=torch.Generator().manual_seed(heads)) for heads in (6, 3, 2))
    v = v.repeat(1, 2, 1, 1)[:, :3]
    tensors = [t.bfloat16() for t in (q, k, v)]
    expected = blocked_attention(*tensors, causal=True, scale=0.25)
    found = blocked_attention(*(t.mT.contiguous().mT for t in tensors), causal=True, scale=0.25)
    assert torch.equal(found, expected)
