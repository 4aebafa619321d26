"""Build the built-in corpus: excerpts of real scores, varied, captioned and rendered.

Clip i is a pure function of (seed, i), the soundfont and the clip's length: two builds give the same
bytes, a longer build begins with a shorter one, and a build that was cut off goes on where it was.
Captions are drawn by a generator of their own: however they change, the audio stays.
"""

import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from musiclm_engine.data.caption_words import moods_of
from musiclm_engine.data.captions import Caption, write_captions
from musiclm_engine.data.instruments import (
    CHORALE_INSTRUMENTS,
    CLIP_SECONDS,
    DYNAMICS,
    INSTRUMENTS,
    SAMPLE_RATE_HZ,
    TUNE_INSTRUMENTS,
)
from musiclm_engine.data.manifest import Clip, write_manifest
from musiclm_engine.data.render import Renderer, SoundNote, find_soundfont, import_tinysoundfont
from musiclm_engine.data.scores import Note, Piece, load_pieces, tonic_name
from musiclm_engine.whole_file import whole_file

MANIFEST_NAME = "manifest.jsonl"
RECORD_NAME = "build.json"
FORMAT = 3  # raise it when the same seed no longer gives the same bytes
SAME_AUDIO = (1, 2, 3)  # formats that differ in captions alone: their clips are kept
CLIPS_A_TASK = 8
MAX_SILENCE_S = 2.0
SILENCE_RMS = 1e-3  # -60 dB, over windows of 0.1 s
MAX_CLIPS = 1_000_000  # a clip's file name has six digits
MAX_TRIES = 100  # draws for one clip; a draw fails in about 1 of 100 (seed 0)

CHORALE_BPM = (54.0, 100.0)
TUNE_BPM = (80.0, 160.0)
SLOW_TUNE_BPM = (48.0, 90.0)
FAST_KINDS = ("reel", "jig", "hornpipe", "slip jig", "clog", "slide", "highland fling", "polka")
# A tune's tempo is bounded by how many notes a second can be told apart, and still be a tune.
MOST_NOTES_PER_S = 8.0
FEWEST_NOTES_PER_S = 1.2

# Velocity range, and a further gain: velocity alone spans 8 dB in this synthesiser.
LEVELS = {"soft": ((40, 52), -4.0), "medium": ((72, 84), 0.0), "loud": ((104, 118), 2.5)}


@dataclass(frozen=True)
class ClipPlan:
    """Everything about a clip but its sound."""

    piece: Piece
    facts: dict[str, Any]
    notes: tuple[SoundNote, ...]
    captions: tuple[Caption, ...]
    level_db: float


