"""Putting a finished data set into its folder, and running a prepare.py that is due."""
import contextlib
import functools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from plaingpt.system.messages import UserError
from plaingpt.text.data_sets import mask_path, open_data_set, read_meta
from plaingpt.text.publishing import prepare_if_missing, publish, remove_parts, write_data_set
from plaingpt.text.shakespeare import split_text
from plaingpt.text.shards import files_of, has_split, shard_path
from plaingpt.text.token_files import TokenFile
from plaingpt.text.tokenizer_export import tokenizer_json_of
from plaingpt.text.tokenizer_training import byte_tokenizer
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


# ---- publishing: killed, from one form to another ----

class Form(NamedTuple):
    """How a data set lies on disk."""
    train_files: int  # 1: train.bin; else shards
    val_files: int
    has_masks: bool


ONE_FILE = Form(1, 1, False)
CHAT = Form(1, 1, True)
SHARDS = Form(4, 2, False)
MORE_SHARDS = Form(6, 3, False)
CHAT_SHARDS = Form(3, 2, True)

TEXTS = {'old': {'train': 'abcacbabccba' * 5, 'val': 'cab' * 7},
         'new': {'train': 'zyxxyzzzxyyx' * 5, 'val': 'xzx' * 7}}  # of the same lengths
SPLITS = ('train', 'val')


def tokenizer_of(name):
    """That of a text: 'new' and 'old' give other characters to the same ids."""
    return CharTokenizer(sorted(set(TEXTS[name]['train'])))


def mask_of(ids, name):
    """A loss mask that tells the two texts apart."""
    return (np.asarray(ids) == (0 if name == 'old' else 1)).astype(np.uint8)


def write_parts(folder, stem, values, count):
    """Writes an array as stem.bin.part, or in as many shards."""
    path = str(folder / f'{stem}.bin.part')
    if count == 1:
        values.tofile(path)
        return
    for number, piece in enumerate(np.array_split(values, count)):
        piece.tofile(shard_path(path, number))


def prepare(folder, name, form):
    """Writes all .part files of a text; returns the tokens of each split."""
    tokens = {}
    for split in SPLITS:
        ids = np.array(tokenizer_of(name).encode(TEXTS[name][split]), '<u2')
        count = form.train_files if split == 'train' else form.val_files
        write_parts(folder, split, ids, count)
        if form.has_masks:
            write_parts(folder, f'{split}_mask', mask_of(ids, name), count)
        tokens[split] = len(ids)
    return tokens


def publish_text(folder, name, form):
    tokens = prepare(folder, name, form)
    publish(str(folder), tokenizer_of(name), tokens, 'a test')


def names_of(form):
    """All files of a data set of this form."""
    names = {'meta.json'}
    for split, count in ('train', form.train_files), ('val', form.val_files):
        for stem in (split, f'{split}_mask') if form.has_masks else (split,):
            if count == 1:
                names.add(f'{stem}.bin')
            else:
                names.update(f'{stem}_{number:03d}.bin' for number in range(count))
    return names


def assert_no_mixture(folder):
    """What readers find: the whole old data set, the whole new one, or a refusal.

    Returns 'old' or 'new'; None if a reader of both splits refuses."""
    for split in SPLITS:  # as evaluate.py reads one
        try:
            meta = read_meta(str(folder))
            data = TokenFile(str(folder / f'{split}.bin'), meta['dtype'], meta['vocab_size'],
                             expected_tokens=meta['tokens'].get(split))
        except UserError:
            continue
        text = load_tokenizer(meta['tokenizer']).decode(data.rows([0], len(data))[0].tolist())
        assert text in (TEXTS['old'][split], TEXTS['new'][split])
    try:
        meta, train, val = open_data_set(str(folder), block_size=4)
    except UserError:
        # The next train.py with prepare=True has to see that the data set is missing.
        assert not has_split(str(folder / 'train.bin'))
        return None
    tokenizer = load_tokenizer(meta['tokenizer'])
    texts = {}
    for split, data in ('train', train), ('val', val):
        ids = data.rows([0], len(data))[0]
        texts[split] = tokenizer.decode(ids.tolist())
        if meta['loss_mask']:
            name = 'old' if tokenizer.chars[0] == 'a' else 'new'
            entries = b''.join(Path(path).read_bytes()
                               for path in files_of(mask_path(str(folder), split)))
            assert entries == mask_of(ids, name).tobytes()
    assert texts in list(TEXTS.values())
    return 'old' if texts == TEXTS['old'] else 'new'


