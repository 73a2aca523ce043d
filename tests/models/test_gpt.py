"""The plain GPT: cached equals uncached, documents apart, and Hugging Face's GPT-2 from the same weights."""

import pytest
import torch

from danlu.models import GPT, GPTConfig


def build() -> GPT:
    torch.manual_seed(13)
    return GPT(GPTConfig(vocab_size=53, dim=24, layers=2, num_heads=3, context=23)).double().eval()


def tokens(batch: int, time: int) -> torch.Tensor:
    return torch.randint(0, 53, (batch, time), generator=torch.Generator().manual_seed(14))


def test_cached_decoding_equals_the_full_forward() -> None:
    model, t = build(), tokens(2, 19)
    cache = model.new_cache(2, 19)
    parts = [model(t[:, a:b], cache=cache) for a, b in [(0, 7), (7, 8), (8, 17), (17, 19)]]
    torch.testing.assert_close(torch.cat(parts, 1), model(t), rtol=1e-12, atol=1e-12)


def test_a_document_packed_behind_another_does_not_see_it() -> None:
    model, t = build(), tokens(1, 17)
    documents = torch.tensor([[0] * 6 + [1] * 11])
    changed = t.clone()
    changed[:, :6] = 5
    a, b = (model(x, documents=documents)[:, 6:] for x in (t, changed))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_gpt2_computes_the_same_from_the_same_weights() -> None:
    transformers = pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
    model = build()
    config = transformers.GPT2Config(
        vocab_size=53, n_embd=24, n_layer=2, n_head=3, n_positions=23, layer_norm_epsilon=1e-5
    )
    peer = transformers.GPT2LMHeadModel(config).double().eval()
    state = {name: torch.zeros_like(value) for name, value in peer.state_dict().items()}  # GPT-2's biases stay zero
    state |= {"transformer.wte.weight": model.embedding, "lm_head.weight": model.embedding}
    state |= {"transformer.wpe.weight": model.positions, "transformer.ln_f.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        p = f"transformer.h.{i}."
        state |= {
            p + "ln_1.weight": block.attention_norm.weight,  # type: ignore[union-attr]
            p + "ln_2.weight": block.feed_forward_norm.weight,  # type: ignore[union-attr]
            p + "attn.c_attn.weight": block.attention.qkv.weight.T,  # type: ignore[union-attr]
            p + "attn.c_proj.weight": block.attention.out.weight.T,  # type: ignore[union-attr]
            p + "mlp.c_fc.weight": block.up.weight.T,  # type: ignore[union-attr]
            p + "mlp.c_proj.weight": block.down.weight.T,  # type: ignore[union-attr]
        }
    peer.load_state_dict(state)
    t = tokens(2, 11)
    torch.testing.assert_close(peer(t).logits, model(t), rtol=1e-10, atol=1e-10)


def test_a_text_longer_than_the_positions_is_rejected() -> None:
    with pytest.raises(ValueError, match="23 positions"):
        build()(tokens(1, 24))


def test_positions_of_packed_documents_begin_anew() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, dim=12, layers=2, num_heads=3, context=7)).double()
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 7]])
    packed = model(torch.cat((first, second), 1), documents=torch.tensor([[5, 5, 5, 2, 2, 2, 2]]))
    torch.testing.assert_close(packed, torch.cat((model(first), model(second)), 1), rtol=1e-12, atol=1e-12)
