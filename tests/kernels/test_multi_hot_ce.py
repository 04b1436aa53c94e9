"""multi_hot_cross_entropy and its fused form: against log_softmax in float64, and two gloo ranks against one.

Tolerances: FP32 1e-6 relative against torch's cross entropy and between one and two ranks; float64 1e-12.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from boreal_kernels import linear_multi_hot_cross_entropy, multi_hot_cross_entropy
from boreal_kernels.multi_hot_ce import reference

T, V, H, K = 13, 10, 6, 4


def case(normal, dtype=torch.float64, T=T, k=K):
    """hidden, head weight, targets with repeats inside bags, target weights with some zeros."""
    generator = torch.Generator().manual_seed(11)
    targets = torch.randint(V, (k, T), generator=generator)
    target_weight = torch.rand(k, T, generator=generator).to(dtype)
    target_weight[0, ::3] = 0
    return normal(T, H, dtype=dtype), 3 * normal(V, H, dtype=dtype), targets, target_weight


def logits_of(normal, **options):
    hidden, weight, targets, target_weight = case(normal, **options)
    return (hidden @ weight.t()), targets, target_weight


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("T", [1, 13])
def test_against_the_definition(normal, T, k, weighted):
    logits, targets, w = logits_of(normal, T=T, k=k)
    logits.requires_grad_()
    w = w + 0.1 if weighted else None
    got, got_weight = multi_hot_cross_entropy(logits, targets, w)
    want, want_weight = reference.plain(logits, targets, w)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(got_weight, want_weight, rtol=1e-12, atol=0)
    assert not got_weight.requires_grad
    (a,), (b,) = torch.autograd.grad(3 * got, logits), torch.autograd.grad(3 * want, logits)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradient_is_softmax_minus_counts(normal):
    logits, targets, _ = logits_of(normal)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(multi_hot_cross_entropy(logits, targets, None)[0], logits)
    counts = F.one_hot(targets, V).sum(0)
    assert (counts > 1).any()
    torch.testing.assert_close(grad, logits.softmax(-1) - counts / K, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_one_target_is_the_usual_cross_entropy_fp32(normal, shift):
    logits, targets, _ = logits_of(normal, dtype=torch.float32, k=1)
    logits = (logits + shift).requires_grad_()
    got, count = multi_hot_cross_entropy(logits, targets, None)
    want = F.cross_entropy(logits, targets[0], reduction="sum")
    assert got.dtype == count.dtype == torch.float32 and count == T
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    (a,), (b,) = torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)
    # lse carries the shift in the backward: its rounding at 300 is 3e-5.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if shift == 0 else 4e-5)


def test_gradcheck(normal):
    hidden, weight, targets, w = case(normal, T=5)
    logits = (hidden @ weight.t()).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: multi_hot_cross_entropy(z, targets, w)[0], logits)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, e: linear_multi_hot_cross_entropy(x, e, targets, w)[0], inputs)


@pytest.mark.parametrize("rows", [1, 5, 13, 1024])
@pytest.mark.parametrize("weighted", [False, True])
def test_fused_equals_unfused(normal, monkeypatch, rows, weighted):
    monkeypatch.setattr(reference, "LINEAR_ROWS", rows)
    hidden, weight, targets, w = case(normal)
    hidden.requires_grad_(), weight.requires_grad_()
    w = w if weighted else None
    got, got_weight = linear_multi_hot_cross_entropy(hidden, weight, targets, w)
    want, want_weight = reference.plain(hidden @ weight.t(), targets, w)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(got_weight, want_weight, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_fused_never_holds_all_logits(normal, monkeypatch):
    """The largest tensor of v columns that forward or backward makes has LINEAR_ROWS rows."""
    monkeypatch.setattr(reference, "LINEAR_ROWS", 4)
    hidden, weight, targets, w = case(normal)
    hidden.requires_grad_(), weight.requires_grad_()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == V:
                seen.append(out.shape[0])
            return out

    with Watch():
        linear_multi_hot_cross_entropy(hidden, weight, targets, w)[0].backward()
    rows = {n for n in seen if n != H}  # [h, v] is the transposed head
    assert rows == {4, T % 4}


@pytest.mark.parametrize("fused", [False, True])
def test_targets_without_weight_may_hold_anything(normal, fused):
    """Ids far outside, and NaN in positions that have no target, change neither loss nor any other gradient."""
    hidden, weight, targets, w = case(normal)
    w[:, 4] = 0
    w[:, 9] = 0

    def run(hidden, targets):
        hidden, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss, total = linear_multi_hot_cross_entropy(hidden, head, targets, w)
            return loss, total, *torch.autograd.grad(loss, (hidden, head))
        logits = (hidden @ head.t()).detach().requires_grad_()
        loss, total = multi_hot_cross_entropy(logits, targets, w)
        return loss, total, *torch.autograd.grad(loss, logits)

    want = run(hidden, targets)
    hidden[4], hidden[9] = torch.nan, torch.inf
    targets[w == 0] = torch.tensor([-100, 10**12]).repeat(V * T)[: (w == 0).sum()]
    got = run(hidden, targets)
    assert (got[2][[4, 9]] == 0).all()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_nan_that_counts_is_not_hidden(normal):
    logits, targets, _ = logits_of(normal)
    logits[2, 1] = torch.nan
    assert multi_hot_cross_entropy(logits, targets, None)[0].isnan()


def test_no_target_at_all(normal):
    logits, targets, w = logits_of(normal)
    logits.requires_grad_()
    loss, total = multi_hot_cross_entropy(logits, targets, torch.zeros_like(w))
    assert loss == 0 and total == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_bf16(normal):
    """Statistics in FP32 on the bf16 logits; gradients come back in bf16."""
    hidden, weight, targets, w = case(normal, dtype=torch.float32)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    loss, total = linear_multi_hot_cross_entropy(hidden, weight, targets, w)
    logits = (hidden @ weight.t()).detach()
    assert loss.dtype == total.dtype == torch.float32
    torch.testing.assert_close(loss, reference.plain(logits.float(), targets, w)[0], rtol=1e-6, atol=0)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert all(grad.dtype == torch.bfloat16 for grad in grads)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(multi_hot_cross_entropy(logits, targets, w)[0], logits)
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grads[0], grad @ weight) and torch.equal(grads[1], grad.t() @ hidden)


def test_strided_inputs_between_nans(normal, poisoned):
    logits, targets, w = logits_of(normal)
    strided = poisoned(logits).requires_grad_()
    got = multi_hot_cross_entropy(strided, targets.t().contiguous().t(), poisoned(w))
    logits.requires_grad_()
    want = multi_hot_cross_entropy(logits, targets, w)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(torch.autograd.grad(got[0], strided)[0], torch.autograd.grad(want[0], logits)[0])


def _shard(rank: int, path: str, data: dict, results) -> None:
    """One of two ranks: half the vocabulary each; sends back losses and its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    group = dist.new_group([0, 1])
    half = slice(rank * V // 2, (rank + 1) * V // 2)
    answers = {}
    for name, w in (("weighted", data["w"]), ("plain", None)):
        logits = data["logits"][:, half].clone().requires_grad_()
        loss, total = multi_hot_cross_entropy(logits, data["targets"], w, tp_group=group)
        answers[name] = [loss.detach(), total, *torch.autograd.grad(loss, logits)]
        hidden, head = data["hidden"].clone().requires_grad_(), data["weight"][half].clone().requires_grad_()
        loss, total = linear_multi_hot_cross_entropy(hidden, head, data["targets"], w, tp_group=group)
        answers[name + " fused"] = [loss.detach(), total, *torch.autograd.grad(loss, (hidden, head))]
    # All of one rank's vocabulary is -inf for some rows, as padding can be.
    logits = data["logits"].clone()
    logits[:, V // 2 :] = -torch.inf
    logits = logits[:, half].clone().requires_grad_()
    loss, total = multi_hot_cross_entropy(logits, data["targets"] % (V // 2), None, tp_group=group)
    answers["empty shard"] = [loss.detach(), total, *torch.autograd.grad(loss, logits)]
    results[rank] = {name: [x.tolist() for x in values] for name, values in answers.items()}
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_equal_one(normal, tmp_path):
    hidden, weight, targets, w = case(normal, dtype=torch.float32)
    logits = (hidden @ weight.t()).detach()
    data = dict(hidden=hidden, weight=weight, targets=targets, w=w, logits=logits)
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_shard, args=(str(tmp_path / "store"), data, results), nprocs=2)
        ranks = [{name: [torch.tensor(x) for x in values] for name, values in results[r].items()} for r in (0, 1)]

    def close(x, y):  # products of half as many columns round in another order
        assert (x - y).norm() <= 1e-6 * y.norm(), (x - y).norm() / y.norm()

    for name, weights in (("weighted", w), ("plain", None)):
        z = logits.clone().requires_grad_()
        loss, total = multi_hot_cross_entropy(z, targets, weights)
        (grad,) = torch.autograd.grad(loss, z)
        x, e = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        grad_hidden, grad_weight = torch.autograd.grad(
            linear_multi_hot_cross_entropy(x, e, targets, weights)[0], (x, e)
        )
        for rank in ranks:
            for form in (name, name + " fused"):
                close(rank[form][0], loss.detach())
                close(rank[form][1], total)
        close(torch.cat([rank[name][2] for rank in ranks], dim=1), grad)
        # d hidden is a partial sum per rank; d weight is whole per shard.
        close(sum(rank[name + " fused"][2] for rank in ranks), grad_hidden)
        assert not torch.allclose(ranks[0][name + " fused"][2], grad_hidden, atol=1e-2)
        close(torch.cat([rank[name + " fused"][3] for rank in ranks]), grad_weight)

    z = logits[:, : V // 2].clone().requires_grad_()
    loss, _ = multi_hot_cross_entropy(z, targets % (V // 2), None)
    for rank in ranks:
        close(rank["empty shard"][0], loss.detach())
    close(ranks[0]["empty shard"][2], torch.autograd.grad(loss, z)[0])
    assert (ranks[1]["empty shard"][2] == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(3)), r"logits: found shape \[3\], expected \[T, v/tp\]"),
        (dict(targets=torch.zeros(2, 4, dtype=torch.int64)), r"targets: found shape \[2, 4\], .* = \[2, 3\]"),
        (dict(targets=torch.zeros(2, 3, dtype=torch.int32)), "targets: found torch.int32, expected torch.int64"),
        (dict(target_weight=torch.zeros(3, 2)), "target_weight: found shape"),
        (dict(backend="liger"), "found 'liger'"),
    ],
)
def test_misuse_is_named(change, message):
    good = dict(logits=torch.zeros(3, 5), targets=torch.zeros(2, 3, dtype=torch.int64), target_weight=None)
    multi_hot_cross_entropy(**good)
    with pytest.raises(ValueError, match=message):
        multi_hot_cross_entropy(**{**good, **change})


def test_misuse_of_the_fused_form_is_named():
    targets = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight: found shape \[5, 7\], expected \[v/tp, h\] = \[5, 6\]"):
        linear_multi_hot_cross_entropy(torch.zeros(3, 6), torch.zeros(5, 7), targets, None)
    with pytest.raises(ValueError, match="weight: found torch.bfloat16, expected hidden's torch.float32"):
        linear_multi_hot_cross_entropy(torch.zeros(3, 6), torch.zeros(5, 6).bfloat16(), targets, None)
