"""Collects real text that is already on the machine, so that the first training run needs no download.

Takes Python's standard library, the sources of installed packages, and their documentation and licences, in equal
shares, or the text you name with `--text`. Writes `train.jsonl` and `valid.jsonl`, one `{"text", "source"}` a line.

    python examples/quickstart/collect_text.py --out quickstart-run/text
    python examples/quickstart/collect_text.py --out quickstart-run/text --text my_books/
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections import Counter
from functools import partial
from pathlib import Path

from boreal_megatron.data.inputs import find_inputs
from boreal_megatron.data.tokenize import iter_texts
from boreal_megatron.errors import BorealError

TARGET_BYTES = 24_000_000
LEAST_BYTES = 15_000_000  # less than this of the machine's own text makes a poor demonstration
LEAST_OWN_BYTES = 300_000  # less than this of a user's text leaves too little to hold out
FILE_BYTES = range(200, 32_001)  # many documents rather than few long ones
MOST_DIGITS = 0.02  # of the characters: beyond it are tables, from which a small model learns to write digits
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
HELD_OUT = 50  # one document in so many
PIECE_CHARACTERS = 4_000
DOC_ENDINGS = (".md", ".rst", ".txt")
DOC_NAMES = ("license", "licence", "copying", "notice", "metadata", "readme", "authors", "copyright")
NOT_PROSE = ("changelog", "changes", "news", "relnotes", "release")  # version numbers and hashes, line by line


def collect(out_dir, text=None, target_bytes=TARGET_BYTES):
    """Writes `out_dir/train.jsonl` and `out_dir/valid.jsonl`; the same files on disk give the same output.

    Args:
        out_dir: folder, made if missing.
        text: a user's own `.jsonl` or plain text file, or a folder of such; taken whole.
        target_bytes: where to stop when collecting the machine's own text.

    Returns:
        Counts: documents and bytes of each part, and bytes by kind.

    Raises:
        BorealError: too little text, or text that cannot be read.
    """
    if text:
        documents = partial(_own_documents, text)
    else:
        documents = partial(_machine_documents, _machine_files(), target_bytes)
    # First pass: what there is, and which documents are held out. Those with the smallest hashes are: a choice that
    # depends on their content alone, and never comes out empty.
    sizes, by_kind = {}, Counter()
    for content, source in documents():
        digest = _digest(content)
        if digest not in sizes:
            sizes[digest] = len(content.encode("utf-8"))
            by_kind[source.split("/")[0]] += sizes[digest]
    total = sum(sizes.values())
    least = LEAST_OWN_BYTES if text else min(LEAST_BYTES, target_bytes)
    if total < least:
        where = str(text) if text else "this machine"
        raise BorealError(
            f"{where}: {total / 1e6:.2f} MB of text. Expected: at least {least / 1e6:.1f} MB. "
            + ("Give more text." if text else "Name text of your own with --text FILE_OR_FOLDER.")
        )
    if len(sizes) < 2:
        raise BorealError(f"{text}: one document. Expected: at least 2, so that one can be held out. Give more text.")
    held_out = set(sorted(sizes)[: max(1, len(sizes) // HELD_OUT)])
    report = {"out": str(out_dir), "kinds": {} if text else dict(sorted(by_kind.items()))}
    for name, part in _write(Path(out_dir), documents(), held_out).items():
        report[name] = part
    return report


def _write(out_dir, documents, held_out):
    """Second pass: writes both files under other names first, so that no half of them is ever taken for whole."""
    parts = {"train": {"documents": 0, "bytes": 0}, "valid": {"documents": 0, "bytes": 0}}
    unfinished = {name: out_dir / f"{name}.jsonl.partial" for name in parts}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with (
            open(unfinished["train"], "w", encoding="utf-8") as train,
            open(unfinished["valid"], "w", encoding="utf-8") as valid,
        ):
            seen = set()
            for content, source in documents:
                digest = _digest(content)
                if digest in seen:
                    continue
                seen.add(digest)
                name, file = ("valid", valid) if digest in held_out else ("train", train)
                file.write(json.dumps({"text": content, "source": source}, ensure_ascii=False) + "\n")
                parts[name]["documents"] += 1
                parts[name]["bytes"] += len(content.encode("utf-8"))
        for name, path in unfinished.items():
            os.replace(path, out_dir / f"{name}.jsonl")
    except OSError as error:
        raise BorealError(
            f"{out_dir}: cannot be written: {error.strerror or error}. Check the folder and the space on its disk."
        ) from error
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    return parts


def _digest(content):
    return hashlib.sha256(content.encode("utf-8")).digest()


# --- the machine's own text -------------------------------------------------------------------------------------------


def _machine_documents(files, target_bytes):
    """Yields (text, source), the kind with the fewest bytes so far giving the next document, up to the target."""
    kinds = {kind: _readable(of_kind) for kind, of_kind in files.items()}
    taken = dict.fromkeys(kinds, 0)
    seen = set()
    while kinds and sum(taken.values()) < target_bytes:
        kind = min(kinds, key=taken.get)
        content, source = next(kinds[kind], (None, None))
        if content is None:
            del kinds[kind]
        elif (digest := _digest(content)) not in seen:
            seen.add(digest)
            taken[kind] += len(content.encode("utf-8"))
            yield content, f"{kind}/{source}"


def _machine_files():
    """Returns the files of each kind as (path, name relative to where the kind lives)."""
    paths = sysconfig.get_paths()
    kinds = {"stdlib": [], "packages": [], "docs": []}
    for root in dict.fromkeys((paths["purelib"], paths["platlib"])):
        for path, name in _walk(root):
            file_name = os.path.basename(name).lower()
            if file_name.endswith(".py"):
                kinds["packages"].append((path, name))
            elif _is_documentation(name):
                kinds["docs"].append((path, name))
    kinds["stdlib"] = [file for file in _walk(paths["stdlib"], skip=PACKAGE_FOLDERS) if file[0].endswith(".py")]
    kinds["docs"] += [file for file in _walk("/usr/share/doc") if _is_documentation(file[1])]
    # Sorted by a hash of the name: as fixed as the alphabet, without taking only the packages that begin with "a".
    return {kind: sorted(files, key=lambda file: _digest(file[1])) for kind, files in kinds.items()}


def _is_documentation(name):
    """Whether a file's name says prose: by its ending or its beginning, and not a list of changes."""
    name = name.lower()
    file_name = os.path.basename(name)
    prose = file_name.endswith(DOC_ENDINGS) or file_name.startswith(DOC_NAMES)
    return prose and not any(word in name for word in NOT_PROSE)


