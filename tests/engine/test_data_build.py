"""The built-in corpus: honest, deterministic, resumable. Renders with a soundfont made here."""

import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from musiclm_engine.data import build, build_corpus, load_manifest, render
from musiclm_engine.data.captions import Caption
from musiclm_engine.data.instruments import INSTRUMENTS
from musiclm_engine.data.render import Renderer, SoundNote
from musiclm_engine.data.scores import load_pieces, tonic_name

RATE_HZ = 16_000
SINE_PERIODS, SINE_SAMPLES = 160, 5818  # of MIDI 69 at 16 kHz, within 0.1 cents


def tiny_soundfont(*, cutoff_cents: int = 13_500) -> bytes:
    """A soundfont in which every instrument of the corpus is one looped sine."""

    def chunk(name: bytes, body: bytes) -> bytes:
        assert len(body) % 2 == 0
        return name + struct.pack("<I", len(body)) + body

    def name20(text: str) -> bytes:
        return text.encode().ljust(20, b"\0")

    wave = np.sin(2 * np.pi * SINE_PERIODS / SINE_SAMPLES * np.arange(SINE_SAMPLES + 8))
    samples = (wave * 20_000).astype("<i2").tobytes() + bytes(46 * 2)
    programs = sorted(instrument.program for instrument in INSTRUMENTS.values())
    headers = (
        b"".join(
            name20(f"P{program}") + struct.pack("<HHHIII", program, 0, zone, 0, 0, 0)
            for zone, program in enumerate(programs)
        )
        + name20("EOP")
        + struct.pack("<HHHIII", 0, 0, len(programs), 0, 0, 0)
    )
    preset_zones = b"".join(struct.pack("<HH", i, 0) for i in range(len(programs) + 1))
    preset_generators = struct.pack("<HH", 41, 0) * len(programs) + bytes(4)  # instrument 0
    # Cut-off, loop, sample 0: in this order, the sample last.
    generators = struct.pack("<HhHHHH", 8, cutoff_cents, 54, 1, 53, 0) + bytes(4)
    sample = name20("sine") + struct.pack(
        "<IIIIIBbHH", 0, SINE_SAMPLES + 8, 0, SINE_SAMPLES, RATE_HZ, 69, 0, 0, 1
    )
    pdta = (
        chunk(b"phdr", headers)
        + chunk(b"pbag", preset_zones)
        + chunk(b"pmod", bytes(10))
        + chunk(b"pgen", preset_generators)
        + chunk(b"inst", name20("I") + struct.pack("<H", 0) + name20("EOI") + struct.pack("<H", 1))
        + chunk(b"ibag", struct.pack("<HHHH", 0, 0, 3, 0))
        + chunk(b"imod", bytes(10))
        + chunk(b"igen", generators)
        + chunk(b"shdr", sample + name20("EOS") + bytes(26))
    )
    info = chunk(b"ifil", struct.pack("<HH", 2, 4)) + chunk(b"INAM", b"tiny")
    body = (
        b"sfbk"
        + chunk(b"LIST", b"INFO" + info)
        + chunk(b"LIST", b"sdta" + chunk(b"smpl", samples))
        + chunk(b"LIST", b"pdta" + pdta)
    )
    return chunk(b"RIFF", body)


@pytest.fixture(scope="module")
def soundfont(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("soundfont") / "tiny.sf2"
    path.write_bytes(tiny_soundfont())
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, soundfont: Path) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    return build_corpus(out, hours=48 * 10 / 3600, seed=5, soundfont=soundfont, workers=1)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pitch_hz(audio: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 1 << 17))
    return float(spectrum.argmax()) * RATE_HZ / (1 << 17)


# Rendering


