"""data/prepare.py as a user runs it, and in this process."""
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, or_skip, refused, run, succeeded
from pools import Here

from plaingpt.corpus import preparation, vocabulary
from plaingpt.corpus.file_search import find
from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import read_meta
from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizers import CharTokenizer, GPT2Tokenizer, load_tokenizer

SCRIPT = ROOT / 'data' / 'prepare.py'


@pytest.fixture
def prepare(monkeypatch):
    """A function that runs data/prepare.py in this process, with keys as keyword arguments."""
    def prepare(**keys):
        spec = importlib.util.spec_from_file_location('prepare_own_text', SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        flags = [f'--{key}={value}' for key, value in keys.items()]
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *flags])
        module.configure(vars(module))
        module.main()

    monkeypatch.setattr(preparation, 'WorkerPool', Here)
    monkeypatch.setattr(vocabulary, 'WorkerPool', Here)
    return prepare


def documents_of(folder):
    """{split: texts} of a data set whose documents end with the tokenizer's end of text."""
    meta = read_meta(str(folder))
    tokenizer = load_tokenizer(meta['tokenizer'])
    texts = {}
    for split in ('train', 'val'):
        ids = np.fromfile(folder / f'{split}.bin', f'<u{2 if meta["dtype"] == "uint16" else 4}')
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)[:-1]
        texts[split] = [tokenizer.decode(document[:-1].tolist()) for document in documents]
    return texts


# ---- a text ----

def test_a_novel_by_character_is_what_nanogpt_makes_of_it(tmp_path, text):
    (tmp_path / 'novel.txt').write_text(text, encoding='utf-8')
    output = succeeded(run(SCRIPT, f'--files={tmp_path}/novel.txt', f'--dataset={tmp_path}/mine',
                           '--tokenizer=char', '--test_size=0.1'))
    assert 'train.bin has' in output
    cut = int(0.9 * len(text))
    tokenizer = CharTokenizer.from_text(text)
    ids = {'train': tokenizer.encode(text[:cut]), 'val': tokenizer.encode(text[cut:])}
    write_data_set(str(tmp_path / 'nanogpt'), tokenizer, ids, 'novel.txt', None)
    for name in ('train.bin', 'val.bin'):
        mine = (tmp_path / 'mine' / name).read_bytes()
        assert mine == (tmp_path / 'nanogpt' / name).read_bytes()
    assert read_meta(str(tmp_path / 'mine'))['tokenizer'] == tokenizer.to_meta()


# ---- code ----

def test_this_repository_s_code_with_a_vocabulary_of_its_own(tmp_path, prepare, capsys):
    prepare(files=ROOT, include='*.py', dataset=tmp_path / 'code', tokenizer='bpe:1000',
            sample_bytes=300_000)
    texts = documents_of(tmp_path / 'code')
    found = find(str(ROOT), '*.py').paths
    expected = []
    for path in found:
        with open(path, encoding='utf-8', newline='') as file:
            expected.append(file.read())
    assert sorted(texts['train'] + texts['val']) == sorted(filter(None, expected))
    assert read_meta(str(tmp_path / 'code'))['vocab_size'] == 1000
    assert ' 0 documents' not in capsys.readouterr().out


# ---- records ----

@pytest.fixture
def pairs(tmp_path):
    """10,000 pairs of question and answer, in two files of JSON."""
    records = []
    for i in range(10_000):
        records.append({'question': f'How many of {i}?', 'sql': f'SELECT COUNT(*) FROM t{i};'})
    (tmp_path / 'a.json').write_text(json.dumps(records[:4000]))
    (tmp_path / 'b.json').write_text(json.dumps(records[4000:]))
    return tmp_path


TEMPLATE = r'# Question: {question}\n# SQL:\n{sql}\n'


def test_pairs_fill_a_template(pairs, prepare):
    prepare(files=f'{pairs}/*.json', template=TEMPLATE, dataset=pairs / 'sql', tokenizer='byte')
    texts = documents_of(pairs / 'sql')
    expected = []
    for i in range(10_000):
        expected.append(f'# Question: How many of {i}?\n# SQL:\nSELECT COUNT(*) FROM t{i};\n')
    assert sorted(texts['train'] + texts['val']) == sorted(expected)
    assert 400 < len(texts['val']) < 600


