"""
Bad and hostile data sets, and what is promised of them:

    a bad data set          ends train.py in one sentence that names the file, before an out_dir
                            is made
    any bytes as tokens     are refused, or read as numpy reads them, every id within the vocabulary
"""
import gzip
import json
import os
import pickle
import struct
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY, run_here
from forgery import GONE, calls, frugal, one_sentence, problem
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from plaingpt.system.messages import UserError
from plaingpt.text import data_sets, shards, token_files

pytestmark = [
    pytest.mark.skipif(os.name != 'posix', reason='pipes and alarms, which POSIX systems have'),
    pytest.mark.usefixtures('ends_in_time'),
]

# ---- bad data sets ----

TRAIN = 'train.bin'
VAL = 'val.bin'
META = 'meta.json'
PKL = 'meta.pkl'


# Changes: each is a function of the data set's folder.

def put(name, content):
    """Gives a file this content: bytes, or a function of its ids; None removes it."""
    def change(folder):
        path = folder / name
        if content is None:
            path.unlink()
        elif callable(content):
            path.write_bytes(bytes(content(np.fromfile(path, '<u2'))))
        else:
            path.write_bytes(content)
    return change


def change_meta(**changes):
    """Changes meta.json; GONE drops a key."""
    def change(folder):
        meta = {**json.loads((folder / META).read_bytes()), **changes}
        kept = {key: value for key, value in meta.items() if value is not GONE}
        (folder / META).write_text(json.dumps(kept), encoding='utf-8')
    return change


def make_in_place_of(name, make):
    """Removes a file, and calls make, such as os.mkdir, with its path."""
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
    return change


def forbid(name):
    """Nothing: the test makes this file unreadable."""
    def change(folder):
        pass
    return change


def with_id_at(place):
    """A function that makes one of the ids too large."""
    def change(ids):
        changed = ids.copy()
        changed[place] = 60_000
        return changed
    return change


class Bad(NamedTuple):
    """A bad data set: the file that the sentence must name, and how a good one is spoilt."""
    file: str
    changes: list


LLM_C_HEADER = np.array([20240520, 1, 9000] + [0] * 253, '<i4').tobytes()
UNCOUNTED = change_meta(tokens=GONE)  # without the numbers of tokens, which would tell
NO_META = put(META, None)


def bad_token_files():
    """{name: Bad}, where train.bin or val.bin is of another form."""
    forms = {
        'no bytes': b'',
        'one byte': b'\0',
        'one token': b'\0\0',
        '16 tokens': bytes(32),
        'no': None,
        'half a token at the end of': lambda ids: bytes(ids)[:-1],
        'uint32': lambda ids: ids.astype('<u4'),
        'llm.c': lambda ids: LLM_C_HEADER + bytes(ids),
        'NumPy': lambda ids: b'\x93NUMPY\1\0' + bytes(ids),
        'zip': lambda ids: b'PK\3\4' + bytes(ids),
        'gzip': lambda ids: gzip.compress(bytes(ids), mtime=0)[:2000],
        'text': b'First Citizen:\n' * 99,
        'a short text': b'First Citizen:\nBefore we a',
    }
    counted_forms = {
        'id at the start of': with_id_at(0),
        'id within': with_id_at(900),
        'id at the end of': with_id_at(-1),
        'uint32, counted,': lambda ids: ids.astype('<u4'),
        'cut': lambda ids: ids[:-99],
        'longer': lambda ids: np.append(ids, ids),
        'llm.c, counted,': lambda ids: LLM_C_HEADER + bytes(ids[512:]),
    }
    bad = {}
    for name in TRAIN, VAL:
        for form, content in forms.items():
            bad[f'{form} {name}'] = Bad(name, [UNCOUNTED, put(name, content)])
        for form, content in counted_forms.items():
            bad[f'{form} {name}'] = Bad(name, [put(name, content)])
    return bad


def bad_kinds_of_file():
    """{name: Bad}, where a file is a folder, a pipe, or unreadable."""
    bad = {}
    for name in TRAIN, VAL, META:
        bad[f'forbidden {name}'] = Bad(name, [forbid(name)])
        for make in os.mkdir, os.mkfifo:
            bad[f'{make.__name__} {name}'] = Bad(name, [make_in_place_of(name, make)])
    for make in os.mkdir, os.mkfifo:
        bad[f'{make.__name__} {PKL}'] = Bad(PKL, [NO_META, make_in_place_of(PKL, make)])
    return bad


