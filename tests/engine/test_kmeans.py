from itertools import pairwise

import pytest
import torch
from torch import distributed, multiprocessing

from musiclm_engine.kmeans import kmeans, residual_kmeans
from musiclm_kernels import rvq_encode


def blobs(num_rows=600, num_blobs=8, D=4, noise=0.01, seed=3):
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(num_blobs, D, generator=generator)
    which = torch.randint(num_blobs, (num_rows,), generator=generator)
    return centres, centres[which] + noise * torch.randn(num_rows, D, generator=generator)


def cloud(num_rows=500, D=6, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, D, generator=generator)


def in_batches(points, *sizes):
    """A stream of the points in batches of these sizes, and a last one of what is left."""
    return lambda: iter(points.split([*sizes, len(points) - sum(sizes)]))


def error(points, codebooks):
    return (points - rvq_encode(points, codebooks)[1]).square().sum(1).mean().item()


def lloyd_by_loops(points, centroids):
    """One step, a point at a time; a cluster without points gives NaN."""
    sums, counts = torch.zeros_like(centroids), torch.zeros(len(centroids))
    for point in points:
        nearest = (point - centroids).square().sum(1).argmin()
        sums[nearest] += point
        counts[nearest] += 1
    return sums / counts[:, None]


def test_a_step_is_lloyds():
    points = cloud(80)
    for iterations in (1, 2, 3):
        before = kmeans(points, 5, seed=1, iterations=iterations)
        after = kmeans(points, 5, seed=1, iterations=iterations + 1)
        torch.testing.assert_close(after, lloyd_by_loops(points, before))


def test_it_finds_every_blob():
    centres, points = blobs()
    centroids = kmeans(points, 64, seed=0, iterations=10)
    assert centroids.shape == (64, 4) and centroids.dtype == torch.float32
    assert torch.cdist(centres, centroids).amin(1).max() < 0.05
    assert error(points, centroids[None]) < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_error_never_grows(seed):
    points = cloud()
    errors = [
        error(points, kmeans(points, 40, seed=seed, iterations=n)[None]) for n in range(1, 15)
    ]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_an_empty_cluster_moves_to_a_point():
    points = torch.cat([torch.zeros(50, 2), torch.ones(1, 2), 2 * torch.ones(1, 2)])
    # Nearly all first centroids are the same point, so that all but one of those are empty.
    centroids = kmeans(points, 20, seed=0, iterations=12)
    assert error(points, centroids[None]) == 0
    assert (torch.cdist(centroids, points).amin(1) == 0).all()


def test_as_many_points_as_clusters_are_all_of_them():
    points = cloud(24)
    centroids = kmeans(points, 24, seed=5, iterations=1)
    assert torch.equal(torch.cdist(centroids, points).argmin(1).sort().values, torch.arange(24))
    torch.testing.assert_close(centroids.sort(0).values, points.sort(0).values)


def test_first_centroids_are_a_uniform_sample(monkeypatch):
    monkeypatch.setattr("musiclm_engine.kmeans._lloyd_step", lambda _, centroids, *__: centroids)
    points = torch.arange(12.0)[:, None]
    counts = torch.zeros(12)
    for seed in range(300):
        drawn = kmeans(in_batches(points, 5), 3, seed=seed)[:, 0].long()
        assert len(set(drawn.tolist())) == 3
        counts[drawn] += 1
    assert (counts - 75).square().sum() / 75 < 31.3  # chi-squared of 11: p < 0.001


@pytest.mark.parametrize("sizes", [(1,), (100, 0, 7), (250,), (499,)])
def test_batches_do_not_matter(sizes):
    points = cloud()
    whole = residual_kmeans(points, 3, 16, seed=7, iterations=4)
    streamed = residual_kmeans(in_batches(points, *sizes), 3, 16, seed=7, iterations=4)
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)


def test_large_tensors_are_cut(monkeypatch):
    points = cloud()
    whole = residual_kmeans(points, 2, 16, seed=7, iterations=3)
    monkeypatch.setattr("musiclm_engine.kmeans.MAX_ROWS", 64)
    cut = residual_kmeans(points, 2, 16, seed=7, iterations=3)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_each_level_clusters_what_is_left():
    points = cloud()
    codebooks = residual_kmeans(points, 4, 32, seed=0, iterations=8)
    assert codebooks.shape == (4, 32, 6)
    errors = [error(points, codebooks[:q]) for q in range(1, 5)]
    assert all(later < 0.8 * earlier for earlier, later in pairwise(errors))
    torch.testing.assert_close(codebooks[0], kmeans(points, 32, seed=0, iterations=8))
    left = points - rvq_encode(points, codebooks[:1])[1]
    assert error(left, codebooks[1:]) == pytest.approx(errors[3], rel=1e-4)


