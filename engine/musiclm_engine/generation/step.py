"""A decode step in buffers that never move: the same launches for every token."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from musiclm_engine.generation.cache import CachedLayer, KVCache
from musiclm_engine.generation.cuda_graph import CudaGraph
from musiclm_engine.generation.decoder import Decoder, Memory, step_layers
from musiclm_engine.generation.frozen import Frozen
from musiclm_engine.generation.next_token import draw_next_token
from musiclm_engine.generation.ops import KERNELS, StepOps
from musiclm_engine.generation.sampling import Sampling

COMPILED_BLOCK = 128  # slots by which a compiled step's view of the cache grows
ALIGNED = 4  # int32 values in 16 bytes, where a row of the clock begins

# Rows of the clock, which holds what changes with every token: R values each.
POSITION, LENGTH, QUERY_CODE, KEY_CODE, SLOT = CLOCK_ROWS = range(5)


class StepBuffers(NamedTuple):
    """All that a step reads and writes beside the weights.

    Attributes:
        x: [R, D] or [R, s, D] float32, the embeddings of the tokens to take in.
        layers: of the cache.
        k_codes: [R, S] int32, or None without a table.
        step: () int64, number of the token that is drawn next.
        plan: [N + 1, 5, R'] int32, the clock at every step; R' is R rounded up.
        clock: [5, R'] int32, the plan's row of this step.
        seeds: [B] int64.
        finished: [B] bool, or None without an end token.
        tokens: [B, N] int64, by number.
        counters: int32 zeros, for kernels whose programs meet.
        memory: of cross-attention, or None.
    """

    x: Tensor
    layers: tuple[CachedLayer, ...]
    k_codes: Tensor | None
    step: Tensor
    plan: Tensor
    clock: Tensor
    seeds: Tensor
    finished: Tensor | None
    tokens: Tensor
    counters: Tensor
    memory: Memory | None


def run_step(
    decoder: Decoder,
    buffers: StepBuffers,
    *,
    sampling: Sampling,
    eos: int | None,
    is_ring: bool,
    dtype: torch.dtype,
    ops: StepOps,
) -> None:
    """Take in x, draw a token for each row, and set everything for the next call."""
    R = len(buffers.x)
    clock = buffers.clock
    cache = KVCache(buffers.layers, positions=clock[POSITION, :R], lengths=clock[LENGTH, :R])
    k_codes, q_code = buffers.k_codes, None
    if k_codes is not None:
        q_code = clock[QUERY_CODE, :R]
        if is_ring:
            slot = clock[SLOT, :1].to(torch.int64)
            k_codes.index_copy_(1, slot, clock[KEY_CODE, :R, None])
    step_layers(
        decoder, buffers.x, cache, memory=buffers.memory, q_code=q_code, k_codes=k_codes,
        counters=buffers.counters, dtype=dtype, ops=ops,
    )  # fmt: skip
    tokens = draw_next_token(
        decoder, buffers.x, step=buffers.step, seeds=buffers.seeds, sampling=sampling,
        eos=eos, finished=buffers.finished, counters=buffers.counters, ops=ops,
    )  # fmt: skip
    number = buffers.step.view(1)
    buffers.tokens.index_copy_(1, number, tokens[:, None])
    buffers.step.add_(1)
    torch.index_select(buffers.plan, 0, number, out=clock[None])


class DecodeStep:
    """One more token for each of B rows, again and again.

    A step is a fixed list of launches on fixed buffers: whatever changes from token to token is
    read on the device, and nothing waits for it. So a step runs as it is, compiled on a CPU, or as
    a CUDA graph.

        step = DecodeStep(decoder, rows=4, length=1000, sampling=Sampling(top_k=50))
        step.cache.append(...)  # keys and values of tokens that are given, layer by layer
        step.begin(embeddings, seeds=seeds, position=9)
        for _ in range(991):
            step()
        step.tokens  # [4, 991] so far

    Args:
        decoder: the weights.
        rows: B. With guidance each row has a twin without the condition, and R = 2 B rows are
            decoded, the twins last; else R = B.
        length: N, tokens of a whole sequence at most, given ones included.
        sampling: settings of the draw. They never change: a graph holds them.
        slots: S of the cache, N if None. With fewer each token sees the S newest.
        eos: a token that ends its row: it alone follows.
        memory: of R rows, for a decoder with cross-attention.
        dtype: of what goes from one part of a layer to the next; the weights' if None, float32
            beside weights of 8 bits.
        cache_dtype: torch.float8_e4m3fn, or dtype if None.
        compiled: compile the step, on a CPU, with the weights as constants: see `Frozen`.
        graph: on a GPU, capture the step as a CUDA graph.
        ops: the operations, or their definitions as an oracle.

    Raises:
        ValueError: an argument is not as above.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int,
        length: int,
        sampling: Sampling,
        slots: int | None = None,
        eos: int | None = None,
        memory: Memory | None = None,
        dtype: torch.dtype | None = None,
        cache_dtype: torch.dtype | None = None,
        compiled: bool = False,
        graph: bool = True,
        ops: StepOps = KERNELS,
    ) -> None:
        slots = length if slots is None else slots
        for name, number in (("rows", rows), ("length", length), ("slots", slots)):
            if number < 1:
                raise ValueError(f"{name} is {number}, wanted at least 1")
        dtype = dtype or _natural_dtype(decoder)
        cache_dtypes = {dtype} | ({torch.float8_e4m3fn} if dtype.itemsize < 8 else set())
        if cache_dtype is not None and cache_dtype not in cache_dtypes:
            wanted = " or ".join(sorted(map(str, cache_dtypes)))
            raise ValueError(f"cache_dtype is {cache_dtype}, wanted {wanted} beside {dtype}")
        device = decoder.embedding.device
        if compiled and device.type != "cpu":
            raise ValueError(f"compiled is True, wanted False on {device}")
        R = rows if sampling.guidance == 1.0 else 2 * rows
        attends_memory = any(layer.cross_attention is not None for layer in decoder.layers)
        if attends_memory != (memory is not None):
            raise ValueError(
                f"memory is {'None' if memory is None else 'given'}, wanted it "
                f"{'for' if attends_memory else 'for nothing but'} a decoder with cross-attention"
            )
        if eos is not None and not 0 <= eos < decoder.head.shape[1]:
            raise ValueError(f"eos is {eos}, wanted 0 to {decoder.head.shape[1] - 1}")
        if memory is not None and len(memory.lengths) != R:
            raise ValueError(f"memory is of {len(memory.lengths)} rows, wanted {R}")
        self.dtype = dtype
        self._decoder = decoder
        self._constants: dict[str, Any] = {
            "sampling": sampling, "eos": eos, "is_ring": slots < length, "dtype": dtype, "ops": ops,
        }  # fmt: skip
        with torch.inference_mode(False):  # so that they can be written in any mode
            # A slot more than is ever seen: a view of all would be contiguous and others not,
            # which would be compiled twice.
            self.cache = KVCache.empty(
                layers=len(decoder.layers), batch=R, heads=decoder.key_heads,
                slots=slots + compiled, dim_head=decoder.dim_head, device=device,
                dtype=cache_dtype or dtype,
            ).first_slots(slots)  # fmt: skip
            self.buffers = _new_buffers(
                decoder, self.cache, rows=rows, length=length, has_end=eos is not None,
                memory=memory, dtype=torch.promote_types(dtype, torch.float32), spare=compiled,
            )  # fmt: skip
        self._position = length  # of the token to take in; nothing to do before `begin`
        self._number = 0  # of the token that is drawn next
        self._run_compiled = (
            Frozen(partial(run_step, **self._constants), decoder) if compiled else None
        )
        self._filled: StepBuffers | None = None
        self._graph = None
        if graph and device.type == "cuda":
            tensors = [b for b in self.buffers if isinstance(b, Tensor)]
            with torch.cuda.device(device):
                self._graph = CudaGraph(self._run_eagerly, state=tensors)

    @property
    def length(self) -> int:
        return self.buffers.tokens.shape[1]

    @property
    def tokens(self) -> Tensor:
        """[B, number of the next token] int64: those before `begin`'s first one are what they were."""
        return self.buffers.tokens[:, : self._number]

    @torch.inference_mode()
    def begin(
        self,
        x: Tensor,
        *,
        seeds: Tensor,
        position: int,
        number: int = 0,
        query_codes: Tensor | None = None,
        key_codes: Tensor | None = None,
    ) -> None:
        """Start, or start again with other inputs.

        The first step takes in token number `position` of the sequence; those before it are in
        the cache, S at most.

        Args:
            x: [R, D] or [R, s, D], its embedding.
            seeds: [B] int64.
            position: within the sequence, below N.
            number: of the token that is drawn first: its level is number % L, its noise that of
                (seed, number); up to `position`.
            query_codes, key_codes: [1 or R, N] int32, with a table and only then: of each token
                of the sequence, as it looks at others and as it is looked at.

        Raises:
            ValueError: an argument is not as above.
        """
        buffers = self.buffers
        for name, given, wanted in (("x", x, buffers.x), ("seeds", seeds, buffers.seeds)):
            if given.shape != wanted.shape:
                raise ValueError(f"{name} is {tuple(given.shape)}, wanted {tuple(wanted.shape)}")
        if not 0 <= number <= position < self.length:
            raise ValueError(
                f"number is {number} and position {position}, wanted number <= position < "
                f"{self.length}"
            )
        for name, codes in (("query_codes", query_codes), ("key_codes", key_codes)):
            came = None if codes is None else tuple(codes.shape)
            fitting: list[tuple[int, ...] | None] = [None]
            if buffers.k_codes is not None:
                fitting = [(rows, self.length) for rows in sorted({1, len(buffers.x)})]
            if came not in fitting:
                raise ValueError(f"{name} is {came}, wanted {' or '.join(map(str, fitting))}")
        buffers.x.copy_(x)
        buffers.seeds.copy_(seeds)
        buffers.step.fill_(number)
        if buffers.finished is not None:
            buffers.finished.fill_(False)
        self._write_plan(position, number, query_codes, key_codes)
        buffers.clock.copy_(buffers.plan[number])
        self._position, self._number = position, number

    def _write_plan(
        self, position: int, number: int, query_codes: Tensor | None, key_codes: Tensor | None
    ) -> None:
        plan, k_codes, slots = self.buffers.plan, self.buffers.k_codes, self.cache.slots
        positions = torch.arange(position, self.length, device=plan.device)
        rows = plan[number : number + len(positions)]
        rows[:, POSITION] = positions[:, None]
        rows[:, LENGTH] = (positions + 1).clamp(max=slots)[:, None]
        if k_codes is not None and query_codes is not None and key_codes is not None:
            R = len(k_codes)
            rows[:, QUERY_CODE, :R] = query_codes.expand(R, -1)[:, position:].T
            rows[:, KEY_CODE, :R] = key_codes.expand(R, -1)[:, position:].T
            rows[:, SLOT] = (positions % slots)[:, None]
            # A ring's later slots are given their codes as they are filled.
            known = torch.arange(max(0, position - slots), self.length, device=plan.device)[:slots]
            k_codes[:, known % slots] = key_codes[:, known]
        # The row after the last is looked up and never used: what is there writes nothing.
        plan[number + len(positions), POSITION] = -1

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Draw the next token of each row: [B] int64, overwritten by the next call.

        Raises:
            RuntimeError: the sequence is full, or was not begun.
        """
        if self._position >= self.length:
            raise RuntimeError(f"the sequence holds {self.length} tokens: begin another")
        if self._graph is not None:
            self._graph.replay()
        elif self._run_compiled is not None:
            self._run_compiled(self._filled_buffers())
        else:
            self._run_eagerly()
        self._position += 1
        self._number += 1
        return self.buffers.tokens[:, self._number - 1]

    def _run_eagerly(self) -> None:
        run_step(self._decoder, self.buffers, **self._constants)

    def _filled_buffers(self) -> StepBuffers:
        """With the cache as far as it is filled: the compiled body reads all that it is given."""
        blocks = -(-(self._position + 1) // COMPILED_BLOCK)
        slots = min(self.cache.slots, blocks * COMPILED_BLOCK)
        if self._filled is None or self._filled.layers[0].keys.shape[2] != slots:
            layers = self.cache.first_slots(slots).layers
            k_codes = self.buffers.k_codes
            k_codes = None if k_codes is None else k_codes[:, :slots]
            self._filled = self.buffers._replace(layers=layers, k_codes=k_codes)
            growing = [(t, 2) for layer in layers for t in layer] + [(k_codes, 1)]
            for tensor, dim in growing:
                if tensor is not None:
                    torch._dynamo.mark_dynamic(tensor, dim)
        return self._filled


def _natural_dtype(decoder: Decoder) -> torch.dtype:
    dtype = decoder.head.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


def _new_buffers(
    decoder: Decoder,
    cache: KVCache,
    *,
    rows: int,
    length: int,
    has_end: bool,
    memory: Memory | None,
    dtype: torch.dtype,
    spare: bool,
) -> StepBuffers:
    R, device = len(cache.positions), cache.positions.device
    clock_shape = (len(CLOCK_ROWS), -(-R // ALIGNED) * ALIGNED)
    D = decoder.embedding.shape[-1]

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    return StepBuffers(
        x=zeros(R, *([decoder.streams] if decoder.streams > 1 else []), D, dtype=dtype),
        layers=cache.layers,
        k_codes=None
        if decoder.table is None
        else zeros(R, cache.slots + spare, dtype=torch.int32)[:, : cache.slots],
        step=zeros(dtype=torch.int64),
        plan=zeros(length + 1, *clock_shape, dtype=torch.int32),
        clock=zeros(*clock_shape, dtype=torch.int32),
        seeds=zeros(rows, dtype=torch.int64),
        finished=zeros(rows, dtype=torch.bool) if has_end else None,
        tokens=zeros(rows, length, dtype=torch.int64),
        counters=zeros(R * decoder.heads, dtype=torch.int32),
        memory=memory,
    )
