"""
Hostile and foreign files, and what is promised of each:

    code in a file          never runs; and if a file claims to hold more than it has bytes for,
                            no memory is taken for that
    a bad data set          ends train.py in one sentence that names the file, before an out_dir
                            is made
    any bytes as tokens     are refused, or read as numpy reads them, every id within the vocabulary

Checkpoints that were damaged by chance are in training/test_damaged_files.py.
"""
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import warnings
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_here
from forgery import (GONE, WEIGHT, WTE, flip, forge, frugal, one_sentence, problem, refusals, rezip,
                     saved_by_torch, unzip)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from plaingpt.system.messages import UserError
from plaingpt.text import data_sets, token_files
from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.training import checkpoints

pytestmark = [
    pytest.mark.skipif(os.name != 'posix', reason='pipes and alarms, which POSIX systems have'),
    pytest.mark.usefixtures('ends_in_time'),
]


# ---- 1. hostile files ----

class Call:
    """An object that pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


def calls(canary):
    """{name: a Call that would make the file canary}."""
    return {
        'os.system': Call(os.system, f'echo > {canary}'),
        'exec': Call(exec, f'open({canary!r}, "w")'),
        'eval': Call(eval, f'open({canary!r}, "w")'),
        'subprocess': Call(subprocess.check_call, ['touch', canary]),
    }


def with_weight(value):
    """A function that puts this in place of a weight, in nanoGPT's format."""
    return forge(*WTE, value=value, nanogpt=True)


def with_view(offset, shape, stride):
    """A function that makes a weight a view, of this offset, shape and stride, of four numbers."""
    storage = torch.storage.TypedStorage(wrap_storage=torch.ones(4).untyped_storage(),
                                         dtype=torch.float32, _internal=True)
    view = Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False,
                OrderedDict())
    return with_weight(lambda tensor: view)


def with_config(opcodes):
    """A function that makes these pickle opcodes the config."""
    def make(content):
        content = forge('config', value={'dataset': 'MARK'}, nanogpt=True)(content)
        index = unzip(content)['archive/data.pkl']
        return rezip(content, {'data.pkl': index.replace(b'X\x04\x00\x00\x00MARK', opcodes)})
    return make


def tar(content):
    return b'storages/'.ljust(100, b'\0') + bytes(924)


