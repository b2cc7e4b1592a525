"""data/openwebtext/prepare.py and data/parallel.py, on small corpora made here."""
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
from plaingpt.text import parallel
from plaingpt.text.data_sets import read_meta
from plaingpt.text.tokenizers import GPT2Tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own for datasets, here and in subprocesses."""
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    return tmp_path


@pytest.fixture
def prepare(cache):
    """openwebtext/prepare.py as a module, its keys set for a small corpus."""
    path = ROOT / 'data' / 'openwebtext' / 'prepare.py'
    spec = importlib.util.spec_from_file_location('prepare_openwebtext', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.dataset, module.num_proc, module.test_size = str(cache / 'out'), 1, 0.25
    return module


def documents_of(folder, tokenizer):
    """{split: texts} of a data set whose documents end with <|endoftext|>."""
    texts = {}
    for split in 'train', 'val':
        ids = np.fromfile(folder / f'{split}.bin', '<u2')
        assert ids[-1] == tokenizer.end_of_text
        pieces = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)[:-1]
        texts[split] = [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]
    return texts


def make_jsonl(folder):
    texts = ['one', 'a <|endoftext|> within', None, 'four\n\nlines', 'Grüße €']
    lines = [json.dumps({'id': i, 'body': text}) for i, text in enumerate(texts)]
    (folder / 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    return '*.jsonl', 'body', [text or '' for text in texts]


def make_txt(folder):
    texts = [f'{i}\n\nand another paragraph of {i}\n' for i in range(5)]
    for i, text in enumerate(texts):
        (folder / f'{i}.txt').write_text(text, encoding='utf-8')
    return '*.txt', 'text', texts


@pytest.mark.parametrize('make', [make_jsonl, make_txt])
def test_files_of_ones_own(prepare, cache, make):
    tokenizer = or_skip(GPT2Tokenizer)
    pattern, prepare.text_column, texts = make(cache)
    prepare.data_files = str(cache / pattern)
    prepare.main()
    found = documents_of(cache / 'out', tokenizer)
    assert collections.Counter(found['train'] + found['val']) == collections.Counter(texts)
    assert len(found['val']) == 2 and read_meta(str(cache / 'out'))['source'] == prepare.data_files
    assert sorted(os.listdir(cache / 'out')) == ['meta.json', 'train.bin', 'val.bin']


KILLED = '''
import os, runpy, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from plaingpt.text import parallel
save = parallel.Journal.save

def save_and_die(journal, split, file, documents, tokens):
    save(journal, split, file, documents, tokens)
    if split == 'train':
        file.write(b'tokens that the journal does not know of')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

parallel.SAVE_SECONDS, parallel.Journal.save = 0, save_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_with_the_same_bytes(prepare, cache):
    import datasets
    tokenizer = or_skip(GPT2Tokenizer)
    random = np.random.default_rng(0)
    words = np.array(['the', 'state', 'of', 'Denmark,', 'is', 'rotten\n', 'Größe'])
    texts = [' '.join(words[random.integers(0, len(words), random.integers(1, 4000))]) for _ in range(300)]
    datasets.Dataset.from_dict({'n': range(300), 'text': texts}).to_parquet(cache / 'a.parquet')
    whole, parts = cache / 'out', cache / 'parts'
    prepare.data_files, prepare.test_size, prepare.num_proc = f'{cache}/*.parquet', 0.02, 2
    prepare.main()
    split = datasets.Dataset.from_dict({'text': texts}).train_test_split(test_size=0.02, seed=2357, shuffle=True)
    assert documents_of(whole, tokenizer) == {'train': split['train']['text'], 'val': split['test']['text']}

    command = [ROOT / 'data' / 'openwebtext' / 'prepare.py', f'--dataset={parts}', f'--data_files={cache}/*.parquet',
               '--test_size=0.02', '--num_proc=1']
    killed = subprocess.Popen([sys.executable, '-c', KILLED, ROOT, *command], start_new_session=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert killed.wait() == -signal.SIGKILL
    assert sorted(os.listdir(parts)) == ['progress.json', 'train.bin.part']
    with pytest.raises(ProcessLookupError):  # once its worker has noticed and is gone, the group is
        for _ in range(100):
            os.killpg(killed.pid, 0)
            time.sleep(0.1)

    assert 'train: going on after' in succeeded(run(*command))
    for name in 'train.bin', 'val.bin', 'meta.json':
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(os.listdir(parts)) == ['meta.json', 'train.bin', 'val.bin']


def test_journal_of_other_inputs_or_of_a_lost_file_counts_for_nothing(tmp_path):
    with open(tmp_path / 'train.bin.part', 'wb') as file:
        file.write(b'123456')
        parallel.Journal(str(tmp_path), {'seed': 1}).save('train', file, 2, 3)
    assert tuple(parallel.Journal(str(tmp_path), {'seed': 1}).position('train')) == (2, 6, 3)
    assert parallel.Journal(str(tmp_path), {'seed': 2}).position('train') == (0, 0, 0)
    os.truncate(tmp_path / 'train.bin.part', 5)
    assert parallel.Journal(str(tmp_path), {'seed': 1}).position('train') == (0, 0, 0)


class FailingTokenizer:
    vocab_size, end_of_text = 10, 0

    def __init__(self, error):
        self.error = error

    def encode_documents(self, texts):
        if self.error:
            raise self.error
        os._exit(1)  # as when the kernel kills a process for its memory


class Slices(dict):
    """As much of a datasets.Dataset as a worker uses."""

    def __getitem__(self, key):
        return {name: values[key] for name, values in self.items()}


@pytest.mark.parametrize('error, kind', [(ValueError('the document'), ValueError), (None, UserError)])
def test_failure_of_a_worker_surfaces(tmp_path, error, kind):
    splits = {'train': Slices(text=['a'])}
    with pytest.raises(kind, match='the document' if error else 'worker process died'):
        parallel.write_parts(str(tmp_path), splits, 'text', FailingTokenizer(error), 'inputs', num_proc=1, step=1)


def test_unusable_documents_are_refused(prepare, cache, monkeypatch):
    import datasets
    table = datasets.Dataset.from_dict({'n': [1, 2], 'body': ['a', 'b']})
    table.to_parquet(cache / 'two.parquet')
    table.select([0]).to_parquet(cache / 'one.parquet')
    (cache / 'broken.parquet').write_bytes(b'PAR1 and no more')
    (cache / 'a.csv').touch()

    def refuses(files, column, sentence):
        prepare.data_files, prepare.text_column = str(cache / files), column
        with pytest.raises(UserError, match=sentence) as error:
            prepare.main()
        assert '\n' not in str(error.value) and not (cache / 'out' / 'progress.json').exists()

    refuses('none*.parquet', 'body', 'no file matches')
    refuses('*.csv', 'body', r'end in \.csv')
    refuses('*.*', 'body', r'end in \.csv, \.parquet')
    refuses('two.parquet', 'text', "no column 'text': choose one of n, body")
    refuses('two.parquet', 'n', "'n' .* holds int64, not text")
    refuses('one.parquet', 'body', 'fewer than 2 documents')
    refuses('broken.parquet', 'body', 'broken.parquet could not be loaded')
    prepare.test_size = 0.75
    refuses('two.parquet', 'body', 'test_size=0.75')
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda _: collections.namedtuple('Usage', 'free')(0))
    refuses('two.parquet', 'body', 'GB more than the disk has free')


def test_hub_out_of_reach_or_changed(prepare, monkeypatch, capsys):
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach the Hub") from OSError('Name or service not known')

    monkeypatch.setattr(datasets, 'load_dataset', no_network)
    with pytest.raises(UserError, match='Skylion007/openwebtext could not be loaded .*not known.*--data_files'):
        prepare.main()
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: datasets.Dataset.from_dict({'text': ['a']}))
    with pytest.raises(UserError, match='fewer than 2'):
        prepare.main()
    assert '1 documents, not the 8,013,769' in capsys.readouterr().err
