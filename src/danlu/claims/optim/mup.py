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


def _misplaced(rule: Literal["adam", "sgd"], *, by_rows: bool) -> float:
    """Largest relative miss of rate and decay, and of the norm at initialisation, of five kinds of layers.

    The control takes Adam's rate by rows, which is the same for square weights only.
    """
    model = nn.ModuleDict({
        "wide": nn.Linear(32, 512),
        "tall": nn.Linear(512, 32, bias=False),
        "conv": nn.Conv2d(16, 64, 3, bias=False),
        "table": nn.Embedding(11, 48),
        "gain": nn.LayerNorm(24, bias=False),
    })  # fmt: skip
    shapes = {"wide.weight": (512, 32), "tall.weight": (32, 512), "conv.weight": (64, 144)}
    features = {"table.weight": 48, "gain.weight": 24, "wide.bias": 512}
    worst, seen = 0.0, 0
    for group in mup_groups(model, 0.01, 128, rule=rule, weight_decay=0.1):
        for name in group["param_names"]:
            seen += 1
            rows, columns = shapes.get(name, (0, 0))
            if name in shapes and rule == "adam":
                factor = 128 / (rows if by_rows else columns)
            elif name in shapes:
                factor = rows / columns
            else:
                factor = 1.0 if rule == "adam" else features[name] / 128
            decay = 0.1 / factor if name in shapes or name == "table.weight" else 0.0
            worst = max(worst, abs(group["lr"] / 0.01 / factor - 1), abs(group["weight_decay"] - decay))
    spectral_init_(model, generator=torch.Generator().manual_seed(1), gain=lambda name: 2.0 if "tall" in name else 1.0)
    for name, (rows, columns) in shapes.items():
        std = model.get_parameter(name).detach().std() / (2 if "tall" in name else 1)
        worst = max(worst, abs(float(std) / spectral_std(rows, columns) - 1) - 0.03)
    worst = max(worst, abs(float(model.get_parameter("table.weight").detach().std()) - 1) - 0.1)
    return worst + abs(seen - 6)


def _conversion_miss(*, decay_kept: bool) -> float:
    """Largest miss of Muon's rate and of rate times decay, which stays AdamW's; the control keeps decay."""
    worst = 0.0
    for scale in ("plain", "jordan", "mup"):
        for rows, columns in ((48, 12), (12, 48)):
            lr, decay = muon_from_adamw(0.01, 0.1, (rows, columns), scale)
            size = {"plain": 1.0, "jordan": math.sqrt(max(1, rows / columns)), "mup": math.sqrt(rows / columns)}[scale]
            expected = 0.01 * 0.2 * math.sqrt(48) / size
            product = 0.1 * lr if decay_kept else 0.01 * 0.1
            worst = max(worst, abs(lr / expected - 1), abs(lr * decay / product - 1))
    return worst


CLAIMS = (
    Claim(
        name="initial-norm",
        statement="miss of the norm sqrt(out / in) by the initialisation, four shapes; control: 1 / sqrt(in)",
        source="Yang et al., arXiv 2310.17813: the norm of a Gaussian matrix is sqrt(rows) + sqrt(columns)",
        expected=0.01,
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
        tolerance=absolute(0.01),
        measure=lambda: _growth("adam", scaled=True),
        control=lambda: _growth("adam", scaled=False),
        seconds=0.3,
    ),
    Claim(
        name="sgd-updates-keep-their-norm",
        statement="the same of the first layer by a step of gradient descent; control: one rate",
        source="Yang et al., arXiv 2310.17813: rates proportional to out / in",
        expected=0.0,
        tolerance=absolute(0.06),
        measure=lambda: _growth("sgd", scaled=True),
        control=lambda: _growth("sgd", scaled=False),
        seconds=0.3,
    ),
    Claim(
        name="groups",
        statement="largest miss of rates, decays and initial sizes of five kinds of layers, both rules; control: "
        "Adam's rate by rows",
        source="Yang et al., arXiv 2203.03466, table 8: base / in for Adam, out / in for gradient descent",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: max(_misplaced("adam", by_rows=False), _misplaced("sgd", by_rows=False)),
        control=lambda: max(_misplaced("adam", by_rows=True), _misplaced("sgd", by_rows=False)),
        seconds=0.1,
    ),
    Claim(
        name="decay-follows-the-rate",
        statement="largest miss of converted rates, and of rate times decay, three scales; control: the decay kept",
        source="Liu et al., arXiv 2502.16982, section 2.2: weights shrink as under AdamW",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _conversion_miss(decay_kept=False),
        control=lambda: _conversion_miss(decay_kept=True),
        seconds=0.1,
    ),
    Claim(
        name="muon-from-adamw",
        statement="RMS of Muon's plain step at the converted rate over AdamW's rate, 96 x 384; control: not converted",
        source="Liu et al., arXiv 2502.16982, section 2.2: 0.2, AdamW's own",
        expected=0.2,
        tolerance=relative(0.001),
        measure=lambda: _update_rms(converted=True),
        control=lambda: _update_rms(converted=False),
        seconds=0.1,
    ),
)
