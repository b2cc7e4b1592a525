"""
Tokenizes a corpus too large for memory, on many cores, so that a run which was stopped in whatever way goes on where it
was, and ends with the same bytes as one that was not.
"""
import collections
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from plaingpt.system.files import replace_file
from plaingpt.system.messages import UserError, explained
from plaingpt.text.publishing import pack

SAVE_SECONDS = 1    # from one note of the progress to the next
LINE_SECONDS = 30   # from one printed line to the next where no terminal can show a bar


def write_parts(folder, splits, column, tokenizer, inputs, num_proc, step):
    """Writes folder/train.bin.part and val.bin.part, for publish(): the tokens of each document, then end_of_text.

    splits: {name: memory-mapped datasets.Dataset}; column: where the text is; inputs: whatever decides the content, for
    JSON: work done for other inputs is not continued; num_proc: processes; step: documents that one takes at a time.
    Returns {name: tokens}. UserError if the disk is full, a process dies, or Ctrl-C is pressed."""
    journal = Journal(folder, inputs)
    spawn = multiprocessing.get_context('spawn')  # the threads of torch and Arrow do not survive a fork
    pool = ProcessPoolExecutor(num_proc, spawn, _start_worker, (splits, column, tokenizer))
    try:
        with explained(OSError, prefix=f'{folder} could not be written, and the same command will go on from here: '):
            return {split: _write_part(pool, 3 * num_proc, journal, split, len(documents), step)
                    for split, documents in splits.items()}
    except BrokenProcessPool:
        raise UserError('a worker process died, likely for lack of memory: run the same command with a smaller '
                        'num_proc, it goes on from here') from None
    except KeyboardInterrupt:
        raise UserError('interrupted: the same command goes on from here') from None
    finally:
        pool.shutdown(cancel_futures=True)


_work = {}  # filled once: nothing large travels with a task


def _start_worker(splits, column, tokenizer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    threading.Thread(target=_follow_parent, daemon=True).start()
    _work.update(splits=splits, column=column, tokenizer=tokenizer)


def _follow_parent():
    """Ends this process when the parent has been killed, which the queue between them would not tell."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize(split, first, last):
    """Packed tokens of the documents first to last - 1; a null is an empty document."""
    texts = _work['splits'][split][first:last][_work['column']]
    return pack(_work['tokenizer'].encode_documents([text or '' for text in texts]), _work['tokenizer'].vocab_size)


class Journal:
    """How far each .part file of a folder is, kept in its progress.json."""

    def __init__(self, folder, inputs):
        self.folder, self.path = folder, os.path.join(folder, 'progress.json')
        self.state = {'inputs': hashlib.sha256(json.dumps(inputs).encode()).hexdigest()}
        try:
            with open(self.path, encoding='utf-8') as file:
                found = json.load(file)
        except (OSError, ValueError):
            return
        if found.get('inputs') == self.state['inputs']:
            self.state = found

    def part(self, split):
        return os.path.join(self.folder, f'{split}.bin.part')

    def position(self, split):
        """(documents, bytes, tokens) that the .part file surely holds."""
        position = self.state.get(split, (0, 0, 0))
        there = os.path.exists(self.part(split)) and os.path.getsize(self.part(split)) >= position[1]
        return position if there else (0, 0, 0)

    def save(self, split, file, documents, tokens):
        file.flush()
        os.fsync(file.fileno())  # first: the note must never be ahead of the file
        self.state[split] = documents, file.tell(), tokens
        replace_file(self.path, json.dumps(self.state).encode())


def _in_order(pool, in_flight, split, first, documents, step):
    """Yields (documents done, their tokens) from document first on, with a bounded number of tasks waiting."""
    waiting = collections.deque()
    for start in range(first, documents, step):
        last = min(start + step, documents)
        waiting.append((last, pool.submit(_tokenize, split, start, last)))
        if len(waiting) == in_flight:
            last, future = waiting.popleft()
            yield last, future.result()
    for last, future in waiting:
        yield last, future.result()


def _write_part(pool, in_flight, journal, split, documents, step):
    """Completes the .part file of a split. Returns its number of tokens."""
    done, size, tokens = journal.position(split)
    if done:
        print(f'{split}: going on after {done:,} of {documents:,} documents', flush=True)
    with open(journal.part(split), 'r+b' if done else 'wb') as file, \
            tqdm(total=documents, initial=done, desc=split, unit=' documents', disable=None) as bar:
        file.truncate(size)
        file.seek(size)
        began = saved = printed = time.monotonic()
        done_before, tokens_before = done, tokens
        for last, packed in _in_order(pool, in_flight, split, done, documents, step):
            file.write(packed)
            bar.update(last - done)
            done, tokens, now = last, tokens + len(packed), time.monotonic()
            if now - saved >= SAVE_SECONDS:
                journal.save(split, file, done, tokens)
                saved = now
            if bar.disable and (now - printed >= LINE_SECONDS or done == documents):
                speed = (tokens - tokens_before) / (now - began)
                minutes = (documents - done) * (now - began) / (done - done_before) / 60
                print(f'{split}: {done:,} of {documents:,} documents, {speed:,.0f} tokens/s, '
                      f'{minutes:.1f} minutes left', flush=True)
                printed = now
        journal.save(split, file, done, tokens)
    return tokens
