"""Inputs of the parts of a decode step's layer, for the tests of the definitions and the kernels."""

import torch

from musiclm_kernels.decode_layer import HyperConnection, quantize_weight

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


class Draw:
    """Normal numbers, the same on every run."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=1.0, around=0.0, dtype=torch.float32):
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (around + scale * drawn).to(dtype)

    def weight(self, N, K, dtype):
        """The weight, and as keywords its scale."""
        drawn = self(N, K, scale=K**-0.5, dtype=torch.float64)
        if dtype not in EIGHT_BITS:
            return drawn.to(dtype), {}
        weight, scale = quantize_weight(drawn, dtype)
        return weight, {"weight_scale": scale}

    def norm(self, K, dtype=torch.float32):
        return {
            "norm_weight": self(K, scale=0.2, around=1.0, dtype=dtype),
            "norm_bias": self(K, scale=0.2, dtype=dtype),
        }

    def connection(self, s, D, dtype=torch.float32):
        return HyperConnection(
            weight=self(s + 2, D, dtype=dtype),
            scale=self(s + 2, scale=0.3, dtype=dtype),
            static=self(s, s + 2, scale=0.5, dtype=dtype),
        )


def linear_case(
    B=3, D=24, N=20, dtype=torch.float32, x_dtype=torch.float32, streams=0, norm=True, **options
):
    """x, weight and the keywords of decode_linear."""
    draw = Draw(B + D + N)
    x = draw(*((B, streams, D) if streams else (B, D)), around=0.5, dtype=x_dtype)
    weight, scale = draw.weight(N, D, dtype)
    keywords = scale | (draw.norm(D, x_dtype) if norm else {}) | options
    if streams:
        keywords["connection"] = draw.connection(streams, D, x_dtype)
    return (x, weight), keywords


def qkv_case(
    B=3,
    D=24,
    H=4,
    Hkv=2,
    d=8,
    S=5,
    dtype=torch.float32,
    x_dtype=torch.float32,
    cache_dtype=None,
    streams=0,
    gains=False,
    averaged=False,
    norm=True,
    **options,
):
    """x, weight, caches, positions and the keywords of decode_qkv. The caches hold other tokens."""
    (x, weight), keywords = linear_case(B, D, (H + 2 * Hkv) * d, dtype, x_dtype, streams, norm)
    draw = Draw(7)
    cache_dtype = cache_dtype or x_dtype
    caches = [draw(B, Hkv, S, d).to(cache_dtype) for _ in range(2)]
    positions = torch.tensor([(7, -1, 2)[b % 3] for b in range(B)], dtype=torch.int32)
    if cache_dtype == torch.float8_e4m3fn:
        keywords["k_scales"], keywords["v_scales"] = (draw(B, Hkv, S).abs() for _ in range(2))
    if gains:
        keywords["q_gain"], keywords["k_gain"] = draw(H, d, around=1.0), draw(d, around=1.0)
    if averaged:
        keywords["first_value"] = draw(B, Hkv, d, dtype=x_dtype)
    return (x, weight, *caches, positions), keywords | options


def residual_case(
    B=3,
    D=24,
    K=20,
    dtype=torch.float32,
    x_dtype=torch.float32,
    h_dtype=None,
    streams=0,
    norm=False,
    **options,
):
    """x, h, weight and the keywords of decode_residual."""
    draw = Draw(B + D + K + 1)
    x = draw(*((B, streams, D) if streams else (B, D)), dtype=x_dtype)
    h = draw(B, K, around=0.5, dtype=h_dtype or x_dtype)
    weight, scale = draw.weight(D, K, dtype)
    keywords = scale | (draw.norm(K, x_dtype) if norm else {}) | options
    if streams:
        keywords["mix"] = draw(B, streams, streams + 2, dtype=x_dtype)
    return (x, h, weight), keywords


def cloned(arguments, keywords):
    def clone(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    return tuple(map(clone, arguments)), {name: clone(value) for name, value in keywords.items()}


def rows(arguments, keywords, which):
    """A case's rows alone."""
    B = len(arguments[0])
    per_row = ("first_value", "mix", "k_scales", "v_scales")
    taken = [
        value[which].clone() if i != weight_place(arguments) and len(value) == B else value
        for i, value in enumerate(arguments)
    ]
    return tuple(taken), {
        name: value[which].clone() if name in per_row else value for name, value in keywords.items()
    }


def weight_place(arguments):
    return 2 if len(arguments) == 3 else 1


def results(function, arguments, keywords):
    """What a call returns and what it writes, by name; its arguments stay as they were."""
    arguments, keywords = cloned(arguments, keywords)
    returned = function(*arguments, **keywords)
    if len(arguments) == 3:  # decode_residual
        return {"x": arguments[0]}
    if len(arguments) == 2:
        found = dict(zip(("y", "mix"), returned, strict=True))
    else:
        found = dict(zip(("q", "v", "mix"), returned, strict=True))
        found |= {"k_cache": arguments[2], "v_cache": arguments[3]}
        found |= {name: keywords[name] for name in ("k_scales", "v_scales") if name in keywords}
    return {name: value for name, value in found.items() if value is not None}