class Killed(BaseException):
    pass


def kill_after(monkeypatch, survived):
    """Kills at the call after `survived` calls that change the folder or force it to the disk."""
    calls = []

    def call(original, *arguments):
        calls.append(original)
        if len(calls) > survived:
            raise Killed
        return original(*arguments)

    for name in ('replace', 'remove', 'fsync'):
        monkeypatch.setattr(os, name, functools.partial(call, getattr(os, name)))


@pytest.mark.parametrize('before, after', [
    (ONE_FILE, ONE_FILE), (ONE_FILE, SHARDS), (SHARDS, ONE_FILE), (MORE_SHARDS, SHARDS),
    (SHARDS, MORE_SHARDS), (CHAT, ONE_FILE), (ONE_FILE, CHAT), (CHAT_SHARDS, CHAT),
    (CHAT, CHAT_SHARDS), (CHAT_SHARDS, SHARDS)])
def test_a_kill_at_any_point_never_leaves_a_mixture(tmp_path, before, after):
    outcomes = []
    for survived in range(100):
        folder = tmp_path / str(survived)
        folder.mkdir()
        publish_text(folder, 'old', before)
        assert assert_no_mixture(folder) == 'old'
        tokens = prepare(folder, 'new', after)
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_after(monkeypatch, survived)
            killed = False
            try:
                publish(str(folder), tokenizer_of('new'), tokens, 'a test')
            except Killed:
                killed = True
        outcomes.append(assert_no_mixture(folder))
        if not killed:
            break
        # Preparing again mends what the kill has left.
        remove_parts(str(folder))
        publish_text(folder, 'new', after)
        assert assert_no_mixture(folder) == 'new'
        left = {name for name in os.listdir(folder) if not name.endswith('.tmp')}
        assert left == names_of(after)
    assert set(os.listdir(folder)) == names_of(after)
    # First the old data set, then none, then the new one.
    changes = [outcomes[0]]
    for outcome in outcomes:
        if outcome != changes[-1]:
            changes.append(outcome)
    assert changes == ['old', None, 'new']


