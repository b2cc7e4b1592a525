"""
Times this repository's work on random weights, and shows where the time goes:

    python bench.py                                             # a training step: forward, backward, AdamW
    python bench.py --profile=True
    python bench.py --baseline=hf --json=bench.json             # in turns with transformers' GPT-2
    python bench.py --mode=decode --context=400 --batch_size=1  # tokens after a prompt
    python bench.py --mode=prepare --baseline=plain             # text to token files

The profile is written to ./bench_log, for TensorBoard or chrome://tracing. docs/benchmarks.md has what came of it.
"""
import glob
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from json import dump
from unittest.mock import patch

import torch

import model as model_file
from configurator import configure
from model import GPT, GPTConfig
from plaingpt.inference.engine import stream
from plaingpt.planning.plan import Hardware, Plan, print_summary
from plaingpt.system.devices import (
    check_device,
    compile_or_warn,
    default_device,
    default_dtype,
    hardware_name,
    peak_memory,
    precision,
    set_up_math,
    synchronize,
)
from plaingpt.system.messages import UserError, explained
from plaingpt.text.data_sets import read_meta
from plaingpt.text.token_files import TokenFile

# ---- configuration ----
# Work
mode = 'train'                      # {'train' | 'decode' | 'prepare'}
baseline = ''                       # {'' | 'hf' | 'plain'} to time in turns: transformers' GPT-2, or nanoGPT's way
batch_size = 12                     # {>= 1} sequences at a time; a CPU takes 1 unless told
block_size = 1024                   # {>= 1} tokens in a sequence
real_data = True                    # of the data set, where it is there; False: random tokens
dataset = 'openwebtext'             # folder under data/
seed = 1337                         # {[0, 4294967295]} of weights and batches
context = 60                        # {>= 1} tokens of the prompt, in decoding
new_tokens = 100                    # {>= 1} tokens after it
data_files = ''                     # for prepare: Parquet files as a glob, with documents in a column 'text'
# Model
n_layer = 12                        # {>= 1} blocks
n_head = 12                         # {>= 1} attention heads
n_embd = 768                        # {>= 1} channels, a multiple of n_head
vocab_size = 50304                  # {>= 1} tokens
dropout = 0.0                       # {[0, 1)} of the activations
bias = False                        # in linear layers and layer norms
# Measurement
num_steps = 20                      # {>= 1} timed steps; 5 by default where a step is a whole text or data set
warmup_steps = 3                    # {>= 1} steps before them, not counted
profile = False                     # a trace in ./bench_log and the costliest operations
json = ''                           # a file to write the figures to
# System
device = default_device()           # cuda, cuda:1, mps or cpu; unless told, the best one here
dtype = 'auto'                      # {'auto' | 'float32' | 'bfloat16' | 'float16'}
compile: bool | None = None         # torch.compile; None: on CUDA only, in training
activation_checkpointing = False    # True: less memory for activations, about a third more time


def problems():
    if mode == 'prepare' and not data_files:
        yield "mode='prepare' needs documents: --data_files='texts/*.parquet'"
    if mode == 'prepare' and (baseline == 'hf' or profile):
        yield "mode='prepare' goes with neither baseline='hf' nor profile=True"
    if mode == 'decode' and baseline == 'hf' and context + new_tokens > block_size:
        yield f'transformers stops at block_size={block_size}: context={context} + new_tokens={new_tokens} is more'


config, given = configure(globals())

# ---- set-up ----
device = check_device(device)
set_up_math(seed, device)
training = mode == 'train'
if not training:
    num_steps = num_steps if 'num_steps' in given else 5
    warmup_steps = warmup_steps if 'warmup_steps' in given else 1
if (device.type == 'cpu' or not training) and 'batch_size' not in given:
    batch_size = 1  # 12 sequences of the default model take half a minute a step and 20 GB on a CPU
precision_name, autocast, scaler = precision(device, dtype, n_embd)
if mode == 'decode' and dtype == 'auto':
    precision_name = default_dtype(device, n_embd, training=False)
usual_dtype = 'float32' if device.type == 'cpu' else precision_name  # of the baselines
plainly = patch.object(model_file, '_on_cpu', lambda x: False)  # without what model.py does in another way there


def our_gpt():
    with explained(ValueError):
        return GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)).to(device)


def hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)).to(device)


