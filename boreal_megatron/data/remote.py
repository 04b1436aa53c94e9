"""Data sets behind a URL: whole small objects, and byte ranges of a large one, through fsspec.

`s3://`, `gs://`, `https://`, `memory://`, `file://`: whatever fsspec knows or a package teaches it. It is imported when
a URL is met and not before. An object is never written here.

What may pass is tried again, ATTEMPTS times in all with PAUSES seconds in between, so that a read fails after a bound;
how long one attempt may take is the file system's own setting. What will not pass by itself (no such object, no right
to read it, no package for the scheme) fails at once.
"""

import re
import time
from pathlib import Path

from boreal_megatron.errors import BorealError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PAUSES = (0.5, 1.0, 2.0)
ATTEMPTS = len(PAUSES) + 1
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError)


def read_if_there(name):
    """Bytes of a small file at a local path or URL, or None where there is none."""
    if is_url(name):
        there = Object(name)
        return there.read() if there.exists() else None
    path = Path(name)
    return path.read_bytes() if path.exists() else None


def is_url(prefix):
    """Whether a prefix names object storage, not a local path."""
    return SCHEME.match(str(prefix)) is not None


class Object:
    """One object: its size, and its bytes.

    Args:
        url: with its scheme.

    Raises:
        BorealError: nothing installed knows the scheme. All methods: no such object, no right, no luck in ATTEMPTS
        attempts, or other bytes than were asked for.
    """

    def __init__(self, url):
        import fsspec

        self.url = url
        try:
            self._storage, self._path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            missing = getattr(error.__cause__ or error, "name", None)
            how = f"pip install {missing}" if missing else "install it"
            raise BorealError(f"{url}: {error}. Expected: a package for {SCHEME.match(url)[0]} URLs: {how}") from None
        except ValueError as error:
            raise BorealError(f"{url}: {error}. Expected: a scheme that fsspec knows, as s3:// or https://") from None

    def size(self):
        """Bytes of the object."""
        size = self._attempt("its size", lambda: self._storage.size(self._path))
        if size is None:
            raise BorealError(f"{self.url}: the server does not say its size. Expected: one that answers by ranges.")
        return size

    def read(self, start=None, stop=None):
        """Returns bytes [start, stop), or all of them."""
        if start is None:
            return self._attempt("all of it", lambda: self._storage.cat_file(self._path))

        def ranged():
            found = self._storage.cat_file(self._path, start=start, end=stop)
            if len(found) != stop - start:
                raise EOFError(f"{len(found):,} bytes came back")
            return found

        return self._attempt(f"{stop - start:,} bytes from {start:,} on", ranged) if stop > start else b""

    def exists(self):
        """Whether there is such an object."""
        return self._attempt("whether it exists", lambda: self._storage.exists(self._path))

    def _attempt(self, what, read):
        for pause in (*PAUSES, None):
            try:
                return read()
            except FileNotFoundError:
                raise BorealError(f"{self.url}: no such object. Expected: a .bin and an .idx of one prefix.") from None
            except LASTING as error:
                raise BorealError(f"{self.url}: not readable: {_say(error)}. Check the URL and the rights.") from error
            except Exception as error:  # each storage has failures of its own, and not all are OSError
                if pause is None:
                    raise BorealError(
                        f"{self.url}: asked for {what}, {ATTEMPTS} times in vain: {_say(error)}. Check that the "
                        "storage answers and that the object is whole, and run again."
                    ) from error
                time.sleep(pause)


def _say(error):
    return f"{type(error).__name__}: {error}".removesuffix(": ")