def build_corpus(
    out: Path,
    *,
    hours: float = 2.0,
    seed: int = 0,
    soundfont: Path | None = None,
    workers: int | None = None,
    clip_seconds: float = CLIP_SECONDS,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render `hours` of clips into `out` and return the manifest, `out/manifest.jsonl`.

    Clips already there are kept if they are whole, also where an older format captioned them: then
    only the manifest is new. `on_progress(done, total)` is called in this process. `workers` defaults
    to one process a core; 1 renders in this process. The manifest is written last.

    Raises ValueError for figures out of range and for a folder that holds a build with another seed,
    soundfont or clip length, FileNotFoundError for a soundfont that is not there,
    ModuleNotFoundError without tinysoundfont, OSError when `out` cannot be written; the clips written so far stay.
    """
    if not 0 < hours < math.inf or not 1 <= clip_seconds < math.inf or not sample_rate_hz >= 8000:
        raise ValueError(
            f"need finite hours > 0, finite clip_seconds >= 1 and sample_rate_hz >= 8000, got hours={hours}, "
            f"clip_seconds={clip_seconds}, sample_rate_hz={sample_rate_hz}"
        )
    if hours * 3600 / clip_seconds > MAX_CLIPS:
        raise ValueError(
            f"hours={hours} is more than {MAX_CLIPS} clips of {clip_seconds} s: "
            f"want at most {MAX_CLIPS * clip_seconds / 3600:.0f} hours"
        )
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out = Path(out).absolute()
    import_tinysoundfont()
    job = _Job(out, find_soundfont(soundfont), seed, clip_seconds, sample_rate_hz)
    total = max(1, math.ceil(hours * 3600 / clip_seconds - 1e-9))
    workers = min(workers or _num_cores(), total)
    _start_worker(job)  # a soundfont that cannot be read leaves no trace in the folder
    job.settle()
    clips: list[Clip] = []
    try:
        for clip in _make_clips(job, total, workers):
            clips.append(clip)
            if on_progress is not None:
                on_progress(len(clips), total)
        return write_manifest(out / MANIFEST_NAME, clips)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}. The clips finished so far stay; the same call goes on from them",
            str(error.filename or out),
        ) from error


def split_of(piece_id: str) -> str:
    """90 % train, 5 % validation, 5 % test, by piece. A tune that two collections hold under two
    names may be in two splits: evaluation leaves its held-out clips out."""
    bucket = int.from_bytes(hashlib.sha256(piece_id.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


# What a clip is


def plan_clip(seed: int, index: int, clip_seconds: float, attempt: int = 0) -> ClipPlan:
    """Draw clip `index`: piece, excerpt, key, tempo, instrument, level, and then captions.

    `attempt` draws again, for a clip that came out too quiet.
    """
    rng = random.Random(f"musiclm corpus {seed} {index} {attempt}")
    chorales, tunes = _repertoire()
    for _ in range(MAX_TRIES):
        is_chorale = rng.random() < 0.5
        piece = rng.choice(chorales if is_chorale else tunes)
        instrument = rng.choice(CHORALE_INSTRUMENTS if is_chorale else TUNE_INSTRUMENTS)
        tempo_bpm = round(_draw_tempo(piece, rng))
        quarter_s = 60 / tempo_bpm / piece.beat_quarters
        parts = _excerpt(piece, clip_seconds / quarter_s, rng)
        if _longest_rest(parts, clip_seconds / quarter_s) * quarter_s > MAX_SILENCE_S / 2:
            continue
        shift = _draw_transposition(parts, instrument, rng)
        dynamics = rng.choice(DYNAMICS)
        facts: dict[str, Any] = {
            "instrument": instrument,
            "family": INSTRUMENTS[instrument].family,
            "kind": piece.kind,
            "origin": piece.origin,
            "tempo_bpm": tempo_bpm,
            "metre": piece.metre,
            "key": None,
            "mode": piece.mode,
            "dynamics": dynamics,
            "transposition": shift,
        }
        if piece.tonic is not None and piece.mode is not None:
            facts["key"] = tonic_name(piece.tonic + shift, piece.mode)
        facts["mood"] = moods_of(facts)
        velocities, level_db = LEVELS[dynamics]
        notes = _perform(parts, quarter_s, clip_seconds, shift, velocities, rng)
        facts["notes"] = [
            [round(n.onset_s, 3), round(min(n.duration_s, clip_seconds - n.onset_s), 3), n.pitch]
            for n in notes
        ]
        words = random.Random(f"musiclm captions {seed} {index} {attempt}")
        return ClipPlan(piece, facts, notes, write_captions(facts, words), level_db)
    raise RuntimeError(f"no excerpt found for clip {index} of seed {seed}")  # the scores are broken


@cache
def _repertoire() -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    pieces = load_pieces()
    return (
        tuple(piece for piece in pieces if piece.is_chorale),
        tuple(piece for piece in pieces if not piece.is_chorale),
    )


def _draw_tempo(piece: Piece, rng: random.Random) -> float:
    if piece.is_chorale:
        return rng.uniform(*CHORALE_BPM)
    slow = rng.random() < (0.1 if piece.kind in FAST_KINDS else 0.5)
    bpm = rng.uniform(*(SLOW_TUNE_BPM if slow else TUNE_BPM))
    notes_per_beat = len(piece.parts[0]) * piece.beat_quarters / piece.quarters
    fastest = 60 * MOST_NOTES_PER_S / notes_per_beat
    slowest = 60 * FEWEST_NOTES_PER_S / notes_per_beat
    if not slowest <= bpm <= fastest:  # spread, rather than pile up at the limit
        low = max(slowest, SLOW_TUNE_BPM[0])
        bpm = rng.uniform(low, max(low, min(fastest, TUNE_BPM[1])))
    return bpm


def _excerpt(piece: Piece, num_quarters: float, rng: random.Random) -> list[list[Note]]:
    """`num_quarters` of the piece from a bar line (or its beginning), played again where it ends."""
    bar, pickup = piece.bar_quarters, piece.pickup_quarters
    # The piece with its pickup fills whole bars: the repeat begins where the last bar is full.
    period = math.ceil((piece.quarters - pickup) / bar - 1e-6) * bar
    num_starts = max(1, 1 + math.floor((piece.quarters - num_quarters - pickup) / bar))
    start = 0.0
    if rng.random() >= 0.4:
        start = pickup + bar * rng.randrange(num_starts)
    parts = []
    for part in piece.parts:
        notes = []
        for repeat in range(1 + math.ceil((start + num_quarters) / period)):
            for note in part:
                begin = note.onset_quarters + repeat * period - start
                end = begin + note.duration_quarters
                if end > 1e-6 and begin < num_quarters - 1e-6:
                    begin = max(begin, 0.0)
                    notes.append(Note(begin, end - begin, note.pitch))
        parts.append(notes)
    return parts


def _longest_rest(parts: list[list[Note]], num_quarters: float) -> float:
    """The longest time without a note, in quarters."""
    longest = end = 0.0
    for note in sorted(note for part in parts for note in part):
        longest = max(longest, note.onset_quarters - end)
        end = max(end, note.onset_quarters + note.duration_quarters)
    return max(longest, num_quarters - end)


def _draw_transposition(parts: list[list[Note]], instrument: str, rng: random.Random) -> int:
    """One of 12 keys, in the octave where most notes lie within the instrument's range."""
    pitches = [note.pitch for part in parts for note in part]
    low, high = min(pitches), max(pitches)
    player = INSTRUMENTS[instrument]
    turn = rng.randrange(12)

    def misfit(shift: int) -> tuple[float, float]:
        outside = max(0, player.lowest - low - shift) + max(0, high + shift - player.highest)
        # A four-part score keeps its octave where it can; a melody goes to the instrument's middle.
        far = abs(shift) if len(parts) > 1 else abs((low + high) / 2 + shift - player.centre)
        return outside, far

    return min((turn + 12 * octave for octave in range(-3, 3)), key=misfit)


def _perform(
    parts: list[list[Note]],
    quarter_s: float,
    clip_seconds: float,
    shift: int,
    velocities: tuple[int, int],
    rng: random.Random,
) -> tuple[SoundNote, ...]:
    """Notes in seconds, played by a person: a little early or late, a little uneven."""
    notes = []
    for part in parts:
        for note in part:
            onset_s = max(0.0, note.onset_quarters * quarter_s + rng.gauss(0.0, 0.006))
            length_s = note.duration_quarters * quarter_s * rng.uniform(0.92, 1.0)
            if onset_s < clip_seconds - 0.01:
                velocity = rng.randint(*velocities)
                notes.append(SoundNote(onset_s, max(length_s, 0.03), note.pitch + shift, velocity))
    return tuple(sorted(notes))


# Rendering, in this process or in many


@dataclass(frozen=True)
class _Job:
    out: Path
    soundfont: Path
    seed: int
    clip_seconds: float
    sample_rate_hz: int

    def settle(self) -> None:
        """Make the folders, and refuse those of a build that was not this one."""
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "It is a file, wanted a folder", str(self.out))
        (self.out / "clips").mkdir(parents=True, exist_ok=True)
        record = {
            "format": FORMAT,
            "seed": self.seed,
            "clip_seconds": self.clip_seconds,
            "sample_rate_hz": self.sample_rate_hz,
            "soundfont": self.soundfont.name,
            "soundfont_sha256": hashlib.sha256(self.soundfont.read_bytes()).hexdigest(),
        }
        path = self.out / RECORD_NAME
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not JSON ({error})") from None
            if not isinstance(found, dict):
                raise ValueError(f"{path}: not the record of a build, which is a JSON object")
            if found.get("format") in SAME_AUDIO:
                found["format"] = FORMAT
            has_clips = any((self.out / "clips").glob("*.flac"))  # none: its build failed early
            if found != record and has_clips:
                differ = [
                    f"{k} {found.get(k)!r}, now {v!r}"
                    for k, v in record.items()
                    if found.get(k) != v
                ]
                raise ValueError(
                    f"{self.out} holds another build ({'; '.join(differ)}): choose another folder"
                )
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1) + "\n")


