"""
Proves a GPU: runs bench.py, train.py and sample.py on it in 25 parts, compares their
results with targets, and writes the table of docs/gpu.md.

    python experiments/gpu_suite.py
    python experiments/gpu_suite.py --part=fp16,lora --again=True   # these parts once more
    python experiments/gpu_suite.py --small=True --device=cpu       # tiny shapes: does it run?

A part's result is saved as soon as the part has ended, so the same command again does only the
parts that are missing or have failed. A part fails if one of its programs does, or if a check of
it does not hold; the exit status is then 1. If parts are left when the time is up, it is 75.
"""
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from json import dumps, loads
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure
from plaingpt.benchmarking.part import ROOT, PartFailed, PartRun, check, largest_difference, values
from plaingpt.benchmarking.table import Row, write_table
from plaingpt.planning.units import short_bytes, short_time
from plaingpt.system.devices import check_device, default_device, hardware_name
from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError, explained
from plaingpt.system.signals import RESUMABLE
from plaingpt.text.data_sets import folder_of, read_meta
from plaingpt.text.shards import has_split
from plaingpt.text.publishing import write_data_set
from plaingpt.text.shakespeare import ADDRESS_SHA256
from plaingpt.text.tokenizers import CharTokenizer

# ---- configuration ----
json = 'out-gpu-suite/suite.json'   # file of all results; the runs are in out-gpu-suite/suite
report = ''                         # file for the table; '': docs/gpu.md; in small, beside json
part = ''                           # only these parts, with commas between them; '': all
again = False                       # True: also those of `part` that are done
minutes = 22.0                      # {> 0} no part begins later than that
dataset = 'shakespeare_char'        # folder under data/, one token a character
small = False                       # True: tiny shapes and few steps, to test this script
device = default_device()           # cuda, cuda:1, or with small=True also cpu

GUIDE = ROOT / 'docs' / 'gpu.md'


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    if small and report and Path(report).resolve() == GUIDE:
        yield f'report={report} is for the figures of a whole run: name another file'
    if again and not part:
        yield 'again=True repeats parts: name them with --part'
    if not Path(json).suffix:
        yield f'json={json} needs an ending such as .json: without it, it names the folder of runs'


config, given = configure(globals())
if not report:
    report = Path(json).with_suffix('.md') if small else GUIDE

# ---- shapes ----
GPT2 = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'vocab_size': 50304}
XL = {'n_layer': 48, 'n_head': 25, 'n_embd': 1600, 'block_size': 1024, 'vocab_size': 50304}
STEPS = {'real_data': False, 'num_steps': 40, 'steps_a_sync': 10}
TEXTS = {'mode': 'decode', 'bias': True, 'context': 60, 'new_tokens': 400}

# Overrides with small=True.
TINY = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32, 'batch_size': 2}
SMALL_STEPS = TINY | {'vocab_size': 64, 'num_steps': 2, 'steps_a_sync': 1}
SMALL_TEXTS = TINY | {'vocab_size': 64, 'num_steps': 2, 'context': 4, 'new_tokens': 8}
SMALL_RUN = TINY | {'eval_iters': 2, 'gradient_accumulation_steps': 1}

# Targets. Those of speed are for these cards.
TARGET_CARDS = r'\bH[12]00\b'
MFU = 0.55
RATIO = 1.3            # against nanoGPT's way
PLAN_TOLERANCE = 0.15  # of a planned peak of memory
BABY_GPT_LOSS = 1.4697
# Relative tolerance between runs that should agree: a GPU adds up some sums in no fixed order.
LOSS_TOLERANCE = 0.01


# ---- running the scripts ----

def bench(run, keys):
    """The figures of bench.py with these keys, a dict."""
    tiny = {}
    if small:
        tiny = SMALL_TEXTS if keys.get('mode') == 'decode' else SMALL_STEPS
    return run.bench(keys | tiny | {'device': device})


def train(run, name, file, keys, **options):
    """The records of a run of train.py; arguments as in PartRun.train()."""
    tiny = SMALL_RUN if small else {}
    shared = {'dataset': folder_of(dataset), 'device': device}
    return run.train(name, file, shared | keys | tiny, **options)


def steps(full, few):
    """A number of steps: `full`, or with small=True `few`."""
    return few if small else full


