"""The whole decoder: against Hugging Face's modules on the same weights, and against itself with a cache."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from danlu import config as configs
from danlu.models import Transformer, TransformerConfig
from danlu.nn import (
    GQA,
    MLA,
    SSM,
    GQAConfig,
    MLAConfig,
    MoE,
    MoEConfig,
    SSMConfig,
    grid_coordinates,
    text_image_coordinates,
    text_image_grid,
)
from danlu.nn.ssm import S4DConfig
from danlu.optim import param_groups

CONFIGS = {
    "latent attention and experts": TransformerConfig(
        vocab_size=53,
        dim=24,
        layers=3,
        hidden=29,
        attention=MLAConfig(num_heads=3, kv_rank=13, nope_dim=7, rope_dim=6, value_dim=13),
        experts=MoEConfig(num_experts=5, top_k=2, hidden=11, num_shared_experts=2, scale=1.3),
    ),
    "compressed queries": TransformerConfig(
        vocab_size=53,
        dim=24,
        layers=2,
        hidden=29,
        attention=MLAConfig(num_heads=3, kv_rank=13, q_rank=17, nope_dim=7, rope_dim=6, value_dim=11),
    ),
    "grouped queries": TransformerConfig(
        vocab_size=53, dim=24, layers=2, hidden=29, attention=GQAConfig(num_heads=4, num_kv_heads=2)
    ),
    "state spaces": TransformerConfig(
        vocab_size=53, dim=24, layers=2, hidden=29, attention=SSMConfig(kernel=S4DConfig(state=6), channels=23)
    ),
    "hybrid of three kinds": TransformerConfig(
        vocab_size=53,
        dim=24,
        layers=4,
        hidden=29,
        attention=GQAConfig(num_heads=4, num_kv_heads=2),
        mixers=(
            SSMConfig(kernel=S4DConfig(state=6)),
            None,
            MLAConfig(num_heads=3, kv_rank=13, nope_dim=7, value_dim=13),
        ),
    ),
    "tied multi-head": TransformerConfig(
        vocab_size=53, dim=24, layers=2, hidden=29, attention=GQAConfig(num_heads=3), tied=True
    ),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
every_config_with_positions = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "state spaces"])


def build(name: str) -> Transformer:
    torch.manual_seed(7)
    return Transformer(CONFIGS[name]).double().eval()


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(0, 53, (batch, time), generator=torch.Generator().manual_seed(8))


@every_config
def test_cached_decoding_equals_the_full_forward(name: str) -> None:
    model, t = build(name), tokens(2, 19)
    full = model(t)
    cache = model.new_cache(2, 19)
    parts = [model(t[:, a:b], cache=cache) for a, b in [(0, 7), (7, 8), (8, 9), (9, 17), (17, 19)]]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-12, atol=1e-12)


@every_config
def test_float32_decoding_stays_within_1e_5(name: str) -> None:
    model, t = build(name).float(), tokens(1, 19)
    cache = model.new_cache(1, 19)
    parts = [model(t[:, i : i + 1], cache=cache) for i in range(19)]
    torch.testing.assert_close(torch.cat(parts, 1), model(t), rtol=1e-5, atol=1e-5)


@every_config
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model, t = build(name), tokens(1, 17)
    documents = torch.tensor([[0] * 6 + [1] * 11])
    alone = torch.cat((model(t[:, :6]), model(t[:, 6:])), 1)
    torch.testing.assert_close(model(t, documents=documents), alone, rtol=1e-11, atol=1e-11)


@every_config_with_positions
def test_given_embeddings_at_given_positions_equal_tokens_that_are_counted(name: str) -> None:
    model, t = build(name), tokens(2, 11)
    embedded = model.embedding[t]
    n = torch.arange(11, dtype=torch.float64)
    assert torch.equal(model(embedded, positions=n[:, None]), model(t))
    # Text on the diagonal of the plane is text in one dimension, bit for bit.
    assert torch.equal(model(embedded, positions=torch.stack((n, n), dim=-1)), model(t))


@every_config_with_positions
def test_positions_may_differ_between_the_sequences_of_a_batch(name: str) -> None:
    model, t = build(name), tokens(2, 7)
    grids = torch.stack([text_image_grid([1, (2, 3)]), text_image_grid([1, (3, 2)])])
    positions = grid_coordinates(grids)
    both = model(t, positions=positions)
    alone = torch.cat([model(t[row : row + 1], positions=positions[row]) for row in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-12)
    assert (both - model(t)).abs().max() > 1e-3


@every_config_with_positions
def test_cached_decoding_at_image_positions_equals_the_full_forward(name: str) -> None:
    model, t = build(name), tokens(2, 13)
    positions = text_image_coordinates([3, (2, 4), 2])
    cache = model.new_cache(2, 13)
    spans = [(0, 5), (5, 6), (6, 12), (12, 13)]
    parts = [model(t[:, a:b], positions=positions[a:b], cache=cache) for a, b in spans]
    torch.testing.assert_close(torch.cat(parts, 1), model(t, positions=positions), rtol=1e-12, atol=1e-12)


@every_config
def test_activations_in_bfloat16_leave_weights_and_gradients_in_float32(name: str) -> None:
    model = build(name).float()
    model.compute_dtype = torch.bfloat16
    assert model.hidden(tokens(1, 5)).dtype == torch.bfloat16
    model(tokens(1, 5)).float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_initial_loss_is_near_that_of_guessing_and_the_residual_keeps_its_size_at_any_depth() -> None:
    spread = []
    for layers in (2, 13):
        torch.manual_seed(0)
        config = TransformerConfig(vocab_size=503, dim=48, layers=layers, hidden=96, attention=GQAConfig(num_heads=3))
        model = Transformer(config)
        t = torch.randint(0, 503, (3, 41))
        loss = torch.nn.functional.cross_entropy(model(t).flatten(0, 1), t.flatten())
        assert loss.item() == pytest.approx(math.log(503), abs=0.3)
        inner: list[Tensor] = []
        handle = model.norm.register_forward_pre_hook(lambda _, x, inner=inner: inner.append(x[0]))
        model.hidden(t)
        handle.remove()
        spread.append(inner[0].square().mean().sqrt().item())
    assert spread[1] == pytest.approx(spread[0], rel=0.25)


def test_parameters_are_counted_with_the_chosen_experts_only() -> None:
    model = build("latent attention and experts")
    total, active = model.parameter_counts()
    one_expert = 3 * 24 * 11
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == 2 * (5 - 2) * one_expert


def test_flops_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    layers = 3
    config = TransformerConfig(vocab_size=53, dim=24, layers=layers, hidden=29, attention=GQAConfig(num_heads=3))
    model = Transformer(config)
    t = tokens(2, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(t).sum().backward()
    # torch counts the full square of scores, forward and twice that backward; the model counts its causal half.
    attention = 3 * layers * 2 * 2 * 24 * 16
    counted = counter.get_total_flops() / 32
    ours = model.flops_per_token(16)
    linear = ours - 3 * sum(b.attention.flops_per_token(16) for b in model.blocks)  # type: ignore[union-attr, operator, misc]
    assert counted == pytest.approx(linear + attention, rel=1e-3)


def test_meta_device_construction_needs_no_memory() -> None:
    with torch.device("meta"):
        model = Transformer(replace(CONFIGS["grouped queries"], dim=4096, layers=5, vocab_size=100_003))
    assert model.parameter_counts()[0] > 800_000_000


def test_dense_model_compiles_as_one_graph() -> None:
    model = build("grouped queries").float()
    t = tokens(2, 8)
    expected = model.hidden(t)
    compiled = torch.compile(model.hidden, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), expected, rtol=1e-5, atol=1e-5)


def test_llama_computes_the_same_from_the_same_weights() -> None:
    transformers = pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
    model = build("grouped queries")
    config = transformers.LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        num_hidden_layers=2,
        intermediate_size=29,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    peer = transformers.LlamaForCausalLM(config).double().eval()
    state = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = model.head_weight
    for i, block in enumerate(model.blocks):
        p = f"model.layers.{i}."
        q, k, v = block.attention.qkv.weight.split((24, 12, 12))  # type: ignore[union-attr]
        gate, up = block.feed_forward.gate_up.weight.chunk(2)  # type: ignore[union-attr]
        state |= {
            p + "self_attn.q_proj.weight": q,
            p + "self_attn.k_proj.weight": k,
            p + "self_attn.v_proj.weight": v,
            p + "self_attn.o_proj.weight": block.attention.out.weight,  # type: ignore[union-attr]
            p + "mlp.gate_proj.weight": gate,
            p + "mlp.up_proj.weight": up,
            p + "mlp.down_proj.weight": block.feed_forward.down.weight,  # type: ignore[union-attr]
            p + "input_layernorm.weight": block.attention_norm.weight,  # type: ignore[union-attr]
            p + "post_attention_layernorm.weight": block.feed_forward_norm.weight,  # type: ignore[union-attr]
        }
    peer.load_state_dict(state)
    t = tokens(2, 11)
    # transformers keeps its rotary tables in float32: their rounding is what separates the two.
    torch.testing.assert_close(peer(t).logits, model(t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["latent attention and experts", "compressed queries"])
def test_deepseek_v3_computes_the_same_from_the_same_weights(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
    model = build(name)
    c, a, e = model.config, model.config.attention, model.config.experts
    assert isinstance(a, MLAConfig)
    config = transformers.DeepseekV3Config(
        vocab_size=53,
        hidden_size=c.dim,
        num_hidden_layers=c.layers,
        intermediate_size=c.hidden,
        moe_intermediate_size=e.hidden if e else 8,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_heads,
        n_shared_experts=e.num_shared_experts if e else 1,
        n_routed_experts=e.num_experts if e else 2,
        num_experts_per_tok=e.top_k if e else 1,
        routed_scaling_factor=e.scale if e else 1.0,
        kv_lora_rank=a.kv_rank,
        q_lora_rank=a.q_rank,
        qk_rope_head_dim=a.rope_dim,
        qk_nope_head_dim=a.nope_dim,
        v_head_dim=a.value_dim,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1 if e else c.layers,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope_interleave=False,
        rope_theta=10000.0,
        experts_implementation="eager",
    )
    peer = transformers.DeepseekV3ForCausalLM(config).double().eval()
    state = dict(peer.state_dict())
    state["model.embed_tokens.weight"], state["model.norm.weight"] = model.embedding, model.norm.weight
    state["lm_head.weight"] = model.head_weight
    for i, block in enumerate(model.blocks):
        p, att, ff = f"model.layers.{i}.", block.attention, block.feed_forward
        rows = (att.q_rows, a.kv_rank + a.rope_dim)  # type: ignore[union-attr]
        q, kv = att.down.weight.split(rows)  # type: ignore[union-attr]
        state[p + "self_attn.kv_a_proj_with_mqa.weight"] = kv
        if a.q_rank is None:
            state[p + "self_attn.q_proj.weight"] = q
        else:
            state[p + "self_attn.q_a_proj.weight"] = q
            state[p + "self_attn.q_a_layernorm.weight"] = att.q_norm.weight  # type: ignore[union-attr]
            state[p + "self_attn.q_b_proj.weight"] = att.q_up.weight  # type: ignore[union-attr]
        state[p + "self_attn.kv_a_layernorm.weight"] = att.kv_norm.weight  # type: ignore[union-attr]
        state[p + "self_attn.kv_b_proj.weight"] = att.kv_up.weight  # type: ignore[union-attr]
        state[p + "self_attn.o_proj.weight"] = att.out.weight  # type: ignore[union-attr]
        state[p + "input_layernorm.weight"] = block.attention_norm.weight  # type: ignore[union-attr]
        state[p + "post_attention_layernorm.weight"] = block.feed_forward_norm.weight  # type: ignore[union-attr]
        dense, prefix = (ff.shared, "mlp.shared_experts.") if isinstance(ff, MoE) else (ff, "mlp.")
        gate, up = dense.gate_up.weight.chunk(2)  # type: ignore[union-attr]
        state |= {
            p + prefix + "gate_proj.weight": gate,
            p + prefix + "up_proj.weight": up,
            p + prefix + "down_proj.weight": dense.down.weight,  # type: ignore[union-attr]
        }
        if isinstance(ff, MoE):
            ff.balancer.bias.copy_(torch.randn(5, generator=torch.Generator().manual_seed(i)) / 5)
            state |= {
                p + "mlp.gate.weight": ff.router,
                p + "mlp.gate.e_score_correction_bias": ff.balancer.bias,
                p + "mlp.experts.gate_up_proj": ff.w_up,
                p + "mlp.experts.down_proj": ff.w_down,
            }
    peer.load_state_dict(state)
    t = tokens(2, 11)
    torch.testing.assert_close(peer(t).logits, model(t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim"),
        ({"layers": 0}, "layers"),
        ({"dense_layers": -1}, "dense_layers"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"mixers": ()}, "mixers must leave a block"),
        ({"mixers": (GQAConfig(num_heads=3),)}, "mixers must leave a block"),
    ],
)
def test_impossible_fields_are_rejected_by_name(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(replace(CONFIGS["grouped queries"], **changes))  # type: ignore[arg-type]


def test_documents_with_a_cache_or_of_another_shape_are_rejected() -> None:
    model = build("grouped queries")
    with pytest.raises(ValueError, match="documents"):
        model(tokens(1, 5), documents=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="documents"):
        model(tokens(1, 5), documents=torch.zeros(1, 5, dtype=torch.int64), cache=model.new_cache(1, 5))
    with pytest.raises(ValueError, match="tokens must be"):
        model(tokens(1, 5)[0])


def test_embeddings_and_positions_of_another_size_are_rejected() -> None:
    model = build("grouped queries")
    with pytest.raises(ValueError, match=r"\(batch, time, 24\)"):
        model(torch.randn(1, 5, 23))
    for shape in [(5,), (4, 2), (1, 4, 2)]:
        with pytest.raises(ValueError, match="positions"):
            model(tokens(1, 5), positions=torch.zeros(shape))


def test_positions_are_rejected_where_nothing_takes_them() -> None:
    with pytest.raises(ValueError, match="no layer of this model takes any"):
        build("state spaces")(tokens(1, 5), positions=torch.arange(5)[:, None])


def test_a_hybrid_repeats_its_pattern_over_the_blocks() -> None:
    kinds = [type(block.attention) for block in build("hybrid of three kinds").blocks]
    assert kinds == [SSM, GQA, MLA, SSM]


def test_a_hybrid_survives_its_own_file() -> None:
    config = CONFIGS["hybrid of three kinds"]
    assert configs.loads(TransformerConfig, configs.dumps(config)) == config


def test_a_state_space_caches_as_much_for_one_token_as_for_a_thousand() -> None:
    model = build("state spaces")
    sizes = [[cache.elements() for cache in model.new_cache(1, capacity)] for capacity in (1, 1000)]  # type: ignore[union-attr]
    assert sizes[0] == sizes[1] == [23 * 6] * 2


def test_a_tied_table_is_an_embedding_to_the_optimizers_and_there_is_no_head() -> None:
    roles = {name: group["role"] for group in param_groups(build("tied multi-head")) for name in group["param_names"]}
    assert roles["embedding"] == "embedding"
    assert "head" not in roles.values()
    untied = {group["role"]: group["param_names"] for group in param_groups(build("grouped queries"))}
    assert (untied["embedding"], untied["head"]) == (["embedding"], ["head.weight"])
