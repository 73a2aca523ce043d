"""What the contract is for: whole models exported, traced, cast, under autocast, differentiated twice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from danlu.diffusion import Betas
from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig, MLAConfig, RMSNorm, rotary_span
from danlu.objectives import CausalLM
from danlu.protocols import MixerConfig

MLA = MLAConfig(num_heads=2, kv_rank=8, nope_dim=8, rope_dim=8, value_dim=8)
every = pytest.mark.parametrize("attention", [GQAConfig(num_heads=2), MLA], ids=["gqa", "mla"])


def network(attention: MixerConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(vocab_size=31, dim=16, layers=2, hidden=24, attention=attention))


def batch() -> dict[str, Tensor]:
    tokens = torch.arange(26).view(2, 13) * 7 % 31
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


@every
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_with_open_sizes_is_the_model_and_leaves_the_model_as_it_was(
    attention: MixerConfig, strict: bool
) -> None:
    model, tokens = network(attention).eval(), batch()["tokens"]
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (tokens,), dynamic_shapes=(sizes,), strict=strict).module()
    with torch.no_grad():
        for shape in [(2, 12), (3, 7), (5, 30)]:
            other = torch.arange(shape[0] * shape[1]).view(shape) % 31
            expected = model(other)
            assert expected.isfinite().all()
            torch.testing.assert_close(program(other), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(tokens), network(attention)(tokens), rtol=0, atol=0)


@every
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_is_the_model_at_every_length(attention: MixerConfig, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = network(attention)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 12):
        tokens = batch()["tokens"][:, :length].contiguous()
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def spans() -> Tensor:
    return torch.cat(rotary_span(2, 9, 6, like=torch.empty(0)))


def norms() -> Tensor:
    with torch.no_grad():
        return RMSNorm(6, eps=0.5)(torch.arange(6.0))


def noise() -> Tensor:
    return Betas(steps=9).levels()


@pytest.mark.parametrize("make", [spans, norms, noise], ids=["rotary", "norm", "noise schedule"])
def test_nothing_kept_outlives_the_mode_it_was_made_in(make: Callable[[], Tensor]) -> None:
    for mode in (FakeTensorMode, torch.inference_mode, lambda: torch.device("meta"), FakeTensorMode):
        before, mode_at = make(), mode()
        with mode_at:
            assert make().shape == before.shape
        after = make()
        assert type(after) is Tensor
        assert not after.is_inference()
        assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_language_modelling_under_autocast(attention: MixerConfig, dtype: torch.dtype) -> None:
    losses, gradients = [], []
    for enabled in (False, True):
        objective = CausalLM(network(attention))
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = objective(batch())
        loss.backward()
        assert loss.dtype == torch.float32
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_a_model_cast_to_sixteen_bits_has_gradients_of_its_dtype(attention: MixerConfig, dtype: torch.dtype) -> None:
    exact, low = CausalLM(network(attention)), CausalLM(network(attention)).to(dtype)
    for objective in (exact, low):
        objective(batch()).backward()
    for one, other in zip(exact.parameters(), low.parameters()):
        assert one.grad is not None
        assert other.grad is not None
        assert other.grad.dtype == dtype
        assert (other.grad.float() - one.grad).norm() < 0.15 * one.grad.norm() + 1e-3


def test_a_hessian_times_a_vector_is_the_difference_quotient_of_gradients() -> None:
    model = network(MLA).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    along = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradient(at: Tensor, *, graph: bool = False) -> Tensor:
        return torch.autograd.grad(model.hidden(at).pow(3).sum(), at, create_graph=graph)[0]

    (product,) = torch.autograd.grad((gradient(x, graph=True) * along).sum(), x)
    ahead, behind = (gradient((x + step * along).detach().requires_grad_()) for step in (1e-5, -1e-5))
    torch.testing.assert_close(product, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-6)
