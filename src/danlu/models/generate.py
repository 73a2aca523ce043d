"""Text from a language model, one token at a time over its cache, for one prompt or for many at once.

A prompt is read in one forward pass. Prompts of unequal length are read in groups of equal length, each into a cache of
its own, and these caches are joined with the last tokens at the same place: no token is padding in any layer, so that a
row gives what it gives alone, whatever mixes the tokens.
"""

import copy
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._validate import integer
from danlu.models.gpt import GPT
from danlu.models.sampling import check_sampling, penalized, sample_token
from danlu.models.transformer import Transformer
from danlu.nn import Linear, MoE
from danlu.nn.linear import matrix_vector
from danlu.protocols import Joined

_Model = TypeVar("_Model", bound=Transformer | GPT)
Prompt = Sequence[int] | Tensor
Generators = torch.Generator | Sequence[torch.Generator] | None

_WORTH_A_LAYOUT = 24
"""Tokens from which on another layout of the weights is quicker, the time of copying them included."""


class Drawn(NamedTuple):
    """A token, and the logarithm of its probability by the model (at temperature 1, before any limit or penalty)."""

    token: int
    logprob: float


@dataclass
class Continuation:
    """What a model wrote behind one prompt.

    Attributes:
        tokens: the numbers drawn, without the one that ended the text.
        logprobs: logarithm of each one's probability, as in `Drawn`.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def by_columns(weight: Tensor) -> Tensor:
    """The same matrix, or matrices, with each column in one piece of memory.

    >>> by_columns(torch.ones(2, 3, 5)).stride()
    (15, 1, 3)
    """
    return weight.detach().mT.contiguous().mT


def _copied(model: _Model, own: dict[int, Any]) -> _Model:
    """The structure of ``model`` over the same weights but for those of ``own``; for evaluation, in their dtype."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    single = copy.deepcopy(model, shared | own)
    single.eval()
    single.compute_dtype = None
    return single


def for_single_tokens(model: _Model) -> _Model:
    """``model`` in float32 with other places in memory for its weights, the rest shared; for float32 weights on a CPU.

    A matrix times a vector is a sum of columns. BLAS forms it at twice the speed where columns are contiguous, unless
    they are short: on one thread a matrix with more columns than rows stays as it is. In bfloat16 a CPU's products with
    vectors take as long as in float32 or longer, and the weights would be rounded again for every token.
    """
    several = torch.get_num_threads() > 1
    own: dict[int, Any] = {}
    if model.head_weight is model.embedding:
        own[id(model.embedding)] = nn.Parameter(by_columns(model.embedding), requires_grad=False)
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
    return _copied(model, own)


def ready_to_generate(model: _Model) -> _Model:
    """Return a copy of ``model`` for many calls of `generate`, which then need not lay out its weights anew each time.

    The copy is of this moment: training ``model`` further does not change it. On other devices than a CPU, and with
    weights in 16 bits, it is a plain copy in evaluation mode.

    >>> from danlu.models import TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8))
    >>> ready = ready_to_generate(model)
    >>> list(generate(ready, [1], temperature=0)) == list(generate(model, [1], temperature=0))
    True
    """
    own = copy.deepcopy(model)
    own.eval()
    for parameter in own.parameters():
        parameter.requires_grad_(False)
    return for_single_tokens(own) if _laid_out(own) else own


def _laid_out(model: Transformer | GPT) -> bool:
    """Whether the layout of its weights decides how fast ``model`` decodes."""
    weight = model.embedding
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


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


def generate(
    model: Transformer | GPT,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    stop: int | AbstractSet[int] | Sequence[int] | None = None,
    positions: Tensor | None = None,
) -> Iterator[int]:
    """Continue ``prompt``, yielding each token number as soon as it is drawn.

    The arguments are those of `generate_steps`, for one prompt.

    >>> from danlu.models import TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8))
    >>> len(list(generate(model, [1, 2], max_new_tokens=5)))
    5
    """
    steps = generate_steps(
        model,
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        generator=generator,
        stop=stop,
        positions=positions,
    )
    return (drawn.token for (drawn,) in steps if drawn is not None)


