"""AudioLM: conditioning tokens in, waveform out, through three stages and the codec's decoder."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from musiclm_engine.audiolm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_engine.codec import Codec
from musiclm_engine.generation.decode import Progress, check_seeds
from musiclm_engine.generation.evaluation_mode import evaluation_mode
from musiclm_engine.generation.sampling import Sampling, derive_seeds
from musiclm_engine.generation.stage_steps import (
    Decoding,
    StageSteps,
    are_steps_kept,
    cache_bytes,
    checked_decoding,
)
from musiclm_engine.generation.windows import decode_overlapping, decode_side_by_side

StageProgress = Callable[[str, int, int], None]  # stage, tokens or clips done, of how many


@dataclass(frozen=True)
class StageSampling:
    """The settings of all three stages; by default MusicLM's temperatures (section 4)."""

    semantic: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    coarse: Sampling = field(default_factory=lambda: Sampling(temperature=0.95))
    fine: Sampling = field(default_factory=lambda: Sampling(temperature=0.4))


@dataclass(frozen=True)
class Windows:
    """Seconds of audio that each stage was trained on, and so decodes at a time."""

    semantic_seconds: float = 30.0
    coarse_seconds: float = 10.0
    fine_seconds: float = 3.0

    def __post_init__(self) -> None:
        for window in fields(self):
            name, seconds = window.name, getattr(self, window.name)
            if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
                raise ValueError(f"{name} is {seconds}, wanted a positive number")


@dataclass(frozen=True)
class Generated:
    """What `AudioLM.generate` made of B rows.

    Attributes:
        audio: [B, samples] float32 in [-1, 1].
        tokens: "semantic" [B, S], "coarse" [B, T, Qc], "fine" [B, T, Qf], int64.
    """

    audio: Tensor
    tokens: dict[str, Tensor]


