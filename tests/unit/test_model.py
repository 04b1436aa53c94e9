"""The network in one process: superposition's identities, no leak between documents, FP32 where it is promised,
the router's bias, and that one step moves everything that should move. Seeds and tolerances stand in each test."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from boreal_megatron import parallel
from boreal_megatron.config.schema import Parallel
from boreal_megatron.data import batch
from boreal_megatron.model import boreal, head, router
from boreal_megatron.train import optim
from boreal_megatron.train.step import forward_backward, means, means
from tests.support.checkpoints import save
from tests.support.configs import config_for, tiny_model
from torch.overrides import TorchFunctionMode

FP32 = ("A_log", "dt_bias", "router.weight", "router.expert_bias")


def windows(count, bag, positions, seed, vocab=256, documents=(0.4,)):
    """Windows of random ids; each has document boundaries at the given shares of its length."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        edges = np.array([int(share * positions) for share in documents])
        document = np.searchsorted(edges, np.arange(positions + 1), side="right") + 10 * number
        ids = rng.integers(1, vocab, (bag, positions + 1))
        weight = np.ones_like(ids, np.float32)
        out.append({"ids": ids, "valid": np.ones_like(ids, bool), "weight": weight, "document": document})
    return out


def make(count=2, bag=1, positions=64, seed=0, boundaries="align", vocab=256):
    return batch.make(windows(count, bag, positions, seed, vocab), boundaries=boundaries, device="cpu")


def build(mesh, model=None, **changes):
    config = config_for(model or tiny_model(), **changes)
    return config, boreal.build(config, mesh)[0]


def trained_step(config, mesh, steps=1, bag=1, seed=0):
    """Model, wrapped, optimizer after some real optimizer steps, and the last loads."""
    [model] = boreal.build(config, mesh)
    wrapped = optim.wrap(config, [model])
    optimizer = optim.build(config, wrapped)
    for step in range(steps):
        _, loads = forward_backward(config, wrapped, mesh, config.phases[0], [make(bag=bag, seed=seed + step)])
        norm = optim.gradient_norm(optimizer)
        optim.set_learning_rate(optimizer, config.schedule.peak, config.optimizer.weight_decay)
        optim.update(optimizer, norm, config.optimizer.clip)
    return model, wrapped, optimizer, loads


# ---------------------------------------------------------------- superposition


def test_bag_of_one_embeds_bit_equal_to_megatron(mesh):
    """seed 0: our embedding at k = 1 against VocabParallelEmbedding's forward on the same weight."""
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    _, model = build(mesh)
    embedding = model.embedding.word_embeddings
    ids = make().ids
    ours = embedding(ids)
    theirs = VocabParallelEmbedding.forward(embedding, ids[0])
    assert torch.equal(ours, theirs)


def test_bag_embedding_is_the_mean_of_its_tokens_and_skips_padding(mesh):
    _, model = build(mesh)
    table = model.embedding.word_embeddings.weight
    ids = torch.tensor([[[5, 7]], [[9, -1]]])  # [k=2, b=1, s=2], the second bag has one token
    out = model.embedding.word_embeddings(ids)  # [1, 2, h]
    torch.testing.assert_close(out[0, 0], (table[5] + table[9]) / 2, rtol=0, atol=1e-7)
    assert torch.equal(out[0, 1], table[7])


def loss_of(weight, hidden, batch, vocab_size, mesh, **options):
    return head.multi_hot_loss(
        weight,
        hidden,
        batch.labels,
        batch.label_weight,
        vocab_size=vocab_size,
        tp_group=mesh.groups.tp,
        sequence_parallel=False,
        **options,
    )


