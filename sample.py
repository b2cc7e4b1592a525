"""
Writes text with a trained model or a published GPT-2:

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="The best way to learn is" --num_samples=5 --max_new_tokens=100
    python sample.py --start=FILE:prompt.txt
    python sample.py --prompts=prompts.jsonl --output=completions.jsonl
    python sample.py --adapter=out-lora/adapter --merge=out-merged

The fourth reads one prompt a line, {"prompt": "…"}, and writes {"prompt": "…", "completions": ["…", …]} for each. The
fifth writes a checkpoint in place of text.
"""
import json
import math
import os
import signal
import sys
from dataclasses import asdict
from functools import partial

import torch
from tqdm import tqdm

from configurator import configure
from plaingpt.formats import peft_adapter
from plaingpt.inference.engine import stream
from plaingpt.system.devices import (
    check_device,
    compile_or_warn,
    default_device,
    default_dtype,
    hardware_name,
    room_for_batch,
    set_up_math,
)
from plaingpt.system.messages import UserError, complaints, explained, warn
from plaingpt.text.data_sets import read_meta
from plaingpt.text.tokenizers import load_tokenizer
from plaingpt.training import checkpoints, lora, run_folder, starting_weights

# ---- configuration ----
# Model
init_from = 'resume'                # resume (out_dir), gpt2 to gpt2-xl, a hub id, or a model's directory or .pt file
out_dir = 'out'                     # folder of the run, relative to where you are
adapter = ''                        # folder of a LoRA adapter, to the base that it names unless init_from names another
merge = ''                          # folder to write the model to, with its adapter merged, in place of text
# Prompts
start = '\n'                        # the prompt; FILE:prompt.txt takes the text of a file
prompts = ''                        # a .jsonl file of many prompts, in place of start
output = ''                         # the .jsonl file to write their completions to
# Sampling
num_samples = 10                    # [1, 1000000] completions of each prompt
max_new_tokens = 500                # >= 0 tokens in a completion
temperature = 0.8                   # >= 0; below 1 bolder, above 1 wilder, 0 the likeliest token always
top_k: int | None = 200             # >= 0 likeliest tokens to choose from; 0 or None: all
top_p: float | None = None          # (0, 1], choose from the fewest tokens of this probability in sum; None: all
min_p: float | None = None          # [0, 1], choose from tokens this times as likely as the likeliest; None: all
repetition_penalty = 1.0            # > 0; above 1 makes tokens that the text has already less likely
stop = ''                           # text that ends a completion, and is not part of it; '': none
context_size: int | None = None     # >= 1 tokens that it sees; None: block_size; more if positions are not learned
stride: int | None = None           # >= 1 tokens by which a full context moves; None: half of it, 1 at temperature 0
seed = 1337                         # [0, 4294967295], the same seed gives the same text
# System
device = default_device()           # cuda, cuda:1, mps or cpu; unless told, the best one here
dtype = 'auto'                      # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = False                     # torch.compile, which takes a while to start


def problems():
    if bool(prompts) != bool(output):
        yield 'prompts and output go together: --prompts=prompts.jsonl --output=completions.jsonl'
    elif output and os.path.isdir(output):
        yield f'output={output} is a folder: name a file'
    if merge and (prompts or os.path.exists(merge) and not os.path.isdir(merge)):
        yield f'merge={merge} is for a checkpoint: name a folder, and leave out prompts'
    yield from complaints(check_device, device)


config, given = configure(globals())


def read_text(path):
    try:
        with open(path, encoding='utf-8-sig') as file:  # a byte-order mark is no part of the text
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text (byte {error.start}): save it as UTF-8') from None
    except (OSError, ValueError) as error:
        raise UserError(f'{path!r} cannot be read ({getattr(error, "strerror", error)})') from None


def read_prompts(path):
    """The prompts of a .jsonl file, as a list of str."""
    found = []
    for number, line in enumerate(read_text(path).split('\n'), start=1):
        try:
            if line.strip():
                found.append(json.loads(line)['prompt'] + '')
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise UserError(f'{path}, line {number}: expected a JSON object like {{"prompt": "text"}}') from None
        if found[-1:] == ['']:
            raise UserError(f'{path}, line {number}: the prompt is empty; give at least a newline, "\\n"')
    if not found:
        raise UserError(f'{path} has no prompts')
    return found


# ---- prompts: read before the model, which takes longer ----
if prompts:
    texts = read_prompts(prompts)
    if not os.path.isdir(os.path.dirname(output) or '.'):
        raise UserError(f'output={output}: there is no folder {os.path.dirname(output)}')
else:
    texts = [read_text(start[5:]) if start.startswith('FILE:') else start]

# ---- model and tokenizer ----
device = check_device(device)
set_up_math(seed, device)
adapted = peft_adapter.load_adapter(adapter) if adapter else None
if adapted and 'init_from' not in given:
    init_from = adapted.lora['base']
    if not init_from:
        raise UserError(f'{adapter} does not name its base: give it with --init_from')
with explained(ValueError, prefix=f'init_from={init_from}: '):
    saved, path = checkpoints.load_to_sample(out_dir) if init_from == 'resume' else starting_weights.find(init_from)
    model = starting_weights.build(saved, path)
about = saved.get('tokenizer') if saved else {'kind': 'gpt2'}
lora.merge_adapter(model)  # of a LoRA run
if adapted:
    lora.apply_adapter(model, adapted, path)
    lora.merge_adapter(model)
    about = adapted.tokenizer or about
