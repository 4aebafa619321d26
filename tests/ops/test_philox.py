import pytest
import torch

from musiclm_kernels.philox import WORD, philox_4x32, random_words, uniform


def words(*values):
    return tuple(torch.tensor(value) for value in values)


# Random123 1.14, tests/kat_vectors, "philox4x32 10"
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, wanted", KNOWN)
def test_known_answers(counter, key, wanted):
    assert tuple(int(word) for word in philox_4x32(words(*counter), words(*key))) == wanted


def test_same_numbers_as_triton():
    triton = pytest.importorskip("triton")
    import triton.language as tl

    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton was imported without its interpreter")

    @triton.jit
    def draw(offsets_ptr, uniforms_ptr, words_ptr, seed, N: tl.constexpr):
        lanes = tl.arange(0, N)
        offsets = tl.load(offsets_ptr + lanes)
        tl.store(uniforms_ptr + lanes, tl.rand(seed, offsets))
        tl.store(words_ptr + lanes, tl.randint(seed, offsets))

    near = torch.arange(100)
    offsets = torch.cat([near, near + 2**31 - 50, near + 2**32 - 50, near + 2**61])
    offsets = torch.cat([offsets, torch.arange(512 - len(offsets))])
    for seed in (0, 1, 2**31, 2**32 + 7, 2**63 - 1, -1, -(2**63)):
        uniforms = torch.full((512,), torch.nan)
        drawn = torch.zeros(512, dtype=torch.int32)
        draw[(1,)](offsets, uniforms, drawn, seed, 512)
        assert torch.equal(random_words(seed, offsets), drawn.to(torch.int64) & WORD)
        assert torch.equal(uniform(seed, offsets), uniforms)


def test_uniform_is_in_range_even():
    draws = uniform(3, torch.arange(1 << 16))
    assert draws.dtype == torch.float32
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, bins=64, min=0, max=1)
    expected = (1 << 16) / 64
    assert (counts - expected).square().sum() / expected < 120  # chi-square, 63 degrees: p < 1e-5


def test_extreme_words_give_uniforms_below_one(monkeypatch):
    extremes = torch.tensor([0, 2**31 - 1, 2**31, WORD])
    monkeypatch.setattr("musiclm_kernels.philox.random_words", lambda seed, offset: extremes)
    draws = uniform(0, extremes)
    assert draws.tolist()[0] == draws.tolist()[3] == 0.0
    assert 0.999 < draws.max() < 1.0


def test_seeds_broadcast():
    seeds, offsets = torch.tensor([[5], [2**40]]), torch.arange(3)
    rows = random_words(seeds, offsets)
    assert torch.equal(rows[0], random_words(5, offsets))
    assert torch.equal(rows[1], random_words(2**40, offsets))
