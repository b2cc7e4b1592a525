"""Clients that leave, that read slowly, or that send slowly: what they hold is freed."""
import random
import socket
import threading
import time

import pytest
from running_server import CLOSE, read_to_end, running
from scripted_engine import ScriptedEngine, pieces, wait_until

from plaingpt.inference.requests import Piece
from plaingpt.serving import app, http_server, running_texts

BODY = {'prompt': 'a', 'max_tokens': 50}


@pytest.mark.parametrize('changes', [{}, {'stream': True}, {'n': 3}, {'n': 3, 'stream': True}])
@pytest.mark.parametrize('seconds', [0.0, 0.1])
def test_the_texts_of_a_client_that_hangs_up_are_cancelled(changes, seconds):
    engine = ScriptedEngine(pieces(1000, 0.02))
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(server.request({**BODY, **changes}))
        wait_until(lambda: len(engine.requests) == changes.get('n', 1))
        time.sleep(seconds)
        connection.close()
        wait_until(lambda: not engine.running, 2)
        text = server.call('/metrics').content.decode()
    assert 'plaingpt_hang_ups_total 1.0' in text


HEALTH = b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n'


@pytest.mark.parametrize('further', [HEALTH, b'x' * 200_000])
def test_a_hang_up_after_a_further_request_is_noticed(further):
    engine = ScriptedEngine(pieces(1000, 0.02))
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(server.request(BODY))
        wait_until(lambda: engine.running)
        connection.sendall(further)
        time.sleep(0.1)
        connection.close()
        wait_until(lambda: not engine.running, 2)


def test_a_client_that_leaves_before_its_body_is_there_asks_nothing(caplog):
    engine = ScriptedEngine()
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(server.request(BODY)[:-3])
        time.sleep(0.1)
        connection.close()
        wait_until(lambda: b'plaingpt_hang_ups_total 1.0' in server.call('/metrics').content)
    assert engine.requests == []
    assert caplog.text == ''


@pytest.mark.parametrize('streams', [False, True])
def test_a_client_that_leaves_while_its_prompt_is_encoded_keeps_no_text(monkeypatch, streams):
    encode = app.texts_of_completion
    encoding = threading.Event()

    def encode_slowly(*arguments):
        encoding.set()
        time.sleep(0.3)
        return encode(*arguments)

    monkeypatch.setattr(app, 'texts_of_completion', encode_slowly)
    engine = ScriptedEngine(pieces(1000, 0.02))
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(server.request({**BODY, 'n': 3, 'stream': streams}))
        encoding.wait(10)
        connection.close()
        wait_until(lambda: b'plaingpt_hang_ups_total 1.0' in server.call('/metrics').content)
        wait_until(lambda: not engine.running, 2)
        wait_until(lambda: server.server.app.active == 0)


def hang_up_often(clients, steady):
    """Clients that hang up at random moments, while steady ones read their streams to the end."""
    engine = ScriptedEngine(pieces(60, 0.01), room=1000)
    random_numbers = random.Random(0)
    received = []

    def read_stream(server):
        with server.connect() as connection:
            connection.sendall(server.request({**BODY, 'stream': True}, CLOSE))
            received.append(read_to_end(connection))

    def hang_up(server, streams, seconds):
        connection = server.connect()
        if random_numbers.random() < 0.5:  # the server learns of it by a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        content = server.request({**BODY, 'stream': streams, 'n': 2})
        connection.sendall(content[:random_numbers.randint(0, 3 * len(content))])
        time.sleep(seconds)
        connection.close()

    with running(engine) as server:
        threads = [threading.Thread(target=read_stream, args=(server,)) for _ in range(steady)]
        for number in range(clients):
            arguments = (server, number % 2 == 0, random_numbers.random())
            threads.append(threading.Thread(target=hang_up, args=arguments))
        for thread in threads:
            thread.start()
            time.sleep(0.002)
        for thread in threads:
            thread.join()
        wait_until(lambda: not engine.running)
        assert server.call('/health').status == 200
    assert len(received) == steady
    for content in received:
        body = content.partition(b'\r\n\r\n')[2]
        lines = [line for line in body.split(b'\r\n') if line.startswith((b'data: ', b':'))]
        assert sum(line.count(b'"text":"ab"') for line in lines) == 60
        assert b'data: [DONE]' in body


