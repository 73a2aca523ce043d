"""Passes, clipping and guard on an accelerator never wait for it: nothing in them asks for a number.

On meta there is no number, so that whoever asks for one gets an error (``aten._local_scalar_dense``, behind ``item``,
``bool``, ``int``, ``tolist``): what is below runs to their end.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danlu import recipes
from danlu._autograd import planned
from danlu.optim import NonFiniteGuard, clip_grad_norm_
from danlu.train.device import Policy
from danlu.train.load import build_model
from danlu.train.sizes import sizes_of

BFLOAT16 = Policy(
    device=torch.device("cuda"), dtype=torch.bfloat16, matmul_precision="high", threads=1, gflops={}, name=""
)


def batch_of(config: Any) -> dict[str, Tensor]:
    batch = {name: value[:4].to("meta") for name, value in config.data.example().items()}
    return batch | {"position": torch.arange(4, device="meta")}


def test_asking_for_a_number_is_an_error_on_meta() -> None:
    x = torch.ones(2, device="meta")
    for ask in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x.tolist(), lambda: int(x.sum())):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            ask()


@pytest.mark.parametrize("name", ["lm", "lm-dense", "digits"])
def test_passes_clipping_and_guard_ask_for_no_number(name: str) -> None:
    config = recipes.load(name)
    config = replace(config, model=replace(config.model, **_small(name)))
    batch = batch_of(config)
    if name != "digits":
        batch["documents"] = torch.zeros_like(batch["tokens"])
    with torch.device("meta"):
        objective: nn.Module = config.objective.build(build_model(config, BFLOAT16), batches=100)
    guard = NonFiniteGuard()
    with planned("cuda"):
        loss = objective(batch)
        (loss / objective.denominator(batch).clamp_min(1)).backward()
        norm = clip_grad_norm_(objective.parameters(), 1.0)
        guard.screen(norm, objective.named_parameters())
    assert norm.is_meta


def _small(name: str) -> dict[str, Any]:
    return {"widths": (16, 32), "blocks": (1, 1)} if name == "digits" else {"layers": 2, "vocab_size": 257}


def test_the_plan_of_a_recipe_runs_the_way_of_a_gpu() -> None:
    config = recipes.load("lm")
    config = replace(config, model=replace(config.model, **_small("lm")), data=replace(config.data, vocab_size=257))
    assert sizes_of(config, BFLOAT16, processes=2, kind="cuda").sizes.num_experts == 16
