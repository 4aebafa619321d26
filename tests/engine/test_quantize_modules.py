"""What the quantisers promise beyond the numbers of vector-quantize-pytorch."""

import copy
import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file

from musiclm_engine.checkpoint import write_tensors
from musiclm_engine.quantize import GroupedResidualVQ, ResidualVQ, VectorQuantize
from musiclm_engine.quantize.options import (
    OF_A_CALL,
    OF_A_QUANTIZER,
    OF_A_RESIDUAL_QUANTIZER,
    QuantizerOptions,
)
from musiclm_kernels import rvq_decode

SIZES = {"dim": 8, "num_quantizers": 3, "codebook_size": 16}


def vectors(*shape, seed=0):
    return torch.randn(*(shape or (4, 30, 8)), generator=torch.Generator().manual_seed(seed))


def residual(**options):
    torch.manual_seed(0)
    return ResidualVQ(**{**SIZES, **options})


def of_each_kind(**options):
    torch.manual_seed(0)
    yield "VectorQuantize", {"dim": 8, "codebook_size": 16, **options}
    yield "ResidualVQ", {**SIZES, **options}
    yield "GroupedResidualVQ", {**SIZES, "groups": 2, **options}


OURS = {kind.__name__: kind for kind in (VectorQuantize, ResidualVQ, GroupedResidualVQ)}


# The state dict


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 3}, {"kmeans_init": True}])
def test_state_dicts_go_both_ways(options):
    upstream = pytest.importorskip("vector_quantize_pytorch")
    for name, arguments in of_each_kind(**options):
        torch.manual_seed(1)
        theirs = getattr(upstream, name)(**arguments)
        torch.manual_seed(1)
        ours = OURS[name](**arguments)
        state = theirs.state_dict()
        assert list(ours.state_dict()) == list(state)  # the order too
        for key, value in ours.state_dict().items():  # drawn alike
            assert value.dtype == state[key].dtype and torch.equal(value, state[key])
        theirs(vectors())
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.eval()(vectors())[1], theirs.eval()(vectors())[1])
        fresh = getattr(upstream, name)(**arguments)
        fresh.load_state_dict(ours.state_dict())
        assert torch.equal(fresh.eval()(vectors())[1], theirs(vectors())[1])


def test_initted_was_a_list_of_one_number_once():
    for initialised in (True, False):
        rvq = residual(kmeans_init=True)
        state = {
            key: torch.tensor([float(initialised)]) if key.endswith("initted") else value + 1.0
            for key, value in rvq.state_dict().items()
        }
        rvq.load_state_dict(state)
        assert rvq.is_initialised is initialised
        assert bool(rvq.state_dict()["layers.0._codebook.initted"]) is initialised


