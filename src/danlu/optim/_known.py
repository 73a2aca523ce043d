"""Fused weights of known architectures, by the class of the layer that holds them.

A name does not tell how the rows of a fused weight lie: ``qkv_proj`` holds three blocks in one model, and three rows of
each head in turn in another. What stands here was read from the forward pass of the class.
"""

from collections.abc import Callable
from typing import Any

from danlu._roles import Split

#: Returns the split of a weight of so many rows and columns that a layer holds, or why there is none, as text.
Rule = Callable[[Any, int, int], Split | str]

INTERLEAVED = "its parts take turns, head by head or row by row, so that no block of rows is one of them; not split"
UNKNOWN = "may hold several maps, in an order that is not known; not split (danlu.optim.declare can say it)"


def _equal(number: int) -> Rule:
    return lambda layer, rows, columns: number


def _alone(number: int) -> Rule:
    """Return the rule of equal parts of the one map that a layer of this class has."""

    def rule(layer: Any, rows: int, columns: int) -> Split | str:
        maps = [child for child in layer.children() if next(child.parameters(), None) is not None]
        return number if len(maps) == 1 else UNKNOWN

    return rule


def _thrice(layer: Any, rows: int, columns: int) -> Split | str:
    return 3 if rows == 3 * columns else UNKNOWN


def _mixed(layer: Any, rows: int, columns: int) -> Split | str:
    return INTERLEAVED


def _queries_first(keys: Callable[[Any], int]) -> Rule:
    """Return the rule of a block of queries, one of keys and one of values, the latter as high as ``keys`` says."""

    def rule(layer: Any, rows: int, columns: int) -> Split | str:
        height = keys(layer)
        return (rows - 2 * height, height, height) if 0 < 2 * height < rows else UNKNOWN

    return rule


def _falcon(layer: Any, rows: int, columns: int) -> Split | str:
    if layer.new_decoder_architecture or not layer.multi_query:
        return INTERLEAVED
    return rows - 2 * layer.head_dim, layer.head_dim, layer.head_dim


def _big_code(layer: Any, rows: int, columns: int) -> Split | str:
    if layer.is_cross_attention:
        return 2
    return (rows - 2 * layer.kv_dim, layer.kv_dim, layer.kv_dim) if layer.multi_query else INTERLEAVED


def _delta(layer: Any, rows: int, columns: int) -> Split | str:
    return layer.key_dim, layer.key_dim, layer.value_dim


def _experts(layer: Any, rows: int, columns: int) -> Split | str:
    return int(layer.moe_num_experts)


def _each(*names: str, **rules: Rule) -> dict[str, dict[str, Rule]]:
    return dict.fromkeys(names, rules)


