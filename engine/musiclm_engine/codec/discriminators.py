"""Discriminators of audio and of spectrograms, for adversarial training of codecs.

Those of audio are SoundStream's (arXiv 2107.03312, section III-D). Those of spectrograms stand in
for them where a codec paints magnitudes and a phase is found afterwards, by an algorithm that
passes no useful gradient.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from musiclm_engine.codec.adversarial_losses import Verdict

LEAK = 0.2  # slope of rectifiers below zero (MelGAN, arXiv 1910.06711)


class WaveDiscriminator(nn.Module):
    """One scale of MelGAN's discriminator (arXiv 1910.06711, appendix A): a logit for 256 samples.

    A plain convolution, four grouped ones (each group of 4 channels, a quarter of the rate and
    four times the channels, up to max_channels), and two plain ones; weights are normalised.
    """

    def __init__(self, channels: int = 16, max_channels: int = 1024) -> None:
        super().__init__()
        if channels < 4 or channels % 4 or max_channels < channels or max_channels % 4:
            raise ValueError(
                f"channels is {channels} and max_channels {max_channels}, "
                "wanted multiples of 4, the second not the smaller"
            )
        layers = [nn.Conv1d(1, channels, 15, padding=7)]
        for _ in range(4):
            wider = min(4 * channels, max_channels)
            layers.append(
                nn.Conv1d(channels, wider, 41, stride=4, padding=20, groups=channels // 4)
            )
            channels = wider
        layers.append(nn.Conv1d(channels, channels, 5, padding=2))
        self.layers = nn.ModuleList(map(weight_norm, layers))
        self.judge = weight_norm(nn.Conv1d(channels, 1, 3, padding=1))

    def forward(self, audio: Tensor) -> Verdict:
        """audio [B, samples] -> logits [B, ceil(samples / 256)]."""
        return _judge(audio[:, None], self.layers, self.judge)


class STFTBlock(nn.Module):
    """A residual block that halves frequency, or time and frequency (figure 4)."""

    def __init__(self, channels: int, widen: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        # Padding before by 1 and behind by the stride leaves ceil(size / stride), as the shortcut.
        self.padding = (1, stride[1], 1, stride[0])
        kernel = (stride[0] + 2, stride[1] + 2)
        self.mix = weight_norm(nn.Conv2d(channels, channels, 3, padding=1))
        self.shrink = weight_norm(nn.Conv2d(channels, widen * channels, kernel, stride=stride))
        self.shortcut = weight_norm(nn.Conv2d(channels, widen * channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, F] -> [B, widen * C, T / stride, F / stride], rounded up."""
        mixed = F.leaky_relu(self.mix(x), LEAK)
        # A 1 x 1 convolution with strides writes past its memory on a CPU where channels lie last,
        # as they do here (oneDNN in torch 2.13): the strides are taken before it.
        kept = x[:, :, :: self.stride[0], :: self.stride[1]]
        return self.shortcut(kept) + self.shrink(F.pad(mixed, self.padding))


