"""
Measures a trained model: its loss on a whole split of a data set, or its score on standard tasks.

    python evaluate.py --out_dir=out-shakespeare-char
    python evaluate.py --init_from=gpt2 --dataset=openwebtext
    python evaluate.py --compare=out-a,out-b --output=figures.json
    torchrun --standalone --nproc_per_node=8 evaluate.py --out_dir=out
    python evaluate.py --out_dir=out --tasks=lambada_openai --limit=100

The loss is that of every token but the first. The model reads the split in windows that overlap, so
that almost every token has much context: a window counts only the targets that the window before
has not predicted. Bits per byte is the loss per byte of text instead of per token, so that
models with different tokenizers can be compared; special tokens, which stand for no text, are left
out of it.
"""
import contextlib
import os
import re
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch

from configurator import configure
from plaingpt.evaluation import comparison
from plaingpt.evaluation.split_loss import Batches, split_loss, token_losses
from plaingpt.evaluation.windows import Windows
from plaingpt.inference.quantization import place_to_generate
from plaingpt.system.compiling import compile_or_warn
from plaingpt.system.devices import (check_device, default_device, hardware_name, place,
                                     precision, release_memory, set_up_math)
from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError, complaints, explained, print0
from plaingpt.text.data_sets import check_fit, folder_of, read_meta
from plaingpt.text.mixtures import is_mixture
from plaingpt.text.token_bytes import token_bytes
from plaingpt.text.token_files import TokenFile
from plaingpt.text.tokenizers import same_vocabulary
from plaingpt.training import resuming
from plaingpt.training.processes import leave, set_up_process
from plaingpt.training.trained_model import open_named, open_trained

# ---- configuration ----
# Model
init_from = 'resume'                # resume (out_dir), gpt2 to gpt2-xl, hub id, folder, .pt, .gguf
out_dir = 'out'                     # folder of the run, relative to the working directory
adapter = ''                        # folder of a LoRA adapter; init_from is then the base it names
compare = ''                        # instead: 'out-a,out-b,…', models as in init_from, to compare
# Loss on a split
dataset = ''                        # folder under data/; '': the model's own; 'a,b': one a model
split = 'val'                       # train, val or another .bin file of the data set
context_size: int | None = None     # {>= 1} tokens of a window; None: block_size, the smallest
stride: int | None = None           # {>= 1} tokens from window to window; None: half a window
batch_size = 16                     # {>= 1} windows, or requests of a task, that are read together
max_tokens: int | None = None       # {>= 2} read at most so many tokens of the split; None: all
# Standard tasks, instead of the loss
tasks = ''                          # names of lm_eval's tasks: 'lambada_openai,hellaswag'
task_path = ''                      # folder of further tasks, as .yaml files
limit: int | None = None            # {>= 1} examples of each task; None: all
num_fewshot: int | None = None      # {>= 0} solved examples before each; None: as the task has it
chat_template = False               # True: ask in the form of a chat, for models that know it
# Result
output = ''                         # .json file for all figures; '': none
# System
seed = 1234                         # {[0, 4294967295]} of what a task draws; lm_eval's own is 1234
device = default_device()           # cuda, cuda:1, mps or cpu; default: the best one here
backend = 'nccl'                    # {'nccl' | 'gloo'} between CUDA ranks; others use gloo
dtype = 'auto'                      # {'auto' | 'float32' | 'bfloat16' | 'float16'}
quantize = ''                       # {'' | 'int8' | 'int4'} measure the model with such weights
compile = False                     # True: torch.compile, which takes a while to start


def names_in(text):
    """The names in a text that separates them by commas."""
    return [name.strip() for name in text.split(',') if name.strip()]


