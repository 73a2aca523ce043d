"""PEFT's adapters on danlu's layers, with the learning rates of LoRA+.

    python examples/peft_lora.py

A Transformer trained on one kind of sequences is adapted to another: PEFT finds every `danlu.nn.Linear`, the head
included, and `loraplus_groups` PEFT's factors. The adapter is saved and loaded by itself, and merged into the weights.
Needs ``pip install peft``.
"""

from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from danlu.models import Transformer, TransformerConfig
from danlu.nn import MLAConfig
from danlu.objectives import CausalLM
from danlu.optim import Lion, MuonConfig, loraplus_groups

STEPS = 60


def network() -> Transformer:
    """A Transformer of latent attention."""
    torch.manual_seed(0)
    attention = MLAConfig(num_heads=2, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=16)
    return Transformer(TransformerConfig(vocab_size=61, dim=32, layers=2, hidden=64, attention=attention))


def batch(seed: int, *, down: bool) -> dict[str, torch.Tensor]:
    """Sequences modulo 61 that count up, or down, by a gap of their own below 4."""
    start, gap = torch.randint(61, (2, 32, 1), generator=torch.Generator().manual_seed(seed))
    rows = (start + (-1 if down else 1) * (gap % 4) * torch.arange(17)) % 61
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def train(model: Transformer, optimizer: torch.optim.Optimizer, *, down: bool) -> list[float]:
    """Return the loss of every step."""
    objective, losses = CausalLM(model), []
    for step in range(STEPS):
        rows = batch(step, down=down)
        loss = objective(rows) / objective.denominator(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> tuple[list[float], float, float]:
    """Return the adapter's losses and how far its loaded and its merged logits are from its own."""
    model = network()
    train(model, MuonConfig(lr=0.02, embedding_lr=0.05).build(model), down=False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    targets = ["down", "kv_up", "gate_up", "out", "head"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))  # changes the model itself
    adapted.print_trainable_parameters()
    losses = train(model, Lion(loraplus_groups(adapted, lr=1e-3, ratio=4)), down=True)

    tokens = batch(STEPS, down=True)["tokens"]
    with torch.no_grad(), TemporaryDirectory() as folder:
        expected = adapted.eval()(tokens)
        adapted.save_pretrained(folder)
        fresh = network()
        fresh.load_state_dict(weights)
        loaded = PeftModel.from_pretrained(fresh, folder).eval()(tokens)
        merged = adapted.merge_and_unload()(tokens)
    return losses, (loaded - expected).abs().max().item(), (merged - expected).abs().max().item()


if __name__ == "__main__":
    losses, loaded, merged = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; logits differ by {loaded:.1e} loaded, {merged:.1e} merged")
