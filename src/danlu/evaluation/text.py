"""Text that a trained language model writes."""

from collections.abc import Iterator
from typing import Any

import torch

from danlu.models.generate import generate


def continuation(
    model: Any,
    tokenizer: Any,
    *,
    prompt: str = "",
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` piece by piece, until the document ends or ``tokens`` tokens are written.

    Args:
        model, tokenizer: of a run on text, as :func:`danlu.train.load` returns them.
        prompt: the text to continue; "" begins a new document.
        tokens: largest number of tokens to write.
        temperature, top_k, top_p: as in :func:`danlu.models.generate.generate`.
        seed: of the draws; None for a different seed each time.
    """
    generator = torch.Generator(next(model.parameters()).device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    # In training a document begins after the token that ended the previous one.
    ids = [tokenizer.end, *tokenizer.encode(prompt)]
    drawn = generate(
        model,
        ids,
        max_new_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        stop=tokenizer.end,
    )
    return tokenizer.decode_stream(drawn)  # type: ignore[no-any-return]
