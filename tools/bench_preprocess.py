"""Preprocessing beside Megatron-LM's own tools: time, CPU, memory, and whether the same bytes are written.

    python tools/bench_preprocess.py --megatron /path/to/Megatron-LM --megabytes 170 --rounds 3 --table

The corpus is human text of this machine (Python and C sources, manual pages, documentation), each document once, and
at its end a few dozen hand-written documents of the kinds that tokenizers disagree about. Every run is a whole fresh
process, imports included. In each round every tool runs once, each round beginning with another. What was written is
compared byte for byte with what Megatron-LM's default tool wrote; ours is to be equal. Megatron-LM runs unmodified; its
fast tool needs gigatoken and awkward importable. Corpus and tokenizer stay in `--work` for the next time. Without
--megatron: our engines beside each other. Exit code 0: every run of ours wrote the expected bytes.
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np

from boreal_megatron.data.indexed import IndexedReader, bin_path, idx_path
from boreal_megatron.data.tokenizer import train_bpe
from boreal_megatron.errors import BorealError

FILE_BYTES = range(200, 400_001)  # of a document's file
LONG_LINE = 32  # characters; shorter lines are alike everywhere
MOST_SEEN = 0.25  # share of a document's long lines that may be in earlier documents
TRAINED_BYTES = 60_000_000  # of the corpus, spread over it: enough for 151,643 entries, and minutes of training
SAMPLE_SECONDS = 0.05  # between two looks at the memory
LISTED = 20  # differing documents that are named
CLOCK = os.sysconf("SC_CLK_TCK")

# What tokenizers are known to disagree about; `split` and `keep` must give Megatron's bytes on these too.
HARD = [
    "", " ", "\n", "\r\n\r\n \r", "\t x\t\n", " " * 3000 + "x", "x" * 20_000, "ab" * 10_000, "=" * 5_000,
    "1234567890" * 300, "nul \0 and \x01\x1f\x7f\x85 controls", "a\u00a0b\u2003c\u3000d\u200b\u200de\ufeff",
    "line\u2028and\u2029paragraph", "don't DON'T we'LL I'm they'Ve it'\u017ft '\u017f",
    "a <|endoftext|> written out", "<|endoftext|>", "<|endoftext|><|endoftext|>\n", "almost: <|endoftext| >",
    "<|im_start|>user\nhello<|im_end|>", "cafe\u0301 A\u030a \u212b \ufb01 \u1e69 s\u0323\u0307 s\u0307\u0323",
    "\u1100\u1161\u11a8 \uac00\u11a8 \ud55c\uad6d\uc5b4", "\u07f3\u07fd e\u07fd\u0301 e\u1adb\u0301",
    # Newer than Python's Unicode tables, and older than a fast engine's: marks and compositions.
    "e\u1add\u0301 \U0001611e\U0001611e \U00016d67\U00016d67", "\U00011382\U000113c9 \U000105d2\u0307",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea",
    "\u0e01\u0e33\u0e25\u0e31\u0e07\u0e44\u0e1b", "\u0627\u0644\u0633\u0651\u064e\u0644\u0627\u0645\u064f",
    "\u6f22\u5b57\u304b\u306a\uff76\uff9e", "\u0301 first a mark", "\ufffd\ufffe\uffff\U0010ffff\ue000",
    "\u0663\u0664 \u00bd \u2167 \u00b2 \u01c5 \u02b0",
]  # fmt: skip


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--megatron", type=Path, metavar="DIR", help="checkout of Megatron-LM")
    p.add_argument("--corpus", type=Path, metavar="FILE", help=".jsonl with key text; default: text of this machine")
    p.add_argument("--megabytes", type=float, default=170, help="of the corpus to build; default: %(default)s")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: one like Qwen's, trained on the corpus")
    p.add_argument("--vocabulary", type=int, default=151_643, help="entries of the one to train; default: %(default)s")
    p.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes; default: 1 2")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--timeout", type=float, default=3600, help="seconds for a run; default: %(default)s")
    work = Path(tempfile.gettempdir()) / "boreal-bench-preprocess"
    p.add_argument("--work", type=Path, default=work, metavar="DIR", help="default: %(default)s")
    p.add_argument("--json", type=Path, metavar="FILE", help="every run, machine, versions, corpus")
    p.add_argument("--table", action="store_true", help="print Markdown")
    args = p.parse_args()
    try:
        found = bench(args)
    except BorealError as error:
        sys.exit(f"error: {error}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(report(found, markdown=args.table))
    sys.exit(0 if found["agrees"] else 1)


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def bench(args):
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = args.corpus or build_corpus(args.work, args.megabytes)
    about = describe(corpus)
    tokenizer = args.tokenizer or train(args.work, corpus, args.vocabulary, about["sha256"])
    with tempfile.TemporaryDirectory(dir=args.work, prefix="runs-") as folder:
        names = commands(args, corpus, tokenizer)
        reference = next(iter(names))  # Megatron's default tool, or our HF engine
        runs = {name: [] for name in names}
        for turn in range(args.rounds):
            order = list(names)[turn % len(names) :] + list(names)[: turn % len(names)]
            for name in order:
                say(f"round {turn + 1} of {args.rounds}: {name}")
                prefix = Path(folder) / f"{list(names).index(name)}-{turn}"
                command, environment = names[name]
                written = Path(f"{prefix}_text_document")
                runs[name].append(measure([*command, str(prefix)], environment, args.timeout, written))
                say("   ", one_line(runs[name][-1]))
        first = runs[reference][0]
        compared = {name: [compare(first, run, corpus) for run in of_name] for name, of_name in runs.items()}
    equal = [c["equal"] for name, of_name in compared.items() if name.startswith("boreal") for c in of_name]
    return {
        "command": sys.argv,
        "machine": machine(),
        "versions": versions(args.megatron),
        "corpus": about,
        "tokenizer": describe_tokenizer(tokenizer),
        "reference": reference,
        "runs": {name: {"measured": runs[name], "compared": compared[name]} for name in names},
        "agrees": bool(equal) and all(equal),
    }


def commands(args, corpus, tokenizer):
    """Returns name -> (command without the output prefix, which comes last; environment)."""
    found = {}
    if args.megatron:
        root = args.megatron.resolve()
        environment = {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}
        options = ["--input", str(corpus), "--append-eod"]
        options += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
        for workers in args.workers:
            tool = [sys.executable, str(root / "tools" / "preprocess_data.py"), *options, "--workers", str(workers)]
            found[f"megatron default, {workers} w"] = [*tool, "--output-prefix"], environment
        tool = [sys.executable, str(root / "tools" / "preprocess_data_fast.py"), *options, "--use-gigatoken"]
        found["megatron fast"] = [*tool, "--output-prefix"], environment
    for engine in ("hf", "gigatoken"):
        for workers in args.workers:
            tool = [sys.executable, "-m", "boreal_megatron", "data", "preprocess", str(corpus)]
            tool += ["--tokenizer", str(tokenizer), "--engine", engine, "--workers", str(workers)]
            tool += ["--special-in-text", "split", "--empty", "keep"]
            found[f"boreal {engine}, {workers} w"] = [*tool, "--json", "--out"], {}
    return found


# --- one run ----------------------------------------------------------------------------------------------------------


def measure(command, environment, timeout, prefix):
    """Runs a command in a session of its own and returns what it took; `error` says what went wrong, else None."""
    load = os.getloadavg()[0]
    busy, began = _busy_seconds(), time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        memory = Memory(process.pid)
        # A hanging tool is ended with all of its processes.
        alarm = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        memory.start()
        alarm.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall, busy = time.monotonic() - began, _busy_seconds() - busy
        late = not alarm.is_alive()
        alarm.cancel()
        memory.stop()
        log.seek(0)
        tail = log.read()[-2000:].decode("utf-8", "replace")
    cpu = usage.ru_utime + usage.ru_stime
    run = {
        "wall_s": wall,
        "cpu_s": cpu,  # of the process and all the children it waited for
        "peak_pss_mb": memory.peak / 1e6,
        "largest_rss_mb": usage.ru_maxrss * 1024 / 1e6,
        "load_before": load,
        "others_cores": max(0.0, busy - cpu) / wall,
        "error": None,
    }
    if late:
        run["error"] = f"hung: ended after {timeout:.0f} s"
    elif process.returncode:
        run["error"] = f"exit code {process.returncode}: {tail.strip()[-400:]}"
    else:
        try:
            run |= {"prefix": str(prefix), "tokens": int(IndexedReader(prefix).total_tokens)}
        except BorealError as error:
            run["error"] = str(error)
    return run


class Memory(threading.Thread):
    """Samples the memory of a session: the sum of its processes' proportional shares, so that none counts twice."""

    def __init__(self, session):
        super().__init__(daemon=True)
        self.session, self.peak, self.ended = session, 0, threading.Event()

    def run(self):
        while not self.ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(self._share, os.listdir("/proc"))))

    def _share(self, pid):
        try:
            if not pid.isdigit() or os.getsid(int(pid)) != self.session:
                return 0
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
        except OSError:  # it has ended
            pass
        return 0

    def stop(self):
        self.ended.set()
        self.join()


