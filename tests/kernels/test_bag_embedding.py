"""bag_embedding: against torch's embedding and a float64 mean; values, gradients, shards, absent ids. The kernels
against plain torch in float64, tolerances in TOLERANCE of the largest value, and exactly where the sums are of small
integers."""

import pytest
import torch
import torch.nn.functional as F
from boreal_kernels import bag_embedding, launch, testing

V, H = 12, 5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # bf16: an output's own rounding is 2^-9
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BACKENDS = ["torch", "triton"]


def ids_of(k, T):
    return torch.randint(V, (k, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_id_is_the_embedding_bit_for_bit(normal, dtype):
    weight = normal(V, H).to(dtype)
    weight[3] = -0.0
    ids = ids_of(1, 50)
    assert (ids == 3).any()
    integers = INTEGERS[weight.element_size()]
    got, want = bag_embedding(ids, weight, vocab_start=0), F.embedding(ids[0], weight)
    assert torch.equal(got.view(integers), want.view(integers))


def test_one_id_gradient_is_the_embeddings(normal, gradients):
    weight = normal(V, H).requires_grad_()
    ids = ids_of(1, 50)
    (got,) = gradients([bag_embedding(ids, weight, vocab_start=0)], [weight])
    (want,) = gradients([F.embedding(ids[0], weight)], [weight])
    assert torch.equal(got, want)


@pytest.mark.parametrize("k, T", [(2, 1), (4, 63), (3, 65)])
def test_mean_of_a_bag(normal, gradients, k, T):
    weight = normal(V, H).requires_grad_()
    double = weight.detach().double().requires_grad_()
    ids = ids_of(k, T)  # repeats within a bag are certain at T = 63
    got, want = bag_embedding(ids, weight, vocab_start=0), F.embedding(ids, double).mean(0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        gradients([got], [weight])[0].double(), gradients([want], [double])[0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("with_valid", [False, True])
def test_shards_add_up(normal, gradients, with_valid):
    weight = normal(V, H, dtype=torch.float64)
    ids = ids_of(4, 30).int()
    valid = torch.rand(4, 30, generator=torch.Generator().manual_seed(5)) < 0.5 if with_valid else None
    full = weight.clone().requires_grad_()
    want = bag_embedding(ids, full, vocab_start=0, valid=valid)
    parts = [weight[start : start + 4].clone().requires_grad_() for start in (0, 4, 8)]
    outputs = [bag_embedding(ids, part, vocab_start=4 * r, valid=valid) for r, part in enumerate(parts)]
    torch.testing.assert_close(sum(outputs), want, rtol=0, atol=1e-12)
    got = torch.cat([gradients([out], [part])[0] for out, part in zip(outputs, parts, strict=True)])
    torch.testing.assert_close(got, gradients([want], [full])[0], rtol=0, atol=1e-12)


def test_absent_ids(normal):
    """The mean is over ids that exist; the others may hold anything; a bag of none is zero and has no gradient."""
    weight = normal(V, H, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[1, -100, 3], [2, 5, 10**9]])
    valid = torch.tensor([[True, False, False], [True, True, False]])
    out = bag_embedding(ids, weight, vocab_start=0, valid=valid)
    torch.testing.assert_close(out[0], (weight[1] + weight[2]) / 2)
    assert torch.equal(out[1], weight[5]) and (out[2] == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), weight)
    want = torch.zeros(V, H, dtype=torch.float64)
    want[1] = want[2] = 0.5
    want[5] = 1.0
    assert torch.equal(grad, want)


def test_gradcheck(normal):
    weight = normal(6, 2, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 5, 7, 2], [0, 1, 3, 9]])
    valid = torch.tensor([[True, True, False, True], [True, False, False, True]])
    assert torch.autograd.gradcheck(lambda w: bag_embedding(ids, w, vocab_start=1, valid=valid), weight)


