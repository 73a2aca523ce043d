"""Sampling: greedy is the argmax, limits hold, and the distribution is the model's."""

import pytest
import torch

from danlu.models import GPT, GPTConfig, Transformer, TransformerConfig, generate, sample_token
from danlu.models.generate import for_single_tokens
from danlu.nn import GQAConfig, MLAConfig, MoEConfig


def build() -> Transformer:
    torch.manual_seed(9)
    return Transformer(TransformerConfig(vocab_size=31, dim=16, layers=2, hidden=24, attention=GQAConfig(num_heads=2)))


def test_greedy_generation_takes_the_most_likely_token_of_the_full_forward() -> None:
    model = build()
    text = [3, 1, 4]
    for token in generate(model, [3, 1, 4], max_new_tokens=9, temperature=0):
        assert token == model(torch.tensor([text]))[0, -1].argmax().item()
        text.append(token)
    assert len(text) == 12


def several() -> dict[str, Transformer | GPT]:
    torch.manual_seed(9)
    mla = MLAConfig(num_heads=3, kv_rank=7, nope_dim=5, rope_dim=4, value_dim=11)
    sizes = {"vocab_size": 31, "dim": 13, "layers": 2, "hidden": 24, "attention": mla}
    return {
        "dense": build(),
        "latent, experts": Transformer(TransformerConfig(**sizes, experts=MoEConfig(num_experts=5, top_k=2, hidden=7))),
        "plain": GPT(GPTConfig(vocab_size=31, dim=12, layers=2, num_heads=3)),
    }


@pytest.mark.parametrize("name", several())
def test_weights_laid_out_for_single_tokens_are_the_same_model(name: str) -> None:
    model = several()[name].eval()
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    many = torch.get_num_threads() > 1
    single = for_single_tokens(model)
    for key, value in single.state_dict().items():
        assert torch.equal(value, before[key][1])
        elsewhere = key == "embedding" or "position" in key or value.dim() < 2
        if not elsewhere and (many or value.shape[-2] >= value.shape[-1]):
            assert value.stride(-2) == 1 or "router" in key
        else:
            assert value.data_ptr() == before[key][0]
    assert all(value.data_ptr() == before[key][0] for key, value in model.state_dict().items())
    tokens = torch.tensor([[3, 1, 4]])
    torch.testing.assert_close(single(tokens), model(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", several())
def test_float32_weights_are_decoded_in_float32_whatever_the_arithmetic_of_training(name: str) -> None:
    model = several()[name]
    texts = []
    for dtype in (None, torch.bfloat16):
        model.compute_dtype = dtype
        texts.append(list(generate(model, [3, 1], max_new_tokens=40, temperature=0)))
        assert model.compute_dtype is dtype
    assert texts[0] == texts[1]


def test_a_seeded_generator_repeats_itself() -> None:
    model = build()
    runs = [
        list(generate(model, [3], max_new_tokens=17, generator=torch.Generator().manual_seed(5), top_k=7, top_p=0.9))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_the_stop_token_ends_the_text_and_is_not_yielded() -> None:
    model = build()
    free = list(generate(model, [3], max_new_tokens=9, temperature=0))
    stop = free[4]
    assert list(generate(model, [3], max_new_tokens=9, temperature=0, stop=stop)) == free[: free.index(stop)]


def test_drawn_frequencies_follow_the_tempered_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_token(logits, temperature=0.5, generator=g) for _ in range(4000)])
    expected = (logits / 0.5).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, expected, rtol=0, atol=0.03)


def test_top_k_and_top_p_keep_only_the_most_likely_tokens() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    g = torch.Generator().manual_seed(0)
    assert {int(sample_token(logits, top_k=2, generator=g)) for _ in range(200)} == {1, 3}
    assert {int(sample_token(logits, top_p=0.69, generator=g)) for _ in range(200)} == {1, 3}
    assert {int(sample_token(logits, top_p=0.71, generator=g)) for _ in range(200)} == {1, 2, 3}
    assert {int(sample_token(logits, top_p=1e-9, generator=g)) for _ in range(20)} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt must hold at least one token"),
        ({"prompt": [31]}, "token numbers below 31"),
        ({"prompt": [-1]}, "token numbers below 31"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_impossible_arguments_are_rejected_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(generate(build(), **({"prompt": [1]} | arguments)))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_module_keeps_the_mode_it_was_in(dtype: torch.dtype) -> None:
    model = next(iter(several().values())).to(dtype).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    for _ in generate(model, [1, 2], max_new_tokens=3):
        assert [module.training for module in model.modules()] == modes
    assert [module.training for module in model.modules()] == modes
