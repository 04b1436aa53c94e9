"""A run on two machines whose second machine dies, and one that Slurm tells to leave.

Two torchrun agents on this machine stand for two nodes. Each has a home, caches, temporary folder and data of its own;
they share the checkpoint folder and the rendezvous port, and nothing else.
"""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from tests.support.launch import ROOT, digests, environment, kill_all, metrics, uninterrupted

pytestmark = pytest.mark.slow

STEPS = 10

# A node without a heartbeat for 5 x 1 s counts as dead; torchrun's own 3 x 5 s would only make the tests longer.
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=5,read_timeout=30"
SHARE_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # "1" lets a new agent join survivors, see the last test
START, FINISH = 240, 400  # seconds on two busy cores

LOCAL_FOLDERS = {
    "HOME": "",
    "TMPDIR": "tmp",
    "XDG_CACHE_HOME": "cache",
    "HF_HOME": "cache/huggingface",
    "TRITON_CACHE_DIR": "cache/triton",
    "TORCHINDUCTOR_CACHE_DIR": "cache/inductor",
}


class Node:
    """One machine: a torchrun agent with one worker. `worker` is what stands after torchrun's options."""

    def __init__(self, number, home, port, worker, **variables):
        self.home = home
        self.log = None
        self.folders = {name: home / folder for name, folder in LOCAL_FOLDERS.items()}
        for folder in self.folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment(
            PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", LOGLEVEL="INFO",
            **{SHARE_STORE: "1", **variables}, **{name: str(folder) for name, folder in self.folders.items()},
        )  # fmt: skip
        self.command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "drill",
            "--rdzv-conf", f"is_host={int(number == 1)},{RENDEZVOUS}", "--max-restarts", "3",
            # Ranks follow the order of the nodes' names, and both nodes have this machine's.
            "--local-addr", {1: "localhost", 2: "node2"}[number], *worker,
        ]  # fmt: skip

    def start(self):
        """Start the agent, or start it again after its death: the same command each time, a log for each life."""
        self.log = self.home / f"agent-{len(list(self.home.glob('agent-*')))}.log"
        with self.log.open("w") as out:
            self.agent = subprocess.Popen(
                self.command, cwd=self.home, env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def said(self):
        return self.log.read_text(errors="replace")

    def processes(self):
        leader = psutil.Process(self.agent.pid)
        return [leader, *leader.children(recursive=True)]

    def die(self):
        """SIGKILL of the agent and everything under it, as when the machine loses power."""
        kill_all(self.agent.pid)
        self.agent.wait()


class Cluster:
    """Two nodes and the port where they meet. `worker(home)` gives what a node's agent starts."""

    def __init__(self, home):
        self.home = home
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            self.port = probe.getsockname()[1]
        self.nodes = []

    def start(self, worker, **variables):
        self.nodes = [Node(n, self.home / str(n), self.port, worker(self.home / str(n)), **variables) for n in (1, 2)]
        for node in self.nodes:
            node.start()
        return self.nodes

    def wait(self, what, condition, timeout):
        """Poll; on failure show what every agent said in every life."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {timeout} s\n{self.history()}"
            time.sleep(0.05)

    def history(self):
        logs = sorted(self.home.glob("*/agent-*.log"))
        return "\n".join(f"---- {log}\n{log.read_text(errors='replace')[-5000:]}" for log in logs)

    def close(self):
        for node in self.nodes:
            if node.agent.poll() is None:
                node.die()


@pytest.fixture
def cluster():
    # Not tmp_path: the path of a socket under TMPDIR has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="nodes") as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.close()


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    return uninterrupted(corpus, tmp_path_factory.mktemp("whole"), STEPS, every_steps=100)


def training(config, corpus, run):
    """`boreal train` with a checkpoint every second step, on data that lies in the node's own folder."""

    def worker(home):
        data = shutil.copytree(corpus["train"].parent, home / "data")
        own = {"tokenizer": "tokenizer", "sources.text": "train", "validation": "valid"}
        return [
            "-m", "boreal_megatron", "train", str(config), f"checkpoint.folder={run}", "checkpoint.every_steps=2",
            *(f"data.{key}={data / name}" for key, name in own.items()),
        ]  # fmt: skip

    return worker


def steps_of(text):
    return [int(step) for step in re.findall(r" iteration +(\d+)/", text)]


def test_run_whose_second_node_dies_ends_like_an_uninterrupted_one(whole, corpus, cluster, tmp_path):
    """SIGKILL of the second agent and its workers after step 3; the same command starts it again. The first agent
    stays, takes it back, and the run ends with the bits of one that nothing happened to."""
    config, theirs, expected = whole
    run = tmp_path / "run"
    first, second = cluster.start(training(config, corpus, run))
    cluster.wait("step 3", lambda: 3 in steps_of(second.said()), START)
    before = second.said(), first.said()
    second.die()
    killed = time.time()
    assert steps_of(before[0])[-1] < STEPS and "resuming from" not in before[0]
    assert before[1].count("Rendezvous complete") == 1 and "will restart worker group" not in before[1]

    second.start()
    cluster.wait("the end", lambda: first.agent.poll() is not None and second.agent.poll() is not None, FINISH)
    assert (first.agent.returncode, second.agent.returncode) == (0, 0), cluster.history()
    assert "Worker group FAILED. 3/3 attempts left; will restart worker group" in first.said()
    assert first.said().count("Rendezvous complete") == 2

    resumed = re.search(r"resuming from \S+/iter_(\d+): step (\d+)", second.said())
    assert resumed, cluster.history()
    step = int(resumed[2])
    assert 2 <= step < STEPS
    assert steps_of(second.said()) == list(range(step + 1, STEPS + 1))
    assert (run / f"iter_{STEPS:07d}").stat().st_mtime > killed

    assert digests(second.said()) == expected
    ours = metrics(run)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert list(ours) == list(range(1, STEPS + 1)) and len(lines) == STEPS, "a step that was repeated is written once"
    for key in ("loss", "mtp_loss", "gradient_norm", "raw_tokens"):
        assert [r[key] for r in ours.values()] == [r[key] for r in theirs.values()], key


def test_sigterm_to_every_process_of_both_nodes_saves_and_leaves(whole, corpus, cluster, tmp_path):
    """What `sbatch --signal=TERM@300` does: agents, workers and helpers of all nodes get SIGTERM at once, the workers
    a second time from their agents. The step ends, a checkpoint is written, and nobody is left. torchrun then ends with
    another code than 0 (1, or the SIGABRT of a thread of its own), as after a failure: launch.sh counts on that."""
    run = tmp_path / "run"
    nodes = cluster.start(training(whole[0], corpus, run))
    cluster.wait("step 3", lambda: 3 in steps_of(nodes[1].said()), START)
    processes = [process for node in nodes for process in node.processes()]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    cluster.wait("both leaving", lambda: all(node.agent.poll() is not None for node in nodes), 60)
    step = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert f"leaving after iteration {step}" in nodes[1].said(), cluster.history()
    assert 3 <= step < STEPS
    for node in nodes:
        assert node.agent.returncode != 0, cluster.history()
        assert "forcefully exiting" not in node.said(), cluster.history()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("shared", ["1", "0"])
def test_survivors_take_a_new_node_only_without_the_shared_store(cluster, shared):
    """Survivors that do not notice the death (as in a hung collective) restart when the new node joins, and use up no
    restart. torch up to 2.15 needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it: otherwise a surviving rank 0 does not
    publish its address again and the new node waits for it in vain. When "0" works too, scripts and README drop it."""
    first, second = cluster.start(lambda home: ["--no-python", "sleep", "600"], **{SHARE_STORE: shared})
    complete = "Rendezvous complete"
    cluster.wait("the first round", lambda: complete in first.said() and complete in second.said(), START)
    second.die()
    second.start()
    if shared == "0":
        cluster.wait("the new node's failure", lambda: second.agent.poll() is not None, START)
        assert "wait timeout" in second.said() and "MASTER_ADDR" in second.said()
        return
    again = "Starting worker group"
    cluster.wait("the second round", lambda: again in second.said() and first.said().count(again) == 2, START)
    assert "Detected 1 new nodes" in first.said()
    assert first.said().count("restart_count=0") == 2
