"""What a checkpoint folder is and how it comes to be whole: names, manifest, tracker, retention. Imports no torch.

    FOLDER/latest_checkpointed_iteration.txt    the step of the last verified checkpoint
    FOLDER/iter_0000100/                        *.distcp, .metadata, metadata.json: megatron-core's `torch_dist` format;
                                                run_config.yaml, train_state.json, environment.json, tokenizer/;
                                                manifest.json: size and SHA-256 of every file above

A checkpoint is written under the name `iter_0000100.partial`. It gets its own name once every file was read back from
storage and its manifest is durable; the tracker moves after that, and only then may an older one be deleted. So at any
moment the tracker names a checkpoint that is whole.
"""

import errno
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import yaml

from boreal_megatron.config import load as config_load
from boreal_megatron.durable import flush, write_atomically
from boreal_megatron.data.tokenizer import TOKENIZER_FILES
from boreal_megatron.errors import BorealError, ProblemsError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
HASHES = ".hashes"  # what each writer found of its own shards, until the manifest has it
PACKAGES = (
    "boreal-megatron", "torch", "megatron-core", "numpy", "triton", "transformer-engine", "flash-linear-attention",
    "nvidia-resiliency-ext", "transformers", "tokenizers",
)  # fmt: skip


def name(step):
    return f"iter_{step:07d}"


# ---------------------------------------------------------------- reading


def checkpoints(folder):
    """Finished checkpoints under a folder, oldest first."""
    found = [p for p in Path(folder).glob("iter_*") if p.name[5:].isdigit() and (p / MANIFEST).exists()]
    return sorted(found, key=step_of)


def step_of(path):
    return int(Path(path).name[5:])


def latest(folder):
    """Path of the checkpoint that the tracker names, or None without a tracker.

    Raises:
        BorealError: the tracker names a checkpoint that is not there.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise BorealError(f"{tracker} holds {text[:40]!r}; expected a step number. Write the step to resume from into it")
    path = Path(folder) / name(int(text))
    if not (path / MANIFEST).exists():
        there = ", ".join(p.name for p in checkpoints(folder)) or "none"
        raise BorealError(
            f"{tracker} names step {text}, but {path} is not a complete checkpoint; checkpoints there: {there}. "
            "Write the step of one of them into the tracker, or remove the tracker to start anew"
        )
    return path


def resolve(path):
    """A checkpoint's own path, from itself or from the folder above it."""
    path = Path(path)
    if (path / MANIFEST).exists():
        return path
    found = latest(path)
    if found is None:
        raise BorealError(f"{path} is no checkpoint: expected a folder with {TRACKER}, or an iter_* folder inside one")
    return found


def describe(path):
    """What a checkpoint says of itself.

    Returns:
        dict: state, layout (None when no run wrote it), contents ("training" or "weights"), config (as a dict).
    """
    path = Path(path)
    try:
        record = json.loads((path / "train_state.json").read_text())
        config = yaml.safe_load((path / "run_config.yaml").read_text())
        return {**{key: record[key] for key in ("state", "layout", "contents")}, "config": config}
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise BorealError(f"{path} is not a complete checkpoint: {type(error).__name__}: {error}") from None


def saved_config(path):
    """The Config that a checkpoint was trained with."""
    return config_load.parse(describe(path)["config"], str(Path(path) / "run_config.yaml"))


def check_same_model(path, saved, config):
    """Refuse to load another network's weights."""
    theirs, ours = flat(saved["model"]), flat(config.model.model_dump(mode="json", exclude_none=True))
    ignored = {"init_std", "max_positions"}  # they shape no tensor
    different = [
        f"model.{key}: the checkpoint has {theirs.get(key)!r}, the configuration {ours.get(key)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in ignored
    ]
    if different:
        raise ProblemsError(f"{path} is a checkpoint of another model; use its run_config.yaml or another folder", different)


def verify(path, share=(0, 1), progress=None):
    """Compare a checkpoint's files with its manifest.

    Args:
        path: the iter_* folder.
        share: (rank, size); each of `size` callers hashes its own part of the files, and the first looks at names.
        progress: called with (bytes read, bytes to read), or None.

    Returns:
        list of problems, each naming its file; empty if every file is there, whole and the only one.
    """
    path, (rank, size) = Path(path), share
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        expected = {file: (int(entry["bytes"]), str(entry["sha256"])) for file, entry in listed.items()}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing; this checkpoint was never finished"] if rank == 0 else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: damaged ({type(error).__name__}: {error})"] if rank == 0 else []
    problems = []
    if rank == 0:
        foreign = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} - expected.keys() - {MANIFEST}
        problems += [f"{file}: not in the manifest; remove it" for file in sorted(foreign)]
    largest_first = sorted(expected, key=lambda file: (-expected[file][0], file))
    mine = largest_first[rank::size]
    done, total = 0, sum(expected[file][0] for file in mine)
    for file in mine:
        size_expected, hash_expected = expected[file]
        try:
            found = (path / file).stat().st_size
            if found != size_expected:
                problems.append(f"{file}: {found:,} bytes, the manifest says {size_expected:,}")
            elif sha256(path / file) != hash_expected:
                problems.append(f"{file}: its contents changed (SHA-256 differs from the manifest's)")
        except FileNotFoundError:
            problems.append(f"{file}: missing")
        except OSError as error:
            problems.append(f"{file}: cannot be read: {error}")
        done += size_expected
        if progress:
            progress(done, total)
    return problems


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- writing


