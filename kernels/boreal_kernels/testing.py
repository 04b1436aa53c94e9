"""Is a kernel right, and what does it cost? With a GPU and without one.

Without one, kernels are interpreted on CPU tensors, or compiled and not launched. Both must be asked for before the first
kernel is imported, and last for the process.
"""

import os
import re
import subprocess
import tempfile
import types
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from boreal_kernels import backend, launch

CAPABILITY = (9, 0)  # what `compile_only` compiles for: Hopper


def gradients(outputs, inputs: list[Tensor], seed: int = 7) -> list[Tensor | None]:
    """d(sum of outputs * fixed random weights)/d(inputs); outputs without a gradient are passed over.

    The weights are bfloat16 numbers, so that the gradients of all outputs begin the same in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    loss = 0.0
    for out in outputs:
        weights = torch.randn(out.shape, generator=generator).bfloat16().to(out.device)
        if out.requires_grad:
            loss = loss + (out.double() * weights).sum()
    return list(torch.autograd.grad(loss, inputs, allow_unused=True))


def errors(operation, inputs: dict, backend: str, seed: int = 7) -> dict[str, float]:
    """How far an implementation is from plain torch in float64, on the same values: outputs and every gradient.

    Args:
        operation: the public function.
        inputs: its arguments by name. Floating tensors are differentiated, strides and all.
        backend: whose errors.

    Returns:
        {"output 0": .., "gradient of x": ..}: the largest difference, over the largest value wanted. A NaN or an infinity
        on one side only is an infinite error.
    """

    found = run_both_ways(operation, inputs, backend, seed)
    doubles = {name: x.double() if _floating(x) else x for name, x in inputs.items()}
    wanted = run_both_ways(operation, doubles, "torch", seed)
    return {name: _error(found[name], wanted[name]) for name in wanted}


def run_both_ways(operation, inputs: dict, backend: str, seed: int = 7) -> dict[str, Tensor]:
    """{"output 0": .., "gradient of x": ..} of one forward and backward pass; arguments as in `errors`."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if _floating(x)}
    outputs = operation(**{**inputs, **leaves}, backend=backend)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    for name, grad in zip(leaves, gradients(outputs, list(leaves.values()), seed), strict=True):
        found[f"gradient of {name}"] = grad
    return found


def _floating(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _error(found, wanted) -> float:
    if found is None or wanted is None:
        return 0.0 if found is wanted else float("inf")
    found = found.double()
    if not torch.equal(found.isfinite(), wanted.isfinite()):
        return float("inf")
    finite = wanted.isfinite()
    difference = (found - wanted)[finite].abs().max().item() if finite.any() else 0.0
    return difference / max(wanted[finite].abs().max().item() if finite.any() else 0.0, 1e-30)


def assert_within(found: dict[str, float], allowed: float | dict[str, float]) -> None:
    """Raise AssertionError naming every error above `allowed`, one number for all or {name: number, "": the others}."""
    limits = allowed if isinstance(allowed, dict) else {"": allowed}
    wrong = {n: e for n, e in found.items() if not e <= limits.get(n, limits.get("", 0.0))}
    assert not wrong, "; ".join(f"{n}: off by {e:.2e}, allowed {limits.get(n, limits.get('', 0))}" for n, e in wrong.items())


@contextmanager
def poisoned_memory():
    """Memory that an operation allocates and does not write is NaN (the largest integer for integers)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def spread(x: Tensor) -> Tensor:
    """The same values as a view of wider rows whose other elements are NaN: rows that do not follow one another."""
    storage = torch.full((*x.shape[:-1], x.shape[-1] + 16), torch.nan, dtype=x.dtype, device=x.device)
    storage[..., 8 : 8 + x.shape[-1]] = x
    return storage[..., 8 : 8 + x.shape[-1]]


def interpret() -> None:
    """Let Triton interpret kernels on CPU tensors, with bfloat16 as a GPU has it.

    Triton 3.9's interpreter keeps bfloat16 as its 16 bits: it multiplies matrices of those integers, and truncates where
    a GPU rounds to nearest even. Both are put right here; arithmetic on bfloat16 values outside of tl.dot is not, so
    kernels convert to FP32 first.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def narrow(values):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    builder = interpreter.InterpreterBuilder
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def bfloat16(source, target):
        """The cast, where one side is bfloat16 and the other FP32, else None."""
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        return None

    def cast_impl(self, source, target):
        found = bfloat16(source, target)
        return cast(self, source, target) if found is None else found

    def create_fp_to_fp(self, source, target, rounding_mode):
        found = bfloat16(source, target)
        return convert(self, source, target, rounding_mode) if found is None else found

    def create_dot(self, a, b, d, *options):
        a, b = (interpreter.TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *options)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    backend.on_cpu = "interpret"


def compile_only() -> list[dict]:
    """Let every launch on CPU tensors compile its kernel for Hopper and not run it.

    Outputs then hold whatever their memory held: a run of an operation, forward and backward, says what it would launch,
    and what each kernel costs.

    Returns:
        the list that fills with one dict a kernel: kernel, constants (its constexpr arguments), registers (a thread's),
        stack (bytes a thread spills or indexes in memory), shared (bytes a program), warps, stages.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    assert not os.environ.get("TRITON_INTERPRET"), "kernels are interpreted in this process"
    report = []
    properties = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    disassembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"

    class Utils:
        def get_device_properties(self, device):
            return dict(properties)

        def load_binary(self, name, cubin, shared, device):
            registers, stack, local = _usage(disassembler, cubin)
            report.append({"kernel": name, "registers": registers, "stack": stack + local, "shared": shared})
            return object(), 1, registers, 0, 1024

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    class Launcher:
        def __init__(self, source, metadata):
            constants = {source.fn.arg_names[i[0]]: v for i, v in source.constants.items() if len(i) == 1}
            self.facts = {
                "constants": {k: v for k, v in constants.items() if v is None or isinstance(v, (int, float, str, bool))},
                "warps": metadata.num_warps,
                "stages": metadata.num_stages,
            }
            self.fresh = True

        def __call__(self, *args, **kwargs):
            if self.fresh:  # the binary of this kernel is the last one loaded
                report[-1].update(self.facts)
                self.fresh = False

    class Driver(DriverBase):
        def __init__(self):
            self.utils, self.launcher_cls = Utils(), Launcher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=None: 0
            self.get_device_capability = lambda device=0: CAPABILITY

        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            return "int"

        def get_current_target(self):
            return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_device_interface(self):
            return types.SimpleNamespace(synchronize=lambda: None, Event=None)

        def get_benchmarker(self):
            raise AssertionError("nothing is searched at run time")

        def get_empty_cache_for_benchmark(self):
            return torch.empty(1)

        def clear_cache(self, cache):
            pass

        def assemble_tensormap_to_arg(self, index, args):
            return args

    triton.runtime.driver.set_active(Driver())
    knobs.compilation.always_compile = True  # a cached binary would hide what this compiler makes of the kernel
    backend.use_newest_ptxas()
    backend.on_cpu = "compile"
    return report


def _usage(disassembler, cubin):
    """(registers, stack bytes, local bytes) of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([disassembler, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return tuple(map(int, found.groups()))


def toolchain() -> dict[str, str]:
    """What compiles here: versions of Triton and of the assembler it calls."""
    return {
        "triton": ".".join(map(str, backend.version("triton"))),
        "ptxas": ".".join(map(str, backend.ptxas_version())),
        "device": launch.device_name(),
    }
