"""
A server on a free port of 127.0.0.1, in a thread of the tests, and raw connections to it.
"""
import contextlib
import http.client
import json
import socket
import threading
from typing import NamedTuple

from scripted_engine import wait_until

from plaingpt.serving.app import Settings, create_app
from plaingpt.serving.http_server import Server, bind
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.text.tokenizer_layout import BYTE_LEVEL, added_token, byte_level_content

CHAT_ML = ("{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + "
           "message.content + '<|im_end|>\\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

CLOSE = 'Connection: close\r\n'  # a header: the server closes the connection after its answer


def byte_tokenizer(template=CHAT_ML):
    """A tokenizer with a token for each byte and the special tokens of ChatML: 259 ids."""
    from tokenizers.pre_tokenizers import ByteLevel
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    names = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    added = [added_token(name, len(vocab) + i, True) for i, name in enumerate(names)]
    content = byte_level_content(vocab, [], added, BYTE_LEVEL)
    return HuggingFaceTokenizer(json.dumps(content), eos='<|endoftext|>', chat_template=template)


def settings(**changes):
    """Settings of a server that has the model 'tiny'."""
    return Settings(**{'model_name': 'tiny', **changes})


class RunningServer:
    """What running() gives: the engine, the address and the port of a server."""

    def __init__(self, engine, server, port):
        self.engine = engine
        self.server = server
        self.port = port
        self.address = f'http://127.0.0.1:{port}'

    def connect(self):
        """A connected socket. Nothing it does takes more than 30 seconds."""
        return socket.create_connection(('127.0.0.1', self.port), timeout=30)

    def request(self, body, headers='', path='/v1/completions'):
        """The bytes of a POST with a body, an object for JSON or bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (f'POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n{headers}'
                'Content-Type: application/json\r\n'
                f'Content-Length: {len(content)}\r\n\r\n')
        return head.encode() + content

    def call(self, path, body=None, method=None, **headers):
        """The Reply to a request: a GET, or a POST if it has a body, an object for JSON or bytes.

        headers: with underscores for hyphens; None leaves one out."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {} if body is None else {'Content-Type': 'application/json'}
        sent.update({name.replace('_', '-'): value for name, value in headers.items()})
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=30)
        method = method or ('GET' if body is None else 'POST')
        sent = {name: value for name, value in sent.items() if value is not None}
        connection.request(method, path, content, sent)
        response = connection.getresponse()
        reply = Reply(response.status, response.headers, response.read())
        connection.close()
        return reply

    def stream(self, path, body):
        """The data of the events of a stream, a list; '[DONE]' is the last."""
        reply = self.call(path, {**body, 'stream': True})
        assert reply.status == 200, reply.content
        return events_of(reply.content)


class Reply(NamedTuple):
    """What a server has answered."""
    status: int
    headers: object
    content: bytes

    def json(self):
        return json.loads(self.content)

    def error(self, status):
        """The error of OpenAI's shape, a dict; fails if the reply has another status or shape."""
        assert self.status == status, self.content
        assert set(self.json()) == {'error'}
        error = self.json()['error']
        assert set(error) == {'message', 'type', 'param', 'code'}
        assert isinstance(error['message'], str)
        assert isinstance(error['type'], str)
        return error


def events_of(content):
    """The data of events, as objects of JSON, but '[DONE]' as it is. Comments are left out."""
    *events, rest = content.decode('utf-8').split('\n\n')
    assert rest == ''
    found = []
    for event in events:
        if event.startswith(':'):
            continue
        data = event.removeprefix('data: ')
        assert data != event
        found.append(data if data == '[DONE]' else json.loads(data))
    return found


def read_to_end(connection):
    received = b''
    while True:
        part = connection.recv(65536)
        if not part:
            return received
        received += part


@contextlib.contextmanager
def running(engine, tokenizer=None, drain_seconds=5, **changes):
    """A server around an engine, as long as the block runs."""
    app = create_app(engine, tokenizer or byte_tokenizer(), settings(**changes))
    bound = bind('127.0.0.1', 0)
    port = bound.getsockname()[1]
    server = Server(app, engine, drain_seconds)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield RunningServer(engine, server, port)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
