"""Every recipe is a complete configuration that builds, and the registry names the nearest one."""

import dataclasses

import pytest

from danlu import config as configs
from danlu.models import Transformer
from danlu.recipes import REGISTRY, load
from danlu.train import RunConfig


@pytest.mark.parametrize("name", REGISTRY)
def test_a_recipe_is_a_run_configuration_that_survives_its_own_file(name: str) -> None:
    config = load(name)
    assert config.recipe == name
    assert configs.loads(RunConfig, configs.dumps(config)) == config


def test_the_default_and_its_baseline_have_the_same_active_size_within_a_tenth() -> None:
    active = [Transformer(load(name).model).parameter_counts()[1] for name in ("lm", "lm-baseline", "lm-dense")]
    assert max(active) < 1.1 * min(active)


def test_the_dense_recipe_differs_from_the_baseline_in_its_optimizer_alone() -> None:
    dense, baseline = load("lm-dense"), load("lm-baseline")
    same = dataclasses.replace(
        dense, recipe=baseline.recipe, optim=baseline.optim, train=baseline.train, schedule=baseline.schedule
    )
    assert same == baseline


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'lm-dense'"):
        load("lm-dens")
