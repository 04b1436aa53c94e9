"""What needs a CUDA device: everything here is passed over without one. The kernels' own tests, `tests/kernels`, run on
the device too where there is one."""

import sys

import pytest
import torch
from tests.support.launch import ROOT

sys.path.insert(0, str(ROOT / "kernels" / "bench"))  # the benches hold the shapes and the proofs


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "/gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
