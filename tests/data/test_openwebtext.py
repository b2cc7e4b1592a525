"""data/openwebtext/prepare.py on small corpora made here."""
import importlib.util
import os
import sys

import numpy as np
import pytest
from conftest import ROOT, or_skip
from pools import Here

from plaingpt.corpus import dataset_source, preparation
from plaingpt.corpus.dataset_source import DatasetSource
from plaingpt.corpus.documents import Reading
from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import read_meta
from plaingpt.text.tokenizers import GPT2Tokenizer

SCRIPT = ROOT / 'data' / 'openwebtext' / 'prepare.py'


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare.py as a module, its keys set for a small corpus."""
    spec = importlib.util.spec_from_file_location('prepare_openwebtext', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.dataset = str(tmp_path / 'out')
    module.test_size = 0.25
    monkeypatch.setattr(preparation, 'WorkerPool', Here)
    return module


def hub_of(monkeypatch, texts):
    """Makes datasets.load_dataset() return these texts, which are also returned as a Dataset."""
    import datasets
    documents = datasets.Dataset.from_dict({'n': range(len(texts)), 'text': texts})
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: documents)
    return documents


def test_the_documents_are_split_and_ordered_as_by_nanogpt(prepare, tmp_path, monkeypatch, capsys):
    tokenizer = or_skip(GPT2Tokenizer)
    documents = hub_of(monkeypatch, [f'document {i}, a <|endoftext|> within' for i in range(40)])
    prepare.main()
    assert '40 documents, but the published losses belong to 8,013,769' in capsys.readouterr().err

    split = documents.train_test_split(test_size=0.25, seed=2357, shuffle=True)
    for name, part in (('train', split['train']), ('val', split['test'])):
        ids = np.fromfile(tmp_path / 'out' / f'{name}.bin', '<u2')
        expected = []
        for text in part['text']:
            expected += [*tokenizer.encode(text, special=False), tokenizer.end_of_text]
        assert ids.tolist() == expected
    assert read_meta(str(tmp_path / 'out'))['source'] == 'Skylion007/openwebtext'
    assert sorted(os.listdir(tmp_path / 'out')) == ['.lock', 'meta.json', 'train.bin', 'val.bin']


def test_a_dataset_is_read_on_from_each_place(monkeypatch):
    import datasets
    monkeypatch.setattr(dataset_source, 'CHUNK_BYTES', 60)
    documents = datasets.Dataset.from_dict({'text': [f'{i}' * 9 if i != 3 else None
                                                     for i in range(20)]})
    splits = documents.train_test_split(test_size=0.3, seed=1)
    source = DatasetSource({'train': splits['train'], 'val': splits['test']}, 'text', 'name')

    def read(*first):
        found = []
        for chunk in source.chunks(*first):
            found += [(document.text, document.split) for document in
                      chunk.documents(Reading())[0]]
        return found

    whole = [(text or '', 'train') for text in splits['train']['text']]
    whole += [(text or '', 'val') for text in splits['test']['text']]
    assert read() == whole
    so_far = 0
    ends = []
    for chunk in source.chunks():
        so_far += len(chunk.texts)
        assert read(chunk.next_place) == whole[so_far:]
        ends.append(chunk.bytes_read)
    assert len(ends) > 4
    assert ends == sorted(ends) and ends[-1] == source.size


# ---- refusals ----

def test_too_few_documents_are_refused(prepare, monkeypatch):
    hub_of(monkeypatch, ['one'])
    with pytest.raises(UserError, match='test_size=0.25'):
        prepare.main()


def test_a_hub_that_is_out_of_reach_is_one_sentence(prepare, monkeypatch):
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach the Hub") from OSError('Name or service not known')

    monkeypatch.setattr(datasets, 'load_dataset', no_network)
    expected = 'Skylion007/openwebtext could not be loaded .*not known.*data/prepare.py --files'
    with pytest.raises(UserError, match=expected):
        prepare.main()


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
