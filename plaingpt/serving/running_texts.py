"""
The texts of one HTTP request while the engine writes them: their pieces, from the engine's thread
to the server's loop.
"""
import asyncio
import functools

from plaingpt.inference.requests import Closed, QueueFull
from plaingpt.serving.api_errors import ApiError, internal, queue_full, shutting_down, timed_out

# A client that reads more slowly than the engine writes lets pieces pile up. So many of each text,
# a few megabytes at most, are kept for it.
MOST_WAITING = 4096


class RunningTexts:
    """Submits all WantedTexts of a request to the engine, and receives their pieces.

    ApiError if the engine takes no more; then none of them runs."""

    def __init__(self, engine, wanted, mailbox):
        """mailbox: a Mailbox of the loop that is running."""
        self.engine = engine
        self.mailbox = mailbox
        self.pieces = asyncio.Queue()
        self.unfinished = len(wanted)
        self.tickets = []
        self.is_over = False
        self.failure = None       # an ApiError that ends all texts
        self.has_tokens = [False] * len(wanted)
        try:
            for number, text in enumerate(wanted):
                deliver = functools.partial(self._deliver, number)
                self.tickets.append(engine.submit(text.request, deliver))
        except QueueFull as error:
            self.cancel()
            raise queue_full(str(error)) from None
        except Closed:
            self.cancel()
            raise shutting_down() if engine.is_healthy else internal() from None

    def _deliver(self, number, piece):
        """Takes a piece, in the thread of the engine."""
        if not self.is_over:  # else nobody listens, and the loop may have ended
            self.mailbox.put(self._put, number, piece)

    def _put(self, number, piece):
        if self.is_over:
            return
        if self.pieces.qsize() >= MOST_WAITING * len(self.has_tokens):
            self.cancel()
            self.failure = ApiError(408, 'The client reads too slowly.', code='slow_client')
            return
        self.pieces.put_nowait((number, piece))

    async def next_piece(self, patience):
        """(number of the text, Piece), or None if there is none for `patience` seconds.

        ApiError if the text has failed. To be called while self.unfinished is above 0."""
        if self.failure is not None:
            raise self.failure
        if self.pieces.empty():
            try:
                async with asyncio.timeout(patience):
                    number, piece = await self.pieces.get()
            except TimeoutError:
                return None
        else:
            number, piece = self.pieces.get_nowait()
        if piece.new_tokens > 0:
            self.has_tokens[number] = True
        if piece.finish_reason is not None:
            self.unfinished -= 1
        self._raise_failure(number, piece)
        return number, piece

    def _raise_failure(self, number, piece):
        if piece.finish_reason == 'error':
            raise internal()
        if piece.finish_reason == 'cancelled':  # not by this client, so the server ends
            raise shutting_down()
        if piece.finish_reason == 'timeout' and not self.has_tokens[number]:
            raise timed_out()

    def cancel(self):
        """Ends all texts that are not finished, and frees what they use."""
        self.is_over = True
        for ticket in self.tickets:
            self.engine.cancel(ticket)


class HungUp(Exception):
    """The client has closed its connection."""


async def while_connected(receive, work):
    """What the coroutine `work` returns. HungUp if the client hangs up before; then work ends.

    receive: of ASGI, after the whole body has been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hang_up(receive):
    """Returns once the client has hung up."""
    message = await receive()
    while message['type'] != 'http.disconnect':
        message = await receive()
