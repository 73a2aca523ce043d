"""Training throughput: forward, backward and fused AdamW on 8 x 256 tokens, danlu beside its peers.

Parts: ``dense-10M``, ``dense-30M`` (a plain GPT, transformers' Llama), ``sparse-10M``, ``sparse-30M`` (transformers'
DeepseekV3), ``optimizer`` (what the optimizer step adds, fused AdamW and both Muons), ``growth`` (over the length of a
row). Every implementation first runs once with each setting that could be its fastest (data type, float32 product,
compiler, experts back end); the best of them enters the interleaved rounds. FLOP counts: `peers.flops_per_step`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import harness, ours, peers
from benchmarks.peers import SIZES, Setting, Size, SizeName
from danlu.nn.balance import attach
from danlu.objectives import CausalLM
from danlu.optim import MuonConfig

BATCH, LENGTH = 8, 256
PARTS = ("dense-10M", "dense-30M", "sparse-10M", "sparse-30M", "optimizer", "growth")

Build = Callable[[], harness.Run]


def batch(size: Size, length: int = LENGTH, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """Random tokens and the tokens after them, ``(rows, length)`` each."""
    tokens = torch.randint(size.vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def step(loss: Callable[[], Tensor], module: nn.Module, setting: Setting) -> harness.Run:
    """One optimizer step with the same fused AdamW for everybody."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    attach(module, optimizer)  # balances danlu's experts; does nothing for a model without them

    def run() -> None:
        with setting.active():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def gpt_step(size: Size, setting: Setting, length: int = LENGTH, rows: int = BATCH) -> harness.Run:
    """Step of the plain GPT."""
    model = peers.GPT(size)
    tokens, targets = batch(size, length, rows)
    called = setting.prepare(model)
    return step(lambda: called(tokens, targets), model, setting)


def transformers_step(
    size: Size, setting: Setting, length: int = LENGTH, rows: int = BATCH, *, make: Callable[[Size], nn.Module]
) -> harness.Run:
    """Step of a transformers model with its own loss."""
    model = make(size)
    model.train()
    tokens, _ = batch(size, length, rows)
    called = setting.prepare(model)
    return step(lambda: called(input_ids=tokens, labels=tokens, use_cache=False).loss, model, setting)


def danlu_step(
    size: Size, setting: Setting, length: int = LENGTH, rows: int = BATCH, *, make: Callable[[Size], Any]
) -> harness.Run:
    """Step of a danlu model with the objective that ``danlu train`` uses."""
    objective = CausalLM(ours.prepare(make(size), setting))
    tokens, targets = batch(size, length, rows)
    if setting.compile:
        objective.compile()
    data = {"tokens": tokens, "targets": targets}
    units = float(tokens.numel())
    return step(lambda: objective(data) / units, objective, setting)


def candidates(kind: str, size: Size, *, compile: bool) -> dict[str, dict[str, Build]]:
    """Return ``{implementation: {setting: build}}`` for dense or sparse models."""
    theirs, own = peers.settings(compile=compile), ours.settings(compile=compile)

    def builds(make_step: Callable[..., harness.Run], settings: list[Setting], **options: Any) -> dict[str, Build]:
        return {str(s): partial(make_step, size, s, **options) for s in settings}

    if kind == "dense":
        return {
            "plain GPT": builds(gpt_step, theirs),
            "transformers Llama": builds(transformers_step, theirs, make=peers.llama),
            "danlu dense": builds(danlu_step, own, make=ours.dense),
        }
    experts: dict[str, Build] = {}
    for backend in ("eager", "grouped_mm"):
        made = builds(transformers_step, theirs, make=partial(peers.deepseek, experts=backend))
        experts |= {f"{setting}, {backend}": build for setting, build in made.items()}
    return {"transformers DeepseekV3": experts, "danlu MLA + MoE": builds(danlu_step, own, make=ours.sparse)}


