"""Malformed requests: each is answered in time, and none with a bug of ours."""
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import running
from scripted_engine import ScriptedEngine

PATHS = ('/v1/completions', '/v1/chat/completions')
NAMES = ('prompt', 'messages', 'model', 'n', 'max_tokens', 'max_completion_tokens', 'temperature',
         'top_p', 'top_k', 'min_p', 'repetition_penalty', 'stop', 'seed', 'stream',
         'stream_options', 'logprobs', 'top_logprobs', 'echo', 'user', 'metadata', 'logit_bias',
         'tools', 'response_format', 'best_of', 'suffix', 'role', 'content', 'type', 'text',
         'include_usage')

numbers = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.just(10 ** 400))
texts = st.text(st.characters(), max_size=20)  # with halves of surrogate pairs
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4),
                            st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=4)),
    max_leaves=5)
parts = st.fixed_dictionaries({'type': st.just('text') | values, 'text': values})
messages = st.fixed_dictionaries({
    'role': st.sampled_from(['system', 'user', 'assistant', 'developer', 'tool']) | values,
    'content': texts | st.lists(parts, max_size=3) | values})
prompts = texts | st.lists(st.integers(-1, 300), max_size=70) | values
some_fields = st.dictionaries(st.sampled_from(NAMES) | texts, values, max_size=3)
# A right body in which a few fields are wrong, or one of them.
requests = st.builds(
    lambda right, wrong: {**right, **wrong},
    st.sampled_from([{'prompt': 'a'}, {'messages': [{'role': 'user', 'content': 'a'}]}]),
    some_fields
    | st.fixed_dictionaries({'prompt': prompts})
    | st.fixed_dictionaries({'messages': st.lists(messages, max_size=4)}))


def damaged(content, cut, place, byte):
    """The bytes without their end, and with one of them changed."""
    content = bytearray(content[:max(1, len(content) - cut)])
    content[place % len(content)] = byte
    return bytes(content)


bodies = requests.map(lambda value: json.dumps(value).encode())
broken_bodies = st.builds(damaged, bodies, st.integers(0, 5), st.integers(0), st.integers(0, 255))
content_types = st.sampled_from(['application/json'] * 8 + ['text/plain', '', 'application/json;'])


def answer_malformed_requests(server, count):
    """Sends so many requests that hypothesis makes, and checks each answer."""
    statuses = set()

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(PATHS), bodies | broken_bodies | st.binary(max_size=50), content_types)
    def answer(path, body, content_type):
        reply = server.call(path, body, Content_Type=content_type)  # within 30 seconds
        statuses.add(reply.status)
        if reply.status == 200:
            return
        assert reply.status < 500, reply.content
        message = reply.error(reply.status)['message']
        assert message
        assert 'Traceback' not in message

    answer()
    return statuses


@pytest.fixture(scope='module')
def server():
    with running(ScriptedEngine()) as started:
        yield started


def test_malformed_requests_are_refused(server):
    statuses = answer_malformed_requests(server, 100)
    assert {200, 400, 415} <= statuses
    assert not server.engine.running


@pytest.mark.slow
def test_two_thousand_malformed_requests_are_refused(server):
    answer_malformed_requests(server, 2000)
    assert not server.engine.running


@pytest.mark.parametrize('head', [
    b'\r\n\r\n', b'GET\r\n\r\n', b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' * 5,
    b'GET / HTTP/1.1\r\n\r\n', b'GET / HTTP/9.9\r\nHost: localhost\r\n\r\n',
    b'GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n',
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    b'Content-Length: -5\r\n\r\n',
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    b'Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}',
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    b'Transfer-Encoding: chunked\r\n\r\nzz\r\n',
    b'GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n',
    b'GET / HTTP/1.1\r\nHost: localhost\r\nX: ' + b'x' * 200_000 + b'\r\n\r\n',
    b'GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n',
])
def test_a_malformed_head_ends_no_server(server, head, caplog):
    with server.connect() as connection:
        connection.settimeout(0.5)
        try:
            connection.sendall(head)
            received = connection.recv(65536)
        except TimeoutError:  # it waits for the rest of the head
            received = b''
        except ConnectionError:  # it has closed the connection with some of the head unread
            received = b''
    assert not received.startswith(b'HTTP/1.1 5')
    assert 'Traceback' not in caplog.text
    assert server.call('/health').status == 200
