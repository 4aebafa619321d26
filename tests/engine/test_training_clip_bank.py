"""The bank of clips: what is read at random is what the files hold."""

import os
from itertools import accumulate

import numpy as np
import pytest
import soundfile
import torch

from musiclm_engine.audio import AudioFileError, load_audio, save_audio
from musiclm_engine.data.manifest import Clip
from musiclm_engine.training.clip_bank import ClipBank, open_bank
from musiclm_engine.training.fitted import whole_clips


def clip(path):
    return Clip(path, soundfile.info(path).duration, ("a tune",), "train", path.stem)


@pytest.fixture
def clips(tones, tmp_path):
    """Of three lengths, two rates, two formats and one or two channels."""
    save_audio(tmp_path / "a.flac", tones(0.5, 220.0, 440.0), 16000)
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (6615, 2))
    soundfile.write(tmp_path / "b.wav", stereo, 22050)
    save_audio(tmp_path / "c.wav", tones(0.2, 330.0), 16000)
    return [clip(tmp_path / name) for name in ("a.flac", "b.wav", "c.wav")]


def test_it_holds_all_clips_at_its_rate(clips, tmp_path):
    bank = open_bank(clips, tmp_path / "bank.pcm", 16000)
    assert len(bank) == 3 and bank.lengths == [8000, 4800, 3200]
    assert bank.audio.dtype == torch.int16 and bank.first.tolist() == [0, 8000, 12800, 16000]
    for row, of_clip in enumerate(clips):
        own = bank.crops(torch.tensor([row]), torch.tensor([0]), bank.lengths[row])[0]
        there = load_audio(of_clip.audio, 16000)
        exact = of_clip.audio.stem != "b"  # which was resampled
        torch.testing.assert_close(own, there, rtol=0, atol=0 if exact else 0.5 / 32768)


def test_crops_end_where_their_clip_ends(clips, tmp_path):
    bank = open_bank(clips, tmp_path / "bank.pcm", 16000)
    crops = bank.crops(torch.tensor([0, 2, 2]), torch.tensor([7000, 0, 3100]), 4000)
    assert crops.shape == (3, 4000) and crops.dtype == torch.float32
    assert torch.equal(crops[0, :1000], load_audio(clips[0].audio, 16000)[7000:])
    for row, length in enumerate((1000, 3200, 100)):
        assert crops[row, :length].any() and not crops[row, length:].any()


@pytest.mark.parametrize("seconds, at_a_time", [(1, 8), (10, 8), (11, 7), (39, 2), (600, 1)])
def test_long_clips_are_taken_fewer_at_a_time(seconds, at_a_time):
    rate = 100
    lengths = [seconds * rate, 601 * rate] * 4
    first = torch.tensor([0, *accumulate(lengths)])
    bank = ClipBank(torch.zeros(sum(lengths), dtype=torch.int16), first, lengths, rate)
    sizes = [tuple(some.shape) for some in whole_clips(bank, range(8), torch.device("cpu"))]
    assert sizes[0] == (at_a_time, seconds * rate) and sum(rows for rows, _ in sizes) == 8


def test_it_is_made_once_and_again_when_a_clip_changes(clips, tones, tmp_path):
    path = tmp_path / "bank.pcm"
    told = []
    open_bank(clips, path, 16000, lambda *what: told.append(what))
    assert told == [(1, 3), (2, 3), (3, 3)]
    made = path.stat().st_mtime_ns
    open_bank(clips, path, 16000)
    assert path.stat().st_mtime_ns == made
    save_audio(clips[2].audio, tones(0.1, 500.0), 16000)
    assert open_bank(clips, path, 16000).lengths == [8000, 4800, 1600]
    assert open_bank(clips[:2], path, 16000).lengths == [8000, 4800]
    assert open_bank(clips[:2], path, 8000).lengths == [4000, 2400]


@pytest.mark.parametrize("broken", ["", "{}", "[]", '{"fingerprint": 3}'])
def test_a_note_that_says_nothing_is_not_believed(clips, tmp_path, broken):
    path = tmp_path / "bank.pcm"
    open_bank(clips, path, 16000)
    (tmp_path / "bank.pcm.json").write_text(broken)
    os.truncate(path, 100)
    assert len(open_bank(clips, path, 16000).audio) == 16000


def test_louder_than_full_scale_is_clipped(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.array([2.0, -2.0, 0.5]), 16000, subtype="FLOAT")
    bank = open_bank([clip(tmp_path / "loud.wav")], tmp_path / "bank.pcm", 16000)
    assert bank.audio.tolist() == [32767, -32768, 16384]


def test_a_broken_clip_is_named_and_leaves_no_bank(clips, tmp_path):
    clips[1].audio.write_bytes(b"not audio")
    with pytest.raises(AudioFileError, match="b.wav"):
        open_bank(clips, tmp_path / "bank.pcm", 16000)
    assert not list(tmp_path.glob("*.pcm*"))


def test_crops_do_not_write_to_the_file(clips, tmp_path):
    path = tmp_path / "bank.pcm"
    bank = open_bank(clips, path, 16000)
    before = path.read_bytes()
    bank.audio[:100] = 7
    assert path.read_bytes() == before
