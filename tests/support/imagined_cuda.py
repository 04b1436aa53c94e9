"""CUDA devices that are only imagined, with the values of real work: tensors lie in ordinary memory, and each storage
remembers on which device it would be. So a process takes the program's CUDA path on a CPU, and fails where CUDA would
because tensors of two devices meet, in operations, collectives and kernels; and it counts where the host would wait for
the device (`waits`). Kernels are interpreted, NCCL is gloo.

What this cannot show: whether kernels, streams and NCCL are right, and what Transformer Engine computes. Functions of
torch that are written in Python see the host.

`start()` before anything asks for the platform; the process is good for nothing else after it.

    python -m tests.support.imagined_cuda MODULE WORDS    `python -m MODULE WORDS` on such devices
"""

import collections
import contextlib
import runpy
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

NAME, CAPABILITY, MEMORY = "NVIDIA H200", (9, 0), 141 << 30
HOST = -1  # where a tensor is: there, or a device's number
T, aten = torch.Tensor, torch.ops.aten
PLAIN = (T, torch.nn.Parameter)

# The host waits for the result of these.
WAITING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_consecutive.default, aten.bincount.default, aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
# Two devices may meet in these; and in indexing, where the indices may be the host's.
MEETING = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default, aten.set_.source_Tensor}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
NUMBERS = ("aten::_foreach", "aten::fill", "aten::masked_fill")  # take one from the host, as pointwise ones do
# Products with an output of another type, which only CUDA has.
WIDE = {
    aten.mm.dtype: lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype)),
    aten.bmm.dtype: lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype)),
    aten.addmm.dtype_out: lambda c, a, b, dtype, out: torch.addmm(c, a.to(dtype), b.to(dtype), out=out),
}

waits = collections.Counter()  # (module or file, what) -> how often the host would have waited there
_now = SimpleNamespace(device=0)  # what torch.cuda.set_device was given
_state = threading.local()  # .forced: where new tensors lie; .calls: how many calls from Python we are inside
_gloo = set()  # names of groups that are gloo's also in earnest


def where(x):
    return getattr(x.untyped_storage(), "imagined", HOST)


def _asked(device):
    """Where `device=` means."""
    if type(device) is int:
        return device
    device = torch.device(device)
    return HOST if device.type != "cuda" else _now.device if device.index is None else device.index


def _wait(what):
    """The line that asked, in this repository or in megatron-core."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename
        for package in ("boreal_megatron", "boreal_kernels", "megatron/core"):
            if f"/{package}/" in name:
                waits[name[name.rindex(f"/{package}/") + 1 :], what] += 1
                return
    waits["elsewhere", what] += 1


@contextlib.contextmanager
def _with(**values):
    before = {name: getattr(_state, name, None) for name in values}
    vars(_state).update(values)
    try:
        yield
    finally:
        vars(_state).update(before)


class Devices(TorchDispatchMode):
    """Where every tensor lies, below autograd."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, T)]
        place = self.check(function, tensors, args, kwargs)
        known = {x.untyped_storage()._cdata for x in tensors}
        if function.namespace == "boreal":  # this repository's operations are made of others
            with Names(), self:
                out = OPDEFS[function._name.partition(".")[0]]._init_fn(*args, **kwargs)
        else:
            drawn = torch.Tag.nondeterministic_seeded in function.tags and kwargs.get("generator") is None
            with _device_generator() if drawn and place != HOST else contextlib.nullcontext():
                out = WIDE.get(function, function)(*args, **kwargs)
        for x in tree_flatten(out)[0]:
            if isinstance(x, T) and x.untyped_storage()._cdata not in known:
                x.untyped_storage().imagined = place
        return out

    def check(self, function, tensors, args, kwargs):
        """Where new results lie; raises for tensors that CUDA would not take together."""
        places, forced = [where(x) for x in tensors], getattr(_state, "forced", None)
        there = max(places, default=HOST)
        if there != HOST:
            if function in WAITING and not kwargs.get("output_size"):
                _wait(function.name())
            if function in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                _wait(f"{function.name()} by a mask")
            if function is aten.copy_.default and places == [HOST, there] and not args[2:]:
                _wait(function.name())
        if function.namespace == "c10d" and "barrier" not in function.name():  # whose tensor is torch's own
            _collective(function, places, args)
        elif forced is None and function not in MEETING:
            numbers = torch.Tag.pointwise in function.tags or function.name().startswith(NUMBERS)
            for x, place in zip(tensors, places, strict=True):
                free = numbers and not x.dim() or function in INDEXING and x is not args[0]
                if place != there and not (place == HOST and free):
                    found = [(tuple(x.shape), place) for x, place in zip(tensors, places, strict=True)]
                    raise RuntimeError(f"{function.name()}: expected one device, found (shape, device) {found}")
        if forced is None and not tensors and getattr(_state, "calls", None) == 0:
            return _now.device  # zeros that the gradient engine makes for outputs that nobody used
        return there if forced is None else forced


