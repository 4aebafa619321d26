import math

import pytest
import torch

from musiclm_kernels import reference, rvq_decode, rvq_ema_update, rvq_encode


def case(N=33, Q=3, K=17, D=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    codebooks = torch.randn(Q, K, D, generator=generator, dtype=torch.float64)
    return x.to(dtype), (codebooks / torch.arange(1, Q + 1)[:, None, None]).to(dtype)


def nearest_by_loops(x, codebooks):
    """Codes by the definition: the true distance to every code, one vector at a time."""
    codes = torch.empty(len(x), len(codebooks), dtype=torch.int64)
    for n, residual in enumerate(x.double()):
        for level, book in enumerate(codebooks.double()):
            distances = (residual - book).square().sum(1).tolist()
            codes[n, level] = distances.index(min(distances))
            residual = residual - book[codes[n, level]]
    return codes


@pytest.mark.parametrize("function", [rvq_encode, reference.rvq_encode])
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("shape", [{}, {"N": 1, "Q": 1, "K": 1, "D": 1}, {"N": 2500, "Q": 2}])
def test_codes_are_the_nearest(function, mode, shape):
    x, codebooks = case(**shape)
    codes, quantized = function(x, codebooks, mode=mode)
    assert torch.equal(codes, nearest_by_loops(x, codebooks))
    assert quantized.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_codes_of_narrower_inputs(dtype):
    x, codebooks = case(N=300, K=64, dtype=dtype)
    codes, quantized = rvq_encode(x, codebooks)
    assert torch.equal(codes, nearest_by_loops(x, codebooks))
    assert quantized.dtype == torch.float32
    fast, _ = rvq_encode(x, codebooks, mode="fast")
    assert (fast == codes).float().mean() > 0.99


def test_exact_sees_what_fp32_cannot():
    base = torch.full((1, 1), 4096.0)
    codebooks = torch.tensor([[[4096.0 + 2**-8], [4096.0 - 2**-9]]])  # |c|^2 is 1.7e7 in fp32
    assert rvq_encode(base, codebooks)[0].item() == 1


@pytest.mark.parametrize("K, D", [(16, 64), (3, 100), (5, 3)])  # small: products then differ
def test_ties_take_the_lowest_index(K, D):
    x, codebooks = case(N=200, K=K, D=D)
    tripled = torch.cat([codebooks, codebooks.flip(1), codebooks], 1)
    codes, _ = rvq_encode(x, tripled)
    assert torch.equal(codes, nearest_by_loops(x, tripled))
    zeros, _ = rvq_encode(x.float(), torch.zeros(2, 9, D))
    assert zeros.eq(0).all()


def test_quantized_is_the_decoded_codes():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, codebooks = case(dtype=dtype)
        for mode in ("exact", "fast"):
            codes, quantized = rvq_encode(x, codebooks, mode=mode)
            assert torch.equal(rvq_decode(codes, codebooks), quantized)


def test_every_level_brings_it_closer():
    x, codebooks = case(N=200, Q=6, K=64)
    codebooks[:, 0] = 0  # no level can then do harm
    codes, _ = rvq_encode(x, codebooks)
    errors = [(x - rvq_decode(codes[:, :q], codebooks)).square().sum(1) for q in range(7)]
    assert all((errors[q + 1] <= errors[q] + 1e-12).all() for q in range(6))


@pytest.mark.parametrize("function", [rvq_decode, reference.rvq_decode])
def test_decode_sums_and_skips_missing_codes(function):
    _, codebooks = case()
    codes = torch.tensor([[0, 3, 16], [5, -1, -1], [-1, 2, 2], [-1, -1, -1]])
    wanted = torch.stack(
        [
            codebooks[0, 0] + codebooks[1, 3] + codebooks[2, 16],
            codebooks[0, 5],
            codebooks[1, 2] + codebooks[2, 2],
            torch.zeros(5),
        ]
    )
    torch.testing.assert_close(function(codes, codebooks), wanted)
    torch.testing.assert_close(function(codes.int()[:, :1], codebooks)[1], codebooks[0, 5])
    assert function(codes[:0], codebooks).shape == (0, 5)


def test_results_carry_no_gradient():
    x, codebooks = (y.requires_grad_() for y in case())
    codes, quantized = rvq_encode(x, codebooks)
    assert not quantized.requires_grad and not rvq_decode(codes, codebooks).requires_grad


def statistics(codebooks):
    return codebooks.clone(), torch.ones(codebooks.shape[:2], dtype=codebooks.dtype)


def ema_by_loops(x, codes, codebooks, size, total, decay, eps):
    """The update without replacement, one vector at a time; returns new tensors."""
    book, size, total = codebooks.clone(), size.clone(), total.clone()
    K = codebooks.shape[1]
    for level in range(codes.shape[1]):
        counts, sums = torch.zeros_like(size[level]), torch.zeros_like(total[level])
        for n in range(len(x)):
            if codes[n, level] < 0:
                continue
            residual = x[n].clone()
            for earlier in range(level):
                if codes[n, earlier] >= 0:
                    residual -= codebooks[earlier, codes[n, earlier]]
            counts[codes[n, level]] += 1
            sums[codes[n, level]] += residual
        if counts.sum() == 0:
            continue
        size[level] = decay * size[level] + (1 - decay) * counts
        total[level] = decay * total[level] + (1 - decay) * sums
        n = size[level].sum()
        book[level] = total[level] / ((size[level] + eps) / (n + K * eps) * n)[:, None]
    return book, size, total


@pytest.mark.parametrize("function", [rvq_ema_update, reference.rvq_ema_update])
def test_ema_matches_loops(function):
    x, codebooks = case(N=40, K=7)
    codes, _ = rvq_encode(x, codebooks)
    codes[10:, 2] = -1
    codes[20:, 1] = -1
    total, size = statistics(codebooks)
    wanted = ema_by_loops(x, codes, codebooks, size, total, 0.9, 1e-3)
    function(x, codes, codebooks, size, total, decay=0.9, dead_threshold=0, seed=0, eps=1e-3)
    for ours, theirs in zip((codebooks, size, total), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dead_codes_become_distinct_residuals_of_the_batch():
    x, codebooks = case(N=40, K=12)
    codebooks[:, 6:] += 100  # nobody's nearest: six dead codes a level
    codes, _ = rvq_encode(x, codebooks)
    before = codebooks.clone()
    total, size = codebooks.clone(), torch.zeros(3, 12, dtype=x.dtype)
    size[:, :6], total[:, 6:] = 10.0, 0.0
    rvq_ema_update(x, codes, codebooks, size, total, decay=0.9, dead_threshold=2.0, seed=5)
    residual = x
    for level in range(3):
        rows = [(residual - code).abs().sum(1).argmin().item() for code in codebooks[level, 6:]]
        assert torch.equal(codebooks[level, 6:], residual[rows])
        assert len(set(rows)) == 6
        fair = torch.tensor((0.9 * 60 + 0.1 * 40) / 12, dtype=x.dtype)
        torch.testing.assert_close(size[level, 6:], fair.expand(6))
        torch.testing.assert_close(total[level, 6:], fair * codebooks[level, 6:])
        assert size[level, :6].gt(2.0).all()
        residual = residual - before[level][codes[:, level]]


def test_replacements_come_only_from_rows_with_a_code():
    x, codebooks = case(N=6, Q=1, K=50)
    codes = torch.tensor([[0], [-1], [-1], [0], [-1], [0]])
    total, size = codebooks.clone(), torch.zeros(1, 50, dtype=x.dtype)
    rvq_ema_update(x, codes, codebooks, size, total, decay=0.5, dead_threshold=9.0, seed=1)
    rows = [(x - code).abs().sum(1).argmin().item() for code in codebooks[0]]
    assert torch.equal(codebooks[0], x[rows])
    counts = torch.bincount(torch.tensor(rows), minlength=6)
    assert counts[[1, 2, 4]].eq(0).all() and sorted(counts[[0, 3, 5]].tolist()) == [16, 17, 17]


def test_the_seed_chooses_and_the_generator_does_not():
    def update(seed):
        x, codebooks = case(N=40, K=12)
        codes, _ = rvq_encode(x, codebooks)
        total, size = codebooks.clone(), torch.zeros(3, 12, dtype=x.dtype)
        rvq_ema_update(x, codes, codebooks, size, total, decay=0.9, dead_threshold=3.0, seed=seed)
        return codebooks

    first = update(1)
    torch.manual_seed(77)
    assert torch.equal(update(1), first)
    assert not torch.equal(update(2), first)


def test_a_level_that_no_row_reached_stays():
    x, codebooks = case()
    codes, _ = rvq_encode(x, codebooks)
    codes[:, 1:] = -1
    total, size = statistics(codebooks)
    before = codebooks.clone()
    for rows in (x, x[:0]):
        rvq_ema_update(
            rows, codes[: len(rows)], codebooks, size, total, decay=0.9, dead_threshold=2.0, seed=0
        )
        assert torch.equal(codebooks[1:], before[1:]) and size[1:].eq(1).all()
    assert not torch.equal(codebooks[0], before[0])


def test_training_on_clusters_finds_them():
    generator = torch.Generator().manual_seed(3)
    centres = 10 * torch.randn(8, 4, generator=generator)
    codebooks = torch.randn(1, 32, 4, generator=generator)  # a few to spare: no local optimum
    total, size = statistics(codebooks)
    for step in range(60):
        noise = 0.01 * torch.randn(256, 4, generator=generator)
        x = centres[torch.randint(8, (256,), generator=generator)] + noise
        codes, _ = rvq_encode(x, codebooks)
        rvq_ema_update(x, codes, codebooks, size, total, decay=0.8, dead_threshold=1.0, seed=step)
    assert torch.cdist(centres, codebooks[0]).amin(1).max() < 0.1


def test_op_contracts():
    x, codebooks = case(dtype=torch.float32)
    ops = torch.ops.musiclm
    torch.library.opcheck(ops.rvq_encode.default, (x, codebooks, "exact"))
    torch.library.opcheck(ops.rvq_encode.default, (x.bfloat16(), codebooks, "fast"))
    codes, _ = rvq_encode(x, codebooks)
    torch.library.opcheck(ops.rvq_decode.default, (codes, codebooks))
    total, size = statistics(codebooks)
    arguments = (x, codes, codebooks, size, total, 0.9, 1.5, 7, 1e-5)
    torch.library.opcheck(ops.rvq_ema_update.default, arguments)


def test_compiles_without_graph_break():
    def step(x, codebooks, size, total):
        codes, quantized = rvq_encode(x, codebooks)
        rvq_ema_update(x, codes, codebooks, size, total, decay=0.9, dead_threshold=1.0, seed=3)
        return quantized + rvq_decode(codes, codebooks)

    x, codebooks = case(dtype=torch.float32)
    total, size = statistics(codebooks)
    ours, theirs = ([y.clone() for y in (codebooks, size, total)] for _ in range(2))
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x, *ours), step(x, *theirs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(ours[0], codebooks)


X, BOOKS = torch.zeros(4, 5), torch.zeros(3, 7, 5)
CODES = torch.zeros(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: rvq_encode(X[0], BOOKS), "x has shape"),
        (lambda: rvq_encode(X.long(), BOOKS), "x is torch.int64"),
        (lambda: rvq_encode(X, BOOKS[0]), "codebooks has shape"),
        (lambda: rvq_encode(X, BOOKS[..., :4]), "codebooks has shape"),
        (lambda: rvq_encode(X, BOOKS[:, :0]), "codebooks has shape"),
        (lambda: rvq_encode(X, BOOKS, mode="slow"), "mode is 'slow'"),
        (lambda: rvq_decode(CODES[0], BOOKS), "codes has shape"),
        (lambda: rvq_decode(CODES, BOOKS[:2]), "codes has 3 levels, wanted at most 2"),
        (lambda: rvq_decode(CODES.float(), BOOKS), "codes is torch.float32"),
        (lambda: rvq_decode(CODES + 7, BOOKS), "codes span 7 to 7, wanted -1 to 6"),
        (lambda: rvq_decode(CODES - 2, BOOKS), "codes span -2 to -2"),
        (lambda: rvq_decode(CODES, BOOKS.long()), "codebooks is torch.int64"),
    ],
)
def test_refusals(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    "change, name",
    [
        ({"codes": CODES[:3]}, "codes has 3 rows, wanted 4"),
        ({"codes": CODES + 7}, "codes span 7 to 7"),
        ({"codebooks": BOOKS.half()}, "codebooks is torch.float16"),
        ({"cluster_size": torch.zeros(3, 6)}, "cluster_size has shape"),
        ({"cluster_sum": torch.zeros(3, 7, 5).double()}, "cluster_sum is torch.float64"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"dead_threshold": -1.0}, "dead_threshold is -1.0"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"decay": math.nan}, "decay is nan"),
        ({"dead_threshold": math.inf}, "dead_threshold is inf"),
        ({"dead_threshold": math.nan}, "dead_threshold is nan"),
        ({"eps": math.inf}, "eps is inf"),
        ({"eps": math.nan}, "eps is nan"),
    ],
)
def test_ema_refusals(change, name):
    arguments = {
        "x": X, "codes": CODES, "codebooks": BOOKS, "cluster_size": torch.zeros(3, 7),
        "cluster_sum": torch.zeros(3, 7, 5), "decay": 0.9, "dead_threshold": 0.0, "seed": 0,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=name):
        rvq_ema_update(**arguments)