def bad_meta_json():
    """{name: Bad}, where meta.json is wrong."""
    bad = {}
    contents = [b'', b'{', b'null', b'[1]', b'\xff\xfe{}', bytes(99)]
    for depth in 500, 900, 990, 10**5:
        nested = depth * b'[' + depth * b']'
        contents.append(b'{"format_version": ' + nested + b'}')
    for content in contents:
        bad[f'meta.json {content[:30]} {len(content)}'] = Bad(META, [put(META, content)])
    for key, values in {
        'format_version': [2, 'a\nb'],
        'dtype': ['int64', 'a\nb'],
        'vocab_size': [0, 'a\nb', 1e9, 10**12, 10**30],
        'tokenizer': [None],
        'tokens': [[1], {'train': 'a\nb'}, {'train': None}, {'train': -1}],
    }.items():
        for value in values:
            bad[f'meta.json {key} {value!r}'] = Bad(META, [change_meta(**{key: value})])
    # With these, the ids in train.bin do not fit.
    bad['uint16 called uint32'] = Bad(TRAIN, [change_meta(dtype='uint32')])
    bad['the same, uncounted'] = Bad(TRAIN, [change_meta(dtype='uint32', tokens=GONE)])
    bad['small vocabulary'] = Bad(TRAIN, [change_meta(vocab_size=5)])
    return bad


def bad_meta_pkl():
    """{name: Bad}, where nanoGPT's meta.pkl is wrong."""
    letters = {number: chr(97 + number) for number in range(30)}
    vocabulary = {'itos': letters, 'stoi': {}, 'vocab_size': 30}
    contents = {
        'list': pickle.dumps([1]),
        'vocab_size -5': pickle.dumps({**vocabulary, 'vocab_size': -5}),
        'vocab_size 10**12': pickle.dumps({**vocabulary, 'vocab_size': 10**12}),
        'two lines': b'\x80\x04\x8c\x03o\ns\x8c\x03x\ny\x93.',
    }
    for name, call in calls('canary').items():
        contents[name] = pickle.dumps(call)
    bad = {}
    for name, content in contents.items():
        bad[f'meta.pkl {name}'] = Bad(PKL, [NO_META, put(PKL, content)])
    of_another_text = pickle.dumps({**vocabulary, 'vocab_size': 2, 'itos': 'ab'})
    bad['meta.pkl of another text'] = Bad(TRAIN, [NO_META, put(PKL, of_another_text)])
    return bad


BAD = {**bad_token_files(), **bad_kinds_of_file(), **bad_meta_json(), **bad_meta_pkl()}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_data_set_is_refused_by_its_name(tmp_path, monkeypatch, char_data, name):
    folder = tmp_path / 'data'
    folder.mkdir()
    monkeypatch.chdir(tmp_path)  # where a canary would be
    for file in TRAIN, VAL, META:
        (folder / file).write_bytes((char_data / file).read_bytes())
    bad = BAD[name]
    for change in bad.changes:
        change(folder)

    def open_unless_forbidden(path, *arguments, **keys):  # root may read any file
        if path == str(folder / bad.file):
            raise PermissionError(13, 'Permission denied', path)
        return open(path, *arguments, **keys)

    if name.startswith('forbidden'):
        for module in data_sets, shards:
            monkeypatch.setattr(module, 'open', open_unless_forbidden, raising=False)
    ended = run_here('train.py', **TINY, dataset=folder, out_dir=tmp_path / 'out')
    assert str(folder / bad.file) in one_sentence(ended)
    assert os.listdir(tmp_path) == ['data']


@pytest.mark.parametrize('left', [0, 1, 33, 34, 1000])
def test_a_file_cut_short_while_it_is_open_is_refused(tmp_path, left):
    path = tmp_path / TRAIN
    np.arange(5000).astype('<u2').tofile(path)
    data = token_files.TokenFile(str(path), vocab_size=5000, block_size=16)
    os.truncate(path, left)
    device = torch.device('cpu')
    for sentence in (problem(data.check_ids, 5000),
                     problem(data.batch, 1, 'train', 0, 0, 99, 16, device)):
        assert sentence.startswith(f'{path} ends before token ')


def test_a_pickle_of_a_few_bytes_gets_no_memory(tmp_path):
    far_place_in_its_memo = struct.pack('<I', 2**24)
    (tmp_path / PKL).write_bytes(b'\x80\x02K\x01r' + far_place_in_its_memo + b'.')
    with frugal():
        assert str(tmp_path / PKL) in problem(data_sets.read_meta, str(tmp_path))


# ---- any bytes ----

QUIET = dict(deadline=None, derandomize=True, database=None,
             suppress_health_check=list(HealthCheck))


