"""Cutting soundfonts, and the one that is bundled."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from musiclm_engine.data import build_corpus, soundfont
from musiclm_engine.data.build import LEVELS
from musiclm_engine.data.instruments import INSTRUMENTS
from musiclm_engine.data.render import (
    BUNDLED_SOUNDFONT,
    SOUNDFONT_VARIABLE,
    Renderer,
    SoundNote,
    find_soundfont,
)
from musiclm_engine.data.scores import load_pieces
from musiclm_engine.data.soundfont import Part, corpus_parts, cut_soundfont
from musiclm_engine.data.soundfont_file import (
    VORBIS,
    Sample,
    Soundfont,
    Voice,
    read_soundfont,
    write_soundfont,
)

RATE_HZ = 16_000
BUNDLED_SHA256 = "b458efb9e9e5e21fd80a7aa6ddccfd84665d5830dbcb7c46e26ec00086dab5fd"
PIANO, HARPSICHORD, FLUTE = (INSTRUMENTS[n].program for n in ("piano", "harpsichord", "flute"))
MODULATOR = struct.pack("<HHhHH", 0x0502, 48, 960, 0, 0)  # velocity to attenuation


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body


def zones(*instruments: list[tuple[list[tuple[int, int]], bytes]]) -> tuple[list[int], list[bytes]]:
    """Where each instrument's zones begin, and the bags, modulators and generators of all."""
    first, bags, modulators, generators = [0], b"", b"", b""
    for own in instruments:
        for pairs, changes in own:
            bags += struct.pack("<HH", len(generators) // 4, len(modulators) // 10)
            generators += b"".join(struct.pack("<HH", kind, n & 0xFFFF) for kind, n in pairs)
            modulators += changes
        first.append(first[-1] + len(own))
    bags += struct.pack("<HH", len(generators) // 4, len(modulators) // 10)
    return first, [bags, modulators + bytes(10), generators + bytes(4)]


def two_programs() -> bytes:
    """Piano: a stereo pair below middle C, a tone above it, and a second instrument. Harpsichord: that
    second instrument alone, which plays the tone too. And a third, in bank 8, of its own."""
    time = np.arange(4000) / RATE_HZ
    waves = [(2000 * (i + 1) * np.sin(2 * np.pi * 220 * (i + 1) * time)) for i in range(4)]
    smpl, headers, start = b"", b"", 0
    for name, wave, (link, kind) in zip(
        ("other", "left", "right", "tone"), waves, ((0, 1), (2, 4), (1, 2), (0, 1)), strict=True
    ):
        smpl += wave.astype("<i2").tobytes() + bytes(92)
        positions = (start, start + 4000, start + 1000, start + 3000, RATE_HZ)
        headers += struct.pack("<20sIIIIIBbHH", name.encode(), *positions, 57, 0, link, kind)
        start += 4046
    low, high = 0 | 60 << 8, 61 | 127 << 8
    first, inner = zones(
        [([(54, 1), (53, 0)], b"")],
        [
            ([(17, -500), (54, 1)], MODULATOR),
            ([(43, low), (53, 1)], b""),
            ([(43, low), (17, 500), (53, 2)], b""),
            ([(43, high), (17, 0), (53, 3)], b""),
        ],
        [([(54, 1), (53, 3)], MODULATOR)],
    )
    instruments = b"".join(
        struct.pack("<20sH", name, bag)
        for name, bag in zip((b"unused", b"pair", b"shared", b"EOI"), first, strict=True)
    )
    first, outer = zones(
        [([(41, 0)], b"")],
        [([(41, 2)], b"")],
        [([(51, 0)], b""), ([(41, 1)], b""), ([(41, 2)], MODULATOR)],
    )
    presets = b"".join(
        struct.pack("<20sHHH12s", name, program, bank, bag, b"")
        for (name, program, bank), bag in zip(
            (
                *((b"elsewhere", PIANO, 8), (b"harpsichord", HARPSICHORD, 0)),
                *((b"piano", PIANO, 0), (b"EOP", 0, 0)),
            ),
            first,
            strict=True,
        )
    )
    pdta = b"".join(
        chunk(name, body)
        for name, body in zip(
            (b"phdr", b"pbag", b"pmod", b"pgen", b"inst", b"ibag", b"imod", b"igen", b"shdr"),
            (presets, *outer, instruments, *inner, headers + b"EOS".ljust(46, b"\0")),
            strict=True,
        )
    )
    info = chunk(b"ifil", struct.pack("<HH", 2, 4)) + chunk(b"INAM", b"two\0")
    info += chunk(b"ICOP", b"mine\0\0") + chunk(b"ICMT", b"Free.\0")
    return chunk(
        b"RIFF",
        b"sfbk"
        + chunk(b"LIST", b"INFO" + info)
        + chunk(b"LIST", b"sdta" + chunk(b"smpl", smpl))
        + chunk(b"LIST", b"pdta" + pdta),
    )


def names(voices: tuple[Voice, ...] | tuple[Sample, ...]) -> list[str]:
    return [voice.name[:20].rstrip(b"\0").decode() for voice in voices]


def played(font: bytes, instrument: str, folder: Path) -> np.ndarray:
    path = folder / "font"
    path.write_bytes(font)
    notes = [SoundNote(0.1 * i, 0.3, pitch, 80) for i, pitch in enumerate((48, 57, 60, 61, 75))]
    return Renderer(path, RATE_HZ).render(notes, instrument, 1.0)


def same_sound(a: np.ndarray, b: np.ndarray) -> bool:
    """The synthesiser counts from the soundfont's beginning, and so rounds differently."""
    assert np.abs(a).max() > 0.05
    return float(np.abs(a - b).max()) < 1e-4


# The cut


def test_a_cut_holds_one_program_and_what_it_plays(tmp_path: Path) -> None:
    source = two_programs()
    cut = cut_soundfont(source, [Part(HARPSICHORD)])
    font, whole = read_soundfont(cut), read_soundfont(source)
    assert names(font.presets) == ["harpsichord"]
    assert names(font.instruments) == ["shared"]
    assert font.samples == (whole.samples[3],)
    assert font.instruments[0].zones[0].modulators == MODULATOR
    assert int.from_bytes(cut[4:8], "little") == len(cut) - 8
    assert same_sound(played(source, "harpsichord", tmp_path), played(cut, "harpsichord", tmp_path))
    with pytest.raises(ValueError, match="has no piano, program 0 of bank 0"):
        played(cut, "piano", tmp_path)


def test_stereo_pairs_stay_linked(tmp_path: Path) -> None:
    source = two_programs()
    cut = cut_soundfont(source, [Part(PIANO)])
    font = read_soundfont(cut)
    assert names(font.presets) == ["piano"]
    assert names(font.instruments) == ["pair", "shared"]
    assert names(font.samples) == ["left", "right", "tone"]  # the tone once, though two play it
    assert [(s.link, s.type) for s in font.samples] == [(1, 4), (0, 2), (0, 1)]
    assert len(font.instruments[0].zones) == 4 and len(font.presets[0].zones) == 3
    assert same_sound(played(source, "piano", tmp_path), played(cut, "piano", tmp_path))


def test_one_side_of_a_pair_is_a_mono_sample_in_the_middle() -> None:
    font = read_soundfont(cut_soundfont(two_programs(), [Part(PIANO, one_side=True)]))
    assert names(font.samples) == ["left", "tone"]
    assert [(s.link, s.type) for s in font.samples] == [(0, 1), (0, 1)]
    assert [zone.amount(17) for zone in font.instruments[0].zones] == [0, None, 0]


@pytest.mark.parametrize(
    ("keys", "kept"), [((60, 61), ["left", "right", "tone"]), ((61, 90), ["tone"])]
)
def test_keys_decide_which_samples_stay(keys: tuple[int, int], kept: list[str]) -> None:
    font = read_soundfont(cut_soundfont(two_programs(), [Part(PIANO, keys)]))
    assert names(font.samples) == kept
    assert font.instruments[0].zones[0].amount(53) is None  # the global zone
    for instrument in font.instruments:
        assert all(zone.amount(53) in (None, *range(len(kept))) for zone in instrument.zones)


def test_a_half_whose_other_half_is_not_kept_becomes_mono() -> None:
    source = read_soundfont(two_programs())
    pair = source.instruments[1]
    lonely = pair._replace(zones=pair.zones[:2])
    instruments = (source.instruments[0], lonely, source.instruments[2])
    font = Soundfont(source.info, source.presets, instruments, source.samples)
    cut = read_soundfont(cut_soundfont(write_soundfont(font), [Part(PIANO)]))
    assert names(cut.samples) == ["left", "tone"]
    assert [(s.link, s.type) for s in cut.samples] == [(0, 1), (0, 1)]


def test_info_stays_with_a_remark() -> None:
    source = two_programs()
    info = read_soundfont(cut_soundfont(source, [Part(PIANO, (48, 72), one_side=True)])).info
    assert info[b"INAM"] == b"two\0" and info[b"ICOP"] == b"mine\0\0"
    comment = info[b"ICMT"].decode()
    assert comment.startswith("Free.\n\nCut by ") and "0 (keys 48-72) (left samples)" in comment
    assert hashlib.sha256(source).hexdigest() in comment


def test_what_is_read_is_what_is_written() -> None:
    font = read_soundfont(two_programs())
    packed = Sample(b"packed".ljust(20, b"\0"), b"OggS.", (3, 9), bytes(6), 0, VORBIS | 1)
    mixed = Soundfont(font.info, font.presets, font.instruments, (packed, *font.samples, packed))
    assert read_soundfont(write_soundfont(mixed)) == mixed


# Refusals


def broken(find: bytes, put: bytes, *, at: int = 0) -> bytes:
    font = bytearray(two_programs())
    start = font.index(find) + at
    font[start : start + len(put)] = put
    return bytes(font)


@pytest.mark.parametrize(
    ("font", "complaint"),
    [
        (b"", "does not begin with RIFF"),
        (b"RIFF" + struct.pack("<I", 4) + b"WAVE", "does not begin with RIFF"),
        (two_programs()[:-100], "ends within b'LIST'"),
        (broken(b"igen", b"iron"), "it has no b'igen'"),
        (broken(b"phdr", struct.pack("<I", 37), at=4), "a broken soundfont"),
        (broken(b"pbag", struct.pack("<HH", 9, 0), at=8), "9 to 1 of 6 records"),
        (broken(b"shared", struct.pack("<H", 99), at=20), "1 to 99 of 6 records"),
        (broken(b"left", struct.pack("<I", 10**8), at=24), "4046 to 100000000 of 16184 records"),
        (broken(b"tone", struct.pack("<H", 0x8001), at=44), "sample 3 is in ROM"),
        (broken(struct.pack("<HH", 41, 1), struct.pack("<HH", 41, 7)), "plays its instrument 7"),
        (broken(struct.pack("<HH", 53, 2), struct.pack("<HH", 53, 7)), "plays its sample 7"),
        (broken(b"piano", struct.pack("<H", 1), at=20), "no program 0 in bank 0"),
    ],
)
def test_what_is_no_soundfont_is_refused(font: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        cut_soundfont(font, [Part(PIANO)])


def test_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "whole.sf2", tmp_path / "cut.sf2"
    monkeypatch.setattr("sys.argv", ["soundfont", str(source), str(out)])
    for contents, complaint in ((None, "No such file"), (b"RIFF", "not a soundfont")):
        if contents is not None:
            source.write_bytes(contents)
        with pytest.raises(SystemExit, match=f"whole.sf2: .*{complaint}"):
            soundfont.main()
    assert not out.exists()
    source.write_bytes(two_programs())
    monkeypatch.setattr(soundfont, "corpus_parts", lambda: (Part(HARPSICHORD),))
    soundfont.main()
    assert out.read_bytes() == cut_soundfont(source.read_bytes(), [Part(HARPSICHORD)])


# The bundled one


@pytest.fixture(scope="module")
def bundled() -> Soundfont:
    return read_soundfont(BUNDLED_SOUNDFONT.read_bytes())


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(BUNDLED_SOUNDFONT, RATE_HZ)


def test_the_bundled_soundfont_is_the_one_that_was_made(bundled: Soundfont) -> None:
    assert hashlib.sha256(BUNDLED_SOUNDFONT.read_bytes()).hexdigest() == BUNDLED_SHA256
    programs = [struct.unpack("<HH", preset.name[20:]) for preset in bundled.presets]
    assert programs == [(part.program, 0) for part in corpus_parts()]
    assert {program for program, _ in programs} == {i.program for i in INSTRUMENTS.values()}
    assert all(sample.data[:4] == b"OggS" for sample in bundled.samples)
    used = {z.amount(53) for voice in bundled.instruments for z in voice.zones} - {None}
    assert used == set(range(len(bundled.samples)))


def test_the_licence_lies_beside_and_inside_the_bundled_soundfont(bundled: Soundfont) -> None:
    beside = (BUNDLED_SOUNDFONT.parent / "COPYRIGHT").read_text(encoding="utf-8")
    inside = bundled.info[b"ICMT"].decode()
    for name in ("S. Christian Collins", "Michael Cowgill", "Frank Wen"):
        assert name in beside and name in inside
    permission = beside[beside.index("Permission is hereby granted") :].split()
    assert " ".join(permission) in " ".join(inside.split())


@pytest.mark.parametrize("instrument", list(INSTRUMENTS))
def test_the_bundled_soundfont_plays_every_key_at_every_level(
    renderer: Renderer, instrument: str
) -> None:
    player = INSTRUMENTS[instrument]
    for pitch in range(player.lowest, player.highest + 1):
        notes = [SoundNote(0.1 * i, 0.1, pitch, v) for i, (v, _) in enumerate(velocity_ends())]
        audio = renderer.render(notes, instrument, 0.1 * len(notes))
        assert np.isfinite(audio).all()
        for window in audio.reshape(len(notes), -1):
            assert np.abs(window).max() > 1e-3, pitch


def velocity_ends() -> list[tuple[int, str]]:
    return [(v, level) for level, (ends, _) in LEVELS.items() for v in ends]


def test_no_piece_leaves_the_keys_that_the_piano_keeps() -> None:
    """Of 12 shifts one octave apart some fits if a piece spans at most the range less 11."""
    piano = INSTRUMENTS["piano"]
    for piece in load_pieces():
        pitches = [note.pitch for part in piece.parts for note in part]
        assert max(pitches) - min(pitches) <= piano.highest - piano.lowest - 11


def test_an_sf3_is_cut_without_touching_its_streams(
    bundled: Soundfont, renderer: Renderer, tmp_path: Path
) -> None:
    path = tmp_path / "flute.sf3"
    path.write_bytes(cut_soundfont(BUNDLED_SOUNDFONT.read_bytes(), [Part(FLUTE)]))
    flute = read_soundfont(path.read_bytes())
    assert set(flute.samples) < set(bundled.samples)
    notes = [SoundNote(0.25 * i, 0.25, 62 + 4 * i, 60 + 10 * i) for i in range(6)]
    whole = renderer.render(notes, "flute", 1.5)
    assert same_sound(whole, Renderer(path, RATE_HZ).render(notes, "flute", 1.5))


def test_find_soundfont(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOUNDFONT_VARIABLE, raising=False)
    assert find_soundfont() == BUNDLED_SOUNDFONT
    with pytest.raises(FileNotFoundError, match=r"no soundfont at .*none\.sf2"):
        find_soundfont(tmp_path / "none.sf2")
    mine = tmp_path / "mine.sf2"
    mine.touch()
    monkeypatch.setenv(SOUNDFONT_VARIABLE, str(mine))
    assert find_soundfont() == mine
    monkeypatch.setenv(SOUNDFONT_VARIABLE, str(tmp_path / "none.sf2"))
    with pytest.raises(FileNotFoundError, match=rf"\${SOUNDFONT_VARIABLE}: no soundfont at"):
        find_soundfont()
    assert find_soundfont(mine) == mine


def test_the_corpus_builds_from_what_is_bundled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SOUNDFONT_VARIABLE, raising=False)
    build_corpus(tmp_path, hours=2 * 10 / 3600, workers=1)
    record = json.loads((tmp_path / "build.json").read_text())
    assert record["soundfont"] == BUNDLED_SOUNDFONT.name
    assert record["soundfont_sha256"] == BUNDLED_SHA256
    assert len(list((tmp_path / "clips").glob("*.flac"))) == 2
