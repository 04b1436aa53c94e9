"""The program on CUDA devices that are only imagined (tests/support/imagined_cuda.py): it computes a CPU's bits, tensors
of two devices never meet, and the host waits for the device where it is known to, and nowhere else."""

import json
import resource
import subprocess
import sys
from importlib.util import find_spec

import pytest
from tests.support.launch import MODEL, ROOT, boreal, digests, environment, metrics, write_config

MODEL = MODEL | {"pattern": "*-GEGE / *-"}  # experts on both of two pipeline stages
KERNELS = {"delta_rule": "torch", "others": "torch", "experts": "grouped_mm"}
PHASES = [
    {"name": "superposition", "until_steps": 1, "bag_size": 4, "sequence": 96, "positions_per_step": 192},
    {"name": "recovery", "until_steps": 2, "sequence": 96, "positions_per_step": 192},
]


def config(corpus, folder):
    changes = dict(model=MODEL, precision="bf16", kernels=KERNELS, phases=PHASES)
    return write_config(folder / "config.yaml", corpus, folder / "run", **changes)


@pytest.fixture(scope="module")
def found(corpus, tmp_path_factory):
    """What tests/support/imagined_worker.py found; `state` of its run, `cpu` that of the same run on the CPU."""
    folder, here = tmp_path_factory.mktemp("imagined"), tmp_path_factory.mktemp("cpu")
    out = folder / "found.json"
    said = launch(1, "tests.support.imagined_worker", config(corpus, folder), out)
    text = boreal(1, "train", config(corpus, here))
    return json.loads(out.read_text()) | {"state": state(said, folder), "cpu": state(text, here), "said": said}


def launch(processes, *words):
    """`python -m WORDS` in one process or under torchrun; what it printed."""
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *(several if processes > 1 else []), *map(str, words)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def state(text, folder):
    """Digests and losses of a run; random numbers, which a device draws from a stream of its own, left out."""
    digest = [part for part in digests(text) if not part.startswith("rng=")]
    return digest, [(m["loss"], m["mtp_loss"], m["gradient_norm"]) for m in metrics(folder / "run").values()]


def test_devices_that_are_imagined_refuse_what_devices_refuse(found):
    assert found["device"] == "cuda:0"
    expected = {
        "device and host": "aten::add.Tensor: expected one device",
        "two devices": "aten::cat: expected one device",
        "a gradient's": "aten::mul.Tensor: expected one device",
        "NumPy": "can't convert cuda",
        "NCCL and the host": "takes tensors of 0",
        "a pickle": "aten::add.Tensor: expected one device",
        "a kernel's": "is elsewhere",
    }
    assert found["noticed"].keys() == expected.keys()
    assert not {name: message for name, message in found["noticed"].items() if expected[name] not in (message or "")}


def test_a_run_has_a_cpus_bits(found):
    assert "experts: grouped_mm" in found["said"] and "optimizer: torch" in found["said"]
    assert found["state"] == found["cpu"] and len(found["state"][0]) == 3 and len(found["state"][1]) == 2


def test_nothing_is_set_that_nobody_asked_for(found):
    """Variables that make GPUs faster are `boreal preflight`'s to explain; megatron-core sets three for Transformer
    Engine's attention."""
    assert not [name for name in found["environment"] if not name.startswith("NVTE_")]


@pytest.mark.slow
def test_two_ranks_have_a_device_each(found, corpus, tmp_path):
    """Also what only Python objects carry from one to the other. The same losses, added up in another order."""
    words = (config(corpus, tmp_path), "parallel.pipeline=2", "micro_batch=1")
    launch(2, "tests.support.imagined_cuda", "boreal_megatron", "train", *words)
    losses = [(m["loss"], m["mtp_loss"], m["gradient_norm"]) for m in metrics(tmp_path / "run").values()]
    assert losses == [pytest.approx(step, rel=1e-3) for step in found["cpu"][1]]
    assert all(len(m["expert_loads"]) == 2 for m in metrics(tmp_path / "run").values())


@pytest.mark.skipif(find_spec("nvidia_resiliency_ext") is None, reason="nvidia-resiliency-ext is not installed")
@pytest.mark.parametrize("blocks", [None, 1000], ids=["room", "no room"])
def test_saves_in_the_background_by_nvidias_writer(blocks, found, corpus, tmp_path):
    """The same bits; and a save that fails, because no file may have more than 1,000 KiB, is said and ends the run."""
    words = (config(corpus, tmp_path), "checkpoint.async_save=true")
    limited = None if blocks is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * blocks,) * 2)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.imagined_cuda", "boreal_megatron", "train", *map(str, words)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, preexec_fn=limited,
    )  # fmt: skip
    if blocks is None:
        assert done.returncode == 0 and state(done.stdout, tmp_path) == found["cpu"]
    else:
        assert done.returncode == 1 and "was not saved: rank 0: Worker failure" in done.stderr


@pytest.mark.slow
def test_layouts_equal_one_process():
    """Those of `make test`, but for grouped experts, which take bf16 on CUDA."""
    launch(1, "pytest", "tests/parallel/test_layouts.py", "--imagined-cuda", "-m", "not slow", "-k", "not grouped")


def test_kernels_wait_for_nothing(found):
    assert len(found["kernels"]) == 5 and not any(found["kernels"].values())


def test_a_step_waits_where_it_has_to(found):
    """For what is said or decided after the passes, and within them for megatron-core's dispatcher of the experts, once
    a layer."""
    assert found["step"] == [
        ["boreal_megatron/platform/cuda.py", "the device", 2],  # that is the stop-watch
        ["boreal_megatron/train/step.py", "a copy to the host", 1],  # what the experts were given
        ["boreal_megatron/train/step.py", "aten::_local_scalar_dense", 1],  # who waited longest for data
        ["boreal_megatron/train/step.py", "tolist", 1],  # the losses
        ["megatron/core/optimizer/clip_grads.py", "aten::_local_scalar_dense", 1],  # the gradients' norm
        ["megatron/core/transformer/moe/token_dispatcher.py", "an event", 1],
    ]


def test_the_acceptance_measures(found):
    """What only a device has is there, and what was not measured says why."""
    rows = found["acceptance"]
    assert not [row for row in rows if row["status"] == "FAIL"]
    measured = {row["what"] for row in rows if row["measured"] is not None}
    for what in ("peak memory", "MFU of the bf16 peak", "share of gdn", "planned memory"):
        assert {f"bf16, bags of {bag}: {what}" for bag in (1, 4)} <= measured, what
    assert not [row for row in rows if row["measured"] is None and "transformer_engine" not in row["why"]]


def test_preflight_fails_by_speed_alone(found):
    failed = {(row["check"], row["name"]) for row in found["preflight"] if row["ok"] is False}
    assert failed == {("speed", "matrix product"), ("speed", "memory copy")}
