"""
Writes text with a trained or a published model:

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="The best way to learn is" --num_samples=5
    python sample.py --start=FILE:prompt.txt
    python sample.py --prompts=prompts.jsonl --output=completions.jsonl
    python sample.py --adapter=out-lora/adapter --merge=out-merged

The fourth command reads one prompt a line, {"prompt": "…"}, and writes one line for each,
{"prompt": "…", "completions": ["…", …]}. The fifth writes a checkpoint instead of text.
"""
import json
import math
import os
import signal
import sys
from dataclasses import asdict
from typing import NamedTuple

import torch
from tqdm import tqdm

from configurator import configure
from plaingpt.inference.completion import complete
from plaingpt.inference.engine import InvalidArguments, stream
from plaingpt.inference.quantization import place_to_generate
from plaingpt.inference.window import cache_room
from plaingpt.system.compiling import compile_or_warn
from plaingpt.system.devices import (check_device, default_device, hardware_name, room_for_batch,
                                     set_up_math)
from plaingpt.system.files import replacing
from plaingpt.system.messages import UserError, complaints, explained
from plaingpt.system.seeds import mixed_seed
from plaingpt.training import checkpoints, run_folder
from plaingpt.training.trained_model import open_named

# ---- configuration ----
# Model
init_from = 'resume'                # resume (out_dir), gpt2 to gpt2-xl, hub id, folder, .pt, .gguf
out_dir = 'out'                     # folder of the run, relative to the working directory
adapter = ''                        # folder of a LoRA adapter; init_from is then the base it names
merge = ''                          # folder to write the merged model to, instead of text
# Prompts
start = '\n'                        # the prompt; FILE:prompt.txt takes the text of a file
prompts = ''                        # a .jsonl file of many prompts, instead of start
output = ''                         # the .jsonl file for their completions
# Sampling
num_samples = 10                    # {[1, 1000000]} completions of each prompt
max_new_tokens = 500                # {>= 0} tokens in a completion
temperature = 0.8                   # {>= 0} 0: always the likeliest token; above 1: wilder
top_k: int | None = 200             # {>= 0} sample from the k likeliest tokens; 0 or None: all
top_p: float | None = None          # {(0, 1]} sample from the likeliest, whose sum is p; None: all
min_p: float | None = None          # {[0, 1]} drop tokens below p times the likeliest; None: none
repetition_penalty = 1.0            # {> 0} above 1: tokens already in the text are less likely
stop = ''                           # text that ends a completion, and is cut off; '': none
context_size: int | None = None     # {>= 1} most tokens the model sees; None: block_size
stride: int | None = None           # {>= 1} tokens a full context moves on; None: half; greedy: 1
seed = 1337                         # {[0, 4294967295]} the same seed gives the same text
# System
device = default_device()           # cuda, cuda:1, mps or cpu; default: the best one here
dtype = 'auto'                      # {'auto' | 'float32' | 'bfloat16' | 'float16'}
quantize = ''                       # {'' | 'int8' | 'int4'} bits of a weight: smaller and faster
compile = False                     # True: torch.compile, which takes a while to start


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    if bool(prompts) != bool(output):
        yield 'prompts and output go together: --prompts=prompts.jsonl --output=completions.jsonl'
    elif '\0' in output:
        yield f'output={output!r} contains a NUL character, which no file name can have'
    elif os.path.isdir(output):
        yield f'output={output} is a folder: name a file'
    if merge:
        yield from complaints(run_folder.check_name, merge, 'merge')
    if merge and prompts:
        yield f'merge={merge} writes a checkpoint instead of text: leave out prompts'
    if merge and quantize:
        yield f'merge={merge} writes all bits of the weights: leave out quantize'
    if compile and quantize and device.startswith('cpu'):
        yield 'on a CPU, compile=True does not go with quantize: leave one of them out'
    yield from complaints(check_device, device)


config, given = configure(globals())


# ---- prompts ----
# They are read before the model, which takes longer.
def read_text(path):
    """The text of a UTF-8 file. UserError if it can't be read."""
    try:
        with open(path, encoding='utf-8-sig') as file:  # a byte-order mark is no part of the text
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text (byte {error.start}): '
                        'save it as UTF-8') from None
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', error)
        raise UserError(f'{path!r} cannot be read ({reason})') from None


def read_prompts(path):
    """The prompts of a .jsonl file, a list of str. UserError if a line has none."""
    found = []
    for number, line in enumerate(read_text(path).split('\n'), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)['prompt']
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{path}, line {number}: expected a JSON object like '
                            '{"prompt": "text"}')
        if prompt == '':
            raise UserError(f'{path}, line {number}: the prompt is empty; give at least a '
                            'newline, "\\n"')
        found.append(prompt)
    if not found:
        raise UserError(f'{path} has no prompts')
    return found


if prompts:
    texts = read_prompts(prompts)
    if not os.path.isdir(os.path.dirname(output) or '.'):
        raise UserError(f'output={output}: there is no folder {os.path.dirname(output)}')
elif start.startswith('FILE:'):
    texts = [read_text(start.removeprefix('FILE:'))]
else:
    texts = [start]

# ---- model ----
torch_device = check_device(device)
set_up_math(seed, torch_device)
trained = open_named(config, given)
model = trained.gpt


