"""
Hostile and foreign files, and what is promised of each:

    code in a file          never runs, and what is larger by a file's account than the file gets no memory
    a bad data set          ends train.py in one sentence that names the file, before there is an out_dir
    any bytes as tokens     are refused, or read as numpy reads them, every id within the vocabulary

Checkpoints that came to harm by chance are in test_damaged_files.py.
"""
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import types
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_here
from forgery import (  # noqa: F401
    GONE,
    WEIGHT,
    WTE,
    ends_in_time,
    flip,
    forge,
    frugal,
    one_sentence,
    problem,
    refusals,
    rezip,
    saved_by_torch,
    saved_checkpoints,
    unzip,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from plaingpt.system.messages import UserError
from plaingpt.text import data_sets, token_files
from plaingpt.training import checkpoints

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='pipes and alarms, which POSIX systems have')


# ---- 1. hostile files ----

def call(function, *arguments):
    """What pickles as a call."""
    return type('Call', (), {'__reduce__': lambda self: (function, arguments)})()


def calls(canary):
    return {'os.system': call(os.system, f'echo > {canary}'), 'exec': call(exec, f'open({canary!r}, "w")'),
            'eval': call(eval, f'open({canary!r}, "w")'), 'subprocess': call(subprocess.check_call, ['touch', canary])}


def weights(value):
    return forge(*WTE, value=value, nanogpt=True)


def view(*view):
    """Weights that claim this offset, shape and stride of a storage of four numbers."""
    four = torch.storage.TypedStorage(wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True)
    return weights(lambda _: call(torch._utils._rebuild_tensor_v2, four, *view, False, OrderedDict()))


def config(opcodes):
    """A config that is pickled in these opcodes."""
    def make(content):
        content = forge('config', value={'dataset': 'MARK'}, nanogpt=True)(content)
        index = unzip(content)['archive/data.pkl'].replace(b'X\x04\x00\x00\x00MARK', opcodes)
        return rezip(content, {'data.pkl': index})
    return make


def overlapping(content):
    with zipfile.ZipFile(file := io.BytesIO(), 'w') as archive:
        archive.writestr('archive/data.pkl', bytes(2**17))
        archive.filelist += archive.filelist * 2000
    return file.getvalue()


MANY = [[1] * 1000] * 1000  # a million values in 5 kB: each list is written once and named again
STRANGE = {  # id: makes a checkpoint that must be refused, and cost nothing
    'a tar': lambda content: b'storages/'.ljust(100, b'\0') + bytes(924), 'overlapping': overlapping,
    'torch 1.5': lambda content: saved_by_torch({'model': {}}, _use_new_zipfile_serialization=False),
    'TorchScript': lambda content: torch.jit.script(torch.nn.Linear(2, 2)).save_to_buffer(),
    'deflated pickle': lambda content: rezip(content, {'data.pkl': pickle.dumps('x' * 2**26, 2)}, 'data.pkl'),
    'deflated tensor': lambda content: rezip(content, {WEIGHT: bytes(2**26)}, WEIGHT),
    'declared size': flip('central', 24, 0xf0, 4), 'complex': weights(lambda tensor: tensor + 1j),
    'sparse': weights(lambda _: torch.sparse_coo_tensor([[99], [99]], [1.0], (31, 8), check_invariants=False)),
    'compressed': weights(lambda _: torch.sparse_csr_tensor([0, 9], [9], [1.0], (1, 8), check_invariants=False)),
    'meta': weights(lambda tensor: torch.ones_like(tensor, device='meta')),
    'expanded': weights(lambda _: torch.zeros(1).expand(10**6, 10**6)),
    'expanded a little': weights(lambda tensor: torch.zeros(1, 8).expand(tensor.shape)),
    'beyond its storage': view(0, (10**6, 10**6), (10**6, 1)), 'after its storage': view(100, (4, 1), (1, 1)),
    'before its storage': view(-1, (4, 1), (1, 1)), 'backwards': view(1, (2, 1), (-1, 1)),
    'nested 100,000 deep': config(b']' * 100_000 + b'a' * 99_999),
    'nested in itself': config(b']r\xff\xff\0\0j\xff\xff\0\0a'),
    **{f'many in {key}': forge(key, 'x', value=MANY, nanogpt=True) for key in ('config', 'model', 'optimizer')},
    **{f'{value} times a million': forge('config', value={
        'gradient_accumulation_steps': value, 'batch_size': 1000, 'block_size': 1000}, nanogpt=True)
       for value in ('text', [1])}}


