"""From a configuration to the components of a run, made and fitted together."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from danlu.nn import balance
from danlu.protocols import Data, ExpectsSizes
from danlu.train import rng
from danlu.train.config import RunConfig
from danlu.train.contracts import check_data, check_objective, check_optimizer
from danlu.train.device import Policy, choose
from danlu.train.distributed import World
from danlu.train.ema import averaged
from danlu.train.load import build_model, load_objective
from danlu.train.parallel import Mesh, parallelize

__all__ = ["Assembly", "assemble", "distribute", "fitted", "prepare"]


@dataclass(frozen=True)
class Assembly:
    """The components of a run, fitted together; ``config`` is the configuration with the sizes of the data."""

    config: RunConfig
    data: Data
    model: nn.Module
    objective: Any
    optimizer: Optimizer
    policy: Policy
    world: World
    ema: AveragedModel | None
    mesh: Mesh = Mesh()


def assemble(config: RunConfig, world: World | None = None) -> Assembly:
    """Return the components of a run, ready to train: :func:`prepare`, then :func:`distribute`."""
    return distribute(prepare(config, world))


def prepare(config: RunConfig, world: World | None = None) -> Assembly:
    """Open the data and make model, objective and optimizer, seeded by ``config.train.seed``, each process the whole.

    The model's fields that the data's ``sizes`` name (a vocabulary, the size of images) take those values, known only
    once the data were read; a field that is 0 (no classes, say) is a choice and stays. Model, objective and optimizer
    are made once before, with the sizes known by then: reading data can take long, and what is wrong with the
    others should be said first.

    Raises:
        ValueError, TypeError, OSError: a component does not accept its configuration.
    """
    world = world or World()
    policy = choose(config.train.precision, device=config.train.device, threads=config.train.threads)
    policy.apply()
    if isinstance(config.data, ExpectsSizes):
        config = fitted(config, config.data.expected_sizes())
    rng.seed_all(config.train.seed)
    model = build_model(config, policy)
    drawn = rng.snapshot()
    trial = config.objective.build(model)
    check_objective(trial, config.objective)
    check_optimizer(config.optim.build(trial, process_group=None), trial, config.optim)
    del trial
    data = config.data.open(
        seed=config.train.seed,
        rank=world.rank,
        world=world.size,
        pin=policy.device.type == "cuda",
        prefetch=True,
    )
    check_data(data, config.data)
    whole = fitted(config, data.sizes)
    if whole != config:
        config = whole
        rng.seed_all(config.train.seed)
        model = build_model(config, policy)
    else:
        rng.restore(drawn)
    objective = config.objective.build(
        model, data=data, batches=config.train.batches, pretrained=lambda other: load_objective(other.run)[0]
    ).to(policy.device)
    average = None if config.train.ema is None else averaged(objective, config.train.ema)
    optimizer = config.optim.build(objective, process_group=None)
    check_optimizer(optimizer, objective, config.optim)
    return Assembly(config, data, model, objective, optimizer, policy, world, average)


def distribute(parts: Assembly) -> Assembly:
    """Place what :func:`prepare` made on the processes of the run, in place, and fit the optimizer to it.

    Raises:
        ValueError: the processes cannot share it as ``config.train.parallel`` says.
    """
    config, objective = parts.config, parts.objective
    mesh = parallelize(objective, config.train.parallel, parts.policy)
    if parts.ema is not None:
        parallelize(parts.ema.module, config.train.parallel, parts.policy)
    optimizer = parts.optimizer
    if mesh.world.size > 1:  # the parameters are others now
        optimizer = config.optim.build(objective, process_group=mesh.copies)
    balance.attach(parts.model, optimizer, summed_loss=objective)
    return dataclasses.replace(parts, optimizer=optimizer, mesh=mesh)


def fitted(config: RunConfig, sizes: Mapping[str, int]) -> RunConfig:
    """Return the configuration with the sizes that its data have."""
    fields = {field.name for field in dataclasses.fields(config.model)}
    sizes = {name: size for name, size in sizes.items() if name in fields and getattr(config.model, name)}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