class STFTDiscriminator(nn.Module):
    """SoundStream's discriminator of the complex STFT (section III-D): a logit for 8 frames.

    Windows of 1024 samples, 256 apart; the bin of half the sample rate is left out, so that the
    512 others halve six times. The transform runs in float32, also under autocast, and is scaled
    by 1 / sqrt(1024) to be about as loud as the audio. The paper names no activation and no
    normalisation; these are those of the discriminators of the waveform.
    """

    WINDOW = 1024
    HOP = 256
    BLOCKS = ((2, (1, 2)), (2, (2, 2)), (1, (1, 2)), (2, (2, 2)), (1, (1, 2)), (2, (2, 2)))

    window: Tensor

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(self.WINDOW), persistent=False)
        layers: list[nn.Module] = [weight_norm(nn.Conv2d(2, channels, 7, padding=3))]
        for widen, stride in self.BLOCKS:
            layers.append(STFTBlock(channels, widen, stride))
            channels *= widen
        self.layers = nn.ModuleList(layers)
        bins = self.WINDOW // 2 // 2 ** len(self.BLOCKS)
        self.judge = weight_norm(nn.Conv2d(channels, 1, (1, bins)))

    def forward(self, audio: Tensor) -> Verdict:
        """audio [B, samples] -> logits [B, ceil(samples // 256 / 8)]."""
        verdict = _judge(self._spectrum(audio), self.layers, self.judge)
        return Verdict(verdict.features, verdict.logits.squeeze(2))

    def _spectrum(self, audio: Tensor) -> Tensor:
        """[B, samples] -> real and imaginary parts [B, 2, frames, bins]."""
        spectrum = torch.stft(
            F.pad(audio.float(), 2 * [(self.WINDOW - self.HOP) // 2]),
            self.WINDOW,
            self.HOP,
            window=self.window,
            center=False,
            normalized=True,
            return_complex=True,
        )
        return torch.view_as_real(spectrum[:, :-1]).permute(0, 3, 2, 1)


class WaveformDiscriminators(nn.Module):
    """The four of SoundStream: of the waveform at its own rate, half and a quarter; of its STFT.

    Args:
        channels: of the first layer of each that hears the waveform.
        max_channels: at most, of their layers.
        stft_channels: of the first layer of the one that sees the STFT.

    Raises:
        ValueError: channels that do not fall into groups of 4.
    """

    def __init__(
        self, *, channels: int = 16, max_channels: int = 1024, stft_channels: int = 32
    ) -> None:
        super().__init__()
        self.waves = nn.ModuleList(WaveDiscriminator(channels, max_channels) for _ in range(3))
        self.stft = STFTDiscriminator(stft_channels)
        # As in MelGAN: the mean of four samples, two apart; the ends know only what there is.
        self.halve = nn.AvgPool1d(4, stride=2, padding=1, count_include_pad=False)

    def forward(self, audio: Tensor) -> list[Verdict]:
        """What each says of audio [B, samples]: at full, half and a quarter rate, and of the STFT.

        Raises:
            ValueError: audio of another shape, or shorter than a hop of the STFT.
        """
        if audio.dim() != 2 or audio.shape[1] < STFTDiscriminator.HOP:
            raise ValueError(
                f"audio is {tuple(audio.shape)}, wanted [batch, samples >= {STFTDiscriminator.HOP}]"
            )
        of_stft = self.stft(audio)
        of_waves = []
        for wave in self.waves:
            of_waves.append(wave(audio))
            audio = self.halve(audio)
        return [*of_waves, of_stft]


class SpectrogramDiscriminator(nn.Module):
    """UnivNet's discriminator of one spectrogram (arXiv 2106.07889, section 2.2).

    Four convolutions of 3 frames by 9 bins, all but the first of which halve the bins, and two of
    3 by 3. A logit sees 13 frames and 97 bins of what it is given.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(inputs, channels, (3, width), stride, (1, width // 2)))
            for inputs, width, stride in (
                (1, 9, (1, 1)),
                *3 * [(channels, 9, (1, 2))],
                (channels, 3, (1, 1)),
            )
        )
        self.judge = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, spectrogram: Tensor) -> Verdict:
        """[B, frames, bins] -> logits [B, frames, ceil(bins / 8)]."""
        return _judge(spectrogram[:, None], self.layers, self.judge)


class SpectrumDiscriminators(nn.Module):
    """Three discriminators of log magnitudes, for a codec that paints them.

    A blurred picture gives itself away in three ways, and each of the three sees one best:

    - as it was painted: valleys between harmonics that are filled up, and peaks that are too low;
    - `joined` bins as one: onsets that are smeared over frames, seen over four times the band;
    - `joined` frames as one: partials that waver or break off, seen over four times the time.

    UnivNet (arXiv 2106.07889, section 2.2) reads several resolutions of a spectrogram off one
    waveform, by windows of several lengths. Here there is no waveform, so the coarser views are
    means of the magnitudes painted: they lose resolution along one axis without gaining any along
    the other. Magnitudes are averaged, then their logarithm is taken again: a mean of logarithms
    would mostly count the floor. Losses are hinges, as SoundStream's, where UnivNet has squares.

    Args:
        channels: of all layers.
        joined: bins, or frames, that a coarser view makes one of.

    Raises:
        ValueError: joined is below 2.
    """

    def __init__(self, *, channels: int = 32, joined: int = 4) -> None:
        super().__init__()
        if joined < 2:
            raise ValueError(f"joined is {joined}, wanted at least 2")
        self.joined = joined
        self.painted = SpectrogramDiscriminator(channels)
        self.joined_bins = SpectrogramDiscriminator(channels)
        self.joined_frames = SpectrogramDiscriminator(channels)

    def forward(self, log_magnitude: Tensor) -> list[Verdict]:
        """What each says of log magnitudes [B, frames, bins].

        Raises:
            ValueError: another shape, or fewer frames or bins than are joined.
        """
        if log_magnitude.dim() != 3 or min(log_magnitude.shape[1:]) < self.joined:
            raise ValueError(
                f"log_magnitude is {tuple(log_magnitude.shape)}, "
                f"wanted [batch, frames >= {self.joined}, bins >= {self.joined}]"
            )
        magnitude = log_magnitude.float().exp()
        return [
            self.painted(log_magnitude),
            self.joined_bins(F.avg_pool2d(magnitude, (1, self.joined)).log()),
            self.joined_frames(F.avg_pool2d(magnitude, (self.joined, 1)).log()),
        ]


def _judge(x: Tensor, layers: nn.ModuleList, judge: nn.Module) -> Verdict:
    """Through layers and judge, whose only channel is dropped."""
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), LEAK)
        features.append(x)
    return Verdict(features, judge(x).squeeze(1))