@pytest.mark.parametrize('name', STRANGE)
def test_a_checkpoint_of_a_strange_form_is_refused_and_gets_no_memory(tmp_path, saved, name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        (path := tmp_path / 'ckpt.pt').write_bytes(STRANGE[name](saved[3][0]))
        with frugal():
            sentence = problem(checkpoints.load, str(path))
        assert sentence.startswith(f'{path} ')
        assert sentence == problem(checkpoints.load_to_resume, str(tmp_path))
        assert sentence == problem(checkpoints.load_to_sample, str(tmp_path))


@pytest.mark.parametrize('name', ['ckpt.pt', 'last.pt'])
@pytest.mark.parametrize('write', [saved_by_torch, pickle.dumps])
@pytest.mark.parametrize('call', calls(''))
def test_no_code_in_a_checkpoint_runs(tmp_path, saved, char_data, call, write, name):
    content = write({**saved[3][1], 'config': {'x': calls(str(tmp_path / 'canary'))[call]}})
    for sentence in refusals(tmp_path / 'out', content, name=name, dataset=char_data):  # which look for a canary, too
        assert str(tmp_path / 'out' / name) in sentence


@pytest.mark.parametrize('name', [None, 'evil', 'RELATIVE', '/etc', '..', '.', '', '../../x', 'x\n', 5, GONE])
def test_a_checkpoint_leads_to_no_folder_outside_data(tmp_path, saved, name):
    call, evil = calls(str(tmp_path / 'canary'))['os.system'], tmp_path / 'evil'
    evil.mkdir()
    (evil / 'prepare.py').write_text(f'open({str(tmp_path / "canary")!r}, "w")', encoding='utf-8')
    (evil / 'meta.pkl').write_bytes(pickle.dumps(call))
    name = {'evil': str(evil), 'RELATIVE': os.path.relpath(evil, ROOT / 'data')}.get(name, name)
    content = forge('config', value={} if name is GONE else {'dataset': name})(saved[3][0])
    content = forge('tokenizer', value=GONE)(content)  # without which sample.py looks for the data set's
    for sentence in refusals(tmp_path / 'out', content, 's' if name is GONE else 'ts', prepare=True):
        assert str(tmp_path / 'out' / 'ckpt.pt') in sentence


def test_the_out_dir_in_a_checkpoint_is_not_written_to(tmp_path, saved, char_data):
    (tmp_path / 'out').mkdir()
    content = forge('config', 'out_dir', value=str(tmp_path / 'other'))(saved[3][0])
    (tmp_path / 'out' / 'last.pt').write_bytes(content)
    ended = run_here('train.py', **TINY, init_from='resume', dataset=char_data, out_dir=tmp_path / 'out')
    assert ended.returncode == 0 and os.listdir(tmp_path) == ['out']


@pytest.fixture(scope='module')
def gpt2_directory(tmp_path_factory):
    """{name: bytes} of the files of a random GPT-2 saved by Hugging Face."""
    from transformers import GPT2Config, GPT2LMHeadModel
    folder, config = tmp_path_factory.mktemp('gpt2'), dict(n_layer=1, n_head=1, n_embd=8, n_positions=16, vocab_size=64)
    GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


REMOTE = {'auto_map': {'AutoConfig': 'modeling_x.X', 'AutoModelForCausalLM': 'modeling_x.X'}, 'architectures': ['X']}
QUANTIZED = {'quantization_config': {'quant_method': 'bitsandbytes', 'load_in_8bit': True}}


@pytest.mark.parametrize('may_pass, config, cut_to', [
    (True, REMOTE, None), (True, QUANTIZED, None), *((True, {key: name}, None) for key, name in (
        ('attn_implementation', 'a/kernel'), ('_attn_implementation', 'a/kernel'),
        ('attn_implementation', 'flash_attention_2'))),
    (False, {}, 'bin'), (False, {}, -9), (False, {}, 0), (False, {}, 99), (False, {'n_layer': 10**9}, None),
    (False, {'vocab_size': 10**12}, None), (False, {'n_layer': 'x'}, None), (True, {'dtype': 'x'}, None),
    (False, [], None)], ids=str)
def test_a_gpt2_directory_runs_no_code_and_is_refused_where_broken(tmp_path, monkeypatch, char_data, gpt2_directory,
                                                                   may_pass, config, cut_to):
    folder, canary, files = tmp_path / 'gpt2', tmp_path / 'canary', dict(gpt2_directory)
    config = json.loads(files['config.json']) | config if config != [] else config
    files |= {'config.json': json.dumps(config).encode(), 'modeling_x.py': f'open({str(canary)!r}, "w")'.encode()}
    if cut_to == 'bin':  # a call in place of weights
        del files['model.safetensors']
        files['pytorch_model.bin'] = saved_by_torch({'x': calls(str(canary))['os.system']})
    else:
        files['model.safetensors'] = files['model.safetensors'][:cut_to]
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    monkeypatch.setattr('plaingpt.text.tokenizers._gpt2_encoding', lambda: types.SimpleNamespace(n_vocab=64, eot_token=0, encode=(
        lambda text, **_: [1]), decode_bytes=str, decode=str))
    keys = dict(TINY, max_iters=0, dataset=char_data, init_from=folder, out_dir=tmp_path / 'out')
    for script in dict(init_from=folder, num_samples=1, max_new_tokens=2, device='cpu'), keys:
        ended = run_here('train.py' if script is keys else 'sample.py', **script)
        assert not canary.exists() and (may_pass and ended.returncode == 0 or str(folder) in one_sentence(ended))


# ---- 2. bad data sets ----

TRAIN, VAL, META, PKL = 'train.bin', 'val.bin', 'meta.json', 'meta.pkl'


def put(name, content):
    """Changes a file: to these bytes, or to what this makes of its ids; None takes it away."""
    def make(folder):
        new = content(np.fromfile(folder / name, '<u2')) if callable(content) else content
        (folder / name).unlink() if new is None else (folder / name).write_bytes(bytes(new))
    return make


def meta(**changes):
    """Changes meta.json; GONE drops a key."""
    def make(folder):
        new = json.loads((folder / META).read_bytes()) | changes
        (folder / META).write_text(json.dumps({k: v for k, v in new.items() if v is not GONE}), encoding='utf-8')
    return make


def with_id(place):
    return lambda ids: np.where(np.arange(len(ids)) == place % len(ids), 60_000, ids).astype('<u2')


UNSAID, NO_META = meta(tokens=GONE), put(META, None)
LLM_C = np.array([20240520, 1, 9000] + [0] * 253, '<i4').tobytes()
CHARS = {'itos': {i: chr(97 + i) for i in range(30)}, 'stoi': {}, 'vocab_size': 30}
BAD = {  # id: (the file to be named, what is done to the folder)
    **{f'{kind} {name}': (name, UNSAID, put(name, content)) for name in (TRAIN, VAL) for kind, content in (
        ('no bytes', b''), ('one byte', b'\0'), ('one token', b'\0\0'), ('16 tokens', bytes(32)), ('no', None),
        ('half a token at the end of', lambda ids: bytes(ids)[:-1]), ('uint32', lambda ids: ids.astype('<u4')),
        ('llm.c', lambda ids: LLM_C + bytes(ids)), ('NumPy', lambda ids: b'\x93NUMPY\1\0' + bytes(ids)),
        ('zip', lambda ids: b'PK\3\4' + bytes(ids)), ('gzip', lambda ids: gzip.compress(bytes(ids), mtime=0)[:2000]),
        ('text', b'First Citizen:\n' * 99), ('a short text', b'First Citizen:\nBefore we a'))},
    **{f'{kind} {name}': (name, put(name, content)) for name in (TRAIN, VAL) for kind, content in (
        ('id at the start of', with_id(0)), ('id within', with_id(900)), ('id at the end of', with_id(-1)),
        ('uint32, counted,', lambda ids: ids.astype('<u4')), ('cut', lambda ids: ids[:-99]),
        ('longer', lambda ids: np.append(ids, ids)), ('llm.c, counted,', lambda ids: LLM_C + bytes(ids[512:])))},
    'uint16 called uint32': (TRAIN, meta(dtype='uint32')), 'small vocabulary': (TRAIN, meta(vocab_size=5)),
    'the same, unsaid': (TRAIN, meta(dtype='uint32', tokens=GONE)),
    **{f'forbidden {name}': (name,) for name in (TRAIN, VAL, META)},
    **{f'{make.__name__} {name}': (name, NO_META if name == PKL else put(name, None),
                                   lambda folder, name=name, make=make: make(folder / name))
       for name in (TRAIN, VAL, META, PKL) for make in (os.mkdir, os.mkfifo)},
    **{f'meta.json {content[:30]} {len(content)}': (META, put(META, content)) for content in (
        b'', b'{', b'null', b'[1]', b'\xff\xfe{}', bytes(99),
        *(b'{"format_version": %s}' % (b'[' * depth + b']' * depth) for depth in (500, 900, 990, 10**5)))},
    **{f'meta.json {key} {value!r}': (META, meta(**{key: value})) for key, value in (
        ('format_version', 2), ('format_version', 'a\nb'), ('dtype', 'int64'), ('dtype', 'a\nb'), ('vocab_size', 0),
        ('vocab_size', 'a\nb'), ('vocab_size', 1e9), ('vocab_size', 10**12), ('vocab_size', 10**30), ('tokens', [1]),
        ('tokenizer', None), ('tokens', {'train': 'a\nb'}), ('tokens', {'train': None}), ('tokens', {'train': -1}))},
    **{f'meta.pkl {kind}': (PKL, NO_META, put(PKL, content if isinstance(content, bytes) else pickle.dumps(content)))
       for kind, content in (*calls('canary').items(), ('list', [1]), ('vocab_size -5', CHARS | {'vocab_size': -5}),
                             ('vocab_size 10**12', CHARS | {'vocab_size': 10**12}),
                             ('two lines', b'\x80\x04\x8c\x03o\ns\x8c\x03x\ny\x93.'))},
    'meta.pkl of another text': (TRAIN, NO_META, put(PKL, pickle.dumps(CHARS | {'vocab_size': 2, 'itos': 'ab'})))}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_data_set_is_refused_by_its_name(tmp_path, monkeypatch, char_data, name):
    folder = tmp_path / 'data'
    folder.mkdir()
    monkeypatch.chdir(tmp_path)  # where a canary would be
    for file in TRAIN, VAL, META:
        (folder / file).write_bytes((char_data / file).read_bytes())
    named, *changes = BAD[name]
    for change in changes:
        change(folder)

    def guarded(path, *arguments, **keys):  # a file without permission, even to root
        if path == str(folder / named):
            raise PermissionError(13, 'Permission denied', path)
        return open(path, *arguments, **keys)

    if not changes:
        for module in data_sets, token_files:
            monkeypatch.setattr(module, 'open', guarded, raising=False)
    sentence = one_sentence(run_here('train.py', **TINY, dataset=folder, out_dir=tmp_path / 'out'))
    assert str(folder / named) in sentence and os.listdir(tmp_path) == ['data']


@pytest.mark.parametrize('left', [0, 1, 33, 34, 1000])
def test_a_file_cut_short_while_it_is_open_is_refused(tmp_path, left):
    np.arange(5000).astype('<u2').tofile(path := tmp_path / TRAIN)
    data = token_files.TokenFile(str(path), vocab_size=5000, block_size=16)
    os.truncate(path, left)
    for call, *arguments in (data.check_ids, 5000), (data.batch, 1, 'train', 0, 0, 99, 16, torch.device('cpu')):
        assert problem(call, *arguments).startswith(f'{path} ends before token ')


def test_a_pickle_of_a_few_bytes_gets_no_memory(tmp_path):
    (tmp_path / PKL).write_bytes(b'\x80\x02K\x01r' + struct.pack('<I', 2**24) + b'.')  # a far place in its memo
    with frugal():
        assert str(tmp_path / PKL) in problem(data_sets.read_meta, str(tmp_path))


# ---- 3. any bytes ----

QUIET = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def some_token_files(draw):
    """(bytes, dtype, vocab_size, block_size) of a file: any bytes, or tokens, of which one may be spoiled."""
    dtype, vocab_size = draw(st.sampled_from(sorted(token_files.DTYPES))), draw(st.integers(1, 70_000))
    kind, block_size = token_files.DTYPES[dtype], draw(st.integers(1, 64))
    if draw(st.integers(0, 2)) == 0:
        return (draw(st.binary(max_size=99)) * draw(st.integers(0, 41)))[:4096], dtype, vocab_size, block_size
    random, top = np.random.default_rng(draw(st.integers(0, 2**32))), np.iinfo(kind).max
    ids = random.integers(0, min(vocab_size, top + 1), draw(st.integers(0, 1024))).astype(kind)
    if len(ids) and draw(st.booleans()):
        ids[draw(st.integers(0, len(ids) - 1))] = draw(st.integers(0, top))
    return ids.tobytes() + draw(st.sampled_from([b'', b'', b'', b'\1'])), dtype, vocab_size, block_size


@settings(max_examples=1000, **QUIET)
@given(file=some_token_files(), batch_size=st.integers(1, 9), check=st.booleans(), step=st.integers(0, 9))
def test_any_bytes_are_refused_or_read_as_numpy_reads_them(tmp_path_factory, file, batch_size, check, step):
    content, dtype, vocab_size, block_size = file
    (path := tmp_path_factory.getbasetemp() / 'any.bin').write_bytes(content)
    width = token_files.DTYPES[dtype].itemsize
    ids = np.frombuffer(content[:len(content) // width * width], token_files.DTYPES[dtype]).astype(np.int64)
    whole = len(content) == len(ids) * width and len(ids) > block_size
    try:
        data = token_files.TokenFile(str(path), dtype, vocab_size, block_size)
        assert whole and len(data) == len(ids)
        if check:
            data.check_ids(vocab_size)
            assert ids.max() < vocab_size
        x, y = data.batch(1337, 'train', step, 0, batch_size, block_size, torch.device('cpu'))
    except UserError as error:
        assert str(path) in str(error) and '\n' not in str(error)
        assert not whole or ids.max() >= vocab_size or 'looks like' in str(error)
        return
    rows = np.concatenate([x.numpy(), y.numpy()[:, -1:]], axis=1)
    assert x.shape == y.shape == (batch_size, block_size) and torch.equal(x[:, 1:], y[:, :-1])
    windows = {window.tobytes() for window in np.lib.stride_tricks.sliding_window_view(ids, block_size + 1)}
    assert 0 <= rows.min() and rows.max() < vocab_size and all(row.tobytes() in windows for row in rows)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(['train', 'val', 'kind', 'chars', 'a\nb']), inner), max_leaves=6)
GOOD = {'format_version': 1, 'dtype': 'uint16', 'vocab_size': 65, 'tokenizer': {'kind': 'gpt2'}, 'tokens': {'train': 9}}


@settings(max_examples=300, **QUIET)
@given(meta=JSON | st.fixed_dictionaries({key: st.just(good) | st.just(good) | JSON for key, good in GOOD.items()}))
@example(GOOD)
@example(GOOD | {'vocab_size': 'a\nb'})
@example(GOOD | {'tokens': {'train': None}})
def test_any_meta_json_is_refused_or_of_the_right_types(tmp_path_factory, meta):
    (folder := tmp_path_factory.getbasetemp() / 'any').mkdir(exist_ok=True)
    (folder / META).write_text(json.dumps(meta), encoding='utf-8')
    try:
        read = data_sets.read_meta(str(folder))
    except UserError as error:
        assert str(folder / META) in str(error) and '\n' not in str(error) and meta != GOOD
        return
    assert read['dtype'] in token_files.DTYPES and type(read['vocab_size']) is int and read['vocab_size'] >= 1
    assert isinstance(read['tokenizer'], dict) and isinstance(read['tokens'], dict)
    assert all(type(count) is int and count >= 0 for count in read['tokens'].values())
