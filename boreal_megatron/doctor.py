"""What is installed, what each component buys, what replaces it, and which versions are known to be wrong.

Looks at package metadata, and asks torch for the device; imports no component that may be broken.
"""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from boreal_kernels import backend
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

HOPPER = backend.HOPPER
OK, MISSING, OLD, BAD, ELSEWHERE, OTHER = (
    "ok",
    "missing",
    "wrong version",
    "known bad",
    "bad elsewhere",
    "another package",
)
FAILURES = (
    OLD,
    BAD,
)  # a component that is there and must not be used; a missing one has its replacement


@dataclass(frozen=True)
class Component:
    """Something that a run may use.

    Attributes:
        name: the distribution's, or what `FINDERS` knows.
        needed: versions that are supported, "" for any.
        buys: what is faster, smaller or possible with it.
        instead: what runs without it; "nothing" marks a required one.
    """

    name: str
    needed: str
    buys: str
    instead: str


COMPONENTS = (
    Component("python", ">=3.12", "the program", "nothing"),
    Component("torch", ">=2.11", "tensors, NCCL and gloo", "nothing"),
    Component("megatron-core", ">=0.19.2,<0.20", "parallelism, optimizer, checkpoints", "nothing"),
    Component("triton", "", "the kernels of boreal_kernels on a GPU", "plain torch, several times slower"),
    Component("ptxas", ">=13.3", "Triton's kernels for Hopper, assembled right", "plain torch on Hopper"),
    Component("nccl", "", "collectives between GPUs", "gloo, on CPUs only"),
    Component("transformer-engine", ">=2.19,<3", "FP8, fused norm and linear, attention", "bf16, torch's own"),
    Component("apex", "", "FusedAdam, fused weight gradients", "Transformer Engine's, then torch's AdamW"),
    Component("flash-linear-attention", ">=0.6", "delta_rule=fla; exports on a GPU", "delta_rule=triton; torch"),
    Component("flash-qla", "==0.1.2", "delta_rule=flash_qla on Hopper", "delta_rule=triton"),
    Component("tilelang", "==0.1.9", "what flash-qla compiles with", "delta_rule=triton"),
    Component("nvidia-resiliency-ext", ">=0.6", "its writer for background saves", "megatron-core's writer"),
    Component("gigatoken", ">=0.10,<0.11", "preprocessing about 20 times faster", "tokenizers"),
    Component("orjson", "", "faster .jsonl", "json"),
    Component("pyarrow", "", ".parquet inputs", "convert them to .jsonl"),
    Component("sentencepiece", "", "tokenizer.model", "tokenizer.json"),
    Component("zstandard", "", ".zst inputs", ".gz, .bz2, .xz"),
    Component("fsspec", "", "data sets at a URL", "local files"),
    Component("transformers", ">=5.23", "`boreal export --check`, `generate`", "`boreal export` without the proof"),
    Component("lm-eval", ">=0.4.13", "evaluation of exported models", "a harness of your own"),
    Component("matplotlib", "", "loss.png", "TensorBoard, metrics.jsonl"),
)  # fmt: skip


@dataclass(frozen=True)
class KnownBad:
    """Versions of a component that are wrong together with something else.

    Attributes:
        when: with what, in words.
        holds: whether that is so here, given the device's compute capability, or None without a GPU.
        do: how to get out of it.
    """

    name: str
    versions: str
    when: str
    holds: Callable[[tuple[int, int] | None], bool]
    reason: str
    do: str


def _versions(row):
    low, high = (".".join(map(str, part)) for part in (row.since, row.before))
    return f"<{high}" if row.since == (0,) else f">={low},<{high}"


def _of_kernels(row):
    """A row of the kernels' own table, which `backend.choose` refuses, as one of ours."""
    device = ".".join(map(str, row.capability))

    def holds(capability):
        unused = row.backend == "fla" and found("flash-linear-attention") is None
        return capability == row.capability and not unused

    newer = ".".join(map(str, row.before))
    do = f"install {row.package} {newer} or newer"
    if row.package == "ptxas":
        do = f"point TRITON_PTXAS_PATH at ptxas {newer} or newer"
    when = f"kernels of {row.backend} on compute capability {device}"
    return KnownBad(row.package, _versions(row), when, holds, row.reason, do)