def begin(folder, step, needed):
    """Make the folder that a checkpoint is written in.

    Args:
        folder: where checkpoints go.
        needed: bytes that it will take, about.

    Returns:
        path of `iter_*.partial`.

    Raises:
        BorealError: no space, or no right to write.
    """
    folder = Path(folder)
    partial = folder / f"{name(step)}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        partial.mkdir()
        (partial / HASHES).mkdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise BorealError(f"{partial} cannot be made: {why(error)}") from None
    if free < needed:
        raise BorealError(
            f"{folder} has {free / 1e9:.1f} GB free, a checkpoint needs about {needed / 1e9:.1f} GB; free some space"
        )
    return partial


def recover(folder):
    """Clear what a save left that was killed. Called when no save is under way."""
    for path in Path(folder).glob("iter_*.*"):
        kept = path.with_suffix("")
        if path.suffix == ".replaced" and not kept.exists():
            path.rename(kept)  # killed between the two renames of `publish`
        elif path.suffix in (".partial", ".replaced", ".deleting"):
            shutil.rmtree(path)


def read_back(partial, writer, files):
    """Hash the files that one writer wrote, once as written and once as storage gives them back, and leave the result
    for `finish`. Runs where the writing ran; never raises."""
    found = {}
    try:
        for file in files:
            written = sha256(file)
            flush(file)
            _forget(file)
            again = sha256(file)
            if written != again:
                raise OSError(errno.EIO, f"{file.name} reads back other bytes than were written")
            found[file.name] = {"bytes": file.stat().st_size, "sha256": again}
        problem = None
    except OSError as error:
        problem = why(error)
    try:
        (partial / HASHES / f"{writer}.json").write_text(json.dumps({"files": found, "problem": problem}))
    except OSError:
        pass  # no space even for that; `finish` misses it and says so


def finish(partial, config, record, writers=()):
    """Describe a written checkpoint, verify it, give it its name and move the tracker.

    Args:
        partial: what `begin` returned, with the shards in it.
        config: the run's Config.
        record: dict of state, layout and contents, for `describe`.
        writers: the names under which `read_back` left hashes; files of nobody are hashed here.

    Returns:
        path of the finished checkpoint.

    Raises:
        BorealError: it could not be written or did not read back; nothing else has changed.
    """
    partial = Path(partial)
    folder, final = partial.parent, partial.with_suffix("")
    try:
        files = {}
        for writer in writers:
            try:
                left = json.loads((partial / HASHES / f"{writer}.json").read_text())
            except (OSError, ValueError) as error:
                raise BorealError(f"{final.name}, writer {writer} died or had no space: {error}") from None
            if left["problem"]:
                raise BorealError(f"{final.name}, writer {writer}: {left['problem']}")
            files |= left["files"]
        config_load.dump(config, partial / "run_config.yaml")
        (partial / "train_state.json").write_text(json.dumps(record, indent=1))
        (partial / "environment.json").write_text(json.dumps(environment(), indent=1))
        (partial / "tokenizer").mkdir()
        for file in Path(config.data.tokenizer).glob("*"):
            if file.name in TOKENIZER_FILES:
                shutil.copy(file, partial / "tokenizer")
        shutil.rmtree(partial / HASHES)
        for file in sorted(f for f in partial.rglob("*") if f.is_file()):
            relative = str(file.relative_to(partial))
            if relative not in files:
                flush(file)
                files[relative] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        flush(partial / "tokenizer")
        write_atomically(partial / MANIFEST, json.dumps({"files": dict(sorted(files.items()))}, indent=1))
        _publish(partial, final)
        write_atomically(folder / TRACKER, f"{step_of(final)}\n")
    except OSError as error:
        raise BorealError(f"finishing {final} failed: {why(error)}") from None
    return final


def _publish(partial, final):
    """Rename; a checkpoint of the same step, which a run that went back writes again, steps aside first. Killed in
    between, `recover` puts it back."""
    replaced = final.with_suffix(".replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    flush(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def retire(folder, current, keep_last, keep_every):
    """Delete checkpoints that are no longer wanted, after `current` was verified.

    Args:
        current: path of the newest verified checkpoint.
        keep_last: how many of the newest stay, `current` among them; None keeps all.
        keep_every: steps that are multiples of it stay as well; None: no others.

    Returns:
        list of the deleted paths.
    """
    if keep_last is None:
        return []
    older = [p for p in checkpoints(folder) if step_of(p) <= step_of(current)]
    gone = [p for p in older[:-keep_last] if not (keep_every and step_of(p) % keep_every == 0)]
    for path in gone:
        doomed = path.with_suffix(".deleting")  # half of a checkpoint must not look like one
        path.rename(doomed)
        shutil.rmtree(doomed)
    return gone


@functools.cache
def environment():
    """What wrote a checkpoint: versions, machine, code, command."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "commit": _commit(),
        "machine": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit():
    """The source tree's commit, with a + when files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        said = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def why(error):
    return "no space left on the disk; free some" if error.errno == errno.ENOSPC else str(error)


def flat(values, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    out = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _forget(path):
    """Drop a flushed file from the page cache, so that the next read comes from storage."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
