"""The contracts between the parts of a run, typed: what a component must have for the rest to work with it.

Every component that a recipe can choose is made by a frozen, keyword-only dataclass beside it, ``XConfig`` beside
``X``, with one method: ``build`` (data: ``open``). Runtime arguments are passed by keyword; a component takes those
that it needs and ``**others`` for the rest, so that a later release can pass more. Nothing is looked up by the name of
a class or of an argument.

These are protocols: a class fits by having the methods, it need not inherit from anything here. Each shows its smallest
working example.
"""

from danlu.protocols.config import Config
from danlu.protocols.data import (
    IGNORE,
    Batch,
    Data,
    DataConfig,
    ExpectsSizes,
    KeepsFiles,
    Loader,
    ShowsBatch,
    TakesTokenizer,
    TokenData,
)
from danlu.protocols.layers import ActivationConfig, BalanceConfig, Cache, Context, Joined, Mixer, MixerConfig
from danlu.protocols.objectives import (
    Denoises,
    Generator,
    Measure,
    Objective,
    ObjectiveConfig,
    Paced,
    Scored,
    SwapsWeights,
)
from danlu.protocols.reporting import Durable, Record, Reporter
from danlu.protocols.training import (
    CountsOperations,
    CountsParameters,
    Decays,
    HasBlocks,
    LanguageModel,
    Model,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SettlesLate,
)

__all__ = [
    "IGNORE",
    "ActivationConfig",
    "BalanceConfig",
    "Batch",
    "Cache",
    "Config",
    "Context",
    "CountsOperations",
    "CountsParameters",
    "Data",
    "DataConfig",
    "Decays",
    "Denoises",
    "Durable",
    "ExpectsSizes",
    "Generator",
    "HasBlocks",
    "Joined",
    "KeepsFiles",
    "LanguageModel",
    "Loader",
    "Measure",
    "Mixer",
    "MixerConfig",
    "Model",
    "ModelConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Paced",
    "Record",
    "Reporter",
    "ScheduleConfig",
    "Scored",
    "SettlesLate",
    "ShowsBatch",
    "SwapsWeights",
    "TakesTokenizer",
    "TokenData",
]
