"""Generation: greedy is the argmax, and many prompts give together what each gives alone."""

import pytest
import torch

from danlu.models import (
    GPT,
    GPTConfig,
    Transformer,
    TransformerConfig,
    generate,
    generate_batch,
    generate_steps,
    ready_to_generate,
)
from danlu.models.generate import _WORTH_A_LAYOUT, for_single_tokens
from danlu.nn import GQAConfig, KVSharedConfig, LayerCache, MLAConfig, MoEConfig, SSMConfig
from danlu.nn.ssm import RTFConfig, S4Config, S4DConfig


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
        elsewhere = (key == "embedding" and name != "plain") or "position" in key or value.dim() < 2
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt must hold at least one token"),
        ({"prompt": [31]}, "token numbers below 31"),
        ({"prompt": [-1]}, "token numbers below 31"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt": torch.ones(1, 3, dtype=torch.int64)}, r"\(time,\), or floats \(time, dim\), got shape \(1, 3\)"),
        ({"positions": torch.zeros(3, 1)}, "positions must be of one prompt, of 256 tokens"),
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


SIZES = {"vocab_size": 31, "dim": 16, "layers": 3, "hidden": 24}
MIXERS = {
    "heads": GQAConfig(num_heads=4),
    "groups": GQAConfig(num_heads=4, num_kv_heads=2, rope_dim=2),
    "prefix": GQAConfig(num_heads=4, mask="prefix"),
    "latent": MLAConfig(num_heads=3, kv_rank=7, nope_dim=5, rope_dim=4, value_dim=11),
    "shared": KVSharedConfig(num_heads=2, head_dim=10, rope_dim=4),
    "diagonal": SSMConfig(kernel=S4DConfig(state=6)),
    "low rank": SSMConfig(kernel=S4Config(state=6)),
    "transfer": SSMConfig(kernel=RTFConfig(state=6)),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2, 3, 8, 4], [6, 2]]


def mixed(name: str) -> Transformer | GPT:
    torch.manual_seed(3)
    if name == "gpt":
        return GPT(GPTConfig(vocab_size=31, dim=16, layers=3, num_heads=4, context=24)).double()
    if name == "hybrid":
        return Transformer(
            TransformerConfig(
                **SIZES, attention=MIXERS["latent"], mixers=(MIXERS["diagonal"], None), experts=MoEConfig(num_experts=5)
            )
        ).double()
    return Transformer(TransformerConfig(**SIZES, attention=MIXERS[name])).double()


@pytest.mark.parametrize("name", [*MIXERS, "hybrid", "gpt"])
def test_prompts_of_unequal_length_give_together_what_each_gives_alone(name: str) -> None:
    model = mixed(name)
    texts = generate_batch(model, PROMPTS, max_new_tokens=13, temperature=0)
    for prompt, text in zip(PROMPTS, texts):
        (alone,) = generate_batch(model, [prompt], max_new_tokens=13, temperature=0)
        assert text.tokens == alone.tokens
        torch.testing.assert_close(text.logprobs, alone.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["heads", "latent", "diagonal", "hybrid", "gpt"])