class AudioLM(nn.Module):
    """The three stages and the codec whose tokens they speak (AudioLM, arXiv 2209.03143).

    Args:
        semantic, coarse, fine: stages that take the same conditioning tokens.
        codec: whose first levels are the coarse ones and whose next ones are the fine ones.
        windows: what the stages were trained on.

    Raises:
        ValueError: the parts do not speak the same tokens.
    """

    def __init__(
        self,
        *,
        semantic: SemanticTransformer,
        coarse: CoarseTransformer,
        fine: FineTransformer,
        codec: Codec,
        windows: Windows,
    ) -> None:
        super().__init__()
        for stage in (coarse, fine):
            if (stage.conditioning_length, stage.conditioning_size) != (
                semantic.conditioning_length,
                semantic.conditioning_size,
            ):
                raise ValueError(
                    f"{type(stage).__name__} takes {stage.conditioning_length} conditioning tokens "
                    f"of {stage.conditioning_size} values, the semantic stage "
                    f"{semantic.conditioning_length} of {semantic.conditioning_size}"
                )
            if stage.target_size != codec.codebook_size:
                raise ValueError(
                    f"{type(stage).__name__} speaks {stage.target_size} codes, "
                    f"the codec {codec.codebook_size}"
                )
        if coarse.target_levels + fine.target_levels > codec.num_quantizers:
            raise ValueError(
                f"{coarse.target_levels} coarse and {fine.target_levels} fine levels are more than "
                f"the codec's {codec.num_quantizers}"
            )
        if fine.context_levels != coarse.target_levels:
            raise ValueError(
                f"the fine stage takes {fine.context_levels} coarse levels, "
                f"the coarse stage gives {coarse.target_levels}"
            )
        if coarse.context_size != semantic.target_size:
            raise ValueError(
                f"the coarse stage takes {coarse.context_size} semantic tokens, "
                f"the semantic stage gives {semantic.target_size}"
            )
        self.semantic = semantic
        self.coarse = coarse
        self.fine = fine
        self.codec = codec
        self.windows = windows
        self._steps = StageSteps()
        semantic.check_span(self._window(windows.semantic_seconds) // coarse.context_stride)
        coarse.check_span(self._window(windows.coarse_seconds))
        fine.check_span(self._fine_window())

    def frames(self, seconds: float) -> int:
        """Frames of codes that hold this much audio, a whole number of semantic tokens."""
        stride = self.coarse.context_stride
        return stride * max(1, math.ceil(seconds * self.codec.frame_rate_hz / stride - 1e-6))

    def check_seconds(self, seconds: float) -> None:
        """Refuse what is no length of audio."""
        rate_hz = self.codec.sample_rate_hz
        if not 0 < seconds * rate_hz < math.inf or round(seconds * rate_hz) < 1:
            raise ValueError(
                f"seconds is {seconds}, wanted a number of at least a sample, {1 / rate_hz:g} s"
            )

    @torch.inference_mode()
    def generate(
        self,
        conditioning: Tensor,
        *,
        seconds: float,
        seeds: Tensor,
        tempo: Tensor | None = None,
        sampling: StageSampling | None = None,
        decoding: Decoding | None = None,
        on_progress: StageProgress | None = None,
    ) -> Generated:
        """Make `seconds` of audio for each row.

        Args:
            conditioning: [B, M] int64 MuLan tokens.
            seconds: of audio.
            seeds: [B] int64: a row's sound depends on its conditioning, tempo and seed alone.
            tempo: [B] int64, for a semantic stage that counts beats (`TempoReader.choose`, or
                `audiolm.beat_clock.tempo_tokens` of beats per minute), else None.
            sampling: settings of the stages.
            decoding: precision of the stages, and how their steps run.
            on_progress: called as tokens come.

        Returns:
            audio and tokens.

        Raises:
            ValueError: seconds that are not finite or less than a sample, inputs of another shape
                or type.
            TypeError: decoding is no `Decoding`.
        """
        self.check_seconds(seconds)
        check_seeds(seeds)
        sampling = sampling or StageSampling()
        frames = self.frames(seconds)
        stride = self.coarse.context_stride
        fine_window = self._fine_window()

        def stage_seeds(stage: str) -> Tensor:
            rows = [derive_seeds(int(seed), stage, count=1) for seed in seeds]
            return torch.cat(rows).to(conditioning.device)

        with evaluation_mode(self):
            semantic = decode_overlapping(
                self.semantic,
                conditioning=conditioning,
                context=None,
                frames=frames // stride,
                window=self._window(self.windows.semantic_seconds) // stride,
                seeds=stage_seeds("semantic"),
                tempo=tempo,
                sampling=sampling.semantic,
                decoding=decoding,
                steps=self._steps,
                on_tokens=_counter(on_progress, "semantic", frames // stride),
            )
            coarse = decode_overlapping(
                self.coarse,
                conditioning=conditioning,
                context=semantic,
                frames=frames,
                window=self._window(self.windows.coarse_seconds),
                seeds=stage_seeds("coarse"),
                sampling=sampling.coarse,
                decoding=decoding,
                steps=self._steps,
                on_tokens=_counter(on_progress, "coarse", frames * self.coarse.target_levels),
            )
            fine = decode_side_by_side(
                self.fine,
                conditioning=conditioning,
                context=coarse,
                window=fine_window,
                seeds=stage_seeds("fine"),
                sampling=sampling.fine,
                decoding=decoding,
                steps=self._steps,
                on_tokens=_counter(
                    on_progress, "fine", min(fine_window, frames) * self.fine.target_levels
                ),
            )
            decoded = []
            for row in torch.cat([coarse, fine], dim=2):  # one by one: a spectrogram is large
                decoded.append(self.codec.decode(row[None]))
                if on_progress is not None:
                    on_progress("decode", len(decoded), len(coarse))
            audio = torch.cat(decoded)[:, : round(seconds * self.codec.sample_rate_hz)]
        return Generated(
            audio=audio,
            tokens={"semantic": semantic[:, :, 0], "coarse": coarse, "fine": fine},
        )

    def cache_bytes(
        self, *, seconds: float, rows: int, sampling: StageSampling, decoding: Decoding | None
    ) -> float:
        """What the caches of `generate` take at most, beyond those that are kept already."""
        decoding = checked_decoding(decoding)
        frames = self.frames(seconds)
        fine = min(self._fine_window(), frames)
        coarse = self._window(self.windows.coarse_seconds)
        semantic = self._window(self.windows.semantic_seconds) // self.coarse.context_stride
        held = highest = 0.0
        for stage, settings, window, count in (
            (self.semantic, sampling.semantic, semantic, 1),
            (self.coarse, sampling.coarse, coarse, 1),
            (self.fine, sampling.fine, fine, -(-frames // fine)),
        ):
            context = -(-window // stage.context_stride) if stage.context_levels else 0
            needed = cache_bytes(
                stage,
                rows=rows * count,
                length=stage.sequence_length(context, window),
                sampling=settings,
                decoding=decoding,
            )
            if are_steps_kept(stage, decoding):
                needed -= self._steps.kept_bytes(stage)
                held += needed
                highest = max(highest, held)
            else:
                highest = max(highest, needed)
        return highest

    def _fine_window(self) -> int:
        return max(1, round(self.windows.fine_seconds * self.codec.frame_rate_hz))

    def _window(self, seconds: float) -> int:
        """Frames in a window, at least two of each stage's own."""
        stride = self.coarse.context_stride
        return max(2 * stride, round(seconds * self.codec.frame_rate_hz) // stride * stride)


def _counter(on_progress: StageProgress | None, stage: str, total: int) -> Progress | None:
    if on_progress is None:
        return None
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        on_progress(stage, done, total)

    return count
