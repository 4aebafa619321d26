"""The operations that a decode step is made of, and their definitions, as a choice of one or the
other."""

from collections.abc import Callable
from typing import Any, NamedTuple

from musiclm_kernels import (
    decode_attention,
    decode_linear,
    decode_qkv,
    decode_residual,
    reference,
    sample_logits,
    sample_next_token,
)


class StepOps(NamedTuple):
    """Called as those of `musiclm_kernels` are."""

    decode_qkv: Callable[..., Any]
    decode_attention: Callable[..., Any]
    decode_residual: Callable[..., Any]
    decode_linear: Callable[..., Any]
    sample_next_token: Callable[..., Any]
    sample_logits: Callable[..., Any]


KERNELS = StepOps(
    decode_qkv, decode_attention, decode_residual, decode_linear, sample_next_token, sample_logits
)
DEFINITIONS = StepOps(*(getattr(reference, name) for name in StepOps._fields))
