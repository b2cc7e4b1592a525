"""
Measures tokenizers on texts: how many tokens they make, how fast, and how much of the vocabulary
they use.
"""
import contextlib
import os
import statistics
import time
from typing import NamedTuple

import numpy as np

from plaingpt.inspection.visible_tokens import visible_tokens
from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import rounded_vocab_size
from plaingpt.text.tokenizers import load_tokenizer

ROUNDS = 5               # of timing; in each, every tokenizer encodes a fifth of the texts
WARM_UP_BYTES = 200_000
CHECK_BYTES = 1_000_000  # of text that is decoded again


class Job(NamedTuple):
    """What to measure on."""
    measured: list   # of Texts
    warm_up: list    # of other Texts
    examples: list   # of str


def measure(metas, job):
    """Measures the tokenizers of {name: tokenizer dict} on a Job, for WorkerPool.map().

    Meanwhile the process is confined to one core, so it should do nothing else.

    Returns a list of dicts for JSON, one for each tokenizer: name, vocab_size, rounded_vocab_size
    (that of a new model), tokens and bytes of the texts, tokens_per_second (median; None if no
    round went well), used (number of ids), left_out (number of texts that the vocabulary can't
    express), reason (the error of the first of them), changed (number of the checked texts that
    decode to others), checked, of_kind (by attribute of a Text and its value: bytes and tokens),
    examples (see _Measured.examples())."""
    with _one_core():
        tokenizers = [_Measured(name, load_tokenizer(meta)) for name, meta in metas.items()]
        warm_up = _up_to(job.warm_up, WARM_UP_BYTES)
        for tokenizer in tokenizers:
            tokenizer.warm_up(warm_up)
        # No text is encoded twice, because some tokenizers remember words they have seen. They
        # take turns, so that a machine that slows down for a while slows all of them.
        for number in range(ROUNDS):
            texts = job.measured[number::ROUNDS]
            for tokenizer in tokenizers:
                tokenizer.encode(texts)
    checked = _up_to(job.measured, CHECK_BYTES)
    return [tokenizer.figures(checked, job.examples) for tokenizer in tokenizers]


@contextlib.contextmanager
def _one_core():
    """Confines this thread, and those that it starts, to one core where the system can do that."""
    if not hasattr(os, 'sched_setaffinity'):  # only Linux has it
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _up_to(texts, most):
    """The first Texts, with at most so many bytes in all."""
    chosen = []
    for text in texts:
        most -= text.bytes
        if most < 0:
            break
        chosen.append(text)
    return chosen


class _Measured:
    """A tokenizer, and the figures about it so far."""

    def __init__(self, name, tokenizer):
        self.name = name
        self.tokenizer = tokenizer
        self.tokens = 0
        self.bytes = 0       # of the texts that the vocabulary can express
        self.left_out = 0    # the number of others
        self.reason = None   # why the first of them was left out
        self.speeds = []     # tokens a second, of each round
        self.is_used = np.zeros(tokenizer.vocab_size, bool)
        self.of_kind = {'extension': {}, 'script': {}}

    def warm_up(self, texts):
        """Encodes Texts without counting them."""
        with contextlib.suppress(UserError):  # which the texts that count will raise again
            self.tokenizer.encode_corpus([text.text for text in texts])

    def encode(self, texts):
        """Encodes Texts, and counts what they become."""
        if not texts:
            return
        began = time.perf_counter()
        try:
            encoded = self.tokenizer.encode_corpus([text.text for text in texts])
        except UserError:
            encoded = [self._ids_or_none(text) for text in texts]
        else:
            seconds = time.perf_counter() - began
            self.speeds.append(sum(map(len, encoded)) / seconds)
        for text, ids in zip(texts, encoded, strict=True):
            if ids is not None:
                self._count(text, ids)

    def _ids_or_none(self, text):
        """The ids of a Text, or None, counted with its reason, if it can't be expressed."""
        try:
            return self.tokenizer.encode_corpus([text.text])[0]
        except UserError as error:
            self.left_out += 1
            self.reason = self.reason or str(error)
            return None

    def _count(self, text, ids):
        self.tokens += len(ids)
        self.bytes += text.bytes
        self.is_used[ids] = True
        for attribute, sums in self.of_kind.items():
            kind = getattr(text, attribute)
            total = sums.setdefault(kind, {'bytes': 0, 'tokens': 0})
            total['bytes'] += text.bytes
            total['tokens'] += len(ids)

    def figures(self, checked, examples):
        """The figures as a dict. checked: Texts that are decoded again."""
        vocab_size = self.tokenizer.vocab_size
        meta = {'vocab_size': vocab_size, 'tokenizer': self.tokenizer.to_meta()}
        return {'name': self.name, 'vocab_size': vocab_size,
                'rounded_vocab_size': rounded_vocab_size(meta),
                'tokens': self.tokens, 'bytes': self.bytes,
                'tokens_per_second': statistics.median(self.speeds) if self.speeds else None,
                'used': int(self.is_used.sum()), 'left_out': self.left_out,
                'reason': self.reason, 'checked': len(checked), 'changed': self._changed(checked),
                'of_kind': self.of_kind, 'examples': self.examples(examples)}

    def _changed(self, texts):
        """How many Texts decode to something else."""
        changed = 0
        for text in texts:
            try:
                ids = self.tokenizer.encode_corpus([text.text])[0]
            except UserError:
                continue  # it is among those left out
            if self.tokenizer.decode(ids.tolist()) != text.text:
                changed += 1
        return changed

    def examples(self, texts):
        """How each text is cut: a list of {'tokens': ['The', ' quick', …]} or {'problem': …}."""
        shown = []
        for text in texts:
            try:
                shown.append({'tokens': visible_tokens(self.tokenizer, text)})
            except UserError as error:
                shown.append({'problem': str(error)})
        return shown