def test_a_missing_field_is_named_with_its_record_and_file(pairs):
    records = json.loads((pairs / 'b.json').read_text())
    del records[16]['sql']
    (pairs / 'b.json').write_text(json.dumps(records))
    message = refused(run(SCRIPT, f'--files={pairs}/*.json', f'--template={TEMPLATE}',
                          f'--dataset={pairs}/sql', '--tokenizer=byte'))
    assert f"record 17 of {pairs}/b.json has no field 'sql'" in message
    assert not (pairs / 'sql' / 'train.bin').exists()


# ---- chats ----

def test_chats_get_a_loss_mask(tmp_path, prepare):
    lines = []
    for i in range(100):
        messages = [{'role': 'user', 'content': f'{i}?'},
                    {'role': 'assistant', 'content': f'{i}! <|im_end|>'}]
        lines.append(json.dumps({'messages': messages}))
    lines.append(json.dumps({'messages': [{'role': 'user', 'content': 'alone'}]}))
    (tmp_path / 'chats.jsonl').write_text('\n'.join(lines))
    prepare(files=tmp_path / 'chats.jsonl', chat=True, dataset=tmp_path / 'out', tokenizer='byte',
            test_size=0.2)
    folder = tmp_path / 'out'
    meta = read_meta(str(folder))
    tokenizer = load_tokenizer(meta['tokenizer'])
    chats = 0
    for split in ('train', 'val'):
        ids = np.fromfile(folder / f'{split}.bin', '<u2')
        mask = np.fromfile(folder / f'{split}_mask.bin', np.uint8)
        assert len(ids) == len(mask) == meta['tokens'][split]
        learned = tokenizer.decode(ids[mask == 1].tolist()).split('! <|im_end|><|im_end|>')
        assert learned.pop() == ''
        assert all(reply.isdigit() for reply in learned)
        chats += len(learned)
    assert chats == 100


# ---- refusals, and what has to come before the work ----

@pytest.mark.parametrize('flags, sentence', [
    (['--dataset=x'], 'files is missing'),
    (['--files=x'], 'dataset is missing'),
    (['--files=x', '--dataset=x', '--chat=True', '--template={a}'], 'exclude each other'),
    (['--files=none.txt', '--dataset=x'], "no file matches files='none.txt'"),
    (['--files=model.py', '--dataset=/x', '--tokenizer=bpe:12'], 'bpe:12'),
    (['--files=model.py', '--dataset=/x', '--tokenizer=gpt5'], 'gpt5'),
])
def test_mistakes_are_one_sentence(flags, sentence):
    assert sentence in refused(run(SCRIPT, *flags, cwd=ROOT))


def test_a_preparation_needs_neither_torch_nor_datasets(tmp_path):
    (tmp_path / 'a.txt').write_text('some text ' * 20)
    lines = (f'import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n'
            f'sys.argv = ["prepare.py", "--files={tmp_path}/a.txt", "--dataset={tmp_path}/out", '
            '"--tokenizer=char", "--num_proc=1"]\n'
            f'runpy.run_path({str(SCRIPT)!r}, run_name="__main__")\n'
            'heavy = {"torch", "datasets", "transformers", "tiktoken", "pyarrow"}\n'
            'print(sorted(heavy & set(sys.modules)))')
    indented = '\n    '.join(['if __name__ == "__main__":', *lines.splitlines()])
    (tmp_path / 'once.py').write_text(indented)  # workers import this file, too
    assert succeeded(run(tmp_path / 'once.py')).splitlines()[-1] == '[]'


def test_what_a_search_leaves_out_is_told(tmp_path, prepare, capsys):
    for i in range(40):
        (tmp_path / f'{i}.txt').write_text(f'text {i}')
    (tmp_path / 'a.json').write_text('[]')
    (tmp_path / 'a.png').write_bytes(b'\x89PNG\0')
    prepare(files=tmp_path, dataset=tmp_path / 'out', tokenizer='byte', test_size=0.2)
    output = capsys.readouterr().out
    assert 'left out   1: JSON among text (choose files with --include), such as' in output
    assert 'left out   1: binary, such as' in output
    assert 'documents  40, with 6 to 7 characters, 7 in the median' in output


@pytest.mark.parametrize('keys, sentence', [
    (dict(chat=True), 'a.txt is text, but chat and template need records'),
    (dict(template='{a}'), 'a.txt is text, but chat and template need records'),
    (dict(template='{a'), 'is invalid'),
    (dict(template='{a}', text_column='a'), "text_column='a' has no effect with template"),
    (dict(chat=True, text_column='a'), "text_column='a' has no effect with chat=True"),
    (dict(include='*.md'), "include='*.md' chooses files of a folder"),
    (dict(max_chars=5, min_chars=6), 'max_chars=5 is below min_chars=6'),
    (dict(report=True, compare='byte'), 'compare and report exclude each other'),
])
def test_keys_that_do_not_fit_are_refused_before_the_work(tmp_path, prepare, capsys, keys,
                                                              sentence):
    (tmp_path / 'a.txt').write_text('some text')
    with pytest.raises((UserError, SystemExit)) as raised:
        prepare(files=tmp_path / 'a.txt', dataset=tmp_path / 'out', **keys)
    # What is wrong with the keys themselves is printed, all at once.
    assert sentence in f'{raised.value} {capsys.readouterr().err}'
    assert not (tmp_path / 'out').exists()


