"""Lightning with danlu's layers, objective and optimizer: a network of latent attention and balanced experts.

    python examples/lightning_module.py

`configure_optimizers` returns one optimizer for all parameters, so that automatic optimization, clipping and
checkpoints are Lightning's own. The module learns sequences that count modulo 61; a second one goes on from the first
one's checkpoint with the same losses. Needs ``pip install lightning``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from danlu.models import Transformer, TransformerConfig
from danlu.nn import MLAConfig, MoEConfig
from danlu.nn.balance import attach
from danlu.objectives import CausalLM
from danlu.optim import Cosine, MuonConfig, schedule

STEPS, BATCH = 60, 16


class Sequences(lightning.LightningModule):
    """Next-token training of a small Transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        attention = MLAConfig(num_heads=2, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=16)
        experts = MoEConfig(num_experts=4, top_k=2, hidden=24)
        sizes = TransformerConfig(vocab_size=61, dim=32, layers=2, hidden=64, attention=attention, experts=experts)
        self.objective = CausalLM(Transformer(sizes))
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        """Mean loss of the next tokens."""
        parts = {"tokens": batch[:, :-1], "targets": batch[:, 1:]}
        loss = self.objective(parts) / self.objective.denominator(parts)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Muon for the matrices and experts, AdamW for the rest; experts are balanced after every step of it."""
        optimizer = MuonConfig(lr=0.02, embedding_lr=0.05).build(self)
        attach(self, optimizer)
        rate = schedule(optimizer, Cosine(), STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def fit(folder: Path, *, resume: Path | None = None) -> list[float]:
    """Train a module and return the loss of every step."""
    generator = torch.Generator().manual_seed(0)
    start, gap = torch.randint(61, (2, STEPS // 2 * BATCH, 1), generator=generator)
    module = Sequences()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
    )
    trainer.fit(module, DataLoader((start + gap % 4 * torch.arange(17)) % 61, batch_size=BATCH), ckpt_path=resume)
    return module.losses


def main() -> tuple[list[float], list[float]]:
    """Train two epochs, train the second again from the checkpoint between them, and return the losses of both."""
    with TemporaryDirectory() as folder:
        return fit(Path(folder)), fit(Path(folder), resume=Path(folder) / "epoch=0.ckpt")


if __name__ == "__main__":
    losses, again = main()
    print("first and last loss ", losses[0], losses[-1])
    print("with a resume       ", again[-1])
