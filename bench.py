"""
Times training, sampling or data preparation on random weights, and shows where the time goes:

    python bench.py                                  # a training step: forward, backward, AdamW
    python bench.py --profile=True                   # where its time goes
    python bench.py --baseline=hf --json=bench.json  # in turns with transformers' GPT-2
    python bench.py --mode=decode --context=400      # tokens after a prompt
    python bench.py --mode=decode --quantize=int4 --baseline=llamacpp  # in turns with llama.cpp
    python bench.py --device=cpu --busy_core=True    # with another program on one of the cores
    python bench.py --mode=prepare --data_files='texts/*.parquet' --baseline=plain

A baseline is transformers (hf), nanoGPT's way (plain), or, for decode on a CPU, llama.cpp with the
same weights: in float32 or bfloat16 as ours are, in Q8_0 for int8, in Q4_0 for int4.

--profile=True writes a Chrome trace into ./bench_log; open it at https://ui.perfetto.dev.
docs/benchmarks.md has the results, and docs/gpu.md those of experiments/gpu_suite.py.
"""
import contextlib
import glob
import math
import os
import tempfile
import time
from functools import partial
from json import dump

import torch

from configurator import configure
from model import GPT, GPTConfig
from plaingpt.benchmarking import baselines, decoding
from plaingpt.benchmarking.batches import batch_source
from plaingpt.benchmarking.contender import Contender
from plaingpt.inference.quantization import place_to_generate
from plaingpt.planning.hardware import Hardware
from plaingpt.planning.plan import Plan, print_summary
from plaingpt.planning.run_size import RunSize
from plaingpt.planning.speed import measured_peak
from plaingpt.planning.units import short_bytes, short_time
from plaingpt.system import compiling
from plaingpt.system.devices import (check_device, default_device, hardware_name, peak_memory,
                                     place, precision, release_memory, reset_peak_memory,
                                     residual_dtype, seed_generator, set_up_math, synchronize)
from plaingpt.system.messages import complaints, explained
from plaingpt.system.seeds import mixed_seed
from plaingpt.text.data_sets import DATA_FOLDER
from plaingpt.training.guard import Guard
from plaingpt.training.optimizers import make_optimizer, muon_matrices, temporary_memory
from plaingpt.training.processes import Process

# ---- configuration ----
# Work
mode = 'train'                      # {'train' | 'decode' | 'prepare'}
baseline = ''                       # {'' | 'hf' | 'plain' | 'llamacpp'} takes turns with ours
batch_size = 12                     # {>= 1} sequences at a time; default on a CPU, or decoding: 1
block_size = 1024                   # {>= 1} tokens in a sequence
real_data = True                    # read the data set if it is there; False: random tokens
dataset = 'openwebtext'             # folder under data/
seed = 1337                         # {[0, 4294967295]} of weights and batches
context = 60                        # {>= 1} tokens of the prompt, in decode
new_tokens = 100                    # {>= 1} tokens after it
quantize = ''                       # {'' | 'int8' | 'int4'} form of the weights, in decode
data_files = ''                     # for prepare: Parquet files, as a glob, with a column 'text'
# Model
n_layer = 12                        # {>= 1} blocks
n_head = 12                         # {>= 1} attention heads
n_embd = 768                        # {>= 1} channels, a multiple of n_head
vocab_size = 50304                  # {>= 1} tokens
dropout = 0.0                       # {[0, 1)} share of activations zeroed in training
bias = False                        # in linear layers and layer norms
gelu = 'tanh'                       # {'tanh' | 'exact'} GPT-2's form, or nanoGPT's
optimizer = 'adamw'                 # {'adamw' | 'muon'} muon: matrices of blocks; AdamW the rest
# Measurement
num_steps = 20                      # {>= 1} timed steps; default in decode and prepare: 5
warmup_steps = 3                    # {>= 1} steps before them; default in decode: 1
steps_a_sync = 5                    # {>= 1} steps between waits for the device; default on a CPU: 1
keep_memory = True                  # False: malloc gives memory back, as by default; CPU only
busy_core = False                   # True: time again while another program computes; CPU only
profile = False                     # write a trace to ./bench_log, print the costliest operations
json = ''                           # a file to write the figures to
# System
device = default_device()           # cuda, cuda:1, mps or cpu; default: the best one here
dtype = 'auto'                      # {'auto' | 'float32' | 'bfloat16' | 'float16'}
compile: bool | None = None         # torch.compile; None: on CUDA only, in training
compile_mode = 'auto'               # that of torch.compile; auto: CUDA graphs for small models
bf16_residual = False               # True: the residual stream is bfloat16 too; less memory
activation_checkpointing = False    # True: less memory for activations, about a third more time


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    yield from compiling.problems(globals())
    if mode == 'prepare' and not data_files:
        yield "mode='prepare' needs documents: --data_files='texts/*.parquet'"
    if mode == 'prepare' and (baseline == 'hf' or profile):
        yield "mode='prepare' goes with neither baseline='hf' nor profile=True"
    if busy_core and (mode == 'prepare' or not device.startswith('cpu')):
        yield 'busy_core=True goes with device=cpu, and not with mode=prepare'
    if quantize and mode != 'decode':
        yield f'quantize={quantize} goes with mode=decode'
    if baseline in ('hf', 'llamacpp') and mode == 'decode' and context + new_tokens > block_size:
        yield (f'{baseline} stops at block_size={block_size}: context={context} + '
               f'new_tokens={new_tokens} is more')
    if baseline == 'llamacpp':
        if mode != 'decode' or not device.startswith('cpu'):
            yield "baseline=llamacpp goes with mode=decode and device=cpu: its package has no GPU"
        yield from complaints(decoding.stand_in_tokenizer, vocab_size)


