"""Decode attention in Triton: a program attends BLOCK_S slots of one row and of one key head, its
split, for the HEADS query heads that read them. Keys and values are loaded once, all at a time.

Each split leaves its maximum, sum and output in fp32; the program that arrives last of those with
slots to attend merges them in the order of the slots. Softmax runs in base 2. State is kept as top
and total [HEADS_2] and acc [HEADS_2, BLOCK_D], HEADS_2 being HEADS up to a power of two.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["offset", "window", "S", "T", "units"])
def attend(
    q_ptr,  # [B, H, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,  # [B, Hkv, S, D]
    lengths_ptr,  # [B]
    table_ptr,  # [H, T], packed, or None
    q_code_ptr,  # [B]
    k_code_ptr,  # [B or 1, S]
    key_mask_ptr,  # [B, S] or None
    null_ptr,  # [2, Hkv, D], packed, or None
    k_scale_ptr,  # [B, Hkv, S] or None
    v_scale_ptr,  # [B, Hkv, S]
    state_ptr,  # [B, H / HEADS, splits, 2, HEADS_2]: top and total of each split
    acc_ptr,  # [B, H / HEADS, splits, HEADS_2, BLOCK_D]
    counters_ptr,  # [B, H / HEADS]: splits that have arrived
    out_ptr,  # [B, H, D], packed
    offset,
    scale,
    window,
    S,
    T,
    units,  # H / HEADS
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_q_code,
    stride_k_code,
    stride_mask,
    stride_k_scale_b,
    stride_k_scale_h,
    stride_v_scale_b,
    stride_v_scale_h,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a key head
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS_2: tl.constexpr,
    CHUNK: tl.constexpr,  # splits merged at a time
    MATRIX: tl.constexpr,  # products on the tensor cores
    PDL: tl.constexpr,
):
    if PDL:
        # The newest slot and q are of the kernel before; the next one may begin to load weights.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    unit = tl.program_id(0)
    split = tl.program_id(1)
    b = (unit // units).to(tl.int64)
    head = (unit % units).to(tl.int64) * HEADS
    key_head = head // GROUP
    end = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)
    begin = tl.maximum(end - window, 0)
    first = begin // BLOCK_S
    last = tl.maximum(tl.cdiv(end, BLOCK_S), first + 1)  # an empty row's first split writes zeros
    if (split >= first) & (split < last):
        d = tl.arange(0, BLOCK_D)
        h = tl.arange(0, HEADS_2)
        start = (split * BLOCK_S).to(tl.int64)
        slot = split * BLOCK_S + tl.arange(0, BLOCK_S)
        filled = (slot >= begin) & (slot < end)
        visible = filled
        if table_ptr is not None:
            q_code = tl.load(q_code_ptr + b * stride_q_code).to(tl.int64) + offset
            k_code = tl.load(k_code_ptr + b * stride_k_code + slot, mask=filled, other=0)
            index = tl.minimum(tl.maximum(q_code - k_code, 0), T - 1).to(tl.int32)
        if key_mask_ptr is not None:
            allowed = tl.load(key_mask_ptr + b * stride_mask + slot, mask=filled, other=0)
            visible &= allowed != 0
        k_ptr += b * stride_kb + key_head * stride_kh + start * stride_ks
        v_ptr += b * stride_vb + key_head * stride_vh + start * stride_vs
        row = tl.arange(0, BLOCK_S)[:, None]
        # What is masked may hold anything: a weight of zero does not undo a NaN among the values.
        inside = (d < D)[None, :]
        k = tl.load(k_ptr + row * stride_ks + d[None, :], mask=filled[:, None] & inside, other=0.0)
        v = tl.load(v_ptr + row * stride_vs + d[None, :], mask=visible[:, None] & inside, other=0.0)
        if table_ptr is not None:
            if MATRIX:
                of_head = table_ptr + (head + tl.minimum(h, HEADS - 1))[None, :] * T
                bias = tl.load(of_head + index[:, None])
            else:
                bias = tl.load(table_ptr + head * T + index)[:, None]
        q_ptr += b * stride_qb + head * stride_qh
        q_inside = (h < HEADS)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + h[:, None] * stride_qh + d[None, :], mask=q_inside, other=0.0)

        if MATRIX:
            scores = tl.dot(k.to(q.dtype), tl.trans(q))  # [BLOCK_S, HEADS_2]
        else:
            scores = tl.sum(k.to(tl.float32) * q.to(tl.float32), 1)[:, None]
        scores *= scale * LOG2_E
        if k_scale_ptr is not None:
            k_scale_ptr += b * stride_k_scale_b + key_head * stride_k_scale_h
            scores *= tl.load(k_scale_ptr + slot, mask=filled, other=0.0)[:, None]
        if table_ptr is not None:
            scores += bias * LOG2_E
        scores = tl.where(visible[:, None], scores, float("-inf"))

        top = tl.max(scores, 0)
        weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[None, :])
        total = tl.sum(weights, 0)
        largest = 1.0
        if v_scale_ptr is not None:
            v_scale_ptr += b * stride_v_scale_b + key_head * stride_v_scale_h
            v_scale = tl.load(v_scale_ptr + slot, mask=visible, other=0.0)
            largest = tl.max(v_scale)
            largest = tl.where(largest > 0.0, largest, 1.0)
            # at most 1, as fp16 wants the weights
            weights *= (v_scale / largest)[:, None]
        if MATRIX:
            acc = tl.trans(tl.dot(tl.trans(v.to(q.dtype)), weights.to(q.dtype)))
        else:
            acc = tl.sum(weights * v.to(tl.float32), 0)[None, :]
        acc *= largest

        is_last = True
        if last - first > 1:
            splits = tl.num_programs(1)
            state_ptr += tl.cast(unit, tl.int64) * splits * (2 * HEADS_2)
            acc_ptr += tl.cast(unit, tl.int64) * splits * (HEADS_2 * BLOCK_D)
            tl.store(state_ptr + split * (2 * HEADS_2) + h, top)
            tl.store(state_ptr + split * (2 * HEADS_2) + HEADS_2 + h, total)
            place = split * (HEADS_2 * BLOCK_D) + h[:, None] * BLOCK_D + d[None, :]
            tl.store(acc_ptr + place, acc)
            tl.debug_barrier()  # all threads have stored, before one of them says so
            arrived = tl.atomic_add(counters_ptr + unit, 1, sem="acq_rel")
            is_last = arrived == last - first - 1
            if is_last:
                tl.store(counters_ptr + unit, 0)
                top, total, acc = _merge(state_ptr, acc_ptr, first, last, HEADS_2, BLOCK_D, CHUNK)
        if is_last:
            if null_ptr is not None:
                null_ptr += key_head * D
                num_values = units * HEADS // GROUP * D
                null_key = tl.load(null_ptr + d, mask=d < D, other=0.0).to(tl.float32)
                null_value = tl.load(null_ptr + num_values + d, mask=d < D, other=0.0)
                score = tl.sum(q.to(tl.float32) * null_key[None, :], 1) * (scale * LOG2_E)
                higher = tl.maximum(top, score)
                shrink, weight = tl.exp2(top - higher), tl.exp2(score - higher)
                total = total * shrink + weight
                acc = acc * shrink[:, None] + weight[:, None] * null_value.to(tl.float32)[None, :]
            out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            out_ptr += (b * units * HEADS + head) * D
            place = h[:, None] * D + d[None, :]
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=q_inside)


@triton.jit
def _merge(
    state_ptr,  # [splits, 2, HEADS_2]
    acc_ptr,  # [splits, HEADS_2, BLOCK_D]
    first,
    last,
    HEADS_2: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Splits first to last as one: top, total and acc. Past the first cache, which may not know yet
    what other multiprocessors wrote. Splits are the last dimension: they then lie within a thread."""
    h = tl.arange(0, HEADS_2)
    d = tl.arange(0, BLOCK_D)
    top = tl.full([HEADS_2], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_2], tl.float32)
    acc = tl.zeros([HEADS_2, BLOCK_D], tl.float32)
    for chunk in range(first, last, CHUNK):
        split = chunk + tl.arange(0, CHUNK)
        here = (split < last)[None, :]
        of_split = state_ptr + split[None, :] * (2 * HEADS_2) + h[:, None]
        tops = tl.load(of_split, mask=here, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(of_split + HEADS_2, mask=here, other=0.0, cache_modifier=".cg")
        of_split = acc_ptr + split[None, None, :] * (HEADS_2 * BLOCK_D)
        of_split += h[:, None, None] * BLOCK_D + d[None, :, None]
        accs = tl.load(of_split, mask=here[:, None, :], other=0.0, cache_modifier=".cg")

        higher = tl.maximum(top, tl.max(tops, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weights = tl.exp2(top - shift), tl.exp2(tops - shift[:, None])
        total = total * shrink + tl.sum(totals * weights, 1)
        acc = acc * shrink[:, None] + tl.sum(accs * weights[:, None, :], 2)
        top = higher
    return top, total, acc
