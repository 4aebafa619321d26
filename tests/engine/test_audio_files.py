import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from musiclm_engine.audio import AudioFileError, files, load_audio, save_audio

RATE_HZ = 24000


def tone(seconds: float, rate_hz: int = RATE_HZ, frequency_hz: float = 440.0) -> torch.Tensor:
    time = torch.arange(round(seconds * rate_hz), dtype=torch.float64) / rate_hz
    return (0.5 * torch.sin(2 * math.pi * frequency_hz * time)).float()


@pytest.mark.parametrize(("suffix", "error"), [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.05)])
def test_round_trip(tmp_path, suffix, error):
    path = tmp_path / f"clip{suffix}"
    save_audio(path, tone(1.5), RATE_HZ)
    loaded = load_audio(path, RATE_HZ)
    assert loaded.shape == (36000,) and loaded.dtype == torch.float32
    assert (loaded - tone(1.5)).abs().max() < error
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_channels_are_written_and_averaged(tmp_path):
    path = tmp_path / "stereo.wav"
    save_audio(path, torch.stack((tone(0.1), -0.5 * tone(0.1))), RATE_HZ)
    assert soundfile.info(path).channels == 2
    torch.testing.assert_close(load_audio(path, RATE_HZ), 0.25 * tone(0.1), atol=1e-4, rtol=0)


def test_loud_samples_are_clipped(tmp_path):
    save_audio(tmp_path / "loud.wav", torch.tensor([0.0, 3.0, -3.0]), RATE_HZ)
    loaded = load_audio(tmp_path / "loud.wav", RATE_HZ)
    torch.testing.assert_close(loaded, torch.tensor([0.0, 1.0, -1.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100])
def test_a_crop_is_that_part_of_the_whole_file(tmp_path, rate_hz):
    path = tmp_path / "clip.wav"
    torch.manual_seed(0)
    save_audio(path, 0.3 * torch.randn(44100 * 2), 44100)
    whole = load_audio(path, rate_hz)
    assert whole.shape == (2 * rate_hz,)
    for offset, seconds in ((0.0, 0.5), (0.777, 0.333), (1.8, None)):
        part = load_audio(path, rate_hz, offset_seconds=offset, seconds=seconds)
        start = round(offset * rate_hz)
        length = round(seconds * rate_hz) if seconds else len(whole) - start
        assert part.shape == (length,)
        torch.testing.assert_close(part, whole[start : start + length], atol=1e-5, rtol=0)


def test_only_the_part_needed_is_read(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    save_audio(path, torch.zeros(44100 * 60), 44100)
    read = []
    original = soundfile.SoundFile.read

    def counting(self, frames=-1, *args, **kwargs):
        read.append(frames)
        return original(self, frames, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    load_audio(path, RATE_HZ, offset_seconds=30, seconds=1)
    assert read and sum(read) < 44100 * 1.2


def test_resampling_keeps_the_pitch(tmp_path):
    save_audio(tmp_path / "a.wav", tone(1.0, 44100), 44100)
    loaded = load_audio(tmp_path / "a.wav", 16000)
    torch.testing.assert_close(loaded[800:-800], tone(1.0, 16000)[800:-800], atol=1e-3, rtol=0)


def test_a_stretch_past_the_end_gives_what_is_there(tmp_path):
    save_audio(tmp_path / "a.wav", tone(1.0), RATE_HZ)
    assert len(load_audio(tmp_path / "a.wav", RATE_HZ, offset_seconds=0.75, seconds=9)) == 6000


def test_a_flac_without_a_length_is_refused(tmp_path):
    path = tmp_path / "piped.flac"
    save_audio(path, tone(1.0), RATE_HZ)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO's 36-bit number of samples
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert soundfile.info(path).frames > 10**9
    with pytest.raises(AudioFileError, match="no length"):
        load_audio(path, RATE_HZ)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "notes.wav").write_text("not audio at all")
    (tmp_path / "headerless.raw").write_bytes(bytes(100))
    soundfile.write(tmp_path / "silent.wav", torch.zeros(0).numpy(), RATE_HZ)
    save_audio(tmp_path / "short.wav", tone(0.5), RATE_HZ)
    for name, reason in (
        ("absent.wav", "no such file"),
        ("empty.wav", "0 bytes"),
        ("notes.wav", "cannot be read as audio"),
        ("headerless.raw", "cannot be read as audio"),
        ("silent.wav", "0 samples"),
        (".", "folder"),
    ):
        with pytest.raises(AudioFileError, match=reason) as caught:
            load_audio(tmp_path / name, RATE_HZ)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(AudioFileError, match="past its end"):
        load_audio(tmp_path / "short.wav", RATE_HZ, offset_seconds=0.5)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    save_audio(path, torch.rand(RATE_HZ) - 0.5, RATE_HZ)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioFileError, match=f"clip{suffix}"):
        load_audio(path, RATE_HZ)


@pytest.mark.parametrize(
    "arguments", [{"offset_seconds": -1}, {"offset_seconds": math.nan}, {"seconds": 0}]
)
def test_load_names_a_bad_argument(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        load_audio(tmp_path / "a.wav", RATE_HZ, **arguments)


def test_save_refuses(tmp_path):
    with pytest.raises(AudioFileError, match="mp4"):
        save_audio(tmp_path / "a.mp4", tone(0.1), RATE_HZ)
    with pytest.raises(AudioFileError, match="does not exist"):
        save_audio(tmp_path / "absent" / "a.wav", tone(0.1), RATE_HZ)
    with pytest.raises(ValueError, match="shape"):
        save_audio(tmp_path / "a.wav", torch.zeros(1, 1, 5), RATE_HZ)
    with pytest.raises(ValueError, match="shape"):
        save_audio(tmp_path / "a.wav", torch.zeros(0), RATE_HZ)
    with pytest.raises(ValueError, match="finite"):
        save_audio(tmp_path / "a.wav", torch.tensor([0.0, math.nan]), RATE_HZ)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_named():
    folder = Path("/proc")  # refuses new files to root as well
    with pytest.raises(AudioFileError, match=r"/proc/a\.wav: cannot be written"):
        save_audio(folder / "a.wav", tone(0.1), RATE_HZ)


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "clip.wav"
    save_audio(path, tone(0.1), RATE_HZ)
    before = path.read_bytes()

    def fail(self, data):
        raise OSError("disk gone")

    monkeypatch.setattr(files.soundfile.SoundFile, "write", fail)
    with pytest.raises(AudioFileError, match="disk gone"):
        save_audio(path, tone(0.2), RATE_HZ)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["clip.wav"]


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_full_disk_is_an_error(tmp_path, suffix):
    script = (
        "import resource, sys, torch\n"
        "from musiclm_engine.audio import AudioFileError, save_audio\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "try:\n    save_audio(sys.argv[1], torch.rand(25500) * 2 - 1, 24000)\n"
        "except AudioFileError:\n    print('refused')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / f"clip{suffix}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "refused"
    assert list(tmp_path.iterdir()) == []
