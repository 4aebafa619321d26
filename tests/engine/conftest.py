"""What the engine's tests share: one thread, and models of width 16 with random weights."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from musiclm_engine import (
    AudioLM,
    AudioSpectrogramTransformer,
    CoarseTransformer,
    FineTransformer,
    MuLaN,
    MuLaNEmbedQuantizer,
    MusicLM,
    SemanticTokenizer,
    SemanticTransformer,
    SpectralSoundStream,
    TextTransformer,
)
from musiclm_engine.audio import save_audio
from musiclm_engine.data.manifest import Clip, write_manifest
from musiclm_engine.generation import Sampling, StageSampling, Windows
from musiclm_engine.mulan import train_caption_tokenizer

SAMPLE_RATE_HZ = 16000
PROMPTS = [
    f"{pace} {piece} on {what}"
    for pace in ("slow", "quick", "solemn")
    for piece in ("a hymn", "a jig", "a waltz")
    for what in ("church organ", "flute", "strings")
]
WIDTH = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "max_frames": 64}
CONDITIONING = {"conditioning_size": 8, "conditioning_length": 2}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For the session: sums over several threads would round differently between fixtures."""
    torch.set_num_threads(1)


def _with_opinions(stage: nn.Module) -> nn.Module:
    """Weights so large that every input changes the logits a lot: a fresh stage ignores them."""
    for weight in stage.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.4)
    return stage


@pytest.fixture(scope="session")
def with_opinions() -> Callable[[nn.Module], nn.Module]:
    return _with_opinions


@pytest.fixture(scope="session")
def tones() -> Callable[..., Tensor]:
    """tones(seconds, *hz): sines of these frequencies together, [samples] in [-1, 1]."""

    def make(seconds: float, *hz: float) -> Tensor:
        time = torch.arange(round(seconds * SAMPLE_RATE_HZ), dtype=torch.float64) / SAMPLE_RATE_HZ
        waves = [torch.sin(2 * math.pi * f * time + n) for n, f in enumerate(hz)]
        return (0.8 * torch.stack(waves).mean(0)).float()

    return make


def _tiny_musiclm() -> MusicLM:
    torch.manual_seed(0)
    codec = SpectralSoundStream(
        dim=16,
        encoder_depth=1,
        decoder_depth=1,
        codebook_dim=8,
        codebook_size=16,
        rq_num_quantizers=3,
        n_fft=640,
        stft_hop=320,
        frames_per_code=1,
        phase_iterations=2,
    )
    codebooks = codec.rq.rvqs[0].layers
    nn.init.normal_(codebooks.embed)
    codebooks.initted.fill_(True)
    tokenizer = SemanticTokenizer(num_tokens=12, num_components=8)
    tokenizer.fit(tokenizer.features(0.1 * torch.randn(4, SAMPLE_RATE_HZ)).flatten(0, 1), seed=0)
    captions = train_caption_tokenizer(PROMPTS, 280)
    mulan = MuLaN(
        AudioSpectrogramTransformer(16, 1, heads=1, dim_head=16, num_mels=32),
        TextTransformer(16, 1, num_tokens=captions.get_vocab_size(), heads=1, dim_head=16),
        16,
        tokenizer=captions,
        window_seconds=1.0,
    ).eval()
    quantizer = MuLaNEmbedQuantizer(16, num_quantizers=2, codebook_size=8)
    quantizer.fit(mulan.embed_text(PROMPTS), seed=0)
    semantic = SemanticTransformer(num_semantic_tokens=12, **CONDITIONING, **WIDTH)
    coarse = CoarseTransformer(
        num_semantic_tokens=12,
        codebook_size=16,
        num_coarse_quantizers=2,
        frames_per_semantic=2,
        **CONDITIONING,
        **WIDTH,
    )
    fine = FineTransformer(
        codebook_size=16, num_coarse_quantizers=2, num_fine_quantizers=1, **CONDITIONING, **WIDTH
    )
    for stage in (semantic, coarse, fine):
        _with_opinions(stage)
    return MusicLM(
        mulan=mulan,
        quantizer=quantizer,
        tokenizer=tokenizer,
        audiolm=AudioLM(
            semantic=semantic,
            coarse=coarse,
            fine=fine,
            codec=codec,
            windows=Windows(semantic_seconds=0.8, coarse_seconds=0.4, fine_seconds=0.2),
        ),
        sampling=StageSampling(
            semantic=Sampling(top_k=8), coarse=Sampling(temperature=0.9), fine=Sampling(min_p=0.01)
        ),
    ).eval()


