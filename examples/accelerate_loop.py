"""Accelerate with danlu: bfloat16 autocast, accumulated gradients, and experts with an auxiliary loss.

    python examples/accelerate_loop.py            (or: accelerate launch examples/accelerate_loop.py)

The auxiliary loss follows the training loss through whatever scale Accelerate gives it (`follow_loss`). The network
learns sequences that count modulo 61; a second loop goes on from ``save_state`` with the same losses. Needs
``pip install accelerate``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from danlu.models import Transformer, TransformerConfig
from danlu.nn import AuxiliaryLossConfig, GQAConfig, MoEConfig
from danlu.nn.balance import attach, follow_loss
from danlu.objectives import CausalLM
from danlu.optim import Cosine, MuonConfig, schedule

STEPS, BATCH, PARTS = 40, 16, 2  # PARTS batches make a step


def objective() -> CausalLM:
    """A Transformer with four experts a layer, and its loss."""
    torch.manual_seed(0)
    experts = MoEConfig(num_experts=4, top_k=2, hidden=24, balance=AuxiliaryLossConfig(weight=0.01))
    attention = GQAConfig(num_heads=2)
    sizes = TransformerConfig(vocab_size=61, dim=32, layers=2, hidden=64, attention=attention, experts=experts)
    return CausalLM(Transformer(sizes))


def train(folder: Path, *, resume: bool) -> list[float]:
    """Train two epochs, or the second only, and return the loss of every batch."""
    start, gap = torch.randint(61, (2, STEPS // 2 * PARTS * BATCH, 1), generator=torch.Generator().manual_seed(0))
    rows = (start + gap % 4 * torch.arange(17)) % 61
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=PARTS, cpu=True)
    model = objective()
    optimizer = MuonConfig(lr=0.02, embedding_lr=0.05).build(model)
    attach(model, optimizer)
    rate = schedule(optimizer, Cosine(), STEPS)
    wrapped, optimizer, rate, batches = accelerator.prepare(model, optimizer, rate, DataLoader(rows, batch_size=BATCH))
    if resume:
        accelerator.load_state(str(folder))
    losses = []
    for epoch in range(int(resume), 2):
        for batch in batches:
            parts = {"tokens": batch[:, :-1], "targets": batch[:, 1:]}
            with accelerator.accumulate(wrapped):
                loss = follow_loss(wrapped(parts) / model.denominator(parts), model)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        if epoch == 0:
            accelerator.save_state(str(folder))
    return losses


def main() -> tuple[list[float], list[float]]:
    """Train two epochs, train the second again from the state between them, and return the losses of both."""
    with TemporaryDirectory() as folder:
        return train(Path(folder), resume=False), train(Path(folder), resume=True)


if __name__ == "__main__":
    losses, again = main()
    print("first and last loss ", losses[0], losses[-1])
    print("with a resume       ", again[-1])