@pytest.mark.parametrize("instrument", list(INSTRUMENTS))
def test_notes_sound_at_their_pitch_time_and_length(soundfont: Path, instrument: str) -> None:
    renderer = Renderer(soundfont, RATE_HZ)
    audio = renderer.render([SoundNote(0.5, 1.0, 64, 80)], instrument, 2.0)
    assert audio.shape == (2 * RATE_HZ,) and audio.dtype == np.float32
    assert np.abs(audio[: RATE_HZ // 2]).max() == 0
    sounding = audio[int(0.6 * RATE_HZ) : int(1.4 * RATE_HZ)]
    cents = 1200 * math.log2(pitch_hz(sounding) / (440 * 2 ** ((64 - 69) / 12)))
    assert abs(cents) < 5
    assert np.abs(audio[int(1.6 * RATE_HZ) :]).max() < 1e-3


def test_a_rendering_does_not_depend_on_the_one_before(soundfont: Path) -> None:
    notes = [SoundNote(0.0, 0.5, 60, 70), SoundNote(0.5, 0.5, 60, 90)]
    fresh = Renderer(soundfont, RATE_HZ).render(notes, "piano", 1.0)
    used = Renderer(soundfont, RATE_HZ)
    used.render([SoundNote(0.0, 9.0, 72, 120)], "flute", 1.0)  # still sounding at its end
    np.testing.assert_array_equal(used.render(notes, "piano", 1.0), fresh)


def test_levels_survive_and_never_clip(soundfont: Path) -> None:
    renderer = Renderer(soundfont, RATE_HZ)

    def rms(velocity: int, level_db: float = 0.0) -> float:
        audio = renderer.render([SoundNote(0, 2, 64, velocity)], "violin", 1.0, level_db=level_db)
        return float(np.sqrt(np.mean(audio**2)))

    assert rms(40) < 0.7 * rms(78) < 0.7 * 0.8 * rms(115)
    assert rms(78, -6.0) == pytest.approx(rms(78) * 10**-0.3, rel=1e-3)
    assert 0.05 < rms(78) < 0.1
    cluster = [SoundNote(0, 1, pitch, 127) for pitch in range(50, 80)]
    loudest = np.abs(renderer.render(cluster, "violin", 1.0, level_db=20)).max()
    assert loudest == pytest.approx(render.PEAK_LIMIT, rel=1e-4)


def test_filters_that_wait_for_a_modulator_are_opened(soundfont: Path, tmp_path: Path) -> None:
    shut = tmp_path / "shut.sf2"
    shut.write_bytes(tiny_soundfont(cutoff_cents=4000))
    notes = [SoundNote(0, 1, 84, 100)]
    a, b = (Renderer(font, RATE_HZ).render(notes, "piano", 1.0) for font in (soundfont, shut))
    np.testing.assert_array_equal(a, b)


def test_missing_synthesiser_and_broken_soundfont_say_what_to_do(
    soundfont: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.sf2"
    broken.write_bytes(b"RIFF" + bytes(40))
    with pytest.raises(ValueError, match=r"cannot read the soundfont .*broken\.sf2"):
        Renderer(broken, RATE_HZ)
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps tinysoundfont==0.3.7"):
        build_corpus(tmp_path / "out", hours=0.01, soundfont=soundfont)


# The corpus


def test_clips_are_what_the_manifest_says(corpus: Path) -> None:
    clips = load_manifest(corpus)
    assert len(clips) == 48
    for clip in clips:
        audio, rate_hz = soundfile.read(clip.audio, dtype="float32")
        assert (rate_hz, audio.shape) == (RATE_HZ, (10 * RATE_HZ,))
        assert 0.005 < np.sqrt(np.mean(audio**2)) and np.abs(audio).max() <= 0.981
        for onset_s, duration_s, pitch in clip.facts["notes"]:
            assert 0 <= onset_s < 10 and 0 < duration_s and onset_s + duration_s <= 10.001
            assert 30 < pitch < 100
        frames = np.sqrt(np.square(audio.reshape(100, -1)).mean(axis=1))
        silent = "".join("s" if frame < 1e-3 else " " for frame in frames)
        assert "s" * 21 not in silent


def test_facts_follow_from_the_score(corpus: Path) -> None:
    pieces = {piece.id: piece for piece in load_pieces()}
    for clip in load_manifest(corpus):
        piece, facts = pieces[clip.piece], clip.facts
        written = {note.pitch for part in piece.parts for note in part}
        sounding = {pitch - facts["transposition"] for _, _, pitch in facts["notes"]}
        assert sounding <= written
        assert (facts["kind"], facts["metre"], facts["mode"]) == (
            piece.kind,
            piece.metre,
            piece.mode,
        )
        if piece.tonic is not None and piece.mode is not None:
            assert facts["key"] == tonic_name(piece.tonic + facts["transposition"], piece.mode)
        assert facts["instrument"] in INSTRUMENTS
        assert len(clip.captions) == len(clip.stated) == 8
        assert {"instrument", "kind", "tempo_bpm"} <= clip.stated[0]
        assert facts["family"] == INSTRUMENTS[facts["instrument"]].family
        assert facts["origin"] == ("Irish" if "oneills" in clip.piece else None)


def test_chorales_move_in_quavers_of_the_stated_tempo(corpus: Path) -> None:
    chorales = [clip for clip in load_manifest(corpus) if clip.facts["kind"] == "chorale"]
    assert len(chorales) > 10
    for clip in chorales:
        quaver_s = 30 / clip.facts["tempo_bpm"]
        onsets_s = np.array([onset_s for onset_s, _, _ in clip.facts["notes"]])
        off_s = np.abs(onsets_s - quaver_s * np.round(onsets_s / quaver_s))
        assert np.median(off_s) < 0.02, clip.facts  # a player sways by 6 ms


def test_the_corpus_has_every_kind_of_clip() -> None:
    plans = [build.plan_clip(0, index, 10.0) for index in range(400)]
    facts = [plan.facts for plan in plans]
    assert {f["instrument"] for f in facts} == set(INSTRUMENTS)
    assert 0.42 < np.mean([f["kind"] == "chorale" for f in facts]) < 0.58
    assert {f["transposition"] % 12 for f in facts} == set(range(12))
    assert {f["dynamics"] for f in facts} == {"soft", "medium", "loud"}
    assert min(f["tempo_bpm"] for f in facts) < 60 and max(f["tempo_bpm"] for f in facts) > 144
    for plan in plans:
        player = INSTRUMENTS[plan.facts["instrument"]]
        pitches = [note.pitch for note in plan.notes]
        assert player.lowest - 5 <= min(pitches) and max(pitches) <= player.highest + 5


def test_splits_share_no_piece_and_have_their_sizes() -> None:
    ids = [piece.id for piece in load_pieces()]
    shares = {s: np.mean([build.split_of(i) == s for i in ids]) for s in ("train", "validation")}
    assert shares["train"] == pytest.approx(0.9, abs=0.02)
    assert shares["validation"] == pytest.approx(0.05, abs=0.02)


def test_same_seed_same_bytes_whatever_the_workers(
    corpus: Path, soundfont: Path, tmp_path: Path
) -> None:
    build_corpus(tmp_path, hours=48 * 10 / 3600, seed=5, soundfont=soundfont, workers=2)
    assert digests(tmp_path) == digests(corpus.parent)


def test_a_longer_build_begins_with_a_shorter_one(
    corpus: Path, soundfont: Path, tmp_path: Path
) -> None:
    build_corpus(tmp_path, hours=5 * 10 / 3600, seed=5, soundfont=soundfont, workers=1)
    short = digests(tmp_path / "clips")
    assert len(short) == 5 and short.items() <= digests(corpus.parent / "clips").items()


def test_a_resumed_build_gives_the_same_bytes(
    corpus: Path, soundfont: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up after six clips; the clips stay; one is damaged; the next call goes on."""
    arguments = {"hours": 48 * 10 / 3600, "seed": 5, "soundfont": soundfont, "workers": 1}
    replace, num_written = os.replace, 0

    def full_disk(source: str, target: str) -> None:
        nonlocal num_written
        num_written += 1
        if num_written > 7:  # build.json and six clips
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left on device.*finished so far stay"):
            build_corpus(tmp_path, **arguments)  # type: ignore[arg-type]
    clips = sorted((tmp_path / "clips").iterdir())
    assert [clip.name for clip in clips] == [f"{i:06d}.flac" for i in range(6)]
    assert not (tmp_path / "manifest.jsonl").exists()

    clips[2].write_bytes(clips[2].read_bytes()[:-2000])
    untouched = clips[0].stat().st_mtime_ns
    progress: list[tuple[int, int]] = []
    build_corpus(tmp_path, **arguments, on_progress=lambda *at: progress.append(at))  # type: ignore[arg-type]
    assert digests(tmp_path) == digests(corpus.parent)
    assert clips[0].stat().st_mtime_ns == untouched
    assert progress == [(i + 1, 48) for i in range(48)]


def test_the_sound_of_a_clip_has_not_changed_since_format_1() -> None:
    """The notes of thirty clips, as they were when captions had no words for families and moods."""
    digest = hashlib.sha256()
    for index in range(30):
        plan = build.plan_clip(0, index, 10.0)
        sound = (plan.facts["instrument"], plan.level_db, plan.facts["notes"])
        digest.update(json.dumps(sound).encode())
    assert digest.hexdigest() == "2297fe06401527763bb822a4225f72cccfe44fe37fee615b4b98210f8a0cfd8b"


def test_captions_are_drawn_apart_from_the_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(facts: dict[str, Any], rng: random.Random) -> tuple[Caption, ...]:
        rng.random()
        return (Caption(f"other {rng.random()}", frozenset()),)

    plans = [build.plan_clip(3, index, 10.0) for index in range(20)]
    monkeypatch.setattr(build, "write_captions", greedy)
    others = [build.plan_clip(3, index, 10.0) for index in range(20)]
    assert [plan.notes for plan in plans] == [plan.notes for plan in others]
    assert len({plan.captions for plan in others}) == 20


@pytest.mark.parametrize("old_format", [1, 2])
def test_clips_of_older_formats_are_kept_and_captioned_anew(
    old_format: int, corpus: Path, soundfont: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "corpus"
    shutil.copytree(corpus.parent, old)
    record = json.loads((old / "build.json").read_text())
    (old / "build.json").write_text(json.dumps(record | {"format": old_format}))
    (old / "manifest.jsonl").write_text("captions as they were\n")
    rendered: list[Path] = []
    write = soundfile.write

    def watched(*arguments: Any, **options: Any) -> None:
        rendered.append(arguments[0])
        write(*arguments, **options)

    monkeypatch.setattr(soundfile, "write", watched)
    build_corpus(old, hours=48 * 10 / 3600, seed=5, soundfont=soundfont, workers=1)
    assert len(rendered) < 12  # those in which a note may die away are looked at again
    assert digests(old) == digests(corpus.parent)


def test_a_format_that_is_not_known_is_refused(
    corpus: Path, soundfont: Path, tmp_path: Path
) -> None:
    future = tmp_path / "corpus"
    shutil.copytree(corpus.parent, future)
    record = json.loads((future / "build.json").read_text())
    (future / "build.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(ValueError, match=r"holds another build \(format 99, now 3\)"):
        build_corpus(future, hours=0.01, seed=5, soundfont=soundfont)


def test_refusals(corpus: Path, soundfont: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another build \(seed 5, now 6\)"):
        build_corpus(corpus.parent, hours=0.01, seed=6, soundfont=soundfont)
    with pytest.raises(ValueError, match="hours=0"):
        build_corpus(tmp_path, hours=0, soundfont=soundfont)
    with pytest.raises(ValueError, match="workers"):
        build_corpus(tmp_path, workers=0, soundfont=soundfont)
    for hours in (math.inf, math.nan, 1e308, 1e6):
        with pytest.raises(ValueError, match=f"hours={re.escape(str(hours))}"):
            build_corpus(tmp_path, hours=hours, soundfont=soundfont)
    with pytest.raises(ValueError, match="clip_seconds=inf"):
        build_corpus(tmp_path, clip_seconds=math.inf, soundfont=soundfont)
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(NotADirectoryError, match="It is a file, wanted a folder") as refusal:
        build_corpus(in_the_way, hours=0.01, soundfont=soundfont)
    assert refusal.value.filename == str(in_the_way) and "stay" not in str(refusal.value)


@pytest.mark.parametrize("record", [b"[]", b"3", b"{", b"\xff"])
def test_a_record_that_is_none_is_refused(record: bytes, soundfont: Path, tmp_path: Path) -> None:
    (tmp_path / "build.json").write_bytes(record)
    with pytest.raises(ValueError, match=r"build\.json: not "):
        build_corpus(tmp_path, hours=0.01, soundfont=soundfont)
    assert (tmp_path / "build.json").read_bytes() == record


def test_a_failed_build_leaves_its_folder_usable(
    soundfont: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, out = tmp_path / "broken.sf2", tmp_path / "out"
    broken.write_bytes(b"RIFF" + bytes(40))
    with pytest.raises(ValueError, match="cannot read the soundfont"):
        build_corpus(out, hours=0.001, soundfont=broken)
    assert not out.exists()

    def fail(*_: object) -> None:
        raise RuntimeError("before the first clip")

    with monkeypatch.context() as patch:
        patch.setattr(build, "_make_clip", fail)
        with pytest.raises(RuntimeError, match="before the first clip"):
            build_corpus(out, hours=0.001, seed=1, soundfont=soundfont, workers=1)
    assert (out / "build.json").exists()
    assert len(load_manifest(build_corpus(out, hours=0.001, soundfont=soundfont, workers=1))) == 1
