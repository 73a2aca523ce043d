"""Instruments: what theory says of training, measured on losses and models of your own."""

from danlu.analysis.gradients import (
    GradientSize,
    NormSummary,
    drop_ratio,
    gradient_size,
    norm_summary,
    rate_for_size,
)
from danlu.analysis.sgd import (
    RegretReport,
    Trajectory,
    average_loss_report,
    best_fixed,
    constant_rates,
    descend,
    increasing_rates_example,
    inverse_root_rates,
    project_to_ball,
    regret_bound,
    step_terms,
)

__all__ = [
    "GradientSize",
    "NormSummary",
    "RegretReport",
    "Trajectory",
    "average_loss_report",
    "best_fixed",
    "constant_rates",
    "descend",
    "drop_ratio",
    "gradient_size",
    "increasing_rates_example",
    "inverse_root_rates",
    "norm_summary",
    "project_to_ball",
    "rate_for_size",
    "regret_bound",
    "step_terms",
]
