"""The launches we ship, one line each."""

from benchmarks.offline.promises import Variant

VARIANTS: list[Variant] = []
