"""Text that a model writes: it begins a document, follows the prompt, and is a function of the seed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data import train_tokenizer
from danlu.evaluation import continuation, continuations
from danlu.evaluation.text import until
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


def test_prompts_continued_together_read_as_each_alone():
    model, tokenizer = parts()
    prompts = ["the", "the vessel and", "", "furnace"]
    options = {"tokens": 20, "repetition_penalty": 1.2, "min_p": 0.01, "stop": ["v"]}
    together = continuations(model.double(), tokenizer, prompts=prompts, seed=3, **options)
    for index, prompt in enumerate(prompts):
        pieces = continuation(model, tokenizer, prompt=prompt, seed=3 + index, **options)
        assert together[index] == "".join(pieces)
    assert not any("v" in text for text in together)


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_of_its_stops_however_it_is_cut_into_pieces(pieces, stops):
    text = "".join(pieces)
    first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert "".join(until(pieces, stops)) == text[:first]


def test_what_cannot_become_a_stop_is_not_held_back():
    assert next(until(iter(["abc"]), ["xy"])) == "ab"
    assert next(until(iter(["abc"]), [])) == "abc"
    with pytest.raises(ValueError, match="no empty string"):
        list(until(["a"], ["x", ""]))