def generate_batch(model: Transformer | GPT, prompts: Sequence[Prompt] | Tensor, **options: Any) -> list[Continuation]:
    """Continue many prompts together; the options are those of `generate_steps`.

    >>> from danlu.models import TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8))
    >>> [len(text.tokens) for text in generate_batch(model, [[1, 2, 3], [4]], max_new_tokens=5)]
    [5, 5]
    """
    texts = [Continuation() for _ in prompts]
    for step in generate_steps(model, prompts, **options):
        for text, drawn in zip(texts, step):
            if drawn is not None:
                text.tokens.append(drawn.token)
                text.logprobs.append(drawn.logprob)
    return texts


@torch.inference_mode()
def generate_steps(
    model: Transformer | GPT,
    prompts: Sequence[Prompt] | Tensor,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: Generators = None,
    stop: int | AbstractSet[int] | Sequence[int] | None = None,
    positions: Tensor | None = None,
) -> Iterator[list[Drawn | None]]:
    """Continue prompts together, yielding after each step what was drawn for every one.

    The model works in evaluation mode, and is in the mode that it was in between two steps and afterwards. On a CPU
    decoding from float32 weights is in float32, and they are copied once, after the first token, into a layout that
    suits products with vectors; `ready_to_generate` does so for many calls.

    Args:
        model: a `Transformer` or `GPT`.
        prompts: each at least one token number: a sequence or an int64 tensor ``(time,)``; or a floating tensor
            ``(time, dim)`` to stand in place of the tokens' embeddings. A tensor ``(batch, time)`` is as many prompts.
        max_new_tokens: how many tokens to draw at most for each.
        temperature, top_k, top_p, min_p: see `sample_token`.
        repetition_penalty: see `penalized`; the tokens of the prompt are used ones.
        generator: source of randomness: one for all, or one a prompt, so that what a prompt gives does not depend on
            the others.
        stop: token number, or several, any of which ends its text; it is not yielded.
        positions: rotary coordinates of the only prompt and of all that may be drawn but the last,
            ``(time + max_new_tokens - 1, axes)``; None: the tokens are counted.

    Yields:
        For each prompt a `Drawn`, or None once its text has ended; nothing more when all have.

    Raises:
        ValueError: no prompt, an empty one, a token outside the vocabulary, an argument out of range, or more tokens
            than the model has positions.
        TypeError: a mixer's cache that cannot be joined, with prompts of unequal length.

    >>> from danlu.models import TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8))
    >>> for one, other in generate_steps(model, [[1, 2, 3], [4]], max_new_tokens=2, temperature=0):
    ...     assert one.logprob <= 0 and 0 <= other.token < 7
    """
    rows = [_row(prompt, model) for prompt in prompts]
    integer("max_new_tokens", max_new_tokens, low=0)
    check_sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    generators = [generator] * len(rows) if generator is None or isinstance(generator, torch.Generator) else generator
    if not rows or len(generators) != len(rows):
        raise ValueError(f"there must be a prompt, and a generator for each, got {len(rows)} and {len(generators)}")
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    longest = max(len(row) for row in rows)
    needed = longest + max_new_tokens - 1
    if positions is not None and (len(rows) > 1 or len(positions) < needed):
        raise ValueError(f"positions must be of one prompt, of {needed} tokens, got {len(positions)} and {len(rows)}")
    if max_new_tokens == 0:
        return
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    light = _copied(model, {}) if _laid_out(model) else model
    with _evaluating(light):
        hidden_bd, cache, starts = _read(light, [rows[index] for index in order], needed, positions)
    used = _used(rows, order, model.config.vocab_size) if repetition_penalty != 1 else None
    head, live = light.head_weight, [True] * len(rows)
    for step in range(max_new_tokens):
        logits_bv = _logits(head, hidden_bd)
        known = logits_bv if used is None else penalized(logits_bv, used, repetition_penalty)
        if temperature == 0:
            tokens = known.argmax(-1)
        else:
            choices = [
                sample_token(
                    row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, generator=generators[index]
                )
                for row, index in zip(known, order)
            ]
            tokens = torch.stack(choices)
        logprobs = logits_bv.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        drawn: list[Drawn | None] = [None] * len(rows)
        for index, token, logprob in zip(order, tokens.tolist(), logprobs.tolist()):
            live[index] = live[index] and token not in stops
            drawn[index] = Drawn(token, logprob) if live[index] else None
        if not any(live):
            return
        yield drawn
        if step + 1 == max_new_tokens:
            return
        if used is not None:
            used.scatter_(1, tokens[:, None], True)
        if step == 0 and max_new_tokens > _WORTH_A_LAYOUT and _laid_out(model):
            light = for_single_tokens(light)
            head = by_columns(light.head_weight)
        place = cache[0].length
        coordinates = None if positions is None else positions[place : place + 1]
        with _evaluating(light):
            hidden_bd = _hidden(light, tokens[:, None], cache=cache, positions=coordinates, starts=starts)


