"""Clips of unequal length in one batch."""

import torch
from torch import Tensor


def checked_lengths(lengths: Tensor, audio: Tensor) -> Tensor:
    """The samples of each row of audio (B, time) that are audio: (B,) int64, where the audio is.

    Raises:
        ValueError: lengths that are not integers of shape (B,), or one outside [1, time]; the
            latter is a RuntimeError in compiled code, which does not wait for the values.
    """
    lengths = torch.as_tensor(lengths)
    if lengths.shape != audio.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; "
            f"want integers of shape ({audio.shape[0]},)"
        )
    outside = ((lengths < 1) | (lengths > audio.shape[1])).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~outside, f"lengths: want each in [1, {audio.shape[1]}] samples")
    elif bool(outside):
        raise ValueError(
            f"lengths are {lengths.tolist()}; want each in [1, {audio.shape[1]}] samples"
        )
    return lengths.to(audio.device, torch.int64)
