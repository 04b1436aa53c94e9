"""Files that survive a power cut: flushed to the disk, and either the old or the new one whatever happens."""

import os


def flush(path):
    """Makes a file, or a folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path, text):
    """A small file that is either the old or the new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)