def _collective(function, places, args):
    """NCCL takes tensors of this rank's device, gloo those of the host."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            name = dist.ProcessGroup.unbox(arg).group_name
            expected = HOST if name in _gloo else _now.device
            if any(place != expected for place in places):
                raise RuntimeError(f"{function.name()}: group {name} takes tensors of {expected}, found {places}")


class Names(TorchFunctionMode):
    """What Python is told of a tensor's device, and what it says with `device=`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        with _with(calls=(getattr(_state, "calls", None) or 0) + 1):
            return self.answer(function, args, dict(kwargs or {}))

    def answer(self, function, args, kwargs):
        if function is torch.as_tensor or function in ANSWERS and type(args[0]) in PLAIN:
            return ANSWERS[function](function, *args, **kwargs)
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is None or str(device) == "meta" or function is torch.load:
            return function(*args, **kwargs)
        place = _asked(device)
        with _with(forced=place):
            out = function(*args, **kwargs | {"device": "cpu"})
        if isinstance(out, T):  # torch.tensor fills memory that no operation made
            out.untyped_storage().imagined = place
        return out


def _to(function, x, *args, copy=False, **kwargs):
    if args and isinstance(args[0], T):
        place, dtype, later = where(args[0]), args[0].dtype, False
    else:
        if args and type(args[0]) is int:
            args = (torch.device("cuda", args[0]), *args[1:])
        device, dtype, later, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "meta" or x.is_meta:
            return function(x, *args, **kwargs, copy=copy)
        place = _asked(device)
    return _move(x, place, dtype or x.dtype, later, copy)


def _move(x, place, dtype, later=False, copy=False):
    if where(x) == place:
        return T.to(x, dtype=dtype, copy=copy) if dtype != x.dtype or copy else x
    if place == HOST and not later:
        _wait("a copy to the host")
    with _with(forced=place):
        return x.clone() if dtype == x.dtype else T.to(x, dtype=dtype, copy=True)


def _as_tensor(function, data, dtype=None, device=None):
    if isinstance(data, T):
        return _move(data, where(data) if device is None else _asked(device), dtype or data.dtype)
    with Names():
        return torch.tensor(data, dtype=dtype, device=device)


def _numpy(function, x, *args, **kwargs):
    if where(x) != HOST:
        raise TypeError("can't convert cuda device type tensor to numpy")
    return function(x, *args, **kwargs)


def _tolist(function, x):
    if where(x) != HOST:
        _wait("tolist")
    return function(x)


def _type(function, x, *args, **kwargs):
    out = function(x, *args, **kwargs)
    return f"torch.cuda.{out.rpartition('.')[2]}" if isinstance(out, str) and where(x) != HOST else out


def _device(function, x):
    return function(x) if x.is_meta or where(x) == HOST else torch.device("cuda", where(x))


ANSWERS = {
    T.device.__get__: _device,
    T.is_cuda.__get__: lambda f, x: not x.is_meta and where(x) != HOST,
    T.is_cpu.__get__: lambda f, x: not x.is_meta and where(x) == HOST,
    T.get_device: lambda f, x: where(x),
    T.to: _to,
    T.cuda: lambda f, x, device=None, non_blocking=False: _move(x, _asked(device or "cuda"), x.dtype, non_blocking),
    T.cpu: lambda f, x: _move(x, HOST, x.dtype),
    T.numpy: _numpy,
    T.__array__: _numpy,
    T.tolist: _tolist,
    T.type: _type,
    T.pin_memory: lambda f, x: x,
    T.is_pinned: lambda f, x: False,
    torch.as_tensor: _as_tensor,
}


