"""
The sample of a corpus on which tokenizers are compared: texts from all over it, cut in two halves.
"""
from typing import NamedTuple

import numpy as np

from plaingpt.corpus.documents import Skipped
from plaingpt.corpus.progress import Progress
from plaingpt.corpus.splitting import hash_of
from plaingpt.corpus.vocabulary import spread
from plaingpt.corpus.worker_pool import WorkerPool
from plaingpt.corpus.words import code_points
from plaingpt.inspection.characters import FIRST_SCRIPT, SCRIPT_NAMES, class_table
from plaingpt.inspection.chunk_survey import kind_of_file
from plaingpt.system.messages import UserError
from plaingpt.text.token_bytes import utf8_length

PARTS = 16  # of a sample, at least, so that both halves get some


class Text(NamedTuple):
    """A document of the sample, or a part of a large one."""
    text: str
    bytes: int      # in UTF-8
    key: int        # hash of the text
    extension: str  # of the file that it is from
    script: str     # of most of its letters


def sample_documents(work, chunk):
    """The documents of a chunk, [(text, extension), …], and what was Skipped.

    For WorkerPool.map()."""
    documents, skipped = chunk.documents(work.reading)
    return [(document.text, kind_of_file(document.origin)) for document in documents], skipped


def read_sample(source, work, num_proc, sample_bytes):
    """Reads documents from all over a source: a list of Texts, none of which is most of it.

    UserError if there are none."""
    documents = []
    skipped = Skipped()
    skipped.merge(source.skipped)
    with (Progress('sampling', source.size) as progress,
          WorkerPool(num_proc, work) as pool):
        for chunk, (found, left_out) in pool.map(sample_documents, spread(source, sample_bytes)):
            progress.show(chunk.bytes_read)
            documents += found
            skipped.merge(left_out)
    if not any(text for text, _ in documents):
        raise UserError(f'there is no text to compare tokenizers on{_reasons(skipped)}: name other '
                        'files with --files')
    # A chunk is at least a megabyte, which may be more than was asked for.
    chars = sum(len(text) for text, _ in documents)
    longest = max(1, min(chars, sample_bytes) // PARTS)
    parts = []
    for text, extension in documents:
        for part in _cut(text, longest):
            parts.append(Text(part, utf8_length(part), hash_of(part), extension,
                              script_of(part)))
    parts.sort(key=lambda part: (part.key, part.text))
    return _first_bytes(parts, sample_bytes)


def _reasons(skipped):
    """Why documents were left out, to follow a sentence, or nothing."""
    reasons = []
    for reason, count in skipped.counts.items():
        documents = 'document was' if count == 1 else 'documents were'
        reasons.append(f'{count:,} {documents} left out ({reason}), such as '
                       f'{skipped.examples[reason]}')
    if not reasons:
        return ''
    return f', because {" and ".join(reasons)}'


def _cut(text, longest):
    """Yields parts of a text with at most so many characters, which end at a line if they can."""
    begin = 0
    while begin < len(text):
        end = begin + longest
        line_break = text.rfind('\n', begin, end)
        if end < len(text) and line_break > begin:
            end = line_break + 1
        yield text[begin:end]
        begin = end


def _first_bytes(texts, most):
    """The first texts, at least one, with at most so many bytes in all."""
    total = 0
    for number, text in enumerate(texts):
        total += text.bytes
        if total > most and number > 0:
            return texts[:number]
    return texts


def halves_of(texts):
    """Divides Texts, sorted by hash, into those to train on and those to measure on.

    UserError if there are too few."""
    half = sum(text.bytes for text in texts) / 2
    training = _first_bytes(texts, half)
    measured = texts[len(training):]
    if not measured:
        raise UserError('the sample has too little text to compare tokenizers on: name more with '
                        '--files, or choose a larger --sample_bytes')
    return training, measured


def script_of(text):
    """The name of the script that most letters of a text belong to: 'Latin'."""
    classes = class_table()[code_points(text[:4000])].astype(np.int64) - FIRST_SCRIPT
    counts = np.bincount(classes[(classes >= 0) & (classes < len(SCRIPT_NAMES))],
                         minlength=len(SCRIPT_NAMES))
    if not counts.any():
        return 'no letters'
    kana = SCRIPT_NAMES.index('kana')
    han = SCRIPT_NAMES.index('Han')
    # Japanese is written in both.
    if counts[kana] * 10 > counts[han] and counts[kana] + counts[han] > counts.sum() / 2:
        return 'kana and Han'
    return SCRIPT_NAMES[counts.argmax()]


def line_of(texts):
    """A line of the texts to show as an example, or None."""
    for text in texts:
        for line in text.text.split('\n'):
            letters = sum(char.isalpha() for char in line)
            if 30 <= len(line) <= 90 and letters > len(line) / 2 and line.isprintable():
                return line
    return None
