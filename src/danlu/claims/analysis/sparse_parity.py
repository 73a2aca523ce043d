"""Sparse parity: tasks are learned in the order of their use, each at once, and the loss is what is left of them."""

import functools

import torch

from danlu.analysis import ParityNetwork, ParityRun, log_log_slope, parity_tasks, rank_correlation, train_parity
from danlu.claims.frame import Claim, absolute, at_least, at_most

_TASKS = parity_tasks(12, 16)


@functools.cache
def _run(*, zipf: bool) -> ParityRun:
    """Train on twelve tasks with Zipf's shares or with equal ones; the run is of the same cost."""
    tasks = _TASKS if zipf else _TASKS._replace(shares=torch.full_like(_TASKS.shares, 1 / 12))
    network = ParityNetwork(12, 16, 200, generator=torch.Generator().manual_seed(0))
    return train_parity(network, tasks, steps=3000, batch=250, lr=1e-2)


def _order(*, zipf: bool) -> float:
    """Rank correlation of Zipf's order with the step at which a task is learned, over the learned ones."""
    when = _run(zipf=zipf).learned_at()
    return rank_correlation(torch.arange(12)[when.isfinite()], when[when.isfinite()])


def _exponent(*, zipf: bool) -> float:
    """Minus the slope of the log of the step over that of Zipf's share, over the learned tasks."""
    when = _run(zipf=zipf).learned_at()
    return -log_log_slope(_TASKS.shares[when.isfinite()], when[when.isfinite()])


def _fall(run: ParityRun) -> torch.Tensor:
    """By what factor the step grows while each loss goes from 0.9 bit (the last time) to 0.1 (the first)."""
    low = run.learned_at()
    high = run.steps[:, None].double().masked_fill((run.losses <= 0.9) | (run.steps[:, None] >= low), 1.0).amax(0)
    return low / high


def _fall_of_a_task() -> float:
    """Median over the learned tasks."""
    factors = _fall(_run(zipf=True))
    return float(factors[factors.isfinite()].median())


def _fall_of_the_mean() -> float:
    run = _run(zipf=True)
    return float(_fall(run._replace(losses=run.mean_loss[:, None]))[0])


def _distance_from_steps(*, rarest_first: bool) -> float:
    """Mean distance of the loss from the share of the tasks above half a bit; the control gives them others' shares."""
    run = _run(zipf=True)
    above = (run.steps[:, None] < run.learned_at(0.5)).double()
    shares = run.shares.flip(0) if rarest_first else run.shares
    return float((run.mean_loss - above @ shares).abs().mean())


_SETTING = "12 tasks of 3 among 16 bits, g = 0.4, 200 units, 3000 steps of 250"

CLAIMS = (
    Claim(
        name="in-the-order-of-use",
        statement=f"rank correlation of frequency and step of learning, {_SETTING}; control: equal frequencies",
        source="Michaud et al., arXiv 2303.13506, section 3",
        expected=0.8,
        tolerance=at_least(),
        measure=lambda: _order(zipf=True),
        control=lambda: _order(zipf=False),
        seconds=4.5,
    ),
    Claim(
        name="exponent-in-steps",
        statement=f"x of S_k ~ p_k^-x, {_SETTING}; control: equal frequencies, p_k still Zipf's",
        source="Michaud et al., arXiv 2303.13506, section 3 (0.81; the simplest model says 1)",
        expected=0.81,
        tolerance=absolute(0.15),
        measure=lambda: _exponent(zipf=True),
        control=lambda: _exponent(zipf=False),
        seconds=4.5,
    ),
    Claim(
        name="single-tasks-fall-at-once",
        statement="factor in steps from 0.9 to 0.1 bit, median over the tasks; control: the mean loss over tasks",
        source="Michaud et al., arXiv 2303.13506, figure 2: sudden falls, a smooth mean",
        expected=6.0,
        tolerance=at_most(),
        measure=_fall_of_a_task,
        control=_fall_of_the_mean,
        seconds=2.3,
    ),
    Claim(
        name="loss-is-the-share-of-the-unlearned",
        statement="mean distance of the loss, in bits, from the share of the tasks above half a bit; control: "
        "the rarest task given the largest share",
        source="derivation: L_n = sum of p_k over k > n",
        expected=0.08,
        tolerance=at_most(),
        measure=lambda: _distance_from_steps(rarest_first=False),
        control=lambda: _distance_from_steps(rarest_first=True),
        seconds=2.3,
    ),
)
