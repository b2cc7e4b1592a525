"""
A pool of worker processes that treat the chunks of a corpus on all cores, in bounded memory.
"""
import collections
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from plaingpt.system.messages import UserError

CHUNKS_PER_PROCESS = 3  # waiting or running: enough to keep all busy, few enough for memory


class WorkerPool:
    """num_proc worker processes, to be used in a with statement.

    shared: what each call gets as its first argument. It is sent once to each worker, which may
    keep in it what is slow to build."""

    def __init__(self, num_proc, shared):
        # 'spawn', because the threads of torch and Arrow do not survive a fork.
        context = multiprocessing.get_context('spawn')
        self.num_proc = num_proc
        self.executor = ProcessPoolExecutor(num_proc, context, _start_worker, (shared,))
        # Workers inherit that Ctrl-C is ignored, from their first moment on. The parent handles it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.executor.submit(os.getpid)  # which starts them
        finally:
            signal.signal(signal.SIGINT, handler)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.executor.shutdown(cancel_futures=True)

    def map(self, function, chunks):
        """Yields (chunk, function(shared, chunk)) for each chunk, in their order.

        function: one of a module, so that a worker can import it. What it raises is raised here.
        UserError if a worker dies."""
        waiting = collections.deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, self.executor.submit(_call, function, chunk)))
                if len(waiting) == CHUNKS_PER_PROCESS * self.num_proc:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError('a worker process died, usually because memory ran out: run the same '
                            'command with a smaller --num_proc') from None
        finally:
            for _, future in waiting:
                future.cancel()


# ---- in a worker ----

_shared = None


def _start_worker(shared):
    global _shared
    # All cores have a worker already.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared = shared


def _end_with_parent():
    """Ends this process when its parent is killed, which the queue between them can't tell."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function, chunk):
    try:
        return function(_shared, chunk)
    except MemoryError:
        raise UserError('memory ran out in a worker process: run the same command with a smaller '
                        '--num_proc, or leave out long documents with --max_chars') from None
