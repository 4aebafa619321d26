"""Lloyd's k-means over a whole data set."""

import torch
from torch import Tensor

from musiclm_kernels import rvq_encode


def kmeans(points: Tensor, num_clusters: int, *, seed: int, iterations: int = 25) -> Tensor:
    """Centroids that minimise the points' squared distance to the nearest of them.

    Args:
        points: [N, D] float.
        num_clusters: K.
        seed: of the first centroids, K distinct points, and of what replaces empty clusters.

    Returns:
        [K, D] float32.

    Raises:
        ValueError: there are fewer points than clusters.
    """
    if len(points) < num_clusters:
        raise ValueError(f"points are {len(points)}, k-means of {num_clusters} clusters wants more")
    generator = torch.Generator().manual_seed(seed)
    points = points.float()

    def random_points(count: int) -> Tensor:
        chosen = torch.randperm(len(points), generator=generator)[:count]
        return points[chosen.to(points.device)]

    centroids = random_points(num_clusters)
    for _ in range(iterations):
        nearest = rvq_encode(points, centroids[None], mode="fast")[0][:, 0]
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=num_clusters)
        centroids = sums / counts.clamp_min(1)[:, None]
        empty = counts == 0
        centroids[empty] = random_points(int(empty.sum()))
    return centroids
