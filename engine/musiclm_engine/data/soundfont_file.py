"""SoundFont 2.04 files (.sf2), and .sf3, whose samples are Ogg Vorbis streams: read, and write.

What a synthesiser only reads through indices is taken apart here, so that presets, instruments and
samples can be left out or put in; all else stays as bytes.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

# Preset: name, program, bank; first zone; rest. Instrument: name; first zone; nothing.
PRESET, INSTRUMENT = "<24sH12s", "<20sH0s"
PAIR = "<HH"  # a zone's first generator and modulator; a generator's kind and amount
MODULATOR_BYTES = 10
SAMPLE = "<20sIIII6sHH"  # name, start, end, loop start, loop end, rate and tuning, link, type
VORBIS, ROM = 0x10, 0x8000  # in a sample's type
GUARD = bytes(2 * 46)  # zeros that follow a plain sample


class Zone(NamedTuple):
    generators: tuple[tuple[int, int], ...]
    """Kind and amount, unsigned."""
    modulators: bytes

    def amount(self, kind: int) -> int | None:
        """The last one counts."""
        return next((a for found, a in reversed(self.generators) if found == kind), None)


class Voice(NamedTuple):
    """A preset, whose zones name instruments, or an instrument, whose zones name samples."""

    name: bytes
    """20 bytes; a preset's program and bank follow, 2 bytes each."""
    rest: bytes
    zones: tuple[Zone, ...]


class Sample(NamedTuple):
    name: bytes
    data: bytes
    """16-bit numbers, or an Ogg Vorbis stream."""
    loop: tuple[int, int]
    """In samples from this one's beginning."""
    rate_and_tuning: bytes
    link: int
    """The index of a stereo pair's other half."""
    type: int


@dataclass(frozen=True)
class Soundfont:
    info: dict[bytes, bytes]
    presets: tuple[Voice, ...]
    instruments: tuple[Voice, ...]
    samples: tuple[Sample, ...]


def read_soundfont(font: bytes) -> Soundfont:
    """Raises ValueError for bytes that are not a soundfont, or not the whole of one."""
    if font[:4] != b"RIFF" or font[8:12] != b"sfbk":
        raise ValueError("not a soundfont: it does not begin with RIFF and sfbk")
    try:
        lists = _chunks(font[12:])
        sdta, pdta = _chunks(lists[b"sdta"]), _chunks(lists[b"pdta"])
        if b"sm24" in sdta:
            raise ValueError("a soundfont of 24-bit samples, which are not read")
        return Soundfont(
            _chunks(lists[b"INFO"]),
            _voices(PRESET, *(pdta[name] for name in (b"phdr", b"pbag", b"pmod", b"pgen"))),
            _voices(INSTRUMENT, *(pdta[name] for name in (b"inst", b"ibag", b"imod", b"igen"))),
            _samples(sdta[b"smpl"], pdta[b"shdr"]),
        )
    except KeyError as error:
        raise ValueError(f"a broken soundfont: it has no {error}") from None
    except struct.error as error:
        raise ValueError(f"a broken soundfont: {error}") from None


def write_soundfont(font: Soundfont) -> bytes:
    smpl, headers = _packed_samples(font.samples)
    pdta = (
        _packed_voices(PRESET, font.presets, b"EOP", (b"phdr", b"pbag", b"pmod", b"pgen"))
        + _packed_voices(INSTRUMENT, font.instruments, b"EOI", (b"inst", b"ibag", b"imod", b"igen"))
        + _chunk(b"shdr", headers)
    )
    info = b"".join(_chunk(name, body) for name, body in font.info.items())
    return _chunk(
        b"RIFF",
        b"sfbk"
        + _chunk(b"LIST", b"INFO" + info)
        + _chunk(b"LIST", b"sdta" + _chunk(b"smpl", smpl))
        + _chunk(b"LIST", b"pdta" + pdta),
    )


