"""Every recipe is a complete configuration that builds, and the registry names the nearest one."""

import dataclasses

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


def test_the_default_and_its_baseline_read_the_same_text_in_the_same_tokens() -> None:
    data = [dataclasses.replace(load(name).data, batch=1) for name in ("lm", "lm-dense", "lm-baseline")]
    assert data[0] == data[1] == data[2]


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'lm-dense'"):
        load("lm-dens")


def test_the_caption_recipes_differ_in_where_their_patches_stand_and_in_nothing_else() -> None:
    names = ("digits-caption", "digits-caption-flat", "digits-caption-unscaled")
    first, *others = (configs.to_tree(load(name)) for name in names)
    for other, scheme in zip(others, ("flat", "unscaled")):
        lines = [line for line in configs.differences(first, other) if not line.startswith("recipe")]
        assert lines == [f'model.scheme: "tie" and "{scheme}"']
