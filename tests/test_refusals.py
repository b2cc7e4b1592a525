"""A run that cannot start or continue says why in one sentence, and leaves no half-made files."""
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, refused, run_here, succeeded
from runs import command, train


@pytest.fixture
def gpt2_directory(tmp_path):
    """A random GPT-2 with 8 positions and a vocabulary of 12, saved by Hugging Face."""
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=12)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / 'gpt2')
    return tmp_path / 'gpt2'


# ---- settings ----

@pytest.mark.parametrize('keys, sentence', [
    (dict(dataset='nowhere'),
     'nowhere/train.bin not found: put train.bin, val.bin and meta.json into'),
    (dict(block_size=19_000), 'but block_size=19000 needs 19001: use --block_size='),
    (dict(init_from='gtp2'),
     'init_from=gtp2 is not scratch or resume, and gtp2 cannot be loaded'),
    (dict(init_from='resume'), 'holds no checkpoint'),
    (dict(n_head=3), 'n_embd=16 must be a multiple of n_head=3'),
    (dict(dropout=1), 'dropout=1.0: must be in [0, 1)'),
    (dict(batch_size=0), 'batch_size=0: must be >= 1'),
    (dict(dtype='float8'), "dtype='float8': must be one of 'auto', 'float32'"),
    (dict(bf16_residual=True), 'bf16_residual=True needs dtype=bfloat16, and this run uses fl'),
    (dict(compile_mode='fast'), "compile_mode='fast' must be one of auto, default,"),
])
def test_a_run_with_wrong_settings_is_refused_and_writes_nothing(
        tmp_path, char_data, keys, sentence):
    settings = {**TINY, 'dataset': char_data, 'out_dir': tmp_path / 'out', **keys}
    assert sentence in refused(run_here('train.py', **settings))
    assert not (tmp_path / 'out').exists()


def test_a_pretrained_model_that_does_not_fit_the_run_is_refused(
        tmp_path, char_data, gpt2_directory):
    def refusal(**keys):
        return refused(train(tmp_path / 'out', char_data, init_from=gpt2_directory, **keys))

    assert 'block_size=16: this model takes at most 8 positions' in refusal()
    assert 'tokens in its vocabulary, but the model has 12' in refusal(block_size=4)


# ---- out_dir ----

def test_an_out_dir_that_cannot_be_written_is_refused_before_training(tmp_path, char_data):
    (tmp_path / 'file').touch()
    ended = train(tmp_path / 'file' / 'out', char_data)
    assert 'out_dir cannot be written' in refused(ended)
    assert 'step 0' not in ended.stdout


def test_a_run_that_wandb_refuses_leaves_the_old_run_where_it_is(tmp_path, char_data, monkeypatch):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data))
    before = sorted(os.listdir(out_dir))

    def init(**keys):
        raise KeyError('no such project')

    wandb = ModuleType('wandb')
    wandb.__spec__ = ModuleSpec('wandb', None)
    wandb.errors = SimpleNamespace(UsageError=KeyError, AuthenticationError=PermissionError)
    wandb.init = init
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    assert 'Weights & Biases refuses' in refused(train(out_dir, char_data, wandb_log=True))
    assert sorted(os.listdir(out_dir)) == before


@pytest.mark.skipif(os.name != 'posix', reason='limits the size of files as POSIX systems can')
def test_a_full_disk_is_a_warning_during_the_run_and_an_error_at_its_end(tmp_path, char_data):
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data))
    good = (out_dir / 'last.pt').read_bytes()
    before = sorted(os.listdir(out_dir))
    keys = {**TINY, 'dataset': char_data, 'out_dir': out_dir, 'init_from': 'resume',
            'max_iters': 8, 'eval_interval': 1}
    # No file may grow beyond 50 KiB.
    limited = ['bash', '-c', 'ulimit -f 50; exec "$@"', '-', *command(keys)]
    ended = subprocess.run(limited, capture_output=True, text=True)
    assert 'error: the state of step 8 could not be saved' in refused(ended)
    assert 'warning: the state of step 7 could not be saved' in ended.stderr
    assert 'step 8: train loss' in ended.stdout
    assert (out_dir / 'last.pt').read_bytes() == good
    assert sorted(os.listdir(out_dir)) == before


# ---- data sets ----

def test_openwebtext_is_never_fetched_unasked_and_the_refusal_names_a_smaller_data_set(tmp_path):
    if (ROOT / 'data' / 'openwebtext' / 'train.bin').exists():
        pytest.skip('OpenWebText is prepared on this machine')
    settings = {**TINY, 'out_dir': tmp_path / 'out', 'prepare': True}
    sentence = refused(run_here('train.py', **settings))
    assert ('openwebtext/prepare.py (54 GB), or start with '
            'python train.py config/train_shakespeare_char.py') in sentence


def test_tokens_beyond_the_vocabulary_are_found_in_training(tmp_path, char_data):
    data = tmp_path / 'data'
    shutil.copytree(char_data, data)
    for name in ('train.bin', 'val.bin'):
        path = data / name
        tokens = path.stat().st_size // 2
        path.write_bytes(tokens * b'\xff\xff')
    assert 'holds the id 65535 at token' in refused(train(tmp_path / 'out', data))


def test_a_run_does_not_resume_on_a_data_set_with_other_characters(tmp_path, char_data, text):
    from plaingpt.text.publishing import write_data_set
    from plaingpt.text.tokenizers import CharTokenizer
    out_dir = tmp_path / 'out'
    succeeded(train(out_dir, char_data))

    # The same data set, prepared again from another text.
    data = tmp_path / 'data'
    shutil.copytree(char_data, data)
    other_text = text.upper()
    tokenizer = CharTokenizer.from_text(other_text)
    ids = tokenizer.encode(other_text)
    write_data_set(str(data), tokenizer, {'train': ids, 'val': ids}, 'a test', None)

    # A run resumes on the data set that its checkpoint names.
    saved = torch.load(out_dir / 'last.pt', weights_only=True)
    saved['config']['dataset'] = str(data)
    torch.save(saved, out_dir / 'last.pt')
    sentence = refused(train(out_dir, data, init_from='resume'))
    assert 'has another vocabulary than the model was trained with' in sentence


@pytest.mark.parametrize('script, sentence', [
    ('raise SystemExit(1)', 'prepare.py failed: see its message above'),
    (None, 'train.bin not found'),
])
def test_a_preparation_that_fails_ends_the_run(tmp_path, script, sentence):
    data = tmp_path / 'data'
    data.mkdir()
    if script:
        (data / 'prepare.py').write_text(script, encoding='utf-8')
    assert sentence in refused(train(tmp_path / 'out', data, prepare=True))
    assert not (tmp_path / 'out').exists()


def test_a_missing_data_set_is_prepared_if_the_config_allows_it(tmp_path, char_data):
    data = tmp_path / 'data'
    data.mkdir()
    (data / 'prepare.py').write_text(
        'import shutil\n'
        f'shutil.copytree({str(char_data)!r}, {str(data)!r}, dirs_exist_ok=True)\n',
        encoding='utf-8')
    assert 'not found: run python' in refused(train(tmp_path / 'out', data))
    succeeded(train(tmp_path / 'out', data, prepare=True))


def test_a_folder_of_nanogpt_without_a_vocabulary_is_assumed_to_hold_gpt2s_tokens(
        tmp_path, char_data):
    data = tmp_path / 'data'
    data.mkdir()
    for name in ('train.bin', 'val.bin'):
        shutil.copy(char_data / name, data)
    assert 'vocab_size=50304' in succeeded(train(tmp_path / 'out', data, max_iters=1))
