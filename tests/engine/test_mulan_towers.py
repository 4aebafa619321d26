import pytest
import torch

from musiclm_engine.attention import DynamicPositionBias2d, cosine
from musiclm_engine.mulan import AudioSpectrogramTransformer, TextTransformer
from musiclm_engine.mulan import audio_tower as audio_tower_module
from musiclm_engine.mulan.patch_position import sincos_positions
from musiclm_engine.mulan.spec_augment import mask_spans

SECOND = 16000


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are small: on a busy machine two threads wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def audio_tower(**arguments) -> AudioSpectrogramTransformer:
    torch.manual_seed(0)
    return AudioSpectrogramTransformer(32, 2, dim_head=16, heads=2, **arguments)


def text_tower(**arguments) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(32, 2, num_tokens=50, max_seq_len=12, dim_head=16, heads=2, **arguments)


def noise(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 159, 2560, 2561, 20000])
def test_a_padded_clip_embeds_as_it_does_alone(length):
    tower = audio_tower().eval()
    audio = noise(3, 2 * SECOND)
    lengths = torch.tensor([2 * SECOND, length, 5000])
    embedded = tower(audio, lengths=lengths)
    torch.testing.assert_close(embedded[1:2], tower(audio[1:2, :length]), atol=1e-5, rtol=1e-5)
    audio[1, length:] = float("nan")
    torch.testing.assert_close(tower(audio, lengths=lengths), embedded)


@torch.no_grad()
def test_full_lengths_are_no_lengths():
    tower = audio_tower().eval()
    audio = noise(2, SECOND)
    torch.testing.assert_close(tower(audio, lengths=torch.tensor([SECOND, SECOND])), tower(audio))


