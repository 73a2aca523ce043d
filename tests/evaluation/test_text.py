"""Text that a model writes: it begins a document, follows the prompt, and is a function of the seed."""

import torch

from danlu.data import train_tokenizer
from danlu.evaluation import continuation
from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig


def parts():
    tokenizer = train_tokenizer(["the furnace and the vessel\n" * 50], vocab_size=280)
    torch.manual_seed(0)
    attention = GQAConfig(num_heads=2)
    config = TransformerConfig(vocab_size=tokenizer.vocab_size, dim=16, layers=1, hidden=8, attention=attention)
    return Transformer(config).eval(), tokenizer


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model, tokenizer = parts()
    first, again, other = ("".join(continuation(model, tokenizer, tokens=30, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_model_is_given_the_end_of_a_document_and_then_the_prompt(monkeypatch):
    model, tokenizer = parts()
    given, hidden = [], model.hidden

    def noted(tokens, *arguments, **options):
        given.append(tokens)
        return hidden(tokens, *arguments, **options)

    monkeypatch.setattr(model, "hidden", noted)
    list(continuation(model, tokenizer, prompt="the vessel", tokens=2, temperature=0))
    assert given[0].flatten().tolist() == [tokenizer.end, *tokenizer.encode("the vessel")]
