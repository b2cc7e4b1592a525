"""
The way from the engine's thread to the server's loop.
"""
import collections


class Mailbox:
    """Calls functions in the thread of a loop, for other threads, in the order in which they come.

    To wake the loop takes a system call, and then both threads want the interpreter. So the loop is
    woken once for all calls that wait by then."""

    def __init__(self, loop):
        self.loop = loop
        self.waiting = collections.deque()
        self.will_be_emptied = False

    def put(self, function, *arguments):
        """Lets the loop call a function, which must not raise; from any thread."""
        self.waiting.append((function, arguments))
        if not self.will_be_emptied:
            self.will_be_emptied = True
            self.loop.call_soon_threadsafe(self._empty)

    def _empty(self):
        self.will_be_emptied = False  # before, so that a call that comes now is not forgotten
        while self.waiting:
            function, arguments = self.waiting.popleft()
            function(*arguments)