def test_log_probabilities_are_those_of_the_whole_text_read_at_once(name: str) -> None:
    model = mixed(name).eval()
    for prompt, text in zip(PROMPTS, generate_batch(model, PROMPTS, max_new_tokens=7, temperature=0.7)):
        whole = torch.tensor([prompt + text.tokens])
        read = model(whole)[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = read.gather(1, whole[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(text.logprobs).double(), expected, rtol=0, atol=1e-5)


def test_a_model_whose_prefix_sees_itself_reads_the_prompt_as_one() -> None:
    model, prompt = mixed("prefix"), torch.tensor([PROMPTS[2]])
    ((first,),) = generate_steps(model, prompt, max_new_tokens=1, temperature=0)
    assert first is not None
    seen_whole, causal = (model(prompt, prefix=m)[0, -1].log_softmax(-1)[first.token].item() for m in (9, None))
    assert first.logprob == pytest.approx(seen_whole, abs=1e-5)
    assert first.logprob != pytest.approx(causal, abs=1e-2)


def test_float32_weights_in_another_layout_write_the_same_texts() -> None:
    model = mixed("latent").float()
    ready = ready_to_generate(model)
    texts = generate_batch(model, PROMPTS, max_new_tokens=2 * _WORTH_A_LAYOUT, temperature=0)
    assert [text.tokens for text in texts] == [
        text.tokens for text in generate_batch(ready, PROMPTS, max_new_tokens=2 * _WORTH_A_LAYOUT, temperature=0)
    ]


def test_a_model_made_ready_is_of_its_moment_and_shares_no_weight() -> None:
    model = mixed("heads").float()
    before = list(generate(model, [3], max_new_tokens=9, temperature=0))
    ready = ready_to_generate(model)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in ready.state_dict().values()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert list(generate(ready, [3], max_new_tokens=9, temperature=0)) == before
    assert list(generate(model, [3], max_new_tokens=9, temperature=0)) != before


def test_a_generator_for_each_prompt_makes_its_text_independent_of_the_others() -> None:
    model = mixed("groups")

    def write(indices: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(40 + i) for i in indices]
        prompts = [PROMPTS[i] for i in indices]
        return [text.tokens for text in generate_batch(model, prompts, generator=generators, max_new_tokens=9)]

    together = write([0, 1, 2, 3])
    assert write([2, 0]) == [together[2], together[0]]
    assert together[0] != together[3]


def test_each_text_ends_at_its_own_stop_and_the_others_go_on() -> None:
    model = mixed("heads")
    free = [text.tokens for text in generate_batch(model, PROMPTS, max_new_tokens=13, temperature=0)]
    stops = {free[0][4], free[2][2]}

    def cut(text: list[int]) -> list[int]:
        return next((text[:i] for i, token in enumerate(text) if token in stops), text)

    for stop in (stops, list(stops), tuple(stops)):
        texts = generate_batch(model, PROMPTS, max_new_tokens=13, temperature=0, stop=stop)
        assert [text.tokens for text in texts] == [cut(text) for text in free]
    assert len({len(cut(text)) for text in free}) > 1


def test_the_iterator_ends_when_every_text_has() -> None:
    model = mixed("heads")
    steps = list(generate_steps(model, PROMPTS, max_new_tokens=13, temperature=0, stop=set(range(31))))
    assert steps == []


def test_embeddings_stand_in_place_of_tokens_and_positions_in_place_of_the_count() -> None:
    model = mixed("groups")
    prompt = torch.tensor(PROMPTS[2])
    expected = list(generate(model, prompt, max_new_tokens=9, temperature=0))
    embedded = model.embedding.detach()[prompt]
    assert list(generate(model, embedded, max_new_tokens=9, temperature=0)) == expected
    counted = torch.arange(len(prompt) + 8)[:, None].double()
    assert list(generate(model, embedded, max_new_tokens=9, temperature=0, positions=counted + 5)) == expected
    assert list(generate(model, embedded, max_new_tokens=9, temperature=0, positions=counted * 9)) != expected


def test_a_high_repetition_penalty_lets_no_token_come_twice() -> None:
    model = mixed("heads")
    text = list(generate(model, [3, 1], max_new_tokens=20, temperature=0, repetition_penalty=1e9))
    assert len({3, 1, *text}) == 22
    assert len(set(generate(model, [3, 1], max_new_tokens=20, temperature=0))) < 20


def test_a_plain_gpt_is_asked_for_too_many_tokens_before_it_draws_one() -> None:
    model = mixed("gpt")
    assert len(list(generate(model, [1] * 5, max_new_tokens=20))) == 20
    for prompts in ([[1] * 5], [[1] * 5, [1]]):
        steps = generate_steps(model, prompts, max_new_tokens=21)
        with pytest.raises(ValueError, match=r"24 positions \(context\), 25 are needed"):
            next(steps)


def test_a_cache_that_cannot_be_joined_is_named() -> None:
    class Alone:
        length = 0

    model = mixed("heads")
    model.new_cache = lambda batch, capacity: [Alone() for _ in range(3)]  # type: ignore[method-assign, assignment]
    model.hidden = lambda tokens, **_: tokens[..., None].double()  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError, match="Alone has no `joined`"):
        next(generate_steps(model, PROMPTS, max_new_tokens=3))


def test_no_prompt_and_too_few_generators_are_rejected() -> None:
    with pytest.raises(ValueError, match="a generator for each, got 0 and 0"):
        next(generate_steps(mixed("heads"), []))
    with pytest.raises(ValueError, match="got 5 and 1"):
        next(generate_steps(mixed("heads"), PROMPTS, generator=[torch.Generator()]))


def test_joined_rows_stand_behind_zeros_with_their_last_tokens_aligned() -> None:
    caches = [LayerCache(torch.full((rows, 2, 5, 3), torch.nan)) for rows in (1, 2)]
    tokens = [torch.randn(1, 2, 4, 3), torch.randn(2, 2, 1, 3)]
    for cache, new in zip(caches, tokens):
        cache.append(new)
    joined = caches[0].joined(caches[1:], 7)
    (seen,) = joined.append(torch.ones(3, 2, 1, 3))
    assert joined.length == 5
    assert joined.capacity == 7
    assert torch.equal(seen[:1, :, :4], tokens[0])
    assert torch.equal(seen[1:, :, 3:4], tokens[1])
    assert not seen[1:, :, :3].any()
