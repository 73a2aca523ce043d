"""A training loop in one file: what ``danlu train`` computes, without its run folder, resume and processes.

    python examples/loop.py lm-dense --steps 50

Read it to see how the parts of danlu fit together, or copy it as the start of your own script. A test requires its
losses to be those of ``danlu train``, bit for bit.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from danlu.nn.balance import attach
from danlu.objectives import evaluate
from danlu.optim import clip_grad_norm_
from danlu.recipes import load
from danlu.train import RunConfig


def train(config: RunConfig, *, steps: int) -> Iterator[tuple[int, float]]:
    """Train for ``steps`` steps and yield each with its loss; then evaluate and yield the validation loss."""
    # ------------------------------------------------------------ data, model, objective, optimizer, learning rate
    torch.manual_seed(config.train.seed)
    data = config.data.open(seed=config.train.seed, rank=0, world=1)
    model = replace(config.model, **data.sizes).build()
    objective = config.objective.build(model, data=data, batches=steps * config.train.accumulate)
    optimizer = config.optim.build(objective)
    scheduler = LambdaLR(optimizer, lambda step: config.schedule.factor(step, steps))
    attach(model, optimizer, summed_loss=objective)  # biases of experts follow every optimizer step
    check_ownership(objective, optimizer)

    # ------------------------------------------------------------ the loop
    for step in range(1, steps + 1):
        batches = [next(data.train) for _ in range(config.train.accumulate)]
        targets = sum(int(objective.denominator(batch)) for batch in batches)
        loss = 0.0
        for batch in batches:
            part = objective(batch)  # summed over targets
            (part * (1 / targets)).backward()
            loss += float(part.detach())
        if step == 1:
            assert not (idle := [name for name, p in objective.named_parameters() if p.grad is None]), idle
        if config.train.clip is not None:
            clip_grad_norm_(objective.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        yield step, loss / targets

    # ------------------------------------------------------------ validation
    yield steps, evaluate(objective, data.validation(config.train.eval_batches))["val_loss"]


def check_ownership(objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every parameter belongs to exactly one group of the optimizer."""
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in objective.named_parameters():
        assert owned.count(id(parameter)) == parameter.requires_grad, name


def main() -> None:
    """Train a recipe and print its losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="lm-dense")
    parser.add_argument("--steps", type=int, default=50)
    words = parser.parse_args()
    for step, loss in train(load(words.recipe), steps=words.steps):
        print(f"step {step}: {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
