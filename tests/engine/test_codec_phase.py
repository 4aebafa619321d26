"""Audio from magnitudes alone."""

import torch

from musiclm_engine.codec.phase import waveform_from_magnitude

N_FFT, HOP = 1280, 320
WINDOW = torch.hann_window(N_FFT)


def magnitude(audio):
    return torch.stft(
        audio, N_FFT, HOP, window=WINDOW, return_complex=True, pad_mode="constant"
    ).abs()


def convergence_db(audio, wanted):
    """20 log10 of the share of the magnitudes' norm that is missed, the edges left out."""
    missed = (magnitude(audio) - wanted)[:, :, 4:-4]
    return 20 * (missed.norm() / wanted[:, :, 4:-4].norm()).log10().item()


def test_a_chord_comes_back(tones):
    chord = tones(1.0, 220.0, 277.2, 329.6, 440.0)[None]
    wanted = magnitude(chord)
    audio = waveform_from_magnitude(wanted, WINDOW, HOP)
    assert audio.shape == (1, 16000)
    assert convergence_db(audio, wanted) < -20


def test_steady_tones_need_no_iterations(tones):
    """Without the peaks' own frequencies Griffin-Lim would start from nothing."""
    wanted = magnitude(tones(1.0, 443.0)[None])
    first_guess = waveform_from_magnitude(wanted, WINDOW, HOP, num_iterations=0)
    assert convergence_db(first_guess, wanted) < -20


def test_iterations_help(tones):
    chord = tones(1.0, 220.0, 277.2, 329.6, 440.0)[None]
    chord[:, 8000:] = tones(0.5, 300.0, 500.0)
    wanted = magnitude(chord)
    guess, better = (
        convergence_db(waveform_from_magnitude(wanted, WINDOW, HOP, num_iterations=n), wanted)
        for n in (0, 16)
    )
    assert better < guess - 3


def test_equal_magnitudes_give_equal_samples(tones):
    wanted = magnitude(torch.stack([tones(0.5, 220.0), tones(0.5, 700.0, 900.0)]))
    first = waveform_from_magnitude(wanted, WINDOW, HOP)
    assert torch.equal(first, waveform_from_magnitude(wanted, WINDOW, HOP))
    alone = waveform_from_magnitude(wanted[1:], WINDOW, HOP)
    torch.testing.assert_close(alone, first[1:], rtol=0, atol=1e-4)


def test_silence_stays_silent():
    audio = waveform_from_magnitude(torch.zeros(1, N_FFT // 2 + 1, 20), WINDOW, HOP)
    assert audio.shape == (1, 19 * HOP) and not audio.any()
