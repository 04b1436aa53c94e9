"""Shared by the kernel tests: seeded inputs, gradients by name, memory whose unused parts are NaN."""

import pytest
import torch


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """The shapes here are tiny; more threads only add noise and waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def normal():
    """normal(*shape, dtype) draws from one generator seeded per test, whatever the tests before it drew."""
    generator = torch.Generator().manual_seed(20240607)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return draw


@pytest.fixture
def poisoned():
    """poisoned(x): the same values as a non-contiguous view, every other element of its storage NaN."""

    def view(x: torch.Tensor) -> torch.Tensor:
        storage = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        storage[..., 1::2] = x
        return storage[..., 1::2].detach()

    return view


@pytest.fixture
def gradients():
    """gradients(outputs, inputs): d(sum of outputs * fixed random weights)/d(inputs), None outputs skipped."""

    def compute(outputs, inputs) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        loss = 0.0
        for out in outputs:
            if out is not None and out.requires_grad:
                loss = loss + (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum().double()
        return list(torch.autograd.grad(loss, inputs))

    return compute
