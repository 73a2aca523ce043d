"""transformers.Trainer with danlu's optimizer: ``optimizers=(MuonConfig(...).build(model), schedule)`` is all there is.

    python examples/trainer.py

A tiny Llama learns sequences that count modulo 61 with Muon for its matrices and AdamW for the rest; a second Trainer
goes on from the first one's checkpoint and ends at the same loss. Needs ``pip install transformers accelerate``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from danlu.optim import Cosine, MuonConfig, schedule

STEPS, BATCH = 60, 16


def dataset() -> list[dict[str, torch.Tensor]]:
    """Sequences whose next number follows from the two before it."""
    generator = torch.Generator().manual_seed(0)
    start, gap = torch.randint(61, (2, STEPS * BATCH, 1), generator=generator)
    return [{"input_ids": row, "labels": row} for row in (start + gap % 4 * torch.arange(16)) % 61]


def network() -> LlamaForCausalLM:
    """A Llama of 40,000 parameters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=16, **sizes))


def make_trainer(folder: Path) -> Trainer:
    """Return a Trainer with a network, an optimizer and a schedule of its own."""
    model = network()
    optimizer = MuonConfig(lr=0.02, embedding_lr=0.05).build(model)  # one torch.optim.Optimizer
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        save_steps=STEPS // 2,
        logging_steps=STEPS // 6,
        max_grad_norm=1.0,
        report_to=[],
        disable_tqdm=True,
    )
    rate = schedule(optimizer, Cosine(), STEPS)
    return Trainer(model, arguments, train_dataset=dataset(), optimizers=(optimizer, rate))


def main() -> tuple[list[float], list[float]]:
    """Train, train on from the checkpoint in the middle, and return the losses of both."""
    with TemporaryDirectory() as folder:
        whole = make_trainer(Path(folder))
        whole.train()
        resumed = make_trainer(Path(folder))
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    return tuple([log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, resumed))


if __name__ == "__main__":
    losses, again = main()
    print("losses        ", losses)
    print("with a resume ", again)