def _walk(root, skip=()):
    """Yields (path, name relative to root) of every file; paths are strings, of which there are many."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__" and name not in skip]
        for name in names:
            path = os.path.join(folder, name)
            yield path, path[len(root) + 1 :]


def _readable(files):
    """Yields (text, name) of the files of a fitting size that are UTF-8 and no tables of numbers."""
    for path, name in files:
        try:
            if os.path.isfile(path) and os.path.getsize(path) in FILE_BYTES:
                content = Path(path).read_bytes().decode("utf-8")
                if sum(map(str.isdigit, content)) <= MOST_DIGITS * len(content):
                    yield content, name
        except (OSError, UnicodeDecodeError):
            continue


# --- a user's own text ------------------------------------------------------------------------------------------------


def _own_documents(text):
    """Yields (text, source) of a user's file or folder; long plain text in pieces, so that some can be held out."""
    root = Path(text)
    for file in find_inputs([text], ["text"]):
        name = root.name if root.is_file() else Path(file.path).relative_to(root).as_posix()
        for content in iter_texts([file.path]):
            for piece in split(content) if file.kind == "text" else [content]:
                yield piece, name


def split(content):
    """Yields a text in pieces that end at a blank line after PIECE_CHARACTERS, else at a line end, else at a space."""
    start = 0
    while len(content) - start > 2 * PIECE_CHARACTERS:
        least, most = start + PIECE_CHARACTERS, start + 4 * PIECE_CHARACTERS
        for mark in ("\n\n", "\n", " "):
            at = content.find(mark, least, most)
            if at >= 0:
                break
        end = at + len(mark) if at >= 0 else most
        yield content[start:end]
        start = end
    if start < len(content):
        yield content[start:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument("--text", help="your own .jsonl or text file, or a folder of such")
    parser.add_argument("--target-bytes", type=int, default=TARGET_BYTES, help="default: %(default)s")
    args = parser.parse_args()
    try:
        report = collect(args.out, args.text, args.target_bytes)
    except BorealError as error:
        sys.exit(f"error: {error}")
    for name in ("train", "valid"):
        part = report[name]
        print(f"{args.out}/{name}.jsonl: {part['documents']:,} documents, {part['bytes'] / 1e6:.1f} MB")
    for kind, size in report["kinds"].items():
        print(f"  {kind}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
