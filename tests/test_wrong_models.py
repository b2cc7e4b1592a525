"""Models of other programs that are damaged, hostile or of another kind: one sentence each.

The scripts that open them must end with it, write nothing, and leave the model as it was."""
import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import refused, run_here, succeeded
from fine_tuning import save_run
from generating import lively_gpt
from safetensors.torch import load_file, save_file

from plaingpt.formats.gguf_writing import write_gguf
from fine_tuning import ABC

LLAMA = dict(position='rope', norm='rmsnorm', mlp='swiglu', tied=False, bias=False)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """The folder of a whole model in Hugging Face's form."""
    folder = tmp_path_factory.mktemp('models')
    out_dir = save_run(folder / 'run', lively_gpt(**LLAMA))
    output = folder / 'whole'
    succeeded(run_here('export.py', out_dir=out_dir, output=output))
    return output


@pytest.fixture(scope='module')
def gguf(tmp_path_factory):
    """The bytes of a whole GGUF file."""
    path = tmp_path_factory.mktemp('gguf') / 'whole.gguf'
    write_gguf(str(path), lively_gpt(**LLAMA), ABC)
    return path.read_bytes()


def all_files(folder):
    """{path: content} of all files in a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def assert_refused(tmp_path, source, sentence):
    """Fails unless each script refuses to open a source with this in its one sentence."""
    before = all_files(tmp_path)
    commands = [
        ('sample.py', {}),
        ('export.py', {'output': tmp_path / 'there'}),
        ('evaluate.py', {'dataset': 'shakespeare_char', 'device': 'cpu'}),
    ]
    for script, keys in commands:
        error = refused(run_here(script, init_from=source, **keys))
        assert error.count('\n') == 0, error
        assert sentence in error
    assert all_files(tmp_path) == before
    assert not (tmp_path / 'there').exists()


# ---- Hugging Face's form ----

def change_json(name, **changes):
    def change(folder):
        path = folder / name
        content = json.loads(path.read_text(encoding='utf-8'))
        path.write_text(json.dumps(content | changes), encoding='utf-8')
    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text, encoding='utf-8')


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_short(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


def change_tensor(change):
    """A function that changes the tensors of a folder by change({name: tensor})."""
    def rewrite(folder):
        path = folder / 'model.safetensors'
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={'format': 'pt'})
    return rewrite


def lose_a_tensor(tensors):
    del tensors['model.norm.weight']


def make_nan(tensors):
    tensors['model.norm.weight'][3] = float('nan')


def make_integers(tensors):
    tensors['model.norm.weight'] = torch.ones(16, dtype=torch.int64)


def only_a_pickle(folder):
    class Call:
        def __reduce__(self):
            return os.system, (f'touch {folder}/canary',)

    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Call()))


def index_that_names(name):
    def write_index(folder):
        (folder / 'model.safetensors').rename(folder / 'elsewhere.safetensors')
        index = {'weight_map': {'model.norm.weight': name}}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index), encoding='utf-8')
    return write_index


DEEP = '[' * 100_000 + ']' * 100_000
FOLDERS = {
    'no config': (remove('config.json'), 'neither the ckpt.pt or last.pt of a run nor'),
    'half a config': (write('config.json', '{"model_type": "lla'), 'config.json is damaged'),
    'a list for a config': (write('config.json', '[]'), 'config.json holds no JSON object'),
    'another architecture': (change_json('config.json', model_type='gpt_neox'), "'gpt_neox'"),
    'windows': (change_json('config.json', model_type='mistral', sliding_window=8),
                'sliding_window'),
    'another rope': (change_json('config.json', rope_parameters={'rope_type': 'yarn'}), 'yarn'),
    'quantised': (change_json('config.json', quantization_config={'bits': 4}),
                  'quantization_config'),
    'another size': (change_json('config.json', intermediate_size=80), 'has the shape'),
    'an enormous size': (change_json('config.json', vocab_size=10 ** 9), 'has the shape'),
    'too many layers': (change_json('config.json', num_hidden_layers=10 ** 6), '1000000 layers'),
    'cut short': (cut_short, 'model.safetensors is damaged'),
    'a tensor lost': (change_tensor(lose_a_tensor), 'lack 1 tensors'),
    'not a number': (change_tensor(make_nan), 'not finite'),
    'integers': (change_tensor(make_integers), 'torch.int64'),
    'a pickle': (only_a_pickle, 'which could run any code'),
    'a lost shard': (index_that_names('model-00001.safetensors'), 'is missing'),
    'a path out': (index_that_names('../whole/elsewhere.safetensors'), 'is no file of the model'),
    'an absolute path': (index_that_names('/etc/passwd'), 'is no file of the model'),
    'half a tokenizer': (write('tokenizer.json', '{"model": '), 'tokenizer.json is damaged'),
    'a deep tokenizer': (write('tokenizer.json', DEEP), 'tokenizer.json is damaged'),
    'a tokenizer of another model': (write('tokenizer.json', json.dumps({
        'version': '1.0', 'added_tokens': [], 'model': {
            'type': 'WordLevel', 'vocab': {'a': 0, 'b': 10 ** 8}, 'unk_token': 'a'}})),
        'ids up to 100000000'),
}


@pytest.mark.parametrize('name', FOLDERS)
def test_a_wrong_folder_ends_in_one_sentence(tmp_path, exported, name):
    damage, sentence = FOLDERS[name]
    folder = tmp_path / 'model'
    shutil.copytree(exported, folder)
    damage(folder)
    assert_refused(tmp_path, folder, sentence)


# ---- GGUF ----

GGUF_FILES = {
    'empty': (lambda content: b'', 'cannot be loaded as a GGUF file'),
    'text': (lambda content: b'Once upon a time\n' * 9, 'cannot be loaded as a GGUF file'),
    'half a header': (lambda content: content[:100], 'cannot be loaded as a GGUF file'),
    'cut short': (lambda content: content[:-100], 'cannot be loaded as a GGUF file'),
    'a later version': (lambda content: content[:4] + b'\x09' + content[5:], 'version'),
    'endless tensors': (lambda content: content[:8] + b'\xff' * 7 + b'\x0f' + content[16:],
                        'cannot be loaded as a GGUF file'),
    'endless metadata': (lambda content: content[:16] + b'\xff' * 7 + b'\x0f' + content[24:],
                         'cannot be loaded as a GGUF file'),
    'another architecture': (lambda content: content.replace(b'llama', b'mamba'), "'mamba'"),
    'a tensor lost': (lambda content: content.replace(b'ffn_norm', b'ffn_gnom'), 'ffn_'),
    'a tokenizer of another kind': (lambda content: content.replace(b'rwkv', b'bert'), 'bert'),
}


@pytest.mark.parametrize('name', GGUF_FILES)
def test_a_wrong_gguf_file_ends_in_one_sentence(tmp_path, gguf, name):
    damage, sentence = GGUF_FILES[name]
    path = tmp_path / 'model.gguf'
    path.write_bytes(damage(gguf))
    assert_refused(tmp_path, path, sentence)


def test_a_gguf_file_that_is_missing_ends_in_one_sentence(tmp_path):
    assert_refused(tmp_path, tmp_path / 'model.gguf', 'model.gguf')
