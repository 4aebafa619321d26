"""Inputs of attention over a cache, and its definition by loops in float64."""

import torch

from musiclm_kernels.decode.reference import quantize_rows


def inputs(
    B=3, H=4, Hkv=2, S=9, D=8, T=11, dtype=torch.float64, *,
    biased=True, shared=False, masked=False, null=False, float8=False,
):  # fmt: skip
    """q, both caches and the options, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def codes(*shape):
        return torch.randint(0, 9, shape, generator=generator, dtype=torch.int32)

    k, v = draw(B, Hkv, S, D), draw(B, Hkv, S, D)
    given = {"q": draw(B, H, D), "k_cache": k, "v_cache": v}
    if float8:
        for name in ("k", "v"):
            cache, scales = quantize_rows(given[f"{name}_cache"])
            given |= {f"{name}_cache": cache, f"{name}_scales": scales}
    if biased:
        wide = torch.promote_types(dtype, torch.float32)
        given |= {
            "table": draw(H, T).to(wide),
            "q_code": codes(B),
            "k_codes": codes(1 if shared else B, S),
            "offset": 2,
        }
    if masked:
        given["key_mask"] = torch.rand(B, S, generator=generator) < 0.6
    if null:
        given["null_kv"] = draw(2, Hkv, D)
    return given


def to_float64(given):
    """The same values; float8 caches and their scales as they are."""
    stays = ("k_cache", "v_cache", "k_scales", "v_scales") if "k_scales" in given else ()
    return {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in stays
        else value
        for name, value in given.items()
    }


def by_loops(
    q, k_cache, v_cache, lengths, *, table=None, q_code=None, k_codes=None, offset=0, scale=None,
    key_mask=None, null_kv=None, k_scales=None, v_scales=None, window=None,
):  # fmt: skip
    """One score after another."""
    B, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(B):
        length = int(lengths[b])
        for h in range(H):
            head = h // (H // k_cache.shape[1])
            scores, values = [], []
            if null_kv is not None:
                scores.append(scale * q[b, h].double().dot(null_kv[0, head].double()))
                values.append(null_kv[1, head].double())
            for j in range(max(0, length - window) if window else 0, length):
                if key_mask is not None and not key_mask[b, j]:
                    continue
                key, value = k_cache[b, head, j].double(), v_cache[b, head, j].double()
                if k_scales is not None:
                    key, value = key * k_scales[b, head, j], value * v_scales[b, head, j]
                score = scale * q[b, h].double().dot(key)
                if table is not None:
                    row = b if len(k_codes) > 1 else 0
                    entry = q_code[b].item() - k_codes[row, j].item() + offset
                    score = score + table[h, min(max(entry, 0), table.shape[1] - 1)]
                scores.append(score)
                values.append(value)
            if scores:
                out[b, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out
