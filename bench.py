"""
Times training, sampling or data preparation on random weights, and shows where the time goes:

    python bench.py                                  # a training step: forward, backward, AdamW
    python bench.py --profile=True                   # where its time goes
    python bench.py --baseline=hf --json=bench.json  # in turns with transformers' GPT-2
    python bench.py --mode=decode --context=400      # tokens after a prompt
    python bench.py --mode=prepare --data_files='texts/*.parquet' --baseline=plain

--profile=True writes a Chrome trace into ./bench_log; open it at https://ui.perfetto.dev.
docs/benchmarks.md has the results.
"""
import contextlib
import glob
import os
import statistics
import subprocess
import sys
import tempfile
import time
from json import dump

import torch

from configurator import configure
from model import GPT, GPTConfig
from plaingpt.inference.engine import stream
from plaingpt.planning.hardware import Hardware
from plaingpt.planning.plan import Plan, print_summary
from plaingpt.planning.run_size import RunSize
from plaingpt.system.compiling import compile_or_warn
from plaingpt.system.devices import (check_device, default_device, default_dtype,
                                     hardware_name, peak_memory, place, precision, set_up_math,
                                     synchronize)
from plaingpt.system.messages import UserError, explained
from plaingpt.text.data_sets import folder_of, read_meta
from plaingpt.text.token_files import TokenFile

# ---- configuration ----
# Work
mode = 'train'                      # {'train' | 'decode' | 'prepare'}
baseline = ''                       # {'' | 'hf' | 'plain'} transformers, or nanoGPT's way; in turns
batch_size = 12                     # {>= 1} sequences at a time; default on a CPU, or decoding: 1
block_size = 1024                   # {>= 1} tokens in a sequence
real_data = True                    # read the data set if it is there; False: random tokens
dataset = 'openwebtext'             # folder under data/
seed = 1337                         # {[0, 4294967295]} of weights and batches
context = 60                        # {>= 1} tokens of the prompt, in decode
new_tokens = 100                    # {>= 1} tokens after it
data_files = ''                     # for prepare: Parquet files, as a glob, with a column 'text'
# Model
n_layer = 12                        # {>= 1} blocks
n_head = 12                         # {>= 1} attention heads
n_embd = 768                        # {>= 1} channels, a multiple of n_head
vocab_size = 50304                  # {>= 1} tokens
dropout = 0.0                       # {[0, 1)} share of activations zeroed in training
bias = False                        # in linear layers and layer norms
# Measurement
num_steps = 20                      # {>= 1} timed steps; default in decode and prepare: 5
warmup_steps = 3                    # {>= 1} steps before them; default in decode: 1
profile = False                     # write a trace to ./bench_log, print the costliest operations
json = ''                           # a file to write the figures to
# System
device = default_device()           # cuda, cuda:1, mps or cpu; default: the best one here
dtype = 'auto'                      # {'auto' | 'float32' | 'bfloat16' | 'float16'}
compile: bool | None = None         # torch.compile; None: on CUDA only, in training
activation_checkpointing = False    # True: less memory for activations, about a third more time


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    if mode == 'prepare' and not data_files:
        yield "mode='prepare' needs documents: --data_files='texts/*.parquet'"
    if mode == 'prepare' and (baseline == 'hf' or profile):
        yield "mode='prepare' goes with neither baseline='hf' nor profile=True"
    if mode == 'decode' and baseline == 'hf' and context + new_tokens > block_size:
        yield (f'transformers stops at block_size={block_size}: context={context} + '
               f'new_tokens={new_tokens} is more')


config, given = configure(globals())

# ---- set-up ----
torch_device = check_device(device)
set_up_math(seed, torch_device)
precision_name, autocast, scaler = precision(torch_device, dtype, n_embd)
if mode == 'decode' and dtype == 'auto':
    precision_name = default_dtype(torch_device, n_embd, training=False)
# The baselines compute as others do: in float32 on a CPU.
baseline_dtype = 'float32' if torch_device.type == 'cpu' else precision_name

# Defaults that depend on other keys.
if mode != 'train':
    if 'num_steps' not in given:
        num_steps = 5  # each is a whole text or data set
    if 'warmup_steps' not in given:
        warmup_steps = 1
