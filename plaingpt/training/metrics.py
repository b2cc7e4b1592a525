"""
The folder of a run, its out_dir: who may write into it, its metrics.jsonl, and what becomes of a run that was there
before.

    .lock          held by the run that writes here
    metrics.jsonl  one JSON object a step that was logged or evaluated
    loss.png       what plot.py has drawn of it
    find_lr.png    what the search for a learning rate has found
    adapter/       what LoRA has learnt, which finetuning.py writes
    replaced/N/    the runs that were here before a new one started

checkpoint.py owns the rest of what is in it.
"""
import contextlib
import errno
import json
import math
import os

from plaingpt.system.files import sync
from plaingpt.system.messages import UserError, warn


class Metrics:
    """metrics.jsonl of an out_dir. It is opened for each line: the folder may vanish and come back during a run. Lines
    that the disk refuses are kept, with one warning, and written with the next that it takes. wandb: the module, once
    it has been set up, or None."""

    def __init__(self, out_dir, wandb=None):
        self.path, self.unwritten, self.wandb = os.path.join(out_dir, 'metrics.jsonl'), [], wandb

    def write(self, entry):
        """Appends a dict of plain finite values as one line."""
        self.unwritten.append(json.dumps(entry, allow_nan=False) + '\n')
        content = ''.join(self.unwritten).encode()
        try:
            with open(self.path, 'ab', buffering=0) as file:
                end = file.tell()
                if file.write(content) < len(content):  # the disk has filled up meanwhile
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten.clear()
        except OSError as error:
            if len(self.unwritten) == 1:
                warn(f'{self.path} cannot be written ({error.strerror}): its lines are kept until there is room')
        if self.wandb:
            self.wandb.log({'iter': entry['step'], **entry})

    def close(self, unsaved=None):
        """UserError if lines are left that the disk has refused, or, in the words of unsaved, a state."""
        if self.wandb:
            self.wandb.finish()
        if unsaved or self.unwritten:
            raise UserError(unsaved or f'the last lines of {self.path} could not be written')


def in_words(record):
    """What is printed of the record of a line of the log."""
    norm, mfu = record['grad_norm'], record['mfu']
    return (f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, norm {math.inf if norm is None else norm:.2f}, "
            f"{record['ms_per_step']:.1f} ms, {record['tokens_per_s']:,.0f} tokens/s, "
            f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}")


def give_up(metrics, step, tokens, what):
    """Ends the run, of which metrics are written here or not, for numbers that are not finite, before they reach the
    weights or the disk."""
    sentence = f'{what}; resume from the last state with a lower learning_rate'
    if metrics:
        metrics.write({'step': step, 'tokens': tokens, 'error': sentence})
    raise UserError(sentence)


def cut_metrics(out_dir, step):
    """Drops from metrics.jsonl what it says of later steps than this one."""
    path, temporary = os.path.join(out_dir, 'metrics.jsonl'), os.path.join(out_dir, '.metrics.jsonl.tmp')
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # it is no record: spoilt by a kill or a crash
                if line.endswith('\n') and json.loads(line)['step'] <= step:
                    kept.append(line)
    with open(temporary, 'w', encoding='utf-8') as file:
        file.writelines(kept)
    sync(temporary)
    os.replace(temporary, path)
