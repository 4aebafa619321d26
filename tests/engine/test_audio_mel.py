import math
import os
import subprocess
import sys

import pytest
import torch

from musiclm_engine.audio import LogMel, _torchaudio


def tone(frequency_hz: float, num_samples: int = 16000) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency_hz * torch.arange(num_samples) / 16000)[None]


def mel_centres_hz(num_mels: int, f_min_hz: float, f_max_hz: float) -> torch.Tensor:
    low, high = (2595 * math.log10(1 + f / 700) for f in (f_min_hz, f_max_hz))
    return 700 * (10 ** (torch.linspace(low, high, num_mels + 2)[1:-1] / 2595) - 1)


@pytest.mark.parametrize("num_samples", [160, 161, 319, 320, 16000, 16159])
def test_frames_are_time_over_hop(num_samples):
    log_mel = LogMel()
    assert log_mel(torch.zeros(2, num_samples)).shape == (2, num_samples // 160, 64)
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


@pytest.mark.parametrize("n_fft", [512, 1024])
def test_equals_torchaudio(n_fft):
    torch.manual_seed(0)
    audio = torch.randn(2, 8000)
    theirs = _torchaudio.transforms.MelSpectrogram(
        16000, n_fft, 400, 160, f_min=20.0, n_mels=64, center=False
    )
    ours = LogMel(n_fft=n_fft)
    padded = torch.nn.functional.pad(audio, ((n_fft - 160) // 2, (n_fft - 160) // 2))
    torch.testing.assert_close(ours(audio), theirs(padded).clamp(min=1e-5).log().transpose(1, 2))


def test_silence_is_the_floor_and_appending_it_changes_no_frame():
    log_mel = LogMel()
    torch.testing.assert_close(
        log_mel(torch.zeros(1, 1600)), torch.full((1, 10, 64), math.log(1e-5))
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
