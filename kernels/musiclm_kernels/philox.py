"""Philox4x32-10, the counter-based random numbers of every op, in PyTorch integer arithmetic.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The same bits as Triton's
`tl.randint` and `tl.rand` (triton/language/random.py), so a kernel draws what its reference draws.
Words are uint32 values held in int64.
"""

import torch
from torch import Tensor

NUM_ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
UNIFORM_SCALE = 4.6566127342e-10  # just under 2^-31, so that no draw rounds to 1 (Triton's figure)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random words for a counter of four words and a key of two; all broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        # A product of two words wraps as a signed number: all its 64 bits are right. Only its low
        # word is meant in c1 and c3, and the masks below see to that.
        product_0, product_2 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_2
        c0 = ((product_2 >> 32) ^ c1 ^ k0) & WORD
        c2 = ((product_0 >> 32) ^ c3 ^ k1) & WORD
        c1, c3 = product_2, product_0
        k0, k1 = k0 + KEY_STEP_0, k1 + KEY_STEP_1  # wrapped by the masks above
    return c0, c1 & WORD, c2, c3 & WORD


def random_words(seed: int | Tensor, offset: Tensor) -> Tensor:
    """One random word in [0, 2^32) for each offset, as int64: `tl.randint(seed, offset)`.

    Args:
        seed: an int, or int64 that broadcasts with offset.
        offset: int64.
    """
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=offset.device)
    zero = torch.zeros((), dtype=torch.int64, device=offset.device)
    counter = (offset & WORD, (offset >> 32) & WORD, zero, zero)
    return philox_4x32(counter, (seeds & WORD, (seeds >> 32) & WORD))[0]


def uniform(seed: int | Tensor, offset: Tensor) -> Tensor:
    """One float32 in [0, 1) for each offset: `tl.rand(seed, offset)`, bit for bit."""
    words = random_words(seed, offset)
    folded = torch.where(words > WORD // 2, WORD - words, words)  # 31 bits: sign folded away
    return folded.to(torch.float32) * UNIFORM_SCALE
