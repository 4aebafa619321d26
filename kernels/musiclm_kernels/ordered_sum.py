"""Sums of rows that share an index, the same bits on every run."""

from torch import Tensor


def sum_rows_by_index(rows: Tensor, index: Tensor, num_sums: int) -> Tensor:
    """sums[s] = sum of rows[n] over every n with index[n] == s.

    Args:
        rows: [N, C].
        index: [N] int64 in [0, num_sums).

    Returns:
        [num_sums, C].
    """
    sums = rows.new_zeros(num_sums, rows.shape[1])
    if rows.is_cuda:  # index_add_ would use atomics there; this one sorts
        return sums.index_put_((index,), rows, accumulate=True)
    return sums.index_add_(0, index, rows)