def _busy_seconds():
    """CPU seconds that the whole machine has worked."""
    line = Path("/proc/stat").read_text().split("\n", 1)[0]
    user, nice, system, _idle, _waiting, interrupts, soft, *_ = map(int, line.split()[1:])
    return (user + nice + system + interrupts + soft) / CLOCK


def compare(reference, run, corpus):
    """Compares what two runs wrote: `equal` byte for byte, else how many documents differ and the first of them."""
    if reference["error"] or run["error"]:
        return {"equal": False, "why": "one of the two failed"}
    both = [Path(reference["prefix"]), Path(run["prefix"])]
    if all(_sha256(path(both[0])) == _sha256(path(both[1])) for path in (bin_path, idx_path)):
        return {"equal": True, "bin_sha256": _sha256(bin_path(both[0])), "idx_sha256": _sha256(idx_path(both[0]))}
    theirs, ours = map(IndexedReader, both)
    if len(theirs) != len(ours):
        return {"equal": False, "why": f"{len(ours):,} documents where there should be {len(theirs):,}"}
    differ = [i for i in range(len(ours)) if not np.array_equal(theirs.document(i), ours.document(i))]
    if not differ:
        return {"equal": False, "why": "the same tokens, indexed otherwise (type, or sequences of empty documents)"}
    with open(corpus, "rb") as file:
        wanted = set(differ[:LISTED])
        texts = [json.loads(line)["text"] for i, line in enumerate(file) if i in wanted]
    return {
        "equal": False,
        "why": f"{len(differ):,} of {len(ours):,} documents differ",
        "first": [{"document": i, "text": ascii(text[:80])} for i, text in zip(differ, texts)],
    }


