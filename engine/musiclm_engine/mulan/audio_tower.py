"""MuLaN's audio tower: a transformer over patches of the log-mel spectrogram."""

from typing import Any

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from musiclm_engine.attention import DynamicPositionBias2d
from musiclm_engine.attention.layer_norm import LayerNorm
from musiclm_engine.audio import LogMel
from musiclm_engine.mulan.lengths import checked_lengths
from musiclm_engine.mulan.patch_position import sincos_positions
from musiclm_engine.mulan.spec_augment import mask_spans
from musiclm_engine.mulan.transformer import Transformer
from musiclm_kernels import drop_patches


class AudioSpectrogramTransformer(nn.Module):
    """Audio of any length -> one embedding: log-mel, patches, transformer, mean pool, norm.

    AST (Gong et al., arXiv 2104.01778) as MuLan's audio tower (arXiv 2208.12415, section 4.1),
    with non-overlapping patches, dual patch norm (arXiv 2302.01327), patch dropout in training
    (arXiv 2208.07220), 2-D dynamic position bias and normalised queries and keys (Swin V2,
    arXiv 2111.09883). The bias is one table a forward pass, shared by all layers.

    Args:
        dim: width D, a multiple of 4, at least 8.
        depth: number of blocks.
        patch_size: side of a patch, in mel bins and in frames; must divide `num_mels`.
        dim_head, heads: of the attention.
        attn_dropout: dropout of the attention's probabilities, and again of its output.
        ff_mult, ff_dropout: of the feed-forward.
        sample_rate_hz, num_mels, hop_ms, window_ms: of the log-mel front end (`LogMel`).
        patch_dropout_prob: share of patches dropped in training, in [0, 1).
        spec_aug_freq_mask: in training, up to this many neighbouring mel bins are masked.
        spec_aug_time_mask: in training, up to this many neighbouring frames are masked (and never
            more than half of the clip). SpecAugment, arXiv 1904.08779; 0 turns a mask off.

    Raises:
        ValueError: a width, patch size or probability outside the limits above.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        patch_size: int = 16,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
        sample_rate_hz: int = 16000,
        num_mels: int = 64,
        hop_ms: float = 10.0,
        window_ms: float = 25.0,
        patch_dropout_prob: float = 0.25,
        spec_aug_freq_mask: int = 8,
        spec_aug_time_mask: int = 40,
    ):
        super().__init__()
        if dim < 8 or dim % 4:
            raise ValueError(f"dim={dim}; want a multiple of 4, at least 8 (2-D sine positions)")
        if depth < 1:
            raise ValueError(f"depth={depth}; want at least 1")
        if patch_size < 1 or num_mels % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide num_mels={num_mels}")
        if not 0 <= patch_dropout_prob < 1:
            raise ValueError(f"patch_dropout_prob={patch_dropout_prob}; want 0 <= p < 1")
        if not 0 <= spec_aug_freq_mask <= num_mels or spec_aug_time_mask < 0:
            raise ValueError(
                f"spec_aug_freq_mask={spec_aug_freq_mask} must be in [0, {num_mels}] and "
                f"spec_aug_time_mask={spec_aug_time_mask} at least 0"
            )
        self._config = {
            "dim": dim,
            "depth": depth,
            "patch_size": patch_size,
            "dim_head": dim_head,
            "heads": heads,
            "attn_dropout": attn_dropout,
            "ff_mult": ff_mult,
            "ff_dropout": ff_dropout,
            "sample_rate_hz": sample_rate_hz,
            "num_mels": num_mels,
            "hop_ms": hop_ms,
            "window_ms": window_ms,
            "patch_dropout_prob": patch_dropout_prob,
            "spec_aug_freq_mask": spec_aug_freq_mask,
            "spec_aug_time_mask": spec_aug_time_mask,
        }
        self.dim = dim
        self.sample_rate_hz = sample_rate_hz
        self.patch_size = patch_size
        self.num_rows = num_mels // patch_size
        self.patch_dropout_prob = patch_dropout_prob
        self.spec_aug_freq_mask = spec_aug_freq_mask
        self.spec_aug_time_mask = spec_aug_time_mask

        self.log_mel = LogMel(sample_rate_hz, num_mels=num_mels, hop_ms=hop_ms, window_ms=window_ms)
        self.patch_samples = patch_size * self.log_mel.hop_samples  # one column of patches
        self.to_patch_tokens = nn.Sequential(
            Rearrange(
                "b (w frame) (h bin) -> b (w h) (bin frame)", frame=patch_size, bin=patch_size
            ),
            nn.LayerNorm(patch_size**2),
            nn.Linear(patch_size**2, dim),
            nn.LayerNorm(dim),
        )
        self.dynamic_pos_bias_mlp = DynamicPositionBias2d(max(8, dim // 4), heads)
        self.transformer = Transformer(
            dim,
            depth,
            dim_head=dim_head,
            heads=heads,
            attn_dropout=attn_dropout,
            ff_mult=ff_mult,
            ff_dropout=ff_dropout,
        )
        self.norm = LayerNorm(dim)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AudioSpectrogramTransformer":
        """A tower of this shape with random weights."""
        return cls(**config)

    def forward(
        self,
        audio: Tensor,
        *,
        lengths: Tensor | None = None,
        patch_dropout_seed: int | None = None,
    ) -> Tensor:
        """Embeds audio.

        The end of a clip is filled up with silence to a whole number of patches. A row embeds as
        it would alone: what lies beyond its length is neither heard nor attended to.

        Args:
            audio: (B, time), floating point, in [-1, 1], at `sample_rate_hz`.
            lengths: (B,) integers, samples of each row that are audio; None is all of them.
            patch_dropout_seed: chooses the patches kept in training; None draws a seed from
                torch's generator. Without effect in `eval()`.

        Returns:
            (B, dim); not l2-normalised.

        Raises:
            ValueError: audio that is not (B, time) or is empty, or lengths of another shape or
                outside [1, time].
        """
        if audio.ndim != 2 or not audio.is_floating_point() or audio.numel() == 0:
            raise ValueError(
                f"audio is {audio.dtype} of shape {tuple(audio.shape)}; "
                "want floating point (B, time), not empty"
            )
        if lengths is not None:
            lengths = checked_lengths(lengths, audio)
            samples = torch.arange(audio.shape[1], device=audio.device)
            audio = audio.masked_fill(samples >= lengths[:, None], 0)
        num_columns = -(-audio.shape[1] // self.patch_samples)
        audio = F.pad(audio, (0, num_columns * self.patch_samples - audio.shape[1]))

        spectrogram = self.log_mel(audio)  # [B, frames, F]
        if self.training:
            spectrogram = self._augment(spectrogram, lengths)
        x = self.to_patch_tokens(spectrogram.to(self.to_patch_tokens[2].weight.dtype))
        x = x + sincos_positions(num_columns, self.num_rows, self.dim, x.device).to(x.dtype)
        position_bias = self.dynamic_pos_bias_mlp.position_bias(num_columns, self.num_rows)
        mask = None if lengths is None else self._patch_mask(lengths, num_columns)

        keep = max(1, round(x.shape[1] * (1 - self.patch_dropout_prob)))
        if self.training and keep < x.shape[1]:
            if patch_dropout_seed is None:
                patch_dropout_seed = int(torch.randint(2**31 - 1, ()))
            x, indices, mask = _drop(x, mask, keep, patch_dropout_seed)
            position_bias = position_bias.kept(indices)

        x = self.transformer(x, position_bias=position_bias, key_mask=mask)
        return self.norm(_mean(x, mask))

    def _augment(self, spectrogram: Tensor, lengths: Tensor | None) -> Tensor:
        frames = torch.full_like(spectrogram[:, 0, 0], spectrogram.shape[1])
        if lengths is not None:
            frames = (lengths / self.log_mel.hop_samples).ceil()
        spectrogram = mask_spans(spectrogram, 1, self.spec_aug_time_mask, frames)
        bins = torch.full_like(frames, spectrogram.shape[2])
        return mask_spans(spectrogram, 2, self.spec_aug_freq_mask, bins)

    def _patch_mask(self, lengths: Tensor, num_columns: int) -> Tensor:
        """bool [B, N], true where a patch holds any of the row's audio."""
        columns = torch.arange(num_columns, device=lengths.device)
        heard = columns * self.patch_samples < lengths[:, None]
        return heard.repeat_interleave(self.num_rows, dim=1)


def _drop(
    x: Tensor, mask: Tensor | None, keep: int, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The patches that stay [B, keep, D], their indices [B, keep] and their mask."""
    kept, indices = drop_patches(x, keep, seed=seed)
    if mask is not None:
        # A short row may lose all its audio: it then keeps its first patch, which always has some.
        silent = ~mask.gather(1, indices).any(dim=1)
        first = torch.where(silent[:, None], x[:, 0], kept[:, 0])
        kept = torch.cat((first[:, None], kept[:, 1:]), dim=1)
        indices = torch.cat((indices[:, :1].masked_fill(silent[:, None], 0), indices[:, 1:]), dim=1)
        mask = mask.gather(1, indices)
    return kept, indices, mask


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(dim=1)
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(dim=1) / weights.sum(dim=1)
