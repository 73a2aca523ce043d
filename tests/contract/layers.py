"""Whole layers and models in the contract, against their formulas written out."""

import math
from collections.abc import Callable
from typing import Any

import torch
from contract.table import Case, convolution, feed_forward, layer, rms_norm, rotation
from tensors import gaussian
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.models import GPT, GPTConfig, Transformer, TransformerConfig
from danlu.nn import (
    GQA,
    MLA,
    SSM,
    AuxiliaryLossConfig,
    DynamicConfig,
    GQAConfig,
    KVShared,
    KVSharedConfig,
    MLAConfig,
    MoE,
    MoEConfig,
    SSMConfig,
    rotary_angles,
    rotary_span,
)
from danlu.nn.balance import follow_loss
from danlu.nn.ssm.rtf import RTFConfig
from danlu.nn.ssm.s4 import S4Config
from danlu.nn.ssm.s4d import S4DConfig
from danlu.objectives import CausalLM
from danlu.protocols import Context

DIM, HEADS, SIZE, ROTATED = 6, 2, 4, 2


class Placed(nn.Module):
    """A mixer whose tokens stand at 0, 1, 2, and so on."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(x, Context(rope=rotary_span(0, x.shape[1], ROTATED, like=x)))
        return y


def turned(x: Tensor, *, back: bool = False) -> Tensor:
    """Rotate the last coordinates of ``(batch, heads, time, size)``."""
    cos, sin = rotary_angles(torch.arange(x.shape[2], dtype=torch.float64, device=x.device), ROTATED)
    return torch.cat((x[..., : -ROTATED - 2], rotation(x[..., -ROTATED - 2 :], cos, -sin if back else sin)), -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of heads to as many or one group."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def split(x: Tensor, *sizes: int) -> list[Tensor]:
    """Heads of ``(batch, time, heads * size)``, in parts of so many heads."""
    heads = x.unflatten(-1, (sum(sizes), -1)).transpose(1, 2)
    return list(heads.split(list(sizes), dim=1))


def joined(o: Tensor, out: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2) @ out.T


def gqa(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
    q, k, v = split(x @ qkv.T, HEADS, 1, 1)
    return joined(causal(turned(q), turned(k), v), out)


def mla(x: Tensor, down: Tensor, gain: Tensor, up: Tensor, out: Tensor) -> Tensor:
    q, c, k_rope = (x @ down.T).split((HEADS * SIZE, 3, ROTATED), dim=-1)
    (kv,) = split(rms_norm(c, gain) @ up.T, HEADS)
    k_nope, v = kv.split((SIZE - ROTATED, SIZE - 1), dim=-1)
    k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, HEADS, -1, -1)), -1)
    return joined(causal(turned(split(q, HEADS)[0]), turned(k), v), out)


def kv_shared(x: Tensor, q_kv: Tensor, out: Tensor) -> Tensor:
    q, c = split(x @ q_kv.T, HEADS, 1)
    return joined(turned(causal(turned(q), turned(c), turned(c)), back=True), out)


def s4d_kernel(time: int, log_dt: Tensor, log_decay: Tensor, frequency: Tensor, c: Tensor) -> Tensor:
    A = torch.complex(-log_decay.exp(), frequency)
    z = A * log_dt.exp()[:, None]
    weight = torch.view_as_complex(c.contiguous()) * (z.exp() - 1) / A
    powers = (z[..., None] * torch.arange(time, device=z.device)).exp()
    return 2 * (weight[..., None] * powers).real.sum(1)


def state_space(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def plain(x: Tensor, skip: Tensor, project: Tensor, *rest: Tensor) -> Tensor:
        *of_kernel, out = rest
        u, gate = (x @ project.T).chunk(2, dim=-1)
        y = convolution(u.mT, kernel(x.shape[1], *of_kernel)).mT + skip * u
        return (y * gate * gate.sigmoid()) @ out.T

    return plain


def own_kernel(config: Any) -> Callable[..., Tensor]:
    """The kernel of another kind, which PyTorch differentiates in any case."""
    space = config.build(3).double()
    names = [name for name, _ in space.named_parameters()]

    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.space = space

        def forward(self, time: int) -> Tensor:
            y: Tensor = self.space.kernel(time)
            return y

    module = Kernel()

    def kernel(time: int, *weights: Tensor) -> Tensor:
        named = {f"space.{name}": weight for name, weight in zip(names, weights)}
        y: Tensor = torch.func.functional_call(module, named, (time,))
        return y

    return kernel


EXPERTS = {"num_experts": 4, "hidden": 3}


def moe(config: MoEConfig, biases: float = 0.0) -> Callable[..., Tensor]:
    """Every expert on every token; the choice by sorting."""

    def plain(x: Tensor, router: Tensor, w_up: Tensor, w_down: Tensor, *shared: Tensor) -> Tensor:
        scores = (x @ router.T).sigmoid() if config.gate == "sigmoid" else (x @ router.T).softmax(-1)
        if config.balance.thresholds:
            chosen = scores.detach() + biases > 0
        else:
            chosen = scores.detach() >= scores.detach().sort(-1).values[..., -config.top_k, None]
        gate = scores * chosen
        if config.renormalize:
            gate = gate / gate.sum(-1, keepdim=True).clamp_min(1e-300)
        y = feed_forward(x, *shared) if shared else torch.zeros_like(x)
        for e in range(config.num_experts):
            y = y + gate[..., e, None] * LAMBDA * feed_forward(x, w_up[e], w_down[e])
        return y

    return plain


LAMBDA = 1.5
TOP_K = MoEConfig(**EXPERTS, top_k=2, scale=LAMBDA)
DYNAMIC = MoEConfig(**EXPERTS, top_k=2, scale=LAMBDA, num_shared_experts=0, balance=DynamicConfig())
AUXILIARY = MoEConfig(
    **EXPERTS, top_k=2, scale=LAMBDA, gate="softmax", num_shared_experts=0, balance=AuxiliaryLossConfig(weight=0.5)
)


class Balanced(nn.Module):
    """A loss of a layer of experts that an auxiliary one is beside."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = MoE(DIM, AUXILIARY)

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts(x)
        return follow_loss(y.to(torch.promote_types(y.dtype, torch.float32)).square().sum(), self, summed=True)