# ---- looking ----

def test_an_interrupted_report_is_made_by_the_same_command(tmp_path, prepare, monkeypatch):
    (tmp_path / 'a.txt').write_text('the state of Denmark is rotten\n' * 200)
    keys = dict(files=tmp_path / 'a.txt', dataset=tmp_path / 'out', tokenizer='char', report=True)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('plaingpt.corpus.worker_pool.WorkerPool', Here)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='data set is finished'):
        patch.setattr('plaingpt.inspection.report.write_report', stop)
        prepare(**keys)
    before = (tmp_path / 'out' / 'train.bin').stat().st_mtime_ns
    prepare(**keys)
    assert (tmp_path / 'out' / 'train.bin').stat().st_mtime_ns == before
    assert json.loads((tmp_path / 'out' / 'report.json').read_text())['tokens']
    # Another data set in the folder takes the report away, which is not true of it.
    prepare(**{**keys, 'report': False, 'test_size': 0.2})
    assert not (tmp_path / 'out' / 'report.json').exists()
    assert not (tmp_path / 'out' / 'report.html').exists()


def test_tokenizers_are_compared_and_the_figures_are_saved(tmp_path, prepare, monkeypatch, capsys):
    for i in range(20):
        (tmp_path / f'{i}.txt').write_text(f'the state {i} of Denmark is rotten\n' * 20)
    monkeypatch.setattr('plaingpt.inspection.comparison_sample.WorkerPool', Here)
    monkeypatch.setattr('plaingpt.inspection.tokenizer_comparison.WorkerPool', Here)
    prepare(files=f'{tmp_path}/*.txt', compare='byte,bpe:270', dataset=tmp_path / 'out')
    assert 'The quick brown fox' in capsys.readouterr().out
    saved = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert [tokenizer['vocab_size'] for tokenizer in saved['tokenizers']] == [257, 270]


# ---- nobody reads the output ----

def test_a_reader_of_the_first_line_gets_no_traceback_and_leaves_a_finished_data_set(tmp_path):
    (tmp_path / 'a.txt').write_text('some text ' * 20)
    command = [sys.executable, '-u', SCRIPT, f'--files={tmp_path}/a.txt', '--tokenizer=char',
               f'--dataset={tmp_path}/out', '--num_proc=1']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert 'train.bin has' in process.stdout.readline()
    process.stdout.close()
    assert 'Traceback' not in process.stderr.read()
    process.wait()
    assert sorted(os.listdir(tmp_path / 'out')) == ['.lock', 'meta.json', 'train.bin', 'val.bin']


# ---- a vocabulary of one's own is kept for a resume ----

def test_the_tokenizer_is_trained_once(tmp_path, prepare, monkeypatch):
    (tmp_path / 'a.txt').write_text('the state of Denmark is rotten\n' * 200)
    keys = dict(files=tmp_path / 'a.txt', dataset=tmp_path / 'out', tokenizer='bpe:270')

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Exception, match='interrupted'):
        patch.setattr(preparation, 'tokenize', stop)
        prepare(**keys)
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, 'training_texts', stop)
        prepare(**keys)
    assert sorted(os.listdir(tmp_path / 'out')) == ['.lock', 'meta.json', 'tokenizer.json',
                                                    'tokenizer.tiktoken', 'train.bin', 'val.bin']


def test_the_tokenizer_of_another_data_set(tmp_path, prepare):
    tokenizer = or_skip(GPT2Tokenizer)
    ids = {'train': [1, 2, 3], 'val': [1]}
    write_data_set(str(tmp_path / 'other'), tokenizer, ids, 'source', None)
    (tmp_path / 'a.txt').write_text('the state of Denmark is rotten\n' * 20)
    prepare(files=tmp_path / 'a.txt', dataset=tmp_path / 'out', tokenizer=tmp_path / 'other')
    assert read_meta(str(tmp_path / 'out'))['tokenizer'] == {'kind': 'gpt2'}
