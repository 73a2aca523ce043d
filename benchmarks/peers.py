"""The models that danlu's are measured beside, at sizes that fit one another.

======  ======  ======  =====  =====  =========  ==============  =================================================
size    vocab   width   depth  heads  GPT        Llama           DeepseekV3
======  ======  ======  =====  =====  =========  ==============  =================================================
10M     8192    320     6      5      MLP 1280   SwiGLU 864      latent 128 + 32 rotary, heads 64 + 32 / 64;
                                                                 8 experts of 96, 3 a token, 1 shared
30M     8192    512     8      8      MLP 2048   SwiGLU 1376     latent 192 + 32 rotary, heads 64 + 32 / 64;
                                                                 16 experts of 96, 3 a token, 1 shared
======  ======  ======  =====  =====  =========  ==============  =================================================

All heads are 64 wide and all output heads are tied to the embedding. `flops_per_step` counts two operations for each
weight that a token meets, twice again for the backward pass, and causal attention at half its square.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

SizeName = Literal["10M", "30M"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of a model; the expert and latent fields are used by the sparse ones only."""

    vocab: int = 8192
    width: int
    depth: int
    heads: int
    feed_forward: int
    latent: int
    rotary: int = 32
    head: int = 64
    experts: int
    experts_per_token: int = 3
    shared_experts: int = 1
    expert_width: int = 96
    context: int = 2048


SIZES: dict[SizeName, Size] = {
    "10M": Size(width=320, depth=6, heads=5, feed_forward=864, latent=128, experts=8),
    "30M": Size(width=512, depth=8, heads=8, feed_forward=1376, latent=192, experts=16),
}


class GPT(nn.Module):
    """A plain decoder in the style of GPT-2: LayerNorm, learned positions, fused QKV, GELU, tied head, no biases.

    It has no cache: it is what a short training script trains.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocab, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(GPTBlock(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = (2 * size.depth) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy where targets are given, else the logits ``(B, T, vocab)``."""
        x_btd = self.tokens(tokens_bt) + self.positions(torch.arange(tokens_bt.shape[1], device=tokens_bt.device))
        for block in self.blocks:
            x_btd = block(x_btd)
        logits_btv = functional.linear(self.norm(x_btd), self.tokens.weight)
        if targets_bt is None:
            return logits_btv
        return functional.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten())


class GPTBlock(nn.Module):
    """Pre-norm attention and a four times wider GELU network."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.width, bias=False)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.mlp_norm = nn.LayerNorm(size.width, bias=False)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        """Add both branches to ``(B, T, D)``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x_btd)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_btd = x_btd + self.out(mixed.transpose(1, 2).flatten(2))
        return x_btd + self.down(functional.gelu(self.up(self.mlp_norm(x_btd)), approximate="tanh"))


def llama(size: Size) -> nn.Module:
    """Build transformers' Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        **_NO_SPECIAL_TOKENS,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def deepseek(size: Size, experts: Literal["eager", "grouped_mm", "batched_mm"] = "grouped_mm") -> nn.Module:
    """Build transformers' DeepseekV3 with random weights and one of its expert back ends.

    Of the back ends that run on a CPU, ``eager`` loops over experts, ``grouped_mm`` sorts tokens and calls PyTorch's
    grouped product, ``batched_mm`` copies a weight for every token (fast for one token, hopeless for many).
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        moe_intermediate_size=size.expert_width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        n_shared_experts=size.shared_experts,
        n_routed_experts=size.experts,
        num_experts_per_tok=size.experts_per_token,
        routed_scaling_factor=1.0,
        kv_lora_rank=size.latent,
        q_lora_rank=None,
        qk_rope_head_dim=size.rotary,
        qk_nope_head_dim=size.head,
        v_head_dim=size.head,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        **_NO_SPECIAL_TOKENS,
    )
    return DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=experts)


# Generation of random weights would otherwise stop at an end token that means nothing here.
_NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def parameters(model: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_step(kind: Literal["gpt", "llama", "deepseek"], size: Size, batch: int, length: int) -> float:
    """Floating-point operations of one forward and backward pass over ``batch`` rows of ``length`` tokens.

    >>> [round(flops_per_step("gpt", SIZES[name], 8, 256) / 1e9, 1) for name in ("10M", "30M")]
    [128.8, 373.7]
    >>> [round(flops_per_step("llama", SIZES[name], 8, 256) / 1e9, 1) for name in ("10M", "30M")]
    [129.6, 375.3]
    >>> [round(flops_per_step("deepseek", SIZES[name], 8, 256) / 1e9, 1) for name in ("10M", "30M")]
    [95.8, 221.5]
    """
    qk = size.head
    if kind == "deepseek":
        qk += size.rotary
        attention = size.width * (size.heads * qk + size.latent + size.rotary + size.heads * size.head)
        attention += size.latent * size.heads * 2 * size.head
        active = size.experts_per_token + size.shared_experts
        layer = attention + active * 3 * size.width * size.expert_width + size.width * size.experts
    else:
        mlp = 8 * size.width if kind == "gpt" else 3 * size.feed_forward
        layer = size.width * (4 * size.width + mlp)
    weights = size.depth * layer + size.width * size.vocab
    scores = size.depth * size.heads * (qk + size.head) * length / 2
    return 6.0 * batch * length * (weights + scores)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to run a model: where bfloat16 enters, which float32 product, compiled or not."""

    bfloat16: Literal["no", "autocast", "weights", "activations"] = "no"
    precision: Literal["highest", "medium"] = "highest"
    compile: bool = False

    def __str__(self) -> str:
        words = "float32" if self.bfloat16 == "no" else f"bf16 {self.bfloat16}"
        words += " medium" if self.precision == "medium" else ""
        return words + (" compiled" if self.compile else "")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run the body with this setting's autocast and float32 precision."""
        held = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16 == "autocast"):
                yield
        finally:
            torch.set_float32_matmul_precision(held)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Cast and compile a model."""
        model = model.to(torch.bfloat16) if self.bfloat16 == "weights" else model
        return torch.compile(model) if self.compile else model  # type: ignore[return-value]


def settings(*, compile: bool) -> list[Setting]:
    """Return every setting that could be the fastest on some processor, eager first."""
    eager = [
        Setting(),
        Setting(precision="medium"),
        Setting(bfloat16="autocast", precision="medium"),
        Setting(bfloat16="weights", precision="medium"),
    ]
    if not compile:
        return eager
    return [*eager, Setting(precision="medium", compile=True), Setting(bfloat16="autocast", compile=True)]


def qualify(
    candidates: Mapping[str, Callable[[], Callable[[], object]]],
    *,
    tries: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return each candidate's best seconds over a few calls after a warm one; one that cannot run gets infinity.

    Candidates are built one at a time and dropped again, so that they do not share memory; one whose first warm call
    takes more than half as long again as the best so far is not called further.
    """
    times: dict[str, float] = {}
    for name, build in candidates.items():
        best = math.inf
        try:
            run = build()
            run()
            for _ in range(tries):
                started = clock()
                run()
                best = min(best, clock() - started)
                if best > 1.5 * min(times.values(), default=math.inf):
                    break
            del run
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as problem:
            print(f"  {name}: left out ({type(problem).__name__}: {str(problem).splitlines()[0][:90]})", flush=True)
        else:
            print(f"  {name}: {best:.3f} s", flush=True)
        times[name] = best
    return times
