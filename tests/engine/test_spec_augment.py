"""SpecAugment: that it stretches as a phase vocoder does, masks as it says, and only then."""

import math

import pytest
import torch
from torch import Tensor

from musiclm_engine.audio import LogMel, SpecAugment, _torchaudio
from musiclm_engine.audio.spec_augment import time_stretch

SECOND = 16000
OFF = {"stretch_factor": 1.0, "freq_mask": 0, "time_mask": 0}


def ramps(num_rows: int, num_frames: int = 4) -> Tensor:
    """Rows whose magnitude is 1 + t, so that stretched ones tell their rate: 1 + t * rate."""
    magnitudes = 1 + torch.arange(num_frames, dtype=torch.float64)
    return 2 * magnitudes.log()[None, :, None].repeat(num_rows, 1, 1)


def rates_of(stretched: Tensor) -> Tensor:
    return (stretched[:, 1, 0] / 2).exp() - 1


def masks_of(num_rows: int, size: int, lengths: Tensor | None = None, **arguments) -> Tensor:
    """bool [num_rows, size, 16]: what was masked."""
    spectrogram = torch.randn(num_rows, size, 16)
    masked, _ = SpecAugment(**(OFF | arguments))(spectrogram, lengths)
    return masked != spectrogram


def is_uniform(draws: Tensor, num_values: int) -> bool:
    """Whether integers fill 0 .. num_values - 1 evenly: a chi-square, within 5 sigma."""
    counts = torch.bincount(draws, minlength=num_values).double()
    wanted = len(draws) / num_values
    statistic = float(((counts - wanted) ** 2 / wanted).sum())
    degrees = num_values - 1
    return len(counts) == num_values and statistic < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.93, 1.0, 1.25, 1.37, 2.0])
@pytest.mark.parametrize("length", [1, 2, 57])
def test_stretching_gives_the_magnitudes_of_a_phase_vocoder(rate, length):
    torch.manual_seed(0)
    num_frames, num_bins = 57, 33
    spectrum = torch.randn(1, num_bins, num_frames, dtype=torch.complex128)
    advance = torch.linspace(0, math.pi * 160, num_bins, dtype=torch.float64)[:, None]
    theirs = _torchaudio.functional.phase_vocoder(spectrum[:, :, :length], rate, advance)
    theirs = theirs.abs().transpose(1, 2)[:, :num_frames]

    power = spectrum.abs().square().log().transpose(1, 2)
    ours, lengths = time_stretch(
        power, torch.tensor([rate], dtype=torch.float64), torch.tensor([length]), floor=1e-30
    )
    assert ours.shape == power.shape and lengths.tolist() == [theirs.shape[1]]
    held = theirs.shape[1]
    torch.testing.assert_close((ours / 2).exp()[:, :held], theirs, rtol=1e-5, atol=1e-12)
    silence = torch.full_like(ours[:, held:], math.log(1e-30))
    torch.testing.assert_close(ours[:, held:], silence)


def test_a_row_is_stretched_as_it_would_be_alone():
    torch.manual_seed(0)
    spectrogram, rates = torch.randn(3, 40, 8), torch.tensor([0.8, 1.1, 1.7])
    lengths = torch.tensor([40, 25, 7])
    together, held = time_stretch(spectrogram, rates, lengths)
    assert held.tolist() == [40, 23, 5]
    for row in range(3):
        alone, _ = time_stretch(spectrogram[row : row + 1, : lengths[row]], rates[row : row + 1])
        frames = min(held[row], alone.shape[1])
        torch.testing.assert_close(together[row, :frames], alone[0, :frames])


@pytest.mark.parametrize("rate", [0.8, 1.25])
def test_a_tone_keeps_its_bin(rate):
    time = torch.arange(2 * SECOND) / SECOND
    spectrogram = LogMel()(torch.sin(2 * math.pi * 1000 * time)[None])
    stretched, lengths = time_stretch(spectrogram, torch.tensor([rate]))
    bins = stretched[0, 2 : int(lengths) - 2].argmax(dim=1)
    assert (bins == spectrogram[0, 100].argmax()).all()


