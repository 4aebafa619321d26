"""Where a token stands: its moment and its level, and the attention bias between two of them."""

import torch
from torch import Tensor, nn

OUTSIDE_TIME = -(1 << 24)  # the key code of a token that has no moment: every query is far past it

# A bias is in nats, where weights are of the size of .05: it moves as many times faster than they.
GAIN = 20.0
STEEPEST = 2.0  # of the slopes that heads begin with, nats for each e-fold of distance


class TimeLevelBias(nn.Module):
    """A learned relative bias over time and over token level.

    A frame of audio is several tokens: a semantic one, then one for each quantiser. So the bias of
    a pair depends on how far apart in time they stand and on which levels they belong to:

        code = moment * (2 L - 1) + level,   bias[h, i, j] = table[h, code_i - code_j + offset]

    Every difference has an entry of its own. Buckets that widen with the distance, as T5's do (arXiv
    1910.10683, section 2.1), tell 16 frames from 19 but not from 17, and a beat is 10 to 30 frames:
    nothing keeps a tempo that cannot count it. Entries begin at -slope ln(1 + |moments|), the
    logarithmic kernel of KERPLE (arXiv 2205.09921), with a slope a head from 2 down to 0: at zero all
    tokens would be a bag without order, for there is no other position. The table's last entry is
    the bias towards tokens outside time (conditioning and start tokens).

    Args:
        heads: H.
        num_levels: L.
        max_moments: that a sequence may span; the table has an entry for each difference.
    """

    def __init__(self, heads: int, num_levels: int, max_moments: int) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.max_moments = max_moments
        self.offset = max_moments * (2 * num_levels - 1) + num_levels - 1
        slope = torch.linspace(STEEPEST, 0, heads)
        distance = torch.arange(-max_moments, max_moments + 1).abs()
        far = -slope[:, None] * distance.log1p() / GAIN
        self.relative_attention_bias = nn.Parameter(
            far[:, :, None].repeat(1, 1, 2 * num_levels - 1)
        )
        self.outside_bias = nn.Parameter(torch.zeros(heads, 1))

    def code(self, moment: Tensor, level: Tensor | int) -> Tensor:
        """int32 codes of tokens at these moments and levels."""
        return (moment * (2 * self.num_levels - 1) + level).to(torch.int32)

    def table(self) -> Tensor:
        """[H, (2 max_moments + 1) (2 L - 1) + 1] float32, in nats."""
        timed = self.relative_attention_bias.flatten(1)
        return GAIN * torch.cat([timed, self.outside_bias], dim=1).float()
