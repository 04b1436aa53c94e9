"""multi_hot_cross_entropy and its fused form by our kernels; padding, main_grad and upstream by both backends.

Against plain torch in float64, relative to the largest value. FP32: 2e-6 for losses and gradients of logits, 5e-6
through the head's products. bf16: gradients of given logits 4e-3, their own rounding; through the head 2e-2, as plain
torch, for a logit around 8 that is rounded to bf16 moves its probability by up to 1.6 %.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from boreal_kernels import launch, linear_multi_hot_cross_entropy, multi_hot_cross_entropy, testing
from boreal_kernels.multi_hot_ce import linear, reference

LOGITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
HEAD = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
V, H = 152, 16


def coarse(kernel, **shape):
    """One tile a row: what a test needs that asks about something else. Interpreted programs cost 30 ms each."""
    return {"stats": {"LANES": 128, "DEPTH": 2}, "loss": {"ROWS": 16}, "grad": {"TILE": 256, "TILES": 1}}[kernel[13:]]


def fine(kernel, **shape):
    """Several tiles, slices and turns of the loop a row, each with a rest."""
    return {"stats": {"LANES": 32, "DEPTH": 2}, "loss": {"ROWS": 2}, "grad": {"TILE": 32, "TILES": 2}}[kernel[13:]]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(launch, "config", coarse)


@pytest.fixture
def finely(monkeypatch):
    monkeypatch.setattr(launch, "config", fine)


@pytest.fixture
def chunks(monkeypatch):
    """chunks(rows, slabs): that plan, whatever the sizes."""

    def use(rows, slabs):
        monkeypatch.setattr(linear, "plan", lambda *sizes: (rows, slabs))
        monkeypatch.setattr(reference, "LINEAR_ROWS", rows)

    return use


def bags(T, k, tokens, device, seed=5):
    """targets [k, T] with repeats in a bag, and weights of which some are 0 and a whole row now and then."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(tokens, (k, T), generator=generator)
    targets[:, ::2] = targets[:1, ::2].where(torch.rand(k, (T + 1) // 2, generator=generator) < 0.5, targets[:, ::2])
    w = torch.rand(k, T, generator=generator)
    w[0, ::3] = 0
    w[:, 4::5] = 0
    return targets.to(device), w.to(device)


def made(T, k, dtype, device, tokens=V):
    """Arguments of the form on logits."""
    generator = torch.Generator().manual_seed(3)
    targets, w = bags(T, k, tokens, device)
    logits = (3 * torch.randn(T, V, generator=generator)).to(device, dtype)
    return {"logits": logits, "targets": targets, "target_weight": w, "vocab_size": tokens}


def made_head(T, k, dtype, device, tokens=V):
    """Arguments of the fused form."""
    generator = torch.Generator().manual_seed(3)
    targets, w = bags(T, k, tokens, device)
    hidden, weight = torch.randn(T, H, generator=generator), 0.5 * torch.randn(V, H, generator=generator)
    return {
        "hidden": hidden.to(device, dtype), "weight": weight.to(device, dtype), "targets": targets, "target_weight": w,
        "vocab_size": tokens,
    }  # fmt: skip


def head_step(inputs, backend, factor=1.0, needed=("hidden", "weight"), **options):
    """(loss, d hidden, d weight) for a gradient `factor` of the loss; None for what needs none."""
    leaves = {n: inputs[n].detach().requires_grad_(n in needed) for n in ("hidden", "weight")}
    loss, _ = linear_multi_hot_cross_entropy(**{**inputs, **leaves}, backend=backend, **options)
    loss.backward(torch.full_like(loss, factor))
    return loss.detach(), leaves["hidden"].grad, leaves["weight"].grad


def in_double(inputs):
    return {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}


def off(x, y):
    """The largest difference, over the largest value of y."""
    return ((x.double() - y).abs().max() / y.abs().max()).item()


def same(a, b):
    return all(torch.equal(x, y) if torch.is_tensor(x) else x is y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
@pytest.mark.parametrize("T, k", [(1, 1), (4, 1), (3, 2), (3, 3), (6, 4), (3, 6), (3, 8), (3, 16)])
def test_kernels(device, finely, T, k, dtype):
    with testing.poisoned_memory():
        found = testing.errors(multi_hot_cross_entropy, made(T, k, dtype, device, tokens=V - 11), "triton")
    testing.assert_within(found, {"output 0": 2e-6, "output 1": 2e-6, "": LOGITS[dtype]})


@pytest.mark.parametrize("columns", [1, 15, 64, 65, 151])
def test_vocabularies_of_any_width(device, finely, columns):
    inputs = made(2, 2, torch.bfloat16, device) | {"vocab_size": None}
    inputs |= {"logits": inputs["logits"][:, :columns], "targets": inputs["targets"] % columns}
    with testing.poisoned_memory():
        found = testing.errors(multi_hot_cross_entropy, inputs, "triton")
    if columns == 1:  # loss and gradient are 0 exactly
        found = {str(i): float(x.abs().max()) for i, x in enumerate(run_logits(inputs, "triton"))}
    testing.assert_within(found, {"output 0": 2e-6, "output 1": 2e-6, "": 4e-3})


def test_kernels_without_weights_or_padding(device):
    inputs = made(3, 3, torch.float32, device) | {"target_weight": None, "vocab_size": None}
    testing.assert_within(testing.errors(multi_hot_cross_entropy, inputs, "triton"), 2e-6)


def test_kernels_as_they_are_launched(device, monkeypatch):
    monkeypatch.undo()
    assert launch.config("multi_hot_ce.grad", columns=V)["TILE"] >= 1024
    testing.assert_within(testing.errors(multi_hot_cross_entropy, made(5, 4, torch.float32, device), "triton"), 2e-6)


@pytest.mark.parametrize("dtype", HEAD, ids=str)
@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("slabs", [1, 4])
def test_the_head(device, chunks, dtype, promised, slabs):
    """Three chunks, the last one shorter: the same bits with and without main_grad, and float64's values."""
    chunks(2, slabs)
    inputs = made_head(5, 4, dtype, device, tokens=V - 11)
    options = {"upstream": 0.75} if promised else {}
    with testing.poisoned_memory():
        found = head_step(inputs, "triton", 0.75, **options)
        main_grad = torch.full((V, H), 2.0, device=device)
        added = head_step(inputs, "triton", 0.75, main_grad=main_grad, **options)
    want = head_step(in_double(inputs), "torch", 0.75)
    for name, x, y in zip(("loss", "hidden", "weight"), found, want, strict=True):
        assert x.dtype == (torch.float32 if name == "loss" else dtype)
        testing.assert_within({name: off(x, y)}, HEAD[dtype])
    assert same(added[:2], found[:2]) and added[2] is None
    testing.assert_within({"main_grad": off(main_grad - 2, want[2])}, HEAD[dtype])
    assert (found[2][V - 11 :] == 0).all() and (main_grad[V - 11 :] == 2).all()


def test_modes_agree_to_the_bit(device, chunks):
    chunks(2, 2)
    inputs = made_head(5, 3, torch.bfloat16, device)
    assert same(head_step(inputs, "triton", 0.3), head_step(inputs, "triton", 0.3, upstream=0.3))


@BACKENDS
def test_main_grad_collects_heads_and_microbatches(device, chunks, backend):
    """Two losses share a head; the second is differentiated first. Added once each, in the forward where promised."""
    chunks(2, 2)
    one, two = made_head(3, 2, torch.float32, device), made_head(2, 1, torch.float32, device)
    two["weight"] = one["weight"]
    want = head_step(one, backend)[2] + head_step(two, backend, 0.1)[2]
    for promises in ((None, None), (1.0, torch.tensor(0.1, device=device)), (1.0, None)):
        main_grad = torch.zeros(V, H, device=device)
        weight = one["weight"].clone().requires_grad_()
        losses = []
        for inputs, upstream in zip((one, two), promises, strict=True):
            hidden = inputs["hidden"].clone().requires_grad_()
            shared = {**inputs, "hidden": hidden, "weight": weight, "main_grad": main_grad, "upstream": upstream}
            losses.append(linear_multi_hot_cross_entropy(**shared, backend=backend)[0])
            assert bool((main_grad != 0).any()) == any(p is not None for p in promises)
        (0.1 * losses[1]).backward()
        losses[0].backward()
        assert weight.grad is None
        torch.testing.assert_close(main_grad, want, rtol=1e-5, atol=1e-6)


@BACKENDS
def test_a_broken_promise_shows(device, chunks, backend):
    chunks(2, 1)
    inputs = made_head(3, 2, torch.float32, device)
    kept = head_step(inputs, backend, 1 / 3 * (1 + 1e-7), upstream=1 / 3)  # the rounding of a factor more or less
    assert all(x.isfinite().all() for x in kept)
    loss, d_hidden, d_weight = head_step(inputs, backend, 1.0, upstream=1.001)
    assert loss.isfinite() and d_hidden.isnan().all() and d_weight.isnan().all()
    main_grad = torch.zeros(V, H, device=device)
    head_step(inputs, backend, 1.0, needed=("weight",), upstream=2.0, main_grad=main_grad)
    assert main_grad[0, 0].isnan()


@BACKENDS
@pytest.mark.parametrize("upstream", [None, 1.0])
def test_what_needs_no_gradient_costs_none(device, chunks, backend, upstream, monkeypatch):
    chunks(2, 1)
    inputs = made_head(3, 2, torch.float32, device)
    want = head_step(inputs, backend, upstream=upstream)
    main_grad = torch.zeros(V, H, device=device)
    with torch.no_grad():
        leaf = inputs["weight"].clone().requires_grad_()
        loss, _ = linear_multi_hot_cross_entropy(
            **{**inputs, "weight": leaf}, backend=backend, upstream=upstream, main_grad=main_grad
        )
    assert torch.equal(loss, want[0]) and not loss.requires_grad
    frozen = head_step(inputs, backend, needed=("hidden",), upstream=upstream, main_grad=main_grad)
    assert same(frozen[:2], want[:2]) and frozen[2] is None
    assert (main_grad == 0).all()
    detached = head_step(inputs, backend, needed=("weight",), upstream=upstream)
    assert detached[1] is None and torch.equal(detached[2], want[2])


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products, and the rows of the largest tensor of V columns."""

    def __init__(self):
        super().__init__()
        self.count, self.rows = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(word in func.name() for word in ("::mm", "::addmm", "::bmm")):
            self.count += 1
            assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        if torch.is_tensor(out) and out.shape[-1:] == (V,) and out.shape != (H, V):  # but the transposed head
            self.rows = max(self.rows, out.numel() // V)
        return out


def test_products_and_memory_of_a_chunk(device, chunks):
    """Three products a chunk with a promise, one and three without; one chunk of logits."""
    chunks(2, 1)
    inputs = made_head(5, 2, torch.float32, device)
    common = inputs["hidden"], inputs["weight"], inputs["targets"], inputs["target_weight"]
    one, main_grad = torch.ones((), device=device), torch.zeros(V, H, device=device)

    def counted(function, *arguments):
        with Products() as seen:
            out = function(*arguments)
        assert seen.rows == 2
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        return seen.count, out

    assert counted(linear.gradients_at_once, one, *common, main_grad, 0, V, "", True, True)[0] == 9
    count, (_, top, log_sum, picked) = counted(linear.statistics_only, *common, 0, V, "")
    assert count == 3
    rest = (picked, top, log_sum, main_grad, 0, V)
    for needed, products in (((True, True), 9), ((True, False), 6), ((False, True), 6)):
        assert counted(linear.gradients_again, one, *common, *rest, *needed)[0] == products


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_a_bag_of_one_id_is_the_usual_cross_entropy_to_the_bit(device, k, dtype):
    one = made(2, 1, dtype, device) | {"target_weight": None}
    bag = one | {"targets": one["targets"].expand(k, -1)}
    results = [testing.run_both_ways(multi_hot_cross_entropy, x, "triton") for x in (one, bag)]
    assert same(results[0].values(), results[1].values())
    hidden, weight = made_head(2, 1, dtype, device)["hidden"], made_head(2, 1, dtype, device)["weight"]
    heads = [{n: x[n] for n in ("targets", "target_weight")} | {"hidden": hidden, "weight": weight} for x in (one, bag)]
    assert same(*(head_step(x, "triton", 0.1) for x in heads))


def test_targets_at_every_edge(device, finely):
    """First and last column, both sides of a tile and of a slice, twice in a bag, next to each other."""
    last = V - 12
    edges = torch.tensor([[0, 63, 127, 31, last], [last, 64, 128, 32, last], [0, 63, 0, 31, last - 1]], device=device)
    inputs = made(5, 3, torch.float32, device, tokens=V - 11) | {"targets": edges, "target_weight": None}
    testing.assert_within(testing.errors(multi_hot_cross_entropy, inputs, "triton"), 2e-6)


@pytest.mark.parametrize("logit", ["large", "shifted", "equal", "-inf"])
def test_extreme_logits(device, finely, logit):
    inputs = made(6, 4, torch.float32, device, tokens=V - 11)
    z = inputs["logits"]
    if logit == "large":
        z[:, 7], z[1, 9], z[2] = 1e4, -1e4, 3e3 * z[2]
    elif logit == "shifted":
        z += 300
    elif logit == "equal":
        z[:] = 41.5
    else:
        z[:, 70:75], z[0, :64], z[3, 1:] = -torch.inf, -torch.inf, -torch.inf
        inputs["targets"] %= 64
        inputs["targets"][:, 0], inputs["targets"][:, 3] = 64, 0
        assert inputs["target_weight"][:, [0, 3]].any()
    found = testing.errors(multi_hot_cross_entropy, inputs, "triton")
    testing.assert_within(found, 2e-6)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(device, finely, value):
    for column in (0, 40, V - 12):  # in the first and in a later turn of the loop
        inputs = made(3, 2, torch.float32, device, tokens=V - 11) | {"target_weight": None}
        inputs["logits"][1, column] = value
        found = testing.run_both_ways(multi_hot_cross_entropy, inputs, "triton")
        assert not found["output 0"].isfinite()
        grad = found["gradient of logits"]
        assert grad[1, : V - 11].isnan().all() and grad[[0, 2]].isfinite().all()


@BACKENDS
def test_padding_may_hold_anything(device, backend):
    tokens = V - 11
    inputs = made(5, 2, torch.float32, device, tokens)
    want = testing.run_both_ways(multi_hot_cross_entropy, inputs, backend)
    doubles = inputs | {"logits": inputs["logits"][:, :tokens].double(), "vocab_size": None}
    loss, grad = run_logits(doubles, "torch")
    assert off(want["output 0"], loss) < 2e-6 and off(want["gradient of logits"][:, :tokens], grad) < 2e-6
    for value in (torch.nan, torch.inf, 1e9):
        inputs["logits"][:, tokens:] = value
        with testing.poisoned_memory():
            found = testing.run_both_ways(multi_hot_cross_entropy, inputs, backend)
        assert same(found.values(), want.values())
        assert (found["gradient of logits"][:, tokens:] == 0).all()
    inputs["logits"][:, tokens:] = 0.0
    inputs["targets"][1, 1], inputs["target_weight"][1, 1] = tokens, 1.0  # a target in the padding is loud
    found = testing.run_both_ways(multi_hot_cross_entropy, inputs, backend)
    assert found["output 0"] == torch.inf and (found["gradient of logits"][:, tokens:] == 0).all()


def test_rows_without_targets_may_hold_anything(device, chunks):
    chunks(4, 1)
    for make, names in ((made, ("logits",)), (made_head, ("hidden",))):
        inputs = make(10, 3, torch.bfloat16, device)
        run = head_step if names == ("hidden",) else run_logits
        want = run(inputs, "triton")
        inputs[names[0]][4], inputs[names[0]][9] = torch.nan, torch.inf
        unused = inputs["target_weight"] == 0
        inputs["targets"][unused] = torch.tensor([-100, 10**12], device=device).repeat(50)[: int(unused.sum())]
        got = run(inputs, "triton")
        assert same(got, want) and (got[1][[4, 9]] == 0).all()
    inputs["target_weight"][:] = 0
    assert all((x == 0).all() for x in head_step(inputs, "triton"))


def run_logits(inputs, backend):
    """(loss, d logits)"""
    found = testing.run_both_ways(multi_hot_cross_entropy, inputs, backend)
    return found["output 0"], found["gradient of logits"]


def test_in_place_and_views(device):
    """The gradient may replace the logits; rows may be far apart or their elements not neighbours."""
    from boreal_kernels.multi_hot_ce import backward, forward

    inputs = made(5, 4, torch.bfloat16, device)
    z, targets, w = inputs["logits"], inputs["targets"], inputs["target_weight"]
    _, top, log_sum, picked = forward.forward(z, targets, w, 0, V, "")
    factor = torch.full((), 0.3, device=device)
    want = backward.backward(factor, z, targets, w, picked, top, log_sum, 0, V)
    inside = z.clone()
    backward.logits_gradient(inside, inside, targets, w, picked, top, log_sum, factor, 0, V)
    assert torch.equal(inside, want)

    want = run_logits(inputs, "triton")
    views = {"logits": testing.spread(z), "targets": targets.t().contiguous().t(), "target_weight": testing.spread(w)}
    assert same(run_logits(inputs | views, "triton"), want)
    assert same(run_logits(inputs | {"logits": z.t().contiguous().t()}, "triton"), want)
    inputs = made_head(5, 4, torch.bfloat16, device)
    views = {name: testing.spread(inputs[name]) for name in ("hidden", "weight")}
    assert same(head_step(inputs | views, "triton"), head_step(inputs, "triton"))


def test_rows_beyond_two_billion_elements(device):
    """A view whose third row begins past 2^31; memory in between is never touched."""
    step = 2**30 + 16
    small = made(3, 2, torch.bfloat16, device)
    wide = torch.empty(2 * step + V, dtype=torch.bfloat16, device=device).as_strided((3, V), (step, 1))
    wide.copy_(small["logits"])
    assert same(run_logits(small | {"logits": wide}, "triton"), run_logits(small, "triton"))


def test_repeats_bit_for_bit_and_custom_ops(device, chunks):
    from boreal_kernels.multi_hot_ce import fused

    chunks(1, 2)
    inputs, head = made(2, 3, torch.bfloat16, device), made_head(2, 3, torch.bfloat16, device)
    assert same(run_logits(inputs, "triton"), run_logits(inputs, "triton"))
    assert same(head_step(head, "triton", upstream=1.0), head_step(head, "triton", upstream=1.0))
    targets, w, hidden, weight = head["targets"], head["target_weight"], head["hidden"], head["weight"]
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(fused.multi_hot_ce, (inputs["logits"].requires_grad_(), targets, w, 0, V, ""))
    torch.library.opcheck(fused.linear_multi_hot_ce, (*leaves, targets, w, None, 0, V, ""))
    one, main_grad = torch.ones((), device=device), torch.zeros(V, H, device=device)
    checks = ("test_schema", "test_faketensor")
    plain = hidden.detach(), weight.detach(), targets, w
    for buffer, needed in ((main_grad, (True, True)), (None, (True, True)), (None, (False, False))):
        torch.library.opcheck(
            fused.linear_multi_hot_ce_at_once, (one, *plain, buffer, 0, V, "", *needed), test_utils=checks
        )
    torch.library.opcheck(fused.multi_hot_ce_kept, (*leaves, one, *plain[:2], one, None))


@pytest.mark.parametrize("mode", ["logits", "any", "promised", "main_grad", "promised main_grad"])
def test_compiles_into_one_graph(device, chunks, mode):
    chunks(4, 2)
    if mode == "logits":
        inputs, leaves, function = made(5, 2, torch.float32, device), ("logits",), multi_hot_cross_entropy
    else:
        inputs, leaves = made_head(5, 2, torch.float32, device), ("hidden", "weight")
        function = linear_multi_hot_cross_entropy
    options = {"upstream": 0.5} if "promised" in mode else {}

    def step(main_grad, leaves, inputs):
        options_ = options | ({} if main_grad is None else {"main_grad": main_grad})
        return 0.5 * function(**{**inputs, **leaves}, **options_, backend="triton")[0]

    def run(call):
        main_grad = torch.ones(V, H, device=device) if "main_grad" in mode else None
        made_leaves = {name: inputs[name].clone().requires_grad_() for name in leaves}
        loss = call(main_grad, made_leaves, {n: x for n, x in inputs.items() if n not in leaves})
        loss.backward()
        return loss.detach(), main_grad, *(x.grad for x in made_leaves.values())

    torch._dynamo.reset()
    assert same(run(torch.compile(step, backend="aot_eager", fullgraph=True)), run(step))


@BACKENDS
def test_a_recomputed_region_adds_once(device, chunks, backend):
    chunks(4, 1)
    inputs = made_head(5, 2, torch.float32, device)
    want = head_step(inputs, backend)
    for reentrant in (True, False):
        main_grad = torch.zeros(V, H, device=device)
        hidden, weight = inputs["hidden"].clone().requires_grad_(), inputs["weight"].clone().requires_grad_()

        def loss(hidden, weight, main_grad=main_grad):
            leaves = {"hidden": hidden, "weight": weight, "main_grad": main_grad}
            return linear_multi_hot_cross_entropy(**{**inputs, **leaves}, backend=backend)[0]

        torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
        assert torch.equal(hidden.grad, want[1]) and weight.grad is None
        torch.testing.assert_close(main_grad, want[2], rtol=1e-6, atol=1e-6)


def test_plan():
    """The sizes that the design expects of one H200; nothing here has been measured."""
    plan, budget = linear.plan, linear.BUDGET_BYTES
    assert plan(8192, 151_936, 2560, budget) == (2048, 4)
    assert plan(8192, 151_936, 1024, budget) == (2048, 2)
    assert plan(5, 151_936, 1024, budget)[0] == 128
    assert plan(8192, 151_936, 2560, 1) == (128, 1)
    for rows, columns, hidden, bytes_ in [(8192, 75_968, 2560, 2), (32_768, 37_984, 4096, 2), (999, 1000, 64, 4)]:
        chunk, slabs = plan(rows, columns, hidden, budget, bytes_)
        assert chunk % 128 == 0 and columns % slabs == 0
        assert slabs == 1 or columns // slabs * bytes_ % 16 == 0
        assert chunk * columns * bytes_ + (slabs > 1) * slabs * chunk * hidden * 4 <= budget


HEAD_GOOD = dict(
    hidden=torch.zeros(3, 6), weight=torch.zeros(5, 6), targets=torch.zeros(2, 3, dtype=torch.int64), target_weight=None
)


@BACKENDS
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(vocab_size=6), r"vocab_size: found 6, expected 1 .. 5, all ranks' columns"),
        (dict(vocab_size=0), "vocab_size: found 0"),
        (dict(main_grad=torch.zeros(5, 7)), r"main_grad: found shape \[5, 7\], expected \[v/tp, h\] = \[5, 6\]"),
        (dict(main_grad=torch.zeros(5, 6).bfloat16()), "main_grad: found torch.bfloat16 .* torch.float32, contig"),
        (dict(main_grad=torch.zeros(6, 5).t()), r"main_grad: found torch.float32 with strides \(1, 5\)"),
        (dict(upstream=torch.ones(3)), r"upstream: found shape \[3\], expected \[\]"),
        (dict(weight=torch.zeros(5, 6, device="meta")), "weight: found it on meta, expected cpu"),
    ],
)
def test_misuse_is_named(change, message, backend):
    with pytest.raises(ValueError, match=message):
        linear_multi_hot_cross_entropy(**{**HEAD_GOOD, **change}, backend=backend)


def test_kernels_refuse_what_they_do_not_read():
    doubles = {"hidden": torch.zeros(3, 6).double(), "weight": torch.zeros(5, 6).double()}
    with pytest.raises(ValueError, match=r"hidden: found torch.float64, expected one of .*backend='torch' takes any"):
        linear_multi_hot_cross_entropy(**{**HEAD_GOOD, **doubles}, backend="triton")
    with pytest.raises(ValueError, match="logits: found torch.float64"):
        multi_hot_cross_entropy(torch.zeros(3, 5).double(), HEAD_GOOD["targets"], None, backend="triton")


HALF = V // 2
SHARDS = {"padding in the last shard": V - 11, "a shard of padding": HALF, "padding in the first shard": HALF - 5}


def one_rank(name, tokens, device="cpu"):
    """Arguments for both forms; some bags lie on one rank, some on both."""
    head = made_head(4, 3, torch.float32, device, tokens)
    return {**head, "logits": (head["hidden"] @ head["weight"].t()).detach()}


def _shard(rank: int, path: str, results) -> None:
    """One of two ranks; sends back losses, gradients and main_grad of every case."""
    torch.set_num_threads(1)
    testing.interpret()
    launch.config = coarse
    linear.plan = lambda *sizes: (3, 2)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    group = dist.new_group([0, 1])
    half = slice(rank * HALF, (rank + 1) * HALF)
    answers = {}
    for backend in ("torch", "triton"):
        for name, tokens in SHARDS.items():
            inputs = one_rank(name, tokens)
            inputs["weight"] = inputs["weight"][half]
            logits = inputs.pop("logits")[:, half].clone()
            if tokens <= half.start:
                logits[:] = torch.nan  # nobody may look at them
            z = logits.requires_grad_()
            rest = {n: inputs[n] for n in ("targets", "target_weight", "vocab_size")}
            loss, _ = multi_hot_cross_entropy(z, **rest, tp_group=group, backend=backend)
            answers[backend, name] = [loss.detach(), *torch.autograd.grad(2 * loss, z)]
            for mode in ("any", "promised"):
                main_grad = torch.ones(HALF, H)
                options = {"upstream": 2.0} if mode == "promised" else {}
                loss, d_hidden, _ = head_step(inputs, backend, 2.0, tp_group=group, main_grad=main_grad, **options)
                answers[backend, name, mode] = [loss, d_hidden, main_grad - 1]
    results[rank] = {name: [x.numpy() for x in values] for name, values in answers.items()}
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_shard, args=(str(tmp_path / "store"), results), nprocs=2)
        ranks = [{name: [torch.from_numpy(x) for x in xs] for name, xs in results[r].items()} for r in (0, 1)]

    def close(x, y):
        testing.assert_within({"": off(x, y)}, 5e-6)

    for backend in ("torch", "triton"):
        for name, tokens in SHARDS.items():
            inputs = in_double(one_rank(name, tokens))
            z = inputs.pop("logits").requires_grad_()
            rest = {n: inputs[n] for n in ("targets", "target_weight", "vocab_size")}
            loss, _ = multi_hot_cross_entropy(z, **rest)
            first, second = (rank[backend, name] for rank in ranks)
            assert torch.equal(first[0], second[0])
            close(first[0], loss.detach())
            close(torch.cat([first[1], second[1]], dim=1), torch.autograd.grad(2 * loss, z)[0])
            want = head_step(inputs, "torch", 2.0)
            for mode in ("any", "promised"):
                first, second = (rank[backend, name, mode] for rank in ranks)
                assert torch.equal(first[0], second[0])
                close(first[0], want[0])
                close(first[1] + second[1], want[1])  # each rank's is its part
                close(torch.cat([first[2], second[2]]), want[2])