if mode == 'prepare':
    warmup_steps = 0
if profile and 'num_steps' not in given:
    num_steps = 3  # a trace of more is slow to open
if 'batch_size' not in given and (torch_device.type == 'cpu' or mode != 'train'):
    batch_size = 1  # on a CPU, 12 sequences of GPT-2 take half a minute a step, and 20 GB


def plain_gpt():
    """A GPT on the device, computed by torch's own operations."""
    with explained(ValueError):
        config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)
        return GPT(config).to(torch_device)


def hugging_face_gpt():
    """The same architecture by transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer,
        n_head=n_head, bos_token_id=0, eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout)
    return GPT2LMHeadModel(config).to(torch_device)


# ---- training: each function below makes another, which does a step and returns its tokens ----

def batch_source():
    """A function from a step's number to its x and y, of the data set or of random tokens."""
    folder = folder_of(dataset)
    train_bin = os.path.join(folder, 'train.bin')
    if real_data and not os.path.exists(train_bin):
        print(f'note: {train_bin} is missing, so the tokens are random')
    elif real_data:
        meta = read_meta(folder)
        data_vocab_size = meta['vocab_size'] or 0
        if data_vocab_size <= vocab_size:
            data = TokenFile(train_bin, meta['dtype'], vocab_size, block_size)
            return lambda step: data.batch(seed, 'train', step, 0, batch_size, block_size,
                                           torch_device)
        print(f'note: the vocabulary of {train_bin} has {data_vocab_size} tokens, '
              'so the tokens are random')

    def random_batch(step):
        generator = torch.Generator().manual_seed(seed + step)
        shape = batch_size, block_size + 1
        tokens = torch.randint(vocab_size, shape, generator=generator).to(torch_device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return random_batch


def train_step(net, loss_of, optimizer, autocast, scaler):
    def step(number):
        x, y = batch(number)
        with autocast():
            loss = loss_of(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        synchronize(torch_device)
        return batch_size * block_size
    return step


def our_train_step():
    def loss_of(x, y):
        _, loss = gpt(x, y, with_logits=False)
        return loss

    gpt.checkpointing = activation_checkpointing
    optimizer = gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), torch_device.type)
    return train_step(gpt, loss_of, optimizer, autocast, scaler)


def plain_train_step():
    def loss_of(x, y):
        _, loss = net(x, y)
        return loss

    net = plain_gpt()
    step = baseline_train_step(net, loss_of)
    if compile:
        compile_or_warn(net, lambda: step(0))
    return step


def hugging_face_train_step():
    net = hugging_face_gpt().train()
    return baseline_train_step(net, lambda x, y: net(input_ids=x, labels=x).loss)


def baseline_train_step(net, loss_of):
    _, autocast, scaler = precision(torch_device, baseline_dtype, n_embd)
    fused = torch_device.type == 'cuda'
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=fused)
    return train_step(net, loss_of, optimizer, autocast, scaler)


# ---- decoding: each function makes another, which writes a text and returns its tokens ----

def our_text():
    gpt.eval().to(getattr(torch, precision_name))

    def text(number):
        seeds = range(batch_size)
        for _ in stream(gpt, prompt, new_tokens, 0.8, 200, num_samples=batch_size, seeds=seeds):
            pass
        synchronize(torch_device)
        return batch_size * new_tokens
    return text


def plain_text():
    """One sample, as nanoGPT takes them one by one: each token from all tokens before it."""
    net = plain_gpt().eval().to(getattr(torch, baseline_dtype))

    @torch.no_grad()
    def text(number):
        idx = prompt
        for _ in range(new_tokens):
            logits, _ = net(idx[:, -block_size:])
            logits = logits[:, -1].float() / 0.8  # (1, V)
            top = logits.topk(min(200, vocab_size)).values
            logits = logits.masked_fill(logits < top[:, -1:], -torch.inf)
            idx_next = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
            idx = torch.cat([idx, idx_next], dim=1)
        synchronize(torch_device)
        return new_tokens
    return text