def test_a_state_dict_that_does_not_fit_is_refused():
    rvq = residual()
    state = rvq.state_dict()
    missing = {key: value for key, value in state.items() if key != "layers.1._codebook.embed"}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\._codebook\.embed"):
        rvq.load_state_dict(missing)
    rvq.load_state_dict(missing, strict=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.3\._codebook\.embed"):
        rvq.load_state_dict(state | {"layers.3._codebook.embed": torch.zeros(1, 16, 8)})
    with pytest.raises(RuntimeError, match=r"layers\.1\._codebook\.embed.*\(1, 15, 8\)"):
        rvq.load_state_dict(state | {"layers.1._codebook.embed": torch.zeros(1, 15, 8)})


def test_states_are_saved_and_loaded(tmp_path):
    rvq = residual()
    rvq(vectors())
    write_tensors(tmp_path / "ours.safetensors", rvq.state_dict())
    save_file(rvq.state_dict(), tmp_path / "plain.safetensors")  # views of one tensor
    for name in ("ours", "plain"):
        again = residual(kmeans_init=True)
        again.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
        assert again.is_initialised
        for ours, theirs in zip(again.eval()(vectors()), rvq.eval()(vectors()), strict=True):
            assert torch.equal(ours, theirs)
        rvq.train()


def test_the_codebooks_can_be_set():
    vq = VectorQuantize(8, 16)
    vq.codebook = vectors(16, 8)
    assert torch.equal(vq.state_dict()["_codebook.embed"][0], vectors(16, 8))


# Precision and copies


def test_averages_keep_their_precision():
    rvq = residual(codebook_dim=4)
    before = rvq.codebooks.clone()
    rvq.bfloat16()
    assert rvq.project_in.weight.dtype == torch.bfloat16
    assert rvq.codebooks.dtype == torch.float32 and torch.equal(rvq.codebooks, before)
    x = vectors().bfloat16().requires_grad_()
    quantized, _, losses = rvq(x)
    assert quantized.dtype == torch.bfloat16 and losses.dtype == torch.float32
    quantized.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert not torch.equal(rvq.codebooks, before)
    rvq.double()(vectors().double())
    assert rvq.codebooks.dtype == torch.float64


def test_a_copy_stands_alone():
    rvq = residual()
    other = copy.deepcopy(rvq)
    rvq(vectors())
    assert not torch.equal(rvq.codebooks, other.codebooks)


# Options


def test_the_options_are_upstreams():
    upstream = pytest.importorskip("vector_quantize_pytorch")
    had = vars(QuantizerOptions())
    for kind, refused in (
        (upstream.VectorQuantize, OF_A_QUANTIZER),
        (upstream.ResidualVQ, OF_A_RESIDUAL_QUANTIZER),
    ):
        ours = dict(inspect.signature(OURS[kind.__name__]).parameters)
        for name, parameter in inspect.signature(kind).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            if name in had or name in refused:
                # ResidualVQ has what a padded vector becomes in its own signature as well.
                default = had[name] if name in had else refused[name]
                assert parameter.default == default, name
            else:
                assert parameter.default == ours[name].default, name


@pytest.mark.parametrize("name", OF_A_RESIDUAL_QUANTIZER)
def test_options_that_are_not_here_are_refused(name):
    default = OF_A_RESIDUAL_QUANTIZER[name]
    other = {bool: not default, float: 0.5, dict: {"depth": 2}}.get(type(default), 2)
    with pytest.raises(ValueError, match=f"{name} is .*, wanted .*(vector_quantize|rotation)"):
        residual(**{name: other})
    residual(**{name: default})
    if name in OF_A_QUANTIZER:
        with pytest.raises(ValueError, match=f"{name} is"):
            VectorQuantize(8, 16, **{name: other})


def test_more_refusals():
    residual(ema_update=True, learnable_codebook=False)  # what is so here
    with pytest.raises(TypeError, match="'codebok_dim'"):
        residual(codebok_dim=3)
    for options, message in (
        ({"heads": 2}, "heads is 2, wanted 1"),
        ({"codebook_size": (16, 16, 8)}, r"codebook_size is \(16, 16, 8\), wanted 3 times"),
        ({"num_quantizers": None}, "num_quantizers is None"),
        ({"num_quantizers": 0}, "num_quantizers"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"threshold_ema_dead_code": -1}, "threshold_ema_dead_code is -1"),
        ({"quantize_dropout_cutoff_index": 3}, "cutoff_index is 3, wanted 0 to 2"),
        ({"quantize_dropout_multiple_of": 0}, "multiple_of is 0"),
        ({"codebook_dim": 0}, "codebook_dim=0"),
    ):
        with pytest.raises(ValueError, match=message):
            residual(**options)
    assert residual(codebook_size=(16, 16, 16), num_quantizers=None).codebooks.shape == (3, 16, 8)
    with pytest.raises(ValueError, match="dim is 8, wanted a multiple of groups, 3"):
        GroupedResidualVQ(**SIZES, groups=3)
    rvq = residual()
    for name in OF_A_CALL:
        with pytest.raises(ValueError, match=f"{name} is"):
            rvq(vectors(), **{name: torch.ones(2)})
    with pytest.raises(ValueError, match=r"\(4, 30, 7\), wanted floats \[B, \.\.\., 8\]"):
        rvq(vectors(4, 30, 7))
    with pytest.raises(ValueError, match=r"mask is .*\(4, 29\), wanted bool of \(4, 30\)"):
        rvq(vectors(), mask=torch.ones(4, 29, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask and lens"):
        VectorQuantize(8, 16)(
            vectors(), mask=torch.ones(4, 30, dtype=torch.bool), lens=torch.ones(4)
        )


# Gradients


def rotations(x, codes, codebooks):
    """sum_q lambda_q R_q, [N, D, D], by the matrices themselves, in float64."""
    total, left = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=torch.float64), x.double()
    for level, book in enumerate(codebooks.double()):
        chosen = book[codes[:, level]] * (codes[:, level] >= 0)[:, None]
        for n in range(len(x)):
            if codes[n, level] >= 0:
                u, v = left[n] / left[n].norm(), chosen[n] / chosen[n].norm()
                w = (u + v) / (u + v).norm()
                turn = torch.eye(x.shape[1]) - 2 * w.outer(w) + 2 * v.outer(u)
                torch.testing.assert_close(turn @ u, v)
                total[n] += chosen[n].norm() / left[n].norm() * turn
        left = left - chosen
    return total


def test_the_gradient_is_turned_back():
    rvq = residual()
    codebooks = rvq.codebooks.clone()
    x = vectors().requires_grad_()
    downstream = vectors(seed=1)
    levels_kept = torch.tensor([1, 2, 3, 3])
    quantized, codes, _ = rvq(x, levels_kept=levels_kept)
    (quantized * downstream).sum().backward()
    matrices = rotations(x.detach().view(-1, 8), codes.view(-1, 3), codebooks)
    wanted = (matrices.mT @ downstream.view(-1, 8, 1).double()).view(x.shape)
    torch.testing.assert_close(x.grad.double(), wanted, atol=1e-4, rtol=1e-4)
    # Forward it is the codes themselves.
    assert torch.equal(quantized.view(-1, 8), rvq_decode(codes.view(-1, 3), codebooks))


def test_the_straight_gradient_counts_levels():
    rvq = residual(rotation_trick=False)
    x = vectors().requires_grad_()
    levels_kept = torch.tensor([1, 2, 3, 3])
    quantized, _, _ = rvq(x, levels_kept=levels_kept)
    quantized.backward(vectors(seed=1))
    assert torch.equal(x.grad, vectors(seed=1) * levels_kept[:, None, None])


def test_each_loss_draws_x_to_its_level():
    rvq = residual(commitment_weight=0.5)
    codebooks = rvq.codebooks.clone()
    x = vectors().requires_grad_()
    _, codes, losses = rvq(x, levels_kept=torch.tensor([1, 2, 3, 3]))
    losses.backward(torch.tensor([1.0, 2.0, 3.0]))
    y = x.detach().clone().requires_grad_()
    slow, total = [], torch.zeros_like(y)
    for level in range(3):
        has_code = codes[..., level] >= 0
        total = total + codebooks[level][codes[..., level]] * has_code[..., None]
        slow.append(0.5 * (y - total)[has_code].square().mean())
    (slow[0] + 2 * slow[1] + 3 * slow[2]).backward()
    torch.testing.assert_close(losses, torch.stack(slow))
    torch.testing.assert_close(x.grad, y.grad)


def test_zeros_have_a_gradient_that_is_a_number():
    rvq = residual()
    rvq.layers.embed[0, 0] = 0
    x = torch.zeros(1, 4, 8, requires_grad=True)
    quantized, codes, losses = rvq(x)
    assert (codes[..., 0] == 0).all()
    (quantized.sum() + losses.sum()).backward()
    assert x.grad.isfinite().all()


def test_nothing_moves_in_evaluation_or_frozen():
    x = vectors()
    for rvq, arguments in (
        (residual().eval(), {}),
        (residual(), {"freeze_codebook": True}),
        (residual(freeze_codebook=True), {}),
    ):
        before = copy.deepcopy(rvq.state_dict())
        _, _, losses = rvq(x, **arguments)
        assert all(torch.equal(before[key], value) for key, value in rvq.state_dict().items())
        assert rvq.training == bool(losses.any())
    rvq(x, freeze_codebook=False)  # a call's word goes before the constructor's
    assert not torch.equal(before["layers.0._codebook.embed"], rvq.codebooks[:1])


# The start


def test_the_first_batch_initialises():
    x = 5 + vectors(8, 40, 8)
    for name, arguments in of_each_kind(kmeans_init=True, kmeans_iters=20):
        quantizer = OURS[name](**arguments)
        quantizer(x)
        assert (x - quantizer.eval()(x)[0]).square().mean() < 0.75 * x.var(), name


def test_fewer_vectors_than_codes_repeat_none():
    rvq = residual(kmeans_init=True, threshold_ema_dead_code=0.1, decay=0.5)
    few = vectors(1, 5, 8)
    rvq(few)
    first = rvq.codebooks[0]
    assert (first.any(1).sum() == 5) and len(first.unique(dim=0)) == 6  # and zeros, which are dead
    assert (rvq.layers.cluster_size[0] > 0).sum() == 5
    torch.testing.assert_close(rvq.eval()(few)[0], few, atol=1e-4, rtol=0)
    for seed in range(1, 9):
        rvq.train()(vectors(2, 30, 8, seed=seed))
    for book in rvq.codebooks:
        assert len(book.unique(dim=0)) == 16 and book.any(1).all()


def test_what_codes_weigh_after_the_first_batch():
    counted = residual(kmeans_init=True, decay=0.0, freeze_codebook=True)
    codes = counted(vectors())[1].flatten(0, 1)
    for level, sizes in enumerate(counted.layers.cluster_size):
        assert torch.equal(sizes, torch.bincount(codes[:, level], minlength=16).float())
    even = residual(kmeans_init=True, dead_share=0.1, freeze_codebook=True)
    even(vectors(1, 5, 8))
    assert (even.layers.cluster_size[0] != 0).sum() == 5
    assert even.layers.cluster_size.unique().tolist() == [0, 5 / 16]
    for rvq in (counted, even):
        sums = rvq.codebooks * rvq.layers.cluster_size[..., None]
        assert torch.equal(rvq.layers.embed_avg, sums)


def test_levels_that_were_never_met_are_initialised():
    rvq = residual(kmeans_init=True)
    rvq(vectors())
    state = rvq.state_dict()
    for name, value in (("initted", torch.tensor(False)), ("embed", torch.zeros(1, 16, 8))):
        state = state | {f"layers.2._codebook.{name}": value}
    again = residual(kmeans_init=True, freeze_codebook=True)
    again.load_state_dict(state)
    assert not again.is_initialised
    again(vectors(seed=1))
    assert again.is_initialised
    assert torch.equal(again.codebooks[:2], rvq.codebooks[:2]) and again.codebooks[2].any()


def test_dead_codes_are_replaced_alike_in_every_run():
    def trained():
        rvq = residual(decay=0.5, threshold_ema_dead_code=1.5)
        for seed in range(4):
            torch.manual_seed(seed)  # the draws do not hang on it
            rvq(vectors(seed=seed))
        return rvq

    rvq = trained()
    assert torch.equal(rvq.codebooks, trained().codebooks)
    unused = residual(decay=0.5)
    for seed in range(4):
        unused(vectors(seed=seed))
    x = vectors(seed=5)
    assert (rvq.eval()(x)[0] - x).square().mean() < (unused.eval()(x)[0] - x).square().mean()


def test_each_step_draws_other_vectors():
    rvq = residual(threshold_ema_dead_code=1000)  # all codes are replaced
    start = copy.deepcopy(rvq.state_dict())
    rvq(vectors())
    first = rvq.codebooks[0].clone()
    rvq.load_state_dict(start)
    rvq(vectors())
    second = rvq.codebooks[0]
    for book in (first, second):
        assert ((book[:, None] - vectors().flatten(0, 1)).abs().amax(2).amin(1) == 0).all()
    assert not torch.equal(first, second)


def test_resumed_training_is_uninterrupted():
    def train(stop=None):
        rvq = residual(dead_share=0.5)
        for step in range(12):
            if step == stop:
                state, rvq = rvq.state_dict(), residual(dead_share=0.5)
                rvq.load_state_dict(state)
            torch.manual_seed(step)  # as the training loop does
            rvq(vectors(2, 10, 8, seed=step))
        return rvq.codebooks

    assert torch.equal(train(), train(stop=6))


@pytest.mark.parametrize("num_vectors", [5, 50])
def test_a_bad_first_vector_spoils_no_codebook(num_vectors):
    rvq = residual(kmeans_init=True)
    x = vectors(1, num_vectors, 8)
    x[0, 2, 3] = torch.nan
    rvq(x)
    assert rvq.codebooks.isfinite().all()


def test_indices_of_another_layout_are_refused():
    rvq, x = residual().eval(), vectors()
    indices = torch.randint(16, (4, 30, 3))
    wanted = rvq(x, indices=indices)[1]
    assert rvq(x, indices=list(indices.unbind(-1)))[1] == wanted
    with pytest.raises(ValueError, match="levels last"):
        rvq(x, indices=indices.transpose(0, 1))
    with pytest.raises(ValueError, match="indices are"):
        VectorQuantize(8, 16)(x, indices=indices[..., 0].T)


def test_groups_hear_the_seed_of_quantizer_dropout():
    torch.manual_seed(0)
    grouped = GroupedResidualVQ(**SIZES, groups=2, quantize_dropout=True)
    kept = {
        int((grouped(vectors(), rand_quantize_dropout_fixed_seed=3)[1][0, 0, 0] >= 0).sum())
        for _ in range(8)
    }
    assert len(kept) == 1


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("codebook_dim", [None, 3])
def test_what_a_mask_leaves_out_decodes_to_zeros(kind, codebook_dim):
    options = dict(of_each_kind(codebook_dim=codebook_dim))[kind]
    quantizer, x = OURS[kind](**options).eval(), vectors()
    mask = torch.arange(30) < torch.tensor([30, 7, 0, 1])[:, None]
    out, indices, *_ = quantizer(x, mask=mask)
    torch.testing.assert_close(quantizer.get_output_from_indices(indices), out)
    assert not out[~mask].any() and out[mask].any()


@pytest.mark.parametrize("kind", OURS)
def test_no_vectors_give_no_vectors(kind):
    quantizer = OURS[kind](**dict(of_each_kind())[kind])
    for training in (True, False):
        out, indices, *_ = quantizer.train(training)(torch.zeros(2, 0, 8))
        assert out.shape == (2, 0, 8) and indices.numel() == 0


def test_half_precision_projections_are_fitted():
    rvq = residual(codebook_dim=4).half()
    rvq.fit(vectors().half(), seed=0)
    assert rvq.is_initialised and rvq.codebooks.dtype == torch.float32


def test_loading_onto_no_memory_is_refused():
    state = residual().state_dict()
    with torch.device("meta"):
        empty = residual()
    with pytest.raises(RuntimeError, match="meta device"):
        empty.load_state_dict(state)


def test_a_share_of_an_even_share_does_for_any_batch():
    # 5 vectors for 16 codes: a threshold of 2 replaces all that are not fresh, a share does not.
    few = vectors(1, 5, 8)
    for options, number in (({"threshold_ema_dead_code": 2}, 16), ({"dead_share": 0.1}, 0)):
        rvq = residual(**options)
        rvq.layers.cluster_size.fill_(0.9 * 5 / 16)
        rvq.layers.embed_avg.copy_(rvq.codebooks * 0.9 * 5 / 16)
        rvq(few)
        distances = (rvq.codebooks[0][:, None] - few[0]).abs().amax(2).amin(1)
        assert (distances < 1e-6).sum() == number


def test_a_mask_hides_vectors_from_everything():
    mask = torch.rand(4, 30, generator=torch.Generator().manual_seed(2)) < 0.6
    for options in ({"kmeans_init": True}, {}):
        masked, alone = residual(**options), residual(**options)
        x = vectors()
        quantized, codes, losses = masked(x, mask=mask)
        wanted, wanted_codes, wanted_losses = alone(x[mask][None])
        assert torch.equal(codes[mask], wanted_codes[0]) and (codes[~mask] == -1).all()
        torch.testing.assert_close(quantized[mask], wanted[0])
        assert not quantized[~mask].any()
        torch.testing.assert_close(losses, wanted_losses)
        torch.testing.assert_close(masked.codebooks, alone.codebooks)


def test_fit_follows_a_data_set():
    data = 3 + vectors(600, 8)
    whole, streamed = residual(codebook_dim=6), residual(codebook_dim=6)
    whole.fit(data, seed=1, iterations=5)
    streamed.fit(lambda: iter(data.split(100)), seed=1, iterations=5)
    torch.testing.assert_close(whole.codebooks, streamed.codebooks, atol=1e-4, rtol=1e-4)
    # The averages are those of a mean batch: the first one does not make codes die.
    torch.testing.assert_close(whole.layers.cluster_size.sum(1), torch.full((3,), 600.0))
    torch.testing.assert_close(streamed.layers.cluster_size.sum(1), torch.full((3,), 100.0))
    latents = whole.project_in(data)
    error = (latents - rvq_decode(whole.eval()(data)[1], whole.codebooks)).square().mean()
    assert error < 0.2 * latents.var(0).mean()
    grouped = GroupedResidualVQ(**SIZES, groups=2)
    grouped.fit(lambda: data.split(100), seed=1)
    assert (grouped.eval()(data)[0] - data).square().mean() < 0.2 * data.var()
    with pytest.raises(ValueError, match="15.* 16 clusters"):
        whole.fit(data[:15], seed=1)


# Quantizer dropout


def kept(codes):
    """Levels kept by each item; they are a prefix, the same at all of its vectors."""
    count = (codes >= 0).sum(-1)
    assert (count == count[:, :1]).all()
    levels = torch.arange(codes.shape[-1])
    assert torch.equal(codes >= 0, (levels < count[..., None]).expand_as(codes))
    return count[:, 0]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {1, 2, 3, 4}),
        ({"quantize_dropout_cutoff_index": 2}, {3, 4}),
        ({"quantize_dropout_multiple_of": 2}, {2, 4}),
        ({"quantize_dropout_multiple_of": 3}, {3, 4}),  # 6 are more than there are
    ],
)
def test_a_call_drops_the_same_levels(options, wanted):
    rvq = residual(num_quantizers=4, quantize_dropout=True, freeze_codebook=True, **options)
    seen = set()
    for _ in range(40):
        quantized, codes, losses = rvq(vectors(3, 5, 8))
        (number,) = set(kept(codes).tolist())
        assert (losses[:number] > 0).all() and not losses[number:].any()
        assert torch.equal(quantized.view(-1, 8), rvq_decode(codes.view(-1, 4), rvq.codebooks))
        seen.add(number)
    assert seen == wanted
    assert (rvq.eval()(vectors())[1] >= 0).all()