_BY_HEADS = _queries_first(lambda layer: layer.num_key_value_heads * layer.head_dim)
#: {class of the layer: {name of the fused weight or of the layer that holds it: rule}}
FUSED: dict[str, dict[str, Rule]] = {
    # query, key, value
    "CausalSelfAttention": {"c_attn": _thrice},
    "LayoutLMv2SelfAttention": {"qkv_linear": _equal(3)},
    **_each("HieraMaskUnitAttention", "Sam2MultiScaleAttention", qkv=_equal(3)),
    "DbrxAttention": {"Wqkv": _BY_HEADS},
    **_each("Phi3Attention", "Phi4MultimodalAttention", qkv_proj=_BY_HEADS),
    "Exaone4_5_VisionAttention": {"qkv": _queries_first(lambda layer: layer.kv_dim)},
    "FalconAttention": {"query_key_value": _falcon},
    "FalconFlashAttention2": {"query_key_value": _falcon},
    "GPTBigCodeAttention": {"c_attn": _big_code},
    **_each(
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5MoeGatedDeltaNet",
        "Qwen4ExpTextGatedDeltaNet",
        "LaraMiniGatedDeltaNet",
        in_proj_qkv=_delta,
    ),
    "JetMoeAttention": {"kv_proj": _equal(2)},
    **_each(
        "EvollaSequenceCompressorAttention",
        "GraniteSpeechConformerAttention",
        "GraniteSpeechPlusConformerAttention",
        to_kv=_equal(2),
    ),
    # parts that take turns
    **_each(
        "BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention", query_key_value=_mixed
    ),
    **_each("CodeGenAttention", "MiniMaxLightningAttention", qkv_proj=_mixed),
    "AttentionCl": {"qkv": _mixed},
    **_each("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", q_proj=_mixed),  # query and gate
    "DisentangledSelfAttention": {"in_proj": _mixed},
    "Qwen3NextGatedDeltaNet": {"in_proj_qkvz": _mixed, "in_proj_ba": _mixed},
    "ZambaMambaMixer": {"in_proj": _mixed},
    # gate and value of a feed-forward layer, input and gate of a mixer
    **_each("ModernBertMLP", "ModernBertDecoderMLP", Wi=_equal(2)),
    **_each("GraniteMoeSharedMLP", "GraniteMoeHybridMLP", "GraniteMoeSWAMLP", "JetMoeMoE", input_linear=_equal(2)),
    **_each("Dinov2SwiGLUFFN", "Dinov2WithRegistersSwiGLUFFN", weights_in=_equal(2)),
    **_each("SwiGLUFFN", "SwiGLUFFNFused", w12=_equal(2)),
    **_each("GEGLU", "SwiGLU", proj=_alone(2)),
    "GluMlp": {"fc1": _equal(2)},
    **_each("Mamba", "MambaMixer", "FalconMambaMixer", "JambaMambaMixer", in_proj=_equal(2)),
    **_each("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv", "Lfm3VlVisionShortConv", in_proj=_equal(3)),
    # shifts, scales and gates made of a condition
    **_each("AdaLayerNormZero", "AdaLayerNormSingle", "CogVideoXLayerNormZero", linear=_equal(6)),
    **_each("AdaLayerNormContinuous", "AdaGroupNorm", linear=_equal(2)),
    "AdaLayerNormZeroSingle": {"linear": _equal(3)},
    "LuminaRMSNormZero": {"linear": _equal(4)},
    "SD35AdaLayerNormZeroX": {"linear": _equal(9)},
    "DiTTransformer2DModel": {"proj_out_1": _equal(2)},
    # experts one below the other
    "DbrxExpertGLU": {"w1": _experts, "v1": _experts, "w2": _experts},
}
#: Layers that are not fused although their name is one of a fused weight.
PLAIN = {("BarkMLP", "in_proj"), ("DacVectorQuantize", "in_proj"), ("Kimi_K25MultimodalProjection", "in_proj")}
#: Stacks of experts kept as (experts, inputs, outputs), with the rule of the outputs of ``gate_up_proj``.
TRANSPOSED_STACKS: dict[str, Rule] = {
    "GptOssExperts": _mixed,
    "Llama4TextExperts": _equal(2),
    "OpenAIPrivacyFilterExperts": _equal(2),
    "AriaExperts": _equal(2),
}
INPUTS_FIRST, OUTPUTS_FIRST = "inputs first", "outputs first"
#: Weights of three dimensions that are one map between features and heads, by the class that holds them.
FLATTENED = {
    "XLNetRelativeAttention": {**dict.fromkeys("qkvr", INPUTS_FIRST), "o": OUTPUTS_FIRST},
    "FunnelRelMultiheadAttention": {"r_kernel": INPUTS_FIRST},
}
#: Matrices that hold maps kept as (inputs, outputs) one below the other, as a transposed convolution of several groups
#: does, by the class that holds them; :data:`FUSED` has their number.
BELOW = {"DbrxExpertGLU": ("w2",)}
#: Weights of three dimensions that are a stack of maps, by the class that holds them, besides those of experts.
STACKS = {"RecurrentGemmaRglru": ("input_gate_weight", "recurrent_gate_weight")}