def test_rows_nobody_asked_for_may_be_nan(normal):
    weight = normal(V, H)
    weight[0] = torch.nan  # ids of other ranks are read as row 0
    ids = torch.tensor([[3, 40], [41, 42]])
    out = bag_embedding(ids, weight, vocab_start=0)
    assert torch.equal(out, torch.stack([weight[3] / 2, torch.zeros(H)]))


def test_bf16_gradient_is_summed_in_fp32(normal):
    """4096 times 2^-9: a bf16 running sum stops at 1."""
    weight = normal(V, H).bfloat16().requires_grad_()
    ids = torch.zeros(1, 4096, dtype=torch.int64)
    (grad,) = torch.autograd.grad(bag_embedding(ids, weight, vocab_start=0).mul(2.0**-9).sum(), weight)
    assert grad.dtype == torch.bfloat16 and (grad[0] == 8).all() and (grad[1:] == 0).all()


def test_two_runs_have_the_same_bits_and_strides_do_not_matter(normal, poisoned, gradients):
    weight = normal(V, H)
    ids = ids_of(4, 200)
    results = []
    for w, i in ((weight, ids), (weight.clone(), ids), (poisoned(weight), ids.t().contiguous().t())):
        w = w.requires_grad_()
        out = bag_embedding(i, w, vocab_start=0)
        results.append((out, *gradients([out], [w])))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ids=torch.zeros(3, dtype=torch.int64)), r"ids: found shape \[3\], expected \[k, T\]"),
        (dict(ids=torch.zeros(2, 3)), "ids: found torch.float32"),
        (dict(weight=torch.zeros(4)), "weight: found shape"),
        (dict(vocab_start=-1), "vocab_start: found -1"),
        (dict(valid=torch.ones(3, 2, dtype=torch.bool)), "valid: found shape"),
        (dict(valid=torch.ones(2, 3)), "valid: found torch.float32"),
        (dict(main_grad=torch.zeros(4, 6)), r"main_grad: found shape \[4, 6\], expected \[v/tp, h\] = \[4, 5\]"),
        (dict(main_grad=torch.zeros(4, 5).bfloat16()), "main_grad: found torch.bfloat16, expected torch.float32"),
        (dict(main_grad=torch.zeros(4, 5, device="meta")), "main_grad: found device meta, expected the weight's, cpu"),
        (dict(backend="cuda"), "found 'cuda'"),
    ],
)
def test_misuse_is_named(change, message):
    good = dict(ids=torch.zeros(2, 3, dtype=torch.int64), weight=torch.zeros(4, 5), vocab_start=0)
    bag_embedding(**good)
    with pytest.raises(ValueError, match=message):
        bag_embedding(**{**good, **change})


def made(k, T, h, dtype, device, *, scale=1.0, with_valid=False):
    """Ids 0..13 over the rows 2..11: some are of the shards on either side."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(14, (k, T), generator=generator)
    weight = scale * torch.randn(10, h, generator=generator)
    valid = (torch.rand(k, T, generator=generator) < 0.6).to(device) if with_valid else None
    return dict(ids=ids.to(device), weight=weight.to(device, dtype), vocab_start=2, valid=valid)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that little data has several of each kind."""
    table = {
        "bag_embedding.forward": {"WIDTH": 16, "num_warps": 1},
        "bag_embedding.keys": {"BAGS": 16, "num_warps": 1},
        "bag_embedding.backward": {"WIDTH": 16, "BLOCK": 8, "num_warps": 1},
    }
    monkeypatch.setattr(launch, "config", lambda kernel, **shape: dict(table[kernel]))


def weight_gradient(ids, dout, rows, *, add=False, **options):
    """The kernels' gradient of a weight of ones with `rows` rows, or what they add to a main_grad of twos."""
    weight = torch.ones(rows, dout.shape[1], dtype=dout.dtype, device=dout.device, requires_grad=True)
    buffer = torch.full((rows + 1, dout.shape[1]), 2.0, device=dout.device)  # what follows is another parameter's
    options = {"vocab_start": 0, "backend": "triton"} | options
    out = bag_embedding(ids, weight, main_grad=buffer[:rows] if add else None, **options)
    out.backward(dout)
    assert (weight.grad is None) == add and (buffer[rows] == 2).all()
    return buffer[:rows] - 2 if add else weight.grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("k, T, h", [(1, 1, 8), (3, 21, 7), (2, 32, 20), (1, 65, 16), (4, 16, 33)])  # 63..65 entries
