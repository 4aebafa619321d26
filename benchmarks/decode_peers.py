"""Other people's way to decode: a compiled module with a static cache, and two packages.

The first and transformers' Llama are compiled as ours is: one function from token to token, a graph
of the compiler's on a GPU, the weights constants on a CPU. audiolm-pytorch runs as it does for its
users, uncompiled.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.decode_models import DIM_HEAD, VOCABULARY
from benchmarks.peers import audiolm_pytorch, import_peer
from musiclm_engine.audio import _torchaudio
from musiclm_engine.generation.decoder import Decoder, DecoderLayer
from musiclm_engine.generation.frozen import Frozen


class StaticCacheBlock(nn.Module):
    """A layer and its cache."""

    def __init__(
        self, layer: DecoderLayer, heads: int, rows: int, slots: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        attention, feed_forward = layer.attention, layer.feed_forward
        self.heads = heads
        self.qkv = _linear(attention.qkv.values, dtype)
        self.out = _linear(attention.out.values, dtype)
        self.up = _linear(feed_forward.up.values, dtype)
        self.down = _linear(feed_forward.down.values, dtype)
        self.norm_attention = nn.Parameter(attention.norm.weight.to(dtype))
        self.norm_feed_forward = nn.Parameter(feed_forward.norm.weight.to(dtype))
        self.keys: Tensor
        self.values: Tensor
        for name in ("keys", "values"):
            cache = attention.out.values.new_zeros(rows, heads, slots, DIM_HEAD, dtype=dtype)
            self.register_buffer(name, cache)

    def forward(self, x: Tensor, bias: Tensor, position: Tensor) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], self.norm_attention)
        q, k, v = self.qkv(h).view(len(x), 3, self.heads, 1, DIM_HEAD).unbind(1)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        out = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=bias)
        x = x + self.out(out.flatten(1))
        h = F.layer_norm(x, x.shape[-1:], self.norm_feed_forward)
        value, gate = self.up(h).chunk(2, dim=-1)
        return x + self.down(value * F.gelu(gate))


class StaticCacheModel(nn.Module):
    """The "paper" decoder as gpt-fast writes one: modules, a cache that is indexed by a tensor of
    positions, a mask over all of its slots, PyTorch's attention, a token by exponential noise."""

    def __init__(self, decoder: Decoder, rows: int, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            StaticCacheBlock(layer, decoder.heads, rows, slots, dtype) for layer in decoder.layers
        )
        self.norm = nn.Parameter(decoder.norm.weight.to(dtype))
        self.head = _linear(decoder.head[0], dtype)
        self.embedding = nn.Embedding.from_pretrained(decoder.embedding[0].to(dtype))
        assert decoder.table is not None
        slot = torch.arange(slots, device=decoder.head.device)
        distance = slot[:, None] - slot
        bias = decoder.table[:, distance.clamp(min=0)].masked_fill(distance < 0, float("-inf"))
        self.bias: Tensor
        self.register_buffer("bias", bias.to(dtype))  # [H, S, S]

    def caches(self) -> list[tuple[Tensor, Tensor]]:
        blocks = cast(list[StaticCacheBlock], list(self.blocks))
        return [(block.keys, block.values) for block in blocks]

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits [R, V] that follow tokens [R] at position [1]."""
        x = self.embedding(tokens)
        bias = self.bias.index_select(1, position)
        for block in self.blocks:
            x = block(x, bias, position)
        return self.head(F.layer_norm(x, x.shape[-1:], self.norm)).float()


def _linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype).contiguous())
    return linear


def draw(logits: Tensor, guidance: float | None, top_k: int) -> Tensor:
    """One token a row; with guidance the second half of the rows are the unconditional twins."""
    if guidance is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + guidance * (conditional - unconditional)
    least = logits.topk(top_k).values[:, -1:]
    probabilities = logits.masked_fill(logits < least, float("-inf")).softmax(-1)
    noise = torch.empty_like(probabilities).exponential_()
    return (probabilities / noise).argmax(-1)


class StepOfModel(nn.Module):
    """From token to token: the model, the guidance, the draw, and what the next call takes in.

    Args:
        model: logits [R, V] of (tokens [R], position [1]).
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        position: Tensor,
        guidance: float | None,
        top_k: int,
    ) -> None:
        super().__init__()
        self.model, self.guidance, self.top_k = model, guidance, top_k
        self.tokens: Tensor
        self.position: Tensor
        # Buffers, so that a graph of the compiler's may write them.
        self.register_buffer("tokens", tokens.clone())
        self.register_buffer("position", position.clone())

    def forward(self) -> None:
        drawn = draw(self.model(self.tokens, self.position), self.guidance, self.top_k)
        self.tokens.copy_(drawn if self.guidance is None else drawn.repeat(2))
        self.position.add_(1)