# ---- what is timed: functions from a step's number to the tokens that it has dealt with ----
def batches():
    """A function from a step's number to its x and y."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', dataset)
    train_bin = os.path.join(folder, 'train.bin')
    if real_data and not os.path.exists(train_bin):
        print(f'note: {train_bin} is missing, so the tokens are random')
    elif real_data and ((meta := read_meta(folder))['vocab_size'] or 0) > vocab_size:
        print(f"note: the vocabulary of {train_bin} has {meta['vocab_size']} tokens, so the tokens are random")
    elif real_data:
        data = TokenFile(train_bin, meta['dtype'], vocab_size, block_size)
        return lambda step: data.batch(seed, 'train', step, 0, batch_size, block_size, device)

    def random_tokens(step):
        generator = torch.Generator().manual_seed(seed + step)
        tokens = torch.randint(vocab_size, (batch_size, block_size + 1), generator=generator).to(device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return random_tokens


def train_step(net, loss_of, optimizer, autocast, scaler):
    def step(number):
        with autocast():
            loss = loss_of(*batch(number))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return batch_size * block_size
    return step


def our_train_step():
    gpt.checkpointing = activation_checkpointing
    return train_step(gpt, lambda x, y: gpt(x, y, with_logits=False)[1],
                      gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type), autocast, scaler)


def baseline_train_step():
    _, autocast, scaler = precision(device, usual_dtype, n_embd)
    net = hugging_face().train() if baseline == 'hf' else our_gpt()
    step = train_step(net, lambda x, y: net(input_ids=x, labels=x).loss if baseline == 'hf' else net(x, y)[1],
                      torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=device.type == 'cuda'),
                      autocast, scaler)
    if baseline == 'plain' and compile:
        compile_or_warn(net, lambda: step(0))
    return step if baseline == 'hf' else plainly(step)


def our_text():
    gpt.eval().to(getattr(torch, precision_name))

    def text(number):
        for _ in stream(gpt, prompt, new_tokens, 0.8, 200, num_samples=batch_size, seeds=range(batch_size)):
            pass
        synchronize(device)
        return batch_size * new_tokens
    return text


def hugging_face_text():
    net = hugging_face().eval().to(getattr(torch, usual_dtype))

    def text(number):
        net.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, num_return_sequences=batch_size,
                     do_sample=True, temperature=0.8, top_k=200, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        synchronize(device)
        return batch_size * new_tokens
    return text


def plain_text():
    """One sample, as nanoGPT takes them one by one: each token from all before it."""
    net = our_gpt().eval().to(getattr(torch, usual_dtype))

    @plainly
    @torch.no_grad()
    def text(number):
        idx = prompt
        for _ in range(new_tokens):
            logits = net(idx[:, -block_size:])[0][:, -1].float() / 0.8  # (1, V)
            least = logits.topk(min(200, vocab_size)).values[:, -1:]
            idx = torch.cat([idx, torch.multinomial(logits.where(logits >= least, -torch.inf).softmax(-1), 1)], dim=1)
        synchronize(device)
        return new_tokens
    return text


def our_preparation(number):
    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'openwebtext', 'prepare.py')
        ended = subprocess.run([sys.executable, script, f'--dataset={folder}', f'--data_files={data_files}'],
                               capture_output=True, text=True, encoding='utf-8',
                               env={**os.environ, 'HF_DATASETS_CACHE': os.path.join(folder, 'cache')})
        if ended.returncode:
            raise UserError(f'{script} failed: {ended.stderr.strip()[-500:]}')
        return sum(os.path.getsize(os.path.join(folder, f'{split}.bin')) for split in ('train', 'val')) // 2


def plain_preparation(number):
    """nanoGPT's way: datasets maps each document to a list of ids on disk, from which the token files are then made."""
    ended = subprocess.run([sys.executable, '-c', PLAIN_PREPARATION, *files], capture_output=True, text=True,
                           encoding='utf-8')
    if ended.returncode:
        raise UserError(f'the baseline failed: {ended.stderr.strip()[-500:]}')
    return int(ended.stdout)


PLAIN_PREPARATION = '''
import os, sys, tempfile
import datasets, numpy, tiktoken
bpe, tokens = tiktoken.get_encoding("gpt2"), 0
with tempfile.TemporaryDirectory() as folder:
    texts = datasets.load_dataset("parquet", data_files=sys.argv[1:], split="train", cache_dir=folder)
    texts = texts.train_test_split(test_size=0.0005, seed=1)
    encoded = texts.map(lambda document: {"encoded": [*bpe.encode_ordinary(document["text"]), bpe.eot_token]},
                        num_proc=os.cpu_count(), remove_columns=texts["train"].column_names)
    for name, part in encoded.items():
        with open(os.path.join(folder, name), "wb") as file:
            for documents in part.with_format("numpy").iter(batch_size=len(part) // 1024 + 1):
                numpy.concatenate(documents["encoded"]).astype("uint16").tofile(file)
            tokens += file.tell() // 2
print(tokens)
'''