@torch.no_grad()
def test_rows_do_not_see_each_other():
    tower = audio_tower().eval()
    audio, order = noise(4, SECOND), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(tower(audio[order]), tower(audio)[order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_are_dropped_in_training_only():
    tower = audio_tower(patch_dropout_prob=0.5, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    audio = noise(2, SECOND)
    seen = []
    tower.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    first = tower(audio, patch_dropout_seed=1)
    assert torch.equal(first, tower(audio, patch_dropout_seed=1))
    assert not torch.equal(first, tower(audio, patch_dropout_seed=2))
    torch.manual_seed(3)
    drawn = tower(audio)
    assert not torch.equal(drawn, tower(audio))
    torch.manual_seed(3)
    assert torch.equal(drawn, tower(audio))
    tower.eval()
    assert torch.equal(tower(audio), tower(audio, patch_dropout_seed=1))
    assert [shape[1] for shape in seen[:-2]] == [14] * (len(seen) - 2)
    assert [shape[1] for shape in seen[-2:]] == [28, 28]


def test_a_short_row_keeps_a_patch_of_its_own_audio():
    tower = audio_tower(patch_dropout_prob=0.9)
    audio = noise(8, 4 * SECOND)
    lengths = torch.tensor([4 * SECOND] + [100] * 7)
    for seed in range(5):
        embedded = tower(audio, lengths=lengths, patch_dropout_seed=seed)
        embedded.square().sum().backward()
        assert torch.isfinite(embedded).all() and (embedded.norm(dim=1) > 1).all()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters())


def test_kept_patches_carry_their_own_indices_and_mask():
    x = torch.arange(40.0).view(1, 40, 1).repeat(16, 1, 1)
    mask = torch.arange(40) < torch.tensor([4] * 15 + [40])[:, None]
    kept, indices, kept_mask = audio_tower_module._drop(x, mask, 4, seed=0)
    assert torch.equal(kept[..., 0].long(), indices)
    assert torch.equal(kept_mask, mask.gather(1, indices))
    assert kept_mask.any(dim=1).all() and (kept_mask.sum(dim=1) == 1).any()


def test_the_bias_is_one_small_table_whose_gradient_reaches_the_mlp(monkeypatch):
    tables = []
    original = cosine.biased_attention

    def recording(*args, table, **kwargs):
        tables.append(table)
        return original(*args, table=table, **kwargs)

    monkeypatch.setattr(cosine, "biased_attention", recording)
    tower = audio_tower()
    tower(noise(2, SECOND)).square().sum().backward()
    assert len(tables) == 2 and tables[0] is tables[1]
    assert tables[0].shape == (2, (2 * 7 - 1) * (2 * 4 - 1)) and tables[0].dtype == torch.float32
    for parameter in tower.dynamic_pos_bias_mlp.parameters():
        assert parameter.grad is not None
    for name in ("0", "2", "4"):
        layer = tower.dynamic_pos_bias_mlp.get_submodule(name)
        assert layer.weight.grad.abs().sum() > 0


def test_the_table_holds_the_mlp_of_every_pair_of_patches():
    torch.manual_seed(0)
    num_columns, num_rows = 5, 3
    mlp = DynamicPositionBias2d(8, heads=2)
    bias = mlp.position_bias(num_columns, num_rows).dense()[0]  # [H, N, N]
    x = torch.arange(num_columns).repeat_interleave(num_rows)
    y = torch.arange(num_rows).repeat(num_columns)
    pairs = torch.stack((y[:, None] - y, x[:, None] - x), dim=-1).float()
    torch.testing.assert_close(bias, mlp(pairs))


def test_a_longer_grid_keeps_the_bias_of_the_offsets_it_shares():
    torch.manual_seed(0)
    mlp = DynamicPositionBias2d(8, heads=2)
    short, long = (mlp.position_bias(columns, 4).table.view(2, -1, 7) for columns in (3, 9))
    torch.testing.assert_close(long[:, 6:-6], short)


def test_positions_differ_everywhere():
    positions = sincos_positions(63, 4, 32)
    assert positions.shape == (63 * 4, 32)
    assert torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.1


def test_masked_spans_stay_in_the_clip_and_under_their_width():
    torch.manual_seed(0)
    spectrogram = torch.randn(64, 40, 16)
    extents = torch.full((64,), 20.0)
    masked = (mask_spans(spectrogram, 1, 8, extents) != spectrogram).all(2)  # [B, frames]
    assert masked.sum(1).max() <= 9 and masked.sum(1).float().mean() > 2
    assert not masked[:, 20:].any()
    assert mask_spans(spectrogram, 1, 0, extents) is spectrogram


def test_half_precision_embeds_alike():
    tower = audio_tower().eval()
    audio, lengths = noise(2, SECOND), torch.tensor([SECOND, 9000])
    with torch.no_grad():
        exact = tower(audio, lengths=lengths)
        with torch.autocast("cpu", torch.bfloat16):
            assert (tower(audio, lengths=lengths) - exact).abs().max() < 0.1
        assert (tower.bfloat16()(audio, lengths=lengths) - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dim": 30}, "dim=30"),
        ({"depth": 0}, "depth=0"),
        ({"num_mels": 65}, "num_mels=65"),
        ({"patch_dropout_prob": 1.0}, "patch_dropout_prob"),
        ({"spec_aug_freq_mask": 65}, "spec_aug_freq_mask"),
    ],
)
def test_audio_tower_refuses_bad_settings(arguments, named):
    with pytest.raises(ValueError, match=named):
        AudioSpectrogramTransformer(**({"dim": 32, "depth": 1} | arguments))


def test_audio_tower_refuses_bad_audio():
    tower = audio_tower()
    for audio in (torch.zeros(5), torch.zeros(2, 0), torch.zeros(2, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match="audio"):
            tower(audio)
    for lengths in (torch.tensor([1]), torch.tensor([1, 6]), torch.tensor([0, 1]), torch.ones(2)):
        with pytest.raises(ValueError, match="lengths"):
            tower(torch.zeros(2, 5), lengths=lengths)


@torch.no_grad()
def test_text_padding_changes_nothing():
    tower = text_tower().eval()
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    wider = torch.nn.functional.pad(ids, (0, 6))
    torch.testing.assert_close(tower(wider), tower(ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower(ids[1:, :1]), tower(ids)[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tower(torch.tensor([[6, 5, 7]])), tower(ids[:1]))


def test_text_tower_refuses():
    with pytest.raises(ValueError, match="at most 12"):
        text_tower()(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        text_tower()(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="pad_id"):
        text_tower(pad_id=50)
