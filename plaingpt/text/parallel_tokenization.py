"""
Tokenizes a corpus that does not fit into memory, on many cores.

A run that was interrupted in any way resumes where it stopped, and ends with the same bytes as one
that was not.
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
from typing import NamedTuple

from tqdm import tqdm

from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError, explained
from plaingpt.text.token_files import pack

SAVE_SECONDS = 1           # between saves of the progress
LINE_SECONDS = 30          # between printed lines where no terminal shows a progress bar
TASKS_PER_PROCESS = 3      # waiting or running: enough to keep all busy, few enough for memory


def tokenize_splits(folder, splits, column, tokenizer, inputs, num_proc, documents_per_task):
    """Writes folder/train.bin.part and val.bin.part, which publish() makes a data set.

    splits: {'train': documents, 'val': documents}, memory-mapped datasets.Datasets.
    column: the one that holds a document's text.
    tokenizer: its encode_documents() encodes the documents and ends each with end_of_text.
    inputs: everything that decides the result, as a value for JSON. Work on other inputs is not
    continued.
    num_proc: number of worker processes.

    Returns {split: number of tokens}. UserError if the disk is full, a worker dies, or Ctrl-C is
    pressed."""
    journal = Journal(folder, inputs)
    # 'spawn', because the threads of torch and Arrow do not survive a fork.
    context = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(num_proc, context, _start_worker, (splits, column, tokenizer))
    tokens = {}
    try:
        with explained(OSError, prefix=f'{folder} could not be written (the same command resumes '
                                       'from here): '):
            for split, documents in splits.items():
                tasks = Tasks(pool, split, len(documents), documents_per_task,
                              max_waiting=TASKS_PER_PROCESS * num_proc)
                tokens[split] = _write_part(journal, tasks)
    except BrokenProcessPool:
        raise UserError('a worker process died, probably because memory ran out: run the same '
                        'command with a smaller num_proc to resume') from None
    except KeyboardInterrupt:
        raise UserError('interrupted: run the same command again to resume') from None
    finally:
        pool.shutdown(cancel_futures=True)
    return tokens


def _write_part(journal, tasks):
    """Completes the .part file of a split. Returns its number of tokens."""
    split = tasks.split
    begin = journal.position(split)
    if begin.documents > 0:
        print(f'{split}: resuming after {begin.documents:,} of {tasks.num_documents:,} documents',
              flush=True)
    mode = 'r+b' if begin.documents > 0 else 'wb'
    with (open(journal.part(split), mode) as file,
          tqdm(total=tasks.num_documents, initial=begin.documents, desc=split, unit=' documents',
               disable=None) as bar):  # None: only where the output is a terminal
        # A killed run may have written more than its journal knows of.
        file.truncate(begin.bytes)
        file.seek(begin.bytes)

        lines = ProgressLines(split, begin, tasks.num_documents)
        done = begin.documents
        tokens = begin.tokens
        saved = time.monotonic()
        for last, packed in tasks.results(first=done):
            file.write(packed)
            bar.update(last - done)
            done = last
            tokens += len(packed)
            if bar.disable:
                lines.show(done, tokens)
            if time.monotonic() - saved >= SAVE_SECONDS:
                journal.save(split, file, done, tokens)
                saved = time.monotonic()
        journal.save(split, file, done, tokens)
    return tokens


# ---- the worker processes ----

_work = {}  # of a worker: splits, column and tokenizer, sent once so that tasks stay small


def _start_worker(splits, column, tokenizer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work.update(splits=splits, column=column, tokenizer=tokenizer)


def _end_with_parent():
    """Ends this process when its parent is killed, which the queue between them can't tell."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize(split, first, last):
    """The packed tokens of documents first to last - 1. A null counts as an empty document."""
    texts = _work['splits'][split][first:last][_work['column']]
    tokenizer = _work['tokenizer']
    ids = tokenizer.encode_documents([text or '' for text in texts])
    return pack(ids, tokenizer.vocab_size)


class Tasks:
    """The work on one split, cut into tasks of documents_per_task documents."""

    def __init__(self, pool, split, num_documents, documents_per_task, max_waiting):
        self.pool = pool
        self.split = split
        self.num_documents = num_documents
        self.documents_per_task = documents_per_task
        self.max_waiting = max_waiting  # the results of more would not fit into memory

    def results(self, first):
        """Yields (documents done, packed tokens of the last ones) in order, from document first."""
        waiting = collections.deque()
        for start in range(first, self.num_documents, self.documents_per_task):
            last = min(start + self.documents_per_task, self.num_documents)
            waiting.append((last, self.pool.submit(_tokenize, self.split, start, last)))
            if len(waiting) == self.max_waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


# ---- progress: saved, and shown ----

class Position(NamedTuple):
    """How far a .part file is."""
    documents: int
    bytes: int
    tokens: int


class Journal:
    """Keeps how far each .part file of a folder is, in the folder's progress.json."""

    def __init__(self, folder, inputs):
        self.folder = folder
        self.path = os.path.join(folder, 'progress.json')
        digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        self.state = {'inputs': digest}
        try:
            with open(self.path, encoding='utf-8') as file:
                found = json.load(file)
        except (OSError, ValueError):
            return  # no earlier run, or nothing that can be trusted
        if found.get('inputs') == digest:
            self.state = found

    def part(self, split):
        """The path of a split's .part file."""
        return os.path.join(self.folder, f'{split}.bin.part')

    def position(self, split):
        """The Position that is certainly on disk."""
        position = Position(*self.state.get(split, (0, 0, 0)))
        path = self.part(split)
        is_intact = os.path.exists(path) and os.path.getsize(path) >= position.bytes
        return position if is_intact else Position(0, 0, 0)

    def save(self, split, file, documents, tokens):
        """Saves that the open .part file holds so many documents and tokens."""
        # The file reaches the disk first, so that the journal is never ahead of it.
        file.flush()
        os.fsync(file.fileno())
        self.state[split] = Position(documents, file.tell(), tokens)
        write_atomically(self.path, json.dumps(self.state).encode())


class ProgressLines:
    """Prints the progress every LINE_SECONDS, in place of a progress bar."""

    def __init__(self, split, begin, num_documents):
        self.split = split
        self.begin = begin
        self.num_documents = num_documents
        self.began = time.monotonic()
        self.printed = self.began

    def show(self, documents, tokens):
        """Prints a line if one is due, or if these are all documents."""
        now = time.monotonic()
        if now - self.printed < LINE_SECONDS and documents < self.num_documents:
            return
        self.printed = now
        seconds = now - self.began
        tokens_per_second = (tokens - self.begin.tokens) / seconds
        seconds_per_document = seconds / (documents - self.begin.documents)
        minutes_left = (self.num_documents - documents) * seconds_per_document / 60
        print(f'{self.split}: {documents:,} of {self.num_documents:,} documents, '
              f'{tokens_per_second:,.0f} tokens/s, {minutes_left:.1f} minutes left', flush=True)
