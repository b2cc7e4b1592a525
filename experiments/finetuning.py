"""
Ways of fine-tuning, side by side: a small net learns the Python of the standard library's own sources, and then a
little Shakespeare in several ways, compared in two tables. About 20 minutes on two cores.

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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig
from plaingpt.text.publishing import write_data_set
from plaingpt.text.shakespeare import read_text
from plaingpt.text.tokenizers import CharTokenizer
from plaingpt.training import freezing, lora

ROOT = Path(__file__).resolve().parents[1]
LITTLE = 100_000  # characters of Shakespeare to learn from
NET = dict(device='cpu', block_size=128, batch_size=16, gradient_accumulation_steps=1, n_layer=6, n_head=4, n_embd=192,
           position='rope', rope_theta=60, log_interval=10, eval_iters=10, always_save_checkpoint=False,
           schedule='linear', min_lr=0)
FIRST = NET | dict(max_iters=800, lr_decay_iters=800, eval_interval=800, learning_rate=2e-3, warmup_iters=50)
SECOND = NET | dict(max_iters=240, lr_decay_iters=240, eval_interval=40, warmup_iters=20, early_stop=2)
EVERYWHERE = dict(lora_targets='c_attn,c_proj,c_fc')

WAYS = {  # name: (keys, learning rates of which the best counts)
    'from scratch': (dict(init_from='scratch'), (3e-4, 1e-3, 3e-3)),
    'all weights': ({}, (3e-4, 1e-3, 3e-3)),
    'LoRA, rank 8, c_attn': (dict(lora_rank=8), (3e-3, 1e-2, 3e-2)),
    'LoRA, rank 8, all layers': (dict(lora_rank=8, **EVERYWHERE), (3e-3, 1e-2, 3e-2)),
    'last:1': (dict(trainable='last:1'), (1e-3, 3e-3, 1e-2)),
    'head': (dict(trainable='head'), (1e-3, 3e-3, 1e-2)),
    'head, last:3 from 60, all from 120': (dict(unfreeze={0: 'head', 60: 'last:3', 120: 'all'}), (3e-4, 1e-3, 3e-3)),
}


def prepare(folder):
    """Two data sets with one set of characters, of Python's sources and of Shakespeare's plays, ASCII alone."""
    library = Path(sysconfig.get_paths()['stdlib'])
    python = ''.join(path.read_text(encoding='utf-8', errors='replace') for path in sorted(library.glob('*.py')))
    plays, source, _ = read_text(str(ROOT / 'data' / 'shakespeare_char'))
    texts = {'python': python[:4_000_000], 'plays': plays}
    texts = {name: text.encode('ascii', errors='ignore').decode() for name, text in texts.items()}
    tokenizer = CharTokenizer.from_text(''.join(texts.values()))
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        cut = len(ids) * 9 // 10
        (folder / name).mkdir()
        write_data_set(str(folder / name), tokenizer, {'train': ids[:cut] if name == 'python' else ids[:LITTLE],
                                                       'val': ids[cut:]}, name, None)


def train(out_dir, **keys):
    """(records of the run, bytes that the process held at the most)."""
    command = [sys.executable, ROOT / 'train.py', *(f'--{key}={value}' for key, value in keys.items()),
               f'--out_dir={out_dir}']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f'{command} has failed')
    return [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()], usage.ru_maxrss * 1024


def step_times():
    """A table of what a step takes, in turns, of GPT-2's smallest with one sequence of 256 tokens."""
    ways = {'all weights': 'all', 'LoRA, rank 8, c_attn': 'c_attn', 'LoRA, rank 8, all layers': 'c_attn,c_proj,c_fc',
            'last:1': 'last:1', 'head': 'head'}
    steps, times = {}, {name: [] for name in ways}
    for name, what in ways.items():
        gpt = GPT(GPTConfig(block_size=256))
        if name.startswith('LoRA'):
            lora.add_lora(gpt, 8, 16.0, 0.0, what)
        else:
            freezing.freeze(gpt, 0, {'lora_rank': 0, 'trainable': what, 'unfreeze': None})
        steps[name] = gpt, gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu')
    for number in range(8):
        for name, (gpt, optimizer) in steps.items():
            x = torch.randint(50257, (1, 257), generator=torch.Generator().manual_seed(number))
            begin = time.perf_counter()
            with torch.autocast('cpu', torch.bfloat16):
                gpt(x[:, :-1], x[:, 1:].contiguous(), with_logits=False)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name] += [1000 * (time.perf_counter() - begin)] * (number > 0)
    print('\n| way | parameters that learn | ms a step | moments and gradients |\n|---|---|---|---|')
    for name, (gpt, _) in steps.items():
        count = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
        print(f'| {name} | {count:,} | {statistics.median(times[name]):.0f} | {12 * count / 1e6:.0f} MB |', flush=True)


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        base, data = folder / 'base', folder / 'plays'
        records, _ = train(base, dataset=folder / 'python', **FIRST)
        print(f"validation loss of Python {records[-1]['val_loss']:.3f} after {records[-1]['step']} steps\n")
        print('| way | learning rate | first loss | best loss | at step | seconds in all | memory held | ckpt.pt |')
        print('|---|---|---|---|---|---|---|---|')
        for number, (way, (keys, rates)) in enumerate(WAYS.items()):
            runs = {}
            for rate in rates:
                out_dir = folder / f'{number} {rate}'
                done = train(out_dir, **{'init_from': base} | SECOND | keys, dataset=data, learning_rate=rate)
                runs[rate] = *done, (out_dir / 'ckpt.pt').stat().st_size

            def best(rate, runs=runs):
                return min((line['val_loss'], line['step']) for line in runs[rate][0] if 'val_loss' in line)
            rate = min(runs, key=best)
            records, held, size = runs[rate]
            loss, step = best(rate)
            print(f"| {way} | {rate:g} | {records[0]['val_loss']:.3f} | {loss:.3f} | {step} | "
                  f"{records[-1]['elapsed']:.0f} | {held / 1e6:.0f} MB | {size / 1e6:.2f} MB |", flush=True)
    step_times()


if __name__ == '__main__':
    main()
