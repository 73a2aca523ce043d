"""Whole models, and what training stacks do with them: a check for each, in the order of the support matrix.

A check takes a kind of model and asserts that its loss, its gradients or its logits are those of the bare model. A new
one is a function of the kind under ``@stack``; what raises instead is named in ``RAISES``.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from tensors import int8_products_saturate
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel

from danlu.models import Transformer, TransformerConfig
from danlu.models.transformer import Block
from danlu.nn import (
    GQAConfig,
    KVSharedConfig,
    LoRAConfig,
    MLAConfig,
    MoEConfig,
    SSMConfig,
    apply_lora,
    as_torch_linear,
    merge_lora,
)
from danlu.objectives import CausalLM

_DENSE = TransformerConfig(vocab_size=48, dim=16, layers=1, hidden=32, attention=GQAConfig(num_heads=2))
MODELS = {
    "GQA": _DENSE,
    "MLA": replace(_DENSE, attention=MLAConfig(num_heads=2, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=16)),
    "KVShared": replace(_DENSE, attention=KVSharedConfig(num_heads=2)),
    "SSM": replace(_DENSE, layers=2, mixers=(SSMConfig(), None)),
    "MoE": replace(_DENSE, dense_layers=0, experts=MoEConfig(num_experts=4, top_k=2, hidden=16)),
}
"""A Transformer of each mixer, dense or with experts."""
ROWS = torch.arange(68).view(4, 17) * 7 % 48
TOKENS, TARGETS = ROWS[:, :-1].contiguous(), ROWS[:, 1:].contiguous()
BATCH = {"tokens": TOKENS, "targets": TARGETS}


@dataclass(frozen=True)
class Stack:
    """What else is done with a model; ``check`` raises what the model does, or AssertionError."""

    name: str
    check: Callable[[str], None]


STACKS: list[Stack] = []


def stack(name: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Add a column to the table."""

    def add(check: Callable[[str], None]) -> Callable[[str], None]:
        STACKS.append(Stack(name, check))
        return check

    return add


def model(kind: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(MODELS[kind])


def results(called: nn.Module, bare: nn.Module) -> list[Tensor]:
    """The loss, then the gradients of all parameters, whole."""
    loss = called(BATCH)
    loss.backward()
    gradients = [p.grad for p in bare.parameters()]
    assert all(g is not None for g in gradients)
    return [loss.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients if g is not None)]


def plain(kind: str) -> list[Tensor]:
    objective = CausalLM(model(kind))
    return results(objective, objective)


def same(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    """Compare losses, then gradients, all of them together."""
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0, check_dtype=False)
    error = sum((one - other).double().square().sum() for one, other in zip(found[1:], expected[1:], strict=True))
    whole = sum(other.double().square().sum() for other in expected[1:])
    assert error <= (10 * rtol) ** 2 * whole


@contextmanager
def one_process() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@stack("autocast, bfloat16")
def autocast_bfloat16(kind: str) -> None:
    objective = CausalLM(model(kind))
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(BATCH)
    loss.backward()
    same([loss.detach(), *(p.grad for p in objective.parameters() if p.grad is not None)], plain(kind), 0.02)


@stack("autocast, float16")
def autocast_float16(kind: str) -> None:
    objective = CausalLM(model(kind))
    with torch.autocast("cpu", torch.float16):
        loss = objective(BATCH)
    loss.backward()
    same([loss.detach(), *(p.grad for p in objective.parameters() if p.grad is not None)], plain(kind), 0.005)


@stack("weights in bfloat16")
def weights_in_bfloat16(kind: str) -> None:
    objective = CausalLM(model(kind)).to(torch.bfloat16)
    same(results(objective, objective), plain(kind), 0.02)


@stack("activations in bfloat16")
def activations_in_bfloat16(kind: str) -> None:
    """``compute_dtype``: float32 weights, as ``danlu train`` has them."""
    objective = CausalLM(model(kind))
    objective.model.compute_dtype = torch.bfloat16
    same(results(objective, objective), plain(kind), 0.02)


