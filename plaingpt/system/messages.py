"""
What the scripts tell the user: the sentence in which an error ends, warnings, and lines of
progress.

A user's mistake raises UserError wherever it is found, and reaches the terminal as one sentence
instead of a traceback. With several ranks, only the first prints and warns. This module does not
import torch, so scripts that need no torch start at once.
"""
import contextlib
import os
import signal
import sys
import time

from tqdm import tqdm

# torchrun sets both: this process's number within the job, and within its machine.
RANK = int(os.environ.get('RANK', 0))
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))

STDOUT, STDERR = 1, 2  # file descriptors


# ---- errors ----
class UserError(Exception):
    """A user's mistake or a broken file; the message says what is wrong, where, and what to do.

    Uncaught, it ends the process with that sentence on stderr, no traceback, and exit status 2."""


def end_with(sentences):
    """Prints the sentences as errors on stderr and exits with status 2.

    Usually all ranks find the same mistake at the same time. Then the first rank of each machine
    prints it, and torchrun terminates the other ranks while they wait here. A rank that found a
    mistake alone is still alive after the wait, and prints it."""
    sys.stdout.flush()
    if LOCAL_RANK > 0:
        # StopSignal, if train.py has installed it, would keep torchrun's SIGTERM from ending us.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    sys.stderr.write(''.join(f'error: {sentence}\n' for sentence in sentences))
    sys.exit(2)


def sentence_for(error):
    """The sentence to show the user for this exception, or None if the exception is a bug."""
    if isinstance(error, UserError):
        return str(error)
    advice = 'use fewer or shorter sequences at a time, or a smaller model'
    torch = sys.modules.get('torch')  # where it was never imported, no error can be torch's
    if torch and isinstance(error, torch.OutOfMemoryError):
        return f'the GPU is out of memory: {advice}'
    # On a CPU, torch raises a plain RuntimeError; only its text tells what happened.
    torch_needs_ram = "DefaultCPUAllocator: can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or torch_needs_ram:
        return f'there is not enough memory: {advice}'
    return None


def explain_user_errors():
    """Makes an uncaught UserError end the process with its sentence, and Ctrl-C end it silently.

    Bugs keep their traceback."""
    previous_hook = sys.excepthook

    def hook(kind, error, traceback):
        sentence = sentence_for(error)
        if sentence:
            end_with([sentence])
        if issubclass(kind, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        # gloo has no exception class of its own, but its messages name the C++ file that raised
        # them. They mean that another rank is gone; a traceback here would bury that rank's error.
        if 'gloo/transport' in str(error):
            sys.stderr.write(f'error: rank {RANK} lost its connection to another rank; '
                             "see that rank's error\n")
            # Python's clean-up would wait for gloo's threads and can crash; see processes.leave().
            os._exit(1)
        previous_hook(kind, error, traceback)

    sys.excepthook = hook


explain_user_errors()


@contextlib.contextmanager
def explained(*kinds, prefix=''):
    """Turns exceptions of these kinds into a UserError that consists of prefix and their text."""
    try:
        yield
    except kinds as error:
        raise UserError(f'{prefix}{error}') from error


def complaints(check, *arguments):
    """What check(*arguments) refuses, for a script's problems(): one sentence in a list, or []."""
    try:
        check(*arguments)
    except UserError as error:
        return [str(error)]
    return []


# ---- output ----
def counted(number, noun):
    """A number with its noun: 1 document, 2,000 documents."""
    return f'{number:,} {noun}' if number == 1 else f'{number:,} {noun}s'


def warn(sentence):
    """Prints a warning on stderr, from the first rank only."""
    if RANK == 0:
        with _output_that_may_fail(STDERR):
            print(f'warning: {sentence}', file=sys.stderr, flush=True)


def print0(line):
    """Prints a line on stdout at once, above any progress bar, from the first rank only."""
    if RANK == 0:
        with _output_that_may_fail(STDOUT):
            tqdm.write(line)
            sys.stdout.flush()


@contextlib.contextmanager
def _output_that_may_fail(descriptor):
    """Keeps a failing write to this file descriptor from ending a run before it has saved.

    If the reader of a pipe is gone (`| head`), the process sends itself SIGTERM, on which train.py
    saves and stops. If the log is on a full disk, the line is lost, but metrics.jsonl keeps its
    figures until there is room again."""
    try:
        yield
    except BrokenPipeError:
        discard_output(descriptor)
        signal.raise_signal(signal.SIGTERM)
    except OSError:
        pass


def discard_output(descriptor):
    """Redirects this file descriptor to the null device, because its reader is gone."""
    with open(os.devnull, 'wb') as null_device:
        os.dup2(null_device.fileno(), descriptor)