config, given = configure(globals())

# ---- set-up ----
torch_device = check_device(device)
set_up_math(seed, torch_device, keep_memory and not activation_checkpointing)
precision_name, autocast, scaler = precision(torch_device, dtype, n_embd)
# Defaults that depend on other keys.
if mode != 'train':
    steps_a_sync = 1
    if 'num_steps' not in given:
        num_steps = 5  # each is a whole text or data set
    if 'warmup_steps' not in given:
        warmup_steps = 1
if mode == 'prepare':
    warmup_steps = 0
if profile and 'num_steps' not in given:
    num_steps = 3  # a trace of more is slow to open
if 'steps_a_sync' not in given and (torch_device.type == 'cpu' or profile):
    steps_a_sync = 1
if 'batch_size' not in given and (torch_device.type == 'cpu' or mode != 'train'):
    batch_size = 1  # on a CPU, 12 sequences of GPT-2 take half a minute a step, and 20 GB
if compile is None:
    compile = mode == 'train' and torch_device.type == 'cuda'
with explained(ValueError):
    shape = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, gelu)


def random_gpt():
    """The GPT of the seed, in float32 on the CPU."""
    torch.manual_seed(seed)
    return GPT(shape)


# ---- training ----

# The keys of train.py that an optimizer needs; the rates have no influence on the time.
OPTIMIZER_KEYS = {
    'optimizer': optimizer, 'learning_rate': 1e-4, 'decay_lr': False, 'weight_decay': 0.1,
    'beta1': 0.9, 'beta2': 0.95, 'muon_learning_rate': 1e-3, 'muon_momentum': 0.95,
}


