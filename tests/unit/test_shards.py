"""Files on both sides of an export: safetensors as the library writes them, chunks as torch's checkpoints keep them."""

import gc
import math
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from boreal_megatron.convert import hf, reader, shards, writer
from boreal_megatron.convert.mapping import mapping, training_shapes
from boreal_megatron.convert.reader import TensorReader, ahead
from safetensors import safe_open
from safetensors.torch import save_file
from tests.support.networks import random_weights, tiny

F32, BF16 = torch.float32, torch.bfloat16
TENSORS = {
    "z.weight": (torch.randn(7, 5), F32),
    "a.weight": (torch.randn(40, 9), BF16),
    "b": (torch.randn(3), F32),
    "naïve \"name\"": (torch.randn(9, 40).T, BF16),
    "a.bias": (torch.randn(2, 3, 4)[:, 1], F32),
}


@pytest.mark.parametrize("limit, files", [(10**9, 1), (1500, 2), (100, 5)])
def test_files_are_byte_equal_to_the_librarys(tmp_path, limit, files):
    plan = shards.Plan([(name, tensor.shape, dtype) for name, (tensor, dtype) in TENSORS.items()], limit)
    assert len(plan.sizes) == files
    counts = []
    strange = shards.write(tmp_path, plan, ((n, t) for n, (t, _) in TENSORS.items()), lambda *now: counts.append(now))
    assert not strange and counts == [(n, 5) for n in range(1, 6)]
    for file, size in plan.sizes.items():
        members = {n: t.to(d).contiguous() for n, (t, d) in TENSORS.items() if plan.index["weight_map"][n] == file}
        save_file(members, tmp_path / "reference", metadata={"format": "pt"})
        assert (tmp_path / file).read_bytes() == (tmp_path / "reference").read_bytes()
        assert (tmp_path / file).stat().st_size == size
        with safe_open(tmp_path / file, "pt") as opened:
            assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in members.items())
    (tmp_path / "reference").unlink()
    back = shards.Reader(tmp_path)
    assert list(back.shapes.items()) and back.bytes == sum(plan.sizes.values())
    for name, (tensor, dtype) in TENSORS.items():
        assert back.dtypes[name] == dtype and torch.equal(back(name), tensor.to(dtype))


def test_every_block_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 16)
    tensor = torch.zeros(100)
    tensor[[3, 50, 99]] = torch.tensor([torch.nan, torch.inf, 3.4e38])  # the last one is no bf16 number
    for dtype, count in ((F32, 2), (BF16, 3)):
        plan = shards.Plan([("x", (100,), dtype)], 10**9)
        (tmp_path / str(dtype)).mkdir()
        assert shards.write(tmp_path / str(dtype), plan, [("x", tensor)]) == {"x": count}


def test_an_export_holds_few_tensors_at_a_time(tmp_path, monkeypatch):
    """Bytes of training tensors that are alive: at most the limit, or one larger tensor, whatever else is in flight."""
    model = tiny(vocab_size=3000, tie_embeddings=False)
    weights, alive, most = random_weights(model), [0], [0]
    sizes = {name: 4 * math.prod(shape) for name, shape in training_shapes(mapping(model)).items()}
    largest, limit = max(sizes.values()), 100_000
    assert largest > 3 * limit and sum(sizes.values()) > 2 * largest

    def get(name):
        tensor = weights[name].clone()
        alive[0] += tensor.nbytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor.untyped_storage(), lambda size: alive.__setitem__(0, alive[0] - size), tensor.nbytes)
        return tensor

    monkeypatch.setattr(hf, "AHEAD", limit)
    gc.disable()  # nothing may need it
    try:
        shards.write(tmp_path, hf.planned(mapping(model), "bf16", 300_000), hf._stream(mapping(model), get))
    finally:
        gc.enable()
    assert largest <= most[0] <= largest + limit and alive[0] == 0


def test_ahead_keeps_order_and_limit():
    sizes, made, used = [5, 5, 90, 5, 5, 5], [], []
    for number in ahead(lambda n: made.append(n) or n, sizes, 12):
        used.append(number)
        assert sum(sizes[n] for n in made[number:]) <= 12 or len(made) - number == 1
    assert used == made == list(range(6))


