"""Padding takes no part in the balance of experts, from the loaders through the objectives into the update."""

import numpy as np
import pytest
import torch

from danlu.data.captions import VOCABULARY, CaptionsConfig, Sentences
from danlu.data.loader import validation_batches
from danlu.models import GPT, GPTConfig, TextImage, TextImageConfig, Transformer, TransformerConfig
from danlu.nn import AuxiliaryLossConfig, GQAConfig, LossFreeConfig, MoEConfig, balance
from danlu.objectives import (
    Captioning,
    CausalLM,
    CausalLMConfig,
    MaskedLM,
    MaskedLMConfig,
    PrefixLM,
    PrefixLMConfig,
    evaluate,
)
from danlu.optim import AdamWConfig

TEXT = np.array([3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 4, 2, 7, 0], dtype=np.uint32)


def network(kind=Transformer, config=TransformerConfig, *, mask="causal", how=None, **sizes):
    torch.manual_seed(0)
    experts = MoEConfig(num_experts=5, top_k=2, hidden=4, balance=how or LossFreeConfig())
    attention = GQAConfig(num_heads=2, mask=mask)
    options = {"vocab_size": 9, "dim": 8, "layers": 2, "hidden": 8, **sizes}
    return kind(config(experts=experts, attention=attention, **options)).train()


def layers(model):
    return [module for module in model.modules() if isinstance(module, balance.Balancer)]


def padded(length=5, batch=2):
    """Batches of the loader: the last row of the last one is padding only, the one before in part."""
    return list(validation_batches(TEXT, end=0, length=length, batch=batch))


def test_the_loader_says_what_is_padding_and_nothing_where_there_is_none():
    whole, last = padded()
    assert "real" not in whole
    assert last["real"].tolist() == [[True, True, True, True, False], [False] * 5]
    assert torch.equal(last["real"], last["targets"] != -100)


@pytest.mark.parametrize(
    "objective", ["causal", "prefix", "causal, tokens dropped", "masked", "masked, tokens dropped"]
)
def test_one_step_of_training_counts_the_tokens_of_the_text_alone(objective):
    kind, _, drops = objective.partition(", ")
    rate = 0.4 if drops else 0.0
    model = network(mask={"masked": "bidirectional", "prefix": "prefix"}.get(kind, "causal"))
    make = {
        "causal": lambda: CausalLM(model, CausalLMConfig(drop_tokens=rate)),
        "prefix": lambda: PrefixLM(model, PrefixLMConfig()),
        "masked": lambda: MaskedLM(model, MaskedLMConfig(drop_tokens=rate)),
    }
    trained = make[kind]()
    optimizer = AdamWConfig().build(trained)
    balance.attach(model, optimizer, summed_loss=trained)
    *_, batch = padded()
    if drops:  # two of five tokens of each row go, never the first
        batch = {name: value[:1].expand(4, 5).clone() for name, value in batch.items()}
    trained(batch).backward()
    for layer in layers(model):
        real = int(batch["real"].sum())
        if drops:
            assert 4 <= layer.tokens < real
        else:
            assert layer.tokens == real
        assert layer.counts.sum() == 2 * layer.tokens
    counted = [layer.counts.clone() for layer in layers(model)]
    optimizer.step()
    assert all(torch.equal(layer.load, counts) for layer, counts in zip(layers(model), counted))


@pytest.mark.parametrize("how", [LossFreeConfig(), AuxiliaryLossConfig(weight=0.3)])
def test_a_padded_row_trains_as_the_row_without_its_padding(how):
    row = torch.tensor([[0, 3, 1, 4]])
    batches = [{"tokens": row[:, :-1], "targets": row[:, 1:]}]
    end = torch.full((1, 4), 8)
    batches.append(
        {
            "tokens": torch.cat((row[:, :-1], end), 1),
            "targets": torch.cat((row[:, 1:], torch.full_like(end, -100)), 1),
            "real": torch.arange(7)[None] < 3,
        }
    )
    results = []
    for batch in batches:
        model = network(how=how).double()
        objective = CausalLM(model)
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
        balance.attach(model, optimizer, summed_loss=objective)
        objective(batch).backward()
        optimizer.step()
        biases = [layer.bias.clone() for layer in layers(model)]
        results.append([*model.parameters(), *biases])
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(long, short, rtol=0, atol=1e-12)


def test_evaluation_measures_the_load_of_the_text_alone():
    model = network()
    *_, last = padded()
    row = {name: value[:1] for name, value in last.items()}
    unsaid = {name: value for name, value in row.items() if name != "real"}
    text = {name: value[:, :4] for name, value in unsaid.items()}
    found, expected, wrong = (evaluate(CausalLM(model), [b])["val_max_vio"] for b in (row, text, unsaid))
    assert found == expected
    assert found != wrong


def test_a_masked_language_model_takes_what_is_no_target_for_padding():
    model = network(mask="bidirectional")
    *_, batch = padded()
    del batch["real"]
    MaskedLM(model)(batch).backward()
    # The token behind the last target is the one that the text ends with.
    assert [int(layer.tokens) for layer in layers(model)] == [5]


def test_the_end_of_a_sentence_of_words_and_patches_is_the_end_of_what_is_counted():
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    sentences = Sentences(images, torch.arange(20) % 10, CaptionsConfig(patch=2, digits=2), name="test")
    batch = sentences.batch(range(9))
    behind = (batch["tokens"] == VOCABULARY.index("<end>")).cumsum(1) - (
        batch["tokens"] == VOCABULARY.index("<end>")
    ).int()
    assert torch.equal(batch["real"], behind == 0)
    assert not batch["real"].all()
    model = network(TextImage, TextImageConfig, vocab_size=len(VOCABULARY), patch_values=4)
    Captioning(model)(batch).backward()
    assert {int(layer.tokens) for layer in layers(model)} == {int(batch["real"].sum())}


def test_a_model_without_experts_is_not_told():
    model = GPT(GPTConfig(vocab_size=9, dim=8, layers=1, num_heads=2, context=8))
    assert not balance.has_experts(model)
    assert evaluate(CausalLM(model), padded())["val_loss"] > 0
