"""
What goes back to a client: JSON, errors, and streams of server-sent events.
"""
import json
import logging

from starlette.responses import JSONResponse, Response

from plaingpt.serving.api_errors import ApiError, internal
from plaingpt.serving.running_texts import HungUp, while_connected

KEEP_ALIVE = b': the text goes on\n\n'  # a comment, which clients skip
END_OF_STREAM = b'data: [DONE]\n\n'

log = logging.getLogger('plaingpt.serving')


def json_bytes(content):
    """JSON in UTF-8. Half a surrogate pair, which a model of characters may write, stays an
    escape."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(',', ':'))
    return text.encode('utf-8', errors='backslashreplace')


class JsonResponse(JSONResponse):
    """A response with JSON that no cache keeps."""

    def __init__(self, content, status=200, headers=None):
        super().__init__(content, status, {'Cache-Control': 'no-store', **(headers or {})})

    def render(self, content):
        return json_bytes(content)


def error_response(error):
    """The JsonResponse for an ApiError."""
    return JsonResponse(error.content(), error.status, error.headers)


def event(content):
    """A server-sent event with JSON."""
    return b'data: ' + json_bytes(content) + b'\n\n'


class EventStream(Response):
    """A response that sends events as they come.

    events: an async generator of bytes. An ApiError in it becomes the last event, because the
    status has been sent by then. on_end() is called in the end; on_hang_up() before it if the
    client has hung up."""

    def __init__(self, events, on_end, on_hang_up):
        super().__init__(media_type='text/event-stream', headers={
            'Cache-Control': 'no-store', 'X-Accel-Buffering': 'no'})  # nginx must not hold it back
        del self.headers['content-length']
        self.events = events
        self.on_end = on_end
        self.on_hang_up = on_hang_up

    async def __call__(self, scope, receive, send):
        try:
            await while_connected(receive, self._send_all(send))
        except HungUp:
            self.on_hang_up()
        finally:
            self.on_end()

    async def _send_all(self, send):
        await send({'type': 'http.response.start', 'status': 200, 'headers': self.raw_headers})
        try:
            async for content in self.events:
                await send({'type': 'http.response.body', 'body': content, 'more_body': True})
            last = END_OF_STREAM
        except ApiError as error:
            last = event(error.content())
        except Exception:  # any bug: the client must learn that its text is not whole
            log.exception('a stream has failed')
            last = event(internal().content())
        await send({'type': 'http.response.body', 'body': last, 'more_body': False})