def test_each_item_drops_its_own_levels():
    rvq = residual(quantize_dropout=True, quantize_dropout_share=0.5, freeze_codebook=True)
    counts = kept(rvq(vectors(600, 2, 8))[1])
    shares = torch.bincount(counts, minlength=4)[1:] / 600
    torch.testing.assert_close(shares, torch.tensor([1, 1, 4]) / 6, atol=0.08, rtol=0)


def test_groups_drop_the_same_levels():
    for share in (None, 0.5):
        torch.manual_seed(0)
        rq = GroupedResidualVQ(
            **SIZES, groups=2, quantize_dropout=True, quantize_dropout_share=share
        )
        for _ in range(5):
            first, second = rq(vectors(6, 5, 8))[1]
            assert torch.equal(kept(first), kept(second))


def test_a_level_that_is_dropped_learns_nothing():
    rvq = residual()
    before = rvq.codebooks.clone()
    rvq(vectors(), levels_kept=torch.tensor(2))
    moved = (rvq.codebooks != before).flatten(1).any(1)
    assert moved.tolist() == [True, True, False]


# Layouts, indices


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"channel_last": False}, (2, 8, 5)),
        ({"accept_image_fmap": True}, (2, 8, 3, 4)),
        ({"accept_3d_fmap": True}, (2, 8, 3, 4, 2)),
    ],
)
def test_layouts_are_the_same_vectors(options, shape):
    plain = residual(codebook_dim=4).eval()
    other = residual(codebook_dim=4, **options).eval()
    x = vectors(*shape)
    quantized, codes, _ = other(x)
    wanted, wanted_codes, _ = plain(x.movedim(1, -1))
    assert torch.equal(codes, wanted_codes)
    torch.testing.assert_close(quantized, wanted.movedim(-1, 1))
    torch.testing.assert_close(other.get_output_from_indices(codes), quantized)
    grouped = GroupedResidualVQ(**SIZES, groups=2, **options).eval()
    quantized, codes, _ = grouped(x)
    assert codes.shape == (2, *wanted_codes.shape)
    torch.testing.assert_close(grouped.get_output_from_indices(codes), quantized)


