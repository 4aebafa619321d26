"""One autoregressive stage: tokens that continue [conditioning, context, start, target ...]."""

from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.audiolm.beat_clock import NUM_TEMPI, BeatClock
from musiclm_engine.audiolm.position import OUTSIDE_TIME, TimeLevelBias
from musiclm_engine.audiolm.residual_embedding import ResidualEmbedding
from musiclm_engine.audiolm.transformer import Store, Transformer


class Stage(nn.Module):
    """p(target | conditioning, context), one token at a time.

    Everything is one sequence of discrete tokens (MusicLM, arXiv 2301.11325, section 3.2):

        c_1 .. c_M,  context frames (each its levels in turn),  start,  target frames (the same)

    The output above a token predicts the next one, so a query carries the position code of the
    token it predicts and a key the code of its own token: the token of frame t at level l and
    what the context holds at t always meet in the same entry of the bias table. With a clock a
    tempo follows c_M, and positions are counted in its beats (`BeatClock`).

    Args:
        conditioning_size: values of a conditioning token; one more id, `null`, stands for none.
        conditioning_length: M, 0 for a stage without conditioning.
        conditioning_dim: D, width of a conditioning token's code (`ResidualEmbedding`).
        context_size: values of a context token.
        context_levels: Lc, tokens in a frame of context; 0 for a stage without context.
        context_stride: frames of target that one frame of context lasts.
        target_size: K, values of a target token.
        target_levels: Lt, tokens in a frame of target.
        max_frames: of target or of context (in target frames) in a sequence.
        frame_rate_hz: of the target, for a stage with a clock; None for one without.
        dim, depth, heads, dim_head, ff_mult, dropout: of the transformer.
        ff_gated: its feed-forward layers are gated ones.
        condition_drop_prob: share of training rows that see `null`, for classifier-free guidance.
    """

    config: dict[str, Any]  # the constructor's arguments of the stage that this is

    def __init__(
        self,
        *,
        conditioning_size: int,
        conditioning_length: int,
        conditioning_dim: int = 128,
        context_size: int = 0,
        context_levels: int = 0,
        context_stride: int = 1,
        target_size: int,
        target_levels: int,
        max_frames: int = 512,
        frame_rate_hz: float | None = None,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
        ff_gated: bool = False,
        dropout: float = 0.1,
        condition_drop_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.conditioning_size = conditioning_size
        self.conditioning_length = conditioning_length
        self.context_size = context_size
        self.context_levels = context_levels
        self.context_stride = context_stride
        self.target_size = target_size
        self.target_levels = target_levels
        self.max_frames = max_frames
        self.condition_drop_prob = condition_drop_prob
        self.null = conditioning_size
        self.condition_embedding = ResidualEmbedding(
            conditioning_length, conditioning_size, conditioning_dim, dim
        )
        self.context_embedding = nn.Embedding(context_levels * context_size, dim)
        self.target_embedding = nn.Embedding(target_levels * target_size, dim)
        self.start_token = nn.Parameter(torch.randn(dim) * 0.02)
        for embedding in (self.context_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        self.clock = None if frame_rate_hz is None else BeatClock(frame_rate_hz, dim)
        moments = max_frames if self.clock is None else self.clock.span(max_frames)
        self.position = TimeLevelBias(heads, context_levels + target_levels, moments)
        self.transformer = Transformer(
            dim=dim,
            depth=depth,
            heads=heads,
            dim_head=dim_head,
            ff_mult=ff_mult,
            ff_gated=ff_gated,
            dropout=dropout,
        )
        self.logit_weights = nn.Parameter(torch.randn(target_levels, target_size, dim) * 0.02)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    # The sequence: its embeddings and its position codes.

    @property
    def outside_time(self) -> int:
        """Tokens that have no moment: the conditioning, the tempo of a clock, the start."""
        return self.conditioning_length + (self.clock is not None) + 1

    def sequence_length(self, context_frames: int, target_frames: int) -> int:
        """Tokens of a whole sequence, its start token included."""
        return (
            self.outside_time
            + context_frames * self.context_levels
            + target_frames * self.target_levels
        )

    def codes(
        self, context_frames: int, target_frames: int, tempo: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Position codes (of what each token predicts, of each token), both [R, N] int32: R = B with
        a clock, whose rows have tempi [B] of their own, and 1 without."""
        device = self.start_token.device
        self.check_span(max(context_frames * self.context_stride, target_frames))
        context = self._codes(
            torch.arange(context_frames, device=device) * self.context_stride,
            range(self.context_levels),
            tempo,
        )
        # The last token predicts what comes after the sequence: the next frame's first level.
        levels = range(self.context_levels, self.context_levels + self.target_levels)
        after = self._codes(torch.arange(target_frames + 1, device=device), levels, tempo)
        after = after[:, : 1 + target_frames * self.target_levels]
        outside = after.new_full((len(after), self.outside_time), OUTSIDE_TIME)
        given, start = outside[:, :-1], outside[:, -1:]
        queries = torch.cat([torch.zeros_like(given), context, after], dim=1)
        return queries, torch.cat([given, context, start, after[:, :-1]], dim=1)

    def _codes(self, frames: Tensor, levels: range, tempo: Tensor | None) -> Tensor:
        """[R, frames levels] int32."""
        if self.clock is not None and tempo is not None:
            moments = self.clock.moments(frames, tempo)
        else:
            moments = frames[None]
        level = torch.arange(levels.start, levels.stop, device=frames.device)
        return self.position.code(moments[:, :, None], level).flatten(1)

    def embed(
        self,
        conditioning: Tensor,
        context: Tensor | None,
        target: Tensor,
        tempo: Tensor | None = None,
    ) -> Tensor:
        """[B, M], [B, Tc, Lc] or None, [B, T, Lt], [B] with a clock -> [B, N, dim]."""
        B = len(target)
        parts = [self.condition_embedding(conditioning)]
        if self.clock is not None and tempo is not None:
            parts.append(self.clock.embedding(tempo)[:, None])
        if context is not None:
            tokens = self._embed(self.context_embedding, context, self.context_size)
            parts.append(rearrange(tokens, "b t l d -> b (t l) d"))
        parts.append(self.start_token.expand(B, 1, -1))
        tokens = self._embed(self.target_embedding, target, self.target_size)
        parts.append(rearrange(tokens, "b t l d -> b (t l) d"))
        return torch.cat(parts, dim=1)

    @staticmethod
    def _embed(embedding: nn.Embedding, tokens: Tensor, size: int) -> Tensor:
        levels = torch.arange(tokens.shape[-1], device=tokens.device)
        return embedding(tokens + levels * size)

    # Training: all predictions at once.

    def forward(
        self,
        conditioning: Tensor,
        context: Tensor | None,
        target: Tensor,
        tempo: Tensor | None = None,
    ) -> Tensor:
        """Predict every token of target from all before it.

        Args:
            conditioning: [B, M] int64, values below conditioning_size or equal to `null`.
            context: [B, Tc, Lc] int64, or None for a stage without context.
            target: [B, T, Lt] int64.
            tempo: [B] int64 tokens (`tempo_tokens`) for a stage with a clock, else None.

        Returns:
            logits [B, T, Lt, K].
        """
        self.check(conditioning, context, target, tempo)
        context_frames = 0 if context is None else context.shape[1]
        x = self.embed(conditioning, context, target, tempo)[:, :-1]
        q_codes, k_codes = self.codes(context_frames, target.shape[1], tempo)
        hidden = self._transform(x, q_codes[:, :-1], k_codes[:, :-1])
        first = self.sequence_length(context_frames, 0) - 1
        hidden = rearrange(hidden[:, first:], "b (t l) d -> b t l d", l=self.target_levels)
        return torch.einsum("btld,lkd->btlk", hidden, self.logit_weights)

    def loss(
        self,
        conditioning: Tensor,
        context: Tensor | None,
        target: Tensor,
        tempo: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy by level, [Lt], in nats; in training some rows lose their conditioning."""
        logits = self(self._dropped(conditioning), context, target, tempo)
        losses = F.cross_entropy(
            rearrange(logits, "b t l k -> (b t l) k").float(), target.reshape(-1), reduction="none"
        )
        return losses.view(-1, self.target_levels).mean(0)

    def _dropped(self, conditioning: Tensor) -> Tensor:
        if not self.training or self.condition_drop_prob == 0:
            return conditioning
        chance = torch.rand(len(conditioning), 1, device=conditioning.device)
        return torch.where(chance < self.condition_drop_prob, self.null, conditioning)

    def _transform(
        self, x: Tensor, q_codes: Tensor, k_codes: Tensor, store: Store | None = None
    ) -> Tensor:
        return self.transformer(
            x,
            table=self.position.table(),
            offset=self.position.offset,
            q_codes=q_codes,
            k_codes=k_codes,
            store=store,
        )

    # Decoding: all that is given at once, then one token at a time (`generation`).

    def prefill(
        self,
        conditioning: Tensor,
        context: Tensor | None,
        prefix: Tensor,
        store: Store,
        tempo: Tensor | None = None,
    ) -> Tensor:
        """Take in all that is given but its last token, with which decoding begins.

        Args:
            conditioning, context, tempo: as in `forward`.
            prefix: [B, P, Lt] target frames that are given, P >= 0.
            store: see `Transformer.forward`.

        Returns:
            [B, dim], the embedding of the last token given: of prefix, or the start token.
        """
        self.check(conditioning, context, prefix, tempo)
        context_frames = 0 if context is None else context.shape[1]
        x = self.embed(conditioning, context, prefix, tempo)
        q_codes, k_codes = self.codes(context_frames, prefix.shape[1], tempo)
        if x.shape[1] > 1:
            self._transform(x[:, :-1], q_codes[:, :-1], k_codes[:, :-1], store)
        return x[:, -1]

    def check_span(self, frames: int) -> None:
        """Refuse a sequence that the bias table does not reach across."""
        if frames > self.max_frames:
            raise ValueError(
                f"a sequence of {frames} frames is longer than max_frames {self.max_frames}"
            )

    def check(
        self,
        conditioning: Tensor,
        context: Tensor | None,
        target: Tensor,
        tempo: Tensor | None = None,
    ) -> None:
        """Refuse tokens that are not of this stage's form."""
        B = len(target)
        if tuple(conditioning.shape) != (B, self.conditioning_length):
            raise ValueError(
                f"conditioning is {tuple(conditioning.shape)}, "
                f"wanted [{B}, {self.conditioning_length}]"
            )
        _check_values("conditioning", conditioning, self.conditioning_size + 1)
        if (context is None) != (self.context_levels == 0):
            raise ValueError(
                f"context is {'missing' if context is None else 'given'}, "
                f"this stage has {self.context_levels} levels of it"
            )
        if (tempo is None) != (self.clock is None):
            raise ValueError(
                f"tempo is {'missing' if tempo is None else 'given'}, "
                f"this stage has {'no' if self.clock is None else 'a'} clock"
            )
        for name, tokens, levels, size in (
            ("context", context, self.context_levels, self.context_size),
            ("target", target, self.target_levels, self.target_size),
        ):
            if tokens is None:
                continue
            if tokens.dim() != 3 or tokens.shape[0] != B or tokens.shape[2] != levels:
                raise ValueError(f"{name} is {tuple(tokens.shape)}, wanted [{B}, frames, {levels}]")
            _check_values(name, tokens, size)
        if tempo is not None:
            if not isinstance(tempo, Tensor) or (tempo.dtype, tempo.shape) != (torch.int64, (B,)):
                raise ValueError(
                    f"tempo is {tempo!r}, wanted a tensor of int64 [{B}], tokens of beats a minute "
                    "(tempo_tokens)"
                )
            _check_values("tempo", tempo, NUM_TEMPI)


def _check_values(name: str, tokens: Tensor, size: int) -> None:
    # The embeddings of the levels lie one after another: a token too large would silently read its
    # neighbour's. Only on the CPU: elsewhere the look would synchronise.
    if tokens.numel() == 0 or tokens.device.type != "cpu":
        return
    lowest, highest = (int(token) for token in tokens.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} spans {lowest} to {highest}, wanted 0 to {size - 1}")
