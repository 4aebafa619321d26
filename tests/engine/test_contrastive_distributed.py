"""Two processes have the loss and the gradients of one that holds all pairs."""

import os
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from musiclm_engine.mulan.distributed_contrastive import distributed_contrastive_loss
from musiclm_engine.mulan.gradient_cache import embed_in_chunks
from musiclm_kernels import contrastive_loss

KINDS = ("softmax", "decoupled", "sigmoid")
SIZES = {"equal": (4, 4), "unequal": (5, 3), "decoupled with one": (1, 7)}
WIDTH = 6
LAYERS = (None, 3)  # None: embeddings without a dimension of layers


class Towers(nn.Module):
    def __init__(self, loss, kind, chunk_size=None, layers=None):
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.text = (nn.Linear(WIDTH, 4 * (layers or 1)).double() for _ in range(2))
        steps = torch.linspace(0, 1, layers, dtype=torch.float64) if layers else torch.zeros(())
        self.log_temperature = nn.Parameter(1.5 + steps.double())
        self.bias = nn.Parameter(-1 - steps.double())
        self.loss, self.kind, self.chunk_size, self.layers = loss, kind, chunk_size, layers

    def forward(self, audio, text):
        bias = self.bias if self.kind == "sigmoid" else None

        def embed(tower, rows):
            def pass_rows(x):
                return F.normalize(tower(x).unflatten(1, (self.layers or 1, 4)), dim=-1)

            if self.chunk_size is None:
                latents = pass_rows(rows)
            else:
                latents = embed_in_chunks(pass_rows, (rows,), self.chunk_size)
            return latents.transpose(0, 1) if self.layers else latents.squeeze(1)

        rows = embed(self.audio, audio), embed(self.text, text)
        losses = self.loss(*rows, self.log_temperature.exp(), kind=self.kind, bias=bias)
        if self.layers:  # no two with the same gradient
            losses = losses @ torch.arange(1.0, 1 + self.layers, dtype=torch.float64)
        return losses


def pairs():
    return torch.randn(2, 8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(model):
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {}
    for kind in KINDS:
        for name, sizes in SIZES.items():
            for chunk_size, layers in product((None, 2), LAYERS):
                model = Towers(distributed_contrastive_loss, kind, chunk_size, layers)
                if kind != "sigmoid":
                    model.bias.requires_grad_(False)
                ddp = DistributedDataParallel(model)
                start = sum(sizes[:rank])
                own = pairs()[:, start : start + sizes[rank]]
                loss = ddp(*own)
                loss.backward()
                found[kind, name, chunk_size, layers] = loss.detach(), trained(ddp)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder,), nprocs=2)
        yield [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", list(SIZES))
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("layers", LAYERS)
def test_two_processes_are_one(found, kind, sizes, chunk_size, layers):
    model = Towers(contrastive_loss, kind, layers=layers)
    loss = model(*pairs())
    loss.backward()
    shares, gradients = zip(*(one[kind, sizes, chunk_size, layers] for one in found), strict=True)
    torch.testing.assert_close(sum(shares) / 2, loss.detach())
    for name, wanted in trained(model).items():
        for of_process in gradients:
            if wanted is None:
                assert of_process[name] is None
            else:
                torch.testing.assert_close(of_process[name], wanted, msg=name)


def test_refuses_what_does_not_fit_before_anything_is_sent():
    audio, one = torch.randn(3, 4), torch.tensor(1.0)
    with pytest.raises(ValueError, match="text has shape"):
        distributed_contrastive_loss(audio, audio[:2], one)
    with pytest.raises(ValueError, match="audio has shape"):
        distributed_contrastive_loss(audio[0], audio[0], one)