def best(
    entries: Mapping[str, Mapping[str, Build]], options: harness.Options
) -> tuple[dict[str, Build], dict[str, str]]:
    """Return each implementation's fastest build and the name of its setting."""
    builds, notes = {}, {}
    for name, choices in entries.items():
        print(name, flush=True)
        times = peers.qualify(choices, clock=options.clock)
        notes[name] = min(times, key=times.__getitem__)
        builds[name] = choices[notes[name]]
    return builds, notes


def throughput(kind: str, name: SizeName, options: harness.Options) -> harness.Comparison:
    """Compare tokens a second at one size."""
    size = SIZES[name]
    builds, notes = best(candidates(kind, size, compile=not options.quick), options)
    runs = {implementation: build() for implementation, build in builds.items()}
    for implementation in runs:
        kinds = {"plain GPT": "gpt", "transformers Llama": "llama", "danlu dense": "llama"}
        model = kinds.get(implementation, "deepseek")
        flops = peers.flops_per_step(cast(Any, model), size, BATCH, LENGTH)
        notes[implementation] += f"; {flops / 1e9:.1f} GFLOP"
    return harness.compare(
        f"{kind} {name}, {BATCH} x {LENGTH} tokens",
        runs,
        base="transformers Llama" if kind == "dense" else "transformers DeepseekV3",
        options=options,
        work=dict.fromkeys(runs, float(BATCH * LENGTH)),
        unit="tokens",
        notes=notes,
    )


def optimizer_share(name: SizeName, options: harness.Options) -> harness.Comparison:
    """Compare the optimizer steps alone with one forward and backward pass of the dense model."""
    size = SIZES[name]
    model = ours.dense(size)
    objective = CausalLM(model)
    tokens, targets = batch(size)
    data = {"tokens": tokens, "targets": targets}

    def forward_backward() -> None:
        objective.zero_grad(set_to_none=True)
        (objective(data) / tokens.numel()).backward()

    forward_backward()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "embedding"]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or n == "embedding"]
    muon = torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW(others, lr=1e-4, fused=True)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    danlu = MuonConfig(lr=1e-4).build(model)

    def peer_muon() -> None:
        muon.step()
        rest.step()

    runs = {
        "torch.optim.Muon + AdamW": peer_muon,
        "AdamW fused": adamw.step,
        "danlu Muon + AdamW": danlu.step,
        # Last: it makes new gradients for the next round.
        "danlu forward and backward": forward_backward,
    }
    return harness.compare(
        f"optimizer step, dense {name}", runs, base="torch.optim.Muon + AdamW", options=options, unit="step"
    )


def growth(options: harness.Options) -> harness.Sweep:
    """Sweep the length of one row: time and memory of a step."""
    size = SIZES["10M"]
    lengths = [64, 256] if options.quick else [128, 256, 512, 1024, 2048]
    setting = Setting(precision="medium")

    def make(length: int) -> dict[str, harness.Run]:
        return {
            "plain GPT": gpt_step(size, setting, length, 1),
            "transformers Llama": transformers_step(size, setting, length, 1, make=peers.llama),
            "transformers DeepseekV3": transformers_step(size, setting, length, 1, make=peers.deepseek),
            "danlu dense": danlu_step(size, setting, length, 1, make=ours.dense),
            "danlu MLA + MoE": danlu_step(size, setting, length, 1, make=ours.sparse),
        }

    return harness.sweep("one row, 10M, float32", lengths, make, options=options, axis="tokens")


def main() -> None:
    """Run the parts asked for."""
    options = harness.options(__doc__, parts=PARTS, rounds=5, seconds=0.0)
    results: list[harness.Comparison | harness.Sweep] = []
    for part in options.parts:
        kind, _, name = part.partition("-")
        if options.quick and name == "30M":
            continue
        print(f"== {part}", flush=True)
        torch.manual_seed(0)
        if part == "optimizer":
            results += [optimizer_share(size, options) for size in (("10M",) if options.quick else ("10M", "30M"))]
        elif part == "growth":
            results.append(growth(options))
        else:
            results.append(throughput(kind, cast(SizeName, name), options))
    harness.write("training", __doc__, results, options)


if __name__ == "__main__":
    main()
