"""Workers for tests: a pool that works in this process, and the way to another one."""
import multiprocessing
import threading


class Here:
    """Does in this process what a WorkerPool does in others."""

    def __init__(self, num_proc, shared):
        self.shared = shared

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, chunks):
        for chunk in chunks:
            yield chunk, function(self.shared, chunk)


def sent(value):
    """A value as another process receives it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # A large value fills the pipe, so it is sent while this thread receives.
    thread = threading.Thread(target=sender.send, args=(value,))
    thread.start()
    received = receiver.recv()
    thread.join()
    return received
