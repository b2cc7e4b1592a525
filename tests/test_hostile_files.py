"""
Hostile checkpoints and models: code in them never runs, and if a file claims to hold more than it
has bytes for, no memory is taken for that.

Hostile data sets are in text/test_hostile_data_sets.py, checkpoints that were damaged by chance in
training/test_damaged_files.py.
"""
import io
import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_here
from forgery import (GONE, WEIGHT, WTE, Call, calls, flip, forge, frugal, one_sentence, problem,
                     refusals, rezip, saved_by_torch, unzip)

from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.training import checkpoints

pytestmark = [
    pytest.mark.skipif(os.name != 'posix', reason='pipes and alarms, which POSIX systems have'),
    pytest.mark.usefixtures('ends_in_time'),
]


# ---- checkpoints ----

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
