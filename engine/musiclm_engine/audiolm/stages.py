"""The three stages of AudioLM: semantic, coarse acoustic, fine acoustic tokens."""

from typing import Any

from musiclm_engine.audiolm.stage import Stage


class SemanticTransformer(Stage):
    """p(S_t | S_<t, M_A): what happens in the music (MusicLM, section 3.2).

    Args:
        num_semantic_tokens: values of a semantic token.
        conditioning_size: values of a MuLan token.
        conditioning_length: MuLan tokens in front of the sequence, one for each of its quantisers.
        frame_rate_hz: semantic tokens a second, for a stage that counts time in beats of a tempo
            (`BeatClock`); None for one that counts frames.
        transformer: conditioning_dim, dim, depth, heads, dim_head, ff_mult, ff_gated, dropout,
            max_frames and condition_drop_prob, see `Stage`.
    """

    def __init__(
        self,
        *,
        num_semantic_tokens: int,
        conditioning_size: int,
        conditioning_length: int,
        frame_rate_hz: float | None = None,
        **transformer: Any,
    ) -> None:
        super().__init__(
            conditioning_size=conditioning_size,
            conditioning_length=conditioning_length,
            frame_rate_hz=frame_rate_hz,
            target_size=num_semantic_tokens,
            target_levels=1,
            **transformer,
        )
        self.config = {
            "num_semantic_tokens": num_semantic_tokens,
            "conditioning_size": conditioning_size,
            "conditioning_length": conditioning_length,
            "frame_rate_hz": frame_rate_hz,
            **transformer,
        }


class CoarseTransformer(Stage):
    """p(A^1..q_t | A_<t, S, M_A): the first acoustic levels, from the semantic tokens.

    Args:
        num_semantic_tokens: values of a semantic token.
        codebook_size: values of an acoustic token.
        num_coarse_quantizers: acoustic levels predicted here.
        frames_per_semantic: acoustic frames that one semantic token lasts.
        conditioning_size, conditioning_length, transformer: as in `SemanticTransformer`.
    """

    def __init__(
        self,
        *,
        num_semantic_tokens: int,
        codebook_size: int,
        num_coarse_quantizers: int,
        conditioning_size: int,
        conditioning_length: int,
        frames_per_semantic: int = 1,
        **transformer: Any,
    ) -> None:
        super().__init__(
            conditioning_size=conditioning_size,
            conditioning_length=conditioning_length,
            context_size=num_semantic_tokens,
            context_levels=1,
            context_stride=frames_per_semantic,
            target_size=codebook_size,
            target_levels=num_coarse_quantizers,
            **transformer,
        )
        self.config = {
            "num_semantic_tokens": num_semantic_tokens,
            "codebook_size": codebook_size,
            "num_coarse_quantizers": num_coarse_quantizers,
            "conditioning_size": conditioning_size,
            "conditioning_length": conditioning_length,
            "frames_per_semantic": frames_per_semantic,
            **transformer,
        }


class FineTransformer(Stage):
    """p(A^q+1..Q_t | A_<t, A^1..q, M_A): the remaining acoustic levels, from the coarse ones.

    Args:
        codebook_size: values of an acoustic token.
        num_coarse_quantizers: acoustic levels given.
        num_fine_quantizers: acoustic levels predicted here.
        conditioning_size, conditioning_length, transformer: as in `SemanticTransformer`.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        num_coarse_quantizers: int,
        num_fine_quantizers: int,
        conditioning_size: int,
        conditioning_length: int,
        **transformer: Any,
    ) -> None:
        super().__init__(
            conditioning_size=conditioning_size,
            conditioning_length=conditioning_length,
            context_size=codebook_size,
            context_levels=num_coarse_quantizers,
            target_size=codebook_size,
            target_levels=num_fine_quantizers,
            **transformer,
        )
        self.config = {
            "codebook_size": codebook_size,
            "num_coarse_quantizers": num_coarse_quantizers,
            "num_fine_quantizers": num_fine_quantizers,
            "conditioning_size": conditioning_size,
            "conditioning_length": conditioning_length,
            **transformer,
        }