def our_step():
    """step(number), which takes a training step as train.py does."""
    weight_optimizer = make_optimizer(gpt, OPTIMIZER_KEYS, torch_device.type)
    guard = Guard(Process(torch_device), weight_optimizer, scaler, grad_clip=1.0)

    def step(number):
        x, y = batch(number)
        seed_generator(torch_device, mixed_seed(seed, number))
        if has_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast():
            _, loss = gpt(x, y, with_logits=False)
        scaler.scale(loss).backward()
        scaler.unscale_(weight_optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        guard.step(number + 1, loss.detach(), grad_norm)
        weight_optimizer.zero_grad(set_to_none=not has_graphs)

    return step


def steps_of(name, step):
    """The Contender whose work is training steps; step: a function of the step's number."""
    def trial():
        step(0)
        synchronize(torch_device)

    def work(number):
        # The host may run ahead of the device, as between two lines of train.py's log.
        for i in range(steps_a_sync):
            step(number * steps_a_sync + i)
        synchronize(torch_device)
        return batch_size * block_size

    return Contender(name, trial, work, steps_a_sync)


# ---- decoding ----

def random_prompts():
    """The prompts, int64 (B, context): one, which is read once for all samples of a batch.

    llama.cpp would read it for each of them, so with that baseline each sample has its own."""
    count = batch_size if baseline == 'llamacpp' else 1
    known = min(vocab_size, decoding.GPT2_TOKENS)  # ids that llama.cpp's vocabulary has too
    return torch.randint(known, (count, context), device=torch_device)


# ---- preparation: each function prepares the documents and returns their tokens ----

def our_preparation(number):
    script = os.path.join(DATA_FOLDER, 'prepare.py')
    with tempfile.TemporaryDirectory() as folder:
        flags = [f'--files={data_files}', f'--dataset={folder}']
        baselines.run_python(script, *flags, name=script)
        size = 0
        for split in 'train', 'val':
            size += os.path.getsize(os.path.join(folder, f'{split}.bin'))
    return size // 2  # bytes of a uint16


def plain_preparation(number):
    return baselines.nanogpt_preparation(sorted(glob.glob(os.path.expanduser(data_files))))


# ---- baselines ----

def add_rival(name, compiled):
    """Warms up a baseline and adds it to the rivals, unless the GPU's memory is too small."""
    try:
        rival = make_rival(name, compiled)
        rival.start_up()
        rival.warm_up(warmup_rounds)
        rivals.append(rival)
    except torch.OutOfMemoryError:
        leave_out(name)


def leave_out(name):
    print(f'note: {name} runs out of memory, so it is left out')
    left_out.append(name)


def make_rival(name, compiled):
    """The Contender of a baseline."""
    # transformers and nanoGPT compute in float32 on a CPU.
    their_dtype = 'float32' if torch_device.type == 'cpu' else precision_name
    if mode == 'train':
        make_step = baselines.nanogpt_step
        if baseline == 'hf':
            make_step = baselines.transformers_step
        return steps_of(name, make_step(shape, batch, torch_device, their_dtype, compiled))
    if baseline == 'hf':
        write = decoding.transformers_writer(shape, batch_size, torch_device, their_dtype)
    elif baseline == 'plain':
        write = decoding.nanogpt_writer(shape, torch_device, their_dtype)
    else:
        write = decoding.llama_cpp_writer(random_gpt(), prompts, new_tokens, llama_cpp_type)
    return decoding.Writer(name, write, prompts, new_tokens)


# ---- ours: build, compile, warm up ----
warmup_rounds = math.ceil(warmup_steps / steps_a_sync)
rounds = math.ceil(num_steps / steps_a_sync)
gpt = None
compiled = False
llama_cpp_type = None  # of the matrices that it gets, where it is the baseline
memory, memory_kind = None, ''
if mode == 'prepare':
    ours = Contender('ours', None, our_preparation)
else:
    hardware = Hardware.here(torch_device, 1)  # while its memory is empty
    gpt = random_gpt()
    if mode == 'train':
        place(gpt, torch_device)
        gpt.checkpointing = activation_checkpointing
        gpt.residual_dtype = residual_dtype(bf16_residual, precision_name)
        chosen_mode = compiling.choose_mode(gpt, torch_device, compile_mode)
        has_graphs = compile and compiling.uses_cuda_graphs(chosen_mode, torch_device)
        options = {'mode': chosen_mode}
        data = dataset if real_data else None
        batch = batch_source(data, shape, batch_size, seed, torch_device)
        ours = steps_of('ours', our_step())
    else:
        precision_name = place_to_generate(gpt, torch_device, dtype, quantize)
        has_graphs = False
        options = {'dynamic': True}  # each token makes the text longer
        prompts = random_prompts()
        write = decoding.our_writer(gpt, batch_size // len(prompts))
        ours = decoding.Writer('ours', write, prompts, new_tokens)

    if has_graphs:
        compiling.keep_gradients(gpt)
    if compile:
        compiled = ours.start_up(partial(compiling.compile_or_warn, gpt, ours.trial, **options))
    else:
        ours.start_up()
    has_graphs = has_graphs and compiled

    reset_peak_memory(torch_device)  # Inductor has tried kernels, which no later step does
    ours.warm_up(warmup_rounds)
    memory, memory_kind = peak_memory(torch_device)  # before the baseline takes any

# ---- the baselines ----
# Where ours is compiled, transformers is both eager and compiled, and nanoGPT's way compiled.
versions = {}  # {name: whether it is compiled}
if baseline == 'llamacpp':
    llama_cpp_type = decoding.TYPES_FOR_LLAMA_CPP[quantize or precision_name]
if baseline and mode != 'prepare':
    versions[baseline] = compiled and baseline == 'plain'
if baseline == 'hf' and compiled and mode == 'train':
    versions['hf compiled'] = True
rivals = []
left_out = []  # the names of baselines that run out of memory
for name, is_compiled in versions.items():
    add_rival(name, is_compiled)
    release_memory(torch_device)
if baseline == 'plain' and mode == 'prepare':
    rivals.append(Contender('plain', None, plain_preparation))
contenders = [ours, *rivals]

# ---- measurement ----
profiler = contextlib.nullcontext()
if profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch_device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True,
                                      profile_memory=True)
    with explained(OSError, prefix='the trace cannot be written: '):
        os.makedirs('bench_log', exist_ok=True)

# They take turns, so that whatever else the machine does slows down all of them. On a GPU, each
# gets the memory that the one before has kept, and allocates its own in a step that is not timed.
takes_memory = torch_device.type == 'cuda' and mode != 'prepare' and bool(rivals)
with profiler:
    for number in range(warmup_rounds, warmup_rounds + rounds):
        for contender in list(contenders):
            try:
                if takes_memory:
                    release_memory(torch_device)
                    contender.trial()
                contender.time(number)
            except torch.OutOfMemoryError:
                if contender is ours:
                    raise
                leave_out(contender.name)
                contenders.remove(contender)
            if mode == 'prepare' and memory is None:
                memory, memory_kind = peak_memory(torch_device, children=True)

rivals = contenders[1:]

# ---- once more, beside another program ----

def timed_now(name):
    """A Contender that has done our work again, as the machine is now."""
    contender = Contender(name, ours.trial, ours.work, steps_a_sync)
    contender.trial()
    for number in range(warmup_rounds, warmup_rounds + rounds):
        contender.time(number)
    return contender


measured_again = []
if busy_core:
    with baselines.busy_program():
        settled = time.monotonic() + 1  # threads notice within 0.25 s that they share a core
        while time.monotonic() < settled:
            ours.trial()
        busy = timed_now('busy')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one_thread = timed_now('1 thread')
    finally:
        torch.set_num_threads(threads)
    measured_again = [busy, one_thread]

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
planned = None
if gpt is not None:
    compiled_how = f'compiled ({options.get("mode", "default")})' if compiled else 'eager'
    weights = f' with {quantize} weights' if quantize else ''
    their_weights = f'; llama.cpp: {llama_cpp_type}' if baseline == 'llamacpp' else ''
    print(f'numbers  {precision_name}{weights}, {compiled_how}{their_weights}')
    # Muon keeps one number for each parameter that it trains, AdamW two.
    moments = 2.0
    update_memory = 0
    if optimizer == 'muon':
        muon_parameters = sum(matrix.numel() for matrix in muon_matrices(gpt))
        moments -= muon_parameters / gpt.get_num_params(non_embedding=False)
        update_memory = temporary_memory(gpt)
    size = RunSize(batch_size, checkpointing=activation_checkpointing, moments=moments,
                   update_memory=update_memory, compiled=compiled)
    planned_gpt = gpt
    if quantize:  # quantised matrices are no parameters, so the plan gets a GPT without memory
        with torch.device('meta'):
            planned_gpt = GPT(shape)
    plan = Plan(planned_gpt, size, hardware, precision_name)
    summary = plan.summary()
    labels = ['model', 'step', 'compute', 'memory', 'disk'] if mode == 'train' else ['model']
    print_summary({label: summary[label] for label in labels})
    if mode == 'train':
        planned = sum(plan.memory.values())

if mode == 'train':
    work = f'a step of {batch_size} x {block_size} tokens'
elif mode == 'decode':
    work = f'{batch_size} x {new_tokens} tokens after {context}'
else:
    work = f'{ours.tokens:,} tokens'
how_often = f'{rounds}'
if steps_a_sync > 1:
    how_often += f' rounds of {steps_a_sync} steps'
for contender in [*contenders, *measured_again]:
    median = 1000 * contender.median()
    shortest, longest = 1000 * min(contender.seconds), 1000 * max(contender.seconds)
    print(f'{contender.name:8} {median:.2f} ms for {work}, the median of {how_often} '
          f'({shortest:.2f} to {longest:.2f}): {contender.speed():,.0f} tokens/s')
    if mode == 'train' and contender in contenders:
        print(f'         its first step took {short_time(contender.start_seconds)}')
    if mode == 'decode' and contender in contenders:
        print(f'         its first text took {1000 * contender.first_seconds:.2f} ms, after '
              f'{short_time(contender.start_seconds)} for two tokens')
        for part, timed in contender.parts().items():
            print(f'         {part}: {timed.speed():,.0f} tokens/s')

mfu = None
share_of_peak = None
if mode == 'train':
    mfu = gpt.estimate_mfu(batch_size, ours.median())
    print('MFU      n/a' if mfu is None else f'MFU      {mfu:.1%}')
    if torch_device.type == 'cpu':
        peak = measured_peak(torch_device, getattr(torch, precision_name))
        flops = gpt.flops_per_token() * ours.speed()
        share_of_peak = flops / peak
        print(f'peak     {flops / 1e9:,.0f} GFLOP/s, {share_of_peak:.0%} of the {peak / 1e9:,.0f} '
              'that large products reach')
held = 'n/a' if memory is None else f'{memory / 1e6:,.0f} MB'
against_plan = '' if planned is None else f'; planned: {short_bytes(planned)}'
print(f'held     {held} at the peak, {memory_kind}{against_plan}')

figures = {
    'mode': mode,
    **ours.figures(),
    'mfu': mfu,
    'share_of_peak': share_of_peak,
    'peak_memory_bytes': memory,
    'peak_memory_kind': memory_kind,
    'planned_memory_bytes': planned,
    'device': str(torch_device),
    'device_name': hardware_name(torch_device),
    'torch': torch.__version__,
    'precision': precision_name,
    'compiled': compiled,
    'compile_mode': options.get('mode', 'default') if compiled else None,
    'contenders': [contender.figures() for contender in contenders],
    'left_out': left_out,
    'config': {**config, 'batch_size': batch_size, 'num_steps': rounds * steps_a_sync,
               'warmup_steps': warmup_steps, 'steps_a_sync': steps_a_sync, 'compile': compile},
}
if rivals:
    fastest = max(rivals, key=Contender.speed)
    ratio = ours.ratio_to(fastest)
    print(f'ratio    {ratio.of_medians:.2f} of the medians, against {fastest.name} '
          f'({ratio.least:.2f} to {ratio.largest:.2f} of the rounds)')
    figures['baseline'] = baseline
    figures['baseline_tokens_per_s'] = fastest.speed()
    figures['ratio'] = ratio.of_medians
    figures['ratio_min'] = ratio.least
    figures['ratio_max'] = ratio.largest
    figures['llama_cpp_type'] = llama_cpp_type
    if mode == 'decode':
        for part, theirs in fastest.parts().items():
            ratio = ours.parts()[part].ratio_to(theirs)
            print(f'         {part}: {ratio.of_medians:.2f} ({ratio.least:.2f} to '
                  f'{ratio.largest:.2f})')
            figures[f'{part}_ratio'] = ratio.of_medians
            figures[f'{part}_ratio_min'] = ratio.least
            figures[f'{part}_ratio_max'] = ratio.largest
if busy_core:
    of_one_thread = busy.speed() / one_thread.speed()
    print(f'shared   beside a program that keeps a core busy {busy.speed() / ours.speed():.2f} of '
          f'the speed, and {of_one_thread:.2f} of that of one thread alone')
    figures['busy_core'] = [contender.figures() for contender in measured_again]
    figures['busy_core_of_one_thread'] = of_one_thread
if json:
    with explained(OSError, prefix='json: '), open(json, 'w', encoding='utf-8') as file:
        dump(figures, file, indent=2)