def hugging_face_text():
    net = hugging_face_gpt().eval().to(getattr(torch, baseline_dtype))

    def text(number):
        net.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0,
                     num_return_sequences=batch_size, do_sample=True, temperature=0.8, top_k=200,
                     min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        synchronize(torch_device)
        return batch_size * new_tokens
    return text


# ---- preparation: each function prepares the documents and returns their tokens ----

def our_preparation(number):
    script = os.path.join(folder_of('openwebtext'), 'prepare.py')
    with tempfile.TemporaryDirectory() as folder:
        flags = [f'--dataset={folder}', f'--data_files={data_files}']
        cache = {'HF_DATASETS_CACHE': os.path.join(folder, 'cache')}
        run_program(script, *flags, name=script, env={**os.environ, **cache})
        size = 0
        for split in 'train', 'val':
            size += os.path.getsize(os.path.join(folder, f'{split}.bin'))
    return size // 2  # bytes of a uint16


def plain_preparation(number):
    """nanoGPT's way: datasets maps documents to lists of ids on disk, then makes token files."""
    files = sorted(glob.glob(os.path.expanduser(data_files)))
    return int(run_program('-c', PLAIN_PREPARATION, *files, name='the baseline'))


PLAIN_PREPARATION = '''
import os, sys, tempfile
import datasets, numpy, tiktoken

bpe = tiktoken.get_encoding("gpt2")
tokens = 0

def encode(document):
    return {"encoded": [*bpe.encode_ordinary(document["text"]), bpe.eot_token]}

with tempfile.TemporaryDirectory() as folder:
    texts = datasets.load_dataset("parquet", data_files=sys.argv[1:], split="train",
                                  cache_dir=folder)
    texts = texts.train_test_split(test_size=0.0005, seed=1)
    columns = texts["train"].column_names
    encoded = texts.map(encode, num_proc=os.cpu_count(), remove_columns=columns)
    for name, part in encoded.items():
        with open(os.path.join(folder, name), "wb") as file:
            for documents in part.with_format("numpy").iter(batch_size=len(part) // 1024 + 1):
                numpy.concatenate(documents["encoded"]).astype("uint16").tofile(file)
            tokens += file.tell() // 2
print(tokens)
'''


def run_program(*arguments, name, env=None):
    """stdout of python with these arguments. UserError if it fails."""
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                           encoding='utf-8', env=env)
    if ended.returncode != 0:
        raise UserError(f'{name} failed: {ended.stderr.strip()[-500:]}')
    return ended.stdout


# ---- measurement ----

class Contender:
    """One of the programs that are timed in turns."""

    def __init__(self, name, work):
        self.name = name
        self.work = work   # a function from a step's number to its tokens
        self.seconds = []  # of each timed step
        self.tokens = 0    # in a step

    def time(self, number):
        begin = time.perf_counter()
        self.tokens = self.work(number)
        self.seconds.append(time.perf_counter() - begin)

    def median(self):
        return statistics.median(self.seconds)

    def speed(self):
        """Tokens/s at the median."""
        return self.tokens / self.median()


# Ours.
gpt = None
compiled = False
if mode == 'prepare':
    ours = Contender('ours', our_preparation)
else:
    hardware = Hardware.here(torch_device, 1)  # while its memory is empty
    gpt = place(plain_gpt(), torch_device)
    if mode == 'train':
        batch = batch_source()
        ours = Contender('ours', our_train_step())
    else:
        prompt = torch.randint(vocab_size, (1, context), device=torch_device)
        ours = Contender('ours', our_text())
    if compile is None:
        compile = mode == 'train' and torch_device.type == 'cuda'
    if compile:
        lengths_change = None if mode == 'train' else True
        compiled = compile_or_warn(gpt, lambda: ours.work(0), dynamic=lengths_change)
for number in range(warmup_steps):
    ours.work(number)
memory, memory_kind = peak_memory(torch_device)  # before the baseline takes any

# The baseline.
theirs = None
if baseline:
    if mode == 'prepare':
        work = plain_preparation
    elif mode == 'train':
        work = hugging_face_train_step() if baseline == 'hf' else plain_train_step()
    else:
        work = hugging_face_text() if baseline == 'hf' else plain_text()
    theirs = Contender(baseline, work)
    for number in range(warmup_steps):
        theirs.work(number)
