"""
Times a training step (forward, backward, AdamW) of a model of any size, and shows where the time goes:

    python bench.py
    python bench.py --profile=True
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --vocab_size=65 --batch_size=64 --block_size=256 --json=b.json

The profile is written to ./bench_log, for TensorBoard or chrome://tracing.
"""
import os
import statistics
import time
from contextlib import nullcontext
from json import dump

import torch

from configurator import configure
from loader import TokenFile, read_meta
from model import GPT, GPTConfig
from runtime import (check_device, compile_or_warn, default_device, device_name, explained, peak_memory, precision,
                     set_up_math, synchronize)

# ---- configuration ----
# Work
batch_size = 12                     # >= 1 sequences in a step; a CPU takes 1 unless told
block_size = 1024                   # >= 1 tokens in a sequence
real_data = True                    # of the data set, where it is there; False: random tokens
dataset = 'openwebtext'             # folder under data/
seed = 1337                         # [0, 4294967295] of weights and batches
# Model
n_layer = 12                        # >= 1 blocks
n_head = 12                         # >= 1 attention heads
n_embd = 768                        # >= 1 channels, a multiple of n_head
vocab_size = 50304                  # >= 1 tokens
dropout = 0.0                       # [0, 1) of the activations
bias = False                        # in linear layers and layer norms
# Measurement
num_steps = 20                      # >= 1 timed steps
warmup_steps = 3                    # >= 1 steps before them, not counted
profile = False                     # a trace in ./bench_log and the costliest operations
json = ''                           # a file to write the figures to
# System
device = default_device()           # cuda, cuda:1, mps or cpu; unless told, the best one here
dtype = 'auto'                      # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile: bool | None = None         # torch.compile; None: on CUDA only

config, given = configure(globals())

# ---- set-up ----
device = check_device(device)
precision_name, autocast, scaler = precision(device, dtype, n_embd)
set_up_math(seed, device)
if device.type == 'cpu' and 'batch_size' not in given:
    batch_size = 1  # 12 sequences of the default model take half a minute a step and 20 GB there
with explained(ValueError):
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)).to(device)
optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-4, betas=(0.9, 0.95), device_type=device.type)

data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', dataset)
train_bin = os.path.join(data_dir, 'train.bin')
data = None
if real_data and not os.path.exists(train_bin):
    print(f'note: {train_bin} is missing, so the tokens are random')
elif real_data and ((meta := read_meta(data_dir))['vocab_size'] or 0) > vocab_size:
    print(f"note: the vocabulary of {train_bin} has {meta['vocab_size']} tokens, so the tokens are random")
elif real_data:
    data = TokenFile(train_bin, meta['dtype'], vocab_size, block_size)


def batch(step):
    if data:
        return data.batch(seed, 'train', step, 0, batch_size, block_size, device)
    generator = torch.Generator().manual_seed(seed + step)
    tokens = torch.randint(vocab_size, (batch_size, block_size + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train_step(step):
    x, y = batch(step)
    with autocast():
        loss = model(x, y)[1]
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


# ---- measurement ----
compile = device.type == 'cuda' if compile is None else compile
compile = compile and compile_or_warn(model, lambda: train_step(0))
for step in range(warmup_steps):
    train_step(step)
synchronize(device)

profiler = nullcontext()
if profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with explained(OSError, prefix='the trace cannot be written: '):
        os.makedirs('./bench_log', exist_ok=True)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True,
                                      on_trace_ready=torch.profiler.tensorboard_trace_handler('./bench_log'))
    num_steps = num_steps if 'num_steps' in given else 3  # a trace of more is slow to open
seconds = []
with profiler:
    for step in range(warmup_steps, warmup_steps + num_steps):
        begin = time.perf_counter()
        train_step(step)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)

# ---- figures ----
median = statistics.median(seconds)
mfu = model.estimate_mfu(batch_size, median)
memory, memory_kind = peak_memory(device)
if profile:
    by = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=40))
    print('trace in ./bench_log; the figures below include the cost of tracing')
print(f'machine  {device_name(device)}, torch {torch.__version__}, {precision_name}, '
      f'{"compiled" if compile else "eager"}')
print(f'model    {model.get_num_params(non_embedding=False):,} parameters, {batch_size} x {block_size} tokens a step')
low, middle, high = (f'{1000 * value:.2f}' for value in (min(seconds), median, max(seconds)))
print(f'step     {middle} ms, the median of {num_steps} ({low} to {high})')
print(f'speed    {batch_size * block_size / median:,.0f} tokens/s, MFU {"n/a" if mfu is None else f"{mfu:.1%}"}')
print(f'memory   {"n/a" if memory is None else f"{memory / 2**20:,.0f} MiB"} at the peak, {memory_kind}')
if json:
    with explained(OSError, prefix='json: '), open(json, 'w', encoding='utf-8') as file:
        dump({'ms_per_step': 1000 * median, 'tokens_per_s': batch_size * block_size / median, 'mfu': mfu,
              'peak_memory_bytes': memory, 'device_name': device_name(device), 'torch': torch.__version__,
              'precision': precision_name, 'compiled': compile,
              'config': {**config, 'batch_size': batch_size, 'num_steps': num_steps}}, file, indent=2)
