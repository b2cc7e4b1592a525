"""
metrics.jsonl, the record of a run: a JSON object for each step that is logged or evaluated.
"""
import contextlib
import errno
import json
import math
import os

from plaingpt.system.files import replacing
from plaingpt.system.messages import UserError, warn


class Metrics:
    """Writes metrics.jsonl in an out_dir, and sends its lines to a tracker if one is given.

    The file is opened for each line, since the folder may vanish and come back during a run. Lines
    that can't be written are kept, with one warning, and written with the next that can."""

    def __init__(self, out_dir, tracker=None):
        """tracker: a trackers.Tracker that has started, or None."""
        self.path = os.path.join(out_dir, 'metrics.jsonl')
        self.tracker = tracker
        self.unwritten = []

    def write(self, entry):
        """Appends a dict of plain finite values as one line."""
        self.unwritten.append(json.dumps(entry, allow_nan=False) + '\n')
        try:
            self._append(''.join(self.unwritten).encode())
            self.unwritten.clear()
        except OSError as error:
            if len(self.unwritten) == 1:
                warn(f'{self.path} cannot be written ({error.strerror}): '
                     'its lines are kept until they can be')
        if self.tracker:
            self.tracker.send(entry)

    def _append(self, content):
        with open(self.path, 'ab', buffering=0) as file:
            end = file.tell()
            written = file.write(content)
            if written < len(content):  # the disk has filled up: take the half line back
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        """Ends the record. UserError if the disk has refused its last lines."""
        if self.tracker:
            self.tracker.close()
        if self.unwritten:
            raise UserError(f'the last lines of {self.path} could not be written')


def entries(out_dir):
    """Yields the lines of the record as dicts. Call it after cut(), which drops damaged ones."""
    path = os.path.join(out_dir, 'metrics.jsonl')
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            yield from map(json.loads, file)


def cut(out_dir, step):
    """Drops the lines from this step on, which a run that resumes here writes again."""
    path = os.path.join(out_dir, 'metrics.jsonl')
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            if line.endswith('\n') and _step_of(line) < step:
                kept.append(line)
    with replacing(path) as file:
        file.write(''.join(kept).encode())


def _step_of(line):
    """The step of a line; infinity if it is no record, as after a kill in the middle of a line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        step = json.loads(line)['step']
        if isinstance(step, int):
            return step
    return math.inf


def describe_losses(losses):
    """The losses of an evaluation, as they are printed."""
    text = f"train loss {losses['train_loss']:.4f}, val loss {losses['val_loss']:.4f}"
    if 'val_loss_by_data' in losses:
        parts = [f'{name} {loss:.4f}' for name, loss in losses['val_loss_by_data'].items()]
        text += f' ({", ".join(parts)})'
    return text


def describe(figures):
    """The figures of a logged step, as they are printed."""
    norm = figures['grad_norm']
    if norm is None:
        norm = math.inf
    mfu = 'n/a' if figures['mfu'] is None else f"{figures['mfu']:.1%}"
    return (f"loss {figures['loss']:.4f}, lr {figures['lr']:.2e}, norm {norm:.2f}, "
            f"{figures['ms_per_step']:.1f} ms, {figures['tokens_per_s']:,.0f} tokens/s, MFU {mfu}")
