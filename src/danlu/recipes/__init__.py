"""Complete run configurations, one function each: ``load(name)`` returns the tree that ``danlu train NAME`` runs.

A recipe is a Python function without arguments; adding one is a function in a file of this folder and a line here.
Only the recipe that is asked for is imported.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danlu._validate import nearest

if TYPE_CHECKING:
    from danlu.train.run import RunConfig

__all__ = ["REGISTRY", "Recipe", "load"]


@dataclass(frozen=True)
class Recipe:
    """One line of the registry: what the recipe trains, and ``module:function``."""

    summary: str
    target: str


REGISTRY: dict[str, Recipe] = {
    "lm": Recipe("language model: latent attention, shared and fine-grained experts, Muon", "danlu.recipes.lm:lm"),
    "lm-dense": Recipe("the same without experts, grouped-query attention (Llama), Muon", "danlu.recipes.lm:lm_dense"),
    "lm-dense-adamw": Recipe("lm-dense trained by AdamW instead", "danlu.recipes.lm:lm_dense_adamw"),
    "lm-ssm": Recipe("lm-dense with state spaces in attention's place", "danlu.recipes.ssm:lm_ssm"),
    "lm-hybrid": Recipe("lm-dense with state spaces in three of four blocks", "danlu.recipes.ssm:lm_hybrid"),
    "lm-dense-lion": Recipe("lm-dense trained by Lion instead", "danlu.recipes.lm:lm_dense_lion"),
    "lm-dense-tiger": Recipe("lm-dense trained by Tiger instead", "danlu.recipes.lm:lm_dense_tiger"),
    "lm-dense-amos": Recipe("lm-dense trained by Amos instead", "danlu.recipes.lm:lm_dense_amos"),
    "lm-baseline": Recipe(
        "dense GPT of the same active size with AdamW, to compare with", "danlu.recipes.lm:lm_baseline"
    ),
    "lm-masked": Recipe("lm-dense as an encoder: hidden tokens from both sides", "danlu.recipes.lm:lm_masked"),
    "lm-mha": Recipe("lm-dense with multi-head attention of eight heads", "danlu.recipes.attention:lm_mha"),
    "lm-gqa": Recipe("lm-dense with two key/value groups, a quarter of the cache", "danlu.recipes.attention:lm_gqa"),
    "lm-mla": Recipe("lm-dense with latent attention and the cache of lm-gqa", "danlu.recipes.attention:lm_mla"),
    "lm-kv-shared": Recipe(
        "lm-dense with keys that are values and the cache of lm-gqa", "danlu.recipes.attention:lm_kv_shared"
    ),
    "lm-moe-aux": Recipe("experts balanced by an auxiliary loss", "danlu.recipes.experts:lm_moe_aux"),
    "lm-moe-lossfree": Recipe("experts balanced by biases without a loss", "danlu.recipes.experts:lm_moe_lossfree"),
    "lm-moe-dynamic": Recipe("as many experts as a token needs, four in mean", "danlu.recipes.experts:lm_moe_dynamic"),
    "lm-squareplus": Recipe("lm-dense with SquarePlus gates, b trained", "danlu.recipes.attention:lm_squareplus"),
    "digits-caption": Recipe(
        "sentences with images of digits, read and drawn; RoPE-Tie", "danlu.recipes.captions:digits_caption"
    ),
    "digits-caption-flat": Recipe(
        "the same with patches in one dimension", "danlu.recipes.captions:digits_caption_flat"
    ),
    "digits-caption-unscaled": Recipe(
        "the same with patches a step of one apart", "danlu.recipes.captions:digits_caption_unscaled"
    ),
    "digits": Recipe("images of digits in one step: MeanFlow, a lean U-Net", "danlu.recipes.images:digits"),
    "digits-flow": Recipe("the same network by flow matching, many steps", "danlu.recipes.images:digits_flow"),
    "digits-ddpm": Recipe(
        "the same by denoising: linear betas, ancestral sampling", "danlu.recipes.images:digits_ddpm"
    ),
    "digits-edm": Recipe("the same by denoising in EDM's form, Heun's method", "danlu.recipes.images:digits_edm"),
    "digits-sid": Recipe("a digits-edm run distilled to one step by SiD", "danlu.recipes.images:digits_sid"),
    "digits-64": Recipe("digits at 64x64, the schedule shifted to the resolution", "danlu.recipes.images:digits_64"),
    "images": Recipe("MeanFlow on your own images at 32x32 (--data FOLDER)", "danlu.recipes.images:images"),
    "digits-mae": Recipe("a masked autoencoder of digits: features without labels", "danlu.recipes.images:digits_mae"),
    "digits-classifier": Recipe(
        "the classifier whose features measure generated digits", "danlu.recipes.images:digits_classifier"
    ),
}


def load(name: str) -> "RunConfig":
    """Return the configuration of a recipe.

    Raises:
        ValueError: no such recipe; the nearest name is suggested.

    >>> load("lm-basline")
    Traceback (most recent call last):
    ...
    ValueError: no recipe is called 'lm-basline'; did you mean 'lm-baseline'? All: lm, ...
    """
    if name not in REGISTRY:
        close = nearest(name, REGISTRY)
        hint = f"; did you mean {close!r}?" if close else "."
        raise ValueError(f"no recipe is called {name!r}{hint} All: {', '.join(REGISTRY)}")
    module, _, function = REGISTRY[name].target.partition(":")
    config: RunConfig = getattr(importlib.import_module(module), function)()
    return config
