"""Work that will be asked for next, done by threads before it is asked for.

A request is one training step: a plan, then that many reads, each a micro-batch. It is a value that says all there is
to say about its result, so what was done ahead is used only for an equal request; for any other (another ledger after
a resume, a rehearsal) it is thrown away and the work is done anew. The result is the same with and without threads.

One request is held ahead at most, beside the one that is being used. Threads do what waits: memory maps, networks,
NumPy; they never touch a device.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple


class Work(NamedTuple):
    """What a request stands for.

    Attributes:
        plan: no arguments; its result goes to every read.
        read: (plan's result, number) -> one micro-batch.
        reads: how many of them.
    """

    plan: Callable
    read: Callable
    reads: int


class _Started(NamedTuple):
    request: object
    plan: Future
    reads: list[Future]


class Prefetcher:
    """Does one request ahead.

    Args:
        work: request -> Work.
        workers: threads; 0 does everything when it is asked for, in the asking thread.
    """

    def __init__(self, work, workers):
        self._work = work
        self._pool = ThreadPoolExecutor(workers, "boreal-data") if workers else None
        self._ahead = None  # what was started for the next request

    def take(self, request):
        """The result of a request: the plan, and an iterator over what its reads return, in order.

        Raises:
            whatever the plan raised; the iterator, whatever the read that it has come to raised.
        """
        if self._pool is None:
            plan, read, reads = self._work(request)
            planned = plan()
            return planned, (read(planned, number) for number in range(reads))
        self.ahead(request)
        started, self._ahead = self._ahead, None
        return started.plan.result(), (read.result() for read in started.reads)

    def ahead(self, request):
        """Starts a request that will probably be the next; returns at once."""
        if self._pool is None or (self._ahead is not None and self._ahead.request == request):
            return
        self._forget()
        plan, read, reads = self._work(request)
        # Threads take work in this order: whoever waits for the plan waits for a thread that is at it.
        planned = self._pool.submit(plan)
        pending = [self._pool.submit(lambda number=number: read(planned.result(), number)) for number in range(reads)]
        self._ahead = _Started(request, planned, pending)

    def close(self):
        """Gives up what is pending and waits for the threads: for the reads that they are at, and for nothing else."""
        self._ahead = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _forget(self):
        if self._ahead is not None:
            for pending in (*self._ahead.reads, self._ahead.plan):
                pending.cancel()
        self._ahead = None