def problems_of_names():
    """Yields what is wrong with the names of models and data sets."""
    if compare and len(names_in(compare)) < 2:
        yield f'compare={compare} names one model: name two or more, --compare=out-a,out-b'
    if compare and (adapter or tasks):
        yield 'compare takes neither adapter nor tasks: leave them out'
    if any(is_mixture(name) for name in names_in(dataset)):
        yield f'dataset={dataset} is a mixture: name one of its data sets, without a share'
    elif len(names_in(dataset)) not in (0, 1, len(names_in(compare))):
        yield f'dataset={dataset} must name one data set, or one for each model of compare'


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    yield from problems_of_names()
    if not re.fullmatch(r'\w[\w.-]*', split):
        yield f'split={split!r} must be the name of a .bin file in the data set, without .bin'
    if stride and context_size and stride > context_size:
        yield f'stride={stride} would leave out tokens: use at most context_size={context_size}'
    has_task_keys = task_path or limit is not None or num_fewshot is not None or chat_template
    if has_task_keys and not tasks:
        yield ('task_path, limit, num_fewshot and chat_template are about tasks: name some with '
               '--tasks')
    if tasks and not find_spec('lm_eval'):
        yield 'tasks needs the package lm_eval: pip install lm_eval==0.4.13'
    if task_path and not os.path.isdir(task_path):
        yield f'task_path={task_path} is not a folder'
    if compile and quantize and device.startswith('cpu'):
        yield 'on a CPU, compile=True does not go with quantize: leave one of them out'
    if '\0' in output:
        yield f'output={output!r} contains a NUL character, which no file name can have'
    elif os.path.isdir(output):
        yield f'output={output} is a folder: name a file'
    elif not os.path.isdir(os.path.dirname(output) or '.'):
        yield f'output={output}: there is no folder {os.path.dirname(output)}'
    yield from complaints(check_device, device)


config, given = configure(globals())

# What decides nothing in this mode was meant for something: the user should know.
without_effect = set()
if tasks:
    without_effect = {'dataset', 'split', 'context_size', 'stride', 'max_tokens', 'compile'}
if compare:
    without_effect = {'init_from', 'out_dir'}
ignored = sorted(without_effect & set(given))
if ignored:
    mode = 'tasks' if tasks else 'compare'
    raise UserError(f'with {mode}, these keys have no effect: {", ".join(ignored)}; leave them out')

process = set_up_process(device, backend)
if tasks and process.world_size > 1:
    raise UserError('tasks run in one process: start evaluate.py with python, not torchrun')
torch_device = process.device
set_up_math(seed, torch_device)


# ---- models ----
def open_models():
    """The TrainedModels that the keys ask for, all of them before any is measured."""
    if compare:
        return [open_trained(name) for name in names_in(compare)]
    return [open_named(config, given)]


with process.together():
    models = open_models()


def weights_in_words():
    """What follows the precision in a line about a model."""
    return f', {quantize} weights' if quantize else ''


# ---- standard tasks ----
def run_tasks(trained):
    """Runs the tasks, and prints and writes their results."""
    from plaingpt.evaluation import harness
    gpt = trained.gpt
    precision_name = place_to_generate(gpt, torch_device, dtype, quantize)
    print0(f'{trained.origin}; {hardware_name(torch_device)}, {precision_name}{weights_in_words()}')
    harness.run(gpt, trained.load_tokenizer(), tasks=names_in(tasks), task_path=task_path,
                limit=limit, num_fewshot=num_fewshot, batch_size=batch_size,
                chat_template=chat_template, output=output, seed=seed, name=trained.name)


if tasks:
    run_tasks(models[0])
    leave(0)


# ---- data ----
class Data(NamedTuple):
    """The split that a model is measured on."""
    dataset: str
    token_file: TokenFile
    byte_counts: np.ndarray | None  # see token_bytes()


def open_data(trained, name):
    """The Data for a model: the data set of this name, or with '' the one it was trained on."""
    if not name:
        if 'dataset' not in trained.saved.get('config', {}):
            raise UserError(f'{trained.path} does not say which data set it was trained on: name '
                            'one with --dataset')
        name = resuming.data_set(trained.saved, trained.path,
                                 remedy='name one data set with --dataset')
        if is_mixture(name):
            raise UserError(f'{trained.path} was trained on a mixture, {name}: name one of its '
                            'data sets with --dataset')
    folder = folder_of(name)
    meta = read_meta(folder)
    token_file = TokenFile(os.path.join(folder, f'{split}.bin'), meta['dtype'],
                           meta['vocab_size'], expected_tokens=meta['tokens'].get(split))
    check_fit(folder, meta, [token_file], trained.gpt.config.vocab_size, trained.tokenizer)
    tokenizer = trained.load_tokenizer()
    token_file.check_ids(tokenizer.vocab_size)  # a model may have more rows, for no token
    return Data(name, token_file, token_bytes(tokenizer))


