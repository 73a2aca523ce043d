"""Masked language modelling: targets and inputs, the table that corrects the difference, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import MaskedLM, MaskedLMConfig, evaluate, expected_embedding
from danlu.objectives.masked_lm import askable

BIDIRECTIONAL = GQAConfig(num_heads=2, mask="bidirectional")


def build(vocab: int = 13, **options) -> MaskedLM:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=vocab, dim=16, layers=1, hidden=24, attention=BIDIRECTIONAL))
    return MaskedLM(model, MaskedLMConfig(**options))


def draw(rows: int, time: int, vocab: int = 13) -> dict[str, torch.Tensor]:
    stream = torch.randint(vocab, (rows, time + 1), generator=torch.Generator().manual_seed(5))
    return {"tokens": stream[:, :-1], "targets": stream[:, 1:].clone()}


def shown(objective: MaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the embeddings that the network reads."""
    kept = []
    objective.model.hidden = lambda x, **_: kept.append(x) or x
    objective(batch)
    return kept[0].detach()


def test_the_share_asked_for_is_fixed_and_never_the_first_token_or_padding():
    objective, batch = build(rate=0.3), draw(4, 23)
    batch["targets"][1, 10:] = -100
    batch["targets"][2] = -100
    assert askable(batch).sum(1).tolist() == [22, 10, 0, 22]
    assert objective.denominator(batch).item() == 7 + 3 + 0 + 7
    _, wanted = objective._predict(batch)
    assert (wanted.view(4, -1) != -100).sum(1).tolist() == [7, 3, 0, 7]
    objective.config = MaskedLMConfig(rate=0.3, masked=1.0, random=0.0)
    masked = (shown(objective, batch) == objective.mask_token).all(-1)
    assert masked.sum(1).tolist() == [7, 3, 0, 7]
    assert not masked[~askable(batch)].any()


def test_tokens_that_are_asked_for_are_masked_swapped_or_shown_as_often_as_said():
    objective, batch = build(vocab=997, rate=0.5, masked=0.6, random=0.3), draw(500, 41, 997)
    x = shown(objective, batch)[:, 1:]
    masked = (x == objective.mask_token).all(-1)
    same = (x == objective.model.embedding[batch["tokens"][:, 1:]]).all(-1)
    total = 500 * 20
    for found, share in ((masked.sum(), 0.6), ((~masked & ~same).sum(), 0.3 * 996 / 997)):
        assert abs(found.item() / total - share) < 5 * (share * (1 - share) / total) ** 0.5


def test_the_loss_is_the_cross_entropy_of_the_hidden_tokens_alone():
    objective, batch = build(rate=0.4, masked=1.0, random=0.0), draw(3, 11)
    torch.manual_seed(1)
    x, wanted = objective._predict(batch)
    expected = F.cross_entropy(F.linear(x, objective.model.head_weight), wanted, reduction="sum")
    torch.manual_seed(1)
    loss = objective(batch)
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32
    assert (wanted != -100).sum() == objective.denominator(batch) == 12
    loss.backward()
    assert objective.mask_token.grad.abs().sum() > 0


def test_what_is_asked_for_is_not_seen():
    """With every token hidden the prediction cannot depend on the text."""
    objective = build(rate=1.0, masked=1.0, random=0.0)
    first, second = draw(2, 9), draw(2, 9)
    second["tokens"] = (first["tokens"] + 1) % 13
    second["tokens"][:, 0] = first["tokens"][:, 0]
    states = []
    for batch in (first, second):
        torch.manual_seed(2)
        states.append(objective._predict(batch)[0])
    assert torch.equal(*states)


def test_the_corrected_table_is_berts_and_its_identities_hold():
    table = torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask, mean = table[4], table.mean(0)
    fixed = expected_embedding(table, mask)
    for found, wanted in (
        (fixed, 0.865 * table + 0.12 * mask + 0.015 * mean),
        (fixed[4], 0.985 * mask + 0.015 * mean),
        (fixed.mean(0), 0.88 * mean + 0.12 * mask),
        (fixed[0] - fixed[1], 0.865 * (table[0] - table[1])),
        (
            expected_embedding(torch.ones(3, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)),
            torch.ones(3, 2),
        ),
        (expected_embedding(table, mask, rate=0.4, masked=1.0, random=0.0), 0.6 * table + 0.4 * mask),
    ):
        torch.testing.assert_close(found, wanted.double(), rtol=0, atol=1e-12)


def test_dropped_tokens_shorten_training_and_leave_evaluation_alone():
    batch = draw(3, 21)
    plain, dropping = build(rate=0.3), build(rate=0.3, drop_tokens=0.5)
    assert evaluate(plain, [batch]) == evaluate(dropping, [batch])
    assert shown(dropping.train(), batch).shape == (3, 11, 16)
    assert dropping.denominator(batch) == plain.denominator(batch) == 18
    assert shown(dropping.eval(), batch).shape == (3, 21, 16)


def test_evaluation_repeats_restores_the_mode_and_rejects_empty_batches():
    objective, batch = build().train(), draw(5, 31)
    found = evaluate(objective, [batch])
    assert found == evaluate(objective, [batch])
    assert set(found) == {"val_loss", "val_accuracy"}
    assert objective.training
    with pytest.raises(ValueError, match="must hold tokens"):
        evaluate(objective, [])


def test_a_token_that_the_others_tell_is_learnt():
    """A row is one token again and again: a hidden one is known from any that is seen."""
    objective = build(rate=0.1)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        tokens = torch.randint(13, (16, 1), generator=generator).expand(16, 8)
        batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
        (objective(batch) / objective.denominator(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate(objective, [batch])["val_accuracy"] > 0.5  # 1/13 by guessing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be in"),
        ({"masked": 0.9, "random": 0.2}, "masked [+] random must be at most 1"),
        ({"chunk": 0}, "chunk must be"),
        ({"drop_tokens": -0.1}, "drop_tokens must be"),
    ],
)
def test_shares_out_of_range_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedLMConfig(**options)


def test_a_mask_of_another_size_is_rejected():
    with pytest.raises(ValueError, match="table must be"):
        expected_embedding(torch.ones(3, 2), torch.ones(3))


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.7])
def test_a_target_weighs_the_same_at_every_drop_rate(drop):
    """A head of zeros makes every loss log V: the sum counts the targets of the whole batch, however many are left."""
    objective, batch = build(rate=0.3, drop_tokens=drop).train(), draw(4, 40)
    batch["targets"][1, 10:] = -100
    torch.nn.init.zeros_(objective.model.head.weight)
    expected = objective.denominator(batch) * torch.tensor(13.0).log()
    torch.testing.assert_close(objective(batch), expected)


def test_a_sequence_with_anything_to_ask_is_asked_one_token_at_least():
    objective, batch = build(rate=0.15), draw(3, 20)
    batch["targets"][1, 2:] = -100
    batch["targets"][2] = -100
    assert askable(batch).sum(1).tolist() == [19, 2, 0]
    assert objective.denominator(batch).item() == 3 + 1 + 0