if about is None:  # nanoGPT keeps the characters with the data only
    data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', checkpoints.data_set(saved, path))
    about = read_meta(data_dir)['tokenizer']
    warn(f"{path} names no tokenizer: taking the one of {data_dir}, kind {about['kind']!r}")
if merge:
    state = {'model': model.state_dict(), 'optimizer': {}, 'model_args': asdict(model.config), 'iter_num': 0,
             'best_val_loss': math.inf, 'tokenizer': about,
             'config': {key: saved['config'][key] for key in ('dataset',) if key in saved.get('config', {})}}
    run_folder.enter(merge)
    with explained(OSError, ValueError, prefix='merge cannot be written: '):
        run_folder.set_aside(merge)
        checkpoints.save(merge, state, ['ckpt'])
    print(f'{os.path.join(merge, "ckpt.pt")} is a plain model now. Try:\npython sample.py --out_dir={merge}')
    sys.exit(0)
tokenizer = load_tokenizer(about)
if tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(f'{path} has a vocabulary of {model.config.vocab_size} tokens and its tokenizer one of '
                    f'{tokenizer.vocab_size}: they do not belong together')
precision_name = default_dtype(device, model.config.n_embd, training=False) if dtype == 'auto' else dtype
model.eval().to(device, getattr(torch, precision_name))
encoded = [tokenizer.encode(text) for text in texts]
if compile:
    example = torch.zeros(1, 1, dtype=torch.int64, device=device)
    compile = compile_or_warn(model, lambda: model.generate(example, min(3, model.config.block_size),
                                                            num_samples=min(num_samples, 2)), dynamic=True)
origin = path + (f", step {saved['iter_num']}" if saved else '') + (f' with {adapter}' if adapter else '')
print(f'{origin}; {hardware_name(device)}, {precision_name}, {"compiled" if compile else "eager"}', file=sys.stderr)


# ---- generation ----
def batches():
    """Yields (first, last, samples): prompts first to last - 1 and a range of samples of each, to be continued at once,
    as many as there is memory for keys, values and logits, and for encoding the prompts."""
    c = model.config
    longest = min(context_size or c.block_size, max(map(len, encoded)) + max_new_tokens)
    position = 8 * c.n_layer * c.n_kv_head * c.head_size + 40 * c.n_embd  # bytes
    rows = max(1, min(256, room_for_batch(device) // (longest * position + 20 * c.vocab_size)))
    together = max(1, rows // num_samples)
    for first in range(0, len(encoded), together):
        for begin in range(0, num_samples, rows):
            yield first, min(first + together, len(encoded)), range(begin, min(begin + rows, num_samples))


def complete(first, last, samples, show=None):
    """Completions of a batch, as a list of str; show is called with each piece of the first as it comes."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in encoded[first:last]]
    seeds = [((seed * 1_000_003 + prompt) * 1_000_003 + sample) % 2 ** 63
             for prompt in range(first, last) for sample in samples]
    texts, shown, unfinished = [''] * len(seeds), 0, range(len(seeds))
    decoders, new = [tokenizer.decoder() for _ in seeds], [torch.empty(len(seeds), 0, dtype=torch.int64, device=device)]
    with explained(ValueError):
        for chosen in stream(model, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device), max_new_tokens,
                             temperature, top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
                             vocab_size=tokenizer.vocab_size, lengths=[len(row) for row in ids],
                             num_samples=len(samples), seeds=seeds, stride=stride,
                             context_size=context_size):
            new.append(chosen)  # (rows, 1)
            if not (show or stop):
                continue  # no step waits for the device
            chosen = chosen.tolist()
            for row in unfinished if stop else [0]:
                texts[row] += decoders[row](chosen[row])
            if stop:
                unfinished = [row for row in unfinished if stop not in texts[row]]
                if not unfinished:
                    break
            if show and 0 in unfinished:  # what may be the beginning of stop waits
                ready = max(shown, len(texts[0]) - max(0, len(stop) - 1))
                show(texts[0][shown:ready])
                shown = ready
    texts = [tokenizer.decode(row) for row in torch.cat(new, dim=1).tolist()]
    if stop:
        texts = [text.partition(stop)[0] for text in texts]
    if show:
        show(texts[0][shown:])
    return texts


for name in 'SIGINT', 'SIGPIPE':  # Ctrl-C ends the text, and so does `| head`, without a traceback
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
sys.stdout.reconfigure(errors='replace')  # a terminal may not know every character of the text
if prompts:
    found = [[] for _ in texts]
    with explained(OSError, ValueError, prefix='output cannot be written: '):
        # backslashreplace: half a surrogate pair, which JSON allows and UTF-8 does not, stays an escape
        with open(output + '.tmp', 'w', encoding='utf-8', errors='backslashreplace') as file:
            for first, last, samples in tqdm(list(batches()), 'batches', disable=None):
                completed = complete(first, last, samples)
                for number in range(first, last):
                    found[number] += completed[(number - first) * len(samples):][:len(samples)]
                    if len(found[number]) == num_samples:
                        line = {'prompt': texts[number], 'completions': found[number]}
                        file.write(json.dumps(line, ensure_ascii=False) + '\n')
        os.replace(output + '.tmp', output)
else:
    live = sys.stdout.isatty()
    write = partial(print, end='', flush=True)
    for first, last, samples in batches():
        show = write if live and samples[0] == 0 else None
        if show:
            show(texts[0])
        for i, completion in enumerate(complete(first, last, samples, show)):
            print(('' if show and i == 0 else texts[0] + completion) + '\n---------------')
