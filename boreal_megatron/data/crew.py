"""Worker processes that take pieces of work and answer in order; none hangs, and none outlives the parent."""

import contextlib
import multiprocessing
import signal
import traceback
from multiprocessing.connection import wait
from typing import NamedTuple

from boreal_megatron.errors import BorealError


class Note(NamedTuple):
    """What a worker says on the way to its answer."""

    content: object


def in_order(work, job, workers, hear=lambda content: None, arrived=lambda answer: None):
    """Yields the answer to every piece of work, in order, from `workers` processes.

    At most a few pieces for each worker are under way or waiting their turn. A worker that raises or dies is an error
    at once, with the piece it had. With one worker the work is done in this process.

    Args:
        work: iterable; a piece's str() names it in errors.
        job: picklable; `job.start(say)` returns a function from a piece to its answer, `say` sends a Note's content.
        workers: processes.
        hear: called with the content of each Note.
        arrived: called with each answer as it comes, in any order.
    """
    if workers == 1:
        run = job.start(hear)
        for piece in work:
            answer = run(piece)
            arrived(answer)
            yield answer
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads can deadlock
    crew = {}  # our end of the pipe -> process
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            crew[ours] = context.Process(target=_worker, args=(theirs, job), daemon=True)
            crew[ours].start()
            theirs.close()  # so that the pipe ends when the worker does
        numbered = enumerate(work)
        idle, busy, done = list(crew), {}, {}  # busy: pipe -> (number, piece); done: number -> answer
        given = taken = 0
        while True:
            while idle and given < taken + 4 * workers and (item := next(numbered, None)):
                given += 1
                busy[idle[-1]] = item
                with _named_death(crew[idle[-1]], item[1]):
                    idle[-1].send(item[1])
                idle.pop()
            if taken in done:
                yield done.pop(taken)
                taken += 1
                continue
            if not busy:
                return
            for pipe in wait(list(busy)):
                number, piece = busy[pipe]
                with _named_death(crew[pipe], piece):
                    answer = pipe.recv()
                if isinstance(answer, Note):
                    hear(answer.content)
                    continue
                if isinstance(answer, BorealError):
                    raise answer
                if isinstance(answer, str):
                    raise RuntimeError(f"{piece}:\n{answer}")
                arrived(answer)
                done[number] = answer
                del busy[pipe]
                idle.append(pipe)
    finally:
        for process in crew.values():
            process.kill()
        for pipe, process in crew.items():
            process.join()
            pipe.close()


def _worker(pipe, job):
    """Answers each piece that arrives, or sends the error; ends with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone cleans up
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, ConnectionError):
        run = None
        while True:
            piece = pipe.recv()
            try:
                run = run or job.start(lambda content: pipe.send(Note(content)))
                answer = run(piece)
            except BorealError as error:
                answer = error
            except ConnectionError:
                raise
            except Exception:
                answer = traceback.format_exc()
            pipe.send(answer)


@contextlib.contextmanager
def _named_death(process, piece):
    try:
        yield
    except (EOFError, ConnectionError):
        process.join(5)
        code = process.exitcode
        raise BorealError(
            f"{piece}: a worker process ended with exit code {code} before it answered. Expected: an answer. "
            + (
                "It was killed, most often for lack of memory: run again with fewer --workers."
                if code == -signal.SIGKILL
                else "Its own message is above; in a script of your own, call the function under "
                'if __name__ == "__main__", or run again with --workers 1.'
            )
        ) from None
