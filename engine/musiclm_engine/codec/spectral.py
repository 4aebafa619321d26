"""A SoundStream over spectral magnitudes: cheap enough to train and run on a CPU.

The waveform SoundStream learns a transform that the short-time Fourier transform already is. Here
that transform is given: the encoder sees log magnitudes, the decoder paints log magnitudes, and
the phase is found afterwards. Codes therefore say what sounds, never where in its period a wave
stands, which makes them far easier for a language model to predict.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.codec.codec import Codec
from musiclm_engine.codec.phase import waveform_from_magnitude
from musiclm_engine.codec.quantizer import decode, encode, quantize, residual_vq

MAGNITUDE_FLOOR = 0.05  # 76 dB below the peak of a full-scale sine at n_fft 1280


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a two-layer perceptron (ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, dim: int, kernel_size: int = 7, expansion: int = 3) -> None:
        super().__init__()
        self.mix_time = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        mixed = self.mix_time(x.transpose(1, 2)).transpose(1, 2)
        return x + self.scale * self.contract(F.gelu(self.expand(self.norm(mixed))))


class SpectralSoundStream(Codec):
    """STFT magnitudes -> ConvNeXt -> residual VQ -> ConvNeXt -> magnitudes -> waveform.

    Args:
        dim: width of the convolutional layers.
        encoder_depth: ConvNeXt blocks before the quantiser.
        decoder_depth: ConvNeXt blocks after it: painting is harder than looking.
        paint_dim: width of a last hidden layer, before the bins: the partials of many notes on
            many instruments are more shapes than dim. None is no such layer.
        codebook_dim: D, width of the quantised vectors.
        codebook_size: K.
        rq_num_quantizers: Q.
        sample_rate_hz: of the audio.
        n_fft: samples in a frame of the STFT, a Hann window.
        stft_hop: samples between frames of the STFT.
        frames_per_code: STFT frames that one frame of codes stands for.
        phase_iterations: rounds of Griffin-Lim when decoding.
    """

    window: Tensor

    def __init__(
        self,
        *,
        dim: int = 256,
        encoder_depth: int = 2,
        decoder_depth: int = 5,
        paint_dim: int | None = None,
        codebook_dim: int = 32,
        codebook_size: int = 1024,
        rq_num_quantizers: int = 6,
        sample_rate_hz: int = 16000,
        n_fft: int = 1280,
        stft_hop: int = 320,
        frames_per_code: int = 2,
        phase_iterations: int = 16,
    ) -> None:
        super().__init__()
        self.config = {
            "dim": dim,
            "encoder_depth": encoder_depth,
            "decoder_depth": decoder_depth,
            "paint_dim": paint_dim,
            "codebook_dim": codebook_dim,
            "codebook_size": codebook_size,
            "rq_num_quantizers": rq_num_quantizers,
            "sample_rate_hz": sample_rate_hz,
            "n_fft": n_fft,
            "stft_hop": stft_hop,
            "frames_per_code": frames_per_code,
            "phase_iterations": phase_iterations,
        }
        self.sample_rate_hz = sample_rate_hz
        self.hop_length = stft_hop * frames_per_code
        self.num_quantizers = rq_num_quantizers
        self.codebook_size = codebook_size
        self.n_fft = n_fft
        self.stft_hop = stft_hop
        self.frames_per_code = frames_per_code
        self.phase_iterations = phase_iterations
        bins = n_fft // 2 + 1
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.encoder = nn.Sequential(
            nn.Linear(bins, dim),
            nn.LayerNorm(dim),
            *(ConvNeXtBlock(dim) for _ in range(encoder_depth)),
        )
        self.to_latent = nn.Linear(dim * frames_per_code, codebook_dim)
        self.rq = residual_vq(codebook_dim, rq_num_quantizers, codebook_size)
        self.from_latent = nn.Linear(codebook_dim, dim * frames_per_code)
        hidden = [] if paint_dim is None else [nn.Linear(dim, paint_dim), nn.GELU()]
        self.decoder = nn.Sequential(
            *(ConvNeXtBlock(dim) for _ in range(decoder_depth)),
            nn.LayerNorm(dim),
            *hidden,
            nn.Linear(dim if paint_dim is None else paint_dim, bins),
        )

    def forward(self, audio: Tensor) -> dict[str, Tensor]:
        """The training losses of audio [B, samples].

        Returns:
            "loss", their weighted sum; "spectrum", L1 between log magnitudes; "loud", L1 between
            magnitudes to the power 0.3, which weighs what is heard more than the floor;
            "convergence", the relative error of magnitudes (arXiv 1808.06719, section 3), which
            weighs the peaks most; "commitment", of the encoder to its codes (VQ-VAE,
            arXiv 1711.00937).
        """
        return self.rebuild(audio)[2]

    def rebuild(self, audio: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log magnitudes of audio [B, samples] as they are painted and as they are, [B, T, bins],
        and `forward`'s losses between them."""
        target = self._log_magnitude(self.pad_to_frames(audio))
        quantized, commitment = quantize(self.rq, self._to_latent(target))
        painted = self._paint(quantized)
        spectrum = F.l1_loss(painted, target)
        loud = F.l1_loss((0.3 * painted).exp(), (0.3 * target).exp())
        error = (painted.float().exp() - target.exp()).flatten(1).norm(dim=1)
        convergence = (error / target.exp().flatten(1).norm(dim=1)).mean()
        loss = spectrum + loud + 0.5 * convergence + 0.25 * commitment
        losses = {
            "loss": loss,
            "spectrum": spectrum,
            "loud": loud,
            "convergence": convergence,
            "commitment": commitment,
        }
        return painted, target, losses

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        return encode(self.rq, self.latent(audio))

    @torch.no_grad()
    def latent(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> the vectors [B, T, D] that `encode` quantises."""
        return self._to_latent(self._log_magnitude(self.pad_to_frames(audio)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        log_magnitude = self._paint(decode(self.rq, codes, self.num_quantizers))
        magnitude = (log_magnitude.exp() - MAGNITUDE_FLOOR).clamp_min(0).transpose(1, 2)
        # A centred STFT of n whole hops has n + 1 frames: the last is painted twice.
        magnitude = torch.cat([magnitude, magnitude[:, :, -1:]], dim=2)
        return waveform_from_magnitude(
            magnitude, self.window, self.stft_hop, num_iterations=self.phase_iterations
        ).clamp(-1, 1)

    def _log_magnitude(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> [B, samples / stft_hop, bins]."""
        spectrum = torch.stft(
            audio,
            self.n_fft,
            self.stft_hop,
            window=self.window,
            return_complex=True,
            pad_mode="constant",
        )
        return (spectrum.abs()[:, :, :-1] + MAGNITUDE_FLOOR).log().transpose(1, 2)

    def _to_latent(self, log_magnitude: Tensor) -> Tensor:
        hidden = self.encoder(log_magnitude)
        return self.to_latent(rearrange(hidden, "b (t s) d -> b t (s d)", s=self.frames_per_code))

    def _paint(self, latent: Tensor) -> Tensor:
        hidden = rearrange(
            self.from_latent(latent), "b t (s d) -> b (t s) d", s=self.frames_per_code
        )
        return self.decoder(hidden)