def overlapping(content):
    """A zip in which 2,001 entries are the same 128 KiB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('archive/data.pkl', bytes(2**17))
        archive.filelist += archive.filelist * 2000
    return file.getvalue()


def torch_1_5(content):
    return saved_by_torch({'model': {}}, _use_new_zipfile_serialization=False)


def torch_script(content):
    return torch.jit.script(torch.nn.Linear(2, 2)).save_to_buffer()


def deflated_pickle(content):
    return rezip(content, {'data.pkl': pickle.dumps('x' * 2**26, 2)}, deflated='data.pkl')


def deflated_tensor(content):
    return rezip(content, {WEIGHT: bytes(2**26)}, deflated=WEIGHT)


def strange_forms():
    """{name: what makes a checkpoint that must be refused, and cost nothing}."""
    sparse = torch.sparse_coo_tensor([[99], [99]], [1.0], (31, 8), check_invariants=False)
    compressed = torch.sparse_csr_tensor([0, 9], [9], [1.0], (1, 8), check_invariants=False)
    forms = {
        'a tar': tar,
        'overlapping': overlapping,
        'torch 1.5': torch_1_5,
        'TorchScript': torch_script,
        'deflated pickle': deflated_pickle,
        'deflated tensor': deflated_tensor,
        'declared size': flip('central', 24, 0xf0, length=4),
        'complex': with_weight(lambda tensor: tensor + 1j),
        'sparse': with_weight(sparse),
        'compressed': with_weight(compressed),
        'meta': with_weight(lambda tensor: torch.ones_like(tensor, device='meta')),
        'expanded': with_weight(torch.zeros(1).expand(10**6, 10**6)),
        'expanded a little': with_weight(lambda tensor: torch.zeros(1, 8).expand(tensor.shape)),
        'beyond its storage': with_view(0, (10**6, 10**6), (10**6, 1)),
        'after its storage': with_view(100, (4, 1), (1, 1)),
        'before its storage': with_view(-1, (4, 1), (1, 1)),
        'backwards': with_view(1, (2, 1), (-1, 1)),
        'nested 100,000 deep': with_config(b']' * 100_000 + b'a' * 99_999),
        'nested in itself': with_config(b']r\xff\xff\0\0j\xff\xff\0\0a'),
    }
    # A million values in 5 kB: each list is written once and named again.
    many = [[1] * 1000] * 1000
    for key in 'config', 'model', 'optimizer':
        forms[f'many in {key}'] = forge(key, 'x', value=many, nanogpt=True)
    # The number of tokens in a step would be this value times a million.
    for value in 'text', [1]:
        config = {'gradient_accumulation_steps': value, 'batch_size': 1000, 'block_size': 1000}
        forms[f'{value} times a million'] = forge('config', value=config, nanogpt=True)
    return forms


with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of torch, about its sparse tensors
    STRANGE_FORMS = strange_forms()


@pytest.mark.parametrize('name', STRANGE_FORMS)
@pytest.mark.filterwarnings('ignore')
def test_a_checkpoint_of_a_strange_form_is_refused_and_gets_no_memory(tmp_path, saved, name):
    path = tmp_path / 'ckpt.pt'
    path.write_bytes(STRANGE_FORMS[name](saved[3].content))
    with frugal():
        sentence = problem(checkpoints.load, str(path))
    assert sentence.startswith(f'{path} ')
    assert sentence == problem(checkpoints.load_to_resume, str(tmp_path))
    assert sentence == problem(checkpoints.load_to_sample, str(tmp_path))


@pytest.mark.parametrize('name', ['ckpt.pt', 'last.pt'])
@pytest.mark.parametrize('write', [saved_by_torch, pickle.dumps])
@pytest.mark.parametrize('call', calls(''))
def test_no_code_in_a_checkpoint_runs(tmp_path, saved, char_data, call, write, name):
    hostile = calls(str(tmp_path / 'canary'))[call]
    content = write({**saved[3].tree, 'config': {'x': hostile}})
    # refusals() looks for changed files, and so for a canary.
    for sentence in refusals(tmp_path / 'out', content, name=name, dataset=char_data):
        assert str(tmp_path / 'out' / name) in sentence


@pytest.mark.parametrize('name', [None, 'EVIL', 'RELATIVE', '/etc', '..', '.', '', '../../x', 'x\n',
                                  5, GONE])
def test_a_checkpoint_leads_to_no_folder_outside_data(tmp_path, saved, name):
    canary = str(tmp_path / 'canary')
    evil = tmp_path / 'evil'
    evil.mkdir()
    (evil / 'prepare.py').write_text(f'open({canary!r}, "w")', encoding='utf-8')
    (evil / 'meta.pkl').write_bytes(pickle.dumps(calls(canary)['os.system']))

    config = {'dataset': name}
    scripts = ('train.py', 'sample.py')
    if name == 'EVIL':
        config = {'dataset': str(evil)}
    elif name == 'RELATIVE':
        config = {'dataset': os.path.relpath(evil, ROOT / 'data')}
    elif name is GONE:  # then train.py takes the user's
        config = {}
        scripts = ('sample.py',)
    content = forge('config', value=config)(saved[3].content)
    # Without a tokenizer, sample.py looks for that of the data set.
    content = forge('tokenizer', value=GONE)(content)
    for sentence in refusals(tmp_path / 'out', content, scripts, prepare=True):
        assert str(tmp_path / 'out' / 'ckpt.pt') in sentence


def test_the_out_dir_in_a_checkpoint_is_not_written_to(tmp_path, saved, char_data):
    out_dir = tmp_path / 'out'
    out_dir.mkdir()
    content = forge('config', 'out_dir', value=str(tmp_path / 'other'))(saved[3].content)
    (out_dir / 'last.pt').write_bytes(content)
    ended = run_here('train.py', **TINY, init_from='resume', dataset=char_data, out_dir=out_dir)
    assert ended.returncode == 0
    assert os.listdir(tmp_path) == ['out']


# ---- a model of Hugging Face ----

@pytest.fixture(scope='module')
def own_tokenizer():
    """A tokenizer of 64 words, the first of which is a line break."""
    from tokenizers import Tokenizer, models
    vocabulary = {'\n': 0}
    for number in range(1, 64):
        vocabulary[f'word{number}'] = number
    words = models.WordLevel(vocabulary, unk_token='word1')
    return HuggingFaceTokenizer(Tokenizer(words).to_str())


@pytest.fixture(scope='module')
def own_data(tmp_path_factory, own_tokenizer):
    """The folder of a data set of these words."""
    folder = tmp_path_factory.mktemp('own_data')
    ids = np.arange(2000) % 64
    write_data_set(str(folder), own_tokenizer, {'train': ids, 'val': ids}, 'a test', None)
    return folder


@pytest.fixture(scope='module')
def gpt2_files(tmp_path_factory, own_tokenizer):
    """{name: bytes} of the files of a random GPT-2, saved by Hugging Face, with its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel
    folder = tmp_path_factory.mktemp('gpt2')
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=16, vocab_size=64,
                        bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / 'tokenizer.json').write_text(own_tokenizer.json_text, encoding='utf-8')
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_runs_no_code(tmp_path, files, data, may_run):
    """Puts the files into a folder, from which train.py and sample.py start; fails if code runs.

    may_run: whether the scripts may run; if not, or if they do not, a sentence names the folder."""
    folder = tmp_path / 'gpt2'
    canary = tmp_path / 'canary'
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / 'modeling_x.py').write_text(f'open({str(canary)!r}, "w")', encoding='utf-8')
    sampled = run_here('sample.py', init_from=folder, num_samples=1, max_new_tokens=2, device='cpu')
    trained = run_here('train.py', **{**TINY, 'max_iters': 0}, dataset=data, init_from=folder,
                       out_dir=tmp_path / 'out')
    assert not canary.exists()
    for ended in sampled, trained:
        if not (may_run and ended.returncode == 0):
            assert str(folder) in one_sentence(ended)


