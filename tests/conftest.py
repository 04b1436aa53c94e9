"""What many tests share: a small real corpus, a small configuration, the mesh of this one process, and launches."""

import gc
import os
import signal
import sys
import sysconfig
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell's background job ignores Ctrl-C, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from boreal_kernels import testing

from tests.support.corpus import make_corpus
from tests.support.launch import write_config

# Kernels run on the GPU where there is one, else Triton interprets them on the CPU: decided before anything imports it.
if not torch.cuda.is_available():
    testing.interpret()

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples/quickstart"))


def pytest_addoption(parser):
    parser.addoption("--imagined-cuda", action="store_true", help="layouts on devices of tests/support/imagined_cuda.py")
    parser.addoption("--layout-results", metavar="FOLDER", help="write what the layout bench measured to layouts.json there")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Standard-library sources as indexed data: paths of `tokenizer`, `train`, `valid`; 640 tokens."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), Path(sysconfig.get_paths()["stdlib"]))


@pytest.fixture
def config_file(corpus, tmp_path):
    """A run of every kind of block in seconds: 2 steps of bags of 4, then 3 of single tokens."""
    return write_config(tmp_path / "config.yaml", corpus, tmp_path / "run")


@pytest.fixture(scope="module")
def mesh():
    """This process as a world of one; a command that a test runs in this process leaves it when it is done."""
    from boreal_megatron import parallel
    from boreal_megatron.config.schema import Parallel
    from boreal_megatron.log import quiet

    quiet()
    gc.freeze()  # a save collects twice, and would walk all that was imported
    yield parallel.start(Parallel(), seed=1)
    gc.unfreeze()
