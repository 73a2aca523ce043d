"""Attention as a recurrence: equal to softmax attention in every form, and a stack that keeps nothing."""

import math
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensors import gaussian
from torch import Tensor
from torch.overrides import TorchFunctionMode

from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQA, GQAConfig, recurrent_attention, rotary_angles, rotate
from danlu.nn.attention.recurrent import RecomputeStack, RecurrentLayer, recompute_calls

random = partial(gaussian, seed=6)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over explicit scores."""
    t, n = q.shape[-2], k.shape[-2]
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = torch.arange(n) <= torch.arange(t)[:, None] + (n - t)
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("block", [1, 3, 8, 64, 100])
def test_every_form_equals_softmax_attention(block: int, stable: bool) -> None:
    q, k, v = random(2, 64, 7), random(2, 64, 7).flip(-2), random(2, 64, 5)
    o = recurrent_attention(q, k, v, block=block, stable=stable)
    torch.testing.assert_close(o, reference(q, k, v), rtol=0, atol=1e-13)


def test_the_three_token_example_of_the_source() -> None:
    q = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    k = torch.tensor([[1, 0], [0, 2], [1, -1]], dtype=torch.float64)
    v = torch.tensor([[1], [2], [3]], dtype=torch.float64)
    expected = [1.0, 1.880797077978, 1.845302102116]
    for stable in (False, True):
        o = recurrent_attention(q, k, v, block=1, scale=1.0, stable=stable)
        assert o[:, 0].tolist() == pytest.approx(expected, abs=5e-13)
    # The state at the third token: y, z without a maximum.
    assert math.e + 2 * math.e**2 + 3 == pytest.approx(20.496394026320, abs=1e-12)
    assert math.e + math.e**2 + 1 == pytest.approx(11.107337927390, abs=1e-12)


@pytest.mark.parametrize("block", [1, 7])
def test_scores_above_a_thousand_break_the_naive_form_only(block: int) -> None:
    q, k, v = 60 * random(1, 31, 7), 60 * random(1, 31, 7).flip(-2), random(1, 31, 5)
    assert (q @ k.mT / math.sqrt(7)).max() > 1000
    assert not recurrent_attention(q, k, v, block=block, stable=False).isfinite().all()
    torch.testing.assert_close(recurrent_attention(q, k, v, block=block), reference(q, k, v), rtol=0, atol=1e-12)


def test_naive_float32_survives_scores_of_68_and_not_of_153() -> None:
    q, v = torch.ones(2, 1), torch.tensor([[1.0], [2.0]])
    for top, finite in [(68.0, True), (153.0, False)]:
        k = torch.tensor([[top], [top - 1]])
        o = recurrent_attention(q, k, v, block=1, stable=False)
        assert bool(o.isfinite().all()) == finite
        torch.testing.assert_close(recurrent_attention(q, k, v, block=1), reference(q, k, v))


@pytest.mark.parametrize("block", [1, 4])
def test_fewer_queries_than_keys_are_the_last_ones(block: int) -> None:
    q, k, v = random(3, 5, 6), random(3, 11, 6), random(3, 11, 2)
    torch.testing.assert_close(recurrent_attention(q, k, v, block=block), reference(q, k, v), rtol=0, atol=1e-13)


def test_heads_that_share_keys_broadcast() -> None:
    q, k, v = random(2, 4, 9, 6), random(2, 1, 9, 6), random(2, 1, 9, 3)
    torch.testing.assert_close(recurrent_attention(q, k, v, block=2), reference(q, k, v), rtol=0, atol=1e-13)


def test_gradients_are_those_of_softmax_attention_and_pass_a_second_check() -> None:
    q, k, v = (t.requires_grad_() for t in (random(5, 3), random(5, 3).flip(0), random(5, 2)))
    assert torch.autograd.gradcheck(lambda *t: recurrent_attention(*t, block=2), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *t: recurrent_attention(*t, block=2), (q, k, v))


def test_bfloat16_is_summed_in_float32() -> None:
    q, k, v = (t.bfloat16() for t in (random(300, 8), random(300, 8).flip(0), random(300, 3)))
    o = recurrent_attention(q, k, v, block=1)
    assert o.dtype == torch.bfloat16
    exact = reference(*(t.double() for t in (q, k, v)))
    assert ((o.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()


def test_wrong_shapes_and_blocks_are_rejected_by_name() -> None:
    q = random(3, 4)
    with pytest.raises(ValueError, match="block"):
        recurrent_attention(q, q, q, block=0)
    with pytest.raises(ValueError, match="q, k, v must be"):
        recurrent_attention(q, random(3, 5), q)
    with pytest.raises(ValueError, match="key for every query"):
        recurrent_attention(q, q[:2], q[:2])
    with pytest.raises(ValueError, match="scale"):
        recurrent_attention(q, q, q, scale=0.0)


def as_layers(model: Transformer) -> list[RecurrentLayer]:
    """The blocks of a dense model as maps of one position."""
    layers = []
    for block in model.blocks:
        attention: Any = block.attention
        assert isinstance(attention, GQA)

        def project(h: Tensor, i: int, block: Any = block) -> Tensor:
            qkv = block.attention.qkv(block.attention_norm(h)).view(
                3, block.attention.num_heads, block.attention.head_dim
            )
            cos, sin = rotary_angles(torch.tensor(float(i), dtype=torch.float64), block.attention.head_dim)
            return torch.cat((rotate(qkv[:2], cos, sin), qkv[2:]))

        def update(h: Tensor, o: Tensor, block: Any = block) -> Tensor:
            h = h + block.attention.out(o.flatten())
            return h + block.feed_forward(block.feed_forward_norm(h[None, None]))[0, 0]

        layers.append(
            RecurrentLayer(
                lambda h, i, p=project: p(h, i)[0],
                lambda h, i, p=project: tuple(p(h, i)[1:]),
                update,
            )
        )
    return layers


@torch.no_grad()
def test_a_stack_of_four_layers_equals_the_cached_one_and_is_called_a_binomial_number_of_times() -> None:
    torch.manual_seed(5)
    config = TransformerConfig(vocab_size=11, dim=6, layers=4, hidden=5, attention=GQAConfig(num_heads=1))
    model = Transformer(config).double()
    tokens = torch.randint(0, 11, (1, 6))
    cache = model.new_cache(1, 6)
    cached = torch.cat([model.hidden(tokens[:, i : i + 1], cache=cache) for i in range(6)], dim=1)[0]
    stack = RecomputeStack(as_layers(model))
    found = torch.stack(list(stack.outputs(lambda i: model.embedding[tokens[0, i]], 6)))
    torch.testing.assert_close(model.norm(found), cached, rtol=0, atol=1e-12)
    assert stack.calls == recompute_calls(4, 6) == [math.comb(6 + m, m + 1) for m in range(4, -1, -1)]


def tiny(heads: int = 1) -> RecurrentLayer:
    return RecurrentLayer(
        lambda h, i: h.view(heads, -1),
        lambda h, i: (h.view(heads, -1), h.view(heads, -1)),
        lambda h, o: h + o.flatten(),
    )


def test_the_call_counts_of_the_source_nine_outputs_of_four_layers() -> None:
    stack = RecomputeStack([tiny()] * 4)
    for _ in stack.outputs(lambda i: torch.ones(1), 9):
        pass
    assert stack.calls == [1287, 495, 165, 45, 9] == recompute_calls(4, 9)


def test_heads_of_a_stack_equal_those_of_multi_head_attention() -> None:
    x = random(7, 6)
    found = torch.stack(list(RecomputeStack([tiny(heads=3)]).outputs(lambda i: x[i], 7)))
    h = x.view(7, 3, 2).transpose(0, 1)
    expected = x + F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(0, 1).reshape(7, 6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


class Counter(TorchFunctionMode):
    """Counts the tensors that are alive among those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.alive += 1
            self.peak = max(self.peak, self.alive)
            weakref.finalize(made, self.died)
        return made

    def died(self) -> None:
        self.alive -= 1


def peak(layers: int, length: int) -> int:
    with Counter() as counter:
        for _ in RecomputeStack([tiny()] * layers).outputs(lambda i: torch.ones(2), length):
            pass
    return counter.peak


def test_what_is_held_at_one_time_grows_with_the_layers_and_not_with_the_length() -> None:
    assert peak(1, 8) == peak(1, 16) == peak(1, 32)
    assert peak(2, 8) == peak(2, 16)
    assert peak(1, 8) < peak(2, 8) < peak(3, 8)


def test_a_stack_survives_scores_of_a_thousand() -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 30
    layer = RecurrentLayer(lambda h, i: h, lambda h, i: (h, h), lambda h, o: o)
    found = torch.stack(list(RecomputeStack([layer], scale=1.0).outputs(lambda i: x[i], 9)))
    scores = (x @ x.T).double().masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    assert scores.max() > 1000
    torch.testing.assert_close(found, (scores.softmax(-1) @ x.double()).float())