@pytest.fixture(scope="session")
def tiny_corpus(tones, tmp_path_factory) -> Path:
    """The manifest of six clips of 1.2 s, four to train on and two held out."""
    folder = tmp_path_factory.mktemp("tiny-corpus")
    clips = []
    for n in range(6):
        path = folder / f"{n}.wav"
        save_audio(path, tones(1.2, 220.0 + 40 * n, 500.0 + 70 * n), SAMPLE_RATE_HZ)
        split = "train" if n < 4 else "validation"
        facts = {"tempo_bpm": 60 + 20 * n}
        clips.append(Clip(path, 1.2, tuple(PROMPTS[n : n + 2]), split, f"piece {n}", facts))
    return write_manifest(folder / "manifest.jsonl", clips)


TINY_CONFIG = """
seed = 3
[codec]
steps = 3
batch_size = 2
crop_seconds = 0.32
model = { dim = 16, encoder_depth = 1, decoder_depth = 1, codebook_dim = 8, codebook_size = 16, \
rq_num_quantizers = 3, phase_iterations = 2 }
[tokenizer]
clips = 4
model = { num_tokens = 8, num_components = 8 }
[mulan]
steps = 2
batch_size = 2
crop_seconds = 0.64
vocab_size = 270
audio = { dim = 16, depth = 1, heads = 1, dim_head = 16, num_mels = 32 }
text = { dim = 16, depth = 1, heads = 1, dim_head = 16, max_seq_len = 32 }
dim_latent = 16
[quantizer]
model = { num_quantizers = 2, codebook_size = 4 }
[tempo_reader]
steps = 2
batch_size = 4
vocab_size = 270
text = { dim = 16, depth = 1, heads = 1, dim_head = 16, max_seq_len = 32 }
[semantic]
steps = 2
counts_beats = true
batch_size = 2
crop_seconds = 1.0
text_share = 0.5
model = { dim = 16, depth = 1, heads = 2, dim_head = 8, max_frames = 32 }
sampling = { temperature = 0.9, top_k = 6 }
[coarse]
steps = 2
batch_size = 2
crop_seconds = 0.5
text_share = 0.5
num_coarse_quantizers = 2
model = { dim = 16, depth = 1, heads = 2, dim_head = 8, max_frames = 32 }
[fine]
steps = 2
batch_size = 2
crop_seconds = 0.2
text_share = 0.5
num_fine_quantizers = 1
precision = "bf16"
model = { dim = 16, depth = 1, heads = 2, dim_head = 8, max_frames = 32 }
"""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """A configuration that trains in seconds on `tiny_corpus`."""
    path = tmp_path_factory.mktemp("tiny-config") / "tiny-test.toml"
    path.write_text(TINY_CONFIG)
    return path


@pytest.fixture(scope="session")
def tiny_musiclm() -> MusicLM:
    """A whole model: 25 semantic tokens and 50 codec frames a second. Tests leave it as it is."""
    return _tiny_musiclm()


@pytest.fixture(scope="session")
def tiny_folder(tiny_musiclm, tmp_path_factory) -> Path:
    """The same model on disk, exactly."""
    folder = tmp_path_factory.mktemp("tiny-musiclm")
    tiny_musiclm.save_pretrained(folder, dtype=torch.float32)
    return folder