# ---- measurement ----
ours, theirs = our_preparation, plain_preparation
if mode == 'prepare':
    files = sorted(glob.glob(os.path.expanduser(data_files)))
    warmup_steps = 0
else:
    hardware = Hardware.here(device, 1)
    gpt = our_gpt()
    batch, prompt = batches() if training else None, torch.randint(vocab_size, (1, context), device=device)
    ours = our_train_step() if training else our_text()
compile = training and device.type == 'cuda' if compile is None else compile
if compile and mode != 'prepare':
    compile = compile_or_warn(gpt, lambda: ours(0), dynamic=None if training else True)
for number in range(warmup_steps):
    ours(number)
memory, memory_kind = peak_memory(device)
contenders = [ours]
if baseline and mode != 'prepare':
    theirs = baseline_train_step() if training else hugging_face_text() if baseline == 'hf' else plain_text()
if baseline:
    contenders.append(theirs)
for number in range(warmup_steps if baseline else 0):
    theirs(number)

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
seconds, tokens = [[] for _ in contenders], [0 for _ in contenders]
with profiler:
    for number in range(warmup_steps, warmup_steps + num_steps):
        for i, contender in enumerate(contenders):  # in turns, so that what else the machine does meets all alike
            begin = time.perf_counter()
            tokens[i] = contender(number)
            seconds[i].append(time.perf_counter() - begin)
            if contender is ours and (not baseline or (mode == 'prepare' and number == 0)):  # not the baseline's peak
                memory, memory_kind = peak_memory(device, children=mode == 'prepare')

# ---- figures ----
if profile:
    by = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=40))
    print('trace in ./bench_log; the figures below include the cost of tracing')
medians = [statistics.median(times) for times in seconds]
speeds = [count / median for count, median in zip(tokens, medians, strict=True)]
mfu = gpt.estimate_mfu(batch_size, medians[0]) if training else None
print(f'machine  {hardware_name(device)}, torch {torch.__version__}')
if mode != 'prepare':
    print(f'numbers  {precision_name}, {"compiled" if compile else "eager"}')
    a_step = {'gradient_accumulation_steps': 1, 'batch_size': batch_size, 'max_iters': 1, 'eval_interval': 1,
              'eval_iters': 0, 'dataset': dataset, 'activation_checkpointing': activation_checkpointing,
              'optimizer': 'adamw', 'lora_rank': 0, 'trainable': 'all', 'unfreeze': None}
    said = Plan(gpt, a_step, hardware, precision_name, None).summary()
    labels = ['model', 'step', 'compute', 'memory', 'disk'] if training else ['model']
    print_summary({label: said[label] for label in labels})
what = {'train': f'a step of {batch_size} x {block_size} tokens',
        'decode': f'{batch_size} x {new_tokens} tokens after {context}', 'prepare': f'{tokens[0]:,} tokens'}[mode]
for name, times, speed in zip(('ours', baseline), seconds, speeds, strict=False):
    low, middle, high = (f'{1000 * value:.2f}' for value in (min(times), statistics.median(times), max(times)))
    print(f'{name:8} {middle} ms for {what}, the median of {num_steps} ({low} to {high}): {speed:,.0f} tokens/s')
if training:
    print(f'MFU      {"n/a" if mfu is None else f"{mfu:.1%}"}')
print(f'held     {"n/a" if memory is None else f"{memory / 1e6:,.0f} MB"} at the peak, {memory_kind}')
figures = {'mode': mode, 'ms_per_step': 1000 * medians[0], 'tokens_per_s': speeds[0], 'mfu': mfu,
           'peak_memory_bytes': memory, 'device_name': hardware_name(device), 'torch': torch.__version__,
           'precision': precision_name, 'compiled': compile,
           'config': {**config, 'batch_size': batch_size, 'num_steps': num_steps, 'warmup_steps': warmup_steps}}
if baseline:
    ratios = sorted(count / times * their_times / their_count for times, their_times, count, their_count in
                    zip(*seconds, [tokens[0]] * num_steps, [tokens[1]] * num_steps, strict=True))
    figures |= {'baseline': baseline, 'baseline_tokens_per_s': speeds[1], 'ratio': speeds[0] / speeds[1]}
    print(f'ratio    {speeds[0] / speeds[1]:.2f} of the medians ({ratios[0]:.2f} to {ratios[-1]:.2f} of the rounds)')
if json:
    with explained(OSError, prefix='json: '), open(json, 'w', encoding='utf-8') as file:
        dump(figures, file, indent=2)
