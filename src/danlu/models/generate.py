"""Sampling from a language model, one token at a time over its cache."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from danlu._validate import integer, number
from danlu.models.gpt import GPT
from danlu.models.transformer import Transformer
from danlu.nn import Linear, MoE
from danlu.nn.linear import matrix_vector

_Model = TypeVar("_Model", bound=Transformer | GPT)


def by_columns(weight: Tensor) -> Tensor:
    """The same matrix, or matrices, with each column in one piece of memory.

    >>> by_columns(torch.ones(2, 3, 5)).stride()
    (15, 1, 3)
    """
    return weight.detach().mT.contiguous().mT


def for_single_tokens(model: _Model) -> _Model:
    """``model`` in float32 with other places in memory for its weights, the rest shared; for float32 weights on a CPU.

    A matrix times a vector is a sum of columns. BLAS forms it at twice the speed where columns are contiguous, unless
    they are short: on one thread a matrix with more columns than rows stays as it is. In bfloat16 a CPU's products with
    vectors take as long as in float32 or longer, and the weights would be rounded again for every token.
    """
    several = torch.get_num_threads() > 1
    own: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        match module:
            case Linear():
                weights = [module.weight]
            case MoE():
                weights = [module.w_up, module.w_down]
            case _:
                weights = []
        for weight in weights:
            if several or weight.shape[-2] >= weight.shape[-1]:
                own[id(weight)] = nn.Parameter(by_columns(weight), requires_grad=False)
    single = copy.deepcopy(model, own)
    single.compute_dtype = None
    return single


def sample_token(
    logits_v: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token number from logits ``(vocab,)``.

    Args:
        logits_v: unnormalised log-probabilities.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the ``k`` most likely tokens.
        top_p: only the smallest set of most likely tokens that reaches probability ``p`` (Holtzman et al., 1904.09751).
        generator: source of randomness; None is torch's global one.

    Returns:
        int64 tensor ``()``.

    >>> sample_token(torch.tensor([0.0, 3.0, 1.0]), temperature=0).item()
    1
    """
    if temperature == 0:
        return logits_v.argmax()
    logits_v = logits_v.float() / temperature
    if top_k is not None and top_k < logits_v.numel():
        logits_v = logits_v.masked_fill(logits_v < logits_v.topk(top_k).values[-1], -torch.inf)
    if top_p is not None and top_p < 1:
        probabilities, order = logits_v.softmax(-1).sort(descending=True)
        # A token stays if those before it have not reached p: the first always does.
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        logits_v = logits_v.index_fill(-1, order[dropped], -torch.inf)
    return torch.multinomial(logits_v.softmax(-1), 1, generator=generator)[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@torch.inference_mode()
def generate(
    model: Transformer | GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
) -> Iterator[int]:
    """Continue ``prompt``, yielding each token number as soon as it is drawn.

    The model works in evaluation mode, and is in the mode that it was in between two tokens and afterwards. The cache
    is allocated once for prompt and continuation. On a CPU float32 weights are copied once, into a layout that suits
    products with vectors, and decoding is in float32.

    Args:
        model: a `Transformer` or `GPT`.
        prompt: at least one token number.
        max_new_tokens: how many tokens to draw at most.
        temperature: 0 is greedy.
        top_k: see `sample_token`.
        top_p: see `sample_token`.
        generator: source of randomness.
        stop: token number that ends the text; it is not yielded.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or a sampling argument out of range.

    >>> from danlu.models import TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8))
    >>> len(list(generate(model, [1, 2], max_new_tokens=5)))
    5
    """
    vocab = model.config.vocab_size
    if not prompt:
        raise ValueError("prompt must hold at least one token, got none")
    if not all(0 <= token < vocab for token in prompt):
        raise ValueError(f"prompt must hold token numbers below {vocab}, got {max(prompt)} or a negative one")
    integer("max_new_tokens", max_new_tokens, low=0)
    number("temperature", temperature, low=0)
    if top_k is not None:
        integer("top_k", top_k)
    if top_p is not None:
        number("top_p", top_p, low=0, high=1, low_open=True)
    device, head = model.embedding.device, model.head_weight
    if head.dtype == torch.float32 and device.type == "cpu":
        model, head = for_single_tokens(model).eval(), by_columns(head)
    cache: list[Any] = model.new_cache(1, len(prompt) + max_new_tokens)
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(max_new_tokens):
        with _evaluating(model):
            hidden = model.hidden(tokens, cache=cache)[0, -1]
        logits = matrix_vector(head.to(hidden.dtype), hidden)
        token = sample_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        number_drawn = int(token)
        if number_drawn == stop:
            return
        yield number_drawn
        tokens = token.view(1, 1)
