"""Putting a finished data set into its folder, and running a prepare.py that is due."""
import os

import pytest
from conftest import read_tokens

from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import read_meta
from plaingpt.text.publishing import prepare_if_missing, write_data_set
from plaingpt.text.shakespeare import split_text
from plaingpt.text.token_files import TokenFile
from plaingpt.text.tokenizers import CharTokenizer, load_tokenizer


def write(folder, chars):
    """Makes a data set of the text chars * 3, with chars as its vocabulary."""
    tokenizer = CharTokenizer(chars)
    ids = {split: tokenizer.encode(part) for split, part in split_text(chars * 3).items()}
    write_data_set(str(folder), tokenizer, ids, 'a test', 'f00')


def test_a_data_set_is_read_as_it_was_written(tmp_path):
    chars = ''.join(chr(number) for number in range(2**16, 2**17 + 1))
    write(tmp_path, chars)
    meta = read_meta(str(tmp_path))
    assert meta['dtype'] == 'uint32'
    assert meta['vocab_size'] == 65537
    assert meta['source'] == 'a test'
    assert meta['sha256'] == 'f00'
    assert meta['tokens'] == {'train': 176949, 'val': 19662}
    tokenizer = load_tokenizer(meta['tokenizer'])
    text = ''
    for split in ('train', 'val'):
        file = TokenFile(str(tmp_path / f'{split}.bin'), meta['dtype'], meta['vocab_size'])
        assert len(file) == meta['tokens'][split]
        text += tokenizer.decode(file.rows([0], len(file))[0].tolist())
    assert text == chars * 3
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


def test_a_full_disk_is_one_sentence_and_keeps_the_old_data_set(tmp_path, monkeypatch):
    write(tmp_path, 'abc')

    def fail(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(UserError, match='train.bin.part could not be written: .*No space left'):
        write(tmp_path, 'wxyz')
    assert read_meta(str(tmp_path))['tokenizer']['chars'] == list('abc')
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('survived', range(6))
def test_a_kill_never_leaves_meta_beside_other_tokens(tmp_path, monkeypatch, survived):
    """The writer dies at one rename after another: two .part files, val.bin, meta.json, train.bin.

    If train.bin is there, the folder must hold the old text or the new one."""
    write(tmp_path, 'abc')
    replace = os.replace
    calls = []

    class Killed(BaseException):
        pass

    def replace_or_die(*names):
        calls.append(names)
        if len(calls) > survived:
            raise Killed
        replace(*names)

    monkeypatch.setattr(os, 'replace', replace_or_die)
    if survived < 5:
        with pytest.raises(Killed):
            write(tmp_path, 'wxyz')
    else:
        write(tmp_path, 'wxyz')

    if not (tmp_path / 'train.bin').exists():
        assert survived in (2, 3, 4)
        return
    meta = read_meta(str(tmp_path))
    assert 'sha256' in meta, 'without meta.json the tokens would count as GPT-2 tokens'
    tokenizer = load_tokenizer(meta['tokenizer'])
    ids = read_tokens(tmp_path, 'train') + read_tokens(tmp_path, 'val')
    expected = 'abc' if survived < 3 else 'wxyz'
    assert tokenizer.decode(ids) == expected * 3


# ---- prepare_if_missing ----

def test_prepare_runs_only_if_train_bin_is_missing(tmp_path):
    script = 'import os; open(os.path.join(os.path.dirname(__file__), "train.bin"), "x").close()'
    (tmp_path / 'prepare.py').write_text(script)
    for _ in range(2):  # a second run of the script would fail
        prepare_if_missing(str(tmp_path))
    assert (tmp_path / 'train.bin').exists()


def test_prepare_leaves_a_folder_without_a_script_alone(tmp_path):
    prepare_if_missing(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_failure_of_prepare_is_one_sentence(tmp_path):
    (tmp_path / 'prepare.py').write_text('raise SystemExit(1)')
    with pytest.raises(UserError, match='prepare.py failed: see its message above'):
        prepare_if_missing(str(tmp_path))
