from musiclm_kernels.decode_layer.composition_reference import HyperConnection
from musiclm_kernels.decode_layer.eight_bits import quantize_weight
from musiclm_kernels.decode_layer.op import decode_linear, decode_qkv, decode_residual

__all__ = ["HyperConnection", "decode_linear", "decode_qkv", "decode_residual", "quantize_weight"]