@pytest.mark.parametrize('form', [ONE_FILE, SHARDS, CHAT_SHARDS])
def test_a_full_disk_keeps_the_old_data_set(tmp_path, monkeypatch, form):
    """Nothing is removed before all that needs room is written."""
    publish_text(tmp_path, 'old', form)
    tokens = prepare(tmp_path, 'new', form)

    def fail(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(UserError, match='could not be put into .*No space left') as error:
        publish(str(tmp_path), tokenizer_of('new'), tokens, 'a test')
    assert '\n' not in str(error.value)
    assert assert_no_mixture(tmp_path) == 'old'


def test_the_summary_names_shards(tmp_path, capsys):
    publish_text(tmp_path, 'new', ONE_FILE)
    publish_text(tmp_path, 'new', SHARDS)
    tokens = prepare(tmp_path, 'new', Form(4, 1, False))
    os.rename(tmp_path / 'val.bin.part', tmp_path / 'val_000.bin.part')
    publish(str(tmp_path), tokenizer_of('new'), tokens, 'a test')
    assert capsys.readouterr().out.splitlines() == [
        f'{tmp_path}: train.bin has 60 tokens, val.bin 21, from a vocabulary of 3',
        f'{tmp_path}: train.bin (in 4 shards) has 60 tokens, val.bin (in 2 shards) 21, '
        'from a vocabulary of 3',
        f'{tmp_path}: train.bin (in 4 shards) has 60 tokens, val_000.bin 21, from a vocabulary '
        'of 3']


@pytest.mark.parametrize('name, change', [
    ('train_002.bin.part', os.remove),
    ('val_001.bin.part', os.remove),
    ('train_001.bin.part', lambda path: os.truncate(path, 4)),
    ('val_mask_000.bin.part', os.remove),
    ('train_mask_001.bin.part', lambda path: os.truncate(path, 4)),
])
def test_unfinished_parts_are_refused_and_keep_the_old_data_set(tmp_path, name, change):
    publish_text(tmp_path, 'old', ONE_FILE)
    tokens = prepare(tmp_path, 'new', CHAT_SHARDS)
    change(tmp_path / name)
    with pytest.raises(UserError) as error:
        publish(str(tmp_path), tokenizer_of('new'), tokens, 'a test')
    assert str(tmp_path / name.split('_')[0]) in str(error.value)
    assert assert_no_mixture(tmp_path) == 'old'


def test_a_mask_of_one_split_alone_is_refused(tmp_path):
    tokens = prepare(tmp_path, 'new', CHAT)
    os.remove(tmp_path / 'val_mask.bin.part')
    with pytest.raises(UserError, match='val_mask.bin.part, or its shards, should have 21 bytes'):
        publish(str(tmp_path), tokenizer_of('new'), tokens, 'a test')


def test_parts_of_two_preparations_are_refused_until_they_are_removed(tmp_path):
    prepare(tmp_path, 'old', CHAT_SHARDS)
    tokens = prepare(tmp_path, 'new', ONE_FILE)
    with pytest.raises(UserError, match='train.bin.part and .*train_000.bin.part both exist'):
        publish(str(tmp_path), tokenizer_of('new'), tokens, 'a test')
    remove_parts(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_loss_mask_of_another_length_is_refused(tmp_path):
    publish_text(tmp_path, 'new', CHAT)
    os.truncate(tmp_path / 'val_mask.bin', 20)
    with pytest.raises(UserError, match='val_mask.bin, or its shards, should have 21 bytes, one '
                                        'for each token, but 20 are there'):
        open_data_set(str(tmp_path), block_size=4)


# ---- the tokenizer in other formats ----

def hugging_face_tokenizer(chars):
    """A tokenizer of kind 'tokenizer.json' for these characters."""
    meta = {'kind': 'char', 'chars': list(chars)}
    return load_tokenizer({'kind': 'tokenizer.json', 'json': tokenizer_json_of(meta)})


def test_tokenizer_json_lies_beside_its_data_set_and_goes_with_it(tmp_path):
    from tokenizers import Tokenizer
    path = tmp_path / 'tokenizer.json'
    tokenizer = hugging_face_tokenizer('abc')
    ids = {'train': tokenizer.encode('abcabc'), 'val': tokenizer.encode('cab')}
    write_data_set(str(tmp_path), tokenizer, ids, 'a test', None)
    assert Tokenizer.from_file(str(path)).encode('cab').ids == ids['val']
    assert path.read_text(encoding='utf-8') == read_meta(str(tmp_path))['tokenizer']['json']

    write(tmp_path, 'abc')  # a data set of characters
    assert not path.exists()
    path.write_text('of the user', encoding='utf-8')
    write(tmp_path, 'abc')
    assert path.read_text(encoding='utf-8') == 'of the user'


def test_the_ranks_for_tiktoken_lie_beside_a_data_set_that_has_them(tmp_path):
    tokenizer = byte_tokenizer()
    ids = {'train': tokenizer.encode('abcabc'), 'val': tokenizer.encode('cab')}
    write_data_set(str(tmp_path), tokenizer, ids, 'a test', None)
    first, second, *rest = (tmp_path / 'tokenizer.tiktoken').read_bytes().splitlines()
    assert (first, second, len(rest)) == (b'AA== 0', b'AQ== 1', 254)
    assert (tmp_path / 'tokenizer.json').exists()
    write(tmp_path, 'abc')
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('survived', range(30))
def test_a_kill_never_leaves_a_tokenizer_json_of_another_data_set(tmp_path, survived):
    path = tmp_path / 'tokenizer.json'
    for chars in ('abcd', 'xyz'):
        tokenizer = hugging_face_tokenizer(chars)
        ids = {'train': [0, 1, 2] * 3, 'val': [0, 1]}
        with pytest.MonkeyPatch.context() as monkeypatch, contextlib.suppress(Killed):
            if chars == 'xyz':
                kill_after(monkeypatch, survived)
            write_data_set(str(tmp_path), tokenizer, ids, 'a test', None)
        if path.exists():
            meta = read_meta(str(tmp_path))
            assert path.read_text(encoding='utf-8') == meta['tokenizer']['json']
    write(tmp_path, 'abc')
    assert not path.exists()


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
