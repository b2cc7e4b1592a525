"""
Compares the planned memory of training steps with the peak that torch's allocator counts on a CUDA
device, and prints the table of docs/planning.md. Each step is taken as train.py takes it, eager and
compiled; most of the time goes to torch.compile.

    python experiments/planned_memory.py
    python experiments/planned_memory.py --only 'GPT-2|modern' --record measured.jsonl
    torchrun --standalone --nproc_per_node=2 experiments/planned_memory.py --only micro-batches
"""
import argparse
import contextlib
import gc
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig
from plaingpt.planning.hardware import Hardware
from plaingpt.planning.plan import Plan
from plaingpt.planning.run_size import RunSize
from plaingpt.system.compiling import compile_or_warn
from plaingpt.system.devices import place, precision, set_up_math
from plaingpt.system.messages import print0
from plaingpt.training.guard import Guard
from plaingpt.training.optimizers import make_optimizer, muon_matrices, temporary_memory
from plaingpt.training.processes import leave, set_up_process

# The keys of train.py that make_optimizer() reads.
OPTIMIZER = {'learning_rate': 1e-3, 'min_lr': 1e-4, 'decay_lr': True, 'weight_decay': 0.1,
             'beta1': 0.9, 'beta2': 0.95, 'muon_learning_rate': 0.02, 'muon_momentum': 0.95}


class Case(NamedTuple):
    """A training step: its model, and how it is computed."""
    name: str
    config: GPTConfig
    batch_size: int
    dtype: str = 'bfloat16'
    micro_batches: int = 1       # on each device
    optimizer: str = 'adamw'
    checkpointing: bool = False
    bf16_residual: bool = False


class Peaks(NamedTuple):
    """The most bytes that are allocated at a time."""
    first: int   # until the first step ends, in which Inductor tries kernels
    steady: int  # in a later step


def gpt2(n_layer=4, **options):
    """GPT-2's shape, or some of its blocks."""
    return GPTConfig(n_layer=n_layer, bias=False, **options)


def small_vocabulary(**options):
    """A model whose logits take little, so that the blocks decide."""
    return GPTConfig(512, 256, 8, bias=False, **options)


MODERN = {'position': 'rope', 'norm': 'rmsnorm', 'mlp': 'relu2', 'qk_norm': True,
          'logit_softcap': 15.0, 'tied': False, 'zero_init': True}
LLAMA = {'position': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'n_kv_head': 4, 'tied': False}
BABY = GPTConfig(256, 65, 6, 6, 384, 0.2, False)

BF16_CASES = [
    Case('GPT-2 124M', gpt2(12), 4),
    Case('GPT-2 124M', gpt2(12), 12),
    Case('GPT-2 124M', gpt2(12), 64),
    Case('GPT-2 124M with biases', GPTConfig(), 12),
    Case('modern 124M, Muon', gpt2(12, **MODERN), 12, optimizer='muon'),
    Case('modern 124M, Muon', gpt2(12, **MODERN), 64, optimizer='muon'),
    Case('modern, 4 blocks, Muon', gpt2(**MODERN), 1, optimizer='muon'),
    Case('12 blocks of GPT-2 XL', GPTConfig(n_head=25, n_embd=1600), 4),
    Case('baby GPT', BABY, 64),
    Case('few tokens', gpt2(block_size=128), 1),
    Case('few tokens, untied', gpt2(block_size=128, tied=False), 1),
    Case('micro-batches', gpt2(), 1, micro_batches=2),
    Case('micro-batches', gpt2(), 8, micro_batches=2),
    Case('bfloat16 stream', gpt2(), 8, bf16_residual=True),
    Case('bfloat16 stream, modern', gpt2(**MODERN), 8, bf16_residual=True),
    Case('checkpointing, 124M', gpt2(12), 12, checkpointing=True),
    Case('checkpointing, 124M', gpt2(12), 64, checkpointing=True),
    Case('checkpointing, Llama', gpt2(**LLAMA), 8, checkpointing=True),
    Case('checkpointing, bfloat16 stream', gpt2(), 8, checkpointing=True, bf16_residual=True),
    Case('blocks: GELU', small_vocabulary(), 16),
    Case('blocks: dropout', small_vocabulary(dropout=0.1), 16),
    Case('blocks: SwiGLU', small_vocabulary(mlp='swiglu'), 16),
    Case('blocks: squared ReLU', small_vocabulary(mlp='relu2'), 16),
    Case('blocks: modern', small_vocabulary(**MODERN), 16),
    Case('blocks: Llama', small_vocabulary(**LLAMA), 16),
    Case('blocks: ALiBi', small_vocabulary(position='alibi'), 16),
    Case('blocks: ALiBi, grouped heads', small_vocabulary(position='alibi', n_kv_head=4), 16),
    Case('blocks: bfloat16 stream', small_vocabulary(), 16, bf16_residual=True),
]
OTHER_CASES = [case._replace(name=f'{case.name}, {dtype}', dtype=dtype)
               for dtype in ('float16', 'float32')
               for case in [
                   Case('GPT-2', gpt2(), 4),
                   Case('modern, Muon', gpt2(**MODERN), 4, optimizer='muon'),
                   Case('baby GPT', BABY, 64),
                   Case('Llama', gpt2(**LLAMA), 4),
                   Case('ALiBi, grouped heads', gpt2(position='alibi', n_kv_head=4), 4),
               ]]


