"""Prefix language modelling: what is asked for, what a prefix shows, and what a causal model is compared on."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from danlu import config as configs
from danlu.models import GPT, GPTConfig, Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import CausalLM, CausalLMConfig, PrefixLM, PrefixLMConfig, evaluate, prefix_lengths
from danlu.recipes import load

VOCAB, TIME = 31, 12


def network(mask: str) -> Transformer:
    torch.manual_seed(3)
    attention = GQAConfig(num_heads=2, mask=mask)
    return Transformer(TransformerConfig(vocab_size=VOCAB, dim=16, layers=2, hidden=24, attention=attention))


def batch(rows: int = 5) -> dict[str, torch.Tensor]:
    text = torch.randint(VOCAB, (rows, TIME + 1))
    targets = text[:, 1:].clone()
    targets[0, -2:] = -100
    return {"tokens": text[:, :-1], "targets": targets}


def by_hand(model: Transformer, b: dict[str, torch.Tensor], *, causal: bool) -> tuple[torch.Tensor, int]:
    """Sum of losses and their number, row by row with the prefix as a number."""
    loss, number = torch.zeros(()), 0
    for tokens, targets in zip(b["tokens"], b["targets"]):
        m = int(prefix_lengths(tokens[None]))
        logits = model(tokens[None], **({} if causal else {"prefix": m}))[0, m - 1 :]
        loss = loss + F.cross_entropy(logits, targets[m - 1 :], reduction="sum")
        number += int((targets[m - 1 :] != -100).sum())
    return loss, number


@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_the_loss_is_that_of_the_tokens_behind_each_row_s_prefix(mask: str) -> None:
    objective, b = PrefixLM(network(mask)), batch()
    expected, number = by_hand(objective.model, b, causal=mask == "causal")
    torch.testing.assert_close(objective(b), expected)
    assert objective.denominator(b).item() == number


@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_no_token_that_is_asked_for_is_seen_by_what_predicts_it(mask: str) -> None:
    objective, b = PrefixLM(network(mask).double()), batch(2)
    asked = objective.asked(b)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return objective.model(tokens, **({"prefix": asked["prefix"]} if mask == "prefix" else {}))

    base = logits(b["tokens"])
    for at in range(1, TIME):
        changed = b["tokens"].clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        moved = (logits(changed) != base).any(-1)  # what depends on token `at`
        predicts = asked["targets"][:, at - 1] != -100
        assert not (moved[:, at - 1] & predicts).any()


def test_the_prefix_sees_itself_and_is_the_only_difference_of_the_masks() -> None:
    tokens = batch()["tokens"]
    lengths = prefix_lengths(tokens)
    prefix, causal = network("prefix"), network("causal")
    known = torch.arange(TIME) < lengths[:, None]
    looking, plain = prefix(tokens, prefix=known), causal(tokens)
    differ = (looking - plain).abs().amax(-1) > 1e-5
    assert (differ.any(1) == (lengths > 1)).all()
    assert torch.equal(prefix(tokens), plain)


def test_prefix_lengths_are_uniform_and_belong_to_their_rows() -> None:
    time, rows = 16, 4000
    tokens = torch.randint(4096, (rows, time))
    lengths = prefix_lengths(tokens)
    counts = torch.bincount(lengths, minlength=time + 1)
    assert counts[0] == 0
    assert len(counts) == time + 1
    expected = rows / time
    chi_squared = float(((counts[1:] - expected) ** 2 / expected).sum())
    assert chi_squared < 45  # 15 degrees of freedom: one draw in ten thousand is larger
    order = torch.randperm(rows)
    assert torch.equal(prefix_lengths(tokens[order]), lengths[order])
    # Rows that differ in one token, or in the order of two, have prefixes of their own.
    near = tokens.clone()
    near[:, 3] += 1
    assert 0.85 < (prefix_lengths(near) != lengths).float().mean() < 0.99
    assert 0.85 < (prefix_lengths(tokens.flip(1)) != lengths).float().mean() < 0.99


def test_documents_behind_the_prefix_are_read_as_by_a_causal_model() -> None:
    tokens = batch()["tokens"]
    documents = (torch.arange(TIME) >= TIME // 2).long().expand_as(tokens).contiguous()
    b = {"tokens": tokens, "targets": tokens.roll(-1, 1), "documents": documents}
    objective = PrefixLM(network("prefix"))
    asked = objective.asked(b)
    hidden = objective.model.hidden(tokens, documents=documents, prefix=asked["prefix"])
    causal = network("causal").hidden(tokens, documents=documents)
    short = prefix_lengths(tokens) <= TIME // 2 + 1  # at most one token of the second document
    torch.testing.assert_close(hidden[short, TIME // 2 :], causal[short, TIME // 2 :])


@pytest.mark.parametrize("train_mask", ["prefix", "causal"])
def test_an_evaluation_asks_for_the_same_tokens_in_whatever_batches_they_come(train_mask: str) -> None:
    objective, b = PrefixLM(network(train_mask), byte_lengths=torch.arange(VOCAB) % 5), batch(6)
    together = evaluate(objective, [b])
    apart = evaluate(objective, [{name: value[i : i + 2] for name, value in b.items()} for i in (4, 0, 2)])
    assert together == pytest.approx(apart, rel=1e-5)
    loss, number = by_hand(objective.model, b, causal=train_mask == "causal")
    assert together["val_loss"] == pytest.approx(loss.item() / number, rel=1e-5)
    wanted = objective.asked(b)["targets"]
    size = (torch.arange(VOCAB) % 5)[wanted[wanted != -100]].sum()
    assert together["val_bpb"] == pytest.approx(loss.item() / size.item() / math.log(2), rel=1e-5)


def test_dropping_tokens_keeps_the_prefix_with_its_tokens() -> None:
    objective = PrefixLM(network("prefix"), PrefixLMConfig(drop_tokens=0.5)).train()
    b = batch(8)
    loss = objective(b)
    loss.backward()
    assert torch.isfinite(loss)
    assert 0.2 < loss.item() / objective.denominator(b).item() / math.log(VOCAB) < 5


def test_masks_that_show_what_is_asked_for_are_rejected_and_gpt_is_a_causal_model() -> None:
    with pytest.raises(ValueError, match="mask must be 'prefix' or 'causal'"):
        PrefixLM(network("bidirectional"))
    with pytest.raises(ValueError, match=r"mask must be 'causal' .*'prefix' in block 0.*prefix-lm"):
        CausalLM(network("prefix"))
    gpt = GPT(GPTConfig(vocab_size=VOCAB, dim=16, layers=1, num_heads=2, context=TIME))
    b = batch()
    assert PrefixLM(gpt)(b) < CausalLM(gpt)(b)


def test_the_recipe_differs_from_lm_dense_in_mask_and_objective_only() -> None:
    dense, prefix = (configs.to_tree(load(name)) for name in ("lm-dense", "lm-prefix"))
    lines = [line.partition(":")[0] for line in configs.differences(dense, prefix)]
    assert lines == ["model.attention.mask", "objective.type", "recipe"]
    control = dataclasses.replace(load("lm-prefix").model, attention=GQAConfig(num_heads=4))
    assert control == load("lm-dense").model
    shared = {field.name for field in dataclasses.fields(CausalLMConfig)}
    assert shared == {field.name for field in dataclasses.fields(PrefixLMConfig)}
