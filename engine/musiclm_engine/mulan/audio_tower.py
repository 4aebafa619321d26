"""MuLaN's audio tower: a transformer over patches of the log-mel spectrogram."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from musiclm_engine.attention import DynamicPositionBias2d
from musiclm_engine.attention.layer_norm import LayerNorm
from musiclm_engine.audio import LogMel, SpecAugment
from musiclm_engine.mulan.lengths import checked_lengths
from musiclm_engine.mulan.transformer import Transformer
from musiclm_kernels import embed_patches


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
        spec_aug_stretch_factor, spec_aug_freq_mask, spec_aug_time_mask: of `SpecAugment`, in
            training. A stretch changes the tempo: 1 turns it off.

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
        num_mels: int = 128,
        hop_ms: float = 10.0,
        window_ms: float = 25.0,
        patch_dropout_prob: float = 0.25,
        spec_aug_stretch_factor: float = 0.8,
        spec_aug_freq_mask: int = 48,
        spec_aug_time_mask: int = 192,
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
            "spec_aug_stretch_factor": spec_aug_stretch_factor,
            "spec_aug_freq_mask": spec_aug_freq_mask,
            "spec_aug_time_mask": spec_aug_time_mask,
        }
        self.dim = dim
        self.depth = depth
        self.sample_rate_hz = sample_rate_hz
        self.patch_size = patch_size
        self.num_rows = num_mels // patch_size
        self.patch_dropout_prob = patch_dropout_prob

        self.log_mel = LogMel(sample_rate_hz, num_mels=num_mels, hop_ms=hop_ms, window_ms=window_ms)
        self.spec_augment = SpecAugment(
            stretch_factor=spec_aug_stretch_factor,
            freq_mask=spec_aug_freq_mask,
            time_mask=spec_aug_time_mask,
            floor=self.log_mel.floor,
        )
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
        patch_dropout_seed: int | Tensor | None = None,
        return_all_layers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embeds audio.

        The end of a clip is filled up with silence to a whole number of patches. A row embeds as
        it would alone: what lies beyond its length is neither heard nor attended to.

        Args:
            audio: (B, time), floating point, in [-1, 1], at `sample_rate_hz`.
            lengths: (B,) integers, samples of each row that are audio; None is all of them.
            patch_dropout_seed: chooses the patches kept in training, an int or int64 [] where
                audio is; None draws it there, from torch's generator. Without effect in `eval()`.
            return_all_layers: give the mean of each block's output, too, over the patches heard.

        Returns:
            (B, dim); not l2-normalised. With `return_all_layers` also (depth, B, dim), the last
            block's last, before the final norm.

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
        num_frames = None if lengths is None else -(-lengths // self.log_mel.hop_samples)
        spectrogram, num_frames = self.spec_augment(spectrogram, num_frames)
        num_patches = num_columns * self.num_rows
        keep = max(1, round(num_patches * (1 - self.patch_dropout_prob)))
        keep = keep if self.training else num_patches
        x, codes, heard = self._embed(spectrogram, num_frames, keep, patch_dropout_seed)
        position_bias = self.dynamic_pos_bias_mlp.position_bias(num_columns, self.num_rows)
        if keep < num_patches:
            position_bias = replace(position_bias, q_codes=codes, k_codes=codes)
        mask = None if num_frames is None else heard

        outputs = self.transformer(
            x, position_bias=position_bias, key_mask=mask, return_all_layers=return_all_layers
        )
        if not return_all_layers:
            return self.norm(_mean(outputs, mask))
        layers = torch.stack([_mean(x, mask) for x in outputs])
        return self.norm(layers[-1]), layers

    def _embed(
        self, spectrogram: Tensor, num_frames: Tensor | None, keep: int, seed: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of `keep` patches of a row, or fewer of a short one: [B, keep, dim], their codes
        and their mask [B, keep]."""
        weights = dict(self.to_patch_tokens.named_parameters())
        num_valid = None
        if num_frames is not None:  # patches that hold any of the row's frames: whole columns
            num_valid = -(-num_frames // self.patch_size) * self.num_rows
        if seed is None and self.training:
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=spectrogram.device)
        tokens, _, codes, mask = embed_patches(
            spectrogram.to(torch.promote_types(spectrogram.dtype, weights["2.weight"].dtype)),
            patch_size=self.patch_size,
            patch_norm_weight=weights["1.weight"],
            patch_norm_bias=weights["1.bias"],
            weight=weights["2.weight"],
            bias=weights["2.bias"],
            norm_weight=weights["3.weight"],
            norm_bias=weights["3.bias"],
            keep=keep,
            seed=seed,
            num_valid=num_valid,
        )
        # Under autocast the tokens are narrow; the sum that the layers add to stays wide.
        return tokens.to(weights["3.weight"].dtype), codes, mask


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(dim=1)
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(dim=1) / weights.sum(dim=1)
