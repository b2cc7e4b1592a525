"""What train.py says when something is missing or does not fit: one sentence, status 2, and nothing is written."""
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT, TINY, refused, run_here, succeeded


def train(out_dir, **keys):
    return run_here('train.py', **{**TINY, 'out_dir': out_dir, **keys})


@pytest.fixture
def gpt2_directory(tmp_path):
    """A random GPT-2 with 8 positions and a vocabulary of 12, saved by Hugging Face."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=12))
    model.save_pretrained(tmp_path / 'gpt2')
    return tmp_path / 'gpt2'


@pytest.mark.parametrize('keys, sentence', [
    (dict(dataset='nowhere'), 'nowhere/train.bin not found: put train.bin, val.bin and meta.json into'),
    (dict(block_size=19_000), 'but block_size=19000 needs 19001: use --block_size='),
    (dict(init_from='gtp2'), 'init_from=gtp2 is not scratch, resume or auto, and gtp2 cannot be loaded as a GPT-2'),
    (dict(init_from='resume'), 'holds no checkpoint'),
    (dict(n_head=3), 'n_embd=16 is not a multiple of n_head=3'),
    (dict(dropout=1), 'dropout=1.0: allowed is [0, 1)'),
    (dict(batch_size=0), 'batch_size=0: allowed is >= 1'),
    (dict(dtype='float8'), "dtype='float8': allowed is 'auto' | 'float32'"),
])
def test_a_run_that_cannot_be_is_refused(tmp_path, char_data, keys, sentence):
    assert sentence in refused(train(tmp_path / 'out', **{'dataset': char_data, **keys}))
    assert not (tmp_path / 'out').exists()


def test_openwebtext_is_never_fetched_unasked_and_its_absence_names_the_way_in(tmp_path):
    if (ROOT / 'data' / 'openwebtext' / 'train.bin').exists():
        pytest.skip('OpenWebText is here')
    said = refused(train(tmp_path / 'out', prepare=True))
    assert 'openwebtext/prepare.py (54 GB), or start with python train.py config/train_shakespeare_char.py' in said


def test_a_pretrained_model_that_does_not_fit_the_run_is_refused(tmp_path, char_data, gpt2_directory):
    keys = dict(dataset=char_data, init_from=gpt2_directory)
    assert 'block_size=16: this model takes 1 to 8 positions' in refused(train(tmp_path / 'out', **keys))
    said = refused(train(tmp_path / 'out', **keys, block_size=4))
    assert 'tokens in its vocabulary, the model 12: they do not belong together' in said


def test_an_out_dir_that_cannot_be_written_is_refused_before_training(tmp_path, char_data):
    (tmp_path / 'file').write_text('')
    ended = train(tmp_path / 'file' / 'out', dataset=char_data)
    assert 'out_dir cannot be written' in refused(ended) and 'step 0' not in ended.stdout


def test_where_wandb_refuses_the_run_in_the_way_stays(tmp_path, char_data, monkeypatch):
    succeeded(train(tmp_path / 'out', dataset=char_data))
    before = sorted(os.listdir(tmp_path / 'out'))
    wandb = ModuleType('wandb')
    wandb.__spec__, wandb.errors = ModuleSpec('wandb', None), SimpleNamespace(Error=KeyError)
    wandb.init = lambda **keys: {}['no such project']
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    assert 'Weights & Biases refuses' in refused(train(tmp_path / 'out', dataset=char_data, wandb_log=True))
    assert sorted(os.listdir(tmp_path / 'out')) == before


@pytest.mark.skipif(os.name != 'posix', reason='limits the size of files as POSIX systems can')
def test_a_full_disk_is_warned_of_and_at_the_end_an_error(tmp_path, char_data):
    succeeded(train(tmp_path / 'out', dataset=char_data))
    good = (tmp_path / 'out' / 'last.pt').read_bytes()
    keys = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out', 'init_from': 'resume', 'max_iters': 8,
            'eval_interval': 1}
    command = [sys.executable, ROOT / 'train.py', *[f'--{key}={value}' for key, value in keys.items()]]
    ended = subprocess.run(['bash', '-c', 'ulimit -f 50; exec "$@"', '-', *command], capture_output=True, text=True)
    assert 'error: the state of step 8 could not be saved' in refused(ended)
    assert 'warning: the state of step 7 could not be saved' in ended.stderr and 'step 8: train loss' in ended.stdout
    assert (tmp_path / 'out' / 'last.pt').read_bytes() == good
    assert sorted(os.listdir(tmp_path / 'out')) == ['.lock', 'ckpt.pt', 'last.pt', 'loss.png', 'metrics.jsonl']


def test_tokens_beyond_the_vocabulary_are_found_in_training(tmp_path, char_data):
    shutil.copytree(char_data, tmp_path / 'data')
    for name in ('train.bin', 'val.bin'):
        path = tmp_path / 'data' / name
        path.write_bytes(b'\xff\xff' * (path.stat().st_size // 2))
    assert 'holds the id 65535 at token' in refused(train(tmp_path / 'out', dataset=tmp_path / 'data'))


def test_a_data_set_prepared_anew_with_other_characters_is_not_resumed_on(tmp_path, char_data, text):
    from plaingpt.text.publishing import write_data_set
    from plaingpt.text.tokenizers import CharTokenizer
    succeeded(train(tmp_path / 'out', dataset=char_data))
    data = tmp_path / 'data'
    shutil.copytree(char_data, data)
    keys = dict(dataset=data, init_from='resume')
    other = CharTokenizer.from_text(text.upper())
    write_data_set(str(data), other, {split: other.encode(text.upper()) for split in ('train', 'val')}, 'a test', None)
    import torch
    saved = torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)
    saved['config']['dataset'] = str(data)
    torch.save(saved, tmp_path / 'out' / 'last.pt')
    assert 'has another vocabulary than the model was trained with' in refused(train(tmp_path / 'out', **keys))


@pytest.mark.parametrize('script, sentence', [
    ('raise SystemExit(1)', 'prepare.py failed, as said above'), (None, 'train.bin not found')])
def test_a_preparation_that_fails_ends_the_run(tmp_path, script, sentence):
    (tmp_path / 'data').mkdir()
    if script:
        (tmp_path / 'data' / 'prepare.py').write_text(script)
    assert sentence in refused(train(tmp_path / 'out', dataset=tmp_path / 'data', prepare=True))
    assert not (tmp_path / 'out').exists()


def test_a_missing_data_set_is_prepared_where_the_config_allows_it(tmp_path, char_data):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'prepare.py').write_text(
        f'import shutil; shutil.copytree({str(char_data)!r}, {str(tmp_path / "data")!r}, dirs_exist_ok=True)')
    assert 'not found: run python' in refused(train(tmp_path / 'out', dataset=tmp_path / 'data'))
    succeeded(train(tmp_path / 'out', dataset=tmp_path / 'data', prepare=True))


def test_a_nanogpt_folder_without_a_vocabulary_is_taken_for_gpt2s_tokens(tmp_path, char_data):
    data = tmp_path / 'data'
    data.mkdir()
    for name in ('train.bin', 'val.bin'):
        shutil.copy(char_data / name, data)
    assert 'vocab_size=50304' in succeeded(train(tmp_path / 'out', dataset=data, max_iters=1))
