import pytest
import torch

from musiclm_engine.attention import DynamicPositionBias2d, cosine
from musiclm_engine.mulan import AudioSpectrogramTransformer, TextTransformer

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
    small = {"dim_head": 16, "heads": 2, "num_mels": 64}
    return AudioSpectrogramTransformer(32, 2, **small | arguments)


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
    whole = {"spec_aug_stretch_factor": 1.0, "spec_aug_freq_mask": 0, "spec_aug_time_mask": 0}
    tower = audio_tower(patch_dropout_prob=0.5, **whole)
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


@torch.no_grad()
def test_a_short_row_keeps_its_share_of_patches():
    tower = audio_tower(patch_dropout_prob=0.5, spec_aug_stretch_factor=1.0)
    masks = []
    tower.transformer.register_forward_pre_hook(
        lambda module, inputs, options: masks.append(options["key_mask"]), with_kwargs=True
    )
    tower(noise(3, 4 * SECOND), lengths=torch.tensor([4 * SECOND, SECOND, 1]))
    (mask,) = masks
    assert mask.sum(1).tolist() == [50, 14, 2]  # of 25, 7 and 1 columns of 4
    assert (mask.int().diff(dim=1) <= 0).all()  # padding comes last


def test_a_seed_may_be_a_number_or_a_tensor():
    tower = audio_tower(spec_aug_stretch_factor=1.0, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    audio = noise(2, SECOND)
    seeds = (7, torch.tensor(7), 8)
    first, same, other = (tower(audio, patch_dropout_seed=seed) for seed in seeds)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("lengths", [None, torch.tensor([SECOND, 9000])])
@pytest.mark.parametrize("augmented", [False, True])
def test_a_training_step_compiles_whole(lengths, augmented):
    whole = {"spec_aug_stretch_factor": 1.0, "spec_aug_freq_mask": 0, "spec_aug_time_mask": 0}
    tower = audio_tower(**{} if augmented else whole)
    audio = noise(2, SECOND)
    parameters = list(tower.parameters())

    def step(run):
        torch.manual_seed(5)
        out = run(audio, lengths=lengths)
        return out, *torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)

    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    for one, other in zip(step(compiled), step(tower), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_compiled_code_refuses_lengths_beyond_the_audio():
    compiled = torch.compile(audio_tower().eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="lengths"):
        compiled(noise(2, SECOND), lengths=torch.tensor([SECOND, SECOND + 1]))


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


@torch.no_grad()
def test_spectrograms_are_augmented_in_training_only():
    settings = {"spec_aug_stretch_factor": 0.7, "spec_aug_freq_mask": 5, "spec_aug_time_mask": 9}
    tower = audio_tower(patch_dropout_prob=0.0, **settings)
    augment = tower.spec_augment
    assert (augment.stretch_factor, augment.freq_mask, augment.time_mask) == (0.7, 5, 9)
    assert augment.floor == tower.log_mel.floor
    audio = noise(2, SECOND)
    assert not torch.equal(tower(audio), tower(audio))
    tower.eval()
    assert torch.equal(tower(audio), tower(audio))


@torch.no_grad()
def test_a_row_that_plays_faster_ends_sooner():
    """What a stretch leaves of a row is all that is attended to."""
    tower = audio_tower(patch_dropout_prob=0.0)
    audio = noise(2, SECOND)
    held = torch.tensor([40, 112])  # of 7 columns of 16 frames
    audio[0, 40 * 160 :] = 0
    tower.spec_augment.forward = lambda spectrogram, lengths: (spectrogram, held)
    embedded = tower(audio)
    torch.testing.assert_close(
        embedded[0], tower.eval()(audio, lengths=torch.tensor([6400, SECOND]))[0]
    )


def test_a_stored_tower_without_the_stretch_is_read():
    config = audio_tower().config
    assert config.pop("spec_aug_stretch_factor") == 0.8
    assert AudioSpectrogramTransformer.from_config(config).spec_augment.stretch_factor == 0.8


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
        ({"spec_aug_freq_mask": -1}, "freq_mask"),
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
