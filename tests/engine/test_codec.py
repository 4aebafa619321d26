"""What every codec promises, and what SoundStream on the waveform adds: it is causal."""

import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from musiclm_engine.codec import SoundStream, SpectralSoundStream
from musiclm_engine.codec.losses import MultiScaleMelLoss
from musiclm_engine.components import load_component

SPECTRAL = {
    "dim": 16,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "codebook_dim": 8,
    "codebook_size": 32,
    "rq_num_quantizers": 3,
    "phase_iterations": 2,
}
WAVEFORM = {
    "channels": 4,
    "strides": (2, 4, 5),
    "codebook_dim": 8,
    "codebook_size": 32,
    "rq_num_quantizers": 3,
}


def build(kind, **changes):
    """A codec whose codebooks a batch of noise has filled, in evaluation mode."""
    torch.manual_seed(0)
    codec = kind(**{**(SPECTRAL if kind is SpectralSoundStream else WAVEFORM), **changes})
    codec.train()(0.3 * torch.randn(4, 16000))
    return codec.eval()


@pytest.fixture(scope="module", params=[SpectralSoundStream, SoundStream])
def codec(request):
    return build(request.param)


@pytest.fixture(scope="module")
def soundstream():
    return build(SoundStream)


@pytest.fixture
def noise():
    return 0.3 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("samples", [1, 2, 639, 640, 641, 5000])
def test_any_length_is_padded_to_whole_frames(codec, noise, samples):
    codes = codec.encode(noise[:, :samples])
    frames = -(-samples // codec.hop_length)
    assert codes.shape == (2, frames, codec.num_quantizers) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < codec.codebook_size
    audio = codec.decode(codes)
    assert audio.shape == (2, frames * codec.hop_length) and audio.dtype == torch.float32
    assert torch.isfinite(audio).all() and audio.abs().max() <= 1


def test_padding_is_silence(codec, noise):
    padded = torch.nn.functional.pad(noise[:, :5001], (0, -5001 % codec.hop_length))
    assert torch.equal(codec.encode(noise[:, :5001]), codec.encode(padded))


def test_a_row_alone_is_the_row_in_a_batch(codec, noise):
    codes = codec.encode(noise)
    assert torch.equal(codec.encode(noise[1:]), codes[1:])
    torch.testing.assert_close(codec.decode(codes[1:]), codec.decode(codes)[1:])


def test_a_prefix_of_levels_decodes(codec, noise):
    codes = codec.encode(noise)
    whole = codec.decode(codes)
    for levels in range(1, codec.num_quantizers + 1):
        audio = codec.decode(codes[:, :, :levels])
        assert audio.shape == whole.shape
        silent = codes.clone()
        silent[:, :, levels:] = -1
        assert torch.equal(audio, codec.decode(silent))
        assert torch.equal(audio, whole) == (levels == codec.num_quantizers)


def test_frame_rate(codec):
    assert codec.frame_rate_hz * codec.hop_length == codec.sample_rate_hz == 16000
    assert codec.hop_length == (640 if isinstance(codec, SpectralSoundStream) else 2 * 4 * 5)


def test_config_rebuilds_the_codec(codec, noise):
    again = type(codec).from_config(codec.config)
    again.load_state_dict(codec.state_dict())
    assert again.config == codec.config
    codes = codec.encode(noise)
    assert torch.equal(again.eval().encode(noise), codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))


