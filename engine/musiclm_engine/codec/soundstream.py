"""SoundStream on the waveform: causal convolutions around a residual vector quantiser."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.codec.codec import Codec
from musiclm_engine.codec.losses import MultiScaleMelLoss
from musiclm_engine.codec.residual_vq import ResidualVQ

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
        codebook_size: K.
        rq_num_quantizers: Q.
        sample_rate_hz: of the audio.
    """

    def __init__(
        self,
        *,
        channels: int = 32,
        strides: tuple[int, ...] = (2, 4, 5, 8),
        codebook_dim: int = 64,
        codebook_size: int = 1024,
        rq_num_quantizers: int = 8,
        sample_rate_hz: int = 16000,
    ) -> None:
        super().__init__()
        self.config = {
            "channels": channels,
            "strides": list(strides),
            "codebook_dim": codebook_dim,
            "codebook_size": codebook_size,
            "rq_num_quantizers": rq_num_quantizers,
            "sample_rate_hz": sample_rate_hz,
        }
        self.sample_rate_hz = sample_rate_hz
        self.num_quantizers = rq_num_quantizers
        self.codebook_size = codebook_size
        self.hop_length = 1
        encoder: list[nn.Module] = [CausalConv1d(1, channels, 7)]
        for stride in strides:
            encoder.append(_encoder_block(channels, stride))
            channels *= 2
            self.hop_length *= stride
        self.encoder = nn.Sequential(*encoder, nn.ELU(), CausalConv1d(channels, codebook_dim, 3))
        self.rq = ResidualVQ(codebook_dim, rq_num_quantizers, codebook_size)
        decoder: list[nn.Module] = [CausalConv1d(codebook_dim, channels, 7)]
        for stride in reversed(strides):
            decoder.append(_decoder_block(channels, stride))
            channels //= 2
        self.decoder = nn.Sequential(*decoder, nn.ELU(), CausalConv1d(channels, 1, 7))
        self.mel_loss = MultiScaleMelLoss(sample_rate_hz)

    def forward(self, audio: Tensor) -> dict[str, Tensor]:
        """The losses of audio [B, samples] without discriminators.

        Returns:
            "loss", their weighted sum; "mel", the multi-scale spectral loss of section III-D;
            "wave", L1 between waveforms; "commitment".
        """
        audio = self.pad_to_frames(audio)
        latent = self.encoder(audio[:, None]).transpose(1, 2)
        quantized, _, commitment = self.rq(latent)
        rebuilt = self.decoder(quantized.transpose(1, 2))[:, 0]
        mel = self.mel_loss(rebuilt, audio)
        wave = F.l1_loss(rebuilt, audio)
        return {
            "loss": mel + 10 * wave + commitment,
            "mel": mel,
            "wave": wave,
            "commitment": commitment,
        }

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        latent = self.encoder(self.pad_to_frames(audio)[:, None])
        return self.rq.encode(latent.transpose(1, 2))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        return self.decoder(self.rq.decode(codes).transpose(1, 2))[:, 0].clamp(-1, 1)
