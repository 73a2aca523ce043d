"""DropToken: which tokens stay, that leaving one out is masking its column, and that evaluation uses all of them."""

import itertools

import pytest
import torch

from danlu.models import GPT, GPTConfig, Transformer, TransformerConfig
from danlu.nn import GQAConfig, MLAConfig, SSMConfig
from danlu.objectives import CausalLM, CausalLMConfig, drop_tokens, evaluate, kept_tokens

ATTENTIONS = {
    "bidirectional": GQAConfig(num_heads=3, mask="bidirectional"),
    "causal": GQAConfig(num_heads=3),
    "latent": MLAConfig(num_heads=3, kv_rank=8, nope_dim=6, rope_dim=2, value_dim=5),
}


def build(attention, **options) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "dim": 24, "layers": 3, "hidden": 17, **options}
    return Transformer(TransformerConfig(attention=attention, **sizes))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(rows: int, time: int) -> torch.Tensor:
    return torch.randint(31, (rows, time), generator=generator(7))


@pytest.mark.parametrize(("tokens", "rate", "kept"), [(13, 0.0, 13), (13, 0.25, 10), (13, 0.5, 7), (2, 0.99, 1)])
def test_the_number_kept_is_fixed_and_their_order_stays(tokens, rate, kept):
    index = kept_tokens(5, tokens, rate, generator=generator())
    assert index.shape == (5, kept)
    assert (index.diff(dim=1) > 0).all()
    assert index.min() >= 0
    assert index.max() < tokens


def test_every_token_stays_equally_often_and_protected_ones_always():
    index = kept_tokens(4000, 8, 0.5, generator=generator())
    share = torch.bincount(index.flatten(), minlength=8) / 4000
    assert (share - 0.5).abs().max() < 5 * (0.25 / 4000) ** 0.5
    protected = torch.zeros(4000, 8, dtype=torch.bool)
    protected[:, 5] = True
    share = torch.bincount(kept_tokens(4000, 8, 0.5, protected=protected, generator=generator()).flatten()) / 4000
    assert share[5] == 1
    assert (share[torch.arange(8) != 5] - 3 / 7).abs().max() < 5 * (0.25 / 4000) ** 0.5


def set_apart(kept, time):
    """Where all tokens stand, those that are kept first, and documents that hide the others from them."""
    left_out = torch.ones(len(kept), time, dtype=torch.int64).scatter(1, kept, 0)
    return left_out.sort(dim=1, stable=True).indices, left_out.sort(dim=1, stable=True).values


@pytest.mark.parametrize("name", ATTENTIONS)
def test_leaving_tokens_out_is_masking_their_columns_in_every_layer(name):
    model, tokens = build(ATTENTIONS[name]), draw(2, 19)
    kept = kept_tokens(2, 19, 0.4, generator=generator())
    order, documents = set_apart(kept, 19)
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        model = model.to(dtype)
        masked = model.hidden(tokens.gather(1, order), documents=documents, positions=order[..., None])
        masked = masked[:, : kept.shape[1]]
        short = tokens.gather(1, kept)
        assert (masked - model.hidden(short, positions=kept[..., None])).abs().max() < bound
        # Words that are deleted renumber those behind them: another thing.
        assert (masked - model.hidden(short)).abs().max() > 0.01


def test_a_table_of_positions_is_looked_up_where_the_tokens_stood():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, dim=12, layers=2, num_heads=3, context=19)).double()
    with torch.no_grad():
        model.positions.mul_(50)
    tokens, kept = draw(2, 19), kept_tokens(2, 19, 0.4, generator=generator())
    order, documents = set_apart(kept, 19)
    masked = model.hidden(tokens.gather(1, order), documents=documents, positions=order[..., None])
    masked = masked[:, : kept.shape[1]]
    short = tokens.gather(1, kept)
    assert (masked - model.hidden(short, positions=kept[..., None])).abs().max() < 1e-10
    assert (masked - model.hidden(short)).abs().max() > 0.01