class AnyFile(NamedTuple):
    """The bytes of a token file, and how it is opened."""
    content: bytes
    dtype: str
    vocab_size: int
    block_size: int


@st.composite
def some_token_files(draw):
    """AnyFiles: of any bytes, or of tokens, one of which may be spoilt."""
    dtype = draw(st.sampled_from(sorted(token_files.DTYPES)))
    vocab_size = draw(st.integers(1, 70_000))
    block_size = draw(st.integers(1, 64))
    if draw(st.integers(0, 2)) == 0:
        content = draw(st.binary(max_size=99)) * draw(st.integers(0, 41))
        return AnyFile(content[:4096], dtype, vocab_size, block_size)

    kind = token_files.DTYPES[dtype]
    highest = np.iinfo(kind).max
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(0, 1024))
    ids = random.integers(0, min(vocab_size, highest + 1), count).astype(kind)
    if count > 0 and draw(st.booleans()):
        ids[draw(st.integers(0, count - 1))] = draw(st.integers(0, highest))
    rest = draw(st.sampled_from([b'', b'', b'', b'\1']))
    return AnyFile(ids.tobytes() + rest, dtype, vocab_size, block_size)


@settings(max_examples=1000, **QUIET)
@given(file=some_token_files(), batch_size=st.integers(1, 9), check=st.booleans(),
       step=st.integers(0, 9))
def test_any_bytes_are_refused_or_read_as_numpy_reads_them(tmp_path_factory, file, batch_size,
                                                           check, step):
    path = tmp_path_factory.getbasetemp() / 'any.bin'
    path.write_bytes(file.content)
    kind = token_files.DTYPES[file.dtype]
    count = len(file.content) // kind.itemsize
    ids = np.frombuffer(file.content[:count * kind.itemsize], kind).astype(np.int64)
    whole = len(file.content) == count * kind.itemsize and count > file.block_size
    try:
        data = token_files.TokenFile(str(path), file.dtype, file.vocab_size, file.block_size)
        assert whole
        assert len(data) == count
        if check:
            data.check_ids(file.vocab_size)
            assert ids.max() < file.vocab_size
        x, y = data.batch(1337, 'train', step, 0, batch_size, file.block_size, torch.device('cpu'))
    except UserError as error:
        assert str(path) in str(error)
        assert '\n' not in str(error)
        assert not whole or ids.max() >= file.vocab_size or 'looks like' in str(error)
        return
    assert x.shape == y.shape == (batch_size, file.block_size)
    assert torch.equal(x[:, 1:], y[:, :-1])
    rows = np.concatenate([x.numpy(), y.numpy()[:, -1:]], axis=1)
    assert rows.min() >= 0
    assert rows.max() < file.vocab_size
    views = np.lib.stride_tricks.sliding_window_view(ids, file.block_size + 1)
    windows = {window.tobytes() for window in views}
    assert all(row.tobytes() in windows for row in rows)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
NAMES = st.sampled_from(['train', 'val', 'kind', 'chars', 'a\nb'])


def nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner)


JSON = st.recursive(PLAIN, nested, max_leaves=6)
GOOD = {'format_version': 1, 'dtype': 'uint16', 'vocab_size': 65, 'tokenizer': {'kind': 'gpt2'},
        'tokens': {'train': 9}}
# Each key has its good value in two of three cases.
MOSTLY_GOOD = st.fixed_dictionaries({key: st.just(value) | st.just(value) | JSON
                                     for key, value in GOOD.items()})


@settings(max_examples=300, **QUIET)
@given(meta=JSON | MOSTLY_GOOD)
@example(GOOD)
@example({**GOOD, 'vocab_size': 'a\nb'})
@example({**GOOD, 'tokens': {'train': None}})
def test_any_meta_json_is_refused_or_has_the_right_types(tmp_path_factory, meta):
    folder = tmp_path_factory.getbasetemp() / 'any'
    folder.mkdir(exist_ok=True)
    (folder / META).write_text(json.dumps(meta), encoding='utf-8')
    try:
        read = data_sets.read_meta(str(folder))
    except UserError as error:
        assert str(folder / META) in str(error)
        assert '\n' not in str(error)
        assert meta != GOOD
        return
    assert read['dtype'] in token_files.DTYPES
    assert type(read['vocab_size']) is int
    assert read['vocab_size'] >= 1
    assert isinstance(read['tokenizer'], dict)
    assert isinstance(read['tokens'], dict)
    for count in read['tokens'].values():
        assert type(count) is int
        assert count >= 0
