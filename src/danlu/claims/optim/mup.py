"""The spectral condition: the norm of the initialisation and of updates at every width, Muon's rate."""

import itertools
import math
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam

from danlu.claims.frame import Claim, absolute, at_most, relative
from danlu.linalg import spectral_norm
from danlu.optim import Muon, muon_from_adamw, mup_groups, spectral_init_, spectral_std


def _norm_miss(*, by_columns: bool) -> float:
    """Largest relative distance of a Gaussian matrix's spectral norm from sqrt(rows / columns)."""
    worst = 0.0
    for rows, columns in ((256, 256), (1024, 256), (256, 1024), (2048, 64)):
        generator = torch.Generator().manual_seed(rows)
        M = torch.randn(rows, columns, generator=generator)
        norm = float(torch.linalg.eigvalsh(M @ M.mT if rows < columns else M.mT @ M)[-1].sqrt())
        std = columns**-0.5 if by_columns else spectral_std(rows, columns)
        worst = max(worst, abs(std * norm / math.sqrt(rows / columns) - 1))
    return worst


def _norm_of_update(width: int, rule: Literal["adam", "sgd"], *, scaled: bool) -> float:
    """Spectral norm over sqrt(out / in) of one step of a weight in a network of this width.

    Of a hidden weight under Adam and of the first under gradient descent: there one rate for all goes wrong, which
    moves the former too much and the latter too little.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (16, width, width, width, 4)
    layers = [nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)]
    model = spectral_init_(nn.ModuleList(layers), generator=generator)
    x, y = torch.randn(128, 16, generator=generator), torch.randn(128, 4, generator=generator)
    for layer in layers:
        x = layer(torch.relu(x))
    (x - y).square().mean().backward()
    groups: Any = mup_groups(model, 1e-2, 128, rule=rule) if scaled else model.parameters()
    weight = layers[1 if rule == "adam" else 0].weight
    before = weight.detach().clone()
    optimizer = Adam(groups, lr=1e-2) if rule == "adam" else SGD(groups, lr=1e-2)
    optimizer.step()
    norm = spectral_norm(weight.detach() - before, iterations=30).value
    return float(norm / math.sqrt(weight.shape[0] / weight.shape[1]))


def _growth(rule: Literal["adam", "sgd"], *, scaled: bool) -> float:
    """Log-log slope of that norm in the width, from 128 to 1024."""
    narrow, wide = (_norm_of_update(width, rule, scaled=scaled) for width in (128, 1024))
    return math.log(wide / narrow) / math.log(8)


def _update_rms(*, converted: bool) -> float:
    """Root mean square of Muon's plain step for AdamW's rate of 0.01, over that rate."""
    weight = nn.Parameter(torch.zeros(96, 384))
    lr = muon_from_adamw(0.01, 0.1, (96, 384))[0] if converted else 0.01
    optimizer = Muon([weight], lr=lr, weight_decay=0.0, scale="plain", dtype=torch.float32)
    weight.grad = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    return float(weight.detach().square().mean().sqrt() / 0.01)


CLAIMS = (
    Claim(
        name="initial-norm",
        statement="miss of the norm sqrt(out / in) by the initialisation, four shapes; control: 1 / sqrt(in)",
        source="Yang et al., arXiv 2310.17813: the norm of a Gaussian matrix is sqrt(rows) + sqrt(columns)",
        expected=0.02,
        tolerance=at_most(),
        measure=lambda: _norm_miss(by_columns=False),
        control=lambda: _norm_miss(by_columns=True),
        seconds=0.5,
    ),
    Claim(
        name="adam-updates-keep-their-norm",
        statement="slope in the width, 128 to 1024, of an Adam update's norm over sqrt(out / in); control: one rate",
        source="Yang et al., arXiv 2310.17813, condition 1: of the order of 1 at every width",
        expected=0.0,
        tolerance=absolute(0.1),
        measure=lambda: _growth("adam", scaled=True),
        control=lambda: _growth("adam", scaled=False),
        seconds=0.3,
    ),
    Claim(
        name="sgd-updates-keep-their-norm",
        statement="the same of the first layer by a step of gradient descent; control: one rate",
        source="Yang et al., arXiv 2310.17813: rates proportional to out / in",
        expected=0.0,
        tolerance=absolute(0.1),
        measure=lambda: _growth("sgd", scaled=True),
        control=lambda: _growth("sgd", scaled=False),
        seconds=0.3,
    ),
    Claim(
        name="muon-from-adamw",
        statement="RMS of Muon's plain step at the converted rate over AdamW's rate, 96 x 384; control: not converted",
        source="Liu et al., arXiv 2502.16982, section 2.2: 0.2, AdamW's own",
        expected=0.2,
        tolerance=relative(0.02),
        measure=lambda: _update_rms(converted=True),
        control=lambda: _update_rms(converted=False),
        seconds=0.1,
    ),
)