# --- corpus and tokenizer ---------------------------------------------------------------------------------------------


def build_corpus(work, megabytes):
    """Writes (or finds) `work/corpus-{megabytes}.jsonl`: the kinds of text in equal shares, no document twice."""
    path = work / f"corpus-{megabytes:g}.jsonl"
    if path.exists():
        return path
    say(f"collecting {megabytes:g} MB of this machine's text")
    kinds = {kind: _texts(files) for kind, files in _files().items()}
    written, seen = dict.fromkeys(kinds, 0), set()
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        while kinds and sum(written.values()) < megabytes * 1e6:
            kind = min(kinds, key=written.get)
            text = next(kinds[kind], None)
            if text is None:
                del kinds[kind]
                continue
            # By lines, since licences and generated files come in many copies that differ in a name or a date.
            lines = {zlib.crc32(line.encode()) for line in text.splitlines() if len(line) >= LONG_LINE}
            if not lines or len(lines & seen) > MOST_SEEN * len(lines):
                continue
            seen |= lines
            row = json.dumps({"text": text, "kind": kind}, ensure_ascii=False) + "\n"
            written[kind] += file.write(row)
        file.writelines(json.dumps({"text": text, "kind": "hard"}) + "\n" for text in HARD)
    os.replace(partial, path)
    if sum(written.values()) < 0.9 * megabytes * 1e6:
        say(f"    there are only {sum(written.values()) / 1e6:.0f} MB; the corpus is never filled up by repetition")
    return path