BALANCED = Balanced()


def counted_anew(b: int, t: int) -> tuple[Tensor, ...]:
    BALANCED.experts.balancer.counts.zero_()
    return inputs(b, t)


def balanced(x: Tensor, router: Tensor, *experts: Tensor) -> Tensor:
    scores = (x @ router.T).softmax(-1).flatten(0, -2)
    chosen = scores.detach() >= scores.detach().sort(-1).values[:, -AUXILIARY.top_k, None]
    load = chosen.sum(0).double() / chosen.sum().clamp_min(1)
    auxiliary = 0.5 * 4 * ((load - 0.25) * scores).sum()
    return moe(AUXILIARY)(x, router, *experts).square().sum() + auxiliary - auxiliary.detach()


VOCAB = 7


def tokens(b: int, t: int) -> tuple[Tensor, ...]:
    return (torch.arange(b * t).view(b, t) * 5 % VOCAB,)


def with_next(b: int, t: int) -> tuple[Tensor, ...]:
    (these,) = tokens(b, t)
    return these, torch.where(these % 3 == 0, -100, (these + 2) % VOCAB)


def transformer(these: Tensor, embedding: Tensor, *weights: Tensor) -> Tensor:
    """One block of latent attention and a dense network."""
    one, two, down, gain, up, out, gate_up, w_down, last, head = weights
    x = F.embedding(these, embedding)
    x = x + mla(rms_norm(x, one), down, gain, up, out)
    x = x + feed_forward(rms_norm(x, two), gate_up, w_down)
    return rms_norm(x, last) @ head.T


