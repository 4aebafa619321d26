"""How the reader of tempi is trained: on captions and the tempi of their clips, no audio."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_engine.audiolm.beat_clock import tempo_tokens
from musiclm_engine.data.manifest import Clip
from musiclm_engine.mulan import TextTransformer, train_caption_tokenizer
from musiclm_engine.tempo_reader import TempoReader
from musiclm_engine.training.config import table
from musiclm_engine.training.facts import tempi_of
from musiclm_engine.training.loop import Recipe
from musiclm_engine.training.workplace import VALIDATION_BATCHES, Workplace

NUMBER = re.compile(r"\d+")
ROUNDED = 0.03  # how far captions may round a tempo: ours do by 2 %
RESTATED_SHARE = 0.5  # of captions with a tempo in numbers
USUAL_BPM = (40, 240)  # what people ask for; a fifth of what is restated is any number
ANY_NUMBER = (1, 2000)
ANY_SHARE = 0.2
STRAY_SHARE = 0.25  # of captions that get a number that is no tempo
STRAYS_AHEAD = (
    "opus {}:",
    "no. {},",
    "in the year {}",
    "{} seconds of",
    "{}-bar",
    "take {},",
    "{}",
)
STRAYS_BEHIND = ("from {}", ", opus {}", ", version {}", "for {} players", "({})", "of {} bars")
WITHIN = 2  # tokens: 3.5 %, where judges of tempo allow 4


@dataclass(frozen=True)
class Draw:
    """What a batch is made of.

    Attributes:
        captions: B.
        bpm: tempi of their clips.
        stated: whether a caption tells its tempo as a number; None where that is not known.
    """

    captions: list[str]
    bpm: list[float]
    stated: list[bool | None]


def tempo_recipe(place: Workplace) -> Recipe:
    """Cross-entropy of clips' tempi, given one of their captions.

    In half of the training captions that have a tempo in numbers another number is put in its
    place: so numbers are read whatever the words beside them, and one that no clip is as slow or
    as fast as means the slowest or fastest there is. A quarter of all captions get a number that
    is no tempo, as prompts have and captions do not.
    """
    settings = table(place.config, "tempo_reader")
    clips = {split: place.clips(split) for split in ("train", "validation")}
    tempi = {split: tempi_of(some) for split, some in clips.items()}
    slowest, fastest = min(tempi["train"]), max(tempi["train"])
    tokenizer = train_caption_tokenizer(
        (caption for clip in clips["train"] for caption in clip.captions),
        settings["vocab_size"],
        splits_digits=True,
    )
    model = TempoReader(
        TextTransformer(num_tokens=tokenizer.get_vocab_size(), **settings["text"]),
        tokenizer=tokenizer,
    )

    def batch(split: str, step: int) -> Draw:
        random = np.random.default_rng((place.seed, step))
        draw = _draw(clips[split], tempi[split], settings["batch_size"], random)
        return _with_strays(_restated(draw, random), random) if split == "train" else draw

    def losses(step: int) -> dict[str, Tensor]:
        draw = batch("train", step)
        wanted = tempo_tokens(torch.tensor(draw.bpm).clamp(slowest, fastest))
        wanted = wanted.to(place.device, non_blocking=True)
        return {"loss": F.cross_entropy(model(draw.captions).float(), wanted)}

    def validation() -> dict[str, float]:
        found: list[Tensor] = []
        draws = [batch("validation", step) for step in range(VALIDATION_BATCHES)]
        for draw in draws:
            found.append(model(draw.captions).float().cpu())
        logits = torch.cat(found)
        wanted = tempo_tokens(torch.tensor([bpm for draw in draws for bpm in draw.bpm]))
        figures = {"loss": F.cross_entropy(logits, wanted).item()}
        stated = torch.tensor([said is True for draw in draws for said in draw.stated])
        if stated.any():  # how many of the stated tempi are read
            right = (logits.argmax(-1) - wanted).abs() <= WITHIN
            figures["read"] = right[stated].float().mean().item()
        return figures

    return Recipe(model, losses, validation)


def _draw(
    clips: Sequence[Clip], tempi: Sequence[float], size: int, random: np.random.Generator
) -> Draw:
    rows = random.integers(len(clips), size=size)
    some = [clips[row] for row in rows]
    chosen = random.integers([len(clip.captions) for clip in some])
    return Draw(
        captions=[clip.captions[n] for clip, n in zip(some, chosen, strict=True)],
        bpm=[tempi[row] for row in rows],
        stated=[
            "tempo_bpm" in clip.stated[n] if any(clip.stated) else None
            for clip, n in zip(some, chosen, strict=True)
        ],
    )


def _restated(draw: Draw, random: np.random.Generator) -> Draw:
    """The same with other tempi in some of the captions that have theirs in numbers: those with one
    number near it, but for those that are known to state none."""
    captions, bpm = list(draw.captions), list(draw.bpm)
    size = len(bpm)
    usual, any_number = (
        _log_uniform(USUAL_BPM, size, random),
        _log_uniform(ANY_NUMBER, size, random),
    )
    others = np.where(random.random(size) < ANY_SHARE, any_number, usual).round()
    for row in np.flatnonzero(random.random(size) < RESTATED_SHARE):
        near = [
            number
            for number in NUMBER.finditer(captions[row])
            if abs(float(number[0]) / bpm[row] - 1) <= ROUNDED
        ]
        if len(near) == 1 and draw.stated[row] is not False:
            before, after = captions[row][: near[0].start()], captions[row][near[0].end() :]
            captions[row] = f"{before}{others[row]:.0f}{after}"
            bpm[row] = float(others[row])
    return Draw(captions, bpm, draw.stated)


def _with_strays(draw: Draw, random: np.random.Generator) -> Draw:
    """The same with a number that is no tempo ahead of some captions or behind them."""
    captions = list(draw.captions)
    numbers = _log_uniform(ANY_NUMBER, len(captions), random)
    for row in np.flatnonzero(random.random(len(captions)) < STRAY_SHARE):
        is_ahead = random.random() < 0.5
        stray = random.choice(STRAYS_AHEAD if is_ahead else STRAYS_BEHIND)
        stray = stray.format(round(numbers[row]))
        captions[row] = f"{stray} {captions[row]}" if is_ahead else f"{captions[row]} {stray}"
    return Draw(captions, draw.bpm, draw.stated)


def _log_uniform(limits: tuple[int, int], size: int, random: np.random.Generator) -> np.ndarray:
    """As many of each octave."""
    lowest, highest = np.log(limits)
    return np.exp(random.uniform(lowest, highest, size=size))