contenders = [ours, theirs] if baseline else [ours]

profiler = contextlib.nullcontext()
if profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch_device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True,
                                      profile_memory=True)
    with explained(OSError, prefix='the trace cannot be written: '):
        os.makedirs('bench_log', exist_ok=True)

# They take turns, so that whatever else the machine does slows down both.
with profiler:
    for number in range(warmup_steps, warmup_steps + num_steps):
        ours.time(number)
        # Once the baseline has run, the peak may be its own.
        peak_is_ours = not baseline or (mode == 'prepare' and number == 0)
        if peak_is_ours:
            memory, memory_kind = peak_memory(torch_device, children=mode == 'prepare')
        if baseline:
            theirs.time(number)

# ---- figures ----
if profile:
    sort_by = 'self_device_time_total' if torch_device.type == 'cuda' else 'self_cpu_time_total'
    operations = profiler.key_averages()
    print(operations.table(sort_by=sort_by, row_limit=12, max_name_column_width=40))
    trace = os.path.join('bench_log', time.strftime(f'{mode}-%Y%m%d-%H%M%S.json'))
    with explained(OSError, prefix='the trace cannot be written: '):
        profiler.export_chrome_trace(trace)
    print(f'trace in {trace}: open it at https://ui.perfetto.dev; the figures below include the '
          'cost of tracing')

print(f'machine  {hardware_name(torch_device)}, torch {torch.__version__}')
if gpt is not None:
    print(f'numbers  {precision_name}, {"compiled" if compiled else "eager"}')
    size = RunSize(batch_size, checkpointing=activation_checkpointing)
    summary = Plan(gpt, size, hardware, precision_name).summary()
    labels = ['model', 'step', 'compute', 'memory', 'disk'] if mode == 'train' else ['model']
    print_summary({label: summary[label] for label in labels})

if mode == 'train':
    work = f'a step of {batch_size} x {block_size} tokens'
elif mode == 'decode':
    work = f'{batch_size} x {new_tokens} tokens after {context}'
else:
    work = f'{ours.tokens:,} tokens'
for contender in contenders:
    median = 1000 * contender.median()
    shortest, longest = 1000 * min(contender.seconds), 1000 * max(contender.seconds)
    print(f'{contender.name:8} {median:.2f} ms for {work}, the median of {num_steps} '
          f'({shortest:.2f} to {longest:.2f}): {contender.speed():,.0f} tokens/s')

mfu = None
if mode == 'train':
    mfu = gpt.estimate_mfu(batch_size, ours.median())
    print('MFU      n/a' if mfu is None else f'MFU      {mfu:.1%}')
held = 'n/a' if memory is None else f'{memory / 1e6:,.0f} MB'
print(f'held     {held} at the peak, {memory_kind}')

figures = {
    'mode': mode,
    'ms_per_step': 1000 * ours.median(),
    'tokens_per_s': ours.speed(),
    'mfu': mfu,
    'peak_memory_bytes': memory,
    'device_name': hardware_name(torch_device),
    'torch': torch.__version__,
    'precision': precision_name,
    'compiled': compiled,
    'config': {**config, 'batch_size': batch_size, 'num_steps': num_steps,
               'warmup_steps': warmup_steps},
}
if baseline:
    ratio = ours.speed() / theirs.speed()
    rounds = []
    for our_seconds, their_seconds in zip(ours.seconds, theirs.seconds, strict=True):
        rounds.append((ours.tokens / our_seconds) / (theirs.tokens / their_seconds))
    print(f'ratio    {ratio:.2f} of the medians ({min(rounds):.2f} to {max(rounds):.2f} of the '
          'rounds)')
    figures['baseline'] = baseline
    figures['baseline_tokens_per_s'] = theirs.speed()
    figures['ratio'] = ratio
if json:
    with explained(OSError, prefix='json: '), open(json, 'w', encoding='utf-8') as file:
        dump(figures, file, indent=2)
