"""Plain FSDP2: float32 weights sharded as DTensors, Muon on them, a checkpoint that any number of processes reads.

    torchrun --nproc-per-node 2 examples/fsdp2.py CHECKPOINT
    torchrun --nproc-per-node 1 examples/fsdp2.py CHECKPOINT --resume    (goes on, on another number of processes)

`MuonConfig.build` finds the DTensors by itself: each matrix is collected, iterated once and scattered. The losses are
those of one process that holds all the weights.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import CausalLM
from danlu.optim import MuonConfig, clip_grad_norm_

STEPS, BATCH = 20, 32


def batch_of(step: int) -> torch.Tensor:
    """This process' rows of the batch of a step: sequences that count modulo 61."""
    start, gap = torch.randint(61, (2, BATCH, 1), generator=torch.Generator().manual_seed(step))
    return ((start + gap % 4 * torch.arange(17)) % 61)[dist.get_rank() :: dist.get_world_size()]


def train(checkpoint: str, *, resume: bool) -> Iterator[float]:
    """Yield the loss of every step, averaged over the processes; save after half of them, or go on from there."""
    torch.manual_seed(0)
    sizes = TransformerConfig(vocab_size=61, dim=32, layers=2, hidden=64, attention=GQAConfig(num_heads=2))
    objective = CausalLM(Transformer(sizes))
    for block in objective.model.blocks:
        fully_shard(block)
    fully_shard(objective)  # the outermost module that is called: a model's hidden() is not its forward()
    optimizer = MuonConfig(lr=0.02, embedding_lr=0.05).build(objective)

    def state() -> dict[str, object]:
        of_model, of_optimizer = get_state_dict(objective, optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    if resume:
        dcp.load(held := state(), checkpoint_id=checkpoint)
        set_state_dict(objective, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    for step in range(STEPS // 2 if resume else 0, STEPS):
        rows = batch_of(step)
        parts = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
        loss = objective(parts) / objective.denominator(parts)  # FSDP2 averages the gradients of the processes
        loss.backward()
        clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total := loss.detach().clone())
        yield total.item() / dist.get_world_size()
        if step + 1 == STEPS // 2 and not resume:
            dcp.save(state(), checkpoint_id=checkpoint)


def main(words: list[str] | None = None) -> list[float]:
    """Join the other processes, train, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(words)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        losses = list(train(options.checkpoint, resume=options.resume))
        if dist.get_rank() == 0:
            print(" ".join(f"{loss:.6f}" for loss in losses), flush=True)
    finally:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