def compiled(step: StepOfModel) -> Callable[[], None]:
    run: Callable[[], None]
    if step.tokens.is_cuda:
        run = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    else:
        run = Frozen(lambda _: step(), ())
    return torch.inference_mode()(lambda: run())


class LlamaModel(nn.Module):
    """transformers' Llama of the same size with its static cache: logits of (tokens [R], position
    [1]). It has rotary positions for a bias, RMSNorm for LayerNorm and SiLU for GELU.

    Raises:
        CannotRun: transformers is not installed.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        # transformers imports it beside whatever torch there is.
        with suppress(ModuleNotFoundError):
            _ = _torchaudio.transforms
        transformers = import_peer("transformers")
        config = transformers.LlamaConfig(
            hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads,
            num_key_value_heads=heads, intermediate_size=4 * dim, vocab_size=VOCABULARY,
            max_position_embeddings=slots,
        )  # fmt: skip
        with torch.device(device):
            self.model = transformers.LlamaForCausalLM(config).to(dtype)
        self._cache = transformers.StaticCache(config=config, max_cache_len=slots)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        out = self.model(
            tokens[:, None], past_key_values=self._cache, cache_position=position,
            position_ids=position[None].expand(len(tokens), 1), use_cache=True,
        )  # fmt: skip
        return out.logits[:, -1].float()


class AudioLMPytorch:
    """audiolm-pytorch's semantic transformer and one round of its `generate`'s loop.

    Raises:
        CannotRun: it is not installed, or mixes its streams otherwise.
    """

    def __init__(
        self, state: dict[str, Tensor], dim: int, depth: int, heads: int, text: Tensor
    ) -> None:
        self._package = audiolm_pytorch()
        self._model = self._package.SemanticTransformer(
            dim=dim, depth=depth, heads=heads, num_semantic_tokens=VOCABULARY,
            audio_text_condition=True, has_condition=True,
        )  # fmt: skip
        self._model.load_state_dict(state)
        self._model.to(text.device).eval()
        # As text: with embeddings it forgets to hide them from the unconditional pass.
        self._model.embed_text = lambda text_, output_device: text
        self._text = [""] * len(text)

    def logits(self, ids: Tensor, cache: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """[B, 1, V] after ids [B, N], whose last has no place in the cache yet; and the new cache.

        Args:
            cache: [2, layers, 2, B, N, d]: conditional and not; keys and values.
        """
        return self._model.forward_with_cond_scale(
            ids=ids, text=self._text, cond_scale=guidance, kv_cache=cache, return_kv_cache=True
        )

    def draw(self, ids: Tensor, logits: Tensor) -> Tensor:
        module = self._package.audiolm_pytorch
        sampled = module.gumbel_sample(module.top_k(logits[:, -1], thres=0.9), temperature=1.0)
        ids = torch.cat((ids, sampled[:, None]), dim=-1)
        module.all_rows_have_eos_id(ids, VOCABULARY)
        return ids
