"""Decode steps of stages, kept from one piece to the next as long as they fit."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from musiclm_engine.audiolm.stage import Stage
from musiclm_engine.generation.decoder import Decoder
from musiclm_engine.generation.from_stage import decoder_from_stage
from musiclm_engine.generation.ops import DEFINITIONS, KERNELS
from musiclm_engine.generation.sampling import Sampling
from musiclm_engine.generation.step import DecodeStep

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
# Values. A CPU converts what it sums to a buffer first, and each page of one too large for the heap
# has to be faulted in: ten times what the sum takes.
SUMMED_AT_ONCE = 2**20
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *EIGHT_BITS)


@dataclass(frozen=True)
class Decoding:
    """How a stage's tokens are computed; the settings of `Sampling` say which are drawn.

    Attributes:
        weight_dtype: of the matrices that a step reads: float32, bfloat16, float16, int8 or
            float8_e4m3fn (with a scale for each output channel); None: as the stage has them.
            Activations and cache are of 16 bits beside those, and beside 8 bits bfloat16 on a GPU.
        cache_dtype: torch.float8_e4m3fn stores keys and values with a scale for each token and head.
        compiled: compile the step for the CPU, which takes half a minute on first use.
        graph: replay the step as a CUDA graph, on a GPU.
    """

    weight_dtype: torch.dtype | None = None
    cache_dtype: torch.dtype | None = None
    compiled: bool = False
    graph: bool = True

    def __post_init__(self) -> None:
        for name, wanted in (
            ("weight_dtype", WEIGHT_DTYPES),
            ("cache_dtype", (torch.float8_e4m3fn,)),
        ):
            value = getattr(self, name)
            if value is not None and value not in wanted:
                raise ValueError(
                    f"{name} is {value}, wanted None or {' or '.join(map(str, wanted))}"
                )


def checked_decoding(decoding: Decoding | None) -> Decoding:
    """The default for None, and nothing else that is no Decoding."""
    if decoding is None:
        return Decoding()
    if not isinstance(decoding, Decoding):
        raise TypeError(
            f"decoding is {decoding!r}, wanted a Decoding, as Decoding(weight_dtype=torch.int8), "
            "or None"
        )
    return decoding


class StageSteps:
    """For each stage the weights as steps read them, and the step that was used last if it took time
    to make: captured or compiled.

    Whatever changes the stage's weights makes them anew. Not kept by copies and pickles.
    """

    def __init__(self) -> None:
        self._decoders: WeakKeyDictionary[Stage, tuple[Hashable, Decoder]] = WeakKeyDictionary()
        self._steps: WeakKeyDictionary[Stage, tuple[Hashable, DecodeStep]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return StageSteps, ()

    @contextmanager
    def borrow(
        self, stage: Stage, *, rows: int, length: int, sampling: Sampling, decoding: Decoding
    ) -> Iterator[DecodeStep]:
        """A step of these sizes and settings, this caller's alone until the context ends."""
        weights = (_identity(stage), decoding.weight_dtype)
        wanted = (weights, rows, length, sampling, decoding)
        is_to_keep = are_steps_kept(stage, decoding)
        found, step = self._steps.pop(stage, (None, None))
        if step is None or found != wanted:
            if step is not None and not is_to_keep:
                self._steps[stage] = found, step  # nothing will take its place
            del step  # its cache makes room for the next
            step = DecodeStep(
                self._decoder(stage, weights, decoding.weight_dtype),
                rows=rows,
                length=length,
                sampling=sampling,
                dtype=_activations(stage, decoding.weight_dtype),
                cache_dtype=decoding.cache_dtype,
                compiled=decoding.compiled,
                graph=decoding.graph,
                # No kernel takes float64.
                ops=DEFINITIONS if stage.start_token.dtype == torch.float64 else KERNELS,
            )
        yield step
        if is_to_keep:
            self._steps[stage] = wanted, step

    def kept_bytes(self, stage: Stage) -> int:
        """Of the cache that is kept with a stage's step: another step to keep takes its place."""
        _, step = self._steps.get(stage, (None, None))
        if step is None:
            return 0
        return sum(t.nbytes for layer in step.cache.layers for t in layer if t is not None)

    def _decoder(
        self, stage: Stage, weights: Hashable, weight_dtype: torch.dtype | None
    ) -> Decoder:
        found, decoder = self._decoders.get(stage, (None, None))
        if decoder is None or found != weights:
            if weight_dtype in EIGHT_BITS:
                decoder = decoder_from_stage(stage, weight_dtype=weight_dtype)
            else:
                decoder = decoder_from_stage(stage, dtype=weight_dtype)
            self._decoders[stage] = weights, decoder
        return decoder


def _activations(stage: Stage, weight_dtype: torch.dtype | None) -> torch.dtype:
    if weight_dtype in EIGHT_BITS:
        return torch.bfloat16 if is_on_gpu(stage) else torch.float32
    return weight_dtype or stage.start_token.dtype


def is_on_gpu(stage: Stage) -> bool:
    return stage.start_token.is_cuda


def are_steps_kept(stage: Stage, decoding: Decoding) -> bool:
    """Those that take time to make."""
    return decoding.compiled or is_on_gpu(stage)


def cache_bytes(
    stage: Stage, *, rows: int, length: int, sampling: Sampling, decoding: Decoding
) -> float:
    """Of the cache in a step of these sizes and settings."""
    twins = 1 if sampling.guidance == 1.0 else 2
    dtype = decoding.cache_dtype or _activations(stage, decoding.weight_dtype)
    scale = torch.float32.itemsize if dtype == torch.float8_e4m3fn else 0
    transformer = stage.transformer
    of_a_token = transformer.heads * (transformer.dim_head * dtype.itemsize + scale)
    return 2.0 * rows * twins * length * of_a_token * len(transformer.layers)


def _identity(stage: Stage) -> Hashable:
    """Where the weights lie, how often each was written to, and their sums.

    What is written through `.data` or in inference mode is not counted: there the sums tell. They
    are read back at once, so a GPU is waited for once a window.
    """
    weights = list(stage.parameters())
    with torch.no_grad():
        parts = [part for weight in weights for part in weight.flatten().split(SUMMED_AT_ONCE)]
        sums = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    written = [0 if weight.is_inference() else weight._version for weight in weights]
    # As bits: a sum that is NaN equals itself.
    bits = sums.view(torch.int64).tolist()
    return tuple(weight.data_ptr() for weight in weights), tuple(written), tuple(bits)