def with_config_json(files, changes):
    config = {**json.loads(files['config.json']), **changes}
    return {**files, 'config.json': json.dumps(config).encode()}


@pytest.mark.parametrize('changes', [
    {'auto_map': {'AutoConfig': 'modeling_x.X', 'AutoModelForCausalLM': 'modeling_x.X'},
     'architectures': ['X']},
    {'quantization_config': {'quant_method': 'bitsandbytes', 'load_in_8bit': True}},
    {'attn_implementation': 'a/kernel'},
    {'_attn_implementation': 'a/kernel'},
    {'attn_implementation': 'flash_attention_2'},
    {'dtype': 'x'},
], ids=str)
def test_a_config_of_hugging_face_that_asks_for_code_gets_none(tmp_path, gpt2_files, own_data,
                                                               changes):
    files = with_config_json(gpt2_files, changes)
    assert_runs_no_code(tmp_path, files, own_data, may_run=True)


@pytest.mark.parametrize('changes', [{'n_layer': 10**9}, {'n_layer': 'x'}, {'vocab_size': 10**12}],
                         ids=str)
def test_a_config_of_hugging_face_with_impossible_sizes_is_refused(tmp_path, gpt2_files, own_data,
                                                                   changes):
    files = with_config_json(gpt2_files, changes)
    assert_runs_no_code(tmp_path, files, own_data, may_run=False)


def test_a_config_of_hugging_face_that_is_no_dict_is_refused(tmp_path, gpt2_files, own_data):
    files = {**gpt2_files, 'config.json': b'[]'}
    assert_runs_no_code(tmp_path, files, own_data, may_run=False)


@pytest.mark.parametrize('end', [-9, 0, 99])
def test_weights_of_hugging_face_that_are_cut_short_are_refused(tmp_path, gpt2_files, own_data,
                                                                end):
    weights = gpt2_files['model.safetensors'][:end]
    files = {**gpt2_files, 'model.safetensors': weights}
    assert_runs_no_code(tmp_path, files, own_data, may_run=False)


def test_weights_of_hugging_face_as_a_pickle_are_refused(tmp_path, gpt2_files, own_data):
    hostile = calls(str(tmp_path / 'canary'))['os.system']
    files = {**gpt2_files, 'pytorch_model.bin': saved_by_torch({'x': hostile})}
    del files['model.safetensors']
    assert_runs_no_code(tmp_path, files, own_data, may_run=False)


# ---- 2. bad data sets ----

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
        contents.append(b'{"format_version": ' + b'[' * depth + b']' * depth + b'}')
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
        for module in data_sets, token_files:
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


# ---- 3. any bytes ----

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