def gpt(these: Tensor, embedding: Tensor, positions: Tensor, *weights: Tensor) -> Tensor:
    one, two, qkv, out, up, down, last = weights
    x = F.embedding(these, embedding) + positions[: these.shape[1]]
    norm = lambda h, gain: F.layer_norm(h, gain.shape, gain)  # noqa: E731
    q, k, v = split(norm(x, one) @ qkv.T, HEADS, HEADS, HEADS)
    x = x + joined(causal(q, k, v), out)
    x = x + F.gelu(norm(x, two) @ up.T, approximate="tanh") @ down.T
    return norm(x, last) @ embedding.T


class NextTokens(nn.Module):
    """The objective of language modelling: a loss of tokens and their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.objective = CausalLM(GPT(GPTConfig(vocab_size=VOCAB, dim=DIM, layers=1, num_heads=HEADS, context=16)))

    def forward(self, these: Tensor, targets: Tensor) -> Tensor:
        y: Tensor = self.objective({"tokens": these, "targets": targets})
        return y


def next_tokens(these: Tensor, targets: Tensor, embedding: Tensor, *weights: Tensor) -> Tensor:
    logits = gpt(these, embedding, *weights)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)


MLA_CONFIG = MLAConfig(num_heads=HEADS, kv_rank=3, nope_dim=SIZE - ROTATED, rope_dim=ROTATED, value_dim=SIZE - 1)


EXPORT = "torch.export, open batch and time"
ONE_LENGTH = {EXPORT: "Guard failed"}
"""The kernel's blocks follow from the length: an exported program has one."""

REFUSED = {
    **dict.fromkeys(
        ("forward mode", "torch.func.grad", "torch.func.vmap, per-sample gradients", "torch.func, Hessians"),
        "an auxiliary balancing loss has no gradient under torch.func",
    ),
    "torch.compile(fullgraph=True)": "an auxiliary balancing loss is added in the backward pass",
    EXPORT: "an auxiliary balancing loss cannot be exported",
}


def inputs(b: int, t: int) -> tuple[Tensor, ...]:
    return (gaussian(b, t, DIM, seed=1),)


def whole(name: str, build: Callable[[], nn.Module], plain: Callable[..., Tensor], **options: Any) -> Case:
    """Return the case of a layer of several products."""
    options = {"activations": inputs, "products": True, "recorded": True, "heavy": True, "slack": 3, **options}
    return layer(name, build, plain, **options)


CASES = [
    whole("GQA", lambda: Placed(GQA(DIM, GQAConfig(num_heads=HEADS, num_kv_heads=1, head_dim=SIZE, rope_dim=ROTATED))),
          gqa),
    whole("MLA", lambda: Placed(MLA(DIM, MLA_CONFIG)), mla),
    whole("KVShared",
          lambda: Placed(KVShared(DIM, KVSharedConfig(num_heads=HEADS, head_dim=SIZE, rope_dim=ROTATED))), kv_shared),
    whole("SSM, S4D", lambda: SSM(DIM, SSMConfig(kernel=S4DConfig(state=4), channels=3)), state_space(s4d_kernel),
          raises=ONE_LENGTH),
    whole("SSM, S4", lambda: SSM(DIM, SSMConfig(kernel=S4Config(state=4), channels=3)),
          state_space(own_kernel(S4Config(state=4))), raises=ONE_LENGTH),
    whole("SSM, RTF", lambda: SSM(DIM, SSMConfig(kernel=RTFConfig(state=2, length=12), channels=3)),
          state_space(own_kernel(RTFConfig(state=2, length=12))),
          raises={EXPORT: "length must be an integer"}),
    whole("MoE", lambda: MoE(DIM, TOP_K), moe(TOP_K)),
    whole("MoE, dynamic", lambda: MoE(DIM, DYNAMIC), moe(DYNAMIC, -0.5)),
    whole("MoE, auxiliary loss", lambda: BALANCED, balanced, loss=True, activations=counted_anew, raises=REFUSED),
    whole("Transformer", lambda: Transformer(TransformerConfig(
        vocab_size=VOCAB, dim=DIM, layers=1, hidden=5, attention=MLA_CONFIG)), transformer, activations=tokens),
    whole("GPT, CausalLM", NextTokens, next_tokens, activations=with_next, loss=True),
]  # fmt: skip
"""Attention, state spaces, experts, and models made of them."""
