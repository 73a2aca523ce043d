"""What is minimised: each objective holds its network and turns a batch into a summed loss."""

from danlu.objectives.captioning import Captioning, CaptioningConfig
from danlu.objectives.causal_lm import CausalLM, CausalLMConfig
from danlu.objectives.cross_entropy import linear_cross_entropy
from danlu.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from danlu.objectives.meanflow import MeanFlow, MeanFlowConfig, total_derivative

__all__ = [
    "Captioning",
    "CaptioningConfig",
    "CausalLM",
    "CausalLMConfig",
    "FlowMatching",
    "FlowMatchingConfig",
    "MeanFlow",
    "MeanFlowConfig",
    "linear_cross_entropy",
    "total_derivative",
]
