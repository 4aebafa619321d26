"""The instruments of the built-in corpus: General MIDI program, range, and what people call them."""

from dataclasses import dataclass

SAMPLE_RATE_HZ = 16_000
CLIP_SECONDS = 10.0


@dataclass(frozen=True)
class Instrument:
    name: str
    """The label in a clip's facts."""
    program: int
    """General MIDI program, 0-based."""
    lowest: int
    highest: int
    """MIDI pitches between which the instrument sounds like itself."""
    words: tuple[str, ...]
    """What captions call it."""
    family: str
    """`keyboard`, `bowed strings`, `plucked strings`, `woodwind` or `voices`."""

    @property
    def centre(self) -> float:
        return (self.lowest + self.highest) / 2


KEYBOARD, BOWED, PLUCKED = "keyboard", "bowed strings", "plucked strings"
INSTRUMENTS: dict[str, Instrument] = {
    instrument.name: instrument
    for instrument in (
        Instrument("church organ", 19, 36, 88, ("church organ", "organ", "pipe organ"), KEYBOARD),
        Instrument("piano", 0, 36, 90, ("piano", "grand piano"), KEYBOARD),
        Instrument("harpsichord", 6, 36, 86, ("harpsichord",), KEYBOARD),
        Instrument(
            "strings", 48, 36, 88, ("strings", "string ensemble", "string orchestra"), BOWED
        ),
        Instrument("choir", 52, 38, 82, ("choir", "voices", "choral voices", "chorus"), "voices"),
        Instrument("flute", 73, 60, 92, ("flute",), "woodwind"),
        Instrument("violin", 40, 55, 91, ("violin", "fiddle"), BOWED),
        Instrument(
            "guitar",
            24,
            48,
            80,
            (
                "guitar",
                "guitar",
                "nylon guitar",
                "classical guitar",
                "acoustic guitar",
                "nylon-string guitar",
                "Spanish guitar",
            ),
            PLUCKED,
        ),
    )
}
CHORALE_INSTRUMENTS = ("church organ", "piano", "harpsichord", "strings", "choir")
# The last is listed once among five that are listed twice: melodies on an organ are rarer.
TUNE_INSTRUMENTS = ("flute", "violin", "guitar", "piano", "harpsichord") * 2 + ("church organ",)
DYNAMICS = ("soft", "medium", "loud")
