"""
The server as an ASGI application: its addresses, and the way of a request from body to answer.
"""
import asyncio
import base64
import functools
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from plaingpt.serving.answers import Answer, ChatShape, CompletionShape
from plaingpt.serving.api_errors import ApiError, internal, no_model, shutting_down
from plaingpt.serving.guard import Guard
from plaingpt.serving.mailbox import Mailbox
from plaingpt.serving.prometheus import CONTENT_TYPE, ServerFigures
from plaingpt.serving.request_bodies import read_chat, read_completion
from plaingpt.serving.responses import (KEEP_ALIVE, EventStream, JsonResponse, error_response,
                                        event)
from plaingpt.serving.running_texts import HungUp, RunningTexts, while_connected
from plaingpt.serving.strict_json import parse_object
from plaingpt.serving.wanted_texts import texts_of_chat, texts_of_completion

PAGE = Path(__file__).with_name('page.html')
PATHS = ('/', '/health', '/metrics', '/v1/models', '/v1/completions', '/v1/chat/completions')


@dataclass(frozen=True)
class Settings:
    """How the server behaves. Times are in seconds."""
    model_name: str
    host: str = '127.0.0.1'       # that it is bound to
    api_key: str = ''             # '': everybody may ask
    most_texts: int = 80          # that one request may ask for
    max_body: int = 2 ** 20       # bytes of a request
    timeout: float = 300          # for an answer; then a text ends as it is
    body_seconds: float = 30      # for a request's body to arrive
    keep_alive_seconds: float = 10  # without a piece, until a stream gets a sign of life


class Api:
    """The endpoints, around one engine and the tokenizer of its model.

    is_draining: set once the server is about to end; /health then says so."""

    def __init__(self, engine, tokenizer, settings):
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.figures = ServerFigures(engine)
        self.is_draining = False
        self.started = int(time.time())
        self.page_text = PAGE.read_text(encoding='utf-8')
        self.page_policy = content_security_policy(self.page_text)

    # ---- what the server says of itself ----
    def _model(self):
        has_chat_template = bool(getattr(self.tokenizer, 'chat_template', None))
        return {'id': self.settings.model_name, 'object': 'model', 'created': self.started,
                'owned_by': 'plaingpt', 'has_chat_template': has_chat_template,
                'context_size': self.engine.context_size}

    async def models(self, request):
        """GET /v1/models: the list of all models, which are one."""
        return JsonResponse({'object': 'list', 'data': [self._model()]})

    async def model(self, request):
        """GET /v1/models/{id}"""
        self._check_model(request.path_params['id'])
        return JsonResponse(self._model())

    def _check_model(self, name):
        if name != self.settings.model_name:
            raise no_model(name, self.settings.model_name)

    async def health(self, request):
        """GET /health: 200 while the server takes requests, else 503."""
        state = 'ok'
        if self.is_draining:
            state = 'shutting down'
        if not self.engine.is_healthy:
            state = 'failed'
        return JsonResponse({'status': state}, 200 if state == 'ok' else 503)

    async def metrics(self, request):
        """GET /metrics: figures for Prometheus."""
        return Response(self.figures.text(), headers={'Content-Type': CONTENT_TYPE})

    async def page(self, request):
        """GET /: the chat page."""
        return Response(self.page_text, media_type='text/html', headers={
            'Content-Security-Policy': self.page_policy,
            'X-Content-Type-Options': 'nosniff',
            'Referrer-Policy': 'no-referrer',
            'Cache-Control': 'no-cache',
        })

    # ---- texts ----
    async def completions(self, request):
        """POST /v1/completions: texts that continue prompts."""
        return await self._answer(request, read_completion, texts_of_completion, CompletionShape)

    async def chat_completions(self, request):
        """POST /v1/chat/completions: the answer to messages."""
        return await self._answer(request, read_chat, texts_of_chat, ChatShape)

    async def _answer(self, request, read, texts_of, shape):
        """The response to a request for texts.

        read: from the body's object to a dataclass. texts_of: from that to WantedTexts. shape: of
        the answer."""
        began = time.monotonic()
        try:
            content = await read_body(request, self.settings)
        except ClientDisconnect:
            return self._no_response()
        if self.is_draining:
            raise shutting_down()

        def prepare():
            body = read(parse_object(content), self.settings.most_texts)
            if body.parameters.model is not None:
                self._check_model(body.parameters.model)
            wanted = texts_of(body, self.tokenizer, self.engine.context_size,
                              began + self.settings.timeout)
            return body.parameters, wanted

        parameters, wanted = await asyncio.to_thread(prepare)
        answer = Answer(shape, self.settings.model_name, self.tokenizer, wanted,
                        parameters.includes_usage)
        texts = RunningTexts(self.engine, wanted, self._mailbox)
        pieces = self._pieces(texts, began)
        if parameters.streams:
            return EventStream(self._events(pieces, answer), texts.cancel,
                               self.figures.hang_ups.inc)
        try:
            await while_connected(request.receive, _add_all(pieces, answer))
        except HungUp:
            return self._no_response()
        finally:
            texts.cancel()
        return JsonResponse(answer.whole())

    @functools.cached_property
    def _mailbox(self):
        """The Mailbox of the server's loop, in which this is called."""
        return Mailbox(asyncio.get_running_loop())

    def _no_response(self):
        """What a client gets that has hung up."""
        self.figures.hang_ups.inc()
        return _Silence()

    async def _pieces(self, texts, began):
        """Yields (number, Piece) of RunningTexts until all are finished.

        None for a while without any. began: the time.monotonic() of the request."""
        has_tokens = False
        while texts.unfinished > 0:
            found = await texts.next_piece(self.settings.keep_alive_seconds)
            if found is not None and found[1].new_tokens > 0 and not has_tokens:
                has_tokens = True
                self.figures.first_token_seconds.observe(time.monotonic() - began)
            yield found

    async def _events(self, pieces, answer):
        """Yields the events of a stream, bytes."""
        for chunk in answer.first_chunks():
            yield event(chunk)
        async for found in pieces:
            if found is None:
                yield KEEP_ALIVE
                continue
            number, piece = found
            chunk = answer.chunk(number, piece)
            if chunk is not None:
                yield event(chunk)
        if answer.sends_usage:
            yield event(answer.usage_chunk())


