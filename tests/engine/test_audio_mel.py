import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from musiclm_engine.audio import LogMel, _torchaudio


def tone(frequency_hz: float, num_samples: int = 16000) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency_hz * torch.arange(num_samples) / 16000)[None]


def mel_centres_hz(num_mels: int, f_min_hz: float, f_max_hz: float) -> torch.Tensor:
    low, high = (2595 * math.log10(1 + f / 700) for f in (f_min_hz, f_max_hz))
    return 700 * (10 ** (torch.linspace(low, high, num_mels + 2)[1:-1] / 2595) - 1)


def log_mel_in_double(log_mel: LogMel, audio: torch.Tensor) -> torch.Tensor:
    """The formula over again, frame by frame in float64."""
    n_fft, hop = log_mel.n_fft, log_mel.hop_samples
    window = torch.hann_window(len(log_mel.window), dtype=torch.float64)
    before = (n_fft - len(window)) // 2
    window = torch.nn.functional.pad(window, (before, n_fft - len(window) - before))
    left = (n_fft - hop) // 2
    padded = torch.nn.functional.pad(audio.double(), (left, n_fft - hop - left))
    power = torch.fft.rfft(padded.unfold(1, n_fft, hop) * window).abs().square()
    return (power @ log_mel.filters.double()).clamp(min=log_mel.floor).log()


def test_defaults_are_those_of_mulan():
    log_mel = LogMel()
    assert (log_mel.sample_rate_hz, log_mel.hop_samples, len(log_mel.window)) == (16000, 160, 400)
    assert log_mel.num_mels == 128 and log_mel.filters.shape == (log_mel.n_fft // 2 + 1, 128)
    assert log_mel.n_fft == 1024 and (log_mel.filters.amax(dim=0) > 0).all()
    assert LogMel(num_mels=64).n_fft == 512


@pytest.mark.parametrize("num_samples", [160, 161, 319, 320, 16000, 16159])
def test_frames_are_time_over_hop(num_samples):
    log_mel = LogMel()
    assert log_mel(torch.zeros(2, num_samples)).shape == (2, num_samples // 160, 128)
    assert log_mel.num_frames(num_samples) == num_samples // 160


@pytest.mark.parametrize("num_mels", [64, 128])
@pytest.mark.parametrize("frequency_hz", [440.0, 1000.0, 3000.0, 7000.0])
def test_a_tone_lands_in_its_bin(num_mels, frequency_hz):
    spectrum = LogMel(num_mels=num_mels)(tone(frequency_hz))[0, 20:80].mean(0)
    wanted = (mel_centres_hz(num_mels, 20, 8000) - frequency_hz).abs().argmin()
    assert abs(int(spectrum.argmax()) - int(wanted)) <= 1


def test_a_click_lands_in_its_frame():
    audio = torch.zeros(1, 16000)
    audio[0, 50 * 160 + 80] = 1.0
    assert int(LogMel()(audio)[0].mean(1).argmax()) == 50


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_mels": 64},
        {"num_mels": 64, "n_fft": 1024},
        {"sample_rate_hz": 24000, "hop_ms": 5, "window_ms": 20, "num_mels": 80},
        {"sample_rate_hz": 22050, "hop_ms": 20, "window_ms": 50, "num_mels": 40, "f_min_hz": 0},
        {"sample_rate_hz": 44100, "num_mels": 96, "f_min_hz": 40.0, "f_max_hz": 16000.0},
        {"sample_rate_hz": 8000, "hop_ms": 0.375, "window_ms": 8, "num_mels": 20},  # odd hop
    ],
)
def test_mel_power_equals_torchaudio(arguments):
    torch.manual_seed(0)
    log_mel = LogMel(**arguments, floor=1e-30)
    n_fft, hop = log_mel.n_fft, log_mel.hop_samples
    theirs = _torchaudio.transforms.MelSpectrogram(
        log_mel.sample_rate_hz,
        n_fft,
        len(log_mel.window),
        hop,
        f_min=arguments.get("f_min_hz", 20.0),
        f_max=arguments.get("f_max_hz"),
        n_mels=log_mel.num_mels,
        center=False,
        mel_scale="htk",
    )
    audio = torch.randn(2, 8000)
    left = (n_fft - hop) // 2
    padded = torch.nn.functional.pad(audio, (left, n_fft - hop - left))
    ours = log_mel(audio).double().exp()
    torch.testing.assert_close(ours, theirs(padded).mT.double(), rtol=1e-5, atol=0)


