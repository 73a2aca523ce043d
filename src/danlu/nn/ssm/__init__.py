"""State spaces: linear recurrences that train as convolutions and decode from a state of constant size."""

from danlu.nn.ssm.convolution import causal_convolution
from danlu.nn.ssm.discretize import discretize, history_step, legs_product, legs_solve
from danlu.nn.ssm.hippo import fourier_history, fourier_window, legendre, legs, legs_eigenvector_sums, legt, rescale
from danlu.nn.ssm.layer import SSM, SSMConfig, StateCache
from danlu.nn.ssm.reconstruction import reconstruct
from danlu.nn.ssm.rtf import RTF, RTFConfig, companion, is_stable, rational_kernel, transfer_function
from danlu.nn.ssm.s4 import S4, S4Config, generating_function, krylov_kernel, legs_dplr
from danlu.nn.ssm.s4d import S4D, S4DConfig

__all__ = [
    "RTF",
    "S4",
    "S4D",
    "SSM",
    "RTFConfig",
    "S4Config",
    "S4DConfig",
    "SSMConfig",
    "StateCache",
    "causal_convolution",
    "companion",
    "discretize",
    "fourier_history",
    "fourier_window",
    "generating_function",
    "history_step",
    "is_stable",
    "krylov_kernel",
    "legendre",
    "legs",
    "legs_dplr",
    "legs_eigenvector_sums",
    "legs_product",
    "legs_solve",
    "legt",
    "rational_kernel",
    "reconstruct",
    "rescale",
    "transfer_function",
]
