"""Swin Transformer V2's attention within windows."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_engine.attention.log_spaced_position import LogSpacedPositionBias
from musiclm_engine.attention.position_bias import PositionBias, dense_position_bias
from musiclm_kernels import biased_attention, qk_l2norm

MAX_LOGIT_SCALE = 100.0  # arXiv 2111.09883, section 3.3: tau is at least 0.01
MAX_REGIONS = 4  # of a shifted window: it is cut at most once along each side


class WindowAttention(nn.Module):
    """Cosine attention within windows, a learned temperature a head, log-spaced position bias.

    Drop-in for `WindowAttention` of timm 1.0 (models/swin_transformer_v2.py): constructor,
    state-dict keys and numbers (arXiv 2111.09883, section 3.3). timm keeps no tables in its
    checkpoints; those of Swin's first publication have to lose `relative_coords_table` and
    `relative_position_index`, as in timm's own loader.

    Args:
        dim: width C of the input, a multiple of `num_heads`.
        window_size: height and width of a window in tokens.
        num_heads: H.
        qkv_bias: whether queries and values have a learned bias.
        qkv_bias_separate: without effect: timm's two ways to add that bias are the same sum.
        attn_drop: dropout of the attention's probabilities.
        proj_drop: dropout of the output.
        pretrained_window_size: height and width that the weights were trained for; 0 is
            `window_size`.
        device, dtype: of the weights.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        qkv_bias_separate: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: int | tuple[int, int] = (0, 0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        self.window_size = window_size
        self.pretrained_window_size = _pair(pretrained_window_size)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.logit_scale = nn.Parameter(
            torch.full((num_heads, 1, 1), math.log(10), device=device, dtype=dtype)
        )
        self.cpb_mlp = LogSpacedPositionBias(num_heads, device, dtype)
        self.qkv = nn.Linear(dim, dim * 3, bias=False, device=device, dtype=dtype)
        self.q_bias = self.v_bias = None
        if qkv_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
            self.v_bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Windows of another height and width from now on."""
        self.window_size = _pair(window_size)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, regions: Tensor | None = None
    ) -> Tensor:
        """x [num_windows * B, N, C] -> the same; windows of one image stand together.

        Args:
            x: N = height * width tokens of a window, row by row.
            mask: [num_windows, N, N], added to the scores: any values, exactly, but H times its size
                is held.
            regions: [num_windows, N] integers in [0, 4), see `shifted_window_regions`: the mask of
                shifted windows, -100 between two regions, without a value for every pair.

        Raises:
            ValueError: x, mask or regions of another shape, or both of the last two.
        """
        num_tokens = self.window_size[0] * self.window_size[1]
        if x.ndim != 3 or x.shape[1] != num_tokens:
            raise ValueError(f"x has shape {tuple(x.shape)}; want (B, {num_tokens}, C)")
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = rearrange(
            F.linear(x, self.qkv.weight, bias),
            "b n (three h d) -> three b h n d",
            three=3,
            h=self.num_heads,
        )
        temperature = self.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
        width = q.shape[-1]
        q, k = qk_l2norm(q, k, temperature[:, 0].repeat(1, width), temperature.new_ones(width))
        out = biased_attention(
            q,
            k,
            v,
            **self._bias(len(x), mask, regions).arguments(),
            scale=1.0,
            dropout=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))

    def _bias(self, B: int, mask: Tensor | None, regions: Tensor | None) -> PositionBias:
        position = self.cpb_mlp.position_bias(self.window_size, self.pretrained_window_size)
        N = self.window_size[0] * self.window_size[1]
        if mask is not None:
            if regions is not None:
                raise ValueError("mask and regions are given; want one of them")
            num_windows = _num_windows("mask", mask, (N, N), B)
            pairs = position.dense() + mask[:, None]
            like = (num_windows, self.num_heads, N, N)
            return dense_position_bias(pairs, like, "mask").repeated(B // num_windows)
        if regions is not None:
            num_windows = _num_windows("regions", regions, (N,), B)
            return position.within_regions(regions, MAX_REGIONS).repeated(B // num_windows)
        return position


def shifted_window_regions(
    size: tuple[int, int],
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    device: torch.device | None = None,
) -> Tensor:
    """Which tokens of a shifted window lay together before the shift: int64 [num_windows, N].

    An image of `size` is rolled by `shift_size`, so its last windows hold tokens from both of its
    ends; only those of one region may attend to each other (Swin Transformer, arXiv 2103.14030,
    section 3.2).

    Args:
        size: height and width of the image in tokens, multiples of the window's.
        window_size: height and width of a window.
        shift_size: tokens that the image is rolled by, up and to the left; 0 for none.

    Raises:
        ValueError: a size that is not a multiple, or a shift outside [0, window_size).
    """
    sides = []
    for side, window, shift in zip(size, window_size, shift_size, strict=True):
        if side % window or not 0 <= shift < window:
            raise ValueError(
                f"size={size}, window_size={window_size}, shift_size={shift_size}; want a multiple "
                "of the window, and a shift of at least 0 and less than it"
            )
        sides.append((torch.arange(side, device=device) >= side - shift).long())
    regions = 2 * sides[0][:, None] + sides[1]
    high, wide = window_size
    return rearrange(regions, "(a h) (b w) -> (a b) (h w)", h=high, w=wide)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _num_windows(name: str, given: Tensor, of_a_window: tuple[int, ...], B: int) -> int:
    if given.shape[1:] != of_a_window or given.shape[0] == 0 or B % given.shape[0]:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}; want (num_windows, "
            f"{', '.join(map(str, of_a_window))}) with num_windows a divisor of {B}"
        )
    return given.shape[0]
