"""data/openwebtext/prepare.py on small corpora made here."""
import collections
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, or_skip, run, succeeded

from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import read_meta
from plaingpt.text.tokenizers import GPT2Tokenizer

SCRIPT = ROOT / 'data' / 'openwebtext' / 'prepare.py'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own for datasets, here and in subprocesses."""
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    return tmp_path


@pytest.fixture
def prepare(cache):
    """prepare.py as a module, its keys set for a small corpus."""
    spec = importlib.util.spec_from_file_location('prepare_openwebtext', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.dataset = str(cache / 'out')
    module.num_proc = 1
    module.test_size = 0.25
    return module


def documents_of(folder, tokenizer):
    """{split: texts} of a data set whose documents end with <|endoftext|>."""
    texts = {}
    for split in ('train', 'val'):
        ids = np.fromfile(folder / f'{split}.bin', '<u2')
        ends = np.flatnonzero(ids == tokenizer.end_of_text)
        assert ends[-1] == len(ids) - 1
        texts[split] = []
        for document in np.split(ids, ends + 1)[:-1]:
            texts[split].append(tokenizer.decode(document[:-1].tolist()))
    return texts


# ---- documents of one's own ----

def make_jsonl(folder):
    texts = ['one', 'a <|endoftext|> within', None, 'four\n\nlines', 'Grüße €']
    lines = [json.dumps({'id': i, 'body': text}) for i, text in enumerate(texts)]
    (folder / 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    return '*.jsonl', 'body', [text or '' for text in texts]


def make_txt(folder):
    texts = []
    for i in range(5):
        texts.append(f'{i}\n\nand another paragraph of {i}\n')
        (folder / f'{i}.txt').write_text(texts[i], encoding='utf-8')
    return '*.txt', 'text', texts


@pytest.mark.parametrize('make', [make_jsonl, make_txt])
def test_documents_of_ones_own_are_tokenized_each_with_its_end(prepare, cache, make):
    tokenizer = or_skip(GPT2Tokenizer)
    pattern, column, texts = make(cache)
    prepare.data_files = str(cache / pattern)
    prepare.text_column = column
    prepare.main()
    found = documents_of(cache / 'out', tokenizer)
    assert collections.Counter(found['train'] + found['val']) == collections.Counter(texts)
    assert len(found['val']) == 2
    assert read_meta(str(cache / 'out'))['source'] == prepare.data_files
    assert sorted(os.listdir(cache / 'out')) == ['meta.json', 'train.bin', 'val.bin']


# Runs prepare.py, and kills it when its first progress is saved and more has been written.
KILLED = '''
import os, runpy, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from plaingpt.text import parallel_tokenization
save = parallel_tokenization.Journal.save

def save_and_die(journal, split, file, documents, tokens):
    save(journal, split, file, documents, tokens)
    if split == 'train':
        file.write(b'tokens that the journal does not know of')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

parallel_tokenization.SAVE_SECONDS = 0
parallel_tokenization.Journal.save = save_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(prepare, cache):
    import datasets
    tokenizer = or_skip(GPT2Tokenizer)
    random = np.random.default_rng(0)
    words = np.array(['the', 'state', 'of', 'Denmark,', 'is', 'rotten\n', 'Größe'])
    texts = []
    for _ in range(300):
        length = random.integers(1, 4000)
        texts.append(' '.join(words[random.integers(0, len(words), length)]))
    documents = datasets.Dataset.from_dict({'n': range(300), 'text': texts})
    documents.to_parquet(cache / 'a.parquet')

    # A run that nothing interrupts.
    whole = cache / 'out'
    prepare.data_files = f'{cache}/*.parquet'
    prepare.test_size = 0.02
    prepare.num_proc = 2
    prepare.main()
    split = documents.train_test_split(test_size=0.02, seed=2357, shuffle=True)
    expected = {'train': split['train']['text'], 'val': split['test']['text']}
    assert documents_of(whole, tokenizer) == {name: list(part) for name, part in expected.items()}

    # One that is killed; its worker notices and ends, too.
    parts = cache / 'parts'
    command = [SCRIPT, f'--dataset={parts}', f'--data_files={cache}/*.parquet', '--test_size=0.02',
               '--num_proc=1']
    killed = subprocess.Popen([sys.executable, '-c', KILLED, ROOT, *command],
                              start_new_session=True, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    assert killed.wait() == -signal.SIGKILL
    assert sorted(os.listdir(parts)) == ['progress.json', 'train.bin.part']
    with pytest.raises(ProcessLookupError):  # the process group is gone once its worker is
        for _ in range(100):
            os.killpg(killed.pid, 0)
            time.sleep(0.1)

    # The same command again.
    assert 'train: resuming after' in succeeded(run(*command))
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(os.listdir(parts)) == ['meta.json', 'train.bin', 'val.bin']


# ---- refusals ----

def test_unusable_documents_are_refused(prepare, cache, monkeypatch):
    import datasets
    table = datasets.Dataset.from_dict({'n': [1, 2], 'body': ['a', 'b']})
    table.to_parquet(cache / 'two.parquet')
    table.select([0]).to_parquet(cache / 'one.parquet')
    (cache / 'broken.parquet').write_bytes(b'PAR1 and no more')
    (cache / 'broken.jsonl').write_text('{"body": "a"}\n{"body":')
    (cache / 'latin.txt').write_bytes('naïve'.encode('latin-1'))
    (cache / 'a.csv').touch()

    def refuses(files, column, sentence):
        prepare.data_files = str(cache / files)
        prepare.text_column = column
        with pytest.raises(UserError, match=sentence) as error:
            prepare.main()
        assert '\n' not in str(error.value)
        assert not (cache / 'out' / 'progress.json').exists()

    refuses('none*.parquet', 'body', 'no file matches')
    refuses('*.csv', 'body', r'end in \.csv')
    refuses('*.*', 'body', r'end in \.csv, \.jsonl, \.parquet, \.txt')
    refuses('two.parquet', 'text', "no column 'text': choose one of n, body")
    refuses('two.parquet', 'n', "'n' .* holds int64, not text")
    refuses('one.parquet', 'body', 'fewer than 2 documents')
    refuses('broken.parquet', 'body', 'broken.parquet could not be loaded')
    refuses('broken.jsonl', 'body', 'broken.jsonl could not be loaded')
    refuses('latin.txt', 'text', 'latin.txt could not be loaded')
    prepare.test_size = 0.75
    refuses('two.parquet', 'body', 'test_size=0.75')

    def full(_):
        return collections.namedtuple('Usage', 'free')(0)

    monkeypatch.setattr(prepare.shutil, 'disk_usage', full)
    refuses('two.parquet', 'body', 'GB more than the disk has free')


def test_a_hub_that_is_out_of_reach_is_one_sentence(prepare, monkeypatch):
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach the Hub") from OSError('Name or service not known')

    monkeypatch.setattr(datasets, 'load_dataset', no_network)
    expected = 'Skylion007/openwebtext could not be loaded .*not known.*--data_files'
    with pytest.raises(UserError, match=expected):
        prepare.main()


def test_another_number_of_documents_on_the_hub_is_warned_of(prepare, monkeypatch, capsys):
    import datasets

    def one_document(*_, **__):
        return datasets.Dataset.from_dict({'text': ['a']})

    monkeypatch.setattr(datasets, 'load_dataset', one_document)
    with pytest.raises(UserError, match='fewer than 2'):
        prepare.main()
    warning = capsys.readouterr().err
    assert '1 documents, but the published losses belong to 8,013,769' in warning


def test_a_bug_while_loading_keeps_its_traceback(prepare, monkeypatch):
    import datasets

    def bug(*_, **__):
        raise TypeError('a bug')

    monkeypatch.setattr(datasets, 'load_dataset', bug)
    with pytest.raises(TypeError, match='a bug'):
        prepare.main()


def test_a_missing_package_is_one_sentence_with_the_command(prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='pip install datasets'):
        prepare.main()
