import os
import stat
import subprocess
import sys

import pytest
from conftest import ROOT

from plaingpt.system import native_code
from plaingpt.system.native_code import CannotCompile, load

SOURCE = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for compiled files."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'plaingpt'


@pytest.fixture
def source(tmp_path):
    path = tmp_path / 'answer.cpp'
    path.write_text(SOURCE % 42, encoding='utf-8')
    return path


def has_compiler():
    try:
        native_code.compiler()
        return True
    except CannotCompile:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason='there is no C++ compiler')


@needs_compiler
def test_a_file_is_compiled_once(cache, source, monkeypatch):
    assert load(str(source)).answer() == 42
    compiled = os.listdir(cache)
    assert len(compiled) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700

    def fail(command, path):
        raise AssertionError('it is compiled again')

    monkeypatch.setattr(native_code, '_compile', fail)
    assert load(str(source)).answer() == 42
    assert os.listdir(cache) == compiled


@needs_compiler
def test_another_source_is_another_file(cache, source):
    load(str(source))
    source.write_text(SOURCE % 43, encoding='utf-8')
    assert load(str(source)).answer() == 43
    assert len(os.listdir(cache)) == 2


@needs_compiler
def test_other_instructions_are_another_file(cache, source, monkeypatch):
    load(str(source))
    monkeypatch.setattr(native_code, 'instruction_set', lambda: 'no such set')
    load(str(source))
    assert len(os.listdir(cache)) == 2


@needs_compiler
def test_an_error_of_the_compiler_is_a_sentence(cache, source):
    source.write_text('this is no C++', encoding='utf-8')
    with pytest.raises(CannotCompile, match='fails .*answer.cpp'):
        load(str(source))
    assert os.listdir(cache) == []


def test_without_a_compiler(cache, source, monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(CannotCompile, match='there is no C.. compiler'):
        load(str(source))


def test_a_compiler_that_is_missing(cache, source, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler --quick')
    with pytest.raises(CannotCompile, match='no-such-compiler'):
        load(str(source))


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, source, monkeypatch):
    (tmp_path / 'file').write_text('', encoding='utf-8')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert load(str(source)).answer() == 42


@needs_compiler
def test_a_damaged_file_is_made_anew(cache, source):
    # The system keeps a file that this process has loaded, so another one makes it.
    program = f'from plaingpt.system.native_code import load; load({str(source)!r})'
    subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True)
    [compiled] = cache.iterdir()
    compiled.write_bytes(b'not a library')
    assert load(str(source)).answer() == 42
