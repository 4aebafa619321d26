"""Notes to mono audio through a soundfont (tinysoundfont), each instrument about equally loud."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from musiclm_engine.data.instruments import INSTRUMENTS

BUNDLED_SOUNDFONT = Path(__file__).parent / "soundfonts" / "musescore_general_eight.sf3"
SOUNDFONT_VARIABLE = "MUSICLM_SOUNDFONT"

MEDIUM_RMS = 0.07  # full scale 1: leaves 5 dB for loud clips and 12 dB for their peaks
PEAK_LIMIT = 0.98
REFERENCE_VELOCITY = 78
FADE_S = 0.1  # ten times the synthesiser's own fade

# Soundfont 2.04 generators: 8, initialFilterFc, in cents above 8.18 Hz; 48, initialAttenuation.
FILTER_CUTOFF = 8
SHUT_CENTS = 9000  # 1.5 kHz
OPEN_CENTS = 13_500  # 20 kHz: no filter
ATTENUATION = 48
ATTENUATION_APPLIED = 0.4


class SoundNote(NamedTuple):
    onset_s: float
    duration_s: float
    pitch: int
    velocity: int
    """MIDI, 1–127."""


def find_soundfont(path: str | Path | None = None) -> Path:
    """The soundfont to use: `path`, else $MUSICLM_SOUNDFONT, else the bundled one.

    Raises FileNotFoundError when the one that is named is not there.
    """
    for source, given in (
        ("", path),
        (f"${SOUNDFONT_VARIABLE}: ", os.environ.get(SOUNDFONT_VARIABLE)),
    ):
        if given:
            found = Path(given).expanduser()
            if not found.is_file():
                raise FileNotFoundError(f"{source}no soundfont at {found}")
            return found.absolute()
    return BUNDLED_SOUNDFONT


def import_tinysoundfont() -> Any:
    """The synthesiser's module; ModuleNotFoundError with the command that installs it."""
    try:
        import tinysoundfont
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rendering needs tinysoundfont: pip install --no-deps tinysoundfont==0.3.7 "
            "(--no-deps: it names pyaudio, which needs a compiler and PortAudio and serves only "
            "live playback)",
            name="tinysoundfont",
        ) from error
    return tinysoundfont