# ---- a checkpoint instead of text ----
def write_merged(folder):
    """Writes the model, with its adapter merged, to ckpt.pt in a folder."""
    config = {}
    if 'dataset' in trained.saved.get('config', {}):
        config['dataset'] = trained.saved['config']['dataset']
    checkpoint = {
        'model': model.state_dict(),
        'optimizer': {},
        'model_args': asdict(model.config),
        'iter_num': 0,
        'best_val_loss': math.inf,
        'tokenizer': trained.tokenizer,
        'config': config,
    }
    run_folder.enter(folder)
    with explained(OSError, checkpoints.NotFinite, prefix='merge cannot be written: '):
        run_folder.set_aside(folder)
        checkpoints.save(folder, checkpoint, ['ckpt'])


if merge:
    write_merged(merge)
    print(f'{os.path.join(merge, "ckpt.pt")} is a plain model now. Try:\n'
          f'python sample.py --out_dir={merge}')
    sys.exit(0)

# ---- encoding, device, precision ----
tokenizer = trained.load_tokenizer()
encoded = [tokenizer.encode(text) for text in texts]

precision_name = place_to_generate(model, torch_device, dtype, quantize)

compiled = False
if compile:
    example = torch.zeros(1, 1, dtype=torch.int64, device=torch_device)
    new_tokens = min(3, model.config.block_size)

    def trial():
        model.generate(example, new_tokens, num_samples=min(num_samples, 2))

    compiled = compile_or_warn(model, trial, dynamic=True)

# One line on stderr says what writes the text.
mode = 'compiled' if compiled else 'eager'
weights = f', {quantize} weights' if quantize else ''
print(f'{trained.origin}; {hardware_name(torch_device)}, {precision_name}{weights}, {mode}',
      file=sys.stderr)


# ---- generation ----
class Batch(NamedTuple):
    """The prompts first to last - 1, and some samples of each, that are continued together."""
    first: int
    last: int
    samples: range


def batches():
    """Yields Batches as large as memory allows for keys, values, logits and reading the prompts."""
    shape = model.config
    longest = max(len(ids) for ids in encoded) + max_new_tokens
    longest = min(longest, context_size or shape.block_size)
    # For each position, a key and a value of 4 bytes in each block, and about ten activations while
    # the prompt is read; for each token of the vocabulary, about five numbers while one is chosen.
    cache_bytes = 8 * shape.n_layer * shape.n_kv_head * shape.head_size
    activation_bytes = 40 * shape.n_embd
    positions = cache_room(longest, longest, torch_device)
    row_bytes = positions * cache_bytes + longest * activation_bytes + 20 * shape.vocab_size
    rows = max(1, min(256, room_for_batch(torch_device) // row_bytes))
    together = max(1, rows // num_samples)  # prompts
    for first in range(0, len(encoded), together):
        last = min(first + together, len(encoded))
        for begin in range(0, num_samples, rows):
            yield Batch(first, last, range(begin, min(begin + rows, num_samples)))


def new_ids(batch):
    """Yields the next ids of a batch, int64 (rows, 1), one position after another."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in encoded[batch.first:batch.last]]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    seeds = []
    for prompt in range(batch.first, batch.last):
        for sample in batch.samples:
            seeds.append(mixed_seed(seed, prompt, sample))
    with explained(InvalidArguments):
        yield from stream(model, padded.to(torch_device), max_new_tokens, temperature, top_k,
                          top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
                          vocab_size=tokenizer.vocab_size, lengths=[len(row) for row in ids],
                          num_samples=len(batch.samples), seeds=seeds, stride=stride,
                          context_size=context_size)


def completions_of(batch, show=None):
    """The completions of a batch, a list of str; show: as in complete()."""
    rows = (batch.last - batch.first) * len(batch.samples)
    stops = [stop] if stop else []
    return complete(new_ids(batch), rows, tokenizer, stops, show)


def write_completions(file):
    """Completes all prompts, and writes a line for each to a binary file."""
    found = [[] for _ in texts]
    for batch in tqdm(list(batches()), 'batches', disable=None):
        completions = completions_of(batch)
        for number in range(batch.first, batch.last):
            begin = (number - batch.first) * len(batch.samples)
            found[number] += completions[begin:begin + len(batch.samples)]
            if len(found[number]) == num_samples:
                entry = {'prompt': texts[number], 'completions': found[number]}
                line = json.dumps(entry, ensure_ascii=False) + '\n'
                # Half a surrogate pair, which JSON allows and UTF-8 does not, stays an escape.
                file.write(line.encode('utf-8', errors='backslashreplace'))


def print_piece(text):
    print(text, end='', flush=True)


def end_quietly():
    """Lets Ctrl-C, or the end of a reader such as `| head`, end the text without a traceback."""
    for name in ('SIGINT', 'SIGPIPE'):
        if hasattr(signal, name):  # Windows has no SIGPIPE
            signal.signal(getattr(signal, name), signal.SIG_DFL)


if prompts:
    # Here Ctrl-C stays an exception, so that the unfinished file is removed.
    with (explained(OSError, UnicodeEncodeError, prefix='output cannot be written: '),
          replacing(output) as file):
        write_completions(file)
else:
    end_quietly()
    sys.stdout.reconfigure(errors='replace')  # the terminal may lack some characters of the text
    prompt = texts[0]
    for batch in batches():
        # On a terminal the first completion appears piece by piece.
        live = sys.stdout.isatty() and batch.samples[0] == 0
        if live:
            print_piece(prompt)
        completions = completions_of(batch, print_piece if live else None)
        for number, completion in enumerate(completions):
            already_shown = live and number == 0
            if not already_shown:
                print_piece(prompt + completion)
            print('\n---------------')
