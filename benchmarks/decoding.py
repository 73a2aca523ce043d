"""Decoding: 256 tokens greedily for one sequence, danlu beside transformers' own generate and a bare loop.

Parts: ``dense-10M``, ``dense-30M`` (Llama's shapes), ``sparse-10M``, ``sparse-30M`` (DeepseekV3's), ``growth`` (time
and peak memory of 32 tokens after prompts of growing length), ``history`` (eight tokens of the sparse model after 512
to 4096 others that are in the cache already, reading them not counted), ``batch-dense``, ``batch-sparse`` (64 tokens
behind each of 16 prompts of 1 to 16 tokens together, which transformers pads on the left). The bare loop calls the
transformers model's cached forward one token at a time with nothing around it. Weights are random; all read the same
prompt of 16 tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from benchmarks import harness, ours, peers
from benchmarks.peers import SIZES, Size, SizeName
from danlu.models import Transformer, generate, generate_batch, ready_to_generate
from danlu.models.generate import by_columns, for_single_tokens

PROMPT, NEW = 16, 256
PARTS = ("dense-10M", "dense-30M", "sparse-10M", "sparse-30M", "growth", "history", "batch-dense", "batch-sparse")
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def prompt(size: Size, length: int) -> Tensor:
    """Random tokens ``(1, length)``."""
    return torch.randint(size.vocab, (1, length), generator=torch.Generator().manual_seed(0))


def transformers_generate(model: nn.Module, tokens: Tensor, new: int) -> harness.Run:
    """``generate`` with its dynamic cache."""

    @torch.inference_mode()
    def run() -> Tensor:
        mask = torch.ones_like(tokens)
        return model.generate(  # type: ignore[operator, no-any-return]
            tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True
        )

    return run


def bare_loop(model: nn.Module, tokens: Tensor, new: int) -> harness.Run:
    """The model's cached forward and an argmax, nothing else."""

    @torch.inference_mode()
    def run() -> list[Tensor]:
        cache, ids, drawn = None, tokens, []
        for _ in range(new):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            drawn.append(ids)
        return drawn

    return run


def danlu_generate(model: Transformer, tokens: Tensor, new: int) -> harness.Run:
    """danlu's `generate`, greedy."""
    ids = tokens[0].tolist()
    return lambda: list(generate(model, ids, max_new_tokens=new, temperature=0))


def models(kind: str, size: Size) -> tuple[dict[str, nn.Module], dict[str, Transformer]]:
    """Build transformers' and danlu's models, by name and type of weights; experts by each back end."""
    theirs: dict[str, Callable[[], nn.Module]]
    if kind == "dense":
        theirs, own = {"": partial(peers.llama, size)}, ours.dense
    else:
        backends: tuple[Literal["eager", "grouped_mm", "batched_mm"], ...] = ("eager", "grouped_mm", "batched_mm")
        theirs, own = {f", {b}": partial(peers.deepseek, size, b) for b in backends}, ours.sparse
    peers_by_setting = {
        f"{name}{backend}": make().eval().to(dtype) for backend, make in theirs.items() for name, dtype in TYPES.items()
    }
    return peers_by_setting, {name: own(size).eval().to(dtype) for name, dtype in TYPES.items()}


def throughput(kind: str, name: SizeName, options: harness.Options) -> harness.Comparison:
    """Compare tokens a second, each implementation at its best type and back end."""
    size = SIZES[name]
    tokens, new = prompt(size, PROMPT), 32 if options.quick else NEW
    family = "Llama" if kind == "dense" else "DeepseekV3"
    theirs, own = models(kind, size)
    entries: dict[str, dict[str, harness.Run]] = {
        f"{family} generate": {s: transformers_generate(m, tokens, new) for s, m in theirs.items()},
        f"{family} bare loop": {s: bare_loop(m, tokens, new) for s, m in theirs.items()},
        "danlu generate": {s: danlu_generate(m, tokens, new) for s, m in own.items()},
    }
    runs, notes = {}, {}
    for implementation, choices in entries.items():
        print(implementation, flush=True)
        times = peers.qualify({setting: partial(_same, run) for setting, run in choices.items()}, clock=options.clock)
        notes[implementation] = min(times, key=times.__getitem__)
        runs[implementation] = choices[notes[implementation]]
    return harness.compare(
        f"decoding {kind} {name}, {new} tokens after {PROMPT}",
        runs,
        base=f"{family} generate",
        options=options,
        work=dict.fromkeys(runs, float(new)),
        unit="tokens",
        notes=notes,
    )