def planned(case, compiled, hardware):
    """Bytes at the peak of each device, by the plan of such steps on this Hardware."""
    with torch.device('meta'):
        gpt = GPT(case.config)
    if case.bf16_residual:
        gpt.residual_dtype = torch.bfloat16
    # Muon keeps one number for each parameter that it trains, AdamW two.
    moments = 2.0
    update_memory = 0
    if case.optimizer == 'muon':
        by_muon = sum(matrix.numel() for matrix in muon_matrices(gpt))
        moments -= by_muon / gpt.get_num_params(non_embedding=False)
        update_memory = temporary_memory(gpt)
    size = RunSize(case.batch_size, micro_batches=case.micro_batches * hardware.count,
                   checkpointing=case.checkpointing, compiled=compiled, moments=moments,
                   update_memory=update_memory)
    return sum(Plan(gpt, size, hardware, case.dtype).memory.values())


def allocated(case, compiled, process):
    """The Peaks of steps on the device of a Process."""
    device = process.device
    gpt = place(GPT(case.config), device)
    gpt.checkpointing = case.checkpointing
    if case.bf16_residual:
        gpt.residual_dtype = torch.bfloat16
    model = process.averaging(gpt)
    _, autocast, scaler = precision(device, case.dtype, case.config.n_embd)
    optimizer = make_optimizer(gpt, {**OPTIMIZER, 'optimizer': case.optimizer}, 'cuda')
    guard = Guard(process, optimizer, scaler, grad_clip=1.0)
    shape = case.batch_size, case.config.block_size
    tokens = torch.randint(case.config.vocab_size, shape, device=device)

    def backward(averages_now=True):
        with contextlib.nullcontext() if averages_now else model.no_sync():
            with autocast():
                _, loss = model(tokens, tokens, with_logits=False)
                loss = loss / case.micro_batches
            scaler.scale(loss).backward()
        return loss.detach()

    def step(number):
        for micro_batch in range(1, case.micro_batches + 1):
            averages_now = model is gpt or micro_batch == case.micro_batches
            loss = backward(averages_now)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        guard.step(number, loss, grad_norm)
        optimizer.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    if compiled:
        if not compile_or_warn(gpt, backward):
            raise SystemExit('torch.compile does not work here')
        gpt.zero_grad(set_to_none=True)
    step(1)
    first = torch.cuda.max_memory_allocated()

    step(2)
    if process.world_size > 1:
        time.sleep(2)  # as long as NCCL's watchdog may hold the buckets that DDP has replaced
    step(3)
    torch.cuda.reset_peak_memory_stats()
    step(4)
    return Peaks(first, torch.cuda.max_memory_allocated())


def compare(case, compiled, process):
    """Prints a row of the table, and returns what is recorded of it, or None if memory is lacking.

    The record is {name: value}, and tests/planning/test_memory.py reads such records."""
    hardware = Hardware.here(process.device, process.world_size)
    expected = planned(case, compiled, hardware)
    how = 'compiled' if compiled else 'eager'
    name = f'{case.name}, {case.batch_size} x {case.config.block_size}'
    try:
        peaks = allocated(case, compiled, process)
    except torch.OutOfMemoryError:
        print0(f'| {name} | {how} | {expected / 1e9:.2f} | out of memory | | |')
        return None
    finally:
        # Nothing of this step may be left when the next one begins.
        torch.compiler.reset()
        time.sleep(2 if process.world_size > 1 else 0)
        gc.collect()
        torch.cuda.empty_cache()
    print0(f'| {name} | {how} | {expected / 1e9:.2f} | {peaks.steady / 1e9:.2f} | '
           f'{expected / peaks.steady - 1:+.0%} | {peaks.first / 1e9:.2f} |')
    return {
        'case': {**case._asdict(), 'config': changes_to_gpt2(case.config)},
        'compiled': compiled,
        'ranks': process.world_size,
        'has_flash': hardware.has_flash,
        'card': hardware.name,
        'torch': torch.__version__,
        'allocated': peaks.steady,
        'first': peaks.first,
    }


def changes_to_gpt2(config):
    """The fields of a GPTConfig that differ from GPT-2's, as {name: value}."""
    standard = asdict(GPTConfig())
    return {name: value for name, value in asdict(config).items() if value != standard[name]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', metavar='REGEX', help='cases whose names match this')
    parser.add_argument('--record', default='', metavar='FILE', help='append JSON lines to this')
    options = parser.parse_args()

    process = set_up_process('cuda', 'nccl')
    set_up_math(0, process.device)
    cases = OTHER_CASES
    if torch.cuda.is_bf16_supported(including_emulation=False):
        cases = BF16_CASES + OTHER_CASES
    print0(f'{torch.cuda.get_device_name(process.device)}, torch {torch.__version__}\n')
    print0('| step | | planned, GB | allocated, GB | plan off by | first step, GB |')
    print0('|---|---|---:|---:|---:|---:|')
    for case in cases:
        if not re.search(options.only, case.name):
            continue
        for compiled in (False, True):
            record = compare(case, compiled, process)
            if record and options.record and process.rank == 0:
                with open(options.record, 'a', encoding='utf-8') as file:
                    file.write(json.dumps(record) + '\n')
    leave(0)


if __name__ == '__main__':
    main()