def test_compression_is_the_natural_logarithm_above_the_floor():
    audio = torch.cat((torch.zeros(1, 1600), 0.1 * tone(440, 1600)), dim=1)
    power = LogMel(floor=1e-30)(audio).double().exp().numpy()
    floored = np.log(np.maximum(power, 1e-5))
    assert (floored == np.log(1e-5)).any() and (floored > 0).any()
    np.testing.assert_allclose(LogMel()(audio).numpy(), floored, rtol=1e-5, atol=1e-5)


def test_equals_the_formula_in_double_and_so_do_its_gradients():
    torch.manual_seed(0)
    log_mel = LogMel()
    audio = (0.1 * torch.randn(2, 3200)).requires_grad_()
    ours, wanted = log_mel(audio), log_mel_in_double(log_mel, audio)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-4)
    weights = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), audio)
    (exact,) = torch.autograd.grad((wanted * weights).sum(), audio)
    assert (gradient - exact).norm() < 1e-4 * exact.norm()


def test_silence_is_the_floor_and_appending_it_changes_no_frame():
    log_mel = LogMel()
    torch.testing.assert_close(
        log_mel(torch.zeros(1, 1600)), torch.full((1, 10, 128), math.log(1e-5))
    )
    torch.manual_seed(0)
    audio = torch.randn(1, 1600)
    longer = torch.nn.functional.pad(audio, (0, 3200))
    torch.testing.assert_close(log_mel(longer)[:, :10], log_mel(audio))


def test_is_float32_under_autocast_and_from_half_precision_audio():
    torch.manual_seed(0)
    audio = torch.randn(1, 1600)
    log_mel = LogMel()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel(audio), log_mel(audio.double().float()))
    assert log_mel(audio.half()).dtype == torch.float32


def test_rows_do_not_see_each_other():
    torch.manual_seed(0)
    audio = torch.randn(3, 4000)
    together = LogMel()(audio)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], LogMel()(audio[row : row + 1]))


def test_compiles_whole():
    torch.manual_seed(0)
    log_mel, audio = LogMel(), torch.randn(2, 4000)
    compiled = torch.compile(log_mel, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(audio), log_mel(audio))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(audio).dtype == torch.float32


def test_runs_on_the_device_of_its_audio_and_reads_no_value():
    """Fake tensors of another device have no values: reading one, or mixing devices, is an error."""
    log_mel = LogMel()
    sizes = {name: buffer.shape for name, buffer in log_mel.named_buffers()}
    with FakeTensorMode():
        buffers = {name: torch.empty(size, device="cuda") for name, size in sizes.items()}
        audio = torch.empty(2, 4000, device="cuda")
        spectrogram = torch.func.functional_call(log_mel, buffers, audio)
    assert spectrogram.device.type == "cuda" and spectrogram.shape == (2, 25, 128)


def test_buffers_are_not_saved():
    assert LogMel().state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hop_ms": 0.01}, "hop_ms"),
        ({"n_fft": 256}, "n_fft"),
        ({"num_mels": 128, "n_fft": 512}, "num_mels"),
        ({"f_max_hz": 9000.0}, "f_max_hz"),
        ({"num_mels": 0}, "num_mels"),
    ],
)
def test_refuses_bad_settings(arguments, named):
    with pytest.raises(ValueError, match=named):
        LogMel(**arguments)


def test_refuses_bad_audio():
    with pytest.raises(ValueError, match=r"\(B, time\)"):
        LogMel()(torch.zeros(1600))
    with pytest.raises(ValueError, match="one hop"):
        LogMel()(torch.zeros(1, 159))


BROKEN = """
import sys, types
class Finder:  # a torchaudio whose extension does not load
    def find_spec(self, name, path=None, target=None):
        if name == "torchaudio._extension":
            raise OSError("Could not load this library")
sys.meta_path.insert(0, Finder())
from musiclm_engine.audio import LogMel, _torchaudio
assert "torchaudio" not in sys.modules
LogMel()
import torchaudio
assert torchaudio.functional is _torchaudio.functional
assert not hasattr(torchaudio._extension, "__file__")
"""

WORKING = """
import sys, types
torchaudio = types.ModuleType("torchaudio"); torchaudio.__path__ = []
functional = types.ModuleType("torchaudio.functional")
sys.modules.update({"torchaudio": torchaudio, "torchaudio.functional": functional})
from musiclm_engine.audio import _torchaudio
assert _torchaudio.functional is functional
assert "torchaudio._extension" not in sys.modules
"""


@pytest.mark.parametrize("script", [BROKEN, WORKING])
def test_torchaudio_is_mended_only_where_broken(script):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
