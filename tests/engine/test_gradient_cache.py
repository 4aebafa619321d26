import weakref

import pytest
import torch
from torch import is_tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from musiclm_engine.mulan import (
    AudioSpectrogramTransformer,
    MuLaN,
    TextTransformer,
    train_caption_tokenizer,
)
from musiclm_engine.mulan.gradient_cache import embed_in_chunks

CAPTIONS = [f"{what} number {n}" for what in ("a slow hymn", "drums alone") for n in range(3)]


def build(**audio):
    torch.manual_seed(0)
    tokenizer = train_caption_tokenizer(CAPTIONS, 300)
    tower = {"dim_head": 16, "heads": 2}
    return MuLaN(
        AudioSpectrogramTransformer(32, 2, **tower, **audio),
        TextTransformer(32, 2, num_tokens=300, max_seq_len=32, **tower),
        32,
        tokenizer=tokenizer,
        sigmoid_contrastive_loss=True,
    )


def noise():
    return 0.3 * torch.randn(6, 4000, generator=torch.Generator().manual_seed(1))


def gradients(model, **options):
    model.zero_grad()
    loss = model(noise(), CAPTIONS, **options)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [None, torch.tensor([4000, 900, 4000, 2500, 4000, 3000])])
def test_gradients_are_those_of_one_pass(chunk_size, lengths):
    model = build().eval()
    loss, wanted = gradients(model, lengths=lengths)
    chunked, found = gradients(model, lengths=lengths, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, loss)
    assert all(x.any() for x in wanted.values())
    for name, one in found.items():
        torch.testing.assert_close(one, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_lengths_are_those_of_the_whole_batch():
    with pytest.raises(ValueError, match=r"want integers of shape \(6,\)"):
        build()(noise(), CAPTIONS, lengths=torch.full((7,), 100), chunk_size=2)


def test_gradients_under_autocast():
    model = build().eval()
    with torch.autocast("cpu", torch.bfloat16):
        _, wanted = gradients(model)
        _, found = gradients(model, chunk_size=2)
    # Chunks round differently in bfloat16. None is lost: the cast weights of the first pass are not
    # those of the second.
    assert all(one.any() for one in found.values())
    one, other = (torch.cat([x.flatten() for x in of.values()]) for of in (found, wanted))
    assert (one - other).norm() < 0.05 * other.norm()


def test_both_passes_draw_the_same_numbers():
    """Patch dropout, SpecAugment: what a chunk embeds to is the same the second time."""
    model = build(
        patch_dropout_prob=0.5, spec_aug_freq_mask=20, spec_aug_time_mask=5, ff_dropout=0.2
    ).train()
    seen = []
    model.audio.register_forward_hook(lambda _, args, out: seen.append(out.detach().clone()))
    torch.manual_seed(3)
    model(noise(), CAPTIONS, chunk_size=2).backward()
    first, second = seen[:3], seen[3:]
    assert len(second) == 3
    assert not torch.equal(first[0], model.audio(noise()[:2]))  # they are drawn
    for one in second:  # in whichever order
        assert any(torch.equal(one, other) for other in first)


class Live(TorchDispatchMode):
    """Bytes of the tensors made within it, now and at their highest."""

    bytes, highest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if is_tensor(x) and x.untyped_storage()._cdata not in known:
                size = x.untyped_storage().nbytes()
                self.bytes += size
                self.highest = max(self.highest, self.bytes)
                weakref.finalize(x.untyped_storage(), self.freed, size)
        return out

    def freed(self, size):
        self.bytes -= size


def test_no_more_than_a_chunk_is_kept():
    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.GELU())]
    network = nn.Sequential(*hidden).double()
    rows = torch.randn(1024, 64, dtype=torch.float64)

    def run(embed):
        network.zero_grad()
        with Live() as live:
            embed(network).square().sum().backward()
        return live.highest, [p.grad.clone() for p in network.parameters()]

    whole, wanted = run(lambda f: f(rows))
    chunked, found = run(lambda f: embed_in_chunks(f, (rows,), 64))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert chunked < whole / 2


def test_refuses_a_chunk_of_nothing():
    with pytest.raises(ValueError, match="chunk_size=0"):
        build()(noise(), CAPTIONS, chunk_size=0)
