"""State spaces: linear recurrences that train as convolutions and decode from a state of constant size."""

from danlu.nn.ssm.convolution import causal_convolution
from danlu.nn.ssm.layer import SSM, SSMConfig, StateCache
from danlu.nn.ssm.s4d import S4D, S4DConfig

__all__ = [
    "S4D",
    "SSM",
    "S4DConfig",
    "SSMConfig",
    "StateCache",
    "causal_convolution",
]
