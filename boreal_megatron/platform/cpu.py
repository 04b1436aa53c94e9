"""megatron-core on CPU tensors and gloo.

megatron-core names CUDA in four ways: functions of `torch.cuda`, `device="cuda"` literals, its RNG tracker, and
branches that test `is_cuda`. Each gets its CPU meaning here, once, and only where no CUDA device exists; and so do the
collectives that only NCCL has.
`torch.cuda.is_available()` keeps telling the truth.
"""

import contextlib
import ctypes
import importlib.util

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


def install():
    """Give megatron-core's CUDA names their CPU meaning, in this thread. Idempotent."""
    global _installed
    if _installed:
        return
    assert not torch.cuda.is_available(), "the CPU platform is for machines without CUDA"
    _installed = True
    # Gates that forget within a position leave denormal numbers, which cost a CPU twenty ordinary ones.
    torch.set_flush_denormal(True)
    _memory()
    functions(_CPU)
    _rng()
    _dispatcher()
    _uneven_collectives()
    _optimizer()
    # Mode objects are per thread: autograd's own threads run only backward formulas, which create no named devices.
    CudaNames(_CPU).__enter__()


def import_megatron():
    """Import megatron-core with its fused functions as they are written. It gives them to torch.compile as it is
    imported, which imports the compiler, half of a process's start, and compiles for 20 s at the first step."""
    compiler, torch.compile = torch.compile, lambda function=None, **options: function or (lambda later: later)
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compiler
    disable_jit_fuser()


def _memory():
    """Keep large freed blocks instead of giving them back: every step asks for the same logits and gradients again,
    and touching fresh pages is a fifth of a small model's step. glibc only; elsewhere nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    wait = synchronize = record

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _Stream:
    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    wait_event = synchronize = wait_stream

    def record_event(self, *args):
        return _Event()


def functions(device):
    """torch.cuda's functions: one stream, nothing to wait for."""
    stream = _Stream()
    cuda = torch.cuda
    cuda.current_device = lambda: device
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.current_stream = cuda.default_stream = lambda *args: stream
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()


def _is_cuda(device):
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CudaNames(TorchFunctionMode):
    """`device="cuda"` means `device` (CPU or meta), `.cuda()` a tensor there, and pinned memory ordinary memory.

    `Tensor.type()` answers as on a GPU, because megatron-core's optimizers sort parameters by strings such as
    'torch.cuda.FloatTensor'.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = self.device
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if function is torch.Tensor.cuda:
            return args[0].to(self.device)
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], self.device, *args[2:])
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + function(*args).rpartition(".")[2]
        return function(*args, **kwargs)


def _rng():
    """megatron-core's named RNG streams over the CPU generator, also for activation recomputation."""
    from megatron.core.tensor_parallel import random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        def add(self, name, seed):
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG stream {name!r} or seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME):
            outer_state, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer_state)
                self._current_state_name = outer_name

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _dispatcher():
    """The all-to-all dispatcher's split sizes: upstream converts them to NumPy only when they are CUDA tensors."""
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _uneven_collectives():
    """Gathering and reduce-scattering parts of different lengths, which expert-tensor parallelism needs: NCCL takes
    them as they are, gloo only with every part padded to the longest."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def padded(x, length):
        return torch.cat([x, x.new_zeros(length - x.shape[0], *x.shape[1:])])

    def gather_any(x, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(x, group, None, use_global_buffer)
        sizes = [int(n) for n in output_split_sizes]
        parts = gather(padded(x, max(sizes)), group).chunk(group.size()) if max(sizes) else [x] * group.size()
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    def reduce_scatter_any(x, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(x, group, None, use_global_buffer)
        sizes = [int(n) for n in input_split_sizes]
        if not max(sizes):
            return x
        parts = [padded(part, max(sizes)) for part in x.split(sizes)]
        return reduce_scatter(torch.cat(parts), group)[: sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, reduce_scatter_any


def _optimizer():
    """torch's AdamW also where Transformer Engine is installed: its FusedAdam, which megatron-core would take, runs on
    CUDA only."""
    if importlib.util.find_spec("transformer_engine") is None:
        return
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = torch.optim.AdamW
    optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = True, False
