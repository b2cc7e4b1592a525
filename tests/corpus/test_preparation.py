"""Preparing a corpus: what the token files hold, also after interruptions."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from filelock import FileLock
from pools import Here

from plaingpt.corpus import compressed_files, large_files, preparation, record_files
from plaingpt.corpus.counts import Counts
from plaingpt.corpus.documents import Document, Reading
from plaingpt.corpus.file_search import find
from plaingpt.corpus.journal import Journal
from plaingpt.corpus.preparation import prepare
from plaingpt.corpus.readers import Source
from plaingpt.corpus.splitting import Splitting
from plaingpt.corpus.tokenization import Work, tokenize
from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import read_meta
from plaingpt.text.tokenizer_choice import choose
from plaingpt.text.tokenizers import CharTokenizer


@pytest.fixture
def in_one_process(monkeypatch):
    monkeypatch.setattr(preparation, 'WorkerPool', Here)


def write_records(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts), encoding='utf-8')


def prepared(path, folder, by='document', test_size=0.25, shard_tokens=0, dedup='none', **reading):
    """Prepares a file with single bytes as tokens. Returns the texts of each split, and Counts."""
    reading = Reading(**reading)
    work = Work(reading, Splitting(test_size, by), dedup=dedup)
    tokenizer = choose('byte').tokenizer()
    counts = prepare(str(folder), Source(find(str(path)), reading), work, tokenizer, 1, 'name',
                     shard_tokens)
    texts = {}
    for split in ('train', 'val'):
        names = sorted(name for name in os.listdir(folder)
                       if name.startswith(split) and name.endswith('.bin') and 'mask' not in name)
        ids = np.concatenate([np.fromfile(folder / name, '<u2') for name in names])
        ends = np.flatnonzero(ids == tokenizer.end_of_text)
        assert ends[-1] == len(ids) - 1
        documents = np.split(ids, ends + 1)[:-1]
        texts[split] = [tokenizer.decode(document[:-1].tolist()) for document in documents]
    return texts, counts


TEXTS = [f'document {i}\n{"xxxxxx"[:i % 7]}' for i in range(60)]


@pytest.mark.parametrize('shard_tokens', [0, 100])
def test_each_document_is_in_one_split_in_the_order_of_the_files(tmp_path, in_one_process,
                                                                 shard_tokens):
    write_records(tmp_path / 'a.jsonl', TEXTS)
    texts, counts = prepared(tmp_path / 'a.jsonl', tmp_path / 'out', shard_tokens=shard_tokens)
    split = Splitting(0.25, 'document')
    for name in ('train', 'val'):
        assert texts[name] == [text for text in TEXTS if split.split_of(Document(text, '')) == name]
        assert counts.documents[name] == len(texts[name])
        assert counts.tokens[name] == sum(len(text) + 1 for text in texts[name])
    assert counts.bytes == sum(map(len, TEXTS))
    assert read_meta(str(tmp_path / 'out'))['tokens'] == counts.tokens
    left = [name for name in os.listdir(tmp_path / 'out') if 'part' in name or 'progress' in name]
    assert left == []


def test_added_documents_move_none_between_splits(tmp_path, in_one_process):
    write_records(tmp_path / 'a.jsonl', TEXTS)
    before, _ = prepared(tmp_path / 'a.jsonl', tmp_path / 'before')
    write_records(tmp_path / 'a.jsonl', ['new', *TEXTS[::-1], 'newer'])
    after, _ = prepared(tmp_path / 'a.jsonl', tmp_path / 'after')
    for split in ('train', 'val'):
        assert set(before[split]) <= set(after[split])


def test_the_tail_of_each_document_may_be_val(tmp_path, in_one_process):
    write_records(tmp_path / 'a.jsonl', ['abcd', 'efgh'])
    texts, _ = prepared(tmp_path / 'a.jsonl', tmp_path / 'out', by='tail')
    assert texts == {'train': ['abc', 'efg'], 'val': ['d', 'h']}


def test_repeated_documents_are_dropped_across_chunks(tmp_path, in_one_process, monkeypatch):
    monkeypatch.setattr(record_files, 'CHUNK_BYTES', 100)
    write_records(tmp_path / 'a.jsonl', TEXTS + TEXTS[::2])
    texts, counts = prepared(tmp_path / 'a.jsonl', tmp_path / 'out', dedup='exact')
    assert sorted(texts['train'] + texts['val']) == sorted(TEXTS)
    assert counts.duplicates == 30
    assert counts.lengths.documents == 60
    assert any(line.startswith('dropped    30') for line in counts.describe('exact'))


def test_repeated_documents_are_counted_without_dedup(tmp_path, in_one_process):
    write_records(tmp_path / 'a.jsonl', TEXTS + TEXTS[:5])
    texts, counts = prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    assert len(texts['train'] + texts['val']) == 65
    assert any(line.startswith('repeated   5') for line in counts.describe('none'))


def test_a_large_document_counts_once_in_each_split(tmp_path, in_one_process, monkeypatch):
    monkeypatch.setattr(large_files, 'PIECE_BYTES', 64)
    (tmp_path / 'a.txt').write_text('\n'.join(TEXTS))
    texts, counts = prepared(tmp_path / 'a.txt', tmp_path / 'out', by='tail')
    assert ''.join(texts['train'] + texts['val']) == '\n'.join(TEXTS)
    assert counts.documents == {'train': 1, 'val': 1}
    assert counts.lengths.documents == 1


def test_a_text_that_the_tokenizer_lacks_is_named(tmp_path, in_one_process):
    write_records(tmp_path / 'a.jsonl', ['abc', 'abd'])
    source = Source(find(str(tmp_path / 'a.jsonl')), Reading())
    work = Work(Reading(), Splitting(0.5, 'tail'))
    with pytest.raises(UserError, match="^record 2 of .*a.jsonl: the character 'd'"):
        prepare(str(tmp_path / 'out'), source, work, CharTokenizer('abc'), 1, 'name')


def test_a_split_without_text_is_refused_before_anything_is_published(tmp_path, in_one_process):
    write_records(tmp_path / 'a.jsonl', TEXTS[:2])
    sentence = r'^val.bin would be empty: all documents \(2\) went to train; use --split=tail'
    with pytest.raises(UserError, match=sentence):
        prepared(tmp_path / 'a.jsonl', tmp_path / 'out', test_size=1e-9)
    assert not (tmp_path / 'out' / 'train.bin').exists()


def test_counts_are_told_in_words(tmp_path, in_one_process):
    for texts, told in [([], '0'), (['abc'], '1, with 3 characters'),
                        (['abc'] * 2, '2, with 3 characters each'),
                        (['a', 'abc', 'abcd'], '3, with 1 to 4 characters, 3 in the median')]:
        counts = Counts()
        counts.lengths.add([len(text) for text in texts])
        assert counts.describe('none')[0] == f'documents  {told}'
    write_records(tmp_path / 'a.jsonl', ['', 'abcd'])
    _, counts = prepared(tmp_path / 'a.jsonl', tmp_path / 'out', by='tail', min_chars=1)
    lines = counts.describe('none')
    assert lines[1] == f'left out   1: empty, such as record 1 of {tmp_path}/a.jsonl'
    assert lines[-1] == 'val        2 tokens (33.3%) of 1 document'


def test_without_documents_no_zeros_are_told(tmp_path, in_one_process, capsys):
    write_records(tmp_path / 'a.jsonl', [''])
    with pytest.raises(UserError, match='no document was found in the files: check --files'):
        prepared(tmp_path / 'a.jsonl', tmp_path / 'out', min_chars=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['documents', 'left']


def test_flags_are_named_only_if_the_script_has_them(tmp_path, in_one_process):
    counts = Counts(duplicates=1)
    counts.lengths.add([3, 3])
    assert counts.describe('none')[1] == 'repeated   1 equals an earlier one: --dedup=exact ' \
                                         'drops repetitions'
    assert counts.describe('none', names_flags=False)[1] == 'repeated   1 equals an earlier one'
    write_records(tmp_path / 'a.jsonl', TEXTS[:2])
    source = Source(find(str(tmp_path / 'a.jsonl')), Reading())
    source.splits_itself = True
    with pytest.raises(UserError, match='went to train; use another --test_size, or more text$'):
        prepare(str(tmp_path / 'out'), source, Work(Reading(), Splitting(1e-9, 'document')),
                choose('byte').tokenizer(), 1, 'name')


def test_special_tokens_in_the_text_stay_text(tmp_path, in_one_process):
    write_records(tmp_path / 'a.jsonl', ['<|endoftext|>' * 3] + TEXTS)
    texts, _ = prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    assert '<|endoftext|>' * 3 in texts['train'] + texts['val']


# ---- interrupted ----

def files_of(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


class Killed(Exception):
    pass


@pytest.mark.parametrize('dedup', ['none', 'exact'])
@pytest.mark.parametrize('shard_tokens', [0, 64])
def test_a_run_stopped_after_any_chunk_ends_with_the_same_bytes(tmp_path, in_one_process,
                                                                monkeypatch, dedup, shard_tokens):
    monkeypatch.setattr(record_files, 'CHUNK_BYTES', 100)
    monkeypatch.setattr(preparation, 'SAVE_SECONDS', 0)
    path = tmp_path / 'a.jsonl'
    write_records(path, TEXTS + TEXTS[::3])
    options = dict(dedup=dedup, shard_tokens=shard_tokens)
    prepared(path, tmp_path / 'whole', **options)
    whole = files_of(tmp_path / 'whole')

    chunks = len(list(Source(find(str(path)), Reading()).chunks()))
    assert chunks > 10
    for last in range(1, chunks, 6):
        folder = tmp_path / f'{last}'
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Journal, 'save', saving_only(last))
            prepared(path, folder, **options)
        for part in folder.glob('*.bin.part'):
            with open(part, 'ab') as file:
                file.write(b'what the journal does not know of')
        done_again = []
        with monkeypatch.context() as patch:
            patch.setattr(preparation, 'tokenize', noting(done_again))
            prepared(path, folder, **options)
        assert files_of(folder) == whole
        assert len(done_again) == chunks - last


def saving_only(number):
    """A Journal.save that ends the run after so many calls."""
    save = Journal.save
    saved = []

    def save_or_die(journal, state):
        save(journal, state)
        saved.append(state)
        if len(saved) == number:
            raise Killed

    return save_or_die


def noting(chunks):
    """tokenize(), which also appends its chunks to a list."""
    def tokenize_and_note(work, chunk):
        chunks.append(chunk)
        return tokenize(work, chunk)

    return tokenize_and_note


def test_other_inputs_are_not_resumed(tmp_path, in_one_process, monkeypatch):
    write_records(tmp_path / 'a.jsonl', TEXTS)
    def fail(*_, **__):
        raise UserError('the disk is full')

    with monkeypatch.context() as patch, pytest.raises(UserError, match='disk is full'):
        patch.setattr(preparation, 'publish', fail)
        prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    assert (tmp_path / 'out' / 'train.bin.part').exists()
    write_records(tmp_path / 'a.jsonl', TEXTS[:30])
    texts, _ = prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    assert sorted(texts['train'] + texts['val']) == sorted(TEXTS[:30])


def test_a_disk_that_seems_too_small_is_warned_of(tmp_path, in_one_process, monkeypatch, capsys):
    monkeypatch.setattr(record_files, 'CHUNK_BYTES', 100)
    monkeypatch.setattr(compressed_files, 'BUFFER_BYTES', 100)
    usage = type('Usage', (), {'free': 10})
    monkeypatch.setattr(preparation.shutil, 'disk_usage', lambda _: usage)
    write_records(tmp_path / 'a.jsonl', TEXTS)
    prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    assert capsys.readouterr().err.count('MB more than the disk has free') == 1


def test_a_full_disk_is_one_sentence_and_is_resumed(tmp_path, in_one_process, monkeypatch):
    write_records(tmp_path / 'a.jsonl', TEXTS)

    def full(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch, pytest.raises(UserError, match='resumes from here.*space'):
        patch.setattr(preparation.PartFiles, 'write', full)
        prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    texts, _ = prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    assert sorted(texts['train'] + texts['val']) == sorted(TEXTS)


def test_what_is_prepared_already_is_not_done_again(tmp_path, in_one_process, monkeypatch, capsys):
    write_records(tmp_path / 'a.jsonl', TEXTS)
    _, counts = prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    done = []
    monkeypatch.setattr(preparation, 'tokenize', noting(done))
    _, again = prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    assert again.to_json() == counts.to_json()
    assert not done and 'nothing is left to do' in capsys.readouterr().out
    # Another file, other keys, or files that something has cut: all is done.
    (tmp_path / 'out' / 'val.bin').write_bytes(b'')
    prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    prepared(tmp_path / 'a.jsonl', tmp_path / 'out', min_chars=1)
    write_records(tmp_path / 'a.jsonl', TEXTS[1:])
    prepared(tmp_path / 'a.jsonl', tmp_path / 'out', min_chars=1)
    assert len(done) == 3


def test_a_run_stopped_before_its_first_document_is_resumed(tmp_path, in_one_process, monkeypatch):
    write_records(tmp_path / 'a.jsonl', [''])
    for _ in range(2):
        with pytest.raises(UserError, match='no document was found'):
            prepared(tmp_path / 'a.jsonl', tmp_path / 'out', dedup='exact', min_chars=1)


def test_other_files_in_the_folder_stay(tmp_path, in_one_process):
    write_records(tmp_path / 'a.jsonl', TEXTS)
    (tmp_path / 'out' / 'dir.part').mkdir(parents=True)
    (tmp_path / 'out' / 'movie.mp4.part').touch()
    prepared(tmp_path / 'a.jsonl', tmp_path / 'out')
    assert sorted(os.listdir(tmp_path / 'out')) == [
        '.lock', 'dir.part', 'meta.json', 'movie.mp4.part', 'tokenizer.json', 'tokenizer.tiktoken',
        'train.bin', 'val.bin']


def test_two_preparations_of_one_folder_are_refused(tmp_path, in_one_process):
    write_records(tmp_path / 'a.jsonl', TEXTS)
    (tmp_path / 'out').mkdir()
    with (FileLock(tmp_path / 'out' / '.lock'),
          pytest.raises(UserError, match='another preparation is writing into .*--dataset')):
        prepared(tmp_path / 'a.jsonl', tmp_path / 'out')


SCRIPT = [sys.executable, ROOT / 'data' / 'prepare.py']


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(tmp_path):
    number = random.Random(0)
    words = ['the', 'state', 'of', 'Denmark,', 'is', 'rotten\n', 'Größe', '狐狸']
    folder = tmp_path / 'texts'
    folder.mkdir()
    for i in range(4):
        texts = [' '.join(number.choices(words, k=number.randint(1, 4000))) for _ in range(800)]
        write_records(folder / f'{i}.jsonl', texts)
    options = [f'--files={folder}/*.jsonl', '--tokenizer=bpe:290', '--dedup=exact', '--num_proc=2',
               '--shard_tokens=1000000', '--sample_bytes=2000000']

    def command(name):
        return [*SCRIPT, *options, f'--dataset={tmp_path / name}']

    start = time.monotonic()
    subprocess.run(command('whole'), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    kills = 0
    for _ in range(10):
        process = subprocess.Popen(command('parts'), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout=seconds * number.uniform(0.1, 1.1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        for _ in range(100):  # until the workers have noticed
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail('the workers of a killed preparation go on')
    assert kills >= 5
    subprocess.run(command('parts'), check=True, stdout=subprocess.DEVNULL)
    assert files_of(tmp_path / 'parts') == files_of(tmp_path / 'whole')
