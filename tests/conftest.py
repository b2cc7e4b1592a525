"""
What all tests share: a small data set, tiny models, and running the scripts as a user does.

Helpers for runs of train.py are in runs.py, and those for damaged or hostile files in forgery.py.
"""
import contextlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# Before torch is imported: the tests share the cores by processes, not by threads.
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Keys of a run that takes about a second. It evaluates at step 0 and at its end, unless a test
# changes eval_interval.
TINY = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2,
    dropout=0.0, max_iters=6, eval_interval=6, eval_iters=2, log_interval=1, learning_rate=1e-2,
    min_lr=1e-3, warmup_iters=2, lr_decay_iters=6, device='cpu', dtype='float32')
# Fields of the GPTConfig of a tiny model.
TINY_GPT = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)


def tiny_gpt(seed=0, **changes):
    """A GPT with random weights, in evaluation mode."""
    from model import GPT, GPTConfig
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY_GPT, **changes})).eval()


def tiny_ids(*shape, vocab_size=31, seed=1):
    """Random ids, int64 of this shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


# ---- data ----

@pytest.fixture(scope='session')
def text():
    """About 20,000 characters: a few words in random order, which a model learns in seconds."""
    sentence = 'the king and queen of all our sleeping hearts will rise to see another day'
    random = np.random.default_rng(0)
    lines = [' '.join(random.choice(sentence.split(), 8)) for _ in range(400)]
    return '\n'.join(lines)


@pytest.fixture(scope='session')
def char_data(tmp_path_factory, text):
    """The folder of a character data set made from text."""
    from plaingpt.text.publishing import write_data_set
    from plaingpt.text.tokenizers import CharTokenizer
    folder = tmp_path_factory.mktemp('char_data')
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    cut = len(ids) * 9 // 10
    splits = {'train': ids[:cut], 'val': ids[cut:]}
    write_data_set(str(folder), tokenizer, splits, 'a test', None)
    return folder


@pytest.fixture
def named_data(char_data):
    """The name of the same data set as a folder in data/, the only place a checkpoint may name."""
    folder = ROOT / 'data' / f'test_{os.getpid()}'
    shutil.copytree(char_data, folder)
    yield folder.name
    shutil.rmtree(folder)


def read_tokens(folder, split):
    """The ids in a split of a small data set, as a list."""
    return np.fromfile(folder / f'{split}.bin', '<u2').tolist()


# ---- running scripts ----

def flags(keys):
    """The keys of a dict as command-line flags."""
    return [f'--{key}={value}' for key, value in keys.items()]


def run(script, *arguments, cwd=None, env=None, timeout=300, launcher=(), **keys):
    """Runs a script of the repository as `python train.py arguments --key=value` does.

    launcher: what stands between python and the script, e.g. ('-m', 'torch.distributed.run').
    Returns the finished process with its output as text."""
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments), *flags(keys)]
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, timeout=timeout, capture_output=True,
                          text=True, encoding='utf-8')


def run_here(script, *arguments, **keys):
    """Like run(), but in this process, which saves the seconds that importing torch takes."""
    from plaingpt.system.messages import sentence_for
    from plaingpt.training import run_folder
    stdout = captured_stream('strict')
    stderr = captured_stream('backslashreplace')
    handlers = current_handlers()
    argv_before = sys.argv
    sys.argv = [script, *map(str, arguments), *flags(keys)]
    status = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(str(ROOT / script), run_name='__main__')
    except SystemExit as end:
        status = end.code
    except Exception as error:
        sentence = sentence_for(error)
        if not sentence:
            raise
        status = 2
        stderr.write(f'error: {sentence}\n')
    finally:
        command = sys.argv
        sys.argv = argv_before
        run_folder._claims.clear()  # a process that ends releases its locks
        restore_handlers(handlers)
    return subprocess.CompletedProcess(command, status, text_of(stdout), text_of(stderr))


def captured_stream(errors):
    """A stream that keeps what is written to it, as UTF-8."""
    return io.TextIOWrapper(io.BytesIO(), encoding='utf-8', errors=errors, write_through=True)


def text_of(stream):
    return stream.buffer.getvalue().decode('utf-8')


def current_handlers():
    """{number: handler} of the signals that Python handles or knows of."""
    handlers = {}
    for number in signal.Signals:
        handler = signal.getsignal(number)
        if handler is not None:
            handlers[number] = handler
    return handlers


def restore_handlers(handlers):
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def signals_stay_as_they_were():
    """Restores signal handlers after each test.

    A default SIGPIPE, for one, would end the tests' process when a later test writes to a process
    that has ended."""
    handlers = current_handlers()
    yield
    restore_handlers(handlers)


# ---- what a run must have said ----

def refused(finished):
    """The sentence with which a user's mistake has ended a run; fails if it ended otherwise."""
    errors = [line for line in finished.stderr.splitlines() if line.startswith('error: ')]
    assert finished.returncode == 2, finished.stderr
    assert 'Traceback' not in finished.stderr, finished.stderr
    assert errors, finished.stderr
    return '\n'.join(errors)


def problem(call, *arguments, **keys):
    """The one line of the UserError that the call must raise."""
    from plaingpt.system.messages import UserError
    with pytest.raises(UserError) as error:
        call(*arguments, **keys)
    assert '\n' not in str(error.value)
    return str(error.value)


def succeeded(finished):
    """stdout of a run; fails if it did not end well."""
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def or_skip(get):
    """What get() returns; skips the test if neither the internet nor a package index answers."""
    from plaingpt.system.messages import UserError
    try:
        return get()
    except UserError as error:
        no_answer = 'could not be fetched' in str(error) and 'not the expected' not in str(error)
        if not no_answer:
            raise
        pytest.skip(str(error))


# ---- fixtures for damaged and hostile files ----

@pytest.fixture(scope='session')
def saved(tmp_path_factory, char_data):
    """{step: forgery.SavedRun} of three checkpoints, one a step, of a run on char_data."""
    from forgery import save_three_steps
    return save_three_steps(tmp_path_factory.mktemp('saved'), char_data)


@pytest.fixture
def ends_in_time():
    """Fails a test that hangs, as it would on a pipe that nobody writes into.

    No test comes near these 30 seconds."""
    def fail(number, frame):
        pytest.fail('it hangs')  # not an Exception, so no handler of the code catches it

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
