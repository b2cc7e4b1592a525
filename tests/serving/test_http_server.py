"""The server's socket, and its end: answers are finished, new requests are not taken."""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, problem
from running_server import CLOSE, RunningServer, read_to_end, running
from scripted_engine import ScriptedEngine, pieces, wait_until

from plaingpt.serving import http_server
from plaingpt.serving.http_server import bind

BODY = {'prompt': 'a', 'stream': True}


def test_an_address_that_cannot_be_used_is_one_sentence():
    with bind('127.0.0.1', 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f'host=127.0.0.1, port={port}: Address already in use' in problem(
            bind, '127.0.0.1', port)
    assert 'host=192.0.2.1' in problem(bind, '192.0.2.1', 0)
    assert 'host=no such name' in problem(bind, 'no such name', 0)


def test_a_port_can_be_used_again_at_once():
    with running(ScriptedEngine()) as server:
        assert server.call('/health').status == 200
    with bind('127.0.0.1', server.port) as again:
        again.listen()


def start_stream(server):
    """(thread, received): reads a stream to its end in a thread."""
    received = []

    def read():
        with server.connect() as connection:
            connection.sendall(server.request(BODY, CLOSE))
            received.append(read_to_end(connection))

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: server.engine.running)
    return thread, received


def test_a_server_that_ends_finishes_its_answers_and_takes_no_more():
    engine = ScriptedEngine(pieces(10, 0.05))
    with running(engine) as server:
        thread, received = start_stream(server)
        server.server.should_exit = True
        wait_until(lambda: engine.is_closed)
        assert server.call('/health').json() == {'status': 'shutting down'}
        reply = server.call('/v1/completions', {'prompt': 'a'})
        assert reply.error(503)['code'] == 'shutting_down'
        assert reply.headers['Retry-After'] == '10'
        assert not received  # the answer from before is still on its way
        thread.join()
    assert b'[DONE]' in received[0]
    assert received[0].count(b'"text":"ab"') == 10
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_answers_that_take_too_long_then_end_with_an_error():
    engine = ScriptedEngine(pieces(1000, 0.05))
    with running(engine, drain_seconds=0.2) as server:
        thread, received = start_stream(server)
    thread.join()
    assert b'"code":"shutting_down"' in received[0]
    assert b'[DONE]' not in received[0]
    assert not engine.running


def test_a_client_that_does_not_read_holds_up_no_end(monkeypatch, caplog):
    monkeypatch.setattr(http_server, 'LAST_SECONDS', 0.3)
    engine = ScriptedEngine(pieces(3000, 0.001, text='x' * 50_000))
    with running(engine, drain_seconds=0) as server:
        connection = server.connect()
        connection.sendall(server.request(BODY))
        wait_until(lambda: any(protocol.flow.write_paused
                               for protocol in server.server.server_state.connections))
        begin = time.monotonic()
    assert time.monotonic() - begin < 3
    assert caplog.text == ''
    connection.close()


SCRIPT = '''
import sys
sys.path[:0] = sys.argv[1:3]
from running_server import byte_tokenizer, settings
from scripted_engine import ScriptedEngine, pieces
from plaingpt.serving.app import create_app
from plaingpt.serving.http_server import Server, bind
engine = ScriptedEngine(pieces(20, 0.05))
bound = bind('127.0.0.1', 0)
print(bound.getsockname()[1], flush=True)
Server(create_app(engine, byte_tokenizer(), settings()), engine, 30).run([bound])
print('ended', flush=True)
'''


@pytest.fixture
def process():
    """A process with a server whose answers take a second."""
    command = [sys.executable, '-c', SCRIPT, str(ROOT), os.path.dirname(__file__)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT / 'tests')}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    yield started
    started.kill()
    started.wait()
    started.stdout.close()


def stream_of(process):
    """(thread, received) of a stream that the process has begun."""
    address = RunningServer(None, None, int(process.stdout.readline()))
    received = []

    def read():
        with wait_for_connection(address) as connection:
            connection.sendall(address.request(BODY, CLOSE))
            while part := connection.recv(65536):
                received.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: b'"text"' in b''.join(received), 30)
    return thread, received


def wait_for_connection(address):
    for _ in range(100):
        try:
            return address.connect()
        except ConnectionRefusedError:
            time.sleep(0.05)
    return address.connect()


def test_the_first_signal_lets_answers_end(process):
    thread, received = stream_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    thread.join()
    assert b'[DONE]' in b''.join(received)
    assert process.stdout.read() == 'ended\n'


def test_the_second_signal_ends_at_once(process):
    thread, _ = stream_of(process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 1
    thread.join()