@pytest.mark.parametrize("rate", [0.8, 1.0, 1.25])
def test_the_period_of_a_click_train_scales_by_one_over_the_rate(rate):
    audio = torch.zeros(1, 4 * SECOND)
    audio[0, 1600::3200] = 1  # every 20 frames
    stretched, lengths = time_stretch(LogMel()(audio), torch.tensor([rate]))
    loudness = stretched[0, : int(lengths)].mean(dim=1)
    before, here, after = loudness[:-2], loudness[1:-1], loudness[2:]
    clicks = ((here > before) & (here >= after) & (here > loudness.mean())).nonzero()[:, 0]
    assert len(clicks) >= 15
    period = (clicks[-1] - clicks[0]) / (len(clicks) - 1)
    assert float(period) == pytest.approx(20 / rate, rel=0.01)


def test_rates_are_uniform_between_the_factor_and_its_inverse():
    torch.manual_seed(0)
    augment = SpecAugment(**OFF | {"stretch_factor": 0.8})
    rates = rates_of(augment(ramps(4000))[0])
    assert 0.8 <= rates.min() < 0.801 and 1.249 < rates.max() <= 1.25
    assert is_uniform(((rates - 0.8) / 0.45 * 20).long(), 20)
    assert len(rates.unique()) == len(rates)


def test_lengths_follow_the_rates():
    torch.manual_seed(0)
    augment = SpecAugment(**OFF | {"stretch_factor": 0.5}, floor=1e-7)
    lengths = torch.full((200,), 30)
    stretched, held = augment(ramps(200, 40), lengths)
    assert held.dtype == torch.int64
    wanted = (lengths / rates_of(stretched)).ceil().clamp(max=40)
    assert torch.equal(held, wanted.long())
    assert (held < 30).any() and ((held > 30) & (held < 40)).any() and (held == 40).any()
    silent = stretched[torch.arange(40) >= held[:, None]]
    torch.testing.assert_close(silent, torch.full_like(silent, math.log(1e-7)))
    assert augment(ramps(2))[1].shape == (2,)


@pytest.mark.parametrize("mask", ["freq_mask", "time_mask"])
def test_widths_and_places_of_masks_are_uniform(mask):
    torch.manual_seed(0)
    widest = 7
    masked = masks_of(8000, 16, **{mask: widest})
    across = 1 if mask == "freq_mask" else 2
    spans = masked.any(dim=across)
    assert torch.equal(masked, spans.unsqueeze(across).expand_as(masked))  # whole frames, or bins
    widths, starts = spans.sum(dim=1), spans.int().argmax(dim=1)
    assert is_uniform(widths, widest + 1)
    for width in range(1, widest + 1):
        assert is_uniform(starts[widths == width], 16 - width + 1)
    positions = torch.arange(16)
    inside = (positions >= starts[:, None]) & (positions < (starts + widths)[:, None])
    assert torch.equal(spans, inside)  # one span each, nothing else


@pytest.mark.parametrize("mask", ["freq_mask", "time_mask"])
def test_several_masks_are_drawn_apart_and_take_no_more_than_half(mask):
    torch.manual_seed(0)
    masked = masks_of(500, 16, **{mask: 1000, f"num_{mask}s": 2})
    spans = masked.any(dim=1 if mask == "freq_mask" else 2).int()
    assert spans.sum(dim=1).max() == 8
    begins = spans[:, 0] + (spans.diff(dim=1) == 1).sum(dim=1)
    assert set(begins.tolist()) == {0, 1, 2}


