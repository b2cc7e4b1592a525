"""
The tokenizer of a new data set: a known one, or one that is made from the corpus first.

What was made is kept in the folder until the data set is finished, so that a preparation that
resumes goes on with the same tokenizer at once.
"""
import json
import os

from plaingpt.corpus.journal import TOKENIZER_FILE, claim, digest_of
from plaingpt.corpus.progress import Progress
from plaingpt.corpus.worker_pool import WorkerPool
from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError, explained
from plaingpt.text.tokenizers import load_tokenizer


def tokenizer_for(choice, folder, source, work, num_proc, sample_bytes):
    """The tokenizer of a Choice, made from the documents of a source if need be.

    work: a Work without a tokenizer. sample_bytes: of text that a trained tokenizer is made from.
    UserError if there is too little text, or the source can't be read."""
    if not choice.needs_text:
        return choice.tokenizer()
    claim(folder)
    path = os.path.join(folder, TOKENIZER_FILE)
    digest = digest_of([choice.name, source.identity, work.identity(), sample_bytes])
    saved = _saved(path, digest)
    if saved is not None:
        return saved
    try:
        with WorkerPool(num_proc, work) as pool:
            if choice.name == 'char':
                tokenizer = choice.train(_characters(pool, source))
            else:
                tokenizer = choice.train(_sample(pool, source, sample_bytes))
    except KeyboardInterrupt:
        raise UserError('interrupted: run the same command again') from None
    content = json.dumps({'inputs': digest, 'tokenizer': tokenizer.to_meta()})
    with explained(OSError, prefix=f'{folder} could not be written: '):
        write_atomically(path, content.encode())
    return tokenizer


def _saved(path, digest):
    """The tokenizer that an earlier run made of the same inputs, or None."""
    try:
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None  # no earlier run, or nothing that can be trusted
    if not isinstance(found, dict) or found.get('inputs') != digest:
        return None
    return load_tokenizer(found['tokenizer'])


# ---- characters ----

def characters_of(work, chunk):
    """The different characters of a chunk's documents, as one text, for WorkerPool.map()."""
    documents, _ = chunk.documents(work.reading)
    characters = set()
    for document in documents:
        characters.update(document.text)
    return ''.join(sorted(characters))


def _characters(pool, source):
    """Yields texts that hold all characters of a source."""
    with Progress('collecting characters', source.size) as progress:
        for chunk, text in pool.map(characters_of, source.chunks()):
            progress.show(chunk.bytes_read)
            yield text


# ---- a sample ----

def training_texts(work, chunk):
    """The texts of a chunk that go to train, for WorkerPool.map()."""
    documents, _ = chunk.documents(work.reading)
    texts = []
    for document in documents:
        for part in work.splitting.parts(document):
            if part.split == 'train':
                texts.append(part.text)
    return texts


def _sample(pool, source, sample_bytes):
    """Yields texts from all over a source, about sample_bytes of them in all."""
    with Progress('sampling', source.size) as progress:
        for chunk, texts in pool.map(training_texts, spread(source, sample_bytes)):
            progress.show(chunk.bytes_read)
            yield from texts


def spread(source, sample_bytes):
    """Yields chunks at equal distances, so many that their bytes add up to the sample.

    The bytes are those on disk: of compressed files, the sample is larger."""
    taken = 0
    before = 0  # bytes of the chunks so far
    for chunk in source.chunks():
        if taken * source.size <= before * sample_bytes:
            taken += chunk.bytes_read - before
            yield chunk
        before = chunk.bytes_read