def _files():
    """Returns the files of each kind, in an order as fixed as the alphabet that mixes packages."""
    paths = sysconfig.get_paths()
    packages = [*dict.fromkeys((paths["purelib"], paths["platlib"]))]
    where = {
        "python": ([paths["stdlib"], *packages, "/usr/lib/python3"], (".py",)),
        "c": (["/usr/include", *packages], (".h", ".hpp", ".c", ".cpp", ".cuh")),
        "manual": (["/usr/share/man"], (".gz",)),
        "documentation": (["/usr/share/doc", *packages], (".txt", ".md", ".rst", ".gz", ".html", "README")),
    }
    found = {}
    for kind, (roots, endings) in where.items():
        files = {
            os.path.join(folder, name): None
            for root in roots
            for folder, _, names in os.walk(root)
            for name in names
            if name.endswith(endings)
        }
        found[kind] = sorted(files, key=lambda path: hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest())
    return found


def _texts(paths):
    for path in paths:
        try:
            if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) in FILE_BYTES:
                data = Path(path).read_bytes()
                text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8")
                if "\0" not in text:  # an archive, not a text
                    yield text
        except (OSError, EOFError, zlib.error, UnicodeDecodeError):
            continue


def describe(corpus):
    """Returns what the corpus is made of."""
    digest, sizes, kinds, long_lines, seen = hashlib.sha256(), [], {}, 0, set()
    with open(corpus, "rb") as file:
        for line in file:
            digest.update(line)
            row = json.loads(line)
            size = len(row["text"].encode("utf-8", "surrogatepass"))
            sizes.append(size)
            kinds[row.get("kind", "")] = kinds.get(row.get("kind", ""), 0) + size
            long = [hash(part) for part in row["text"].splitlines() if len(part) >= LONG_LINE]
            long_lines += len(long)
            seen.update(long)
    return {
        "documents": len(sizes),
        "file_bytes": corpus.stat().st_size,
        "text_bytes": sum(sizes),
        "median_document_bytes": int(statistics.median(sizes)),
        "largest_document_bytes": max(sizes),
        "bytes_by_kind": kinds,
        "repeated_long_lines": 1 - len(seen) / max(long_lines, 1),
        "sha256": digest.hexdigest(),
    }


