"""data/shakespeare/prepare.py and data/shakespeare_char/prepare.py, run on copies."""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, or_skip, read_tokens, refused, run, succeeded

from plaingpt.text.data_sets import read_meta
from plaingpt.text.tokenizers import GPT2Tokenizer, load_tokenizer


@pytest.fixture
def repository(tmp_path):
    """A copy of the code alone, so that no test writes into the real data/."""
    for pattern in ('*.py', 'data/**/*.py', 'plaingpt/**/*.py'):
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path


# Imports what a prepare.py imports, runs nothing, and says which heavy packages that loaded.
IMPORTS_OF_A_SCRIPT = '''
import ast, sys
path = sys.argv[1]
sys.path.insert(0, sys.argv[2])
with open(path, encoding='utf-8') as file:
    body = ast.parse(file.read()).body
imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
exec(compile(ast.Module(imports, []), path, 'exec'))
heavy = {'torch', 'datasets', 'transformers', 'tokenizers', 'tiktoken', 'gigatoken'}
print(*sorted(heavy & set(sys.modules)))
'''


@pytest.mark.parametrize('name', ['openwebtext', 'shakespeare', 'shakespeare_char'])
def test_prepare_starts_without_torch_and_other_heavy_packages(name):
    path = str(ROOT / 'data' / name / 'prepare.py')
    finished = subprocess.run([sys.executable, '-c', IMPORTS_OF_A_SCRIPT, path, str(ROOT)],
                              capture_output=True, text=True, check=True, cwd='/')
    assert finished.stdout.split() == []


def test_prepare_takes_the_text_beside_it(repository):
    folder = repository / 'data' / 'mine'
    shutil.copytree(repository / 'data' / 'shakespeare_char', folder)
    (folder / 'input.txt').write_bytes('\ufeffGrüße,\r\nzwei Zeilen €.\r\n'.encode())
    printed = succeeded(run(folder / 'prepare.py', cwd='/'))
    text = 'Grüße,\nzwei Zeilen €.\n'
    assert 'your own' in printed
    assert 'train.bin has 19 tokens' in printed
    meta = read_meta(str(folder))
    assert meta['tokenizer'] == {'kind': 'char', 'chars': sorted(set(text))}
    assert 'your own' in meta['source']
    train = read_tokens(folder, 'train')
    val = read_tokens(folder, 'val')
    assert meta['tokens'] == {'train': 19, 'val': 3}
    assert len(train) == 19
    assert len(val) == 3
    assert load_tokenizer(meta['tokenizer']).decode(train + val) == text


def test_prepare_refuses_an_empty_download(repository):
    folder = repository / 'data' / 'shakespeare_char'
    (folder / 'input.txt').touch()
    sentence = refused(run(folder / 'prepare.py'))
    assert 'input.txt is empty' in sentence
    assert 'delete it and run again' in sentence
    assert sorted(os.listdir(folder)) == ['input.txt', 'prepare.py']


def test_prepare_in_gpt2_tokens(repository):
    tokenizer = or_skip(GPT2Tokenizer)
    folder = repository / 'data' / 'shakespeare'
    text = 'Hello world' + 'é' * 27 + '<|endoftext|>Hello world'
    (folder / 'input.txt').write_text(text, encoding='utf-8')
    succeeded(run(folder / 'prepare.py'))
    train = read_tokens(folder, 'train')
    val = read_tokens(folder, 'val')
    assert train[:2] == [15496, 995]
    assert 50256 not in train
    assert tokenizer.decode(train) == text[:int(0.9 * len(text))]
    assert tokenizer.decode(train + val) == text
    assert read_meta(str(folder))['tokenizer'] == {'kind': 'gpt2'}