def test_masks_stay_within_the_row_and_hold_its_own_mean():
    torch.manual_seed(0)
    spectrogram, lengths = torch.randn(300, 40, 16), torch.randint(2, 41, (300,))
    beyond = torch.arange(40) >= lengths[:, None]
    spectrogram[beyond] = 1e6
    augment = SpecAugment(stretch_factor=1.0, freq_mask=8, time_mask=30)
    augmented, held = augment(spectrogram, lengths)
    assert held is lengths
    assert torch.equal(augmented[beyond], spectrogram[beyond])
    changed = augmented != spectrogram
    for row, length in enumerate(lengths.tolist()):
        mean = spectrogram[row, :length].mean()
        values = augmented[row][changed[row]]
        torch.testing.assert_close(values, mean.expand_as(values))
        assert changed[row].all(dim=1).sum() <= length // 2
    assert changed.all(dim=2).sum(dim=1).gt(lengths // 4).any()
    assert not torch.equal(changed[0, : lengths[0]], changed[1, : lengths[0]])


def test_every_row_is_augmented_in_training_and_none_in_eval():
    torch.manual_seed(0)
    log_mel, augment = LogMel(), SpecAugment()
    spectrogram, lengths = log_mel(torch.randn(8, SECOND)), torch.full((8,), 90)
    augmented, _ = augment(spectrogram, lengths)
    assert augmented.shape == spectrogram.shape and augmented.dtype == torch.float32
    assert ((augmented - spectrogram).abs() > 0.1).flatten(1).float().mean(dim=1).min() > 0.2
    assert augment.floor == log_mel.floor
    augment.eval()
    same, also = augment(spectrogram, lengths)
    assert same is spectrogram and also is lengths
    assert augment.state_dict() == {}


def test_each_part_is_turned_off_by_itself():
    spectrogram = torch.randn(2, 10, 8)
    same, lengths = SpecAugment(**OFF)(spectrogram)
    assert same is spectrogram and lengths is None
    assert not masks_of(50, 16, freq_mask=7).all(dim=2).any()
    assert not masks_of(50, 16, time_mask=7).all(dim=1).any()


def test_the_seed_decides():
    def run() -> Tensor:
        torch.manual_seed(3)
        return SpecAugment()(ramps(4, 20))[0]

    assert torch.equal(run(), run())


def test_gradients():
    torch.manual_seed(0)
    spectrogram = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    rates, lengths = torch.tensor([0.7, 1.3], dtype=torch.float64), torch.tensor([7, 5])
    assert torch.autograd.gradcheck(lambda x: time_stretch(x, rates, lengths)[0], spectrogram)

    def augment(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return SpecAugment(freq_mask=2, time_mask=3)(x, lengths)[0]

    assert torch.autograd.gradcheck(augment, spectrogram)


@pytest.mark.parametrize("lengths", [None, torch.tensor([30, 17])])
def test_compiles_whole(lengths):
    augment = SpecAugment()
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    spectrogram = torch.randn(2, 30, 16)
    torch.manual_seed(1)
    wanted = augment(spectrogram, lengths)
    torch.manual_seed(1)
    for ours, theirs in zip(compiled(spectrogram, lengths), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_runs_on_the_device_of_its_input_and_reads_no_value():
    """Tensors on "meta" have no values: reading one, or mixing in one of the host, is an error."""
    spectrogram = torch.empty(2, 30, 16, device="meta")
    for lengths in (None, torch.empty(2, dtype=torch.int64, device="meta")):
        augmented, held = SpecAugment()(spectrogram, lengths)
        assert augmented.device.type == held.device.type == "meta"


@pytest.mark.parametrize(
    "arguments",
    [
        {"stretch_factor": 0.0},
        {"stretch_factor": 1.25},
        {"freq_mask": -1},
        {"time_mask": -1},
        {"num_freq_masks": 0},
        {"num_time_masks": 0},
        {"floor": 0.0},
    ],
)
def test_refuses_bad_settings(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SpecAugment(**arguments)


def test_refuses_bad_input():
    augment = SpecAugment()
    for spectrogram in (torch.zeros(4, 4), torch.zeros(1, 4, 4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="spectrogram"):
            augment(spectrogram)
    for lengths in (torch.tensor([1]), torch.ones(2), torch.ones(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="lengths"):
            augment(torch.zeros(2, 4, 4), lengths)