def train(work, corpus, vocabulary, corpus_sha256):
    """Trains (or finds) a byte-level BPE with Qwen's pattern and NFC; returns its folder."""
    folder = work / f"tokenizer-{vocabulary}-{corpus_sha256[:8]}"
    if folder.exists():
        return folder
    say(f"training a tokenizer of {vocabulary:,} entries")
    stride = max(1, -(-corpus.stat().st_size // TRAINED_BYTES))
    with tempfile.TemporaryDirectory(dir=work) as made, open(corpus, "rb") as file:
        train_bpe((json.loads(line)["text"] for i, line in enumerate(file) if i % stride == 0), vocabulary, made)
        path = Path(made) / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["normalizer"] = {"type": "NFC"}
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        shutil.copytree(made, folder)
    return folder


def describe_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {
        "entries": len(content["model"]["vocab"]),
        "normalizer": (content["normalizer"] or {}).get("type"),
        "sha256": _sha256(folder / "tokenizer.json"),
    }


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- report -----------------------------------------------------------------------------------------------------------


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gb": memory / 1e9, "kernel": platform.release()}


def versions(megatron):
    found = {"python": platform.python_version()}
    for name in ("boreal-megatron", "tokenizers", "gigatoken", "orjson", "numpy", "transformers", "torch", "awkward"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if megatron:
        tools = {name: _sha256(megatron / "tools" / name) for name in ("preprocess_data.py", "preprocess_data_fast.py")}
        commit = subprocess.run(["git", "-C", str(megatron), "rev-parse", "HEAD"], capture_output=True, text=True)
        found["megatron"] = {"commit": commit.stdout.strip() or None, "sha256": tools}
    return found


def one_line(run):
    if run["error"]:
        return f"FAILED: {run['error'][:300]}"
    took = f"wall {run['wall_s']:.1f} s, CPU {run['cpu_s']:.1f} s, {run['peak_pss_mb']:.0f} MB"
    return f"{took}, others used {run['others_cores']:.1f} cores"


def report(found, markdown):
    """Returns the table: medians with (lowest to highest), and each tool's CPU time against the reference's."""
    corpus, base = found["corpus"], found["runs"][found["reference"]]["measured"]
    head = ["", "wall s", "CPU s", "MB/core-s", "Mtok/core-s", "peak PSS MB", "per core", "others' cores", "bytes"]
    rows = []
    for name, both in found["runs"].items():
        good = [run for run in both["measured"] if not run["error"]]
        failed = [run["error"] for run in both["measured"] if run["error"]]
        if not good:
            rows.append([name, "failed: " + failed[0].splitlines()[-1][:100], *[""] * (len(head) - 2)])
            continue
        cpu = [run["cpu_s"] for run in good]
        rounds = zip(base, both["measured"])
        times = [b["cpu_s"] / run["cpu_s"] for b, run in rounds if not (b["error"] or run["error"])]
        differs = next((c for c in both["compared"] if not c["equal"]), None)
        rows.append([
            name + (f" ({len(failed)} failed)" if failed else ""),
            _spread([run["wall_s"] for run in good], 1),
            _spread(cpu, 1),
            _spread([corpus["file_bytes"] / 1e6 / c for c in cpu], 2),
            _spread([run["tokens"] / 1e6 / run["cpu_s"] for run in good], 2),
            f"{max(run['peak_pss_mb'] for run in good):.0f}",
            _spread(times, 1) + "x" if times else "",
            _spread([run["others_cores"] for run in good], 1),
            "equal" if differs is None else differs["why"],
        ])  # fmt: skip
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    else:
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    where, tokenizer = found["machine"], found["tokenizer"]
    kinds = ", ".join(f"{kind or 'text'} {size / 1e6:.1f}" for kind, size in corpus["bytes_by_kind"].items())
    first = [
        f"{corpus['file_bytes'] / 1e6:.1f} MB of JSONL, {corpus['documents']:,} documents (MB of text: {kinds}), "
        f"{corpus['repeated_long_lines']:.1%} of the long lines repeated; {tokenizer['entries']:,} entries, "
        f"{tokenizer['normalizer']}; {where['cpu']}, {where['cores']} cores.",
        f"Median (lowest to highest) of {len(base)} rounds. `per core`: the first row's CPU time over the row's. "
        "`peak PSS`: over all processes of a run. `others' cores`: what the rest of the machine used meanwhile. "
        "`bytes`: beside those of the first row.",
        "",
    ]
    for name, both in found["runs"].items():
        for document in next((c.get("first", []) for c in both["compared"] if not c["equal"]), []):
            lines.append(f"{name}: differs in document {document['document']}: {document['text']}")
    return "\n".join(first + lines)


def _spread(values, digits):
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