def growth(options: harness.Options) -> harness.Sweep:
    """Sweep the prompt: its reading and 32 tokens after it, float32."""
    size, new = SIZES["10M"], 8 if options.quick else 32
    lengths = [64, 256] if options.quick else [128, 512, 1024, 1984]
    llama, deepseek = peers.llama(size).eval(), peers.deepseek(size).eval()
    dense, sparse = ours.dense(size).eval(), ours.sparse(size).eval()

    def make(length: int) -> dict[str, harness.Run]:
        tokens = prompt(size, length)
        return {
            "Llama bare loop": bare_loop(llama, tokens, new),
            "DeepseekV3 bare loop": bare_loop(deepseek, tokens, new),
            "danlu dense": danlu_generate(dense, tokens, new),
            "danlu MLA + MoE": danlu_generate(sparse, tokens, new),
        }

    return harness.sweep(f"prompt and {new} tokens, 10M", lengths, make, options=options, axis="prompt")


def history(options: harness.Options) -> harness.Sweep:
    """Sweep the tokens that stand in the cache: eight more, float32; each call begins with the same cache."""
    size, new = replace(SIZES["10M"], context=8192), 8
    theirs, own = peers.deepseek(size).eval(), for_single_tokens(ours.sparse(size).eval())
    head = by_columns(own.head_weight)

    def make(length: int) -> dict[str, harness.Run]:
        tokens = prompt(size, length)
        with torch.inference_mode():
            theirs_cache = theirs(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
            own_cache = own.new_cache(1, length + new)
            own.hidden(tokens, cache=own_cache)

        @torch.inference_mode()
        def peer() -> None:
            if more := theirs_cache.get_seq_length() - length:
                theirs_cache.crop(-more)
            ids = tokens[:, -1:]
            for _ in range(new):
                out = theirs(input_ids=ids, past_key_values=theirs_cache, use_cache=True, logits_to_keep=1)
                ids = out.logits[:, -1:].argmax(-1)

        @torch.inference_mode()
        def danlu() -> None:
            for layer in own_cache:
                layer.length = length
            ids = tokens[:, -1:]
            for _ in range(new):
                ids = torch.mv(head, own.hidden(ids, cache=own_cache)[0, 0]).argmax().view(1, 1)

        return {"DeepseekV3 bare loop": peer, "danlu MLA + MoE": danlu}

    lengths = [512, 1024] if options.quick else [512, 1024, 2048, 4096]
    return harness.sweep(f"{new} tokens after others in the cache, 10M", lengths, make, options=options, axis="history")


def batch(kind: str, options: harness.Options) -> harness.Comparison:
    """Compare the time of 16 prompts of unequal length together, float32, and one after the other."""
    size, new = SIZES["10M"], 8 if options.quick else 64
    prompts = [prompt(size, length)[0] for length in range(1, 17)]
    padded = torch.stack([torch.nn.functional.pad(row, (16 - len(row), 0)) for row in prompts])
    mask = torch.stack([(torch.arange(16) >= 16 - len(row)).long() for row in prompts])
    theirs, own = (peers.llama, ours.dense) if kind == "dense" else (peers.deepseek, ours.sparse)
    peer, model = theirs(size).eval(), own(size).eval()
    ready = ready_to_generate(model)

    @torch.inference_mode()
    def transformers() -> Tensor:
        return peer.generate(  # type: ignore[operator, no-any-return]
            padded, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True
        )

    greedy: dict[str, Any] = {"max_new_tokens": new, "temperature": 0}
    runs: dict[str, harness.Run] = {
        "transformers generate": transformers,
        "danlu together": lambda: generate_batch(model, prompts, **greedy),
        "danlu together, made ready": lambda: generate_batch(ready, prompts, **greedy),
        "danlu one by one": lambda: [list(generate(ready, row, **greedy)) for row in prompts],
    }
    return harness.compare(
        f"decoding {kind} 10M, {new} tokens behind 16 prompts",
        runs,
        base="transformers generate",
        options=options,
        work=dict.fromkeys(runs, 16.0 * new),
        unit="tokens",
    )


def _same(run: harness.Run) -> harness.Run:
    return run


def main() -> None:
    """Run the parts asked for."""
    options = harness.options(__doc__, parts=PARTS, rounds=5, warmup=1, seconds=0.0)
    results: list[harness.Comparison | harness.Sweep] = []
    for part in options.parts:
        kind, _, name = part.partition("-")
        if options.quick and name == "30M":
            continue
        print(f"== {part}", flush=True)
        torch.manual_seed(0)
        sweeps = {
            "growth": growth,
            "history": history,
            **{f"batch-{k}": partial(batch, k) for k in ("dense", "sparse")},
        }
        results.append(sweeps[part](options) if part in sweeps else throughput(kind, cast(Any, name), options))
    harness.write("decoding", __doc__, results, options)


if __name__ == "__main__":
    main()