def test_the_seed_chooses_and_the_generator_does_not():
    points = cloud()
    first = kmeans(points, 16, seed=1, iterations=3)
    torch.manual_seed(5)
    assert torch.equal(kmeans(points, 16, seed=1, iterations=3), first)
    assert not torch.equal(kmeans(points, 16, seed=2, iterations=3), first)


def test_it_reads_as_often_as_it_says_and_holds_one_batch_at_a_time():
    points, readings, batches = cloud(), [], []

    def stream():
        readings.append(len(readings))
        for rows in points.split(50):
            batches.append(rows)
            yield batches.pop()

    residual_kmeans(stream, 2, 8, seed=0, iterations=3)
    assert len(readings) == 1 + 2 * (1 + 3) and not batches


def test_other_dtypes():
    points = cloud().double()
    centroids = kmeans(points, 8, seed=0, iterations=3)
    assert centroids.dtype == torch.float32
    assert torch.equal(centroids, kmeans(points.float(), 8, seed=0, iterations=3))


def exhausted():
    rows = iter(cloud().split(100))
    return lambda: rows


POINTS = cloud(20)


@pytest.mark.parametrize(
    "batches, K, message",
    [
        (POINTS, 21, "points are 20, k-means of 21 clusters wants at least 21"),
        (lambda: iter([]), 1, "points are 0, k-means of 1"),
        (POINTS[0], 2, "a batch is torch.float32 of shape"),
        (POINTS.long(), 2, "a batch is torch.int64"),
        (lambda: [POINTS, POINTS[:, :5]], 2, r"of shape \(20, 5\), wanted floats of shape \(N, 6"),
        (POINTS.clone().index_fill_(0, torch.tensor(3), torch.inf), 2, "not finite"),
        (POINTS * torch.nan, 2, "not finite"),
        (POINTS.double() * 1e300, 2, "not finite"),
        (POINTS[:, :0], 2, "wanted floats of shape"),
        (exhausted(), 2, "batches held 500 points and now hold 0"),
        (POINTS, 0, "codebook_size 0"),
    ],
)
def test_refusals(batches, K, message):
    with pytest.raises(ValueError, match=message):
        kmeans(batches, K, seed=0)
    with pytest.raises(ValueError, match="iterations 0"):
        kmeans(POINTS, 2, seed=0, iterations=0)


def cluster_a_part(rank, folder, cuts):
    """What each process does with its part of the points."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(cuts) - 1
    )
    part = cloud()[cuts[rank] : cuts[rank + 1]]
    points = in_batches(part, len(part) // 3)
    world = distributed.group.WORLD
    codebooks = residual_kmeans(points, 2, 40, seed=7, iterations=4, group=world)
    one_is_bad = part * (1 if rank == 0 else torch.nan)
    one_is_empty = part[: 100 * rank]
    for refused, message in (
        (part[:1], "points are 2 in all"),
        (one_is_bad, "not finite"),
        (one_is_empty, r"\[0, 100\] in the processes"),
    ):
        # The caught exception is not kept: it would hold the group beyond the next lines.
        with pytest.raises(ValueError, match=message):
            kmeans(refused, 40, seed=0, group=world)
    torch.save(codebooks, f"{folder}/{rank}.pt")
    del world
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="PyTorch was built without processes")
@pytest.mark.parametrize("cuts", [(0, 130, 500)])
def test_processes_get_what_one_process_gets_of_all_points(tmp_path, cuts):
    multiprocessing.spawn(cluster_a_part, (str(tmp_path), cuts), nprocs=len(cuts) - 1)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(cuts) - 1)]
    alone = residual_kmeans(cloud(), 2, 40, seed=7, iterations=4)
    for codebooks in results:
        assert torch.equal(codebooks, results[0])
        torch.testing.assert_close(codebooks, alone, rtol=1e-5, atol=1e-5)
