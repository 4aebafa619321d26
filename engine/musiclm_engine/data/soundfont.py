"""Cut a soundfont down to what the built-in corpus plays.

    python -m musiclm_engine.data.soundfont MuseScore_General_Lite.sf3 cut.sf3

makes the bundled one, the same bytes each time. Samples are copied as they are, never encoded again.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from musiclm_engine.data.instruments import INSTRUMENTS
from musiclm_engine.data.soundfont_file import (
    VORBIS,
    Sample,
    Soundfont,
    Voice,
    Zone,
    read_soundfont,
    write_soundfont,
)
from musiclm_engine.whole_file import whole_file

# Kinds of generators, and types of samples: SoundFont 2.04, sections 8.1.2 and 7.10.
PAN, INSTRUMENT_INDEX, KEY_RANGE, SAMPLE_INDEX = 17, 41, 43, 53
MONO, RIGHT, HALF_OF_A_PAIR = 1, 2, 2 | 4 | 8
ALL_KEYS = (0, 127)


class Part(NamedTuple):
    """What to keep of a soundfont: one program of bank 0."""

    program: int
    keys: tuple[int, int] = ALL_KEYS
    """The first and the last MIDI pitch that it must play; others may fall silent."""
    one_side: bool = False
    """Of each stereo pair of samples keep the left one, alone and in the middle."""


def corpus_parts() -> tuple[Part, ...]:
    """The instruments of the corpus, by program.

    The piano's samples, 15 MB, are cut to its range and, as the corpus is mono, to one of its two
    microphones: 5.4 MB. Those of the others, 4.0 MB together, stay.
    """
    piano = INSTRUMENTS["piano"]
    return tuple(
        Part(player.program, (piano.lowest, piano.highest), one_side=True)
        if player is piano
        else Part(player.program)
        for player in sorted(INSTRUMENTS.values(), key=lambda player: player.program)
    )


def cut_soundfont(font: bytes, parts: Sequence[Part]) -> bytes:
    """The soundfont with these programs alone: their instruments, their samples, and all of INFO.

    Raises ValueError for bytes that are not a soundfont, and for a program that it lacks.
    """
    whole = read_soundfont(font)
    cut = _Cut(whole)
    presets = tuple(cut.preset(part) for part in parts)
    comment = whole.info.get(b"ICMT", b"").rstrip(b"\0\n ")
    comment += (
        f"\n\n{_remark(parts)}\nSHA-256 of the whole: {hashlib.sha256(font).hexdigest()}\0".encode()
    )
    info = whole.info | {b"ICMT": comment}
    return write_soundfont(Soundfont(info, presets, tuple(cut.instruments), cut.samples()))


class _Cut:
    """Instruments and samples that the presets of a cut need, numbered in the order of first use."""

    def __init__(self, whole: Soundfont) -> None:
        self.whole = whole
        self.instruments: list[Voice] = []
        self._new_instruments: dict[tuple[int, Part], int] = {}
        self._new_samples: dict[tuple[int, bool], int] = {}

    def preset(self, part: Part) -> Voice:
        address = part.program.to_bytes(2, "little") + bytes(2)  # bank 0
        for preset in self.whole.presets:
            if preset.name[20:] == address:
                return preset._replace(zones=tuple(self._preset_zones(preset, part)))
        raise ValueError(f"the soundfont has no program {part.program} in bank 0")

    def _preset_zones(self, preset: Voice, part: Part) -> Iterable[Zone]:
        for zone, index in _reached(preset.zones, part.keys, INSTRUMENT_INDEX):
            if index is None:
                yield zone
                continue
            if index >= len(self.whole.instruments):
                raise ValueError(f"a broken soundfont: a preset plays its instrument {index}")
            key = (index, part)
            if key not in self._new_instruments:
                instrument = self.whole.instruments[index]
                zones = tuple(self._instrument_zones(instrument, part))
                self._new_instruments[key] = len(self.instruments)
                self.instruments.append(instrument._replace(zones=zones))
            yield _changed(zone, INSTRUMENT_INDEX, self._new_instruments[key])

    def _instrument_zones(self, instrument: Voice, part: Part) -> Iterable[Zone]:
        for zone, index in _reached(instrument.zones, part.keys, SAMPLE_INDEX):
            if part.one_side:
                zone = _changed(zone, PAN, 0)
            if index is None:
                yield zone
                continue
            if index >= len(self.whole.samples):
                raise ValueError(f"a broken soundfont: an instrument plays its sample {index}")
            if not (part.one_side and self.whole.samples[index].type & RIGHT):
                new = self._new_samples.setdefault((index, part.one_side), len(self._new_samples))
                yield _changed(zone, SAMPLE_INDEX, new)

    def samples(self) -> tuple[Sample, ...]:
        return tuple(self._linked(index, alone) for index, alone in self._new_samples)

    def _linked(self, index: int, alone: bool) -> Sample:
        """The sample, linked to its other half if that is kept too, and else a mono one."""
        sample = self.whole.samples[index]
        if not sample.type & HALF_OF_A_PAIR:
            return sample
        link = None if alone else self._new_samples.get((sample.link, False))
        if link is None or self.whole.samples[sample.link].link != index:
            return sample._replace(type=sample.type & VORBIS | MONO, link=0)
        return sample._replace(link=link)


def _reached(
    zones: Iterable[Zone], keys: tuple[int, int], target: int
) -> Iterable[tuple[Zone, int | None]]:
    """The zones that some of the keys reach, with what they play; first the global one, if any,
    which plays nothing and holds what the others do not say."""
    lowest, highest = ALL_KEYS
    for position, zone in enumerate(zones):
        span = zone.amount(KEY_RANGE)
        low, high = (lowest, highest) if span is None else (span & 255, span >> 8)
        plays = zone.amount(target)
        if plays is not None and low <= keys[1] and high >= keys[0]:
            yield zone, plays
        elif plays is None and position == 0:
            lowest, highest = low, high
            yield zone, None


def _changed(zone: Zone, kind: int, amount: int) -> Zone:
    generators = ((k, amount if k == kind else a) for k, a in zone.generators)
    return zone._replace(generators=tuple(generators))


def _remark(parts: Iterable[Part]) -> str:
    programs = ", ".join(
        str(part.program)
        + (f" (keys {part.keys[0]}-{part.keys[1]})" if part.keys != ALL_KEYS else "")
        + (" (left samples)" if part.one_side else "")
        for part in parts
    )
    return f"Cut by musiclm_engine.data.soundfont to programs of bank 0: {programs}."


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut a soundfont down to what the corpus plays.")
    parser.add_argument("source", type=Path, help="An .sf2 or .sf3 file.")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        cut = cut_soundfont(arguments.source.read_bytes(), corpus_parts())
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.source}: {error}")
    with whole_file(arguments.out) as unfinished:
        unfinished.write_bytes(cut)


if __name__ == "__main__":
    main()