async def _add_all(pieces, answer):
    async for found in pieces:
        if found is not None:
            number, piece = found
            answer.add(number, piece)


class _Silence(Response):
    """Sends nothing, because nobody would read it."""

    async def __call__(self, scope, receive, send):
        return


# ---- reading a request ----

async def read_body(request, settings):
    """The body of a request, bytes.

    ApiError if it is not JSON (415), has more bytes than max_body (413), or takes longer than
    body_seconds (408). ClientDisconnect if the client hangs up."""
    content_type = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if content_type != 'application/json':
        raise ApiError(415, 'Send JSON, with "Content-Type: application/json".')
    too_large = ApiError(413, f'The body has more than {settings.max_body} bytes, the most that '
                              'this server takes.', headers={'Connection': 'close'})
    if int(request.headers.get('content-length', 0)) > settings.max_body:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                content += part
                if len(content) > settings.max_body:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, 'The body did not arrive in time.',
                       headers={'Connection': 'close'}) from None
    return bytes(content)


def content_security_policy(page):
    """The policy that lets this page's own inline script run, and ask this server, and no more.

    page: HTML. The script is named by its digest, so that no text of a model can become one."""
    digests = []
    for script in re.findall(r'<script>(.*?)</script>', page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest())
        digests.append(f"'sha256-{digest.decode('ascii')}'")
    scripts = ' '.join(digests) or "'none'"
    return (f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


# ---- the application ----

def create_app(engine, tokenizer, settings):
    """The ASGI application, a Guard around Starlette's; its `api` is the Api."""
    api = Api(engine, tokenizer, settings)
    routes = [
        Route('/', api.page, methods=['GET']),
        Route('/health', api.health, methods=['GET']),
        Route('/metrics', api.metrics, methods=['GET']),
        Route('/v1/models', api.models, methods=['GET']),
        Route('/v1/models/{id:path}', api.model, methods=['GET']),
        Route('/v1/completions', api.completions, methods=['POST']),
        Route('/v1/chat/completions', api.chat_completions, methods=['POST']),
    ]
    starlette = Starlette(routes=routes, exception_handlers={
        HTTPException: _explain_status, ApiError: _send_error, Exception: _send_internal_error})
    starlette.router.redirect_slashes = False
    guard = Guard(starlette, settings, api.figures, PATHS)
    guard.api = api
    return guard


async def _send_error(request, error):
    return error_response(error)


async def _send_internal_error(request, error):
    """The response for a bug, which Starlette hands on to the Guard afterwards."""
    return error_response(internal())


async def _explain_status(request, error):
    """The response for what Starlette refuses: an address, or a method."""
    path = request.url.path[:100]
    messages = {
        404: f'There is nothing at {path}: the API is at /v1/completions, /v1/chat/completions and '
             '/v1/models.',
        405: f'{path} does not take {request.method}.',
    }
    message = messages.get(error.status_code, str(error.detail))
    return error_response(ApiError(error.status_code, message, headers=error.headers))
