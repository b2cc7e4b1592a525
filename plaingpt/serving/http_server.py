"""
The HTTP server that runs the application: its socket, its connections, and its end.
"""
import asyncio
import contextlib
import os
import signal
import socket
import threading

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from plaingpt.system.messages import UserError

HEAD_SECONDS = 30     # for a request's head to arrive
STALLED_SECONDS = 30  # in which a client must read some of an answer
LAST_SECONDS = 5      # for the ends of answers to arrive, once all texts have ended
MOST_EARLY = 65536    # bytes of further requests that may come before an answer has ended
MOST_CONNECTIONS = 900  # fewer than the 1,024 open files that a process usually may have


def bind(host, port):
    """A socket with this address, which doesn't listen yet. UserError if it is taken or invalid."""
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    if os.name == 'posix':  # else the port stays taken for a minute after a server has ended
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        raise UserError(f'host={host}, port={port}: {reason}; choose another with --port, or '
                        '--port=0 for any free one') from None
    return bound


class Connection(H11Protocol):
    """uvicorn's connection, which a client can't hold for long without sending or reading."""

    def connection_made(self, transport):
        self._head_timer = None
        self._stall_timer = None
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data):
        super().data_received(data)
        self._watch_head()
        self._keep_reading()

    def _watch_head(self):
        """Starts the time in which a request's head must arrive, or stops it."""
        waits_for_head = self.cycle is None or self.cycle.response_complete
        if not waits_for_head:
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _keep_reading(self):
        """Reads on when a further request comes before the answer to the last has ended.

        uvicorn stops reading then, and would not notice that the client hangs up. The further
        request waits in the buffer of h11."""
        if self.conn.their_state is not h11.DONE:
            return
        early, _ = self.conn.trailing_data
        if len(early) > MOST_EARLY:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def pause_writing(self):
        """The client leaves so much unread that the transport takes no more."""
        super().pause_writing()
        self._watch_reader()

    def _watch_reader(self):
        """Gives the client STALLED_SECONDS to read some of what it has left."""
        unread = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALLED_SECONDS, self._check_reader, unread)

    def _check_reader(self, unread_before):
        if self.transport.get_write_buffer_size() < unread_before:
            self._watch_reader()
        else:
            self.transport.abort()

    def resume_writing(self):
        super().resume_writing()
        self._stall_timer = _cancelled(self._stall_timer)

    def connection_lost(self, exc):
        self._head_timer = _cancelled(self._head_timer)
        self._stall_timer = _cancelled(self._stall_timer)
        super().connection_lost(exc)


def _cancelled(timer):
    """Cancels a timer, if there is one. Returns None, which stands for no timer."""
    if timer is not None:
        timer.cancel()
    return None


class Server(uvicorn.Server):
    """Runs an application of create_app() until SIGTERM or Ctrl-C.

    After the first signal, the texts that run or wait are written to their end, for drain_seconds
    at most, while new requests get a 503. The second ends the process at once."""

    def __init__(self, app, engine, drain_seconds):
        super().__init__(uvicorn.Config(
            app, http=Connection, ws='none', loop='asyncio', lifespan='off', access_log=False,
            log_config=None, server_header=False, proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=LAST_SECONDS + 5))
        self.app = app
        self.engine = engine
        self.drain_seconds = drain_seconds

    @contextlib.contextmanager
    def capture_signals(self):
        """Handles signals as long as the server runs, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, number, frame):
        """Takes a signal; uvicorn looks at should_exit ten times a second."""
        if self.should_exit:
            os._exit(128 + number)
        self.should_exit = True

    async def shutdown(self, sockets=None):
        """Ends the server once all texts have ended.

        Until then it still listens: a client or a load balancer learns by a 503 what happens."""
        self.app.api.is_draining = True
        await asyncio.to_thread(self.engine.drain, self.drain_seconds)
        asyncio.get_running_loop().call_later(LAST_SECONDS, self._abort_connections)
        await super().shutdown(sockets)

    def _abort_connections(self):
        """Ends what is left, whose clients don't read; uvicorn would log a traceback for each."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
