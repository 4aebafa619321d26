"""Where a token stands: its moment and its level, and the attention bias between two of them."""

import torch
from torch import Tensor, nn

from musiclm_engine.attention import t5_bucket

OUTSIDE_TIME = -(1 << 24)  # the key code of a token that has no moment: every query is far past it


class TimeLevelBias(nn.Module):
    """T5's bucketed relative bias (arXiv 1910.10683, section 2.1) over time and over token level.

    A frame of audio is several tokens: a semantic one, then one for each quantiser. So the bias of
    a pair depends on how far apart in time they stand and on which levels they belong to:

        code = moment * (2 L - 1) + level,   bias[h, i, j] = table[h, code_i - code_j + offset]

    Nearby moments have a bucket each, farther ones share logarithmic buckets. The table's last
    entry is the bias towards tokens outside time (conditioning and start tokens).

    Args:
        heads: H.
        num_levels: L.
        max_frames: moments that a sequence may span; the table has an entry for each difference.
        num_buckets: of time differences, both directions together.
        max_distance: frames at which the logarithmic buckets end.
    """

    bucket: Tensor
    level_difference: Tensor

    def __init__(
        self,
        heads: int,
        num_levels: int,
        max_frames: int,
        *,
        num_buckets: int = 64,
        max_distance: int = 256,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.max_frames = max_frames
        self.offset = max_frames * (2 * num_levels - 1)
        self.relative_attention_bias = nn.Parameter(
            torch.zeros(heads, num_buckets, 2 * num_levels - 1)
        )
        self.outside_bias = nn.Parameter(torch.zeros(heads, 1))
        difference = torch.arange(-self.offset, self.offset + 1)
        level = (difference + num_levels - 1) % (2 * num_levels - 1)  # shifted to start at 0
        frames = (difference - (level - num_levels + 1)) // (2 * num_levels - 1)
        bucket = t5_bucket(frames, num_buckets=num_buckets, max_distance=max_distance)
        self.register_buffer("bucket", bucket, persistent=False)
        self.register_buffer("level_difference", level, persistent=False)

    def code(self, moment: Tensor, level: Tensor | int) -> Tensor:
        """int32 codes of tokens at these moments (frames) and levels."""
        return (moment * (2 * self.num_levels - 1) + level).to(torch.int32)

    def table(self) -> Tensor:
        """[H, 2 * offset + 2] float32."""
        timed = self.relative_attention_bias[:, self.bucket, self.level_difference]
        return torch.cat([timed, self.outside_bias], dim=1).float()