def test_ahead_passes_errors_on_and_ends_with_its_reader():
    def produce(number):
        if number == 2:
            raise KeyError("two")
        return number

    results = ahead(produce, [1] * 5, 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(results)
    results = ahead(lambda n: n, [1] * 1000, 2)
    assert next(results) == 0
    results.close()
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join(5)
            assert not thread.is_alive()


@pytest.fixture
def stored(tmp_path):
    """A checkpoint in pieces of 4 ranks, with a stacked tensor; its tensors."""
    tensors = {"rows": torch.randn(12, 5), "vector": torch.randn(7), "bf16": torch.randn(8, 2).bfloat16()}
    stack = torch.randn(6, 4, 3)
    every = [(name, None, tensor) for name, tensor in tensors.items()]
    writer.write_tensors(tmp_path, every + [("stack", e, stack[e]) for e in range(6)], pieces=4)
    return tmp_path, tensors | {"stack": stack}


def test_what_is_written_is_read(stored):
    path, tensors = stored
    assert len(list(path.glob("__*_0.distcp"))) == 4
    ours = TensorReader(path)
    assert ours.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(ours(name), tensor) and ours.dtypes[name] == tensor.dtype
    assert all(torch.equal(ours.part("stack", e), tensors["stack"][e]) for e in range(6))
    assert torch.equal(ours.part("rows", 7), tensors["rows"][7])


def test_torch_reads_what_is_written(stored):
    path, tensors = stored
    out = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    torch_checkpoint.load(out, storage_reader=torch_checkpoint.FileSystemReader(path), no_dist=True)
    assert all(torch.equal(out[name], tensor) for name, tensor in tensors.items())


def test_files_are_closed_once_they_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "FILE_BYTES", 3000)
    tensors = {f"t{n}": torch.randn(100) for n in range(9)}
    writer.write_tensors(tmp_path, ((name, None, tensor) for name, tensor in tensors.items()))
    assert len(list(tmp_path.glob("__0_*.distcp"))) > 2
    assert all(torch.equal(TensorReader(tmp_path)(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("block", [16, 1 << 24])
def test_chunks_that_cut_columns_and_odd_strides(tmp_path, monkeypatch, block):
    """A tensor cut along its second dim, as tensor parallelism leaves it, and a chunk stored transposed."""
    monkeypatch.setattr(reader, "BLOCK", block)
    full = torch.randn(6, 8)
    pieces = {(0, 0): full[:, :3].contiguous(), (0, 3): full[:4, 3:].T.contiguous().T, (4, 3): full[4:, 3:].clone()}
    writer.write_tensors(tmp_path, [("x", None, full)])
    metadata = TensorReader(tmp_path)._entries["x"], TensorReader(tmp_path)._stored["x"]
    series, chunks, where = writer._Series(tmp_path, 9), [], {}
    for offsets, piece in pieces.items():
        chunks.append(type(metadata[0].chunks[0])(torch.Size(offsets), piece.shape))
        where[offsets] = series.put(piece)
    series.close()
    ours = TensorReader(tmp_path)
    ours._entries["x"].chunks[:], ours._stored["x"] = chunks, where
    assert torch.equal(ours("x"), full) and torch.equal(ours.part("x", 5), full[5])
    del ours._entries["x"].chunks[2]
    with pytest.raises(ValueError, match="38 of the 48 numbers"):
        ours("x")


LARGE_PAGES = """
import contextlib, sys
from pathlib import Path
from boreal_megatron.convert.export import export
from boreal_megatron.convert.importer import import_hf
from boreal_megatron.errors import BorealError

runs = {"export": lambda: export("missing", "out"), "import": lambda: import_hf("missing", "out", None), "neither": lambda: 0}
with contextlib.suppress(BorealError):
    runs[sys.argv[1]]()

import torch

tensor = torch.empty(1 << 26)
middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
for line in Path("/proc/self/smaps").read_text().splitlines():
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        begin, end = (int(number, 16) for number in first.split("-"))
        inside = begin <= middle < end
    elif inside and first == "VmFlags:":
        print("hg" in line.split())
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without large pages")
@pytest.mark.parametrize(("what", "large"), [("export", "True"), ("import", "True"), ("neither", "False")])
def test_large_pages_are_asked_for(what, large):
    """Before torch's first tensor, also with all that an import loads."""
    command = [sys.executable, "-W", "ignore", "-c", LARGE_PAGES, what]
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    assert subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.split() == [large]
