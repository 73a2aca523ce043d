"""One GPU in under ten minutes: training, Muon's share, decoding, and whether a resumed run is the same bit for bit.

    python -m benchmarks.gpu            on a GPU; prints a table in Markdown
    python -m benchmarks.gpu --tiny     the same measurements of small models, anywhere, in seconds

No figure of this script has been taken on a GPU yet. Models: dense with 124 million parameters (GPT-2's sizes),
sparse with about 300 million; random tokens, one process, bfloat16 where the device has it.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.models import TransformerConfig, generate_batch
from danlu.nn import GQAConfig, MoEConfig
from danlu.objectives import CausalLMConfig
from danlu.optim import MuonConfig, WarmupStableDecay
from danlu.train import TrainConfig, Trainer
from danlu.train.checkpoint import load_latest
from danlu.train.device import Policy, choose
from danlu.train.devices import DEVICES
from danlu.train.signals import Stop


@dataclass(frozen=True)
class Case:
    """A model with the batch it is trained on."""

    name: str
    model: TransformerConfig
    rows: int
    length: int


DENSE = TransformerConfig(
    vocab_size=50304, dim=768, layers=12, hidden=2048, attention=GQAConfig(num_heads=12), tied=True
)
SPARSE = replace(
    DENSE,
    attention=GQAConfig(num_heads=12),
    experts=MoEConfig(num_experts=16, top_k=4, hidden=512, num_shared_experts=1),
)
CASES = (Case("dense, 124 M", DENSE, 16, 1024), Case("sparse, 300 M", SPARSE, 16, 1024))
_SMALL = replace(DENSE, vocab_size=257, dim=32, layers=2, hidden=48, attention=GQAConfig(num_heads=2))
TINY = (
    Case("dense, tiny", _SMALL, 2, 31),
    Case("sparse, tiny", replace(_SMALL, experts=MoEConfig(num_experts=4, top_k=2, hidden=24)), 2, 31),
)


class Tokens:
    """Random tokens, a function of the number of the batch."""

    def __init__(self, case: Case) -> None:
        self.case, self.position = case, 0

    def __next__(self) -> dict[str, Tensor]:
        """The next batch."""
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        shape = (self.case.rows, self.case.length)
        tokens = torch.randint(self.case.model.vocab_size, shape, generator=generator)
        return {"tokens": tokens, "targets": tokens.roll(-1, 1)}

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        """Go on from there."""
        self.position = state["position"]


def loop(case: Case, policy: Policy, steps: int, folder: Path | None = None) -> Trainer:
    """The training of a case at its first step, the same every time."""
    torch.manual_seed(0)
    model = case.model.build()
    model.compute_dtype = policy.dtype
    objective = CausalLMConfig().build(model).to(policy.device)
    config = TrainConfig(steps=steps, eval_every=None, checkpoint_every=None, device=policy.device.type)
    return Trainer(
        objective,
        MuonConfig().build(objective),
        WarmupStableDecay(),
        Tokens(case),
        config,
        policy=policy,
        folder=folder,
    )


def clock(policy: Policy) -> float:
    """The time when everything that was asked of the device is done."""
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training(case: Case, policy: Policy, steps: int) -> Iterator[tuple[str, str]]:
    """Tokens a second, share of the device's rate, Muon's part of a step, and memory."""
    trainer = loop(case, policy, 2 * steps)
    optimizer_seconds = 0.0
    step = trainer.optimizer.step

    def timed(*inputs: Any) -> Any:
        nonlocal optimizer_seconds
        began = clock(policy)
        found = step(*inputs)
        optimizer_seconds += clock(policy) - began
        return found

    stop = Stop()
    for _ in range(max(2, steps // 4)):
        trainer._train_step(stop)
    began = clock(policy)
    for _ in range(steps):
        trainer._train_step(stop)
    seconds = (clock(policy) - began) / steps
    trainer.optimizer.step = timed  # type: ignore[method-assign]
    began = clock(policy)
    for _ in range(max(2, steps // 2)):
        trainer._train_step(stop)
    share = optimizer_seconds / (clock(policy) - began)
    speed = case.rows * case.length / seconds
    model: Any = trainer.objective.model
    known = next((d for name, d in DEVICES.items() if name.upper() in policy.name.upper()), None)
    rate = known.flops if known is not None and policy.dtype == torch.bfloat16 else policy.rate
    yield "parameters", f"{sum(p.numel() for p in model.parameters()):,}"
    yield "tokens/s", f"{speed:,.0f}"
    yield "ms a step", f"{1e3 * seconds:.1f}"
    yield "MFU", f"{speed * model.flops_per_token(case.length) / rate:.1%}"
    yield "Muon's share of a step", f"{share:.1%}"
    if policy.device.type == "cuda":
        yield "peak memory, GiB", f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"


def decoding(case: Case, policy: Policy, tokens: int) -> Iterator[tuple[str, str]]:
    """Tokens a second of one sequence and of sixteen, greedy, with a cache."""
    torch.manual_seed(0)
    model: Any = case.model.build().to(policy.device).eval()
    model.compute_dtype = policy.dtype
    for rows in (1, 16):
        prompt = torch.zeros(rows, 8, dtype=torch.int64, device=policy.device)
        for _ in range(2):  # the second counts
            began = clock(policy)
            generate_batch(model, prompt, max_new_tokens=tokens, temperature=0.0)
        yield f"decoding, {rows} row{'s' * (rows > 1)}, tokens/s", f"{rows * tokens / (clock(policy) - began):,.0f}"


def resuming(case: Case, policy: Policy, steps: int) -> Iterator[tuple[str, str]]:
    """Whether half a run, saved and loaded, ends in the same bits as a whole one."""
    with tempfile.TemporaryDirectory() as name:
        whole, half = loop(case, policy, steps), loop(case, policy, steps, Path(name) / "checkpoints")
        for _ in range(steps):
            whole._train_step(Stop())
        for _ in range(steps // 2):
            half._train_step(Stop())
        half.save()
        again = loop(case, policy, steps)
        saved = load_latest(Path(name))
        assert saved is not None
        again.load_state_dict(saved.state)
        while again.step < steps:
            again._train_step(Stop())
    pairs = zip(whole.objective.parameters(), again.objective.parameters())
    yield "resumed run equal bit for bit", "yes" if all(torch.equal(a, b) for a, b in pairs) else "no"


def main(words: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small models, on any device, in seconds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(words)
    policy = choose("auto", device=arguments.device)
    policy.apply()
    cases, steps, tokens = (TINY, 4, 9) if arguments.tiny else (CASES, 40, 256)
    print(f"{policy.name}, torch {torch.__version__}, Python {platform.python_version()}, {policy.dtype}\n")
    print("| model | what | measured |\n|---|---|---|")
    for case in cases:
        for measure, count in ((training, steps), (decoding, tokens), (resuming, 6)):
            for what, found in measure(case, policy, count):
                print(f"| {case.name} | {what} | {found} |", flush=True)


if __name__ == "__main__":
    main()
