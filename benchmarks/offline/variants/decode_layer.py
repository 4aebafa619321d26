"""The launches of a decode step's layer: our stages of width 1,024, and audiolm-pytorch's."""

from functools import partial
from typing import Any

import torch

from benchmarks.offline.promises import WARP_DOTS, Promises, Variant, meta
from musiclm_kernels.decode_layer.launch import decode_linear, decode_qkv, decode_residual

F32, BF16, INT8, FLOAT8 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
D = 1024
ROWS = {"one by one": 2, "at once": 16}


def norm(K: int) -> Any:
    return meta(K, dtype=F32), meta(K, dtype=F32)


def weights(N: int, K: int, dtype: torch.dtype) -> Any:
    return meta(N, K, dtype=dtype), meta(N, dtype=F32) if dtype.itemsize == 1 else None


def stream(B: int, streams: int) -> Any:
    """x, and the parts of a connection."""
    if not streams:
        return meta(B, D, dtype=F32), (None, None, None)
    columns = streams + 2
    shapes = ((columns, D), (columns,), (streams, columns))
    return meta(B, streams, D, dtype=F32), tuple(meta(*shape, dtype=F32) for shape in shapes)


def up(B: int, dtype: torch.dtype, *, F: int = 4096, streams: int = 0, normed: bool = True) -> Any:
    x, connection = stream(B, streams)
    weight, scale = weights(2 * F, D, dtype)
    norms: Any = norm(D) if normed else (None, None)
    arguments: Any = (x, weight, scale, *norms, "geglu", *connection, BF16)
    return decode_linear(*arguments)


def qkv(
    B: int,
    dtype: torch.dtype,
    *,
    Hkv: int = 16,
    streams: int = 0,
    upstream: bool = False,
    gains: bool = False,
    d: int = 64,
    cache: torch.dtype = BF16,
) -> Any:
    x, connection = stream(B, streams)
    H, S = 1024 // d, 1024
    Hkv = min(H, Hkv)
    weight, scale = weights((H + 2 * Hkv) * d, D, dtype)
    caches: Any = [meta(B, Hkv, S, d, dtype=cache) for _ in range(2)]
    gain = meta(d, dtype=F32) if gains else None
    scales: Any = [meta(B, Hkv, S, dtype=F32) if cache == FLOAT8 else None for _ in range(2)]
    first_value = meta(B, Hkv, d, dtype=BF16) if upstream else None
    arguments: Any = (
        x, weight, *caches, meta(B, dtype=torch.int32), scale, *norm(D), not upstream, gain, gain,
        first_value, *connection, *scales, BF16,
    )  # fmt: skip
    return decode_qkv(*arguments)


def residual(B: int, dtype: torch.dtype, *, K: int, streams: int = 0, normed: bool = False) -> Any:
    x, _ = stream(B, streams)
    mix = meta(B, streams, streams + 2, dtype=F32) if streams else None
    weight, scale = weights(D, K, dtype)
    norms: Any = norm(K) if normed else (None, None)
    arguments: Any = (x, meta(B, K, dtype=BF16), weight, scale, *norms, mix, False)
    return decode_residual(*arguments)


LAUNCHES: dict[str, Any] = {
    "qkv": qkv,
    "output": partial(residual, K=1024),
    "up": up,
    "down": partial(residual, K=4096),
}
UPSTREAM: dict[str, Any] = {
    "qkv": partial(qkv, Hkv=1, streams=4, upstream=True),
    "output": partial(residual, K=1024, streams=4),
    "up": partial(up, F=2730, streams=4),
    "down": partial(residual, K=2730, streams=4, normed=True),
}
HEADS: dict[str, Any] = {
    "unit heads": partial(qkv, gains=True),
    "unit heads of 128": partial(qkv, gains=True, d=128),
    "unit heads of 256": partial(qkv, gains=True, d=256),
    "float8 caches": partial(qkv, cache=FLOAT8),
}


def variant(
    name: str, launch: Any, dtype: torch.dtype, rows: str, *, float8: bool = False
) -> Variant:
    dots = WARP_DOTS if ROWS[rows] > 4 and dtype != F32 else None
    float8 = float8 or dtype == FLOAT8
    return Variant(
        f"decode_layer {name} {str(dtype)[6:]} {rows}",
        partial(launch, ROWS[rows], dtype),
        Promises(tensor_cores=dots, no_float_atomics=True, prefetches=dtype != F32),
        (90, 100) if float8 else (80, 90, 100),
    )


VARIANTS = [
    variant(name, launch, dtype, rows)
    for rows in ROWS
    for dtype in (BF16, INT8, FLOAT8)
    for name, launch in LAUNCHES.items()
]
VARIANTS += [
    variant(f"audiolm-pytorch {name}", launch, BF16, rows)
    for rows in ROWS
    for name, launch in UPSTREAM.items()
]
VARIANTS += [
    variant(f"qkv of {name}", launch, BF16, "at once", float8=name == "float8 caches")
    for name, launch in HEADS.items()
]
VARIANTS += [
    variant("wide down with a norm", partial(residual, K=8192, normed=True), BF16, "at once"),
    variant("up without a norm", partial(up, normed=False), BF16, "at once"),
    variant("qkv without a norm of keys", partial(qkv, upstream=True), BF16, "at once"),
]
VARIANTS += [variant(name, launch, F32, rows) for rows in ROWS for name, launch in LAUNCHES.items()]
VARIANTS += [variant("qkv of unit heads", HEADS["unit heads"], F32, "at once")]
