"""
Writes text with a trained model or a published GPT-2:

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="The best way to learn is" --num_samples=5 --max_new_tokens=100
    python sample.py --start=FILE:prompt.txt
    python sample.py --prompts=prompts.jsonl --output=completions.jsonl

The last reads one prompt a line, {"prompt": "…"}, and writes {"prompt": "…", "completions": ["…", …]} for each.
"""
import json
import os
import signal
import sys
from functools import partial

import torch
from tqdm import tqdm

import checkpoint
from configurator import configure
from loader import read_meta
from model import GPT, GPTConfig
from runtime import (UserError, check_device, compile_or_warn, complaints, default_device, device_name, explained,
                     precision, set_up_math, warn)
from tokenizer import GPT2Tokenizer, load_tokenizer

# ---- configuration ----
# Model
init_from = 'resume'                # resume (out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id or directory
out_dir = 'out'                     # folder of the run, relative to where you are
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
precision_name, autocast, _ = precision(device, dtype)
set_up_math(seed, device)
if init_from == 'resume':
    saved, path = checkpoint.load_to_sample(out_dir)
    with explained(ValueError, TypeError, prefix=f'{path}: '):
        model = GPT(GPTConfig(**saved['model_args'] | {'dropout': 0.0}))
    checkpoint.restore_model(model, saved, path)
    about = saved.get('tokenizer')
    if about is None:  # nanoGPT keeps the characters with the data only
        data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', checkpoint.data_set(saved, path))
        about = read_meta(data_dir)['tokenizer']
        warn(f"{path} names no tokenizer: taking the one of {data_dir}, kind {about['kind']!r}")
    tokenizer, origin = load_tokenizer(about), f"{path}, step {saved['iter_num']}"
else:
    with explained(ValueError, prefix=f'init_from={init_from}: '):
        model = GPT.from_pretrained(init_from)
    tokenizer, path = GPT2Tokenizer(), init_from
    origin = init_from
if tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(f'{path} has a vocabulary of {model.config.vocab_size} tokens and its tokenizer one of '
                    f'{tokenizer.vocab_size}: they do not belong together')
model.eval().to(device)
if compile:
    with torch.no_grad(), autocast():
        example = torch.zeros(num_samples, 2, dtype=torch.int64, device=device)
        compile = compile_or_warn(model, lambda: model(example), dynamic=True)
print(f'{origin}; {device_name(device)}, {precision_name}, {"compiled" if compile else "eager"}', file=sys.stderr)


# ---- generation ----
def complete(ids, number, show=None):
    """Completions of a prompt's ids, as a list of num_samples str; show is called with each piece of the first."""
    context = torch.tensor([ids], dtype=torch.int64, device=device).expand(num_samples, -1)  # (num_samples, T)
    generator = torch.Generator(device).manual_seed(seed + number)
    decode_piece, new = tokenizer.decoder(), []
    with autocast(), explained(ValueError):
        for chosen in model.stream(context, max_new_tokens, temperature, top_k, top_p, vocab_size=tokenizer.vocab_size,
                                   generator=generator):
            new.append(chosen)  # (num_samples, 1)
            if show:
                show(decode_piece(chosen[0].tolist()))
    return [tokenizer.decode(row) for row in torch.cat([context[:, :0], *new], dim=1).tolist()]


for name in 'SIGINT', 'SIGPIPE':  # Ctrl-C ends the text, and so does `| head`, without a traceback
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
sys.stdout.reconfigure(errors='replace')  # a terminal may not know every character of the text
encoded = [tokenizer.encode(text) for text in texts]
if prompts:
    with explained(OSError, ValueError, prefix='output cannot be written: '):
        # backslashreplace: half a surrogate pair, which JSON allows and UTF-8 does not, stays an escape
        with open(output + '.tmp', 'w', encoding='utf-8', errors='backslashreplace') as file:
            for number, text in enumerate(tqdm(texts, 'prompts', disable=None)):
                line = {'prompt': text, 'completions': complete(encoded[number], number)}
                file.write(json.dumps(line, ensure_ascii=False) + '\n')
        os.replace(output + '.tmp', output)
else:
    live = sys.stdout.isatty()
    write = partial(print, end='', flush=True)
    if live:
        write(texts[0])
    for i, completion in enumerate(complete(encoded[0], 0, write if live else None)):
        print(('' if live and i == 0 else texts[0] + completion) + '\n---------------')
