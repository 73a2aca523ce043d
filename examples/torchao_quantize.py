"""Quantize a trained network: int8 and float8 weights by torchao, int8 products by PyTorch's ``quantize_dynamic``.

    python examples/torchao_quantize.py

`danlu.nn.Linear` is a ``torch.nn.Linear``, so torchao's ``quantize_`` converts every one; PyTorch's own tool takes that
very class only, which `as_torch_linear` puts in their places. The loss stays within one percent, decoding over the
cache works, and the quantized weights are saved and loaded. Needs ``pip install torchao``.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from danlu.models import Transformer, TransformerConfig
from danlu.nn import MLAConfig, as_torch_linear
from danlu.objectives import CausalLM
from danlu.optim import MuonConfig

STEPS = 60


def network() -> Transformer:
    """A Transformer of latent attention."""
    torch.manual_seed(0)
    attention = MLAConfig(num_heads=2, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=16)
    return Transformer(TransformerConfig(vocab_size=61, dim=32, layers=2, hidden=64, attention=attention))


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Sequences that count modulo 61."""
    start, gap = torch.randint(61, (2, 32, 1), generator=torch.Generator().manual_seed(seed))
    rows = (start + gap % 4 * torch.arange(17)) % 61
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    """Mean loss of a batch."""
    logits = model(batch(seed)["tokens"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch(seed)["targets"].flatten())


def main() -> dict[str, tuple[int, float]]:
    """Train, quantize in three ways, and return the number of converted layers and the loss of each."""
    model = network()
    optimizer = MuonConfig(lr=0.02, embedding_lr=0.05).build(model)
    objective, first = CausalLM(model), loss_of(model, 0).item()
    for step in range(STEPS):
        (objective(batch(step)) / objective.denominator(batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    linear = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    with torch.no_grad():
        found = {"before": (linear, first), "trained": (linear, loss_of(model, STEPS).item())}
        for config in (Int8WeightOnlyConfig(), Float8WeightOnlyConfig()):
            quantize_(quantized := copy.deepcopy(model), config)
            count = sum(
                isinstance(layer, nn.Linear) and type(layer.weight) is not nn.Parameter for layer in quantized.modules()
            )
            found[type(config).__name__] = count, loss_of(quantized, STEPS).item()
            with TemporaryDirectory() as folder:
                torch.save(quantized.state_dict(), Path(folder) / "weights.pt")
                loaded = network().eval()
                loaded.load_state_dict(torch.load(Path(folder) / "weights.pt"), assign=True)
            assert torch.equal(loss_of(loaded, STEPS), loss_of(quantized, STEPS))
        dynamic = torch.ao.quantization.quantize_dynamic(as_torch_linear(copy.deepcopy(model)), {nn.Linear})
        count = linear - sum(isinstance(layer, nn.Linear) for layer in dynamic.modules())
        found["quantize_dynamic"] = count, loss_of(dynamic, STEPS).item()
    return found


if __name__ == "__main__":
    for kind, (layers, loss) in main().items():
        print(f"{kind:24} {layers} linear layers, loss {loss:.4f}")