def _voices(
    form: str, heads: bytes, bags: bytes, modulators: bytes, generators: bytes
) -> tuple[Voice, ...]:
    """Each record's zones end where the next's begin; the last record only ends."""
    edges = list(struct.iter_unpack(PAIR, bags))
    pairs = list(struct.iter_unpack(PAIR, generators))

    def zone(index: int) -> Zone:
        (generator, modulator), (generator_end, modulator_end) = edges[index : index + 2]
        _check_order(generator, generator_end, len(pairs))
        _check_order(modulator, modulator_end, len(modulators) // MODULATOR_BYTES)
        return Zone(
            tuple((kind, amount) for kind, amount in pairs[generator:generator_end]),
            modulators[modulator * MODULATOR_BYTES : modulator_end * MODULATOR_BYTES],
        )

    found = []
    for (name, first, rest), (_, end, _) in pairwise(struct.iter_unpack(form, heads)):
        _check_order(first, end, len(edges) - 1)
        found.append(Voice(name, rest, tuple(zone(index) for index in range(first, end))))
    return tuple(found)


def _packed_voices(
    form: str, voices: Iterable[Voice], end: bytes, chunk_names: tuple[bytes, bytes, bytes, bytes]
) -> bytes:
    heads, bags, modulators, generators = bytearray(), bytearray(), bytearray(), bytearray()

    def mark() -> bytes:
        return struct.pack(PAIR, len(generators) // 4, len(modulators) // MODULATOR_BYTES)

    for voice in voices:
        heads += struct.pack(form, voice.name, len(bags) // 4, voice.rest)
        for zone in voice.zones:
            bags += mark()
            modulators += zone.modulators
            generators += b"".join(struct.pack(PAIR, *generator) for generator in zone.generators)
    heads += struct.pack(form, end, len(bags) // 4, b"")
    bags += mark()
    bodies = (heads, bags, modulators + bytes(MODULATOR_BYTES), generators + bytes(4))
    return b"".join(
        _chunk(name, bytes(body)) for name, body in zip(chunk_names, bodies, strict=True)
    )


def _samples(smpl: bytes, headers: bytes) -> tuple[Sample, ...]:
    found: list[Sample] = []
    for name, start, end, loop_start, loop_end, tuning, link, kind in list(
        struct.iter_unpack(SAMPLE, headers)
    )[:-1]:
        if kind & ROM:
            raise ValueError(f"a soundfont whose sample {len(found)} is in ROM, not in the file")
        if kind & VORBIS:  # positions count bytes, and loops begin with the sample
            _check_order(start, end, len(smpl))
            data, loop = smpl[start:end], (loop_start, loop_end)
        else:
            _check_order(start, end, len(smpl) // 2)
            data = smpl[2 * start : 2 * end]
            loop = max(loop_start - start, 0), max(loop_end - start, 0)  # no loop may be 0 to 0
        found.append(Sample(name, data, loop, tuning, link, kind))
    return tuple(found)


def _packed_samples(samples: Iterable[Sample]) -> tuple[bytes, bytes]:
    smpl, headers = bytearray(), bytearray()
    for name, data, (loop_start, loop_end), tuning, link, kind in samples:
        if not kind & VORBIS:
            smpl += bytes(len(smpl) % 2)
        unit, first_frame = (1, 0) if kind & VORBIS else (2, len(smpl) // 2)
        headers += struct.pack(
            SAMPLE,
            *(name, len(smpl) // unit, (len(smpl) + len(data)) // unit),
            *(loop_start + first_frame, loop_end + first_frame, tuning, link, kind),
        )
        smpl += data if kind & VORBIS else data + GUARD
    headers += struct.pack(SAMPLE, b"EOS", 0, 0, 0, 0, b"", 0, 0)
    return bytes(smpl), bytes(headers)


def _check_order(first: int, end: int, size: int) -> None:
    if not first <= end <= size:
        raise ValueError(f"a broken soundfont: {first} to {end} of {size} records")


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """The bodies of RIFF chunks by name; a LIST's by its kind. Odd sizes are not padded in SF3."""
    found = {}
    start = 0
    while start < len(data):
        name, size = struct.unpack_from("<4sI", data, start)
        body = data[start + 8 : start + 8 + size]
        if len(body) < size:
            raise ValueError(f"a broken soundfont: it ends within {name!r}")
        name, body = (body[:4], body[4:]) if name == b"LIST" else (name, body)
        found[name] = body
        start += 8 + size
    return found


def _chunk(name: bytes, body: bytes) -> bytes:
    """Of even size, so that readers that pad odd ones and readers that do not agree."""
    padded = body + bytes(len(body) % 2)
    return name + struct.pack("<I", len(padded)) + padded
