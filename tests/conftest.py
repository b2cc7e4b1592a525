"""What the tests share: a small data set of their own, and running the scripts as a user does."""
import contextlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: the tests share the cores by processes, not threads
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# A net for one second of training. eval_interval is its last step, unless a test says otherwise.
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, dropout=0.0,
            max_iters=6, eval_interval=6, eval_iters=2, log_interval=1, learning_rate=1e-2, min_lr=1e-3, warmup_iters=2,
            lr_decay_iters=6, device='cpu', dtype='float32')
TINY_GPT = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)


def tiny_gpt(seed=0, **changes):
    """A GPT of random weights, in evaluation mode."""
    from model import GPT, GPTConfig
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY_GPT, **changes})).eval()


def tiny_ids(*shape, vocab_size=31, seed=1):
    """Random ids, int64 of this shape."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='session')
def text():
    """About 20,000 characters: a few words in random order, learnt within seconds."""
    words = 'the king and queen of all our sleeping hearts will rise to see another day'.split()
    random = np.random.default_rng(0)
    return '\n'.join(' '.join(random.choice(words, 8)) for _ in range(400))


@pytest.fixture(scope='session')
def char_data(tmp_path_factory, text):
    """The folder of a character data set made of text."""
    from plaingpt.text.publishing import write_data_set
    from plaingpt.text.tokenizers import CharTokenizer
    folder = tmp_path_factory.mktemp('char_data')
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    cut = len(ids) * 9 // 10
    write_data_set(str(folder), tokenizer, {'train': ids[:cut], 'val': ids[cut:]}, 'a test', None)
    return folder


@pytest.fixture
def named_data(char_data):
    """The name of the same data set as a folder in data/, which is what a checkpoint may name."""
    folder = ROOT / 'data' / f'test_{os.getpid()}'
    shutil.copytree(char_data, folder)
    yield folder.name
    shutil.rmtree(folder)


def run(script, *arguments, cwd=None, env=None, timeout=300, launcher=(), **keys):
    """Runs a script of the repository as `python train.py arguments --key=value` does; a finished process with its
    output as text. launcher: what stands between python and the script, e.g. ('-m', 'torch.distributed.run')."""
    flags = [f'--{key}={value}' for key, value in keys.items()]
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments), *flags]
    return subprocess.run(command, cwd=cwd, env={**os.environ, 'HF_HUB_OFFLINE': '1', **(env or {})}, timeout=timeout,
                          capture_output=True, text=True, encoding='utf-8')


def _handlers():
    return {number: signal.getsignal(number) for number in signal.Signals if signal.getsignal(number) is not None}


def _restore(handlers):
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were():
    """As a default SIGPIPE would not: it ends the tests' process when a later test writes to a dead one."""
    handlers = _handlers()
    yield
    _restore(handlers)


def run_here(script, *arguments, **keys):
    """The same within this process, which saves the seconds that importing torch takes."""
    from plaingpt.system.messages import sentence_for
    from plaingpt.training import run_folder
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8', errors=errors, write_through=True)
                      for errors in ('strict', 'backslashreplace'))
    handlers = _handlers()
    argv, sys.argv = sys.argv, [script, *map(str, arguments), *(f'--{key}={value}' for key, value in keys.items())]
    status = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(str(ROOT / script), run_name='__main__')
    except SystemExit as end:
        status = end.code
    except Exception as error:
        if not (sentence := sentence_for(error)):
            raise
        status = 2
        stderr.write(f'error: {sentence}\n')
    finally:
        sys.argv = argv
        run_folder._claims.clear()  # a process that ends lets go of its locks
        _restore(handlers)
    texts = (stream.buffer.getvalue().decode('utf-8') for stream in (stdout, stderr))
    return subprocess.CompletedProcess(sys.argv, status, *texts)


def refused(finished):
    """The one sentence of a run that a user's mistake has ended; fails if it ended otherwise."""
    errors = [line for line in finished.stderr.splitlines() if line.startswith('error: ')]
    assert finished.returncode == 2, finished.stderr
    assert 'Traceback' not in finished.stderr, finished.stderr
    assert errors, finished.stderr
    return '\n'.join(errors)


def succeeded(finished):
    """stdout of a run that ended well."""
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def or_skip(get):
    """What get returns; skips where neither the internet nor a package index answers."""
    from plaingpt.system.messages import UserError
    try:
        return get()
    except UserError as error:
        if 'could not be fetched' not in str(error) or 'not the expected' in str(error):
            raise
        pytest.skip(str(error))


def read_tokens(folder, split):
    """The ids in a split of a small data set, as a list."""
    return np.fromfile(folder / f'{split}.bin', '<u2').tolist()
