"""Attention modules, and the position biases they share, for use inside other people's models.

A bias module makes one `PositionBias` a forward pass, a small table, and every layer reads it.
"""

from musiclm_engine.attention.alibi import AlibiBias, alibi_slopes
from musiclm_engine.attention.cosine import CosineAttention
from musiclm_engine.attention.dynamic_position import DynamicPositionBias2d
from musiclm_engine.attention.log_spaced_position import LogSpacedPositionBias
from musiclm_engine.attention.multi_query import MultiQueryAttention
from musiclm_engine.attention.position_bias import PositionBias
from musiclm_engine.attention.relative_position import RelativePositionBias
from musiclm_engine.attention.t5 import T5Attention
from musiclm_engine.attention.t5_position import T5PositionBias, t5_bucket
from musiclm_engine.attention.window import WindowAttention, shifted_window_regions

__all__ = [
    "AlibiBias",
    "CosineAttention",
    "DynamicPositionBias2d",
    "LogSpacedPositionBias",
    "MultiQueryAttention",
    "PositionBias",
    "RelativePositionBias",
    "T5Attention",
    "T5PositionBias",
    "WindowAttention",
    "alibi_slopes",
    "shifted_window_regions",
    "t5_bucket",
]