class Generator(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


_generator = Generator()


@contextlib.contextmanager
def _device_generator():
    """Draw from the device's stream of random numbers."""
    host = torch.default_generator.get_state()
    torch.default_generator.set_state(_generator.get_state())
    yield
    _generator.set_state(torch.default_generator.get_state())
    torch.default_generator.set_state(host)


class Event:
    def __init__(self, *args, **kwargs):
        self.at = 0.0

    def record(self, *args):
        self.at = time.perf_counter()

    def wait(self, *args):
        pass

    def synchronize(self):
        _wait("an event")

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


class Stream:
    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    wait_event = wait_stream

    def synchronize(self):
        _wait("a stream")

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def query(self):
        return True

    def is_capturing(self):
        return False


def _functions():
    """torch.cuda's."""
    cuda, stream, properties = torch.cuda, Stream(), SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, total_memory=MEMORY
    )  # fmt: skip

    def always(value):
        return lambda *args, **kwargs: value

    given = dict(
        is_available=always(True), is_initialized=always(True), init=always(None), _lazy_init=always(None),
        _lazy_call=lambda call, **kwargs: call(),
        device_count=always(8), current_device=lambda: _now.device,
        set_device=lambda device: setattr(_now, "device", _asked(device)), device=always(contextlib.nullcontext()),
        get_device_name=always(NAME), get_device_capability=always(CAPABILITY), get_device_properties=always(properties),
        is_bf16_supported=always(True),
        Stream=Stream, Event=Event, current_stream=always(stream), default_stream=always(stream),
        stream=always(contextlib.nullcontext()), is_current_stream_capturing=always(False),
        synchronize=lambda device=None: _wait("the device"),
        mem_get_info=always((MEMORY, MEMORY)), memory_stats=always({}), empty_cache=always(None),
        memory_allocated=always(1 << 30), max_memory_allocated=always(1 << 30), memory_reserved=always(1 << 30),
        max_memory_reserved=always(1 << 30), reset_peak_memory_stats=always(None),
        _record_memory_history=always(None), _dump_snapshot=always(None),
        get_rng_state=lambda device=None: _generator.get_state(),
        set_rng_state=lambda state, device=None: _generator.set_state(state),
        manual_seed=_generator.manual_seed, manual_seed_all=_generator.manual_seed,
        initial_seed=_generator.initial_seed, default_generators=(_generator,) * 8,
    )  # fmt: skip
    for name, value in given.items():
        for module in (cuda, cuda.random, cuda.memory):
            if hasattr(module, name):
                setattr(module, name, value)
    cuda.nccl.version, cuda.nvtx.range = always((2, 27, 5)), contextlib.nullcontext
    cuda.profiler.start = cuda.profiler.stop = always(None)
    torch.accelerator.current_device_index, torch.accelerator.current_stream = given["current_device"], always(stream)
    torch.Generator = Generator
    T.record_stream = always(None)
    profile = torch.profiler.profile
    torch.profiler.profile = lambda activities, **options: profile(
        activities=[a for a in activities if a != torch.profiler.ProfilerActivity.CUDA], **options
    )


def _autograd():
    """The gradient engine is called by Python, and calls Python again."""
    run = torch.autograd._engine_run_backward

    def backward(*args, **kwargs):
        with Names(), _with(calls=0, forced=None):
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = backward


def _masks():
    """Attention's causal masks are a subclass of Tensor in memory that no mode may have seen."""
    from torch.nn.attention import bias

    make, whole = bias.causal_lower_right, bias.CausalBias._materialize

    def causal_lower_right(*args):
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return make(*args)

    def materialize(self, device):
        with Names():
            return whole(self, "cuda")

    bias.causal_lower_right, bias.CausalBias._materialize = causal_lower_right, materialize


def _pickles():
    """A pickle brings a tensor back to the device it was on, whoever reads it."""
    reduce = T._reduce_ex_internal

    def reduce_to_place(x, protocol):
        reduced = reduce(x, protocol)
        return reduced if where(x) == HOST else (_unpickle, (where(x), *reduced[:2]))

    T._reduce_ex_internal = reduce_to_place


def _unpickle(place, build, arguments):
    x = build(*arguments)
    x.untyped_storage().imagined = place
    return x


def _groups():
    """NCCL's groups are gloo's underneath, and know what they were asked to be."""
    module = dist.distributed_c10d
    start, new = dist.init_process_group, module._new_group_with_tag

    def init_process_group(backend, *args, **kwargs):
        assert backend == "nccl", backend
        _gloo.clear()  # names are given anew
        return start("gloo", *args, **kwargs)

    def new_group(ranks=None, timeout=None, backend=None, *args, **kwargs):
        group = new(ranks, timeout, "gloo", *args, **kwargs)
        if backend == "gloo" and group is not dist.GroupMember.NON_GROUP_MEMBER:
            _gloo.add(group.group_name)
        return group

    def host_only(group):
        return (group or dist.group.WORLD).group_name in _gloo

    dist.init_process_group = module.init_process_group = init_process_group
    module._new_group_with_tag = new_group
    dist.get_backend = module.get_backend = lambda group=None: "gloo" if host_only(group) else "nccl"
    module._get_object_coll_device = lambda group=None: "cpu" if host_only(group) else "cuda"


def _kernels():
    """Launches are given tensors of the device and nothing else."""
    from boreal_kernels import testing

    testing.interpret()
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def checked(self, *args, grid, warmup, **kwargs):
        for x in (*args, *kwargs.values()):
            assert not isinstance(x, T) or where(x) == _now.device, f"{self.fn.__name__}: {tuple(x.shape)} is elsewhere"
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = checked


def start():
    for name in ("transformer_engine", "apex", "flash_attn", "fla"):  # compiled, and not for this
        sys.modules[name] = None
    _kernels()
    import torch._dynamo  # noqa: F401  modes import it, and it looks at the functions that are replaced here

    _functions()
    _autograd()
    _masks()
    _pickles()
    _groups()
    run = threading.Thread.run

    def run_with_modes(thread):
        Names().__enter__()
        Devices().__enter__()
        return run(thread)

    threading.Thread.run = run_with_modes
    Names().__enter__()
    Devices().__enter__()
    from boreal_megatron.platform import cpu

    cpu._uneven_collectives()  # gloo's are NCCL's here
    cpu.import_megatron()  # whose fused functions are compiled on CUDA, which takes CUDA


if __name__ == "__main__":
    from tests.support import imagined_cuda  # the module that others import, not this one

    imagined_cuda.start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