KNOWN_BAD = (
    *map(_of_kernels, backend.KNOWN_BAD),
    KnownBad(
        "nccl", ">=2.28.3,<=2.28.8", "communicators that are made anew after a failure (in-process restarts)",
        lambda capability: capability is not None and found("nvidia-resiliency-ext") is not None,
        "torchft's README tells its users to avoid them", "install nvidia-nccl-cu13 2.28.9 or newer",
    ),
    KnownBad(
        "tilelang", "!=0.1.9", "flash-qla 0.1.2",
        lambda capability: found("flash-qla") is not None,
        "a warm cache of compiled kernels hides that it needs 0.1.9 (Megatron-Bridge pull request 5098)",
        "pip install tilelang==0.1.9",
    ),
)  # fmt: skip


def found(name: str) -> str | None:
    """The installed version of a component, or None."""
    if name in FINDERS:
        return FINDERS[name]()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nccl():
    if not torch.version.cuda:
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _ptxas():
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        backend.use_newest_ptxas()
        return ".".join(map(str, backend.ptxas_version()))
    except (
        RuntimeError,
        OSError,
    ):  # Triton finds no assembler, or one that does not run
        return None


def _apex():
    return None if not is_nvidia_apex() else importlib.metadata.version("apex")


FINDERS = {
    "python": platform.python_version,
    "nccl": _nccl,
    "ptxas": _ptxas,
    "apex": _apex,
}


def is_nvidia_apex() -> bool | None:
    """Whether the installed `apex` is NVIDIA's, which has fused optimizers; PyPI's of that name is a web toolkit. None
    without either. It is not imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    places = spec.submodule_search_locations or []
    return any((Path(place) / "multi_tensor_apply").is_dir() for place in places)


def capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU, or None."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def examine() -> list[dict]:
    """Every component: {"name", "found", "needed", "state", "buys", "instead", "advice"}; states are this module's."""
    here = capability()
    rows = []
    for component in COMPONENTS:
        version = found(component.name)
        state, advice = judge(component, version, here)
        rows.append({**asdict(component), "found": version, "state": state, "advice": advice})
    return rows


def judge(component: Component, version: str | None, here: tuple[int, int] | None) -> tuple[str, str]:
    """(state, what to do) of one component of some version on a device of compute capability `here`."""
    if component.name == "apex" and is_nvidia_apex() is False:
        return (
            OTHER,
            "this is PyPI's apex, a web toolkit: pip uninstall apex; NVIDIA's is built from its sources",
        )
    if version is None:
        return (
            MISSING,
            "" if component.instead != "nothing" else f"pip install '{component.name}{component.needed}'",
        )
    for row in KNOWN_BAD:
        if row.name == component.name and within(version, row.versions):
            if row.holds(here):
                return BAD, f"with {row.when}: {row.reason}; {row.do}"
            return ELSEWHERE, f"with {row.when}: {row.reason}; there, {row.do}"
    if not within(version, component.needed):
        return (
            OLD,
            f"found {version}, expected {component.needed}: pip install '{component.name}{component.needed}'",
        )
    return OK, ""


def within(version: str, specifier: str) -> bool:
    """Whether a version is inside a range; one that is no PEP 440 version is inside none but ""."""
    try:
        return Version(version) in SpecifierSet(specifier, prereleases=True)
    except InvalidVersion:
        return not specifier


def install_lines() -> list[str]:
    """Commands that put the GPU components beside the installed torch; none of them is run."""
    cuda = torch.version.cuda or "13.2"
    major = cuda.split(".")[0]
    return [
        f"# beside torch {torch.__version__}, CUDA {cuda}{'' if torch.version.cuda else ' (assumed, this torch has none)'}",
        "pip install 'triton>=3.7.1' 'flash-linear-attention>=0.6' 'nvidia-resiliency-ext>=0.6'",
        f"pip install 'nvidia-cuda-crt=={cuda}.*' nvidia-curand ninja wheel packaging   # headers to compile against",
        "NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install --no-build-isolation "
        f"'transformer-engine[pytorch,core_cu{major}]>=2.19,<3'",
        "pip install 'flash-qla==0.1.2' 'tilelang==0.1.9'   # Hopper only",
        "# not `pip install apex`, which is another package: https://github.com/NVIDIA/apex has the build's commands",
    ]


def table(rows: list[dict]) -> str:
    """The components for people, then what to do."""
    heads = ("component", "found", "needed", "state", "buys", "without it")
    cells = [
        heads,
        *(
            (
                r["name"],
                r["found"] or "-",
                r["needed"] or "any",
                r["state"],
                r["buys"],
                r["instead"],
            )
            for r in rows
        ),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    advice = [f"{r['name']}: {r['advice']}" for r in rows if r["advice"]]
    return "\n".join([*lines, *([""] if advice else []), *advice])