def test_the_mean_mask_changes_nothing_and_the_mean_of_the_masked_does():
    scores = torch.randn(6, 6, generator=generator(), dtype=torch.float64).softmax(-1)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))[1:], dtype=torch.float64)
    chance = (0.25**masks * 0.75 ** (1 - masks)).prod(-1)
    chance /= chance.sum()
    masked = scores * masks[:, None]
    mean = (chance[:, None, None] * masked / masked.sum(-1, keepdim=True)).sum(0)
    constant = (0.25 * scores) / (0.25 * scores).sum(-1, keepdim=True)
    assert (constant - scores).abs().max() < 1e-15
    assert (mean - scores).abs().max() > 0.05


def test_targets_and_documents_are_cut_with_their_tokens_and_separators_stay():
    tokens = draw(3, 17)
    documents = torch.zeros(3, 17, dtype=torch.int32)
    documents[:, 4:], documents[:, 11:] = 1, 2
    batch = {"tokens": tokens, "targets": tokens + 100, "documents": documents, "weights": torch.ones(3)}
    short = drop_tokens(batch, 0.5, generator=generator())
    kept = short["positions"][..., 0]
    assert kept.shape == (3, 9)
    assert torch.equal(short["tokens"], tokens.gather(1, kept))
    assert torch.equal(short["targets"], short["tokens"] + 100)
    assert torch.equal(short["documents"], documents.gather(1, kept))
    assert torch.equal(short["weights"], batch["weights"])
    assert all({0, 4, 11} <= set(row) for row in kept.tolist())


def test_evaluation_is_bit_equal_with_and_without():
    tokens = draw(3, 17)
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    model = build(ATTENTIONS["causal"])
    plain, dropping = CausalLM(model), CausalLM(model, CausalLMConfig(drop_tokens=0.5))
    assert torch.equal(plain.eval()(batch), dropping.eval()(batch))
    assert evaluate(plain, [batch]) == evaluate(dropping, [batch])
    assert not torch.equal(plain.train()(batch), dropping.train()(batch))


def test_the_loss_is_the_mean_over_kept_targets_scaled_to_all():
    tokens = draw(3, 17)
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    model = build(ATTENTIONS["causal"])
    objective = CausalLM(model, CausalLMConfig(drop_tokens=0.5)).train()
    torch.manual_seed(3)
    loss = objective(batch)
    torch.manual_seed(3)
    short = drop_tokens(batch, 0.5)
    logits = torch.nn.functional.linear(model.hidden(short["tokens"], positions=short["positions"]), model.head_weight)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), short["targets"].flatten())
    torch.testing.assert_close(loss, mean * objective.denominator(batch))


def test_a_rate_of_one_and_a_model_whose_time_is_the_tokens_read_raise():
    with pytest.raises(ValueError, match=r"drop_tokens must be in \[0.*, 1\)"):
        CausalLMConfig(drop_tokens=1.0)
    hybrid = build(ATTENTIONS["causal"], mixers=(SSMConfig(), None))
    with pytest.raises(
        ValueError, match="drop_tokens must be 0 for a model with SSM, whose time is the number of tokens read"
    ):
        CausalLM(hybrid, CausalLMConfig(drop_tokens=0.1))
    CausalLM(hybrid)
    with pytest.raises(ValueError, match="protected must be"):
        kept_tokens(2, 5, 0.5, protected=torch.zeros(2, 4, dtype=torch.bool))


def test_a_step_s_work_falls_at_least_by_the_share_that_is_left_out() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    time = 128
    tokens = torch.randint(31, (2, time))
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    work = {}
    for rate in (0.0, 0.1, 0.25, 0.5):
        objective = CausalLM(build(GQAConfig(num_heads=3)), CausalLMConfig(drop_tokens=rate)).train()
        with FlopCounterMode(display=False) as counter:
            objective(batch).backward()
        work[rate] = counter.get_total_flops()
    for rate in (0.1, 0.25, 0.5):
        kept = 1 - round(rate * time) / time
        assert work[rate] <= 1.001 * kept * work[0.0]
        assert work[rate] >= kept**2 * work[0.0]


def test_a_seed_draws_the_same_tokens_whatever_was_drawn_elsewhere():
    first = kept_tokens(3, 29, 0.5, generator=generator(5))
    torch.rand(7)
    assert torch.equal(kept_tokens(3, 29, 0.5, generator=generator(5)), first)
    assert not torch.equal(kept_tokens(3, 29, 0.5, generator=generator(6)), first)
