"""Discriminators of codecs: what they see and say, and the losses between them and a codec."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from musiclm_engine.codec import SoundStream
from musiclm_engine.codec.adversarial_losses import (
    Verdict,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from musiclm_engine.codec.discriminators import (
    SpectrogramDiscriminator,
    SpectrumDiscriminators,
    STFTDiscriminator,
    WaveDiscriminator,
    WaveformDiscriminators,
)


@pytest.fixture(scope="module")
def of_audio():
    torch.manual_seed(0)
    return WaveformDiscriminators(channels=4, max_channels=16, stft_channels=2)


@pytest.fixture(scope="module")
def of_spectra():
    torch.manual_seed(0)
    return SpectrumDiscriminators(channels=4)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def seen(output, inputs):
    """Along each dimension of inputs, the first and the last that output depends on."""
    (gradient,) = torch.autograd.grad(output, inputs)
    where = gradient.nonzero()
    return [(low, high) for low, high in zip(*where.aminmax(dim=0), strict=True)]


# The waveform's.


def test_they_are_of_the_size_that_the_paper_describes():
    """Weights, biases, and a norm for every output channel. Section III-D."""

    def convolution(inputs, outputs, *kernel, groups=1):
        return outputs * (inputs // groups * math.prod(kernel) + 2)

    wave = convolution(1, 16, 15)
    for inputs, outputs in ((16, 64), (64, 256), (256, 1024), (1024, 1024)):
        wave += convolution(inputs, outputs, 41, groups=inputs // 4)
    wave += convolution(1024, 1024, 5) + convolution(1024, 1, 3)

    stft, channels = convolution(2, 32, 7, 7), 32
    for block in range(6):
        wider = min(512, channels * (2, 2, 1, 2, 1, 2)[block])
        stft += convolution(channels, channels, 3, 3)
        stft += convolution(channels, wider, *((3, 4) if block % 2 == 0 else (4, 4)))
        stft += convolution(channels, wider, 1, 1)
        channels = wider
    stft += convolution(512, 1, 1, 8)

    whole = WaveformDiscriminators()
    sizes = [sum(p.numel() for p in part.parameters()) for part in (whole.waves[0], whole.stft)]
    assert sizes == [wave, stft]
    assert sum(p.numel() for p in whole.parameters()) == 3 * wave + stft


@pytest.mark.parametrize("samples", [256, 257, 2047, 16000, 16384])
def test_logits_are_as_many_as_the_audio_is_long(of_audio, samples):
    *waves, stft = of_audio(noise(2, samples))
    lengths = [samples, samples // 2, samples // 2 // 2]
    assert [v.logits.shape for v in waves] == [(2, math.ceil(n / 256)) for n in lengths]
    frames = samples // 256
    assert stft.logits.shape == (2, math.ceil(frames / 8))
    assert [len(v.features) for v in (*waves, stft)] == [6, 6, 6, 7]
    halved = [math.ceil(frames / n) for n in (1, 1, 2, 2, 4, 4, 8)]
    assert [(f.shape[2], f.shape[3]) for f in stft.features] == [
        (time, 512 >> blocks) for blocks, time in enumerate(halved)
    ]


def test_a_logit_of_the_wave_sees_4951_samples():
    torch.manual_seed(0)
    audio = noise(1, 12800).requires_grad_()
    logits = WaveDiscriminator(4, 16)(audio).logits
    (_, (first, last)) = seen(logits[0, 25], audio)
    assert last - first + 1 == 4951
    assert first == 25 * 256 - 4950 // 2


def test_a_logit_of_the_stft_sees_70_frames():
    torch.manual_seed(0)
    audio = noise(1, 40000).requires_grad_()
    logits = STFTDiscriminator(2)(audio).logits
    (_, (first, last)) = seen(logits[0, 9], audio)
    # A Hann window is 0 at its first sample.
    assert last - first + 1 == 69 * 256 + 1024 - 1


def test_they_hear_the_full_the_half_and_the_quarter_rate(of_audio):
    audio = noise(2, 4096)
    verdicts = of_audio(audio)
    heard = audio.double().numpy()
    for wave, verdict in zip(of_audio.waves, verdicts[:3], strict=True):
        again = wave(torch.from_numpy(heard).float())
        torch.testing.assert_close(verdict.logits, again.logits, atol=1e-6, rtol=1e-5)
        ends = np.pad(heard, ((0, 0), (1, 1)), constant_values=np.nan)
        fours = np.stack([ends[:, n : n + heard.shape[1] : 2] for n in range(4)])
        heard = np.nanmean(fours, axis=0)
    steady = of_audio.halve(torch.full((1, 64), 0.5))
    assert (steady == 0.5).all()  # its ends too


def test_the_stft_is_that_of_hann_windows(of_audio):
    audio = noise(1, 5 * 256)
    found = of_audio.stft._spectrum(audio)
    assert found.shape == (1, 2, 5, 512)
    # Frame 2 begins 384 samples before sample 512.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    bins = np.arange(512)[:, None] * np.arange(1024) / 1024
    frame = audio.numpy()[0, 128 : 128 + 1024].astype(float) * window
    expected = (np.exp(-2j * np.pi * bins) * frame).sum(1) / 32
    np.testing.assert_allclose(found[0, 0, 2].numpy(), expected.real, atol=1e-5)
    np.testing.assert_allclose(found[0, 1, 2].numpy(), expected.imag, atol=1e-5)


def test_the_stft_is_exact_under_autocast(of_audio):
    audio = noise(1, 2048)
    with torch.autocast("cpu", torch.bfloat16):
        spectrum = of_audio.stft._spectrum(audio.bfloat16())
        assert of_audio.stft(audio).logits.dtype == torch.bfloat16
    assert torch.equal(spectrum, of_audio.stft._spectrum(audio.bfloat16().float()))


def test_what_they_hear_of_a_codec_is_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    codec = SoundStream(channels=2, strides=(4, 8), codebook_dim=8, codebook_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        rebuilt, target, losses = codec.rebuild(noise(2, 4096))
    assert rebuilt.dtype == target.dtype == losses["loss"].dtype == torch.float32
    assert not torch.equal(rebuilt, rebuilt.bfloat16().float())


@pytest.mark.parametrize("shape", [(2, 255), (16000,), (2, 1, 16000)])
def test_audio_they_cannot_hear_is_refused(of_audio, shape):
    with pytest.raises(ValueError, match=r"audio is \(.*wanted \[batch, samples >= 256\]"):
        of_audio(torch.zeros(shape))


@pytest.mark.parametrize("channels, most", [(6, 16), (2, 16), (16, 4), (4, 18)])
def test_channels_that_form_no_groups_of_four_are_refused(channels, most):
    with pytest.raises(ValueError, match=f"channels is {channels} and max_channels {most}"):
        WaveformDiscriminators(channels=channels, max_channels=most)


# The spectrum's.


def test_a_logit_of_a_spectrogram_sees_13_frames_and_97_bins():
    torch.manual_seed(0)
    spectrogram = noise(1, 32, 321).requires_grad_()
    logits = SpectrogramDiscriminator(4)(spectrogram).logits
    assert logits.shape == (1, 32, 41)
    _, frames, bins = seen(logits[0, 16, 20], spectrogram)
    assert frames == (10, 22) and bins == (20 * 8 - 48, 20 * 8 + 48)


def test_each_sees_its_own_resolution(of_spectra, monkeypatch):
    views = []
    for name in ("painted", "joined_bins", "joined_frames"):
        monkeypatch.setattr(getattr(of_spectra, name), "forward", views.append)
    of_spectra(noise(2, 10, 21))
    heights = np.exp(noise(2, 10, 21).double().numpy())
    bins = np.log(heights[:, :, :20].reshape(2, 10, 5, 4).mean(3))
    frames = np.log(heights[:, :8].reshape(2, 2, 4, 21).mean(2))
    assert torch.equal(views[0], noise(2, 10, 21))
    np.testing.assert_allclose(views[1].numpy(), bins, atol=1e-5)
    np.testing.assert_allclose(views[2].numpy(), frames, atol=1e-5)


def test_they_learn_to_tell_a_blurred_picture():
    """Peaks of one bin, and the same smeared over three: what a mean of guesses looks like."""
    torch.manual_seed(0)
    judges = SpectrumDiscriminators(channels=4)
    optimizer = torch.optim.Adam(judges.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        draw = torch.Generator().manual_seed(step)
        sharp = 4.0 * (torch.rand(4, 1, 64, generator=draw) < 0.2).float().expand(-1, 16, -1)
        blurred = F.avg_pool2d(sharp, (1, 3), 1, (0, 1))
        loss = discriminator_loss(judges(sharp - 2), judges(blurred - 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.1)  # who knows nothing
    assert losses[-1] < 1


@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 64, 3), (64, 64), (2, 1, 64, 64)])
def test_spectra_they_cannot_see_are_refused(of_spectra, shape):
    with pytest.raises(ValueError, match=r"log_magnitude is \(.*frames >= 4, bins >= 4\]"):
        of_spectra(torch.zeros(shape))


def test_joining_one_with_itself_is_refused():
    with pytest.raises(ValueError, match="joined is 1, wanted at least 2"):
        SpectrumDiscriminators(joined=1)


# Losses.


@pytest.fixture
def opinions():
    """Of two discriminators with layers and logits of several sizes: of the real, of the fake."""
    torch.manual_seed(0)

    def verdicts():
        return [
            Verdict([torch.randn(3, 2, 5), torch.randn(3, 4)], 2 * torch.randn(3, 7)),
            Verdict([torch.randn(3, 2, 3, 3), torch.randn(3, 1), torch.randn(3, 8)], torch.ones(3)),
        ]

    return verdicts(), verdicts()


def test_hinges_against_the_formula(opinions):
    real, fake = opinions
    expected, deceived = 0.0, 0.0
    for ours, theirs in zip(real, fake, strict=True):
        for x in ours.logits.flatten().tolist():
            expected += max(0.0, 1 - x) / ours.logits.numel() / 2
        for y in theirs.logits.flatten().tolist():
            expected += max(0.0, 1 + y) / theirs.logits.numel() / 2
            deceived += max(0.0, 1 - y) / theirs.logits.numel() / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-6)
    assert adversarial_loss(fake).item() == pytest.approx(deceived, rel=1e-6)


@pytest.mark.parametrize("sure, loss, deceived", [(0, 2, 1), (1, 0, 2), (5, 0, 6), (-1, 4, 0)])
def test_what_hinges_ask_for(sure, loss, deceived):
    """A discriminator that is sure enough learns no more; one that is deceived teaches no more."""
    real, fake = (
        [Verdict([], torch.full((2, 3), float(sign * sure), requires_grad=True))]
        for sign in (1, -1)
    )
    assert discriminator_loss(real, fake) == loss
    against = adversarial_loss(fake)
    assert against == deceived
    against.backward()
    assert bool(fake[0].logits.grad.any()) == (deceived > 0)


def test_features_against_the_formula(opinions):
    """Layers weigh the same in a discriminator, and discriminators the same in all, at any size."""
    real, fake = opinions
    expected = 0.0
    for ours, theirs in zip(real, fake, strict=True):
        for x, y in zip(ours.features, theirs.features, strict=True):
            mean = np.abs(x.numpy().astype(float) - y.numpy()).mean()
            expected += mean / len(ours.features) / 2
    assert feature_loss(real, fake).item() == pytest.approx(expected, rel=1e-6)
    assert feature_loss(real, real) == 0


def test_features_of_the_real_are_no_way_to_please():
    real, fake = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    feature_loss([Verdict([real], real)], [Verdict([fake], fake)]).backward()
    assert real.grad is None and fake.grad.any()


def test_losses_of_bfloat16_are_summed_in_float32():
    logits = torch.full((4096,), 0.01, dtype=torch.bfloat16)
    verdict = [Verdict([logits], logits)]
    exact = 1 - logits[0].double().item()
    assert adversarial_loss(verdict).dtype == torch.float32
    assert adversarial_loss(verdict).item() == pytest.approx(exact, rel=1e-6)
    assert discriminator_loss(verdict, verdict).item() == pytest.approx(2, rel=1e-6)
