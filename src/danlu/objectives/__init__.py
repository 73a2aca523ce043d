"""What is minimised: each objective holds its network and turns a batch into a summed loss."""

from danlu.objectives.causal_lm import CausalLM, CausalLMConfig
from danlu.objectives.cross_entropy import linear_cross_entropy

__all__ = ["CausalLM", "CausalLMConfig", "linear_cross_entropy"]
