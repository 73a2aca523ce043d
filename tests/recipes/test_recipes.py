"""Every recipe is a complete configuration that builds, and the registry names the nearest one."""

import pytest

from danlu import config as configs
from danlu.models import GPT, Transformer
from danlu.recipes import REGISTRY, load
from danlu.train import RunConfig


@pytest.mark.parametrize("name", REGISTRY)
def test_a_recipe_is_a_run_configuration_that_survives_its_own_file(name: str) -> None:
    config = load(name)
    assert config.recipe == name
    assert configs.loads(RunConfig, configs.dumps(config)) == config


def test_the_default_and_what_it_is_compared_with_work_as_much_on_each_token_within_a_tenth() -> None:
    models = (Transformer(load("lm").model), Transformer(load("lm-dense").model), GPT(load("lm-baseline").model))
    work = [model.flops_per_token(256) for model in models]
    assert max(work) < 1.1 * min(work)


def test_the_default_and_its_baseline_read_the_same_data() -> None:
    assert load("lm").data == load("lm-dense").data == load("lm-baseline").data


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'lm-dense'"):
        load("lm-dens")
