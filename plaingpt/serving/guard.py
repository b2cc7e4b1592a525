"""
The guard at the door of the server: who may ask, and what happens to what nobody expected.

A web page that somebody has open can send requests to servers on the same machine. It can't read
the answers, for there are no CORS headers, but it could keep the model busy. So a request that
names another host than the server's own, or comes from a page of another origin, is refused.
"""
import hmac
import ipaddress
import logging
import time

from starlette.datastructures import Headers

from plaingpt.serving.api_errors import ApiError, internal, overloaded
from plaingpt.serving.responses import error_response

OPEN_PATHS = ('/', '/health')  # these need no key, and are answered at any time
SPARE_REQUESTS = 128  # beside those whose texts run or wait: bodies on their way, figures
BEARER = b'bearer '
HUNG_UP = 499  # nginx's status, in the figures alone, for a client that left before an answer

log = logging.getLogger('plaingpt.serving')


def is_loopback(host):
    """Whether an address or name, without a port, is this machine as it calls itself."""
    if host.rstrip('.').lower() == 'localhost':
        return True
    try:
        return ipaddress.ip_address(host.strip('[]')).is_loopback
    except ValueError:
        return False


class Guard:
    """The ASGI application around another one, which lets in only who may ask.

    Of each request it notes path, status and time in ServerFigures. A bug in the application is
    logged with its traceback, and the client gets a 500."""

    def __init__(self, app, settings, figures, known_paths):
        """known_paths: those that get figures of their own."""
        self.app = app
        self.settings = settings
        self.figures = figures
        self.known_paths = known_paths
        self.active = 0  # requests without the end of an answer

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        status = None  # of the answer; None: none was sent

        async def send_and_note(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
            await send(message)

        self.active += 1
        try:
            self._check(scope)
            await self.app(scope, receive, send_and_note)
        except ApiError as error:  # of _check(); the application answers its own
            await error_response(error)(scope, receive, send_and_note)
        except Exception:  # any bug: one request fails, and the log has the traceback
            # %r, since a path may have line breaks, which would look like another entry.
            log.exception('a request has failed: %r', scope['path'])
            if status is None:
                await error_response(internal())(scope, receive, send_and_note)
        finally:
            self.active -= 1
            path = scope['path'] if scope['path'] in self.known_paths else 'other'
            self.figures.requests.labels(path, str(status or HUNG_UP)).inc()
            self.figures.request_seconds.labels(path).observe(time.monotonic() - began)

    def _check(self, scope):
        """ApiError if this request may not come in."""
        headers = Headers(scope=scope)
        host = headers.get('host', '').lower()
        if is_loopback(self.settings.host) and not is_loopback(_without_port(host)):
            raise ApiError(403, 'This server answers only to localhost: use that name.')
        for origin in headers.getlist('origin'):
            if origin.lower().partition('://')[2] != host:
                raise ApiError(403, 'This server answers no pages of other origins.')
        if scope['path'] in OPEN_PATHS:
            return
        if self.settings.api_key:
            self._check_key(scope)
        if self.active > self.settings.most_texts + SPARE_REQUESTS:
            raise overloaded()

    def _check_key(self, scope):
        key = self.settings.api_key.encode('utf-8')
        for name, value in scope['headers']:
            is_bearer = name == b'authorization' and value[:len(BEARER)].lower() == BEARER
            # compare_digest() takes the same time wherever the first difference is.
            if is_bearer and hmac.compare_digest(value[len(BEARER):].strip(), key):
                return
        raise ApiError(401, 'The API key is missing or wrong: send it as "Authorization: Bearer '
                            'KEY".', code='invalid_api_key',
                       headers={'WWW-Authenticate': 'Bearer'})


def _without_port(host):
    """The name in a Host header: localhost of localhost:8000, [::1] of [::1]:8000."""
    name, _, port = host.rpartition(':')
    has_port = name and port.isdecimal() and not name.endswith(':')
    return name if has_port else host