_worker: tuple[_Job, Renderer]


def _start_worker(job: _Job) -> None:
    global _worker
    _worker = job, Renderer(job.soundfont, job.sample_rate_hz)


def _work(index: int) -> Clip:
    return _make_clip(*_worker, index)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _make_clips(job: _Job, total: int, workers: int) -> Iterator[Clip]:
    """The clips in order, from this process (`workers` 1) or from a pool."""
    if workers == 1:
        yield from map(_work, range(total))
        return
    forks = sys.platform == "linux"  # children then share the soundfont, loaded once before
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork" if forks else "spawn"),
        initializer=None if forks else partial(_start_worker, job),
    )
    try:
        yield from pool.map(_work, range(total), chunksize=CLIPS_A_TASK)
    finally:
        pool.shutdown(cancel_futures=True)


def _make_clip(job: _Job, renderer: Renderer, index: int) -> Clip:
    for attempt in range(MAX_TRIES):
        plan = plan_clip(job.seed, index, job.clip_seconds, attempt)
        path = job.out / "clips" / f"{index:06d}.flac"
        # A plan at risk is rendered again even if the file is there: it may be a later attempt's.
        at_risk = _longest_wait_s(plan.notes, job.clip_seconds) > MAX_SILENCE_S
        if not at_risk and _is_whole(path, job):
            break
        audio = renderer.render(
            plan.notes,
            plan.facts["instrument"],
            job.clip_seconds,
            num_voices=len(plan.piece.parts),
            level_db=plan.level_db,
        )
        if not (at_risk and _falls_silent(audio, job.sample_rate_hz)):
            packed = io.BytesIO()
            soundfile.write(packed, audio, job.sample_rate_hz, format="FLAC", subtype="PCM_16")
            with whole_file(path) as unfinished:
                unfinished.write_bytes(packed.getvalue())
            break
    else:
        raise RuntimeError(f"clip {index} of seed {job.seed} stays silent with {job.soundfont}")
    return Clip(
        audio=path,
        seconds=job.clip_seconds,
        captions=tuple(caption.text for caption in plan.captions),
        split=split_of(plan.piece.id),
        piece=plan.piece.id,
        facts=plan.facts,
        stated=tuple(caption.stated for caption in plan.captions),
    )


def _longest_wait_s(notes: tuple[SoundNote, ...], clip_seconds: float) -> float:
    """The longest time in which no note begins: what decays may fall silent in it."""
    onsets = [0.0, *(note.onset_s for note in notes), clip_seconds]
    return max(after - before for before, after in pairwise(onsets))


def _falls_silent(audio: NDArray[np.float32], sample_rate_hz: int) -> bool:
    window = sample_rate_hz // 10
    power = np.square(audio[: len(audio) // window * window].reshape(-1, window)).mean(axis=1)
    longest = run = 0
    for is_silent in power < SILENCE_RMS**2:
        run = run + 1 if is_silent else 0
        longest = max(longest, run)
    return longest * window / sample_rate_hz > MAX_SILENCE_S


def _is_whole(path: Path, job: _Job) -> bool:
    """Whether a clip is there and decodes to its full length."""
    try:
        audio, rate_hz = soundfile.read(path, dtype="int16")
    except (OSError, RuntimeError):  # RuntimeError: what soundfile raises for a broken file
        return False
    return rate_hz == job.sample_rate_hz and audio.shape == (
        round(job.clip_seconds * job.sample_rate_hz),
    )
