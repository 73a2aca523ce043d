"""Text that a trained language model writes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from danlu.models.generate import generate, generate_batch


def continuation(
    model: Any,
    tokenizer: Any,
    *,
    prompt: str = "",
    tokens: int,
    seed: int | None = None,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` piece by piece, until the document ends or ``tokens`` tokens are written.

    Args:
        model, tokenizer: of a run on text, as :func:`danlu.train.load` returns them.
        prompt: the text to continue; "" begins a new document.
        tokens: largest number of tokens to write.
        seed: of the draws; None for a different seed each time.
        stop: strings that end the text where they come in what is written; they are not part of it.
        sampling: as in :func:`danlu.models.generate.generate`: temperature, top_k, top_p, min_p, repetition_penalty.
    """
    drawn = generate(
        model,
        _ids(tokenizer, prompt),
        max_new_tokens=tokens,
        generator=_generator(model, seed),
        stop=tokenizer.end,
        **sampling,
    )
    return until(tokenizer.decode_stream(drawn), stop)


def continuations(
    model: Any,
    tokenizer: Any,
    *,
    prompts: Sequence[str],
    tokens: int,
    seed: int | None = None,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> list[str]:
    """Continue several prompts together; the arguments are those of `continuation`, the seed of prompt ``i`` is
    ``seed + i``.
    """
    texts = generate_batch(
        model,
        [_ids(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=tokens,
        generator=[_generator(model, None if seed is None else seed + index) for index in range(len(prompts))],
        stop=tokenizer.end,
        **sampling,
    )
    return ["".join(until([tokenizer.decode(text.tokens)], stop)) for text in texts]


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield a text piece by piece up to the first of some strings; what may become one of these is held back.

    >>> list(until(["ab", "c-", "-", "d"], ["--"]))
    ['a', 'bc']
    >>> "".join(until(["ab", "c-", "d"], ["--"]))
    'abc-d'
    """
    if not all(stop):
        raise ValueError("stop must hold no empty string")
    longest, text = max(map(len, stop), default=1) - 1, ""
    for piece in pieces:
        text += piece
        found = [at for string in stop if (at := text.find(string)) >= 0]
        safe = min(found) if found else len(text) - longest
        if safe > 0:
            yield text[:safe]
            text = text[safe:]
        if found:
            return
    if text:
        yield text


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt behind the one that ended the previous document, as in training."""
    return [tokenizer.end, *tokenizer.encode(prompt)]


def _generator(model: Any, seed: int | None) -> torch.Generator:
    """Randomness on the model's device."""
    generator = torch.Generator(next(model.parameters()).device)
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)
