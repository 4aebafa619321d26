"""Which patches of a row stay, by one program."""

import triton
import triton.language as tl

MAX_RANKED = 16384  # patches whose words one program holds, 64 a thread


def block_and_warps(num_patches: int) -> tuple[int, int]:
    """BLOCK_N of `choose_row`, and warps."""
    block = max(triton.next_power_of_2(num_patches), 32)
    return block, 4 if block <= 4096 else 8


@triton.jit
def choose_row(
    seed_ptr,  # []
    num_valid_ptr,  # [B] or None
    indices_ptr,  # [B, keep]
    codes_ptr,  # [B, keep] or None
    mask_ptr,  # [B, keep] or None
    slots_ptr,  # [B, N]
    b,
    N,
    keep,
    grid_rows,
    RANKED: tl.constexpr,  # False where all patches stay
    BLOCK_N: tl.constexpr,
):
    """The choice of reference.py's `choose_patches` for row b, and what else follows from it."""
    patches = tl.arange(0, BLOCK_N)
    row = tl.cast(b, tl.int64)
    N = tl.cast(N, tl.int64)
    keep = tl.cast(keep, tl.int64)
    num_valid = N
    if num_valid_ptr is not None:
        num_valid = tl.minimum(tl.maximum(tl.load(num_valid_ptr + row).to(tl.int64), 1), N)
    count = tl.maximum((2 * num_valid * keep + N) // (2 * N), 1).to(tl.int32)

    chosen = patches < num_valid
    slot = patches
    if RANKED:
        words = tl.randint(tl.load(seed_ptr), (row << 32) + patches)
        last = _smallest(words, chosen, count)
        below = chosen & (words < last)
        equal = (chosen & (words == last)).to(tl.int32)
        room = count - tl.sum(below.to(tl.int32), axis=0)
        chosen = below | ((equal != 0) & (tl.cumsum(equal, axis=0) <= room))
        before = tl.cumsum(chosen.to(tl.int32), axis=0)
        slot = tl.where(chosen, before - 1, count + patches - before)

    there = patches < N
    tl.store(slots_ptr + row * N + patches, tl.where(chosen, slot, -1), mask=there)
    there &= slot < keep
    offsets = row * keep + slot
    tl.store(indices_ptr + offsets, patches.to(tl.int64), mask=there)
    if codes_ptr is not None:
        column = patches // grid_rows
        code = column * (2 * grid_rows - 1) + patches % grid_rows
        tl.store(codes_ptr + offsets, code, mask=there)
        tl.store(mask_ptr + offsets, chosen, mask=there)


@triton.jit
def _smallest(words, among, count):
    """The count-th smallest of these words, bit by bit from the highest: the largest number that
    fewer than `count` of them are below."""
    found = tl.cast(0, tl.uint32)
    bit = tl.cast(1 << 31, tl.uint32)
    for _ in range(32):
        num_below = tl.sum((among & (words < (found | bit))).to(tl.int32), axis=0)
        found = tl.where(num_below < count, found | bit, found)
        bit = bit >> 1
    return found
