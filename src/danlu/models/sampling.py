"""How a token is drawn from what a language model says of the next one."""

import torch
from torch import Tensor

from danlu._validate import integer, number


def check_sampling(
    *, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, repetition_penalty: float
) -> None:
    """Raise ValueError, naming the argument, unless `sample_token` and `penalized` can take these."""
    number("temperature", temperature, low=0)
    if top_k is not None:
        integer("top_k", top_k)
    if top_p is not None:
        number("top_p", top_p, low=0, high=1, low_open=True)
    if min_p is not None:
        number("min_p", min_p, low=0, high=1)
    number("repetition_penalty", repetition_penalty, low=0, low_open=True)


def sample_token(
    logits_v: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token number from logits ``(vocab,)``.

    Args:
        logits_v: unnormalised log-probabilities.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the ``k`` most likely tokens.
        top_p: only the smallest set of most likely tokens that reaches probability ``p`` (Holtzman et al., 1904.09751).
        min_p: only tokens at least ``min_p`` times as likely as the most likely one (Nguyen et al., 2407.01082).
        generator: source of randomness; None is torch's global one.

    Each limit counts within what the one before has left.

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
    probabilities = logits_v.softmax(-1)
    if min_p:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(), 0)
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def penalized(logits_bv: Tensor, used_bv: Tensor, penalty: float) -> Tensor:
    """Logits ``(batch, vocab)`` with those of used tokens lowered (Keskar et al., 1909.05858, section 4.1).

    A used token's logit is divided by ``penalty`` where it is positive and multiplied by it where it is negative.

    >>> penalized(torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[True, True, False]]), 2.0).tolist()
    [[1.0, -4.0, 3.0]]
    """
    lowered = torch.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty)
    return torch.where(used_bv, lowered, logits_bv)
