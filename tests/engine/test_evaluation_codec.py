"""What a codec keeps: pairing of notes, and a codec whose damage is known."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from musiclm_engine.audio import save_audio
from musiclm_engine.codec import Codec
from musiclm_engine.data.manifest import Clip
from musiclm_engine.evaluation import judge_codec
from musiclm_engine.evaluation.codec_judgement import onset_f1
from musiclm_engine.evaluation.notes import NotePosteriors
from musiclm_engine.evaluation.report import codec_table
from musiclm_engine.evaluation.tagger import Tagging

FRAME_SECONDS = 256 / 22_050


def test_notes_pair_by_pitch_and_onset_alone() -> None:
    reference = [(0, 50, 60), (100, 150, 64)]
    assert onset_f1(reference, [(0, 12, 60), (105, 106, 64)]) == 1  # 58 ms late, of another length
    assert onset_f1(reference, [(0, 50, 60), (106, 150, 64)]) == 0.5  # 70 ms late
    assert onset_f1(reference, [(0, 50, 72), (100, 150, 52)]) == 0  # octaves off
    assert onset_f1(reference, [(0, 50, 60)]) == pytest.approx(2 / 3)
    assert onset_f1(reference, [(0, 5, 60), (1, 6, 60), (2, 7, 60)]) == pytest.approx(2 / 5)
    assert onset_f1(reference, []) == 0 and onset_f1([], reference) == 0
    assert onset_f1([], []) is None


def most_pairs(reference, found) -> int:
    """By trying every way to pair them."""
    short, long = sorted((reference, found), key=len)
    return max(
        sum(
            a[2] == b[2] and abs(a[0] - b[0]) * FRAME_SECONDS <= 0.06
            for a, b in zip(short, order, strict=True)
        )
        for order in permutations(long, len(short))
    )


def test_no_other_pairing_holds_more_notes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        reference, found = (
            [(int(s), int(s) + 20, int(p)) for s, p in zip(starts, pitches, strict=True)]
            for starts, pitches in (
                (rng.integers(30, size=n), rng.integers(60, 62, size=n)) for n in (6, 5)
            )
        )
        assert onset_f1(reference, found) == pytest.approx(2 * most_pairs(reference, found) / 11)


class LosingCodec(Codec):
    """Sixteen samples a frame; the first level keeps their sign alone, the second their size."""

    def __init__(self) -> None:
        super().__init__()
        self.sample_rate_hz, self.hop_length = 16_000, 16
        self.num_quantizers, self.codebook_size = 2, 1024
        self.config = {}
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        first = self.pad_to_frames(audio)[:, ::16]
        return torch.stack([(first < 0).long(), (first.abs() * 1000).round().long()], dim=2)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        size = codes[:, :, 1] / 1000 if codes.shape[2] > 1 else torch.full(codes.shape[:2], 0.01)
        return ((1 - 2 * codes[:, :, 0]) * size).repeat_interleave(16, dim=1)


class LoudnessJudges:
    """Hears one note while a clip is above 0.1, and tags a clip by its loudest sample."""

    def transcribe(self, audio: np.ndarray, sample_rate_hz: int) -> NotePosteriors:
        notes = np.zeros((len(audio) // 186, 88))
        notes[:, 39] = np.abs(audio[: 186 * len(notes)]).reshape(-1, 186).max(1) > 0.1
        return NotePosteriors(notes, np.zeros_like(notes))

    def tag(self, audio: np.ndarray, sample_rate_hz: int) -> Tagging:
        tags = 0.5 + 0.4 * np.sin(np.arange(50) * (1 + 10 * np.abs(audio).max()))
        return Tagging(tags, np.zeros((1, 200)))


def test_levels_are_judged_beside_the_original(tmp_path) -> None:
    clips = []
    for n, size in enumerate((0.5, 0.25, 0.75)):
        path = tmp_path / f"{n}.flac"
        audio = torch.zeros(16_000)
        audio[4_000 + 960 * n : 12_000] = size
        save_audio(path, audio, 16_000)
        clips.append(Clip(path, 1.0, ("a tone",), "validation", f"piece {n}"))
    seen = []
    figures = judge_codec(
        LosingCodec(),
        clips,
        [1, 2],
        judges=LoudnessJudges(),
        on_progress=lambda *at: seen.append(at),
    )
    coarse, whole = figures["levels"]
    assert (figures["num_clips"], figures["num_notes"]) == (3, 3)
    assert coarse["levels"] == 1 and coarse["note_f1"] == 0
    assert whole["levels"] == 2 and whole["note_f1"] == 1
    assert whole["tag_correlation"] > 0.99 > coarse["tag_correlation"]
    assert abs(figures["tag_correlation_of_others"]) < 0.9
    assert [row["kbit_per_second"] for row in figures["levels"]] == [10, 20]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "| 2 | 20.00 | 1.00 | 1.00 |" in codec_table(figures)


@pytest.mark.parametrize(
    ("clips", "levels", "message"),
    [
        ([None], [1], "1 clips to judge a codec on, wanted at least 2"),
        ([None] * 2, [], r"levels are \[\]"),
        ([None] * 2, [0], r"levels are \[0\], the codec has 1 to 2"),
        ([None] * 2, [1, 3], r"levels are \[1, 3\], the codec has 1 to 2"),
    ],
)
def test_impossible_wishes_are_refused(clips, levels, message) -> None:
    with pytest.raises(ValueError, match=message):
        judge_codec(LosingCodec(), clips, levels, judges=SimpleNamespace())
