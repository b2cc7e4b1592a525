"""
Compares ways of fine-tuning: a small net learns the Python of the standard library's own sources,
then a little Shakespeare in each of several ways. Prints the two tables of docs/finetuning.md, in
about 20 minutes on two cores.

    python experiments/finetuning.py
"""
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig
from plaingpt.system.devices import place
from plaingpt.text.publishing import write_data_set
from plaingpt.text.shakespeare import read_text
from plaingpt.text.tokenizers import CharTokenizer
from plaingpt.training import freezing, lora

ROOT = Path(__file__).resolve().parents[1]
PYTHON_CHARACTERS = 4_000_000  # of the library's sources, at most
PLAYS_CHARACTERS = 100_000     # of Shakespeare for training
ALL_LAYERS = 'c_attn,c_proj,c_fc'

# The keys of train.py that all runs share, and those of the two stages.
NET = {
    'device': 'cpu', 'block_size': 128, 'batch_size': 16, 'gradient_accumulation_steps': 1,
    'n_layer': 6, 'n_head': 4, 'n_embd': 192, 'position': 'rope', 'rope_theta': 60,
    'log_interval': 10, 'eval_iters': 10, 'always_save_checkpoint': False,
    'schedule': 'linear', 'min_lr': 0,
}
LEARN_PYTHON = NET | {
    'max_iters': 800, 'lr_decay_iters': 800, 'eval_interval': 800, 'learning_rate': 2e-3,
    'warmup_iters': 50,
}
LEARN_PLAYS = NET | {
    'max_iters': 240, 'lr_decay_iters': 240, 'eval_interval': 40, 'warmup_iters': 20,
    'early_stop': 2,
}


class Way(NamedTuple):
    """A way of fine-tuning: its keys, and the learning rates to try. The best one counts."""
    keys: dict
    rates: tuple


WEIGHT_RATES = (3e-4, 1e-3, 3e-3)
FROZEN_RATES = (1e-3, 3e-3, 1e-2)
ADAPTER_RATES = (3e-3, 1e-2, 3e-2)
UNFREEZE = {0: 'head', 60: 'last:3', 120: 'all'}

WAYS = {
    'from scratch': Way({'init_from': 'scratch'}, WEIGHT_RATES),
    'all weights': Way({}, WEIGHT_RATES),
    'LoRA, rank 8, c_attn': Way({'lora_rank': 8}, ADAPTER_RATES),
    'LoRA, rank 8, all layers': Way({'lora_rank': 8, 'lora_targets': ALL_LAYERS}, ADAPTER_RATES),
    'last:1': Way({'trainable': 'last:1'}, FROZEN_RATES),
    'head': Way({'trainable': 'head'}, FROZEN_RATES),
    'head, last:3 from 60, all from 120': Way({'unfreeze': UNFREEZE}, WEIGHT_RATES),
}


class Run(NamedTuple):
    """The outcome of a run; sizes in bytes."""
    records: list         # the lines of metrics.jsonl
    peak_memory: int      # resident, of the process
    checkpoint_size: int  # of ckpt.pt


# ---- the two data sets ----

def python_sources():
    """The top level of the standard library as one text."""
    library = Path(sysconfig.get_paths()['stdlib'])
    sources = []
    for path in sorted(library.glob('*.py')):
        sources.append(path.read_text(encoding='utf-8', errors='replace'))
    return ''.join(sources)[:PYTHON_CHARACTERS]


def only_ascii(text):
    return text.encode('ascii', errors='ignore').decode()


def prepare(folder):
    """Writes the data sets 'python' and 'plays' into folder, with one vocabulary of characters."""
    plays, _, _ = read_text(str(ROOT / 'data' / 'shakespeare_char'))
    texts = {'python': only_ascii(python_sources()), 'plays': only_ascii(plays)}
    tokenizer = CharTokenizer.from_text(texts['python'] + texts['plays'])
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        cut = len(ids) * 9 // 10
        # Only a little Shakespeare to train on, but the usual tenth of it to validate on.
        trained = cut if name == 'python' else PLAYS_CHARACTERS
        (folder / name).mkdir()
        splits = {'train': ids[:trained], 'val': ids[cut:]}
        write_data_set(str(folder / name), tokenizer, splits, name, None)


# ---- the first table: quality ----

