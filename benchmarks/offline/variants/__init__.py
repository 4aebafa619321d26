"""The launches we ship, a module each op and a line each launch."""

from benchmarks.offline.promises import Variant
from benchmarks.offline.variants import attention, qk_l2norm

VARIANTS: list[Variant] = [*attention.VARIANTS, *qk_l2norm.VARIANTS]