def _row(prompt: Prompt, model: Transformer | GPT) -> Tensor:
    """A prompt as a tensor on the model's device: token numbers ``(time,)``, or ``(time, dim)``."""
    row = prompt if isinstance(prompt, Tensor) else torch.tensor(list(prompt), dtype=torch.int64)
    floats, vocab = row.is_floating_point(), model.config.vocab_size
    if row.dim() != 1 + floats:
        shape = tuple(row.shape)
        raise ValueError(f"a prompt must be token numbers (time,), or floats (time, dim), got shape {shape}")
    if len(row) == 0:
        raise ValueError("prompt must hold at least one token, got none")
    if not floats and not 0 <= int(row.min()) <= int(row.max()) < vocab:
        raise ValueError(f"prompt must hold token numbers below {vocab}, got {int(row.min())} to {int(row.max())}")
    return row.to(model.embedding.device)


def _hidden(model: Transformer | GPT, tokens: Tensor, **given: Any) -> Tensor:
    """Hidden states of the last of ``tokens``, ``(batch, dim)``; what is None is not passed on."""
    return model.hidden(tokens, **{name: value for name, value in given.items() if value is not None})[:, -1]


def _read(
    model: Transformer | GPT, rows: list[Tensor], capacity: int, positions: Tensor | None
) -> tuple[Tensor, list[Any], Tensor | None]:
    """Read prompts, the shorter ones first: their last hidden states, the caches, and where in them each begins."""
    groups = [torch.stack(list(group)) for _, group in groupby(rows, key=len)]
    seen_whole = any(mixer.mask == "prefix" for mixer in model.mixers)
    hidden, caches = [], []
    for group in groups:
        time = group.shape[1]
        cache = model.new_cache(len(group), capacity if len(groups) == 1 else time)
        places = None if positions is None else positions[:time]
        prefix = time if seen_whole else None
        hidden.append(_hidden(model, group, cache=cache, positions=places, prefix=prefix))
        caches.append(cache)
    if len(groups) == 1:
        return hidden[0], list(caches[0]), None
    model.new_cache(0, capacity)  # raises where a model has fewer positions
    joined = []
    for first, *rest in zip(*caches):
        if not isinstance(first, Joined):
            kind = type(first).__name__
            raise TypeError(f"{kind} has no `joined` (danlu.protocols.Joined): give prompts of one length, or one each")
        joined.append(first.joined(rest, capacity))
    lengths = torch.tensor([len(row) for row in rows], device=hidden[0].device)
    return torch.cat(hidden), joined, lengths.max() - lengths


def _used(rows: list[Tensor], order: list[int], vocab: int) -> Tensor:
    """Which tokens each prompt holds, ``(batch, vocab)``; none where it is of embeddings."""
    used = torch.zeros(len(rows), vocab, dtype=torch.bool, device=rows[0].device)
    for at, index in enumerate(order):
        if not rows[index].is_floating_point():
            used[at, rows[index]] = True
    return used


def _logits(head: Tensor, hidden_bd: Tensor) -> Tensor:
    """Logits ``(batch, vocab)``."""
    head = head.to(hidden_bd.dtype)
    return matrix_vector(head, hidden_bd[0])[None] if len(hidden_bd) == 1 else F.linear(hidden_bd, head)