def test_hang_ups_disturb_nobody():
    hang_up_often(clients=30, steady=4)


@pytest.mark.slow
def test_two_hundred_hang_ups_disturb_nobody():
    hang_up_often(clients=200, steady=20)


def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_server, 'STALLED_SECONDS', 0.3)
    engine = ScriptedEngine(pieces(100_000, 0.0001, text='x' * 5000))
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(server.request({**BODY, 'stream': True}))
        wait_until(lambda: engine.running)
        wait_until(lambda: not engine.running, 20)
        assert b'slow_client' not in received_before_the_end(connection)
        connection.close()


def test_a_client_that_reads_slowly_gets_a_long_answer_whole(monkeypatch):
    monkeypatch.setattr(http_server, 'STALLED_SECONDS', 0.2)
    engine = ScriptedEngine(pieces(1, text='x' * 20_000_000))
    with running(engine) as server, server.connect() as connection:
        connection.sendall(server.request(BODY, CLOSE))
        received = 0
        while part := connection.recv(1_000_000):
            received += len(part)
            time.sleep(0.02)  # the whole takes longer than a client may leave all unread
    assert received > 20_000_000


def test_a_client_that_reads_too_slowly_gets_an_error_in_the_end(monkeypatch):
    monkeypatch.setattr(running_texts, 'MOST_WAITING', 50)

    def script(request):
        yield Piece('begin', 1)
        yield 0.2
        for _ in range(2000):
            yield Piece('x' * 5000, 1)
        yield Piece(finish_reason='length')

    engine = ScriptedEngine(script)
    with running(engine) as server, server.connect() as connection:
        connection.sendall(server.request({**BODY, 'stream': True}, CLOSE))
        wait_until(lambda: engine.requests)
        wait_until(lambda: not engine.running, 20)
        content = read_to_end(connection)
    assert b'"code":"slow_client"' in content
    assert b'[DONE]' not in content


@pytest.mark.parametrize('sent', [b'', b'POST /v1/completions HTTP/1.1\r\nHost: local'])
def test_a_connection_without_a_request_is_closed(monkeypatch, sent):
    monkeypatch.setattr(http_server, 'HEAD_SECONDS', 0.2)
    with running(ScriptedEngine()) as server, server.connect() as connection:
        connection.sendall(sent)
        begin = time.monotonic()
        assert not received_before_the_end(connection)
        assert time.monotonic() - begin < 5
        assert server.call('/health').status == 200


def received_before_the_end(connection):
    try:
        return read_to_end(connection)
    except ConnectionResetError:
        return b''


def test_a_connection_serves_one_request_after_another():
    with running(ScriptedEngine()) as server, server.connect() as connection:
        for _ in range(3):
            connection.sendall(server.request({**BODY, 'stream': True}))
            content = b''
            while b'0\r\n\r\n' not in content:
                content += connection.recv(65536)
            assert b'[DONE]' in content


def test_a_request_that_comes_before_an_answer_has_ended_waits_its_turn():
    engine = ScriptedEngine(pieces(5, 0.05))
    with running(engine) as server, server.connect() as connection:
        connection.sendall(server.request({**BODY, 'stream': True}))
        wait_until(lambda: engine.running)
        connection.sendall(HEALTH.replace(b'\r\n\r\n', b'\r\n' + CLOSE.encode() + b'\r\n'))
        content = read_to_end(connection)
    assert content.count(b'"text":"ab"') == 5
    assert content.endswith(b'{"status":"ok"}')
