"""SoundStream on the waveform: causal convolutions around a residual vector quantiser."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.codec.codec import Codec
from musiclm_engine.codec.losses import MultiScaleMelLoss
from musiclm_engine.codec.quantizer import (
    decode,
    encode,
    of_vector_quantize_pytorch,
    quantize,
    residual_vq,
)

DILATIONS = (1, 3, 9)  # of the residual units in a block (section III-A)


class CausalConv1d(nn.Conv1d):
    """A convolution whose output at t sees inputs up to t."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T / stride]."""
        past = self.dilation[0] * (self.kernel_size[0] - 1) - (self.stride[0] - 1)
        return super().forward(F.pad(x, (past, 0)))


class CausalConvTranspose1d(nn.ConvTranspose1d):
    """Its mirror: [B, C, T] -> [B, C', T * stride]."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x)[:, :, : x.shape[2] * self.stride[0]]


class ResidualUnit(nn.Module):
    """x + a dilated convolution and a pointwise one."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilated = CausalConv1d(channels, channels, 7, dilation=dilation)
        self.pointwise = CausalConv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(F.elu(self.dilated(F.elu(x))))


def _encoder_block(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *(ResidualUnit(channels, dilation) for dilation in DILATIONS),
        nn.ELU(),
        CausalConv1d(channels, 2 * channels, 2 * stride, stride=stride),
    )


def _decoder_block(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ELU(),
        CausalConvTranspose1d(channels, channels // 2, 2 * stride, stride=stride),
        *(ResidualUnit(channels // 2, dilation) for dilation in DILATIONS),
    )


class SoundStream(Codec):
    """Encoder, residual VQ and decoder of SoundStream (arXiv 2107.03312, section III).

    Args:
        channels: C, of the first layer; each block doubles them.
        strides: of the encoder's blocks; their product is the samples a frame of codes lasts.
        codebook_dim: D, width of the quantised vectors.
        codebook_size: K; 1024 if None, but for finite scalars the product of their levels.
        rq_num_quantizers: Q.
        rq_groups: G, residual quantisers side by side, each of codebook_dim / G dimensions; then a
            frame has Q * G codes, the coarse levels of all groups first.
        use_finite_scalar_quantizer: round to finite scalars, with the package
            vector-quantize-pytorch; takes finite_scalar_quantizer_levels and no codebook_size.
        finite_scalar_quantizer_levels: of each scalar.
        use_lookup_free_quantizer: quantise by signs, with the package vector-quantize-pytorch.
        sample_rate_hz: of the audio.

    Raises:
        ValueError: options that exclude each other, or a size out of range.
        ImportError: the package for finite scalars or signs is not installed.
    """

    def __init__(
        self,
        *,
        channels: int = 32,
        strides: tuple[int, ...] = (2, 4, 5, 8),
        codebook_dim: int = 64,
        codebook_size: int | None = None,
        rq_num_quantizers: int = 8,
        rq_groups: int = 1,
        use_finite_scalar_quantizer: bool = False,
        finite_scalar_quantizer_levels: tuple[int, ...] | None = None,
        use_lookup_free_quantizer: bool = False,
        sample_rate_hz: int = 16000,
    ) -> None:
        super().__init__()
        self.config = {
            "channels": channels,
            "strides": list(strides),
            "codebook_dim": codebook_dim,
            "codebook_size": codebook_size,
            "rq_num_quantizers": rq_num_quantizers,
            "rq_groups": rq_groups,
            "use_finite_scalar_quantizer": use_finite_scalar_quantizer,
            "finite_scalar_quantizer_levels": finite_scalar_quantizer_levels,
            "use_lookup_free_quantizer": use_lookup_free_quantizer,
            "sample_rate_hz": sample_rate_hz,
        }
        self.sample_rate_hz = sample_rate_hz
        self.num_quantizers = rq_num_quantizers * rq_groups
        self.hop_length = 1
        encoder: list[nn.Module] = [CausalConv1d(1, channels, 7)]
        for stride in strides:
            encoder.append(_encoder_block(channels, stride))
            channels *= 2
            self.hop_length *= stride
        self.encoder = nn.Sequential(*encoder, nn.ELU(), CausalConv1d(channels, codebook_dim, 3))
        if use_finite_scalar_quantizer and use_lookup_free_quantizer:
            raise ValueError(
                "use_finite_scalar_quantizer and use_lookup_free_quantizer are both set, "
                "wanted one at most"
            )
        levels = finite_scalar_quantizer_levels
        if use_finite_scalar_quantizer != (levels is not None):
            raise ValueError(
                f"finite_scalar_quantizer_levels is {levels}, wanted with "
                "use_finite_scalar_quantizer, and only then"
            )
        if levels is None:
            self.codebook_size = 1024 if codebook_size is None else codebook_size
        elif codebook_size is None:
            self.codebook_size = math.prod(levels)
        else:
            raise ValueError(
                f"codebook_size is {codebook_size}, wanted None: finite_scalar_quantizer_levels "
                "say it"
            )
        sizes = {"dim": codebook_dim, "num_quantizers": rq_num_quantizers, "groups": rq_groups}
        if levels is not None:
            self.rq = of_vector_quantize_pytorch("GroupedResidualFSQ", levels=levels, **sizes)
        elif use_lookup_free_quantizer:
            self.rq = of_vector_quantize_pytorch(
                "GroupedResidualLFQ", codebook_size=self.codebook_size, **sizes
            )
        else:
            self.rq = residual_vq(codebook_size=self.codebook_size, **sizes)
        decoder: list[nn.Module] = [CausalConv1d(codebook_dim, channels, 7)]
        for stride in reversed(strides):
            decoder.append(_decoder_block(channels, stride))
            channels //= 2
        self.decoder = nn.Sequential(*decoder, nn.ELU(), CausalConv1d(channels, 1, 7))
        self.mel_loss = MultiScaleMelLoss(sample_rate_hz)

    def forward(self, audio: Tensor) -> dict[str, Tensor]:
        """The losses of audio [B, samples] without discriminators.

        Returns:
            "loss", their weighted sum; "mel", the multi-scale spectral loss of section III-E;
            "wave", L1 between waveforms; "commitment".
        """
        return self.rebuild(audio)[2]

    def rebuild(self, audio: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """audio [B, samples] as it is rebuilt and as it was, [B, whole frames], and `forward`'s
        losses between them."""
        audio = self.pad_to_frames(audio)
        latent = self.encoder(audio[:, None]).transpose(1, 2)
        quantized, commitment = quantize(self.rq, latent)
        hidden = self.decoder[:-1](quantized.transpose(1, 2))
        # Rounded to bfloat16, audio hisses 54 dB below itself, which a discriminator would learn.
        with torch.autocast(audio.device.type, enabled=False):
            rebuilt = self.decoder[-1](hidden.float())[:, 0]
        mel = self.mel_loss(rebuilt, audio)
        wave = F.l1_loss(rebuilt, audio)
        losses = {
            "loss": mel + 10 * wave + commitment,
            "mel": mel,
            "wave": wave,
            "commitment": commitment,
        }
        return rebuilt, audio, losses

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        latent = self.encoder(self.pad_to_frames(audio)[:, None])
        return encode(self.rq, latent.transpose(1, 2))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        latent = decode(self.rq, codes, self.num_quantizers)
        return self.decoder(latent.transpose(1, 2))[:, 0].clamp(-1, 1)