def train(out_dir, keys):
    """Runs train.py with these keys to its end."""
    command = [sys.executable, ROOT / 'train.py', f'--out_dir={out_dir}']
    for key, value in keys.items():
        command.append(f'--{key}={value}')
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f'{command} failed')
    lines = (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    records = [json.loads(line) for line in lines]
    peak_memory = usage.ru_maxrss * 1024
    return Run(records, peak_memory, (out_dir / 'ckpt.pt').stat().st_size)


def best_evaluation(run):
    """(loss, step) of the evaluation with the lowest validation loss."""
    evaluations = []
    for record in run.records:
        if 'val_loss' in record:
            evaluations.append((record['val_loss'], record['step']))
    return min(evaluations)


def compare_ways(folder):
    """Learns Python once, then Shakespeare in each way, and prints a row a way."""
    base = folder / 'base'
    learned = train(base, LEARN_PYTHON | {'dataset': folder / 'python'})
    last = learned.records[-1]
    print(f"validation loss of Python {last['val_loss']:.3f} after {last['step']} steps\n")

    print('| way | learning rate | first loss | best loss | at step | seconds in all '
          '| memory held | ckpt.pt |')
    print('|---|---|---|---|---|---|---|---|')
    for number, (name, way) in enumerate(WAYS.items()):
        runs = {}
        for rate in way.rates:
            start = {'init_from': base, 'dataset': folder / 'plays', 'learning_rate': rate}
            runs[rate] = train(folder / f'{number} {rate}', LEARN_PLAYS | start | way.keys)
        evaluations = {rate: best_evaluation(run) for rate, run in runs.items()}
        best_rate = min(evaluations, key=evaluations.get)
        loss, step = evaluations[best_rate]
        best = runs[best_rate]
        first_loss = best.records[0]['val_loss']
        seconds = best.records[-1]['elapsed']
        print(f'| {name} | {best_rate:g} | {first_loss:.3f} | {loss:.3f} | {step} | {seconds:.0f} '
              f'| {best.peak_memory / 1e6:.0f} MB | {best.checkpoint_size / 1e6:.2f} MB |',
              flush=True)


# ---- the second table: the time of a step ----

def make_gpt2(lora_targets=None, trainable='all'):
    """GPT-2's 124M with random weights, and an optimizer for the parameters that learn."""
    gpt = place(GPT(GPTConfig(block_size=256)), torch.device('cpu'))
    if lora_targets is not None:
        lora.add_lora(gpt, rank=8, alpha=16.0, dropout=0.0, targets=lora_targets)
    else:
        freezing.freeze(gpt, 0, {'lora_rank': 0, 'trainable': trainable, 'unfreeze': None})
    return gpt, gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu')


def time_step(gpt, optimizer, tokens):
    """Milliseconds of a training step on tokens, int64 (1, T + 1), in bfloat16."""
    begin = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16):
        _, loss = gpt(tokens[:, :-1], tokens[:, 1:].contiguous(), with_logits=False)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return 1000 * (time.perf_counter() - begin)


def compare_steps():
    """Prints what a step of GPT-2's 124M takes in each way, with one sequence of 256 tokens."""
    ways = {
        'all weights': make_gpt2(),
        'LoRA, rank 8, c_attn': make_gpt2(lora_targets='c_attn'),
        'LoRA, rank 8, all layers': make_gpt2(lora_targets=ALL_LAYERS),
        'last:1': make_gpt2(trainable='last:1'),
        'head': make_gpt2(trainable='head'),
    }
    times = {name: [] for name in ways}
    for number in range(8):
        tokens = torch.randint(50257, (1, 257), generator=torch.Generator().manual_seed(number))
        for name, (gpt, optimizer) in ways.items():
            elapsed = time_step(gpt, optimizer, tokens)
            if number > 0:  # the first step warms up
                times[name].append(elapsed)

    print('\n| way | parameters that learn | ms a step | moments and gradients |')
    print('|---|---|---|---|')
    for name, (gpt, _) in ways.items():
        learning = [p.numel() for p in gpt.parameters() if p.requires_grad]
        count = sum(learning)
        megabytes = 12 * count / 1e6  # two moments and a gradient, 4 bytes each
        print(f'| {name} | {count:,} | {statistics.median(times[name]):.0f} | {megabytes:.0f} MB |',
              flush=True)


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        compare_ways(folder)
    compare_steps()


if __name__ == '__main__':
    main()