def test_kernels(device, small_tiles, k, T, h, dtype):
    for with_valid in (False, True):
        inputs = made(k, T, h, dtype, device, with_valid=with_valid)
        with testing.poisoned_memory():
            found = testing.errors(bag_embedding, inputs, "triton")
        testing.assert_within(found, TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_kernels_as_launched(device, scale):
    """The recorded tiles, on int32 ids and weights of extreme size."""
    inputs = made(1, 150, 37, torch.float32, device, scale=scale)
    inputs["ids"] = inputs["ids"].int()
    testing.assert_within(testing.errors(bag_embedding, inputs, "triton"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels_one_id_is_the_embedding_bit_for_bit(device, normal, dtype):
    weight = normal(V, 33).to(device, dtype)
    weight[3], weight[5, :2] = -0.0, torch.tensor([1e-40, torch.inf])
    ids = torch.arange(-1, V + 1, device=device)[None]
    got = bag_embedding(ids, weight, vocab_start=0, backend="triton").view(INTEGERS[weight.element_size()])
    assert torch.equal(got[1:-1], weight.view(got.dtype))
    assert (got[[0, -1]] == 0).all()  # not -0.0


@pytest.mark.parametrize("add", [False, True], ids=["", "main_grad"])
@pytest.mark.parametrize(
    "counts",
    [
        (8, 3, 5, 1, 30, 9, 16, 4),  # blocks of 8: whole ones, ends on edges, one inside five, one of exactly two
        (200,),  # one id in every entry
        (1, 71),
        (8, 8, 8),
        (3,),  # less than a block
    ],
)
def test_kernels_rows_over_blocks(device, small_tiles, counts, add):
    """Small integers, whose sums are exact in any order; one entry in six is foreign, and its bag's gradient NaN."""
    generator = torch.Generator().manual_seed(5)
    wanted = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    foreign = torch.full((len(wanted) // 5 + 1,), len(counts) + 3)
    ids = torch.cat([wanted, foreign])
    dout = torch.randint(-8, 9, (len(ids), 9), generator=generator).float()
    want = torch.zeros(len(counts) + 2, 9).index_add(0, wanted, dout[: len(wanted)])
    dout[len(wanted) :] = torch.nan
    order = torch.randperm(len(ids), generator=generator)
    ids, dout = ids[order][None].to(device), dout[order].to(device)
    with testing.poisoned_memory():
        got = weight_gradient(ids, dout, len(want), add=add)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ids_of_other_ranks(device, backend):
    inputs = made(3, 20, 9, torch.float32, device) | {"vocab_start": 50}
    main_grad = torch.full_like(inputs["weight"], 2.0)
    for buffer in (None, main_grad):
        weight = inputs["weight"].clone().requires_grad_()
        out = bag_embedding(**{**inputs, "weight": weight}, main_grad=buffer, backend=backend)
        out.sum().backward()
        assert (out == 0).all() and (weight.grad is None or (weight.grad == 0).all())
    assert (main_grad == 2).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad_is_added_to(device, backend, dtype):
    """Two microbatches in flight, and somebody else's addition between forward and backward; rows far apart."""
    inputs = made(2, 20, 9, dtype, device, with_valid=True)
    value = inputs.pop("weight")
    generator = torch.Generator().manual_seed(3)
    douts = torch.randn(2, 20, 9, generator=generator).to(device, dtype)
    want = torch.full((10, 9), 4.0, dtype=torch.float64)
    for dout in douts:
        double = value.double().requires_grad_()
        bag_embedding(weight=double, **inputs).backward(dout.double())
        want += double.grad.cpu()
    weight = value.clone().requires_grad_()
    main_grad = testing.spread(torch.full((10, 9), 3.0)).to(device)
    outs = [bag_embedding(weight=weight, main_grad=main_grad, backend=backend, **inputs) for _ in douts]
    main_grad += 1
    for out, dout in zip(outs, douts, strict=True):
        out.backward(dout)
    assert weight.grad is None
    torch.testing.assert_close(main_grad.cpu().double(), want, rtol=0, atol=4e-6)


def test_kernels_walk_views_and_repeat_bit_for_bit(device, poisoned):
    inputs = made(3, 21, 18, torch.bfloat16, device, with_valid=True)
    dout = made(1, 1, 18, torch.bfloat16, device)["weight"][:7].repeat(3, 1)
    results = []
    for walk in (lambda x: x, lambda x: x.clone(), lambda x: x.t().contiguous().t()):
        weight = walk(inputs["weight"]).detach().requires_grad_()
        ids, valid = walk(inputs["ids"]), walk(inputs["valid"])
        out = bag_embedding(ids, weight, vocab_start=2, valid=valid, backend="triton")
        results.append((out, *torch.autograd.grad(out, weight, walk(dout))))
    assert weight.stride() == (1, 10)
    out = bag_embedding(**inputs | {"weight": poisoned(inputs["weight"].cpu()).to(device)}, backend="triton")
    results.append((out, results[0][1]))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_kernels_read_no_row_nobody_asked_for(device):
    weight = torch.full((4, 6), torch.nan, device=device)
    weight[2] = 3.0
    ids = torch.tensor([[2, 40, -5], [2, 41, -(2**62)], [0, 2, 2]], device=device)
    valid = torch.tensor([[True, True, False], [True, True, False], [False, True, False]], device=device)
    out = bag_embedding(ids, weight, vocab_start=0, valid=valid, backend="triton")
    assert torch.equal(out.cpu(), torch.tensor([3.0, 1.0, 0.0])[:, None].expand(3, 6))
    dout = torch.tensor([6.0, 12.0, torch.nan], device=device)[:, None].repeat(1, 6)  # the last bag is empty
    got = weight_gradient(ids, dout, 4, valid=valid)
    assert torch.equal(got.cpu(), torch.tensor([0.0, 0.0, 10.0, 0.0])[:, None].expand(4, 6))


def test_kernels_are_custom_ops(device):
    from boreal_kernels.bag_embedding import fused

    inputs = made(2, 3, 6, torch.float32, device, with_valid=True)
    ids, weight, valid = inputs["ids"], inputs["weight"].requires_grad_(), inputs["valid"]
    torch.library.opcheck(fused.bag_embedding, (ids, weight, 2, valid, None))
    dout, main_grad = torch.ones(3, 6, device=device), torch.ones(10, 6, device=device)
    torch.library.opcheck(fused.bag_embedding_add_gradient, (dout, ids, 2, valid, main_grad))


def test_kernels_with_recomputation_and_compiled(device):
    inputs = made(2, 9, 6, torch.float32, device)
    weight, want = inputs.pop("weight").requires_grad_(), None

    def loss(main_grad):
        return bag_embedding(weight=weight, main_grad=main_grad, backend="triton", **inputs).square().sum()

    def recomputed(main_grad):
        return torch.utils.checkpoint.checkpoint(loss, main_grad, use_reentrant=False)

    for call in (loss, recomputed, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        main_grad = torch.ones(10, 6, device=device)
        call(main_grad).backward()
        assert weight.grad is None
        want = main_grad if want is None else want
        assert not (main_grad == 1).all() and torch.equal(main_grad, want)


def test_kernels_refuse_what_they_do_not_read(device):
    with pytest.raises(ValueError, match=r"weight: found torch.float64, expected one of .*backend='torch' takes any"):
        bag_embedding(**made(2, 3, 4, torch.float64, device), backend="triton")
