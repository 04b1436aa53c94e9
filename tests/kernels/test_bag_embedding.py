"""bag_embedding: against torch's embedding and a float64 mean; values, gradients, shards, absent ids."""

import pytest
import torch
import torch.nn.functional as F
from boreal_kernels import bag_embedding

V, H = 12, 5


def ids_of(k, T):
    return torch.randint(V, (k, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_id_is_the_embedding_bit_for_bit(normal, dtype):
    weight = normal(V, H).to(dtype)
    weight[3] = -0.0
    ids = ids_of(1, 50)
    assert (ids == 3).any()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
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
        (dict(backend="cuda"), "found 'cuda'"),
    ],
)
def test_misuse_is_named(change, message):
    good = dict(ids=torch.zeros(2, 3, dtype=torch.int64), weight=torch.zeros(4, 5), vocab_start=0)
    bag_embedding(**good)
    with pytest.raises(ValueError, match=message):
        bag_embedding(**{**good, **change})
