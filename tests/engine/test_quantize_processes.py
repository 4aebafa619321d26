"""Two processes with half of a batch each are one process with all of it."""

import pytest
import torch
from torch import distributed, multiprocessing

from musiclm_engine.quantize import GroupedResidualVQ, ResidualVQ

NUM_PROCESSES = 2
STEPS = 3


def batch(step):
    return torch.randn(8, 25, 8, generator=torch.Generator().manual_seed(step))


def train(rank, num_processes, **options):
    """The state after some steps on this process's share of the batches, and all replacements."""
    torch.manual_seed(rank)  # nothing of what is shared may hang on a process's own generator
    rvq = ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, decay=0.5, **options)
    levels = []
    for step in range(STEPS):
        share = batch(step).chunk(num_processes)[rank]
        _, codes, _ = rvq(share)
        levels.append(int((codes[0, 0] >= 0).sum()))
    return {**rvq.state_dict(), "levels": torch.tensor(levels)}


def uneven(rank):
    """Codes that nothing chose after the first batch, with 3 vectors here and 7 there."""
    rvq = ResidualVQ(
        dim=8, num_quantizers=2, codebook_size=64, kmeans_init=True, threshold_ema_dead_code=0.1
    )
    rvq(batch(0)[rank, : 3 + 4 * rank])
    met = rvq.codebooks.clone()
    rvq(batch(1)[rank, : 3 + 4 * rank])
    return {**rvq.state_dict(), "met": met}


def worker(rank, folder):
    torch.set_num_threads(1)
    rvq = GroupedResidualVQ(dim=8, num_quantizers=2, codebook_size=16)  # before there are several
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=NUM_PROCESSES
    )
    rvq.load_state_dict(torch.load(folder / "start.pt"))
    rvq(batch(0).chunk(NUM_PROCESSES)[rank])
    made = {
        "plain": train(rank, NUM_PROCESSES, kmeans_init=True),
        "grouped": rvq.state_dict(),
        "apart": train(rank, NUM_PROCESSES, kmeans_init=True, sync_codebook=False),
        "dropping": train(
            rank, NUM_PROCESSES, kmeans_init=True, quantize_dropout=True, sync_kmeans=False
        ),
        "uneven": uneven(rank),
    }
    torch.save(made, folder / f"made{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def start():
    return GroupedResidualVQ(dim=8, num_quantizers=2, codebook_size=16).state_dict()


@pytest.fixture(scope="module")
def made(tmp_path_factory, start):
    """What each of the processes made."""
    folder = tmp_path_factory.mktemp("processes")
    torch.save(start, folder / "start.pt")
    multiprocessing.spawn(worker, (folder,), nprocs=NUM_PROCESSES)
    return [torch.load(folder / f"made{rank}.pt") for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize("case", ["plain", "grouped", "dropping", "uneven"])
def test_the_processes_agree_to_the_bit(made, case):
    first, second = (of_one[case] for of_one in made)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_they_are_one_process_with_the_whole_batch(made, start):
    alone = train(0, 1, kmeans_init=True)
    for key, value in made[0]["plain"].items():
        torch.testing.assert_close(value, alone[key], atol=1e-5, rtol=1e-5)
    rvq = GroupedResidualVQ(dim=8, num_quantizers=2, codebook_size=16)
    rvq.load_state_dict(start)
    rvq(batch(0))
    for key, value in made[0]["grouped"].items():
        torch.testing.assert_close(value, rvq.state_dict()[key], atol=1e-5, rtol=1e-5)


def test_they_can_stay_apart(made):
    first, second = (of_one["apart"]["layers.0._codebook.embed"] for of_one in made)
    assert not torch.allclose(first, second)


def test_dead_codes_become_vectors_of_any_process(made):
    state, before = made[0]["uneven"], made[0]["uneven"]["met"]
    assert before[0].any(1).sum() == 3 + 7  # all the vectors that there were
    after = state["layers.0._codebook.embed"][0]
    rows = torch.cat([batch(1)[0, :3], batch(1)[1, :7]])
    fresh = after[~before[0].any(1)]
    distances = (fresh[:, None] - rows).abs().amax(2)
    replaced = distances.amin(1) < 1e-6
    assert replaced.sum() >= len(fresh) - 1  # one zero may have been near a vector
    nearest = set(distances[replaced].argmin(1).tolist())
    assert nearest & {0, 1, 2} and nearest & set(range(3, 10))
