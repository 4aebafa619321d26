"""The weights of a `Stage` as a decode step reads them."""

import torch
from torch import Tensor, nn

from musiclm_engine.audiolm.stage import Stage
from musiclm_engine.audiolm.transformer import Layer
from musiclm_engine.generation.decoder import (
    Decoder,
    DecoderLayer,
    FeedForward,
    Norm,
    SelfAttention,
    Weight,
)
from musiclm_kernels import quantize_weight


def decoder_from_stage(
    stage: Stage, *, dtype: torch.dtype | None = None, weight_dtype: torch.dtype | None = None
) -> Decoder:
    """A stage's weights for `DecodeStep`.

    Args:
        stage: any; the decoder shares what is already in the precision that is asked for.
        dtype: of the weights, float; the stage's own if None.
        weight_dtype: torch.int8 or torch.float8_e4m3fn quantises all matrices, by output channel.

    Raises:
        ValueError: weight_dtype is another.
    """
    with torch.no_grad():
        convert = _Converter(dtype or stage.logit_weights.dtype, weight_dtype)
        layers = tuple(convert.layer(layer) for layer in stage.transformer.typed_layers())
        head = convert.weight(stage.logit_weights.flatten(0, 1))
        levels = (stage.target_levels, stage.target_size)
        return Decoder(
            layers=layers,
            heads=stage.transformer.heads,
            key_heads=stage.transformer.heads,
            dim_head=stage.transformer.dim_head,
            table=stage.position.table(),
            offset=stage.position.offset,
            norm=convert.norm(stage.transformer.norm),
            head=head.values.unflatten(0, levels),
            head_scale=None if head.scale is None else head.scale.unflatten(0, levels),
            embedding=stage.target_embedding.weight.detach().unflatten(0, levels),
        )


class _Converter:
    def __init__(self, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.weight_dtype = weight_dtype

    def weight(self, weight: Tensor) -> Weight:
        if self.weight_dtype is not None:
            return Weight(*quantize_weight(weight.detach(), self.weight_dtype))
        return Weight(weight.detach().to(self.dtype))

    def norm(self, norm: nn.LayerNorm) -> Norm:
        return Norm(norm.weight.detach())

    def layer(self, layer: Layer) -> DecoderLayer:
        attention, feed_forward = layer.attention, layer.feed_forward
        return DecoderLayer(
            attention=SelfAttention(
                norm=self.norm(attention.norm),
                qkv=self.weight(attention.to_qkv.weight),
                out=self.weight(attention.to_out.weight),
            ),
            cross_attention=None,
            feed_forward=FeedForward(
                norm=self.norm(feed_forward.norm),
                up=self.weight(feed_forward.expand.weight),
                down=self.weight(feed_forward.contract.weight),
                activation="geglu" if feed_forward.gated else "gelu",
            ),
        )
