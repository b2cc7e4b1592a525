"""serve.py as a user runs it: a checkpoint becomes a server, and mistakes end in one sentence."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from importlib.machinery import PathFinder

import pytest
from conftest import ROOT, refused, run_here, tiny_gpt
from running_server import RunningServer, byte_tokenizer


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    """A run's folder with a tiny model for chats."""
    from dataclasses import asdict

    from plaingpt.training import checkpoints
    folder = tmp_path_factory.mktemp('out') / 'out-tiny'
    folder.mkdir()
    tokenizer = byte_tokenizer()
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size, block_size=64, n_head=1, n_embd=32)
    checkpoints.save(str(folder), {
        'model': gpt.state_dict(), 'optimizer': {}, 'model_args': asdict(gpt.config),
        'iter_num': 7, 'best_val_loss': 1.0, 'config': {}, 'tokenizer': tokenizer.to_meta()},
        ['ckpt'])
    return folder


def start(out_dir, *flags, env):
    """(process, its first two lines) of a server that takes requests."""
    command = [sys.executable, str(ROOT / 'serve.py'), f'--out_dir={out_dir}', '--port=0',
               '--device=cpu', *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, **env})
    watchdog = threading.Timer(100, process.kill)
    watchdog.start()
    lines = [process.stdout.readline(), process.stdout.readline()]
    watchdog.cancel()
    if not lines[1]:
        pytest.fail(process.communicate()[1])
    return process, lines


def stop(process, number=signal.SIGTERM):
    """What a server wrote to stderr; fails if it does not end with status 0."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.parametrize('flags, environment, precision, number', [
    (['--dtype=float32'], {}, 'float32, 16 rows', signal.SIGTERM),
    (['--quantize=int8', '--model_name=mine', '--max_rows=100000000'],
     {'PLAINGPT_API_KEY': 'secret'}, 'int8 weights, float32, 100,000,000 rows', signal.SIGINT)])
def test_a_checkpoint_becomes_a_server(out_dir, flags, environment, precision, number):
    process, (first, second) = start(out_dir, *flags, env=environment)
    port = int(re.search(r'http://127\.0\.0\.1:(\d+)', first).group(1))
    assert 'ckpt.pt, step 7; ' in first
    assert f', {precision}, http://' in first

    # The second line is a command that works as it stands.
    name = 'mine' if '--model_name=mine' in flags else 'out-tiny'
    headers = {}
    if environment:
        headers['Authorization'] = 'Bearer secret'
        assert '-H "Authorization: Bearer $PLAINGPT_API_KEY"' in second
    arguments = shlex.split(second.removeprefix('try: '))
    assert arguments[:2] == ['curl', f'http://127.0.0.1:{port}/v1/completions']
    server = RunningServer(None, None, port)
    body = json.loads(arguments[-1])
    answer = server.call('/v1/completions', body, **headers).json()
    assert answer['model'] == name
    assert answer['usage']['completion_tokens'] > 0
    answer = server.call('/v1/chat/completions', {
        'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 3}, **headers).json()
    assert answer['choices'][0]['message']['role'] == 'assistant'
    assert server.call('/').status == 200
    if headers:
        assert server.call('/v1/models').status == 401
    errors = stop(process, number)
    if '--max_rows=100000000' in flags:
        assert re.fullmatch('warning: 100000000 texts with a context of 64 tokens need up to '
                            r'[\d.e+]+ GB of keys and values, .*\n', errors)
    else:
        assert errors == ''


@pytest.mark.parametrize('keys, sentence', [
    (dict(host='0.0.0.0'), 'host=0.0.0.0 lets other machines in: set a key'),
    (dict(host=''), 'host= lets other machines in'),
    (dict(api_key='two words'), 'api_key must consist of ASCII characters without spaces'),
    (dict(port=65536), 'port=65536: must be in [0, 65535]'),
    (dict(quantize='int2'), "quantize='int2': must be one of '', 'int8', 'int4'"),
    (dict(max_rows=0), 'max_rows=0: must be >= 1'),
    (dict(context_size=65), 'context_size=65 must be at least 1, and at most block_size=64'),
    (dict(drain_seconds='inf'), 'drain_seconds'),
    (dict(out_dir='nowhere'), 'nowhere holds no checkpoint'),
])
def test_mistakes_end_in_one_sentence(out_dir, monkeypatch, keys, sentence):
    monkeypatch.delenv('PLAINGPT_API_KEY', raising=False)
    settings = {'out_dir': out_dir, 'port': 0, 'device': 'cpu', **keys}
    assert sentence in refused(run_here('serve.py', **settings))


def test_a_port_that_is_taken_ends_in_one_sentence(out_dir):
    import socket
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_here('serve.py', out_dir=out_dir, port=port)
    assert f'port={port}: Address already in use; choose another with --port' in refused(ended)


def test_missing_packages_are_named_with_the_command(out_dir, monkeypatch):
    find = PathFinder.find_spec

    def find_all_but_two(name, *arguments):
        if name in ('uvicorn', 'prometheus_client'):
            return None
        return find(name, *arguments)

    for name in ('uvicorn', 'prometheus_client'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(PathFinder, 'find_spec', find_all_but_two)
    sentence = refused(run_here('serve.py', out_dir=out_dir))
    assert 'not installed: pip install uvicorn prometheus-client' in sentence