# ---- rows ----

def speed_row(what, text, target, reached):
    """A row with a target of speed, and a verdict only on the cards that the target is for."""
    if re.search(TARGET_CARDS, machine['device']):
        return Row(what, text, target, reached)
    return Row(what, text, target)


def step_row(figures, special, has_target=False):
    """The time of a training step; special: what is special about it, '' for nothing."""
    size = figures['config']
    text = f'{figures["ms_per_step"]:.1f} ms, {figures["tokens_per_s"]:,.0f} tokens/s'
    mfu = figures['mfu']
    if mfu is not None:
        text += f', MFU {mfu:.1%}'
    name = '124M, compiled' if figures['compiled'] else '124M, eager'
    if special:
        name += f', {special}'
    name += f', {size["batch_size"]} x {size["block_size"]} tokens'
    if has_target and mfu is not None:
        return speed_row(name, text, f'MFU of at least {MFU:.0%}', mfu >= MFU)
    return Row(name, text)


def memory_row(figures):
    """The peak of memory, against the plan."""
    peak = figures['peak_memory_bytes']
    planned = figures['planned_memory_bytes']
    excess = planned / peak - 1
    text = f'{short_bytes(peak)}; planned: {short_bytes(planned)} ({excess:+.0%})'
    return Row('peak memory', text, f'a plan within {PLAN_TOLERANCE:.0%}',
               abs(excess) <= PLAN_TOLERANCE)


def ratio_rows(figures):
    """How much faster it is than each baseline of the same process."""
    ours, *rivals = figures['contenders']
    rows = []
    for rival in rivals:
        ratio = rival['ms_per_step'] / ours['ms_per_step']
        text = f'{ratio:.2f} times as fast ({rival["ms_per_step"]:.1f} ms)'
        if rival['name'] == 'plain':
            rows.append(speed_row("against nanoGPT's way", text, f'at least {RATIO}',
                                  ratio >= RATIO))
        else:
            rows.append(Row(f'against {rival["name"]}', text))
    for name in figures['left_out']:
        rows.append(Row(f'against {name}', 'ran out of memory'))
    return rows


def last_loss_text(records):
    """How far the validation loss of a run has fallen; PartFailed if it has not."""
    losses = list(values(records, 'val_loss').values())
    check(len(losses) >= 2, 'metrics.jsonl has fewer than two evaluations')
    check(losses[-1] < losses[0], f'the validation loss rose from {losses[0]} to {losses[-1]}')
    return f'validation loss {losses[0]:.3f} to {losses[-1]:.3f}'


def speed_text(records):
    """The median time of a step in a run's log, and its MFU."""
    text = f'{statistics.median(values(records, "ms_per_step").values()):.1f} ms a step'
    mfus = [mfu for mfu in values(records, 'mfu').values() if mfu is not None]
    if mfus:
        text += f', MFU {statistics.median(mfus):.1%}'
    return text


# ---- parts: training steps of GPT-2's 124M, by bench.py ----

def step(run, way='', has_target=False, **keys):
    """A training step with these keys of bench.py; way: what is special about it, in a word."""
    figures = bench(run, GPT2 | STEPS | keys)
    rows = [step_row(figures, way, has_target), memory_row(figures)]
    if 'baseline' in keys:
        rows += ratio_rows(figures)
    return rows


def against_transformers(run, batch_size):
    return ratio_rows(bench(run, GPT2 | STEPS | {'batch_size': batch_size, 'baseline': 'hf'}))


# ---- parts: runs of train.py ----

def baby_gpt(run, config):
    """A whole run of a file of config/."""
    keys = {'max_iters': 60, 'eval_interval': 20} if small else {}
    records = train(run, 'run', config, keys)
    best = min(values(records, 'val_loss').values())
    meta = read_meta(folder_of(dataset))
    source = meta.get('source', dataset)
    loss = Row(f'{config}, best validation loss', f'{best:.4f} on {source}')
    # The target is that of GPT-2's architecture on this text.
    has_target = config == 'train_shakespeare_char.py' and meta.get('sha256') == ADDRESS_SHA256
    if has_target:
        loss = loss._replace(target=f'at most {BABY_GPT_LOSS}', reached=best <= BABY_GPT_LOSS)
    text = (f'{last_loss_text(records)}, {speed_text(records)}, '
            f'{short_time(records[-1]["elapsed"])} in all')
    return [loss, Row('its training', text)]


