"""Optimizers, the groups their parameters belong in, learning-rate schedules, and clipping."""

from danlu._roles import MATRIX_ROLES, ROLES, declare
from danlu.optim.adamw import AdamWConfig
from danlu.optim.amos import Amos, AmosConfig, amos_scale
from danlu.optim.amos_rates import AmosHyperparameters, amos_hyperparameters
from danlu.optim.build import build_optimizers
from danlu.optim.clip import (
    NonFiniteGuard,
    clip_grad_norm_,
    clip_groups_,
    descent_factor,
    grad_norm,
    limited_step,
    nonfinite_gradients,
)
from danlu.optim.combined import CombinedOptimizer, merged_state_dicts
from danlu.optim.decay import clipped_decay_, decay_, spectral_decay_
from danlu.optim.groups import check_partition, declarations_kept, describe, param_groups
from danlu.optim.lion import Lion, LionConfig
from danlu.optim.loraplus import balanced_ratio, loraplus_groups, watch_ratio
from danlu.optim.muon import Muon, MuonConfig
from danlu.optim.muon_step import muon_, shape_scale
from danlu.optim.mup import muon_from_adamw, mup_factor, mup_groups, spectral_init_, spectral_std
from danlu.optim.schedules import Constant, Cosine, InverseTime, ScheduleConfig, WarmupStableDecay, schedule
from danlu.optim.state_bytes import state_bytes
from danlu.optim.telemetry import Update, measured_step, singular_entropy
from danlu.optim.tiger import Tiger, TigerConfig

__all__ = [
    "MATRIX_ROLES",
    "ROLES",
    "AdamWConfig",
    "Amos",
    "AmosConfig",
    "AmosHyperparameters",
    "CombinedOptimizer",
    "Constant",
    "Cosine",
    "InverseTime",
    "Lion",
    "LionConfig",
    "Muon",
    "MuonConfig",
    "NonFiniteGuard",
    "ScheduleConfig",
    "Tiger",
    "TigerConfig",
    "Update",
    "WarmupStableDecay",
    "amos_hyperparameters",
    "amos_scale",
    "balanced_ratio",
    "build_optimizers",
    "check_partition",
    "clip_grad_norm_",
    "clip_groups_",
    "clipped_decay_",
    "decay_",
    "declarations_kept",
    "declare",
    "descent_factor",
    "describe",
    "grad_norm",
    "limited_step",
    "loraplus_groups",
    "measured_step",
    "merged_state_dicts",
    "muon_",
    "muon_from_adamw",
    "mup_factor",
    "mup_groups",
    "nonfinite_gradients",
    "param_groups",
    "schedule",
    "shape_scale",
    "singular_entropy",
    "spectral_decay_",
    "spectral_init_",
    "spectral_std",
    "state_bytes",
    "watch_ratio",
]