def open_all_data():
    """The Data of each model."""
    names = names_in(dataset) or ['']
    if len(names) == 1:
        names = names * len(models)
    return [open_data(trained, name) for trained, name in zip(models, names, strict=True)]


def check_same_text():
    """UserError if models are compared on texts that nobody has said are the same."""
    names = sorted({data.dataset for data in data_of_models})
    if len(names) > 1 and not dataset:
        raise UserError(f'the models were trained on different data sets, {", ".join(names)}: name '
                        'one for all with --dataset, or one for each model if they hold the same '
                        'text')


def common_windows():
    """(tokens of a window, stride) for all models, so that a comparison is fair."""
    configs = [trained.gpt.config for trained in models]
    length = context_size or min(config.block_size for config in configs)
    longest = min(config.longest for config in configs)
    if length > longest:
        raise UserError(f'context_size={length} is too long: use {longest} or less')
    step = stride or max(1, length // 2)
    if step > length:
        raise UserError(f'stride={step} would leave out tokens: use at most {length}, the length '
                        'of a window')
    return length, step


with process.together():
    data_of_models = open_all_data()
    check_same_text()
    window_length, window_stride = common_windows()


# ---- loss on a split ----
def measure(trained, data):
    """The SplitLoss of a model."""
    gpt = trained.gpt
    if quantize:
        precision_name = place_to_generate(gpt, torch_device, dtype, quantize)
        autocast = contextlib.nullcontext
    else:
        place(gpt, torch_device).eval()
        precision_name, autocast, _ = precision(torch_device, dtype, gpt.config.n_embd)
    tokens = len(data.token_file)
    if max_tokens is not None:
        tokens = min(tokens, max_tokens)
    windows = Windows.over(tokens, window_length, window_stride)
    compiled = False
    if compile:
        compiled = compile_blocks(gpt, Batches(data.token_file, windows, batch_size), autocast)
    mode = 'compiled' if compiled else 'eager'
    print0(f'{trained.origin}: {split} of {data.dataset}, {tokens:,} tokens in {len(windows):,} '
           f'windows of {windows.length}, stride {windows.stride}; '
           f'{hardware_name(torch_device)}, {precision_name}{weights_in_words()}, {mode}')
    return split_loss(gpt, data.token_file, windows, data.byte_counts, batch_size, process,
                      autocast)


def compile_blocks(gpt, batches, autocast):
    """Compiles the blocks of a GPT; returns whether that worked.

    The loss is computed in parts, and stays eager."""
    tokens = torch.from_numpy(batches.read(0).tokens).to(torch_device)

    def trial():
        with autocast():
            token_losses(gpt, tokens[:, :-1], tokens[:, 1:])

    return compile_or_warn(gpt, trial, parts=list(gpt.transformer.h))


all_measured = []
for trained, data in zip(models, data_of_models, strict=True):
    all_measured.append(measure(trained, data))
    trained.gpt.cpu()  # makes room for the next one
    release_memory(torch_device)

# ---- report ----
results = []
for trained, data, measured in zip(models, data_of_models, all_measured, strict=True):
    results.append({
        'model': trained.name,
        'dataset': data.dataset,
        'split': split,
        'context_size': window_length,
        'stride': window_stride,
        **comparison.figures(measured),
    })


if compare:
    # Tokens of different vocabularies differ in length, so losses per token say nothing then.
    first_tokenizer = models[0].tokenizer
    same = all(same_vocabulary(first_tokenizer, trained.tokenizer) for trained in models)
    compared = 'loss' if same else 'bits per byte'
    for result, measured in zip(results[1:], all_measured[1:], strict=True):
        result['difference'] = comparison.difference(all_measured[0], measured, compared)
    for line in comparison.table(results):
        print0(line)
else:
    print0(comparison.describe(results[0]))

if output and process.rank == 0:
    with explained(OSError, prefix='output cannot be written: '):
        write_atomically(output, comparison.to_json(results))
leave(0)