@stack("second derivatives")
def second_derivatives(kind: str) -> None:
    """A Hessian times a vector is the difference quotient of gradients."""
    network = model(kind).double()
    x, along = torch.randn(2, 2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(at: Tensor, *, graph: bool = False) -> Tensor:
        at = at if graph else at.detach().requires_grad_()
        return torch.autograd.grad(network.hidden(at).pow(3).sum(), at, create_graph=graph)[0]

    (product,) = torch.autograd.grad((gradient(x.requires_grad_(), graph=True) * along).sum(), x)
    quotient = (gradient(x + 1e-5 * along) - gradient(x - 1e-5 * along)) / 2e-5
    torch.testing.assert_close(product, quotient, rtol=1e-4, atol=1e-5)


@stack("per-sample gradients")
def per_sample_gradients(kind: str) -> None:
    """``vmap(grad(...))`` over the rows of a batch; they add up to the gradient of the batch."""
    network = model(kind)

    def loss(weights: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        logits = functional_call(network, weights, tokens[None])
        return nn.functional.cross_entropy(logits[0], targets, reduction="sum")

    weights = {name: p.detach() for name, p in network.named_parameters()}
    buffers = {name: b.detach() for name, b in network.named_buffers()}
    each = vmap(grad(lambda w, *xs: loss({**w, **buffers}, *xs)), in_dims=(None, 0, 0))(weights, TOKENS, TARGETS)
    expected = plain(kind)
    same([expected[0], *(g.sum(0) for g in each.values())], expected)


@stack("torch.compile(fullgraph=True)")
def compiled(kind: str) -> None:
    torch._dynamo.reset()
    network, bare = model(kind), model(kind)
    logits = torch.compile(network, fullgraph=True, backend="aot_eager")(TOKENS)
    expected = bare(TOKENS)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for values, of in ((logits, network), (expected, bare)):
        nn.functional.cross_entropy(values.flatten(0, 1), TARGETS.flatten()).backward()
        assert all(p.grad is not None for p in of.parameters())
    for one, other in zip(network.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@stack("torch.export, open batch and time")
def exported(kind: str) -> None:
    network = model(kind).eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(network, (TOKENS,), dynamic_shapes=(sizes,)).module()
    with torch.no_grad():
        for shape in [(4, 16), (3, 7)]:
            other = torch.arange(shape[0] * shape[1]).view(shape) % 48
            torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-5)


@stack("meta device, to_empty")
def meta(kind: str) -> None:
    with torch.device("meta"):
        network = model(kind)
    assert network(TOKENS.to("meta")).shape == (4, 16, 48)
    network.to_empty(device="cpu")
    network.load_state_dict(model(kind).state_dict())
    torch.testing.assert_close(network(TOKENS), model(kind)(TOKENS))


@stack("inference mode, decoding")
def decoding(kind: str) -> None:
    network = model(kind).eval()
    with torch.inference_mode():
        torch.testing.assert_close(decoded(network), network(TOKENS), rtol=1e-3, atol=1e-4)
    same(results(objective := CausalLM(network.train()), objective), plain(kind))


def decoded(network: nn.Module) -> Tensor:
    """Logits of one token after the other, over the cache."""
    cache = network.new_cache(*TOKENS.shape)
    return torch.cat([network(token, cache=cache) for token in TOKENS.split(1, dim=1)], dim=1)


@stack("activation checkpointing")
def activation_checkpointing(kind: str) -> None:
    objective = CausalLM(model(kind))
    apply_activation_checkpointing(objective, check_fn=lambda module: isinstance(module, Block))
    same(results(objective, objective), plain(kind))


@stack("DDP")
def data_parallel(kind: str) -> None:
    with one_process():
        objective = CausalLM(model(kind))
        same(results(DistributedDataParallel(objective), objective), plain(kind))


def sharded(kind: str, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> CausalLM:
    objective = CausalLM(model(kind))
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    return objective


@stack("FSDP2")
def fsdp2(kind: str) -> None:
    with one_process() as mesh:
        objective = sharded(kind, mesh, MixedPrecisionPolicy())
        same(results(objective, objective), plain(kind))


@stack("FSDP2, bfloat16")
def fsdp2_in_bfloat16(kind: str) -> None:
    with one_process() as mesh:
        objective = sharded(kind, mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        same(results(objective, objective), plain(kind), 0.02)


@stack("tensor parallel, by columns")
def tensor_parallel(kind: str) -> None:
    """``RowwiseParallel`` cuts the columns of the weights that lead out of a layer."""
    with one_process() as mesh:
        objective = CausalLM(model(kind))
        for block in objective.model.blocks:
            dense = {"feed_forward.down": RowwiseParallel()} if kind != "MoE" else {}
            parallelize_module(block, mesh, {"attention.out": RowwiseParallel(), **dense})
        cut = sum(isinstance(p, DTensor) for p in objective.parameters())
        assert cut == len(objective.model.blocks) * (1 if kind == "MoE" else 2)
        same(results(objective, objective), plain(kind))


@stack("danlu.nn.apply_lora")
def lora(kind: str) -> None:
    network = model(kind).eval()
    apply_lora(network, LoRAConfig(rank=2, exclude=()))
    _adapt(network, lambda: merge_lora(network))


@stack("PEFT")
def peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    network = model(kind).eval()
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=names))
    assert sum(".lora_A." in name for name, _ in network.named_parameters()) == len(names)
    _adapt(network, adapted.merge_and_unload)


def _adapt(network: Transformer, merge: Callable[[], nn.Module]) -> None:
    """Adapters change nothing, then what they say; they decode, have gradients, and merge."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    results(CausalLM(network), nn.ParameterList(trained.values()))
    with torch.no_grad():
        expected = network(TOKENS)
        assert not torch.allclose(expected, model_of(network)(TOKENS), atol=1e-2)
        torch.testing.assert_close(decoded(network), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(merge()(TOKENS), expected, rtol=1e-3, atol=1e-4)


def model_of(network: Transformer) -> Transformer:
    """The model as it was made."""
    return model(next(kind for kind, config in MODELS.items() if config == network.config))


def _quantized(kind: str, convert: Callable[[Transformer], nn.Module], near: float) -> None:
    network = model(kind).eval()
    linear = sum(isinstance(layer, nn.Linear) for layer in network.modules())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = network(TOKENS)
        network = convert(network)
        left = [x for x in network.modules() if isinstance(x, nn.Linear) and type(x.weight) is nn.Parameter]
        assert linear >= (3 if kind == "MoE" else 5)
        assert not left
        found = network(TOKENS)
        assert 0 < (found - expected).norm() < max(0.15, near) * expected.norm()
        assert (decoded(network) - found).norm() < near * expected.norm()


def _torchao(kind: str, name: str, near: float) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def convert(network: Transformer) -> Transformer:
        quantization.quantize_(network, getattr(quantization, name)())
        return network

    _quantized(kind, convert, near)


@stack("torchao, int8 weights")
def torchao_int8(kind: str) -> None:
    _torchao(kind, "Int8WeightOnlyConfig", 1e-3)


@stack("torchao, float8 weights")
def torchao_float8(kind: str) -> None:
    _torchao(kind, "Float8WeightOnlyConfig", 1e-3)


@stack("torchao, int8 products")
def torchao_int8_products(kind: str) -> None:
    _torchao(kind, "Int8DynamicActivationInt8WeightConfig", 0.6 if int8_products_saturate() else 0.15)


@stack("quantize_dynamic")
def quantize_dynamic(kind: str) -> None:
    convert = torch.ao.quantization.quantize_dynamic
    _quantized(kind, lambda network: convert(as_torch_linear(network), {nn.Linear}), 0.15)


@stack("torchao, float8 training")
def float8_training(kind: str) -> None:
    """Roles and splits are kept, and the loss is near."""
    float8 = pytest.importorskip("torchao.float8")
    from danlu.optim import param_groups

    objective = CausalLM(model(kind))
    before = [(g["role"], g["split"], g["param_names"]) for g in param_groups(objective)]
    settings = float8.Float8LinearConfig(emulate=True)
    float8.convert_to_float8_training(objective, config=settings)
    assert [(g["role"], g["split"], g["param_names"]) for g in param_groups(objective)] == before
    same(results(objective, objective), plain(kind), 0.1)


RAISES = {("SSM", "torch.export, open batch and time"): "specialized it to be a constant"}
"""Words of the error of a model (first) in a stack (second)."""
