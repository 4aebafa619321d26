import itertools
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from musiclm_engine.components import load_component
from musiclm_engine.mulan import MuLaNEmbedQuantizer


def embeddings(num_rows: int = 600, dim: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(num_rows, dim, generator=generator), dim=1)


@pytest.fixture(scope="module")
def quantizer() -> MuLaNEmbedQuantizer:
    quantizer = MuLaNEmbedQuantizer(16, num_quantizers=4, codebook_size=32)
    quantizer.fit(embeddings(), seed=0)
    return quantizer


def test_each_level_brings_the_sum_closer(quantizer):
    codes = quantizer.encode(embeddings())
    assert codes.shape == (600, 4) and codes.dtype == torch.int64
    errors = []
    for num_levels in range(5):
        part = codes.clone()
        part[:, num_levels:] = -1
        errors.append((quantizer.decode(part) - embeddings()).square().sum(1).mean().item())
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(errors))


def test_every_code_is_used(quantizer):
    codes = quantizer.encode(embeddings())
    assert all(len(codes[:, level].unique()) >= 30 for level in range(4))


def test_clusters_are_found():
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn(4, 16, generator=generator)
    rows = centres.repeat(50, 1) + 0.01 * torch.randn(200, 16, generator=generator)
    quantizer = MuLaNEmbedQuantizer(16, num_quantizers=1, codebook_size=8)
    quantizer.fit(rows, seed=0)
    assert (quantizer.decode(quantizer.encode(rows)) - rows).abs().max() < 0.1


def test_a_seed_fixes_the_codebooks(quantizer):
    again, other = (MuLaNEmbedQuantizer(16, 4, 32) for _ in range(2))
    again.fit(embeddings(), seed=0)
    other.fit(embeddings(), seed=1)
    assert torch.equal(again.codebooks, quantizer.codebooks)
    assert not torch.equal(other.codebooks, quantizer.codebooks)


def test_a_streamed_data_set_fits_alike(quantizer):
    streamed = MuLaNEmbedQuantizer(16, 4, 32)
    streamed.fit(lambda: embeddings().split(100), seed=0)
    torch.testing.assert_close(streamed.codebooks, quantizer.codebooks, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"\(100, 16\), wanted floats \[B, \.\.\., 8\]"):
        MuLaNEmbedQuantizer(8, 4, 32).fit(lambda: embeddings().split(100), seed=0)


def test_the_state_has_musiclm_pytorchs_names():
    names = ("initted", "cluster_size", "embed_avg", "embed")
    wanted = [f"rq.layers.{level}._codebook.{name}" for level in range(2) for name in names]
    assert list(MuLaNEmbedQuantizer(16, 2, 32).state_dict()) == wanted


def test_the_bundled_quantizer_speaks_its_codes():
    """Codes as they were when the stages learnt them."""
    bundled = load_component("quantizer", Path(str(files("musiclm_engine") / "assets/quantizer")))
    waves = torch.sin(torch.arange(2 * 128) * 0.7).view(2, 128)
    assert bundled.encode(torch.nn.functional.normalize(waves, dim=1)).tolist() == [
        [144, 26, 202, 246, 48, 241, 117, 180, 169, 28, 180, 196],
        [183, 123, 244, 237, 202, 66, 118, 157, 147, 20, 210, 228],
    ]


def test_as_many_rows_as_codes_are_kept_exactly():
    quantizer = MuLaNEmbedQuantizer(16, num_quantizers=2, codebook_size=600)
    quantizer.fit(embeddings(), seed=0, iterations=2)
    decoded = quantizer.decode(quantizer.encode(embeddings()))
    torch.testing.assert_close(decoded, embeddings(), atol=1e-5, rtol=0)


def test_config_and_state_rebuild_it(quantizer):
    rebuilt = MuLaNEmbedQuantizer.from_config(json.loads(json.dumps(quantizer.config)))
    with pytest.raises(RuntimeError, match="fit"):
        rebuilt.encode(embeddings())
    rebuilt.load_state_dict(quantizer.state_dict())
    assert torch.equal(rebuilt.encode(embeddings()), quantizer.encode(embeddings()))


def test_refuses_use_before_fit():
    quantizer = MuLaNEmbedQuantizer()
    with pytest.raises(RuntimeError, match="fit"):
        quantizer.encode(torch.zeros(1, 128))
    with pytest.raises(RuntimeError, match="fit"):
        quantizer.decode(torch.zeros(1, 12, dtype=torch.int64))


def test_refuses_bad_input(quantizer):
    with pytest.raises(ValueError, match="31.* 32 clusters"):
        MuLaNEmbedQuantizer(16, 4, 32).fit(embeddings(31), seed=0)
    with pytest.raises(ValueError, match="finite"):
        MuLaNEmbedQuantizer(16, 4, 32).fit(embeddings() / 0, seed=0)
    with pytest.raises(ValueError, match="iterations"):
        MuLaNEmbedQuantizer(16, 4, 32).fit(embeddings(), seed=0, iterations=0)
    with pytest.raises(ValueError, match=r"\(B, 16\)"):
        quantizer.encode(torch.zeros(16))
    with pytest.raises(ValueError, match=r"\(B, 4\)"):
        quantizer.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="codebook_size=0"):
        MuLaNEmbedQuantizer(codebook_size=0)