def test_bag_of_one_loss_and_gradient_equal_megatrons_cross_entropy(mesh):
    """fp32, 1e-6: the loss and d loss / d hidden of our head against mcore's vocab-parallel cross-entropy."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    _, model = build(mesh)
    b = make()
    torch.manual_seed(0)
    hidden = torch.randn(b.labels.shape[-1], 1, 64)
    weight = model.shared_embedding_or_output_weight()
    results = []
    for ours in (True, False):
        x = hidden.clone().requires_grad_()
        if ours:
            total, count = loss_of(weight, x, b, model.description.vocab_size, mesh)
            loss = total / count
        else:
            logits, _ = model.output_layer(x, weight=weight)
            each = vocab_parallel_cross_entropy(logits, b.labels[0].transpose(0, 1), tp_group=mesh.groups.tp)[:, 0]
            loss = (each * b.label_weight[0, 0]).sum() / b.label_weight.sum()
        loss.backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_loss_of_a_bag_is_the_mean_over_its_targets(mesh):
    """k = 4 through the whole network: the loss equals the mean of four one-target losses of the same logits."""
    _, model = build(mesh)
    b = make(bag=4)
    with torch.no_grad():
        packed = model(b)
        logp = model.logits(b).log_softmax(-1)  # [T, v]
    each = torch.stack([-logp.gather(1, b.labels[i, 0][:, None])[:, 0] for i in range(4)])
    expected = (each * b.label_weight[:, 0]).sum() / b.label_weight.sum()
    assert float(packed[0] / packed[1]) == pytest.approx(float(expected), rel=1e-5)
    assert float(packed[1]) == (b.label_weight > 0).sum()


def test_labels_do_not_leak_into_logits(mesh):
    """Changing bag p+1 leaves every logit up to bag p bit-equal, and the main loss does not see later labels."""
    _, model = build(mesh)
    first, second = windows(1, 4, 64, seed=3, documents=()), windows(1, 4, 64, seed=3, documents=())
    second[0]["ids"][:, 33:] = (second[0]["ids"][:, 33:] + 11) % 256
    with torch.no_grad():
        a, b = (model.logits(batch.make(w, boundaries="align", device="cpu")) for w in (first, second))
    assert torch.equal(a[:33], b[:33])
    assert not torch.equal(a[33:], b[33:])


# ---------------------------------------------------------------- documents


def test_documents_do_not_see_each_other(mesh):
    """Perturbing document A moves A's logits and leaves B's bit-equal: convolution, state and attention reset.

    Document A is 29 positions (off every chunk edge), B the other 35; the second window is another document too.
    """
    _, model = build(mesh)
    before, after = windows(2, 1, 64, seed=5, documents=(29.5 / 64,)), windows(2, 1, 64, seed=5, documents=(29.5 / 64,))
    after[0]["ids"][:, :29] = (after[0]["ids"][:, :29] + 100) % 256
    with torch.no_grad():
        a, b = (model.logits(batch.make(w, boundaries="align", device="cpu")) for w in (before, after))
    assert batch.make(before, boundaries="align", device="cpu").cu_seqlens.tolist() == [0, 29, 64, 93, 128]
    assert not torch.equal(a[:29], b[:29])
    assert torch.equal(a[29:], b[29:])


def test_a_document_gives_the_same_logits_alone_and_packed(mesh):
    """fp32, 1e-5: document B of the packed row, computed alone at positions 0.. (RoPE is relative)."""
    _, model = build(mesh)
    row = windows(1, 1, 64, seed=6, documents=(29.5 / 64,))
    with torch.no_grad():
        packed = model.logits(batch.make(row, boundaries="align", device="cpu"))[29:]
        alone = model.logits(batch.of_tokens(torch.from_numpy(row[0]["ids"][0, 29:64]), "cpu"))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


class HostReads(TorchFunctionMode):
    """Notes every call that waits for the device to tell the host a value."""

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bag", [1, 4])
def test_no_host_reads_in_the_network(bag, mesh):
    """Embedding, both mixers, dense layers, MTP and losses, forward and backward. MoE is megatron-core's dispatcher,
    whose all-to-all needs its split sizes on the host."""
    _, model = build(mesh, tiny_model(pattern="*-G-G- / *-", moe=None))
    b = make(bag=bag)
    with HostReads() as reads:
        losses = model(b)
        (losses[0] / losses[1]).backward()
    assert not reads.seen
    with HostReads() as reads:
        b.cu_seqlens.tolist()
    assert reads.seen == ["tolist"]


# ---------------------------------------------------------------- weights of documents


@pytest.mark.parametrize("bag", [1, 4])
def test_the_loss_is_divided_by_the_weights_of_its_targets(mesh, bag):
    """sum(w * loss) / sum(w) over micro-batches of different weight: the mean of what each document gives alone."""
    config, model = build(mesh, precision="fp32")
    wrapped = optim.wrap(config, [model])
    optim.build(config, wrapped)
    phase = config.phases[0].model_copy(update={"router_bias_rate": 0.0})

    def run(*weights):
        """Loss and gradient of as many micro-batches, whose targets weigh so much."""
        batches = []
        for seed, weight in enumerate(weights):
            made = windows(1, bag, 64, seed)
            made[0]["weight"] *= np.float32(weight)
            batches.append(batch.make(made, boundaries="align", device="cpu"))
        losses, _ = forward_backward(config, wrapped, mesh, phase, batches)
        return means(losses)[0], torch.cat([p.main_grad.flatten().clone() for p in model.parameters()])

    one, alone = run(1)
    two, other = run(0, 1)
    for weights in [(1, 1), (0.001, 0.003), (7.0, 0.25)]:
        share = weights[0] / sum(weights)
        loss, gradient = run(*weights)
        assert loss == pytest.approx(share * one + (1 - share) * two, rel=1e-6)
        torch.testing.assert_close(gradient, share * alone + (1 - share) * other, rtol=1e-4, atol=1e-6)
    assert not run(0, 0)[1].any()


# ---------------------------------------------------------------- vocabulary padding

MATRICES = ("word_embeddings.weight", "output_layer.weight")


def padded_steps(mesh, vocab, bag, tied, steps=1, precision="fp32", **layout):
    """Of a network with an odd vocabulary after optimizer steps with decay on every matrix: the losses of each step,
    and by name this rank's rows of the vocabulary matrices and of their last gradients."""
    model = tiny_model(vocab_size=vocab, tie_embeddings=tied)
    config = config_for(model, precision=precision, parallel=layout)
    [model] = boreal.build(config, mesh)
    wrapped = optim.wrap(config, [model])
    optimizer = optim.build(config, wrapped)
    losses = []
    for step in range(steps):
        b = make(bag=bag, seed=step, vocab=vocab)
        losses.append(forward_backward(config, wrapped, mesh, config.phases[0], [b])[0])
        matrices = {n: p for n, p in model.named_parameters() if n.endswith(MATRICES)}
        gradients = {name: p.main_grad.clone() for name, p in matrices.items()}
        optim.set_learning_rate(optimizer, 1e-2, 0.1)
        for part in optim.parts(optimizer):
            for group in part.optimizer.param_groups:
                group["weight_decay"] = 0.1
        optim.update(optimizer, optim.gradient_norm(optimizer), 1.0)
    return torch.stack(losses), {name: p.detach() for name, p in matrices.items()}, gradients


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bag, precision", [(1, "fp32"), (4, "fp32"), (4, "bf16")])
def test_padding_rows_are_zero_and_stay_zero(tied, bag, precision, mesh):
    """200 tokens in 256 rows, three steps: no bit of a padding row moves, and every other row does."""
    _, start = build(mesh, tiny_model(vocab_size=200, tie_embeddings=tied), precision=precision)
    before = {name: p for name, p in start.named_parameters() if name.endswith(MATRICES)}
    _, after, gradients = padded_steps(mesh, 200, bag, tied, steps=3, precision=precision)
    assert before.keys() == after.keys() == gradients.keys() and len(after) == 2 - tied
    for name, weight in after.items():
        assert weight.shape == (256, 64)
        for values in (before[name][200:], weight[200:], gradients[name][200:]):
            assert not values.any()
        assert (weight[:200] != before[name][:200]).any(dim=1).all()
        if tied or name == "output_layer.weight":  # an embedding alone has gradients for the ids of the batch only
            assert gradients[name][:200].any(dim=1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_over_the_tokens_only(tied, mesh):
    """fp32: main and MTP loss, and the gradient of the hidden states, are those of a head without padding rows; the
    zero logits of 56 more rows would move the loss by 0.2."""
    _, model = build(mesh, tiny_model(vocab_size=200, tie_embeddings=tied))
    b = make(bag=4, vocab=200)
    with torch.no_grad():
        packed, logits = model(b), model.logits(b)
    assert logits.shape == (128, 200)
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    torch.manual_seed(0)
    hidden, found = torch.randn(b.labels.shape[-1], 1, 64), []
    for rows in (weight, weight[:200]):
        x = hidden.clone().requires_grad_()
        total, count = loss_of(rows, x, b, 200, mesh)
        (total / count).backward()
        found.append((total / count, x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
    logp = logits.log_softmax(-1)
    expected = -(logp.gather(1, b.labels[:, 0].T).T * b.label_weight[:, 0]).sum() / b.label_weight.sum()
    assert float(packed[0] / packed[1]) == pytest.approx(float(expected), rel=1e-5)
    assert float(packed[2] / packed[3]) == pytest.approx(math.log(200), abs=0.1)


def tensor_rank(rank, folder):
    """One of two tensor-parallel ranks with sequence parallelism."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layout = dict(tensor=2, sequence_parallel=True)
    mesh = parallel.start(Parallel(**layout), seed=1)
    torch.save(padded_steps(mesh, 60, 4, tied=False, steps=2, **layout), f"{folder}/{rank}.pt")
    parallel.stop()


def test_a_tensor_parallel_rank_may_hold_padding_only(mesh, tmp_path):
    """60 tokens in 128 rows: the second rank has rows 64 to 127. fp32: both losses of two steps to 1e-5, and the last
    gradients and weights of both vocabulary matrices, by the norm of the difference, to 1e-4, equal one rank's."""
    torch.multiprocessing.spawn(tensor_rank, (str(tmp_path),), nprocs=2)
    losses, weights, gradients = padded_steps(mesh, 60, 4, tied=False, steps=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank_losses, rank_weights, rank_gradients in ranks:
        torch.testing.assert_close(rank_losses, losses, rtol=1e-5, atol=0)
        assert {len(x) for x in (*rank_weights.values(), *rank_gradients.values())} == {64}
    for mine, kind in ((weights, 1), (gradients, 2)):
        for name, expected in mine.items():
            found = torch.cat([rank[kind][name] for rank in ranks])
            assert float((found - expected).norm() / expected.norm()) < 1e-4, name
            assert not found[60:].any()


# ---------------------------------------------------------------- overlap


@pytest.mark.parametrize("experts", ["sequential", "grouped_mm"])
def test_overlap_waits_for_every_weight_and_hears_of_every_gradient(experts, mesh):
    """Also of those that modules take from a holder which is never called, or whose gradients autograd does not see."""
    config = config_for(
        tiny_model(tie_embeddings=False), kernels={"experts": experts}, parallel={"overlap": True}, seed=3
    )
    [model] = boreal.build(config, mesh)
    [wrapped] = optim.wrap(config, [model])
    optim.build(config, [wrapped])
    waited, heard = [], []

    class Group:
        def __init__(self, parameter):
            self.parameter = parameter

        def finish_param_sync(self, **unused):
            waited.append(self.parameter)

        def register_grad_ready(self, parameter, *unused):
            heard.append(parameter)

    groups, wrapped.param_to_bucket_group = wrapped.param_to_bucket_group, {p: Group(p) for p in model.parameters()}
    losses = wrapped(make(), 0.1)
    assert {id(p) for p in waited} == {id(p) for p in model.parameters()}
    head.loss_function(0.1, losses)[0].backward()
    wrapped.report_own_gradients()
    assert sorted(map(id, heard)) == sorted(id(p) for p in model.parameters())  # each once
    assert all(p.main_grad.abs().sum() > 0 for p in model.parameters())
    wrapped.param_to_bucket_group = groups


# ---------------------------------------------------------------- precision


def test_fp32_parameters_stay_fp32_under_bf16(mesh, tmp_path):
    """After the build, a step, a save and a load; and their master copies are not bf16 numbers in disguise."""
    from boreal_megatron.train import checkpoint

    config = config_for(tiny_model(), precision="bf16")
    model, wrapped, optimizer, _ = trained_step(config, mesh)

    def check(network):
        kinds = {name: t.dtype for name, t in [*network.named_parameters(), *network.named_buffers()]}
        kept = {name for name in kinds if name.endswith(FP32)}
        assert len(kept) == 6
        assert {kinds[name] for name in kept} == {torch.float32}
        assert {d for name, d in kinds.items() if name not in kept and "local_tokens" not in name} == {torch.bfloat16}
        a_log = network.decoder.layers[2].self_attention.A_log.detach()
        assert not torch.equal(a_log, a_log.bfloat16().float())
        return a_log.clone()

    before = check(model)
    path = save(tmp_path, config, wrapped, optimizer, mesh)
    [fresh] = boreal.build(config.model_copy(update={"seed": 7}), mesh)
    fresh_wrapped = optim.wrap(config, [fresh])
    checkpoint.load(path, config, fresh_wrapped, optim.build(config, fresh_wrapped), mesh)
    assert torch.equal(check(fresh), before)


def test_layout_in_a_checkpoint_is_the_layout_that_wrote_it(mesh):
    """As JSON gives it back; in the same layout the random generators are restored, too."""
    from boreal_megatron.train import checkpoint

    config = config_for(tiny_model(), parallel=dict(pipeline=2, pipeline_layers=[2, 1]))
    layout = checkpoint.layout(config, mesh)
    assert layout["pipeline_layers"] == [2, 1]
    assert json.loads(json.dumps(layout)) == layout


def test_decay_starts_as_documented(mesh):
    """alpha at a = 0: median half-life of about 11 positions, none at once forgetting (Gated DeltaNet's own start)."""
    model = tiny_model(gdn=dict(key_heads=64, value_heads=128, head_dim=16))
    _, network = build(mesh, model)
    mixer = network.decoder.layers[2].self_attention
    alpha = torch.exp(-mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt_bias)).detach()
    assert mixer.A_log.exp().min() >= 0.01 and mixer.A_log.exp().max() <= 16
    assert 0.88 < alpha.median() < 0.98
    assert alpha.min() > 0.15


# ---------------------------------------------------------------- experts


def test_router_bias_moves_once_per_batch_towards_the_mean(mesh):
    """rate 1e-2: after one step the bias is rate * sign(mean load - load), computed here from the logged loads."""
    phases = [dict(name="only", until_steps=4, sequence=64, positions_per_step=128, router_bias_rate=0.01)]
    model, _, _, loads = trained_step(config_for(tiny_model(), phases=phases), mesh)
    (_, layer), = router.routers(model)
    assert loads.sum() == 128 * 2
    assert loads.shape == (1, 4)
    expected = 0.01 * torch.sign(loads.mean() - loads[0])
    assert torch.equal(layer.expert_bias, expected)
    assert layer.local_tokens_per_expert.sum() == 0
    assert expected.abs().sum() > 0


def test_router_bias_can_be_frozen(mesh):
    phases = [dict(name="only", until_steps=4, sequence=64, positions_per_step=128, router_bias_rate=0.0)]
    model, _, _, _ = trained_step(config_for(tiny_model(), phases=phases), mesh, steps=2)
    assert router.routers(model)[0][1].expert_bias.abs().sum() == 0


def test_selection_uses_the_bias_and_weights_do_not(mesh):
    """noaux_tc by hand: top-k of sigmoid + bias, weights from the unbiased scores, normalised, times route_scale."""
    _, model = build(mesh)
    (_, layer), = router.routers(model)
    torch.manual_seed(0)
    x = torch.randn(50, 1, 64)
    layer.expert_bias.copy_(torch.tensor([0.0, 0.6, -0.6, 0.0]))
    with torch.no_grad():
        weights, chosen = layer(x)
    scores = torch.sigmoid(x[:, 0] @ layer.weight.T)
    top = (scores + layer.expert_bias).topk(2).indices
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, top, True))
    picked = torch.where(chosen, scores, 0.0)
    torch.testing.assert_close(weights, 2.5 * picked / picked.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert not torch.equal(chosen.sum(0), torch.zeros_like(chosen).scatter(1, scores.topk(2).indices, True).sum(0))


def test_balance_metrics():
    found = router.balance(torch.tensor([[4.0, 4, 4, 4], [12, 4, 0, 0]]))
    assert found == {"max_violation_mean": 1.0, "max_violation_worst": 2.0, "dead_experts": 2}


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("bag", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_parameter_gets_a_gradient_and_moves(bag, precision, mesh):
    """One step of each kind; gradients are read where megatron-core's DDP accumulates them, in FP32."""
    config = config_for(tiny_model(), precision=precision)
    [model] = boreal.build(config, mesh)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = optim.wrap(config, [model])
    optimizer = optim.build(config, wrapped)
    losses, _ = forward_backward(config, wrapped, mesh, config.phases[0], [make(bag=bag)])
    main, mtp = means(losses)
    assert main == pytest.approx(math.log(256), abs=0.3) and mtp == pytest.approx(math.log(256), abs=0.3)
    for name, p in model.named_parameters():
        assert p.main_grad.dtype == torch.float32
        assert p.main_grad.abs().sum() > 0, name
    optim.set_learning_rate(optimizer, 1e-2, 0.1)
    optim.update(optimizer, optim.gradient_norm(optimizer), 1.0)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_weight_decay_touches_matrices_only(mesh):
    """The table by name, read back from the optimizer's groups."""
    config = config_for(tiny_model())
    [model] = boreal.build(config, mesh)
    wrapped = optim.wrap(config, [model])
    optimizer = optim.build(config, wrapped)
    optim.set_learning_rate(optimizer, 1e-3, 0.1)
    decayed = {name for name, p in model.named_parameters() if optim.decays(name, p)}
    assert {n.rsplit(".", 2)[-2] for n in decayed} == {
        "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj", "router", "eh_proj",
    }  # fmt: skip
    elements = {0.0: 0, 0.1: 0}
    for part in optim.parts(optimizer):
        for group in part.optimizer.param_groups:
            elements[group["weight_decay"]] += sum(p.numel() for p in group["params"])
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert elements[0.1] == sum(sizes[name] for name in decayed)
    assert elements[0.0] == sum(sizes.values()) - elements[0.1]


def test_gate_activations_are_selectable(mesh):
    """silu and sigmoid give different networks from the same weights, in attention and in the mixer."""
    b = make()
    outputs = []
    for attention, gdn in (("silu", "silu"), ("sigmoid", "silu"), ("silu", "sigmoid")):
        model = tiny_model()
        model = model.model_copy(
            update={
                "attention": model.attention.model_copy(update={"gate": attention}),
                "gdn": model.gdn.model_copy(update={"gate": gdn}),
            }
        )
        _, network = build(mesh, model)
        with torch.no_grad():
            outputs.append(network.logits(b))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-5)


def test_experts_start_different(mesh):
    """Every expert of every layer is drawn on its own: no two rows of the stacked tensor are equal."""
    _, model = build(mesh)
    weights = [p for name, p in model.named_parameters() if "local_experts" in name and "fc1" in name]
    assert len(weights) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_batch_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().ids = None
