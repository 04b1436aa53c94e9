"""The folder of the checkpoints: room, write, flush, read back, compare; and that all hosts see the same one."""

import datetime
import hashlib
import os
import random
import shutil
import time

from boreal_megatron.plan import params
from boreal_megatron.preflight.finding import Finding

MEBIBYTE = 1 << 20
BYTES = {"cuda": 256 * MEBIBYTE, "cpu": 4 * MEBIBYTE}
STATE = 16  # bytes a parameter in a checkpoint: weight, master weight and two moments, at most 4 each
PATIENCE = datetime.timedelta(seconds=60)  # for a file to appear on other hosts
SHARED = "preflight-shared.tmp"


def probe(here):
    """The findings of this rank. What is written is removed again."""
    here.folder.mkdir(parents=True, exist_ok=True)
    return [room(here), shared(here), *write_and_read(here)]


def room(here):
    free, needed = shutil.disk_usage(here.folder).free, STATE * params.count(here.config.model)["with_mtp"]
    ok = free >= needed
    return Finding(
        "room for a checkpoint", ok, value=free / 1e9, unit="GB free", expected=f">= {needed / 1e9:.3g} GB",
        advice="" if ok else f"make room in {here.folder}, or name another checkpoint.folder",
    )  # fmt: skip


def shared(here):
    """Every rank writes its part of a checkpoint: all of them have to see one folder."""
    path = here.folder / SHARED
    if here.mesh.rank == 0:
        secret = random.SystemRandom().randbytes(16).hex()
        path.write_text(secret)
        here.store.set("storage/secret", secret)
    here.store.wait(["storage/secret"], PATIENCE)
    ours = here.store.get("storage/secret").decode()
    found = path.read_text() if path.exists() else None
    ok = found == ours
    return Finding(
        "one folder for all ranks", ok, "the same file" if ok else "not rank 0's file", "rank 0's file",
        "" if ok else f"{here.folder} is another folder on this host: mount the shared file system",
    )  # fmt: skip


def clean(folder):
    """Remove what rank 0 left for the others to see."""
    (folder / SHARED).unlink(missing_ok=True)


def write_and_read(here):
    """Rates of a flushed write and of a read that does not come from memory, and whether the bytes are the same."""
    size = BYTES[here.mesh.device.type]
    numbers = random.Random(here.mesh.rank)
    data = b"".join(numbers.randbytes(MEBIBYTE) for _ in range(size // MEBIBYTE))  # one call makes less than 256 MiB
    path = here.folder / f"preflight-{here.mesh.rank}.tmp"
    try:
        began = time.perf_counter()
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        with open(path, "rb") as file:
            again = file.read()
        read = time.perf_counter()
    except OSError as error:
        where = f"{path}: {error.strerror}"
        return [Finding("write, read, compare", False, where, "no error", f"look at the file system of {here.folder}")]
    finally:
        path.unlink(missing_ok=True)
    same = hashlib.sha256(again).digest() == hashlib.sha256(data).digest()
    advice = "" if same else "the file system returns other bytes than were written: do not train on it"
    return [
        Finding("write, read, compare", same, "the same bytes" if same else "other bytes", "the same bytes", advice),
        Finding("write", None, value=size / (written - began) / 1e9, unit="GB/s"),
        Finding("read", None, value=size / (read - written) / 1e9, unit="GB/s"),
    ]