def test_fewer_levels_decode_more_coarsely():
    rvq = residual().eval()
    _, codes, _, each = rvq(vectors(), return_all_codes=True)
    torch.testing.assert_close(rvq.get_output_from_indices(codes[..., :2]), each[:2].sum(0))
    coarse = rvq.get_codes_from_indices(codes[..., :2])
    assert torch.equal(coarse[:2], each[:2]) and not coarse[2].any()


def test_cross_entropy_of_each_level():
    rvq = residual().eval()
    x = vectors().requires_grad_()
    wanted = torch.randint(16, (4, 30, 3), generator=torch.Generator().manual_seed(3))
    _, loss = rvq(x, indices=wanted)
    slow, left = 0.0, x
    for level, book in enumerate(rvq.codebooks):
        distances = (left[..., None, :] - book).norm(dim=-1)
        slow = slow - (-distances).log_softmax(-1).gather(-1, wanted[..., level, None]).mean()
        left = left - book[distances.argmin(-1)]
    torch.testing.assert_close(loss, slow)
    loss.backward()
    assert x.grad.isfinite().all() and x.grad.any()


# Compiled


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("options", [{}, {"rotation_trick": False, "quantize_dropout_share": 0.5}])
def test_a_training_step_is_one_graph(backend, options):
    torch._dynamo.reset()
    eager = residual(
        kmeans_init=True,
        codebook_dim=4,
        threshold_ema_dead_code=2,
        quantize_dropout=True,
        **options,
    )
    eager(vectors())  # fits codebooks, which waits for the device
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    mask = torch.arange(30) < torch.tensor([30, 20, 10, 5])[:, None]
    for step in range(3):
        results = []
        for module in (eager, compiled):
            x = vectors(seed=step).requires_grad_()
            torch.manual_seed(step)
            quantized, codes, losses = module(x, mask=mask)
            (quantized.square().sum() + losses.sum()).backward()
            results.append((quantized, codes, losses, x.grad, *module.state_dict().values()))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
