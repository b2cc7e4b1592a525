"""
An engine without a model, for tests of the server: it delivers the pieces of a script.
"""
import itertools
import threading
import time

from plaingpt.inference.requests import Closed, EngineStats, Piece, QueueFull, Ticket


class ScriptedEngine:
    """Delivers script(request), an iterable of Pieces, for each request in a thread of its own.

    A number among the pieces is a pause of so many seconds. room: the most requests at a time."""

    def __init__(self, script=None, context_size=64, room=80):
        self.script = script or write_hello
        self.context_size = context_size
        self.room = room
        self.is_healthy = True
        self.is_closed = False
        self.requests = []     # all that came
        self.running = set()   # the ids of tickets that have not ended
        self.tickets = {}
        self.numbers = itertools.count()
        self.lock = threading.Lock()

    def submit(self, request, deliver):
        with self.lock:
            if self.is_closed or not self.is_healthy:
                raise Closed('the engine takes no more requests')
            if len(self.running) >= self.room:
                raise QueueFull(f'{self.room} requests wait already')
            ticket = Ticket(request, deliver, time.monotonic())
            number = next(self.numbers)
            self.requests.append(request)
            self.running.add(number)
            self.tickets[number] = ticket
        threading.Thread(target=self._write, args=(number, ticket), daemon=True).start()
        return ticket

    def _write(self, number, ticket):
        try:
            for step in self.script(ticket.request):
                if isinstance(step, Piece):
                    if ticket.is_cancelled:
                        step = Piece(finish_reason='cancelled')
                    ticket.deliver(step)
                    if step.finish_reason is not None:
                        return
                else:
                    self._pause(step, ticket)
        finally:
            with self.lock:
                self.running.discard(number)
                del self.tickets[number]

    def _pause(self, seconds, ticket):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not ticket.is_cancelled:
            time.sleep(0.002)

    def cancel(self, ticket):
        ticket.is_cancelled = True

    def stats(self):
        return EngineStats(active=len(self.running), waiting=0, prompt_tokens=7, cached_tokens=3,
                           new_tokens=5, steps=2, cache_positions=11, cache_room=99)

    def drain(self, seconds):
        with self.lock:
            self.is_closed = True
        wait_until(lambda: not self.running, seconds, must=False)
        with self.lock:
            tickets = list(self.tickets.values())
        for ticket in tickets:
            ticket.is_cancelled = True
        wait_until(lambda: not self.running, 5)


def write_hello(request):
    """'Hello', ' wor', 'ld' and the end."""
    yield Piece('Hello', 1, cached_tokens=2)
    yield Piece(' wor', 1)
    yield Piece('ld', 1, finish_reason='stop')


def pieces(count, seconds=0.0, text='ab'):
    """A script that writes a text so many times, with a pause before each."""
    def script(request):
        for _ in range(count):
            if seconds:
                yield seconds
            yield Piece(text, 1)
        yield Piece(finish_reason='length')

    return script


def wait_until(holds, seconds=10, must=True):
    """Waits until holds() is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            assert not must, 'it has not come to hold in time'
            return
        time.sleep(0.01)
