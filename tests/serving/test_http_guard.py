"""Who may ask: keys, host names and other origins."""
import pytest
from running_server import running
from scripted_engine import ScriptedEngine, pieces, wait_until

from plaingpt.serving import guard
from plaingpt.serving.guard import is_loopback

COMPLETIONS = '/v1/completions'
BODY = {'prompt': 'a'}


@pytest.fixture(scope='module')
def server():
    """A server whose engine writes 'Hello world' for every request."""
    with running(ScriptedEngine()) as started:
        yield started


@pytest.fixture(scope='module')
def locked():
    """A server with the key 'secret'."""
    with running(ScriptedEngine(), api_key='secret') as started:
        yield started


@pytest.mark.parametrize('authorization', [
    None, '', 'secret', 'Bearer', 'Bearer ', 'Bearer wrong', 'Bearer secret2', 'Bearer secre',
    'Basic secret', 'Bearer sécret'])
def test_without_the_key_nothing_is_answered(locked, authorization):
    for path, body in ((COMPLETIONS, BODY), ('/v1/models', None), ('/metrics', None),
                       ('/v1/nothing', None)):
        reply = locked.call(path, body, Authorization=authorization)
        assert reply.error(401)['code'] == 'invalid_api_key'
        assert reply.headers['WWW-Authenticate'] == 'Bearer'
    assert locked.engine.requests == []


def test_with_the_key_all_is_answered(locked):
    for authorization in ('Bearer secret', 'bearer  secret'):
        assert locked.call('/metrics', Authorization=authorization).status == 200
        assert locked.call('/v1/models', Authorization=authorization).status == 200
    locked.engine.requests.clear()


def test_the_page_and_the_health_need_no_key(locked):
    assert locked.call('/').status == 200
    assert locked.call('/health').status == 200


@pytest.mark.parametrize('host', [
    'localhost', 'LOCALHOST:8000', '127.0.0.1', '127.0.0.1:1', '[::1]', '[::1]:8000', '127.1.2.3'])
def test_the_names_of_this_machine_are_answered(server, host):
    assert server.call('/health', Host=host).status == 200


@pytest.mark.parametrize('host', [
    'evil.example', 'evil.example:8000', 'localhost.evil.example', '127.0.0.1.evil.example',
    '10.0.0.1', 'localhost@evil.example', '[::2]:80', '::', ':8000', 'x:y:z'])
def test_a_name_that_points_here_by_a_trick_is_refused(server, host):
    server.call('/health', Host=host).error(403)
    server.call(COMPLETIONS, BODY, Host=host).error(403)


def test_a_server_for_other_machines_answers_to_every_name():
    with running(ScriptedEngine(), host='0.0.0.0', api_key='secret') as server:
        reply = server.call('/v1/models', Host='gpu.example', Authorization='Bearer secret')
        assert reply.status == 200


@pytest.mark.parametrize('origin', [
    'https://evil.example', 'null', 'http://localhost:1', 'http://[', '', 'file://'])
def test_pages_of_other_origins_are_refused(server, origin):
    server.call(COMPLETIONS, BODY, Origin=origin).error(403)


def test_the_servers_own_page_is_answered_without_cors_headers(server):
    reply = server.call(COMPLETIONS, BODY, Origin=server.address)
    assert reply.status == 200
    assert not [name for name in reply.headers if name.lower().startswith('access-control')]
    assert server.call(COMPLETIONS, method='OPTIONS').error(405)


def test_beyond_a_number_of_requests_only_the_health_is_answered(monkeypatch):
    monkeypatch.setattr(guard, 'SPARE_REQUESTS', 0)
    engine = ScriptedEngine(pieces(1, 5))
    with running(engine, most_texts=1, drain_seconds=0) as server, server.connect() as first:
        first.sendall(server.request(BODY))
        wait_until(lambda: engine.running)
        reply = server.call(COMPLETIONS, BODY)
        assert reply.error(503)['code'] == 'overloaded'
        assert reply.headers['Retry-After'] == '1'
        assert server.call('/health').status == 200
        first.close()
        wait_until(lambda: not engine.running)
        assert server.call('/v1/models').status == 200


def test_a_path_cannot_forge_an_entry_of_the_log(caplog):
    with running(ScriptedEngine()) as server:
        server.server.app.app = None  # a bug
        server.call('/a%0aERROR:').error(500)
    assert "'/a\\nERROR:'" in caplog.text


def test_loopback_addresses():
    for host in ('127.0.0.1', 'localhost', 'localhost.', '::1', '[::1]', '127.9.9.9'):
        assert is_loopback(host)
    for host in ('', '0.0.0.0', '::', 'example', '192.168.0.1'):
        assert not is_loopback(host)
