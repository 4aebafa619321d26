"""How far apart two heaps of embeddings lie, each taken for a Gaussian."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of rows [n, D] and [m, D].

    The squared Frechet distance (Dowson and Landau, J. Multivariate Analysis 12, 1982), as FID and
    FAD use it, in float64; covariances are of n - 1. tr (C_a C_b)^(1/2) is the sum of the roots of
    the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric: neither fewer rows than
    dimensions nor rounding can make it complex. Few rows make the distance too large: compare
    distances between heaps of equal sizes.

    Raises:
        ValueError: rows of other shapes, or not finite, or fewer than two.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"embeddings are {a.shape} and {b.shape}, wanted [n, D] and [m, D]")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"there are {len(a)} and {len(b)} embeddings, wanted at least 2 of each")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("embeddings hold values that are not finite")
    covariance_a, covariance_b = (np.atleast_2d(np.cov(rows.T)) for rows in (a, b))
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root @ covariance_b @ root
    shared = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    apart = a.mean(0) - b.mean(0)
    return float(
        max(apart @ apart + np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared, 0.0)
    )
