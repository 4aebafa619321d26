"""The bundled model in fewer bits: how far its next-token distributions move (docs/decoding.md)."""

import pytest
import torch
import torch.nn.functional as F

from musiclm_engine import MusicLM
from musiclm_engine.generation import DecodeStep, Sampling, decoder_from_stage, derive_seeds
from musiclm_engine.generation.decode import decode_stage
from musiclm_engine.generation.ops import KERNELS
from musiclm_kernels import decode_linear

PROMPTS = ["a slow hymn on a church organ", "a quick jig on a flute"]
FRAMES = 32


@pytest.fixture(scope="module")
def bundled():
    return MusicLM.from_pretrained()


@pytest.fixture(scope="module", params=["semantic", "coarse"])
def song(request, bundled):
    """A stage, what it is told, and a song of its own: conditioning, context, tokens, tempo."""
    conditioning = bundled.quantizer.encode(bundled.mulan.embed_text(PROMPTS))
    songs, context = {}, None
    for name in ("semantic", "coarse"):
        stage, sampling = getattr(bundled.audiolm, name), getattr(bundled.sampling, name)
        prefix = torch.zeros(2, 0, stage.target_levels, dtype=torch.int64)
        draw = {"conditioning": conditioning, "prefix": prefix, "sampling": sampling}
        draw["seeds"] = derive_seeds(0, count=2)
        tempo = bundled.choose_tempo(PROMPTS, draw["seeds"]) if name == "semantic" else None
        tokens = decode_stage(stage, context=context, frames=FRAMES, tempo=tempo, **draw)
        songs[name] = conditioning, context, tokens, tempo
        context = tokens
    return getattr(bundled.audiolm, request.param), *songs[request.param]


def stepwise_logits(stage, conditioning, context, target, tempo, *, cache_dtype=None, **weights):
    """Of each token of the song, one step at a time: [2, N, K]."""
    tokens, logits = target.flatten(1), []
    decoder = decoder_from_stage(stage, **weights)

    def note(x, norm_weight, norm_bias, head, embedding, *, head_scale, step, **options):
        level = int(step) % len(head)
        scale = None if head_scale is None else head_scale[level]
        logits.append(
            decode_linear(
                x, head[level], weight_scale=scale, norm_weight=norm_weight, dtype=x.dtype
            )[0]
        )
        x.copy_(embedding[level][tokens[:, int(step)]])
        return tokens[:, int(step)]

    context_frames = 0 if context is None else context.shape[1]
    step = DecodeStep(
        decoder, rows=2, length=stage.sequence_length(context_frames, FRAMES),
        sampling=Sampling(), cache_dtype=cache_dtype,
        ops=KERNELS._replace(sample_next_token=note),
    )  # fmt: skip
    with torch.inference_mode():
        x = stage.prefill(conditioning, context, target[:, :0], step.cache.append, tempo)
        query_codes, key_codes = stage.codes(context_frames, FRAMES, tempo)
    step.begin(
        x, seeds=torch.zeros(2, dtype=torch.int64), query_codes=query_codes, key_codes=key_codes,
        position=stage.sequence_length(context_frames, 0) - 1,
    )  # fmt: skip
    for _ in range(tokens.shape[1]):
        step()
    return torch.stack(logits, dim=1)


FEWER_BITS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "int8 weights": {"weight_dtype": torch.int8},
    "float8 weights": {"weight_dtype": torch.float8_e4m3fn},
    "float8 cache": {"cache_dtype": torch.float8_e4m3fn},
}
# Least share of tokens whose likeliest stays so, and most divergence in nats, of either stage.
AGREEMENT = {
    "bfloat16": (0.95, 0.0005),
    "int8 weights": (0.95, 0.0005),
    "float8 weights": (0.95, 0.003),
    "float8 cache": (0.95, 0.001),
}


@pytest.mark.parametrize("name", FEWER_BITS)
def test_fewer_bits_agree(song, name):
    stage, *told = song
    with torch.no_grad():
        wanted = stage(*told).flatten(1, 2).log_softmax(-1)
    found = stepwise_logits(*song, **FEWER_BITS[name]).log_softmax(-1)
    divergence = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    least, most = AGREEMENT[name]
    print(f"{type(stage).__name__} {name}: top-1 {same:.3f}, KL {divergence:.5f} nats")
    assert same >= least and 0 < divergence <= most