class Renderer:
    """A soundfont, loaded once, that plays one instrument at a time.

    A rendering depends only on its arguments, not on what was rendered before.
    """

    def __init__(self, soundfont: str | Path, sample_rate_hz: int) -> None:
        tinysoundfont = import_tinysoundfont()
        self.sample_rate_hz = sample_rate_hz
        self._synth = tinysoundfont.Synth(samplerate=sample_rate_hz)
        try:
            self._font = self._synth.sfload(_without_modulators(Path(soundfont).read_bytes()))
        except Exception as error:  # the binding raises what it likes
            raise ValueError(f"cannot read the soundfont {soundfont}: {error}") from error
        self._gains: dict[tuple[str, int], float] = {}

    def render(
        self,
        notes: Sequence[SoundNote],
        instrument: str,
        seconds: float,
        *,
        num_voices: int = 1,
        level_db: float = 0.0,
    ) -> NDArray[np.float32]:
        """Play notes on an instrument: (time,) float32 within ±0.98, cut at `seconds`.

        The gain depends on the instrument and on how many voices sound together, never on the clip,
        so that soft stays softer than loud; only a clip that would clip is turned down as a whole.
        """
        audio = self._raw(notes, instrument, seconds)
        audio *= self._gain(instrument, num_voices) * 10 ** (level_db / 20)
        peak = float(np.abs(audio).max(initial=0.0))
        if peak > PEAK_LIMIT:
            audio *= PEAK_LIMIT / peak
        return audio

    def _gain(self, instrument: str, num_voices: int) -> float:
        """Brings a walk around the instrument's middle at medium velocity to MEDIUM_RMS."""
        key = (instrument, num_voices)
        if key not in self._gains:
            chord = (0, -5, -8, -17)[:num_voices]
            middle = round(min(max(INSTRUMENTS[instrument].centre, 55), 76)) - chord[-1] // 2
            step_s = 0.25 if num_voices == 1 else 0.75  # a tune's quavers, a chorale's crotchets
            notes = [
                SoundNote(step_s * step, step_s, middle + rise + low, REFERENCE_VELOCITY)
                for step, rise in enumerate((-9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 6, 2, -2, -6))
                for low in chord
            ]
            audio = self._raw(notes, instrument, 14 * step_s)
            rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
            if rms < 1e-5:
                raise ValueError(f"the soundfont plays nothing as {instrument}")
            self._gains[key] = MEDIUM_RMS / rms
        return self._gains[key]

    def _raw(
        self, notes: Sequence[SoundNote], instrument: str, seconds: float
    ) -> NDArray[np.float32]:
        synth = self._synth
        synth.soundfonts[self._font].reset()  # fades what still sounds; the fade must not be heard
        synth.generate_simple(round(FADE_S * self.sample_rate_hz))
        program = INSTRUMENTS[instrument].program
        try:
            synth.program_select(0, self._font, 0, program)
        except RuntimeError:
            raise ValueError(
                f"the soundfont has no {instrument}, program {program} of bank 0"
            ) from None
        num_samples = round(seconds * self.sample_rate_hz)
        # At one instant, notes end before notes begin: a repeated pitch must sound again.
        events: list[tuple[int, int, int, int]] = []
        for note in notes:
            start = round(note.onset_s * self.sample_rate_hz)
            stop = round((note.onset_s + note.duration_s) * self.sample_rate_hz)
            events.append((start, 1, note.pitch, note.velocity))
            events.append((max(stop, start + 1), 0, note.pitch, 0))
        events.sort()
        stereo = np.zeros((num_samples, 2), dtype=np.float32)
        view = memoryview(stereo.data).cast("B")
        done = 0
        for when, begins, pitch, velocity in events:
            when = min(when, num_samples)
            if when > done:
                synth.generate_simple(when - done, buffer=view[done * 8 : when * 8])
                done = when
            if done >= num_samples:
                break
            if begins:
                synth.noteon(0, pitch, velocity)
            else:
                synth.noteoff(0, pitch)
        if done < num_samples:
            synth.generate_simple(num_samples - done, buffer=view[done * 8 :])
        return stereo.mean(axis=1, dtype=np.float32)


def _without_modulators(font: bytes) -> bytes:
    """The soundfont changed to sound right in tinysoundfont, which differs from others in two ways.

    It ignores modulators: a filter that starts nearly shut stays shut (MuseScore_General's piano, at
    300 Hz), so such filters are opened. And it takes attenuation at its word, where the synthesisers
    that soundfonts are tuned on apply 0.4 of it (E-mu's hardware; FluidSynth): within the piano,
    neighbouring notes differed by 16 dB.
    """
    out = bytearray(font)
    top, size = _chunk(font, 12, len(font), b"LIST", b"pdta")
    for name in (b"igen", b"pgen"):
        start, length = _chunk(font, top + 4, top + size, name)
        generators = np.frombuffer(
            out, dtype=[("kind", "<u2"), ("amount", "<i2")], offset=start, count=length // 4
        )
        kind, amount = generators["kind"], generators["amount"]
        if name == b"igen":
            amount[(kind == FILTER_CUTOFF) & (amount < SHUT_CENTS)] = OPEN_CENTS
        quieter = kind == ATTENUATION
        amount[quieter] = np.rint(amount[quieter] * ATTENUATION_APPLIED)
    return bytes(out)


def _chunk(data: bytes, start: int, stop: int, name: bytes, kind: bytes = b"") -> tuple[int, int]:
    """Start and size of a RIFF chunk's body. Odd sizes are not padded, as tinysoundfont reads them."""
    while start + 8 <= stop:
        size = struct.unpack_from("<I", data, start + 4)[0]
        if data[start : start + 4] == name and data[start + 8 : start + 8 + len(kind)] == kind:
            return start + 8, size
        start += 8 + size
    raise ValueError(f"no {name.decode()} {kind.decode()} chunk")
