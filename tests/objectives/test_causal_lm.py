"""Next-token prediction: the sum, the denominator, and what evaluation reports."""

import math

import pytest
import torch
import torch.nn.functional as F

from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import CausalLM, CausalLMConfig, evaluate


def build(byte_lengths: torch.Tensor | None = None) -> CausalLM:
    torch.manual_seed(11)
    model = Transformer(TransformerConfig(vocab_size=31, dim=16, layers=1, hidden=24, attention=GQAConfig(num_heads=2)))
    return CausalLM(model, CausalLMConfig(chunk=3), byte_lengths=byte_lengths)


def batch(rows: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(rows)
    targets = torch.randint(0, 31, (rows, 7), generator=g)
    targets[0, 2] = -100
    return {"tokens": torch.randint(0, 31, (rows, 7), generator=g), "targets": targets}


def test_loss_is_the_summed_cross_entropy_of_the_logits() -> None:
    objective, b = build(), batch(3)
    logits = objective.model(b["tokens"])
    expected = F.cross_entropy(logits.flatten(0, 1), b["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(objective(b), expected)
    assert objective.denominator(b).item() == 20


def test_z_loss_is_part_of_training_and_not_of_evaluation() -> None:
    objective, b = build(), batch(3)
    plain = objective(b)
    objective.config = CausalLMConfig(z_loss=0.1)
    logits = objective.model(b["tokens"])
    squares = logits.logsumexp(-1).square()[b["targets"] != -100].sum()
    torch.testing.assert_close(objective(b), plain + 0.1 * squares)
    torch.testing.assert_close(objective.eval()(b), plain)
    with pytest.raises(ValueError, match="z_loss must be"):
        CausalLMConfig(z_loss=-0.1)


def test_evaluation_weighs_batches_by_their_tokens_and_bits_by_their_bytes() -> None:
    lengths = torch.arange(31) % 5
    objective = build(lengths)
    batches = [batch(3), batch(5)]
    found = evaluate(objective, batches)
    total = sum(objective(b).item() for b in batches)
    count = sum(int(objective.denominator(b)) for b in batches)
    size = sum(int(lengths[b["targets"][b["targets"] != -100]].sum()) for b in batches)
    assert found["val_loss"] == pytest.approx(total / count, rel=1e-6)
    assert found["val_bpb"] == pytest.approx(total / size / math.log(2), rel=1e-6)


def test_evaluation_restores_the_mode_and_needs_no_byte_lengths() -> None:
    objective = build().train()
    assert set(evaluate(objective, [batch(2)])) == {"val_loss"}
    assert objective.training


def test_evaluating_nothing_is_rejected() -> None:
    with pytest.raises(ValueError, match="must hold tokens"):
        evaluate(build(), [])


def test_a_network_that_is_no_language_model_is_rejected_by_name() -> None:
    from danlu.models import ConvNet, ConvNetConfig

    network = ConvNet(ConvNetConfig(image_size=8, widths=(4,)))
    with pytest.raises(TypeError, match=r"model must be a language model \(.*\) for CausalLM, got ConvNet"):
        CausalLMConfig().build(network)


@pytest.mark.parametrize("mask", ["bidirectional", "anti-causal", "mixed-heads", "mixed-layers"])
def test_a_mask_that_shows_the_token_to_be_predicted_is_rejected(mask: str) -> None:
    from danlu.nn import GQAConfig

    sizes = TransformerConfig(vocab_size=11, dim=16, layers=2, hidden=8, attention=GQAConfig(num_heads=2, mask=mask))
    with pytest.raises(ValueError, match="mask must be 'causal' for next-token prediction"):
        CausalLMConfig().build(sizes.build())


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.7])
def test_a_target_weighs_the_same_at_every_drop_rate(drop: float) -> None:
    """A head of zeros makes every loss log V: the sum counts the targets, all of them where all are asked for."""
    objective, b = build().train(), batch(3)
    objective.config = CausalLMConfig(drop_tokens=drop)
    torch.nn.init.zeros_(objective.model.head.weight)
    asked = {**b, "targets": b["targets"].clamp_min(0)}
    torch.testing.assert_close(objective(asked), asked["targets"].numel() * torch.tensor(31.0).log())
    rows = len(b["tokens"])
    sums = torch.stack([objective({**b, "position": rows * k + torch.arange(rows)}) for k in range(200)]).detach()
    error = sums.std() / 200**0.5
    assert abs(sums.mean() - 20 * math.log(31)) < 4 * error + 1e-3
    nothing = {**b, "targets": torch.full_like(b["targets"], -100)}
    assert objective(nothing).item() == 0
