"""
How the scripts speak and end: one sentence for a user's mistake, lines and warnings from one process of many, and the
signals that ask a run to stop. It imports no torch, so that what needs none starts at once.
"""
import contextlib
import os
import signal
import sys
import time

from tqdm import tqdm

RANK, LOCAL_RANK = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))  # torchrun sets them


class UserError(Exception):
    """A user's mistake or a broken file. Its message is the one sentence to print: what is wrong, where, what to do.
    Uncaught, it ends the process with that sentence on stderr, no traceback and exit status 2."""


def end_with(sentences):
    """Prints the sentences as errors and exits with status 2.

    Most mistakes are met by all ranks at once: then the first of each machine speaks, and torchrun ends the others
    while they wait here. One that has met a mistake alone is still there after the wait, and speaks."""
    sys.stdout.flush()
    if LOCAL_RANK:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    sys.stderr.write(''.join(f'error: {sentence}\n' for sentence in sentences))
    sys.exit(2)


def sentence_for(error):
    """The sentence for the user that an exception stands for, or None if it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    torch = sys.modules.get('torch')
    if torch and isinstance(error, torch.OutOfMemoryError):
        return 'the GPU is out of memory: fewer or shorter sequences at a time, or a smaller model, need less'
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return 'there is not enough memory: fewer or shorter sequences at a time, or a smaller model, need less'
    return None


def explain_user_errors():
    """Lets an uncaught UserError end the process with its sentence, a Ctrl-C without one, and other exceptions as they
    would have."""
    otherwise = sys.excepthook

    def hook(kind, error, traceback):
        if sentence := sentence_for(error):
            end_with([sentence])
        if issubclass(kind, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        if 'gloo/transport' in str(error):
            sys.stderr.write(f'error: rank {RANK} has lost another, which says why or was killed\n')
            os._exit(1)  # as in processes.leave()
        otherwise(kind, error, traceback)

    sys.excepthook = hook


explain_user_errors()


@contextlib.contextmanager
def explained(*kinds, prefix=''):
    """Turns exceptions of these kinds into UserError; for calls whose exceptions of them are sentences for the user."""
    try:
        yield
    except kinds as error:
        raise UserError(f'{prefix}{error}') from error


def complaints(check, *arguments):
    """[the sentence with which the call is refused], or [] if it is not: for a script's problems()."""
    try:
        check(*arguments)
    except UserError as error:
        return [str(error)]
    return []


def warn(sentence):
    """One line on stderr, from the first rank alone."""
    if RANK == 0:
        _say(2, lambda: print(f'warning: {sentence}', file=sys.stderr, flush=True))


def print0(line):
    """Prints from the first rank alone, at once, and above a progress bar if there is one."""
    if RANK == 0:
        _say(1, lambda: (tqdm.write(line), sys.stdout.flush()))


def _say(stream, write):
    """Calls write, which writes to this stream (1 or 2). A line that finds no reader (`| head`) asks the process to
    stop, and one that finds no room on the disk is left out: neither may end a run before it has saved its state."""
    try:
        write()
    except BrokenPipeError:
        _silence(stream)
        signal.raise_signal(signal.SIGTERM)
    except OSError:
        pass  # the log is on a full disk: it lacks this line, and what was measured comes in metrics.jsonl


def _silence(stream):
    """Leads a stream into nothing, where what it led to is no longer there."""
    with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), stream)