@pytest.mark.parametrize("shape", [(16000,), (2, 0), (2, 1, 16000)])
def test_audio_of_another_shape_is_refused(codec, shape):
    for refuses in (codec.encode, codec):
        with pytest.raises(ValueError, match=r"audio is \(.*wanted \[batch, samples >= 1\]"):
            refuses(torch.zeros(shape))


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"codes are \(2, 3\)"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"codes are \(2, 3, 4\), wanted .*1\.\.3"),
        (torch.zeros(2, 3, 0, dtype=torch.int64), r"codes are \(2, 3, 0\)"),
        (torch.zeros(2, 0, 3, dtype=torch.int64), r"codes are \(2, 0, 3\)"),
        (torch.zeros(2, 3, 3, dtype=torch.int32), "codes are torch.int32"),
        (torch.full((2, 3, 3), 32), "codes span 32 to 32, wanted -1 to 31"),
    ],
)
def test_codes_it_does_not_speak_are_refused(codec, codes, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(codes)


def test_no_code_depends_on_later_samples(soundstream, noise):
    hop = soundstream.hop_length
    codes = soundstream.encode(noise)
    changed = noise.clone()
    changed[:, 100 * hop :] = -noise[:, 100 * hop :]
    after = soundstream.encode(changed)
    assert torch.equal(after[:, :100], codes[:, :100])
    assert not torch.equal(after[:, 100:], codes[:, 100:])


def test_a_prefix_encodes_to_a_prefix(soundstream, noise):
    codes = soundstream.encode(noise)
    assert torch.equal(soundstream.encode(noise[:, : 37 * soundstream.hop_length]), codes[:, :37])


def test_no_sample_depends_on_later_codes(soundstream, noise):
    codes = soundstream.encode(noise)
    changed = codes.clone()
    changed[:, 100:] = (codes[:, 100:] + 1) % soundstream.codebook_size
    first, second = soundstream.decode(codes), soundstream.decode(changed)
    seam = 100 * soundstream.hop_length
    assert torch.equal(first[:, :seam], second[:, :seam])
    # The very frame of a code sounds of it: no frame of delay is hidden anywhere.
    assert not torch.equal(first[:, seam : seam + 40], second[:, seam : seam + 40])


def test_the_bundled_codec_speaks_its_codes(tones):
    """Codes of a chord as they were when the stages learnt them."""
    codec = load_component("codec", Path(str(files("musiclm_engine") / "assets" / "codec")))
    assert codec.encode(tones(0.2, 220, 330, 550)[None]).tolist() == [
        [
            [73, 989, 452, 849],
            [787, 584, 955, 465],
            [787, 584, 187, 355],
            [787, 584, 292, 448],
            [287, 584, 15, 230],
        ]
    ]


def test_encoding_moves_no_codebook(codec, noise):
    for mode in (codec.train(), codec.eval()):
        before = {key: value.clone() for key, value in codec.state_dict().items()}
        codes = mode.encode(noise)
        assert (codes >= 0).all()  # no level is dropped in training either
        for key, value in codec.state_dict().items():
            assert torch.equal(before[key], value), key
    assert not codec.rq.training


OTHER_QUANTIZERS = {
    "groups": {"rq_groups": 2},
    "finite scalars": {
        "codebook_size": None,
        "use_finite_scalar_quantizer": True,
        "finite_scalar_quantizer_levels": [4, 4, 2],
        "rq_groups": 2,
    },
    "signs": {"use_lookup_free_quantizer": True, "codebook_dim": 10, "rq_groups": 2},
}


@pytest.mark.parametrize("name", OTHER_QUANTIZERS)
def test_other_quantizers(name, noise):
    if name != "groups":
        pytest.importorskip("vector_quantize_pytorch")
    codec = build(SoundStream, **OTHER_QUANTIZERS[name])
    assert codec.num_quantizers == 6 and codec.codebook_size == 32
    codes = codec.encode(noise)
    assert codes.shape == (2, 400, 6) and 0 <= codes.min() and codes.max() < 32
    quantized = codec.eval().rq(codec.encoder(noise[:, None]).transpose(1, 2))[0]
    audio = codec.decoder(quantized.transpose(1, 2))[:, 0].clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codes), audio, atol=1e-4, rtol=1e-4)
    # The first two are the first level of both groups.
    coarse = torch.cat([codes[:, :, :2], codes.new_full((2, 400, 4), -1)], 2)
    torch.testing.assert_close(codec.decode(codes[:, :, :2]), codec.decode(coarse))
    again = SoundStream.from_config(codec.config).eval()
    again.load_state_dict(codec.state_dict())
    assert torch.equal(again.encode(noise), codes)
    codec.train()(noise)["loss"].backward()
    assert codec.encoder[0].weight.grad.any()


def test_options_of_the_quantizer_that_exclude_each_other():
    scalars = {"use_finite_scalar_quantizer": True, "finite_scalar_quantizer_levels": (4, 4)}
    for options, message in (
        ({**scalars, "use_lookup_free_quantizer": True}, "both set"),
        ({**scalars, "codebook_size": 16}, "codebook_size is 16, wanted None"),
        ({"use_finite_scalar_quantizer": True}, "finite_scalar_quantizer_levels is None"),
        ({"finite_scalar_quantizer_levels": (4, 4)}, r"levels is \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SoundStream(channels=2, **options)


def test_the_other_quantizers_name_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    SoundStream(channels=2)
    with pytest.raises(ImportError, match="pip install vector-quantize-pytorch"):
        SoundStream(channels=2, use_lookup_free_quantizer=True)


@pytest.mark.parametrize("kind", [SpectralSoundStream, SoundStream])
def test_two_clips_are_overfitted(kind, tones):
    torch.manual_seed(0)
    codec = kind(**(SPECTRAL if kind is SpectralSoundStream else WAVEFORM)).train()
    clips = 0.06 * torch.stack([tones(0.2, 220, 330), tones(0.2, 523, 1046, 1500)])
    optimizer = torch.optim.Adam(codec.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        figures = codec(clips)
        assert figures["loss"].dim() == 0 and "commitment" in figures
        optimizer.zero_grad()
        figures["loss"].backward()
        optimizer.step()
        losses.append(figures["loss"].item())
    assert losses[-1] < 0.7 * losses[0]


def test_mel_loss_is_zero_for_equal_audio_and_grows(noise):
    loss = MultiScaleMelLoss(16000)
    assert loss(noise, noise) == 0
    near, far = loss(noise + 0.01, noise), loss(torch.zeros_like(noise), noise)
    assert 0 < near < far