def gpt2_modern(run):
    """The net of config/train_gpt2_modern.py, on tokens drawn by Zipf's law."""
    vocab_size = steps(GPT2['vocab_size'], 64)
    share = 1 / np.arange(1, vocab_size + 1)
    share /= share.sum()
    random = np.random.default_rng(0)
    ids = {split: random.choice(vocab_size, count, p=share).astype(np.uint32)
           for split, count in {'train': 2_000_000, 'val': 200_000}.items()}
    tokenizer = CharTokenizer([chr(i) for i in range(vocab_size)])  # the ids are all that counts
    write_data_set(str(run.folder / 'zipf'), tokenizer, ids, "tokens drawn by Zipf's law", None)

    count = steps(200, 20)
    records = train(run, 'run', 'train_gpt2_modern.py', {
        'dataset': run.folder / 'zipf', 'wandb_log': False, 'batch_size': 60,
        'gradient_accumulation_steps': 2, 'max_iters': count, 'lr_decay_iters': count,
        'warmup_iters': count // 10, 'eval_interval': count, 'eval_iters': 10})
    entropy = -(share * np.log(share)).sum()
    return [Row('modern 124M, Muon, 2 x 60 x 1024 tokens', speed_text(records)),
            Row('its loss', f'{last_loss_text(records)}; the entropy of the tokens is '
                            f'{entropy:.3f}')]


# Keys of a short run of the baby GPT.
SHORT = {'eval_iters': 20, 'warmup_iters': 10}


def fp16(run):
    count = steps(300, 60)
    records = train(run, 'run', 'train_shakespeare_char.py', SHORT | {
        'max_iters': count, 'eval_interval': count, 'dtype': 'float16'})
    skipped = values(records, 'skipped')
    late = [step for step in skipped if step > 2 * count // 3]
    check(not late, f'overflows still cost steps at the end: {skipped}')
    return [Row('float16 with the scaler', f'{last_loss_text(records)}, {speed_text(records)}; '
                f'{sum(skipped.values())} steps skipped, none of them in the last third')]


def lora(run):
    """An adapter on a run that ended early, so that there is something left to learn."""
    count = steps(100, 20)
    train(run, 'base', 'train_shakespeare_char.py',
          SHORT | {'max_iters': count, 'eval_interval': count})
    count = steps(200, 60)
    records = train(run, 'adapted', 'train_shakespeare_char.py', SHORT | {
        'max_iters': count, 'eval_interval': count, 'init_from': run.folder / 'base',
        'lora_rank': 8, 'lora_targets': 'c_attn,c_proj,c_fc', 'learning_rate': 1e-2})
    run.python(ROOT / 'sample.py', f'--adapter={run.folder / "adapted" / "adapter"}',
               '--num_samples=2', '--max_new_tokens=50', f'--device={device}')
    return [Row('LoRA', f'{last_loss_text(records)}, {speed_text(records)}; the adapter writes '
                        'text')]


def unfreeze(run):
    """The gradient norms of each stage are the same, eager and compiled."""
    norms = {}
    for way in False, True:
        records = train(run, f'compile-{way}', 'train_shakespeare_char.py', SHORT | {
            'max_iters': 30, 'eval_interval': 30, 'log_interval': 1, 'dropout': 0.0,
            'dtype': 'float32', 'compile': way, 'unfreeze': {0: 'head', 10: 'last:1', 20: 'all'}})
        norms[way] = values(records, 'grad_norm')
    difference = largest_difference(norms[True], norms[False])
    check(difference <= LOSS_TOLERANCE,
          f'the gradient norms differ by {difference:.2%}: eager {norms[False]}, '
          f'compiled {norms[True]}')
    return [Row('unfreeze, eager against compiled',
                f'gradient norms differ by at most {difference:.1e}')]


def kill_and_resume(run):
    """A run that is killed and resumed has the losses of a run that is not."""
    keys = SHORT | {'max_iters': 200, 'eval_interval': 200, 'checkpoint_interval': 50,
                    'resume': 'auto'}
    whole = train(run, 'whole', 'train_shakespeare_char.py', keys)

    def is_time():
        return any(record['step'] >= 120 for record in run.records('killed'))

    train(run, 'killed', 'train_shakespeare_char.py', keys, kill_when=is_time)
    resumed = train(run, 'killed', 'train_shakespeare_char.py', keys)
    difference = compare_losses(resumed, whole)
    return [Row('SIGKILL after step 120, then resumed',
                f'losses differ by at most {difference:.1e}')]


def one_rank(run):
    """Under torchrun, a single rank has the losses of a run without it."""
    keys = SHORT | {'max_iters': 60, 'eval_interval': 60}
    alone = train(run, 'alone', 'train_shakespeare_char.py', keys)
    torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1')
    launched = train(run, 'torchrun', 'train_shakespeare_char.py', keys, launcher=torchrun)
    difference = compare_losses(launched, alone)
    return [Row('torchrun with one rank, against none',
                f'losses differ by at most {difference:.1e}')]


def compare_losses(a, b):
    """The largest relative difference of the losses of two runs; PartFailed if it is too large."""
    difference = largest_difference(values(a, 'loss'), values(b, 'loss'))
    check(difference <= LOSS_TOLERANCE, f'the losses differ by {difference:.2%}')
    return difference


# ---- parts: text, by bench.py ----

def decode(run, net, rows, target=None, compiled=False):
    """Rows of decoding; net: '124M' or 'xl'; target: tokens/s."""
    shape = {'124M': GPT2, 'xl': XL}[net]
    figures = bench(run, TEXTS | shape | {'batch_size': rows, 'compile': compiled})
    speed = figures['tokens_per_s']
    first_speed = speed * figures['ms_per_step'] / figures['first_ms']
    way = 'compiled' if figures['compiled'] else 'eager'
    size = figures['config']
    name = (f'{net}, {size["batch_size"]} x {size["new_tokens"]} tokens after {size["context"]}, '
            f'{way}')
    start = short_time(figures['start_s'])
    text = (f'{speed:,.0f} tokens/s; {first_speed:,.0f} in the first text, after {start} of set-up')
    if target is None:
        return [Row(name, text)]
    return [speed_row(name, text, f'at least {target:,}', speed >= target)]


# ---- all parts ----

# A part that takes longer is ended.
PART_LIMIT = 600  # seconds


class Part(NamedTuple):
    """A part of the suite."""
    work: Callable             # a function from a PartRun to the rows
    limit: float = PART_LIMIT  # seconds


# What matters most comes first. Most of the time goes into torch.compile, above all when it tries
# kernels (max-autotune).
PARTS = {
    'step_12': Part(partial(step, batch_size=12, baseline='plain')),
    'step_64': Part(partial(step, has_target=True, batch_size=64, baseline='plain')),
    'decode_124m': Part(partial(decode, net='124M', rows=1, target=1500)),
    'decode_124m_64': Part(partial(decode, net='124M', rows=64, target=40_000)),
    'decode_xl': Part(partial(decode, net='xl', rows=1, target=400)),
    'decode_xl_64': Part(partial(decode, net='xl', rows=64)),
    'baby_gpt': Part(partial(baby_gpt, config='train_shakespeare_char.py')),
    'fp16': Part(fp16),
    'lora': Part(lora),
    'unfreeze': Part(unfreeze),
    'kill_and_resume': Part(kill_and_resume),
    'one_rank': Part(one_rank),
    'gpt2_modern': Part(gpt2_modern),
    'step_64_checkpointing': Part(
        partial(step, way='activation checkpointing', batch_size=64,
                activation_checkpointing=True)),
    'step_64_bf16_residual': Part(
        partial(step, way='bf16_residual', batch_size=64, bf16_residual=True, dtype='bfloat16')),
    'step_12_eager': Part(partial(step, batch_size=12, compile=False)),
    'step_64_eager': Part(partial(step, batch_size=64, compile=False)),
    'step_12_muon': Part(partial(step, way='Muon', batch_size=12, optimizer='muon')),
    'step_12_hf': Part(partial(against_transformers, batch_size=12)),
    'step_64_hf': Part(partial(against_transformers, batch_size=64)),
    'step_64_autotuned': Part(
        partial(step, way='max-autotune', has_target=True, batch_size=64,
                compile_mode='max-autotune'), limit=900),
    'baby_gpt_modern': Part(partial(baby_gpt, config='train_shakespeare_char_modern.py')),
    'decode_124m_compiled': Part(
        partial(decode, net='124M', rows=1, target=1500, compiled=True)),
    'decode_124m_64_compiled': Part(
        partial(decode, net='124M', rows=64, target=40_000, compiled=True)),
    'decode_xl_compiled': Part(partial(decode, net='xl', rows=1, target=400, compiled=True)),
}


def write_report():
    """Writes the table of all parts that have ended."""
    results = {name: stored['parts'][name] for name in PARTS if name in stored['parts']}
    done = [name for name, result in results.items() if result['error'] is None]
    seconds = sum(result['seconds'] for result in results.values())
    introduction = (f'{machine["device"]}, torch {machine["torch"]}, {time.strftime("%Y-%m-%d")}: '
                    f'{len(done)} of {len(PARTS)} parts done, in {short_time(seconds)}.')
    if small:
        introduction = f'In small, so without figures of the card. {introduction}'
    write_table(report, introduction, results)


# ---- what is to be done ----
started = time.monotonic()
torch_device = check_device(device)
if torch_device.type != 'cuda' and not small:
    raise UserError(f'device={device} is no CUDA GPU, for which the parts are made: '
                    '--small=True tries them in small')
chosen = part.split(',') if part else list(PARTS)
for name in chosen:
    if name not in PARTS:
        raise UserError(f'there is no part {name!r}: there are {", ".join(PARTS)}')
if not has_split(os.path.join(folder_of(dataset), 'train.bin')):
    script = os.path.join(folder_of(dataset), 'prepare.py')
    raise UserError(f'{folder_of(dataset)} has no train.bin: run python {script} first, on a '
                    'machine with access to the internet or to a package index')

machine = {'device': hardware_name(torch_device), 'torch': torch.__version__, 'small': small}
stored = {'machine': machine, 'parts': {}}
with explained(OSError, ValueError, prefix=f'json={json}: '):
    if os.path.exists(json):
        stored = loads(Path(json).read_text(encoding='utf-8'))
    os.makedirs(os.path.dirname(json) or '.', exist_ok=True)
if stored['machine'] != machine:
    raise UserError(f'{json} has results of {stored["machine"]}, and this is {machine}: '
                    'name another --json')

# ---- the parts ----
runs = Path(json).resolve().with_suffix('')
has_begun = False
left = []
for name in chosen:
    is_done = name in stored['parts'] and stored['parts'][name]['error'] is None
    if is_done and not again:
        print(f'{name}: done before')
        continue
    begin = time.monotonic()
    is_late = begin - started > 60 * minutes
    if is_late and has_begun:
        left.append(name)
        continue
    has_begun = True

    figures = []
    rows = []
    error = None  # or why it has failed
    try:
        run = PartRun(runs / name, PARTS[name].limit)
        figures = run.figures
        rows = PARTS[name].work(run)
    except (PartFailed, UserError) as failure:
        error = str(failure)
    except (OSError, KeyError, ValueError) as failure:
        # A figure that a program has not written costs this part, but not those of the others.
        error = f'{type(failure).__name__}: {failure}'
    seconds = time.monotonic() - begin
    if small:  # tiny shapes say nothing about targets
        rows = [row._replace(reached=None) for row in rows]
    stored['parts'][name] = {
        'error': error,
        'seconds': seconds,
        'rows': [row._asdict() for row in rows],
        'figures': figures,
    }
    with explained(OSError, prefix=f'json={json}: '):
        write_atomically(json, dumps(stored, indent=2).encode())
    write_report()  # at once: the machine may be lost in the next part
    print(f'{name}: {error or "done"} ({short_time(seconds)})', flush=True)
    for row in rows:
        print(f'    {row.what}: {row.figure}', flush=True)

# ---- end ----
write_report()  # also where no part was left to do
print(f'the table is in {report}')

failed = [name for name in chosen if name not in left and stored['parts'][name]['error']]
if left:
    print(f'the time is up, and {len(left)} parts are left: run the same command again')
if failed:
    print(f'error: failed: {", ".join(failed)}; the logs are in {runs}', file=sys.stderr)
    sys.exit(1)
if left:
    sys.exit(RESUMABLE)
