"""The kernels on a GPU at the sizes of the presets: right, repeatable, without host synchronisation, within memory."""

import pytest
import torch
from boreal_kernels import backend, launch, linear_multi_hot_cross_entropy, testing
from compiled import operations

BENCHES = operations()


def first(bench):
    """Its smallest preset's shape, bf16, on the device."""
    return bench.inputs(**next(iter(bench.SHAPES.values())), dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("name", BENCHES)
def test_proof(name):
    BENCHES[name].proof("cuda")


@pytest.mark.parametrize("name", BENCHES)
def test_same_bits_twice(name):
    arguments = first(BENCHES[name])
    once, again = (testing.run_both_ways(BENCHES[name].operation, arguments, "triton") for _ in range(2))
    for key, value in once.items():
        assert value is None or torch.equal(value, again[key]), key


@pytest.mark.parametrize("name", BENCHES)
def test_no_host_synchronisation(name):
    """The second call: the first one compiles."""
    bench, arguments = BENCHES[name], first(BENCHES[name])
    testing.run_both_ways(bench.operation, arguments, "triton")
    leaves = {k: x.requires_grad_() for k, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()}
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = bench.operation(**arguments | leaves, backend="triton")
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
        outputs = [x for x in outputs if x.requires_grad]
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs], allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_auto_takes_the_kernels():
    for operation in backend.BACKENDS:
        choice = backend.choose(operation, device="cuda", head_dim=128)
        assert choice.backend == "triton", choice


def test_launches_come_from_the_table():
    """A device without a part of its own uses the default one; no kernel searches."""
    assert launch.config("gated_rmsnorm.forward", D=128)


def test_the_delta_rule_computes_exactly_what_is_exact():
    """Products on tensor cores race with the registers they read where the assembler is wrong: once is not enough."""
    from boreal_kernels.gated_delta_rule import selftest

    for _ in range(200):
        selftest.run("cuda")


def test_fused_loss_needs_no_logits():
    """8,192 rows over 151,936 columns: less than 1 GB beside the weight's gradient (the logits alone take 2.5 GB)."""
    rows, hidden, vocabulary = 8192, 2560, 151936
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden, device="cuda") * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (4, rows), device="cuda")
    main_grad = torch.zeros(vocabulary, hidden, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = linear_multi_hot_cross_entropy(
        x, weight, targets, None, main_grad=main_grad, upstream=1.0, backend="triton"
    )
    loss.backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1e9
    assert main_grad.abs().sum() > 0 and x.grad.isfinite().all()
